"""FLOPs, counted where the op runs: the ambient meter, and `charge`.

An op declares its `Price` once, as formulas over named dimensions, and calls `charge(PRICE, *dims)` on the line
beside its arithmetic. The meter keeps how often each (module, price, dimensions) was charged and evaluates the
formulas when it is asked, so a count costs one dictionary update, is an exact Python integer, and can be read under
every convention. Nothing here looks at tensor data: a forward on the meta device charges the same integers.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from torch import nn
from torch.compiler import is_compiling

from qwen_min import costs
from qwen_min.costs import Charge, Node
from qwen_min.prices import CONVENTIONS, Dim, Dims, Price


class FlopMeter:
    """Collects the FLOPs of every op that runs inside `with FlopMeter() as meter:`; meters nest, each sees all.

    All figures are exact integers. `total` is the forward; `backward` is what the gradient of those same ops costs
    (`coursework`: twice the forward; `exact` and `matmul`: the products autograd really runs, so record under enabled
    gradients); `training` is both.

    Args:
        convention: the convention that the figures are read under, one of `CONVENTIONS`.
    """

    def __init__(self, convention: str = "coursework"):
        if convention not in CONVENTIONS:
            raise ValueError(f"unknown FLOP convention {convention!r}: expected one of {', '.join(CONVENTIONS)}")
        self.convention = convention
        self._counts: dict[tuple[str, Price, Dims], int] = {}

    def __enter__(self) -> "FlopMeter":
        _meters.set((*_meters.get(), self))
        return self

    def __exit__(self, *_: object) -> None:
        _meters.set(tuple(m for m in _meters.get() if m is not self))

    def __repr__(self) -> str:
        totals = ", ".join(f"{name}={getattr(self, name):,}" for name in ("total", "backward", "training"))
        return f"FlopMeter({self.convention!r}, {totals})"

    def charges(self) -> Iterator[Charge]:
        """Every kind of charge, in the order it was first seen."""
        for (module, price, dims), count in self._counts.items():
            yield Charge(module, price, dims, count)

    def add(self, other: "FlopMeter", times: int = 1, **changed: int) -> None:
        """Charge what `other` saw, `times` over, with other numbers for some dimensions of its prices, by their names.

        So is a step charged that runs without its Python code: one that is compiled, or captured and replayed.
        """
        for (module, price, dims), count in other._counts.items():
            if changed:
                dims = tuple(changed.get(name, dim) for name, dim in zip(price.dims, dims, strict=True))
            self.see(module, price, dims, times * count)

    def see(self, module: str, price: Price, dims: Dims, times: int = 1) -> None:
        """Take one charge, made `times` over, on the line where its op runs; a subclass may look at the clock here."""
        key = module, price, dims
        self._counts[key] = self._counts.get(key, 0) + times

    @property
    def total(self) -> int:
        """FLOPs of the forward passes."""
        return sum(self.by_primitive().values())

    @property
    def backward(self) -> int:
        """FLOPs of the backward passes that belong to those forwards."""
        return sum(self._by(lambda c, p: c.price.component, phase=1).values())

    @property
    def training(self) -> int:
        """Forward and backward."""
        return self.total + self.backward

    def by_module(self, inclusive: bool = False) -> dict[str, int]:
        """Forward FLOPs by the module that ran the op, by its name in the model ("model.layers.0.mlp.up_proj").

        The module's own ops alone; `inclusive`: and those of the modules inside it, so that "" is the whole model.
        """
        if inclusive:
            return {node.path: node.forward.total for _, node in self.tree().walk() if not node.charge}
        return self._by(lambda c, p: c.module)

    def by_component(self) -> dict[str, int]:
        """Forward FLOPs by part of the architecture: q, k, v, scores, softmax, values, output, gate, ..., head."""
        return self._by(lambda c, p: costs.component(c))

    def by_primitive(self) -> dict[str, int]:
        """Forward FLOPs by primitive (an exponential counts 10)."""
        return self._by(lambda c, p: p)

    def tree(self, fold: bool = False, activation: int = 4, weight: int = 4) -> Node:
        """What was charged, as model > layers > module > op; every node holds the sum of its children.

        Args:
            fold: layers of the same FLOPs, op by op, are one node ("0-23"), which holds what they cost together.
            activation, weight: bytes of a number of each. LoRA's matrices and the logit bias have 4.

        Bytes are those of the plain maths, op by op: each tensor that an op names is read or written once, whatever a
        cache or a fused kernel saves. Token ids, masks, copies and the cache's writes are left out.
        """

        return costs.tree_of(self.charges(), self.convention, fold, activation, weight)

    def to_csv(self, path: str | Path) -> None:
        """Write a line for each op and shape: its formula, numbers, FLOPs by primitive, bytes."""
        Path(path).write_text(costs.as_csv(self.tree(), self.convention), encoding="utf-8")

    def to_html(self, path: str | Path, title: str = "FLOPs") -> None:
        """Write the tree, layers of the same cost as one, as a page that opens without a network."""
        Path(path).write_text(costs.as_html(self.tree(fold=True), self.convention, title), encoding="utf-8")

    def _by(self, key, phase: int = 0) -> dict[str, int]:
        flops: dict[str, int] = defaultdict(int)
        for charge in self.charges():
            for primitive, n in charge.price.cost(charge.dims, self.convention)[phase].items():
                flops[key(charge, primitive)] += n * charge.times
        return {name: n for name, n in flops.items() if n}


_meters: ContextVar[tuple[FlopMeter, ...]] = ContextVar("meters", default=())
_module: ContextVar[str] = ContextVar("module", default="")


def charge(price: Price, *dims: "int | Dim") -> None:
    """Charge one call of an op to every active meter, under the module whose forward is running.

    Compiled code charges nothing: see `compiled`, which does it in its place.
    """
    if is_compiling():
        return
    for meter in _meters.get():
        meter.see(_module.get(), price, dims)


def charge_again(seen: FlopMeter, **changed: int) -> None:
    """Charge every active meter what `seen` saw: see `FlopMeter.add`."""
    for meter in _meters.get():
        meter.add(seen, **changed)


def metering() -> bool:
    """Whether a charge would reach a meter."""
    return bool(_meters.get())


@contextmanager
def unmetered() -> Iterator[None]:
    """Hide what runs inside from the meters around it: a prediction is no work that anyone should be charged."""
    token = _meters.set(())
    try:
        yield
    finally:
        _meters.reset(token)


class Metered(nn.Module):
    """An `nn.Module` whose name in the model (`path`) is what its ops are charged under while its forward runs."""

    path = ""

    def extra_repr(self) -> str:
        """Its own parameters and their shapes, for `repr`."""
        return ", ".join(f"{name} {list(value.shape)}" for name, value in self.named_parameters(recurse=False))

    def __call__(self, *args, **kwargs):
        if is_compiling() or not _meters.get():
            return super().__call__(*args, **kwargs)
        token = _module.set(self.path)  # as `charged` does, whose generator would cost as much as the charges
        try:
            return super().__call__(*args, **kwargs)
        finally:
            _module.reset(token)

    @contextmanager
    def charged(self) -> Iterator[None]:
        """Charge what runs inside to this module."""
        token = _module.set(self.path)
        try:
            yield
        finally:
            _module.reset(token)
