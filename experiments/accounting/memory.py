"""`flops --memory`: what a training step, a forward and a decoded token hold in memory, before anything runs.

The model's own code runs on the meta device, by its fast ways as on a CPU, while every tensor that torch makes is
watched until it is freed: what is alive between forward and backward is what the backward needs, and the most that was
ever alive is the peak. Libraries are left out, and a processor's own buffers.
"""

import weakref
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments.run_folder.table import aligned
from lora import add_lora
from qwen_min import Qwen, QwenConfig, ops
from qwen_min.cache import KVCache
from qwen_min.fast import limits, loss, product
from qwen_min.flops import unmetered

PHASES = ("training step", "forward", "decoded token")
PARTS = ("weights", "LoRA", "gradients", "Adam", "KV cache", "logits", "kept for the backward", "at the peak")


class Alive(TorchDispatchMode):
    """Bytes of what torch has made and not freed yet: `now`, and the `most` so far. What was there before is not seen.

    Args:
        there: tensors that are there already, whose device is watched; views of them are no new memory.
    """

    def __init__(self, there: Sequence[Tensor]):
        super().__init__()
        self.now = self.most = 0
        self._device = there[0].device
        self._there = {tensor.untyped_storage()._cdata for tensor in there}
        self._held: dict[int, Any] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device == self._device:
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._there or key in self._held:
            return

        def freed(_: object) -> None:
            del self._held[key]
            self.now -= size

        self._held[key] = weakref.ref(storage, freed)
        self.now += size
        self.most = max(self.most, self.now)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Memory of torch's fused kernel on a CPU; on the meta device torch would hold all scores."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(q, k, v, 0.0, q.shape[2] > 1)[0]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Memory of a product by a kernel that widens a narrow weight in registers."""
    return x.new_empty((*x.shape[:-1], len(weight)))


@contextmanager
def _answering(seam: MutableMapping[str, Any], name: str, answer: Any) -> Iterator[None]:
    """Let `answer` stand at a seam under a name."""
    before = dict(seam)
    seam[name] = answer
    try:
        yield
    finally:
        seam.clear()
        seam.update(before)


@contextmanager
def as_on_a_cpu(tokens: int) -> Iterator[None]:
    """Let the fast ways run on the meta device with the blocks and kernels of a CPU.

    Beyond 8,192 tokens the loss's blocks are 256 logits a token, which is little beside what a token keeps.
    """
    with (
        _answering(ops.FAST, "attend", _attend),
        _answering(product.INSTEAD, "meta", _product),
        _answering(loss.LOGITS_AT_ONCE, "meta", max(loss.LOGITS_AT_ONCE["cpu"], 256 * tokens)),
        unmetered(),
    ):
        yield


def size_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of some tensors, each once."""
    return sum({t.untyped_storage()._cdata: t.numel() * t.element_size() for t in tensors}.values())


def predict(
    phase: str,
    config: QwenConfig,
    batch: int,
    tokens: int,
    rank: int = 0,
    targets: Sequence[str] = (),
    cached: int = 0,
    weight: torch.dtype = torch.float32,
    activation: torch.dtype = torch.float32,
) -> dict[str, int]:
    """Bytes by part (`PARTS`), and their sum, `total`.

    Args:
        phase: of `PHASES`. A decoded token comes after `cached` ones.
        batch, tokens: sequences that run at once, and tokens of each.
        rank, targets: of LoRA; at rank 0 every parameter is trained.
        weight, activation: types of the model's parameters and of all else; LoRA's matrices are float32.
    """
    with torch.device("meta"):
        model = Qwen(config).to(weight)
        new = 1 if phase == PHASES[2] else tokens
        ids = torch.empty(batch, new, dtype=torch.int64)
    model.tie_weights()
    model.model.embed_tokens.compute_dtype = activation
    found = dict.fromkeys(PARTS, 0)
    found["weights"] = size_of(list(model.parameters()))
    if rank:
        add_lora(model, rank, targets=targets)
    found["LoRA"] = size_of(list(model.parameters())) - found["weights"]
    held: list[Tensor] = [*model.parameters(), ids]
    with as_on_a_cpu(batch * new):
        if phase == PHASES[0]:
            _train(model, ids, held, found)
        else:
            _infer(model, ids, held, found, cached if phase == PHASES[2] else 0, activation)
    return found | {"total": sum(found.values())}


def _train(model: Qwen, ids: Tensor, held: list[Tensor], found: dict[str, int]) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    found["Adam"] = 2 * size_of(trained)
    with Alive(held) as alive:
        total, count = model.loss(ids, ids)
        found["kept for the backward"] = alive.now
        (total / count).backward()
        found["gradients"] = size_of([p.grad for p in trained if p.grad is not None])
    found["at the peak"] = alive.most - found["kept for the backward"] - found["gradients"]


@torch.no_grad()
def _infer(
    model: Qwen, ids: Tensor, held: list[Tensor], found: dict[str, int], cached: int, activation: torch.dtype
) -> None:
    batch, new = ids.shape
    kept = None
    if cached:
        kept = KVCache(model.config, batch, cached + new, activation, "meta")
        kept.advance(cached)
        found["KV cache"] = size_of([kept.store])
        held = [*held, kept.store]
    with Alive(held) as alive:
        found["logits"] = size_of([model(ids, kept)])
    found["at the peak"] = alive.most - found["logits"]


def at_once(config: QwenConfig, batch: int, tokens: int) -> int:
    """How many of `batch` sequences a training step on a CPU runs at once; their gradients are summed."""
    return min(batch, limits.sequences_at_once(SimpleNamespace(config=config, device=torch.device("cpu")), tokens))


def largest(bytes_of: Callable[[int], int], most: int) -> int:
    """The largest batch of at most so many bytes, which rise with it, nearly on a line; 0 if not even 1 fits."""
    size = cache(bytes_of)
    if size(1) > most:
        return 0
    low, high = 1, 2
    while size(high) <= most:
        low, high = high, 2 * high
    while high - low > 1:
        on_the_line = low + int((most - size(low)) * (high - low) / (size(high) - size(low)))
        middle = min(max(on_the_line, low + 1), high - 1)
        low, high = (middle, high) if size(middle) <= most else (low, middle)
    return low


def table(found: dict[str, dict[str, int]]) -> list[str]:
    """A column for each phase, in bytes; a line for each part that any has."""
    rows = [["", *found]]
    for part in (*PARTS, "total", "measured", "with holes"):
        if any(column.get(part) for column in found.values()):
            rows.append([part, *(f"{column[part]:,}" if part in column else "" for column in found.values())])
    return aligned(rows, 1)
