"""A decoding step of fixed shape, which a GPU records once and replays: no kernel of it is launched by Python again."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwen_min import ops
from qwen_min.cache import KVCache
from qwen_min.flops import FlopMeter, charge_again, unmetered
from qwen_min.view import view_of

DEVICES = ("cuda",)
"""Kinds of device where a step is captured; elsewhere launching is cheap, and what is masked is not."""


def forward_of_one(decoder: Any, cache: KVCache, padding: Tensor | None) -> Callable[[Tensor], Tensor]:
    """What makes hidden states (B, 1, E) of (B, 1) new tokens: a `CapturedStep`, with its arguments, or the decoder."""
    if cache.store.device.type in DEVICES:
        return CapturedStep(decoder, cache, padding)
    return partial(decoder, cache=cache, padding=padding)


class CapturedStep:
    """One new token of each sequence, over a cache. Called with (B, 1) ids it gives their hidden states, (B, 1, E).

    A replayed step cannot grow, so attention runs over the cache's whole capacity, and a mask hides the places after
    the newest token. It is charged as any other: for the tokens it looks at. The hidden states stand in one place, and
    hold until the next call.

    Args:
        decoder: of a `Qwen`.
        cache: with at least one place left.
        padding: (B) how many of each sequence's first tokens are padding; None for none.
    """

    @torch.inference_mode()
    def __init__(self, decoder: Any, cache: KVCache, padding: Tensor | None):
        cache.check(cache.batch, 1)
        self.decoder, self.cache, self.padding = decoder, cache, padding
        self.fixed = _FixedCache(cache)
        self.ids = torch.zeros(cache.batch, 1, dtype=torch.int64, device=cache.store.device)
        cache.store[..., cache.length :, :].zero_()  # what is masked has weight 0, which makes nothing of a NaN
        with unmetered(), FlopMeter() as self.charged:
            self.hidden = self._forward()
        self.graph = self._captured() if self.ids.is_cuda else None

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> Tensor:
        cache = self.cache
        cache.check(len(ids), 1)
        self.decoder.check(cache.length + 1)
        self.ids.copy_(ids)
        self.fixed.place.fill_(cache.length)
        charge_again(self.charged, S=cache.length + 1)
        if self.graph is None:
            with unmetered():
                self.hidden = self._forward()
        else:
            self.graph.replay()
        cache.advance(1)
        return self.hidden

    def _forward(self) -> Tensor:
        place, decoder = self.fixed.place, self.decoder
        seen = (ops.count_up(self.cache.capacity, place.device) <= place)[None]  # (1, S)
        with decoder.charged():
            return decoder.run(self.ids, view_of(decoder.config, place[None], seen, self.padding), self.fixed)

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The forward as a graph, recorded after a few runs in which libraries make their plans and workspaces."""
        with torch.cuda.device(self.ids.device), unmetered():
            stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._forward()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                self.hidden = self._forward()
        return graph


class _FixedCache(KVCache):
    """Another's keys and values, all of its capacity at once; the new ones are written where a tensor says."""

    def __init__(self, cache: KVCache):
        self.__dict__ = copy.copy(cache.__dict__)
        self.place = torch.full((1,), cache.length, device=cache.store.device)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        all_keys, all_values = self.store[:, layer].unbind()
        all_keys.index_copy_(2, self.place, keys)
        all_values.index_copy_(2, self.place, values)
        return all_keys, all_values
