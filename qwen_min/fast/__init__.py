"""The wing for speed: the plain model's functions by faster ways, equal to rounding, installed at its seams.

`import qwen_min` turns it on. `off()` leaves the plain model alone, which is what to read and to compare with; `on()`
takes it back. The seams are the names of `ops.FAST`, and `Qwen.compile`.
"""

from collections.abc import Callable

from qwen_min import ops
from qwen_min.fast import captured, compiled, limits, loss, maths, tree
from qwen_min.model import Qwen

WAYS: dict[str, Callable] = {
    "linear": maths.linear,
    "plus": maths.plus,
    "rms_norm": maths.rms_norm,
    "rotate": maths.rotate,
    "attend": maths.attend,
    "swiglu": maths.swiglu,
    "cross_entropy": loss.cross_entropy,
    "read": limits.read,
    "forward": captured.forward_of_one,
    "tree": tree.decode,
}
"""What answers at each seam."""


def on() -> None:
    """Let the fast ways answer, in this process."""
    ops.FAST.update(WAYS)
    ops.COMPILABLE["attend"] = maths.attend  # torch's compiler writes the others itself, from the plain maths


def off() -> None:
    """Let nothing answer: the plain maths run alone."""
    ops.FAST.clear()
    ops.COMPILABLE.clear()


def enabled() -> bool:
    """Whether the fast ways answer."""
    return bool(ops.FAST)


Qwen.compile = compiled.compile_model  # type: ignore[method-assign,assignment]
on()
