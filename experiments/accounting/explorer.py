"""The explorer: one page that prices any setting by the ops' own formulas, without a network.

A forward on the meta device of a small model whose sizes are different primes shows how each dimension of each charge
is made: its factors say which sizes it is a product of. The page holds those charges and the prices' formulas, and
evaluates them for any size, batch, context, cache and rank.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.resources import files
from itertools import cycle, product
from typing import Any

import torch

from experiments.accounting.clock import TOGETHER, Seconds
from experiments.accounting.predict import predict
from lora.layer import TARGETS
from qwen_min import QwenConfig
from qwen_min.config import SIZES
from qwen_min.fast.product import product as multiplied
from qwen_min.prices import CONVENTIONS, PRIMITIVES, Price

MOST = 10**6
"""Bytes of a page."""
TARGET_SETS = (
    TARGETS,
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("gate_proj", "up_proj", "down_proj"),
    ("all-linear",),
)
MACHINES = (  # name and source, FLOP/s of dense products, bytes/s of memory
    ("NVIDIA H100 SXM, bfloat16 (its data sheet)", 989e12, 3.35e12),
    ("NVIDIA A100 SXM 80 GB, bfloat16 (its data sheet)", 312e12, 2.039e12),
)

_K, _D, _F, _V, _B, _T, _CACHED, _R = 101, 2 * 107, 109, 113, 127, 131, 6, 139
_H, _E = _K * 103, _K * 103 * _D
_SIZES = {"E": _E, "H": _H, "K": _K, "D": _D, "F": _F, "V": _V, "B": _B, "T": _T, "S": _CACHED + _T, "R": _R}
_PASSES: dict[str, Any] = {"forward": {"cached": _CACHED}, "last": {"last_only": True}, "training": {"training": True}}
_LITERAL = 100  # below it a dimension is a number: a flag, or how many layers read a tensor


def form(number: int) -> str:
    """A dimension of a charge of the model of primes as a product of sizes, e.g. "B*T"."""
    if number < _LITERAL:
        return str(number)
    factors = []
    for name, size in _SIZES.items():
        while number % size == 0:
            factors.append(name)
            number //= size
    assert number == 1, f"a dimension is no product of the model's sizes: {number} is left"
    return "*".join(factors)


def programs(target_sets: Sequence[Sequence[str]]) -> tuple[list[Price], dict[str, list[list[Any]]]]:
    """The prices, and the charges of "PASS TIED TARGETS", each [module, price's place, times, [dimension, ...]].

    PASS is forward (with a cache), last (a prefill's, with the logits of its last token) or training; a dimension is a
    `form`, or [true, coursework]. Layer 1 stands for all but layer 0.
    """
    prices: dict[Price, int] = {}
    found = {}
    for tied, targets in product((True, False), (*target_sets, ())):
        config = QwenConfig(_V, _E, _F, 2, _H, _K, 1e6, 1e-6, 4096, tied)
        lora: dict[str, Any] = {"rank": _R, "targets": targets} if targets else {}
        for name, options in _PASSES.items():
            meter = predict(config, _B, _T, **lora, **options)
            found[f"{name} {str(tied).lower()} {' '.join(targets)}"] = [
                [charge.module, prices.setdefault(charge.price, len(prices)), charge.times, _forms(charge.dims)]
                for charge in meter.charges()
            ]
    return list(prices), found


def _forms(dims) -> list[Any]:
    return [[form(n) for n in dim] if isinstance(dim, tuple) else form(dim) for dim in dims]


def page(
    name: str,
    config: QwenConfig,
    start: dict[str, Any],
    machines: Sequence[Sequence[Any]] = (),
    seconds: Seconds | None = None,
) -> str:
    """The page, opened at the settings `start`: batch, context, cache, rank, targets, phase, convention, x, w.

    Args:
        name, config: the model that it opens with; the seven released sizes can be chosen beside it.
        machines: (name, FLOP/s, bytes/s) beside the known ones.
        seconds: what each op took in the forward that `start` describes, as `clock.clocked` has them.

    Raises:
        ValueError: the page is larger than `MOST` bytes, or a target of LoRA is of one layer alone.
    """
    if single := [target for target in start["targets"] if any(part.isdigit() for part in target.split("."))]:
        raise ValueError(f"target {single[0]!r} is of one layer: expected names that hold for every layer of the page")
    sets = list(dict.fromkeys((*TARGET_SETS, tuple(start["targets"]))))
    prices, charged = programs(sets)
    models = {f"Qwen2.5-{size}": QwenConfig.named(f"Qwen2.5-{size}") for size in SIZES} | {name: config}
    data = {
        "start": start | {"model": name, "targets": " ".join(start["targets"])},
        "models": {key: sizes(model) for key, model in models.items()},
        "targets": [" ".join(targets) for targets in sets],
        "conventions": CONVENTIONS,
        "primitives": PRIMITIVES,
        "machines": [*machines, *MACHINES],
        "prices": [_price(p) for p in prices],
        "programs": charged,
        "together": TOGETHER,
        "seconds": {f"{module} {op}": float(f"{took:.4g}") for (module, op), took in (seconds or {}).items()},
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    template = files("experiments.accounting").joinpath("templates/explorer.html").read_text(encoding="utf-8")
    text = template.replace("/*DATA*/null", text)
    if len(text.encode()) > MOST:
        raise ValueError(f"the page of {name} is {len(text.encode()):,} bytes: expected at most {MOST:,}")
    return text


def sizes(config: QwenConfig) -> dict[str, Any]:
    """A model's sizes under the dimension letters of `qwen_min.model`."""
    letters = {"E": config.hidden_size, "H": config.num_attention_heads, "K": config.num_key_value_heads}
    letters |= {"D": config.head_dim, "F": config.intermediate_size, "V": config.vocab_size}
    return letters | {"L": config.num_hidden_layers, "tied": config.tie_word_embeddings}


def _price(price: Price) -> dict[str, Any]:
    shown: dict[str, Any] = {"name": price.name, "component": price.component, "dims": price.dims, "only": price.only}
    shown |= {"product": price.product, "d_products": price.d_products, "moves": price.moves}
    shown |= {"forward": price.forward, "backward": price.backward}
    return shown | {"formulas": {convention: price.formula(convention) for convention in CONVENTIONS}}


def calibrated(seconds: float = 2.0) -> tuple[str, float, float]:
    """This machine as it runs now: FLOP/s of the model's float32 product of 512 x 512, bytes/s of a copy of 4 MB of 64.

    The fastest of many short jobs, which others that share the machine interrupt less often than one long job.
    """
    a, big = torch.randn(512, 512), torch.zeros(2**24)
    parts = list(zip(big.split(2**20), torch.zeros_like(big).split(2**20), strict=True))

    def fastest(jobs: Iterable[Callable[[], Any]]) -> float:
        best, end = float("inf"), time.perf_counter() + seconds / 2
        for job in cycle(jobs):
            begin = time.perf_counter()
            if begin > end:
                return best
            job()
            best = min(best, time.perf_counter() - begin)
        return best

    with torch.no_grad():
        flops = 2 * 512**3 / fastest([lambda: multiplied(a, a)])
        moved = 2 * 4 * 2**20 / fastest([partial(into.copy_, part) for part, into in parts])
    name = f"this machine, float32, {torch.get_num_threads()} threads (measured)"
    return name, float(f"{flops:.3g}"), float(f"{moved:.3g}")
