"""`flops --measure`: the seconds that each op took in a real forward, beside those that its FLOPs and bytes predict.

An op charges the meter on the line above its arithmetic, so the time from one charge to the next is that op's, with the
copies after it, which nobody charges.
"""

import re
import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from experiments.run_folder.table import aligned
from qwen_min import FlopMeter, Qwen
from qwen_min.cache import KVCache
from qwen_min.costs import Node
from qwen_min.prices import Dims, Price

TOGETHER = {"bias": "linear", "scale": "scores", "softmax": "scores", "values": "scores", "positions": "embedding"}
"""Ops whose time stands with another's: the product adds its bias, and torch's kernel makes attention in one call."""
Seconds = dict[tuple[str, str], float]


def now() -> tuple[float, float]:
    """Seconds that went by, and those that this process had the processor, of all its threads."""
    return time.perf_counter(), time.process_time()


class Clocked(FlopMeter):
    """A meter that looks at the clock: `seconds` of a forward by (module, op); those of `TOGETHER` with the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Seconds = defaultdict(float)
        self._op: tuple[str, str] | None = None
        self._since = now()

    def see(self, module: str, price: Price, dims: Dims, times: int = 1) -> None:
        super().see(module, price, dims, times)
        self._stop()
        self._op, self._since = (module, TOGETHER.get(price.name, price.name)), now()

    def __exit__(self, *_: object) -> None:
        self._stop()
        super().__exit__()

    def _stop(self) -> None:
        if self._op:
            # The fewer of both: a process that waits for the processor does not work at the op.
            self.seconds[self._op] += min(end - since for end, since in zip(now(), self._since, strict=True))
        self._op = None


@torch.no_grad()
def clocked(model: Qwen, ids: Tensor, cached: int = 0, repeats: int = 3) -> Seconds:
    """The fewest seconds of every op in `repeats` forwards of (B, T) ids after `cached` tokens, after one more forward.

    In that one libraries make their plans. Others may take the processor meanwhile: so the fewest of each op, not the
    fastest forward.
    """
    found = []
    for _ in range(1 + repeats):
        cache = None
        if cached:
            cache = KVCache(model.config, len(ids), cached + ids.shape[1], model.compute_dtype, model.device)
            cache.store.zero_()
            cache.advance(cached)
        meter = Clocked()
        with meter:
            model(ids, cache)
        found.append(meter.seconds)
    return {place: min(seconds[place] for seconds in found[1:]) for place in found[0]}


def beside(tree: Node, seconds: Seconds, rate: float, bandwidth: float) -> list[dict[str, Any]]:
    """A record for each op, equal places of all layers as one, the slowest first: `op, places, predicted, measured`.

    An op is predicted to take the longer of its FLOPs at `rate` a second and its bytes at `bandwidth`; `memory_bound`
    is the part of its prediction that the bytes are.

    Args:
        tree: of a meter that saw the same forward, in the convention `exact`.
    """
    found: dict[str, dict[str, Any]] = {}
    places = defaultdict(set)
    for node in (node for _, node in tree.walk() if node.charge):
        key = node.path, TOGETHER.get(node.name, node.name)
        name = f"{re.sub(r'[.][0-9]+', '.*', node.path)} {key[1]}".strip()
        places[name].add(key)
        row = found.setdefault(name, {"op": name, "predicted": 0.0, "measured": 0.0, "memory_bound": 0.0})
        arithmetic = node.forward.total / rate
        memory = (node.forward.read + node.forward.written) / bandwidth
        row["predicted"] += max(arithmetic, memory)
        row["memory_bound"] += memory if memory > arithmetic else 0.0
    for name, row in found.items():
        row |= {"places": len(places[name]), "measured": sum(seconds.get(key, 0.0) for key in places[name])}
        row["memory_bound"] /= row["predicted"] or 1.0
    return sorted(found.values(), key=lambda row: -row["measured"])


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Those that took any time, in milliseconds, and all of them."""
    whole = {name: sum(row[name] for row in rows) for name in ("predicted", "measured")}
    shown = [["op", "places", "predicted ms", "measured ms", "times as long", "bound by"]]
    for row in [row for row in rows if row["measured"] or row["predicted"]] + [whole | {"op": "all", "places": ""}]:
        longer = f"{row['measured'] / row['predicted']:.2f}" if row["predicted"] else ""
        figures = [f"{1e3 * row[name]:,.3f}" for name in ("predicted", "measured")]
        bound = "memory" if row.get("memory_bound", 0) > 0.5 else "arithmetic"
        shown.append([row["op"], str(row["places"]), *figures, longer, bound if "memory_bound" in row else ""])
    return aligned(shown, 1)
