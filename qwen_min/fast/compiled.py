"""The decoder's blocks as torch's compiler makes them, charged what they would charge themselves."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwen_min.cache import KVCache
from qwen_min.fast.loss import token_losses
from qwen_min.flops import FlopMeter, charge_again, metering, unmetered
from qwen_min.model import Block, Qwen
from qwen_min.view import View

KINDS = 64
"""How many kinds of block are compiled at most: shapes, with and without a mask or gradients, LoRA ranks. Torch's own
limit is 8, after which it raises an error."""


def compile_model(model: Qwen, **options: Any) -> None:
    """Run the blocks and the loss of a model as torch's compiler makes them, where there is no cache; meant for a GPU.

    Each shape is compiled at its first use. What is computed and charged stays the same, to rounding. This takes the
    place of `nn.Module.compile`, which would compile away the charges.

    Args:
        options: of `torch.compile`.

    Raises:
        ValueError: torch's compiler does not work here.
    """
    check(model.device, **options)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KINDS)
    run = CompiledBlocks(**options)
    block: Any
    for block in model.model.layers:
        block.forward = partial(run, block)
    losses: Any = torch.compile(token_losses, dynamic=False, **options)
    model.lm_head.losses = losses  # where `loss.cross_entropy` looks


class CompiledBlocks:
    """The forward of blocks. All blocks of a kind share the code that the first of them was compiled to.

    Python code that a compiled function held is gone, and its charges with it. What a block charges depends on shapes
    and on which gradients are wanted alone; so it is asked once on the meta device, for each kind, and charged again
    with every call.
    """

    def __init__(self, **options: Any):
        self._forward = torch.compile(_forward, dynamic=False, fullgraph=True, **options)
        self._charged: dict[tuple, FlopMeter] = {}

    def __call__(self, block: Block, x: Tensor, view: View, cache: KVCache | None) -> Tensor:
        """The block's output, (B, T, E) as `x`."""
        if cache is not None or x.is_meta:
            return Block.forward(block, x, view, cache)
        if metering():
            kind = _kind(block, x)
            if kind not in self._charged:
                self._charged[kind] = _charges(block, x, view)
            charge_again(self._charged[kind])
        return self._forward(block, x, view)


def check(device: torch.device | str, **options: Any) -> None:
    """Raise ValueError if torch's compiler, with these options, makes nothing that runs on this device here."""
    try:
        torch.compile(lambda x: x + 1, dynamic=False, **options)(torch.zeros(1, device=device))
    except Exception as e:  # of whichever part of the compiler, or of the tools it calls
        why = " ".join(str(e).split()) or type(e).__name__
        raise ValueError(
            f"torch's compiler fails on {device} ({why:.100}): expected a C++ compiler for a CPU, Triton for a GPU"
        ) from None


def _forward(block: Block, x: Tensor, view: View) -> Tensor:
    return Block.forward(block, x, view, None)


def _kind(block: Block, x: Tensor) -> tuple:
    """What the charges of a block depend on, its path among them."""
    layers = tuple((type(m), getattr(m, "merged", False)) for m in block.modules())
    parameters = tuple((p.shape, p.requires_grad) for p in block.parameters())
    return block.path, layers, parameters, x.shape, x.requires_grad, torch.is_grad_enabled()


def _charges(block: Block, x: Tensor, view: View) -> FlopMeter:
    """A meter that has seen one forward of the block, which runs on the meta device."""

    def on_meta(t: Tensor | None) -> Any:
        return None if t is None else t.detach().to("meta").requires_grad_(t.requires_grad)

    parameters = {name: on_meta(p) for name, p in block.named_parameters()}
    shapes = View(*map(on_meta, view))
    with unmetered(), FlopMeter() as meter:
        torch.func.functional_call(block, parameters, (on_meta(x), shapes, None))
    return meter
