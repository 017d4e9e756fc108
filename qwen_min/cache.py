"""The key/value cache: preallocated, passed in, written in place."""

import copy

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
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.empty_like(k) for k in self.keys]
        self.batch, self.capacity, self.length = batch, capacity, 0

    def check(self, batch: int, tokens: int) -> None:
        """Raise ValueError, naming both numbers, where `tokens` more of `batch` sequences do not fit."""
        if batch != self.batch:
            raise ValueError(f"the cache was made for {self.batch} sequences: got {batch}")
        if self.length + tokens > self.capacity:
            raise ValueError(
                f"the cache is full: {self.length} tokens and {tokens} more need "
                f"{self.length + tokens} places: it has {self.capacity}"
            )

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, D) keys and values behind what `layer` holds; returns views of all S, (B, K, S, D)."""
        end = self.length + keys.shape[2]
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` as seen, once every layer has them."""
        self.length += tokens

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"the cache holds {self.length} tokens: cannot go back to {length}")
        self.length = length

    def repeat(self, times: int) -> "KVCache":
        """A copy in which each sequence stands `times` times, one behind the other."""
        longer = copy.copy(self)
        longer.batch = self.batch * times
        longer.keys = [k.repeat_interleave(times, 0) for k in self.keys]
        longer.values = [v.repeat_interleave(times, 0) for v in self.values]
        return longer
