"""Where new tokens stand and what they may look at, from absolute positions: a full pass, a chunk and a single token
are one code path."""

from typing import NamedTuple

import torch
from torch import Tensor

from qwen_min import ops
from qwen_min.config import QwenConfig


class View(NamedTuple):
    """Rotation and mask of T new tokens over S tokens, cached ones first: the same for every layer of a forward."""

    cos: Tensor  # (B or 1, T, 1, D)
    sin: Tensor  # (B or 1, T, 1, D)
    mask: Tensor | None  # (B or 1, 1, T, S) bool, true where a query may look; None: all before it


def causal(config: QwenConfig, start: int, tokens: int, padding: Tensor | None, device: torch.device) -> View:
    """The view of `tokens` new tokens after `start` cached ones; of each sequence `padding` (B) tokens are padding."""
    places = ops.count_up(start + tokens, device)  # (S)
    query = places[start:]
    if padding is None and tokens in (1, len(places)):
        return view_of(config, query[None])
    return view_of(config, query[None], places <= query[:, None], padding)


def view_of(config: QwenConfig, positions: Tensor, mask: Tensor | None = None, padding: Tensor | None = None) -> View:
    """The view of tokens at `positions` (1, T) that look where `mask` (T, S) says; None: at all before.

    A padded sequence starts at position 0 after its padding. No real token looks at padding; a padding token does, so
    that its softmax is never empty.
    """
    if mask is not None:
        mask = mask[None]  # (1, T, S)
    if padding is not None:
        assert mask is not None
        real = ops.count_up(mask.shape[2], mask.device) >= padding[:, None, None]  # (B, 1, S)
        mask = torch.where((mask & real).any(-1, keepdim=True), mask & real, mask)  # (B, T, S)
        positions = (positions - padding[:, None]).clamp(min=0)  # (B, T)
    cos, sin = ops.rotation_angles(positions, config.head_dim, config.rope_theta)
    return View(cos, sin, None if mask is None else mask[:, None])
