"""What a forward computes on its way, by name, for those who look inside: `model.trace(ids)`."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qwen_min import ops
from qwen_min.cache import KVCache


class Activation(NamedTuple):
    """One tensor of a forward: its name ("layers.0.q_rotated"), a copy, and a letter of `model.py` a dimension."""

    name: str
    tensor: Tensor
    shape: str


Keep = Callable[[str, Tensor, str], None]


@torch.no_grad()
def trace(model: Any, ids: Tensor, cache: KVCache | None = None, padding: Tensor | None = None) -> list[Activation]:
    """Every named activation of one forward, in the order of the equations.

    `embedding`; of each layer, as `layers.N.NAME`: `input_norm`, `q`, `k`, `v`, `q_rotated`, `k_rotated`, `attention`
    (before the output projection), `o_proj`, `attention_residual`, `post_attention_norm`, `mlp`, `mlp_residual`; then
    `norm` and `logits`. A forward that is not traced has no hooks. No other thread may run a model meanwhile.

    Args:
        model: a `Qwen`, not compiled.
        ids, cache, padding: as in `Qwen.forward`; with a cache, `k_rotated` holds its S keys.

    Raises:
        ValueError: the model is compiled, or what `Qwen.forward` raises.
    """
    if any("forward" in vars(block) for block in model.model.layers):
        raise ValueError("the model is compiled: expected one that is not, whose layers can be watched")
    found: list[Activation] = []
    attend, layer = ops.attend, count()

    def keep(name: str, tensor: Tensor, shape: str) -> None:
        found.append(Activation(name, tensor.clone(), shape))  # a fast way may overwrite the tensor itself

    def watched(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        keep_rotated(keep, next(layer), q, k)
        return attend(q, k, v, mask)

    with hooked(model, keep), replaced(ops, "attend", watched):
        keep("logits", model(ids, cache, padding), "B T V")
    return found


def keep_rotated(keep: Keep, layer: int, q: Tensor, k: Tensor) -> None:
    keep(f"layers.{layer}.q_rotated", q, "B H T D")
    keep(f"layers.{layer}.k_rotated", k, "B K S D")


@contextmanager
def hooked(model: Any, keep: Keep) -> Iterator[None]:
    """Hand to `keep` what the modules of a causal model make, be it ours or another with Hugging Face's names.

    That is all that `trace` lists but rotated queries and keys, and logits.
    """
    with ExitStack() as stack:

        def after(module: nn.Module, name: str, shape: str = "B T E", width: int = 0) -> None:
            hook = module.register_forward_hook(lambda _, inputs, output: keep(name, _heads(output, width), shape))
            stack.enter_context(hook)

        def before(module: nn.Module, name: str, shape: str = "B T E", width: int = 0) -> None:
            hook = module.register_forward_pre_hook(lambda _, inputs: keep(name, _heads(inputs[0], width), shape))
            stack.enter_context(hook)

        after(model.model.embed_tokens, "embedding")
        for i, block in enumerate(model.model.layers):
            at, attention = f"layers.{i}.", block.self_attn
            after(block.input_layernorm, f"{at}input_norm")
            for name, heads in (("q", "H"), ("k", "K"), ("v", "K")):
                proj = getattr(attention, f"{name}_proj")
                after(proj, f"{at}{name}", f"B {heads} T D", attention.head_dim)
            before(attention.o_proj, f"{at}attention", "B H T D", attention.head_dim)
            after(attention.o_proj, f"{at}o_proj")
            before(block.post_attention_layernorm, f"{at}attention_residual")
            after(block.post_attention_layernorm, f"{at}post_attention_norm")
            after(block.mlp, f"{at}mlp")
            after(block, f"{at}mlp_residual")
        after(model.model.norm, "norm")
        yield


def _heads(x: Tensor, width: int) -> Tensor:
    """(B, T, heads·width) as (B, heads, T, width); with width 0, x as it is."""
    return x.unflatten(2, (-1, width)).transpose(1, 2) if width else x


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let `owner.name` be `value` meanwhile."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
