"""What a job needs at least, products and bytes read; over the machine's calibrated rates, that is its floor."""

from functools import cache
from typing import NamedTuple

import torch

from experiments.accounting.predict import predict
from qwen_min import FlopMeter, Qwen, QwenConfig
from qwen_min.costs import component
from qwen_min.ops import SCORES, VALUES


class Work(NamedTuple):
    """FLOPs (a multiply and an add are two) and bytes that a job needs at least."""

    flops: int = 0
    bytes: int = 0

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The least time it can take: products and reads may overlap, so the longer of the two."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


@cache
def step(config: QwenConfig, batch: int, context: int, *, rank: int = 0, symbols: int = 0) -> Work:
    """A training step of LoRA with `rank`, or a forward and its loss where that is 0.

    Args:
        symbols: the loss is over so many tokens alone; 0 for the whole vocabulary.
    """
    meter = predict(config, batch, context, rank=rank, training=bool(rank), convention="matmul")
    return Work(needed(meter, symbols))


@cache
def prefill(config: QwenConfig, batch: int, prompt: int, *, symbols: int = 0) -> Work:
    """One forward over prompts, with the head for their last token alone."""
    return Work(needed(predict(config, batch, prompt, last_only=True, convention="matmul"), symbols))


@cache
def decode(
    config: QwenConfig,
    batch: int,
    prompt: int,
    new: int,
    kept: torch.dtype,
    computed: torch.dtype = torch.float32,
    *,
    symbols: int = 0,
    forwards: int = 0,
) -> Work:
    """The tokens after the first of `new`, which is the prefill's: every forward reads all weights and the cache.

    Args:
        kept, computed: the types of the weights, and of the keys and values.
        forwards: how many there were; 0 for one a token.
    """
    tokens = new - 1
    if not tokens:
        return Work()
    first, last = (
        needed(predict(config, batch, 1, cached=cached, convention="matmul"), symbols)
        for cached in (prompt, prompt + new - 2)
    )
    forwards = forwards or tokens
    keys_and_values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * computed.itemsize
    attended = forwards * prompt + forwards * new // 2  # on the mean prompt + new / 2, the new token included
    read = forwards * weights(config, symbols) * kept.itemsize + batch * attended * keys_and_values
    return Work((first + last) * tokens // 2, read)


def weights(config: QwenConfig, symbols: int = 0) -> int:
    """Weights that a forward of one token multiplies with; of the head the rows of `symbols` tokens (0: all)."""
    with torch.device("meta"):
        model = Qwen(config)
    blocks = [*model.model.layers.parameters(), *model.model.norm.parameters()]
    return sum(p.numel() for p in blocks) + (symbols or config.vocab_size) * config.hidden_size


def needed(meter: FlopMeter, symbols: int = 0) -> int:
    """The products of a meter that nobody can leave out: forward, and those of the gradients that autograd wants.

    Of attention the pairs of tokens that a causal mask leaves; of the head the rows of `symbols` tokens (0: all).
    """
    total = 0
    for charge in meter.charges():
        forward, backward = charge.price.cost(charge.dims, "matmul")
        flops = charge.times * (sum(forward.values()) + sum(backward.values()))
        dims = charge.price.values(charge.dims, "matmul")
        if charge.price in (SCORES, VALUES):
            new, attended = dims["T"], dims["S"]
            pairs = new * (attended - new) + new * (new + 1) // 2
            flops = flops * pairs // (new * attended)
        elif symbols and component(charge) == "head":
            flops = flops * symbols // dims["O"]
        total += flops
    return total
