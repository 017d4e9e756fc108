"""How much runs at once: what limits memory, and on a CPU time, as activations that leave its caches are slow."""

import copy

import torch
from torch import Tensor

from qwen_min.cache import KVCache

FEED_FORWARD_AT_ONCE = {"cpu": 2**22}
FEED_FORWARD_ELSEWHERE = 2**26
"""Elements of the widest activation, tokens times feed-forward width, in one forward, by kind of device. On a CPU the
0.5B model then runs one sequence of 512 tokens at a time, which takes a third of the memory of four and is faster; the
pocket model runs its batch whole."""


def sequences_at_once(model, tokens: int) -> int:
    """How many sequences of `tokens` new tokens a batch is best cut into groups of; at least 1."""
    most = FEED_FORWARD_AT_ONCE.get(model.device.type, FEED_FORWARD_ELSEWHERE)
    return max(1, most // (tokens * model.config.intermediate_size))


def read(model, ids: Tensor, cache: KVCache, padding: Tensor | None) -> Tensor:
    """Hidden states (B, 1, E) of the last of `ids` (B, T), which `cache` takes up, a few sequences at a time."""
    hidden, rows = [], sequences_at_once(model, ids.shape[1])
    for start in range(0, len(ids), rows):
        some = slice(start, start + rows)
        part = copy.copy(cache)  # of these sequences: what is written there stands here
        part.store = cache.store[:, :, some]
        hidden.append(model.model(ids[some], part, None if padding is None else padding[some])[:, -1:])
    cache.advance(ids.shape[1])
    return torch.cat(hidden)
