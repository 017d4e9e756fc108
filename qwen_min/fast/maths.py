"""The maths of `ops.py` by faster ways: backwards of our own that keep less, sums in place, torch's attention kernel.

Each function takes what the plain maths takes after the charge, and gives the same, to rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_min.fast.memory import empty
from qwen_min.fast.product import product
from qwen_min.ops import wanted


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b; a frozen weight may be kept in a narrower type, and no widened copy of it waits for the backward."""
    gx, gw, gb = wanted(x, weight, bias)
    if gw or gb:
        return F.linear(x, weight.to(x.dtype), bias)
    return _FrozenLinear.apply(x, weight, bias) if gx else product(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    """Keeps the weight as it is stored and widens it again in the backward; autograd would keep the widened one."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        # No longer marked as a view, which it may be: see `plus`.
        return torch.ops.aten._unsafe_view(product(x, weight, bias), (*x.shape[:-1], len(weight)))

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return product(grad, weight.T), None, None


def plus(y: Tensor, x: Tensor, scale: float) -> Tensor:
    """y + scale · x in the memory of y, unless that is a view: autograd would copy all that it views."""
    return torch.add(y, x, alpha=scale).to(y.dtype) if y._is_view() else y.add_(x, alpha=scale)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w · x / sqrt(mean(x²) + eps)."""
    return _RMSNorm.apply(x, weight, eps) if any(wanted(x, weight)) else _normed(x, weight, eps)[0]


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = torch.mul(wide, inverse, out=empty(x.shape, x))
    return y.mul_(weight.to(x.dtype)), inverse


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one number a token for the backward; autograd would keep four tensors of the input's size."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        y, inverse = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, inverse = ctx.saved_tensors
        wide, grad, d_x, d_weight = x.float(), grad.float(), None, None
        if ctx.needs_input_grad[1]:
            d_weight = (grad * wide * inverse).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            scaled = torch.mul(grad, weight.float(), out=empty(grad.shape, grad))
            along = (scaled * wide).sum(-1, keepdim=True).mul_(inverse.pow(3)).div_(-x.shape[-1])
            d_x = scaled.mul_(inverse).addcmul_(wide, along).to(x.dtype)
        return d_x, d_weight, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x[i], x[i + D/2]) rotated by its angle."""
    return _Rotation.apply(x, cos, sin) if any(wanted(x)) else _rotated(x, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: int = 1) -> Tensor:
    first, second = x.chunk(2, -1)
    y = torch.mul(x, cos, out=empty(x.shape, x))
    return y.addcmul_(torch.cat((-second, first), -1), sin, value=direction)


class _Rotation(torch.autograd.Function):
    """Keeps nothing of x for the backward, which is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


HEADS_ALWAYS_SHARED = ("cpu", "meta")
"""Kinds of device where torch's fused kernel takes fewer key heads than query heads whatever else it is given. On CUDA
none does so under a mask or in float32: torch would write all scores into memory."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v by torch's fused kernel, whose `is_causal` serves where T is S alone.

    Else it would be wrong: it aligns the triangle to the top left.
    """
    if mask is None and q.shape[2] not in (1, k.shape[2]):
        mask = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    if q.shape[2] == 1:  # the queries that share a head as its tokens, so that it is read once
        grouped = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # (B, K, H/K, D)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).view(q.shape)
    if (mask is not None or q.dtype == torch.float32) and q.device.type not in HEADS_ALWAYS_SHARED:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    shared = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    return _SwiGLU.apply(gate, up) if any(wanted(gate)) else _gated(gate, up)  # for `up` alone autograd keeps as little


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return torch.ops.aten.silu.out(gate, out=empty(gate.shape, gate)).mul_(up)


class _SwiGLU(torch.autograd.Function):
    """Keeps gate and up alone for the backward; autograd would keep silu(gate), the widest tensor, a third time."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors  # read once, as torch's checkpointing asks
        d_gate, d_up = (empty(t.shape, t) for t in saved)
        # On a CPU a few rows at a time, whose intermediate results stay in its cache.
        rows = max(1, 2**18 // grad.shape[-1]) if grad.is_cpu else max(1, grad.numel())
        whole = (t.reshape(-1, grad.shape[-1]).split(rows) for t in (*saved, grad, d_gate, d_up))
        for gate, up, d, for_gate, for_up in zip(*whole, strict=True):
            sigmoid = torch.sigmoid(gate)
            torch.mul(gate, sigmoid, out=for_up).mul_(d)
            # d silu = s + g s (1 - s) = s (1 + g (1 - s))
            torch.sub(1, sigmoid, out=for_gate).mul_(gate).add_(1).mul_(sigmoid).mul_(up).mul_(d)
        return d_gate, d_up
