"""The one place where arithmetic runs: each op is its price, the charge for it, and its plain maths.

Dimension letters are those of `model.py`; N counts tokens (B·T), I and O are a matrix's inputs and outputs, R is the
LoRA rank. The flags gx, gw, gb in a price are 1 where autograd will want the gradient of the input, weight or bias.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from qwen_min.flops import charge
from qwen_min.prices import Dim, Price

FAST: dict[str, Callable] = {}
COMPILABLE: dict[str, Callable] = {}
"""Faster functions for the plain maths, by name, and those torch's compiler can use; `qwen_min.fast` fills both."""


def faster(name: str) -> Callable | None:
    """The faster function for the plain maths below the call, or None."""
    return (COMPILABLE if is_compiling() else FAST).get(name)


def tokens_of(x: Tensor) -> int:
    """N of a tensor (..., width)."""
    return x.numel() // x.shape[-1]


def wanted(*tensors: Tensor | None) -> tuple[int, ...]:
    """1 for each tensor whose gradient a backward would compute, else 0."""
    if not torch.is_grad_enabled():
        return (0,) * len(tensors)
    return tuple(int(t is not None and t.requires_grad) for t in tensors)


# Coursework adds position vectors to the embeddings, and leaves rotations free; the real model does the reverse.
POSITIONS = Price("positions", "N E", add="N*E", only=("coursework",))
EMBEDDING = Price("embedding", "N E gw: w*N*E > x*N*E; gw*x*N*E > gw*w*N*E", d_add="gw*N*E", only=("exact",))


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Look up (B, T) token ids in a (V, E) table: (B, T, E)."""
    charge(POSITIONS, ids.numel(), weight.shape[1])
    charge(EMBEDDING, ids.numel(), weight.shape[1], *wanted(weight))
    try:
        return F.embedding(ids, weight)
    except IndexError:  # of the CPU's kernel; a GPU's ends the process
        raise ValueError(f"a token is outside of the vocabulary: expected 0 to {len(weight) - 1}") from None


LINEAR = Price("linear", "N I O gx gw", component="", product="N,I,O")
BIAS = Price("bias", "N O gb: w*O > 0; gb*x*N*O > gb*w*O", component="", add="N*O", d_add="gb*O*(N-1)")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, coursework_out: int | None = None) -> Tensor:
    """x Wᵀ + b for x (..., I), W (O, I), b (O), in the type of x: W may be kept in a narrower one.

    `coursework_out`: the outputs that convention charges, if not O.
    """
    n, (o, i) = tokens_of(x), weight.shape
    gx, gw, gb = wanted(x, weight, bias)
    out = Dim.of(o, coursework_out)
    charge(LINEAR, n, i, out, gx, gw)
    if bias is not None:
        charge(BIAS, n, out, gb)
    if answer := faster("linear"):
        return answer(x, weight, bias)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


SHARED = Price("shared", "n readers gx: 0 > 0; gx*x*n*readers > gx*x*n", d_add="gx*n*(readers-1)", only=("exact",))


def shared(x: Tensor, readers: int) -> Tensor:
    """x itself, which `readers` layers read: in the backward their gradients are summed here."""
    charge(SHARED, x.numel(), readers, *wanted(x))
    return x


LOW_RANK = Price("lora", "N I R gx ga: 0 > 0; gx*2*x*N*I > gx*x*N*I", product="N,I,R", batch="1", d_add="gx*N*I")
LOW_RANK_OUT = Price(
    "lora_out",
    "N R O gh gb: 2*x*N*O > x*N*O; max(gh,gb)*x*N*O > max(gh,gb)*x*N*O",
    component="lora",
    product="N,R,O",
    batch="1",
    multiply="N*O",
    add="N*O",
    d_multiply="N*O*max(gh,gb)",
)


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, coursework_out: int | None = None) -> Tensor:
    """y + scale · x Aᵀ Bᵀ for x (..., I), A (R, I), B (O, R), y (..., O), in the type of A and B (Hu et al. 2021).

    y may be overwritten.
    """
    n, (r, i), o = tokens_of(x), a.shape, b.shape[0]
    charge(LOW_RANK, n, i, r, *wanted(x, a))
    low = F.linear(x.to(a.dtype), a)  # (..., R)
    charge(LOW_RANK_OUT, n, r, Dim.of(o, coursework_out), *wanted(low, b))
    return _plus(y, F.linear(low, b), scale)


def _plus(y: Tensor, x: Tensor, scale: float = 1.0) -> Tensor:
    """y + scale · x in the type of y, which may be overwritten."""
    if answer := faster("plus"):
        return answer(y, x, scale)
    return torch.add(y, x, alpha=scale).to(y.dtype)


RMS_NORM = Price(
    "norm",
    "N E gx gw: x*N*E+w*E > x*N*E; max(gx,gw)*2*x*N*E+gx*w*E > gx*x*N*E+gw*w*E",
    multiply="2*N*E",
    add="N*E",
    divide="N*(E+1)",
    square_root="N",
    d_multiply="gx*N*(4*E+3)+gw*2*N*E",
    d_add="gx*N*(2*E-1)+gw*E*(N-1)",
    d_divide="gx*N",
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w · x / sqrt(mean(x²) + eps) over the last dimension (Zhang and Sennrich 2019), computed in float32."""
    charge(RMS_NORM, tokens_of(x), x.shape[-1], *wanted(x, weight))
    if answer := faster("rms_norm"):
        return answer(x, weight, eps)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight.to(x.dtype)  # in the type of x before the weight: Hugging Face's numerics


def count_up(n: int, device: torch.device) -> Tensor:
    """0, 1, ..., n-1. The meta device's own arange is written in Python, and slow to import."""
    return torch.arange(n).to(device) if device.type == "meta" else torch.arange(n, device=device)


ANGLES = Price("angles", "N D: 0 > 8*N*D", component="rotation", multiply="N*D//2", sine_cosine="N*D", only=("exact",))


def rotation_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each (B, T, 1, D), of position · theta^(-2i/D) for (B, T) absolute positions, in float32.

    Both halves of D hold the same D/2 angles, as Hugging Face pairs dimension i with i + D/2 (Su et al. 2021).
    """
    charge(ANGLES, positions.numel(), head_dim)
    exponents = 2 * count_up(head_dim // 2, positions.device).float() / head_dim
    # Not theta**-exponents, whose last bit is not always Hugging Face's: at position 32,767 that is .002 radians.
    angles = positions[:, :, None, None].float() * (1 / theta**exponents)  # (B, T, 1, D/2)
    return torch.cat((angles.cos(),) * 2, -1), torch.cat((angles.sin(),) * 2, -1)


ROTATION = Price("rotation", "n c gx: x*(n+2*c) > x*n", multiply="2*n", add="n+n//2", again="gx", only=("exact",))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) of (B, T, heads, D) by its angle, in the type of x."""
    charge(ROTATION, x.numel(), cos.numel(), *wanted(x))
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)  # (B, T, 1, D)
    if answer := faster("rotate"):
        return answer(x, cos, sin)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


# The gradient of a key or value head sums over the H/K query heads that share it: B·K products.
SCORES = Price("scores", "B H K T S D gq gk", product="B*H*T,D,S", batch="B*K")
SCALE = Price("scale", "B H T S gx: x*B*H*T*S > x*B*H*T*S", component="scores", multiply="B*H*T*S", again="gx")
SOFTMAX = Price(
    "softmax",
    "B H T S gx: x*B*H*T*S > x*B*H*T*S; gx*2*x*B*H*T*S > gx*x*B*H*T*S",
    exponential="B*H*T*S",
    add="B*H*T*(S-1)",
    divide="B*H*T*S",
    d_multiply="gx*2*B*H*T*S",
    d_add="gx*B*H*T*(2*S-1)",
)
VALUES = Price("values", "B H K T S D gw gv", product="B*H*T,S,D", batch="B*K")


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v, each head of k and v shared by H/K query heads (Ainslie et al. 2023).

    Args:
        q: (B, H, T, D). k, v: (B, K, S, D).
        mask: bool, broadcasting to (B, H, T, S), true where a query may look. None: each query looks at itself
            and the tokens before it; the last query is that of the last token.

    Returns:
        (B, H, T, D).
    """
    (b, h, t, d), (_, kv_heads, s, _) = q.shape, k.shape
    gq, gk, gv = wanted(q, k, v)
    charge(SCORES, b, h, kv_heads, t, s, d, gq, gk)
    charge(SCALE, b, h, t, s, gq | gk)
    charge(SOFTMAX, b, h, t, s, gq | gk)
    charge(VALUES, b, h, kv_heads, t, s, d, gq | gk, gv)
    if answer := faster("attend"):
        return answer(q, k, v, mask)
    if mask is None:
        mask = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    grouped = q.reshape(b, kv_heads, h // kv_heads * t, d)  # query heads that share a key head, one after the other
    scores = (grouped @ k.transpose(2, 3) * d**-0.5).view(b, h, t, s)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
    return (weights.view(b, kv_heads, h // kv_heads * t, s) @ v).view(b, h, t, d)


SWIGLU = Price(
    "silu",
    "N F gg gu: 2*x*N*F > x*N*F; (2*max(gg,gu)+gg)*x*N*F > (gg+gu)*x*N*F",
    add="2*N*F",
    exponential="N*F",
    divide="N*F",
    multiply="N*F",
    d_add="gg*4*N*F",
    d_exponential="gg*N*F",
    d_divide="gg*N*F",
    d_multiply="max(6*gg,gu)*N*F",
)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, with silu(x) = x / (1 + e^-x) (Shazeer 2020), for two tensors (..., F)."""
    charge(SWIGLU, tokens_of(gate), gate.shape[-1], *wanted(gate, up))
    if answer := faster("swiglu"):
        return answer(gate, up)
    return F.silu(gate) * up


# In the backward the two branches' gradients meet.
RESIDUAL = Price("residual", "N E gx: 2*x*N*E > x*N*E", add="N*E", again="gx")


def add_residual(x: Tensor, branch: Tensor) -> Tensor:
    """x + branch, both (B, T, E); `branch` may be overwritten."""
    charge(RESIDUAL, tokens_of(x), x.shape[-1], *wanted(x))
    return _plus(branch, x)


LOGIT_BIAS = Price("logit_bias", "N V gb: x*N*V+4*V > x*N*V; gb*x*N*V > gb*4*V", add="N*V", d_add="gb*V*(N-1)")


def add_logit_bias(logits: Tensor, bias: Tensor) -> Tensor:
    """logits + bias for (..., V) and (V): the optional trainable bias of the course's starter code."""
    charge(LOGIT_BIAS, tokens_of(logits), logits.shape[-1], *wanted(bias))
    return logits + bias
