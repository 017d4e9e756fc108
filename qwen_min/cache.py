"""The key/value cache: preallocated, passed in, written in place."""

import copy
from collections.abc import Sequence

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
        self.store = torch.empty(shape, dtype=dtype, device=device)  # of all layers: `keep` moves them at once
        self.config = config
        self.capacity, self.length = capacity, 0

    @property
    def batch(self) -> int:
        return self.store.shape[2]

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
            raise ValueError(f"the cache holds {self.length} tokens: cannot go back to {length}")
        self.length = length

    def keep(self, length: int, places: Sequence[int]) -> None:
        """Forget all but the first `length` tokens and those at `places` behind them, which close up in that order."""
        if not all(length <= place < self.length for place in places):
            raise ValueError(f"places to keep are {list(places)}: expected {length} to {self.length - 1}")
        self.rewind(length)
        self.length += len(places)
        if list(places) != list(range(length, self.length)):
            self.store[..., length : self.length, :] = self.store[..., list(places), :]

    def rows(self, start: int, stop: int) -> "KVCache":
        """The cache of some of the sequences: what is written there stands here, once `advance` counts it here too."""
        some = copy.copy(self)
        some.store = self.store[:, :, start:stop]
        return some

    def repeat(self, times: int) -> "KVCache":
        """A copy in which each sequence stands `times` times, one behind the other."""
        longer = copy.copy(self)
        longer.store = self.store.repeat_interleave(times, 2)
        return longer
