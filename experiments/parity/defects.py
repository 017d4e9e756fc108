"""Mistakes that are easily made in a decoder, to be planted into a model, and what a comparison sees of each."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from itertools import cycle

import torch
from torch import Tensor, nn

from qwen_min import Qwen, ops
from qwen_min.layers import SwiGLU
from qwen_min.trace import replaced

Defect = Callable[[Qwen], dict[str, Callable]]
"""Changes a model in place, and gives the ops that must take the place of those in `qwen_min.ops`, by name."""


@contextmanager
def planted(name: str | None, model: Qwen) -> Iterator[None]:
    """Break the model, which stays so but for the ops: those are broken in this process meanwhile. None: nothing is."""
    with ExitStack() as stack:
        for op, broken in (DEFECTS[name](model) if name else {}).items():
            stack.enter_context(replaced(ops, op, broken))
        yield


def moved(name: str, model: Qwen, ids: Tensor) -> dict[str, float]:
    """How far a defect moves each activation at most, as a part of its largest value; the model itself stays whole."""
    right, model = model.trace(ids), deepcopy(model)
    with planted(name, model):
        pairs = zip(right, model.trace(ids), strict=True)
        return {a.name: ((a.tensor - b.tensor).abs().max() / a.tensor.abs().max()).item() for a, b in pairs}


def unseen(model: Qwen, ids: Tensor) -> set[str]:
    """The defects that move none of a model's logits."""
    return {name for name in DEFECTS if moved(name, model, ids)["logits"] < 1e-6}


def randomise(model: nn.Module, seed: int) -> None:
    """Matrices that keep activations near 1, biases of half that size, norm weights around 1: no defect is hidden."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)


def swap_norms(model: Qwen) -> dict[str, Callable]:
    for block in model.model.layers:
        first, second = block.input_layernorm, block.post_attention_layernorm
        block.input_layernorm, block.post_attention_layernorm = second, first
    return {}


def drop_bias(name: str, model: Qwen) -> dict[str, Callable]:
    for block in model.model.layers:
        getattr(block.self_attn, name).bias = None
    return {}


def interleave_rotation(model: Qwen) -> dict[str, Callable]:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Pairs dimension 2i with 2i + 1, as Su et al. write it, where Hugging Face's weights expect i and i + D/2."""
        half = cos.shape[-1] // 2
        cos, sin = (t[..., :half].repeat_interleave(2, -1) for t in (cos, sin))
        turned = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
        return x * cos + turned * sin

    return {"rotate": rotate}


def rotate_queries_backwards(model: Qwen) -> dict[str, Callable]:
    rotate, signs = ops.rotate, cycle((-1, 1))  # each layer rotates its queries first, then its keys
    return {"rotate": lambda x, cos, sin: rotate(x, cos, next(signs) * sin)}


def assume_the_rope_theta(model: Qwen) -> dict[str, Callable]:
    angles, theta = ops.rotation_angles, 1e4 if model.config.rope_theta == 1e6 else 1e6
    return {"rotation_angles": lambda positions, head_dim, _: angles(positions, head_dim, theta)}


def attend_otherwise(change: Callable[..., Tensor], model: Qwen) -> dict[str, Callable]:
    """`change` gets attention, and its arguments."""
    return {"attend": partial(change, ops.attend)}


def forget_the_scale(attend: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return attend(q * q.shape[-1] ** 0.5, k, v, mask)


def forget_the_causal_mask(attend: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return attend(q, k, v, torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device))


def group_heads_wrongly(attend: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Gives query head h the key head h mod K, where it should be h // (H/K)."""
    return attend(q, *(t.repeat(1, q.shape[1] // t.shape[1], 1, 1) for t in (k, v)), mask)


def assume_one_query_head_a_key_head(attend: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """K = H: as many query heads as there are key heads are read, and the others say nothing."""
    out = attend(q[:, : k.shape[1]], k, v, mask)
    return torch.cat((out, torch.zeros_like(q[:, k.shape[1] :])), 1)


def average_the_query_heads_of_a_key_head(
    attend: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> Tensor:
    """K = H again: a group's queries are averaged into one head, whose answer all of them get."""
    mean = q.unflatten(1, (k.shape[1], -1)).mean(2)
    return attend(mean, k, v, mask).repeat_interleave(q.shape[1] // k.shape[1], 1)


def swap_gate_and_up(model: Qwen) -> dict[str, Callable]:
    for module in model.modules():
        if isinstance(module, SwiGLU):
            module.gate_proj, module.up_proj = module.up_proj, module.gate_proj
    return {}


def forget_the_final_norm(model: Qwen) -> dict[str, Callable]:
    model.model.norm.weight = nn.Parameter(torch.ones_like(model.model.norm.weight))
    return {}


def untie_the_head(model: Qwen) -> dict[str, Callable]:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().roll(1, 0))
    return {}


DEFECTS: dict[str, Defect] = {
    "swapped-norms": swap_norms,
    "no-q-bias": partial(drop_bias, "q_proj"),
    "no-k-bias": partial(drop_bias, "k_proj"),
    "no-v-bias": partial(drop_bias, "v_proj"),
    "interleaved-rotation": interleave_rotation,
    "backward-queries": rotate_queries_backwards,
    "wrong-theta": assume_the_rope_theta,
    "wrong-scale": partial(attend_otherwise, forget_the_scale),
    "no-mask": partial(attend_otherwise, forget_the_causal_mask),
    "wrong-groups": partial(attend_otherwise, group_heads_wrongly),
    "missing-heads": partial(attend_otherwise, assume_one_query_head_a_key_head),
    "averaged-heads": partial(attend_otherwise, average_the_query_heads_of_a_key_head),
    "swapped-gate-and-up": swap_gate_and_up,
    "no-final-norm": forget_the_final_norm,
    "wrong-head": untie_the_head,
}
"""By name, in the order of the forward; the head groups' defects change nothing where K = H."""
