"""The key/value cache: preallocated, passed in, written in place."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_min.config import QwenConfig


class KVCache:
    """Keys and values of the tokens seen so far, for every layer, (B, K, capacity, D) each.

    The model appends layer by layer and calls `advance` once at the end of a forward. It is written in place, so it
    serves inference only.

    Args:
        config: shape of the model.
        batch: number of sequences.
        capacity: tokens it can hold per sequence.
        dtype, device: of the keys and values; the model's compute type.
    """

    def __init__(
        self,
        config: QwenConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        shape = (2, config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.store = torch.empty(shape, dtype=dtype, device=device)
        self.config = config
        self.capacity, self.length = capacity, 0

    @property
    def batch(self) -> int:
        return self.store.shape[2]

    def check(self, batch: int, tokens: int) -> None:
        """Raise ValueError, naming both numbers, where `tokens` more of `batch` sequences do not fit."""
        if batch != self.batch:
            raise ValueError(f"{batch} sequences for a cache: expected the {self.batch} that it was made for")
        if self.length + tokens > self.capacity:
            raise ValueError(f"the cache is to hold {self.length} + {tokens} tokens: expected at most {self.capacity}")

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, D) keys and values after what `layer` holds; returns views of all S, (B, K, S, D)."""
        if values.requires_grad:
            raise ValueError("keys and values want a gradient: expected a cache under torch.inference_mode() alone")
        end = self.length + keys.shape[2]
        all_keys, all_values = self.store[:, layer, :, :, :end].unbind()
        all_keys[:, :, self.length :] = keys
        all_values[:, :, self.length :] = values
        return all_keys, all_values

    def advance(self, tokens: int) -> None:
        """Count `tokens` as seen, once every layer has them."""
        self.length += tokens

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"a cache is to go back to {length} tokens: expected 0 to {self.length}, which it holds")
        self.length = length

    def repeat(self, times: int) -> "KVCache":
        """A copy in which each sequence stands `times` times, one after the other."""
        longer = copy.copy(self)
        longer.store = self.store.repeat_interleave(times, 2)
        return longer


@dataclass(frozen=True)
class Prefill:
    """Prompts that a model has read. Each use rewinds the cache to the end of the prompts; one use at a time."""

    cache: KVCache
    ids: Tensor  # (B, T)
    padding: Tensor | None  # (B)
    hidden: Tensor  # (B, 1, E), of the last token

    def rewound(self) -> KVCache:
        """The cache with the prompts alone in it."""
        self.cache.rewind(self.ids.shape[1])
        return self.cache
