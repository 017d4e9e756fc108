"""The one place where arithmetic runs; each op charges its price on the line beside it.

Dimension letters are those of `model.py`; N counts tokens (B·T), I and O are a matrix's inputs and outputs, R is the
LoRA rank. The flags gx, gw, gb in a price are 1 where autograd will want the gradient of the input, weight or bias.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_min import kernels
from qwen_min.flops import Dim, Price, charge
from qwen_min.memory import empty


def _wanted(*tensors: Tensor | None) -> tuple[int, ...]:
    """1 for each tensor whose gradient a backward would compute, else 0."""
    if not torch.is_grad_enabled():
        return (0,) * len(tensors)
    return tuple(int(t is not None and t.requires_grad) for t in tensors)


def _width(true: int, coursework: int | None) -> int | Dim:
    """A layer's output width as it is charged: one number, or two where `coursework` has its own."""
    return true if coursework is None or coursework == true else Dim(true, coursework)


# Coursework adds position vectors to the embeddings, and leaves rotations free; the machine does the reverse.
POSITIONS = Price("positions", "N E", add="N*E", only=("coursework",))
EMBEDDING = Price("embedding", "N E gw", d_add="gw*N*E", only=("exact",))


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Look up (B, T) token ids in a (V, E) table: (B, T, E)."""
    charge(POSITIONS, ids.numel(), weight.shape[1])
    charge(EMBEDDING, ids.numel(), weight.shape[1], *_wanted(weight))
    try:
        return F.embedding(ids, weight)
    except IndexError:  # of the CPU's kernel; a GPU's ends the process
        raise ValueError(f"a token is outside of the vocabulary: expected 0 to {len(weight) - 1}") from None


LINEAR = Price("", "N I O gx gw", product="N,I,O", d_products=("gx*N,O,I", "gw*O,N,I"))
BIAS = Price("", "N O gb", add="N*O", d_add="gb*O*(N-1)")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, coursework_out: int | None = None) -> Tensor:
    """x Wᵀ + b for x (..., I), W (O, I), b (O). `coursework_out`: the outputs that convention charges, if not O."""
    n, (o, i) = x.numel() // x.shape[-1], weight.shape
    out = _width(o, coursework_out)
    gx, gw, gb = _wanted(x, weight, bias)
    charge(LINEAR, n, i, out, gx, gw)
    if bias is not None:
        charge(BIAS, n, out, gb)
    if (gw or gb) and weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    if not (gx or gw or gb):
        return product(x, weight, bias)
    return _FrozenLinear.apply(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    """A product whose weight and bias are frozen, and may be kept in a narrower type than it is computed in.

    Autograd would keep the widened copy of every weight until the backward; this keeps the narrow one and widens it
    again.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        # No longer marked as a view, which it may be: see `_added`.
        return torch.ops.aten._unsafe_view(product(x, weight, bias), (*x.shape[:-1], len(weight)))

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            raise ValueError(f"a weight kept in {weight.dtype} has no gradient: expected the type it is computed in")
        return product(grad, weight.T), None, None


# torch multiplies float32 matrices on the CPU by MKL, which leaves the wide registers of AMD's processors unused: 165
# to 185 GFLOP/s on two cores where oneDNN, which torch carries too, reaches 360 to 400 (Zen 5, torch 2.13, measured).
# torch offers it for float32 under this name alone. Small products are faster without it.
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
ONEDNN_FROM = 2**20  # multiplications


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b for x (..., I), W (O, I), b (O), in the type of x; no gradient and no charge.

    W and b may be kept in another type: they are widened inside the product, or before it where no kernel serves.
    """
    plain = torch.compiler.is_compiling()  # the compiler knows torch's own product alone
    if weight.dtype != x.dtype and not plain:
        y = kernels.linear(x, weight, bias)
        if y is not None:
            return y
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if ONEDNN and not plain and x.dtype == torch.float32 and x.is_cpu and x.numel() * len(weight) >= ONEDNN_FROM:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


SHARED = Price("shared", "n readers gx", d_add="gx*n*(readers-1)", only=("exact",))


def shared(x: Tensor, readers: int) -> Tensor:
    """x itself, which `readers` layers read: in the backward their gradients are summed here."""
    charge(SHARED, x.numel(), readers, *_wanted(x))
    return x


LOW_RANK = Price("lora", "N I R gx ga", product="N,I,R", d_products=("gx*N,R,I", "ga*R,N,I"), d_add="gx*N*I")
LOW_RANK_OUT = Price(
    "lora",
    "N R O gh gb",
    product="N,R,O",
    multiply="N*O",
    add="N*O",
    d_products=("gh*N,O,R", "gb*O,N,R"),
    d_multiply="N*O*max(gh,gb)",
)


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, coursework_out: int | None = None) -> Tensor:
    """y + scale · x Aᵀ Bᵀ for x (..., I), A (R, I), B (O, R), y (..., O), in the type of A and B (Hu et al. 2021).

    y is used up.
    """
    n, (r, i), o = x.numel() // x.shape[-1], a.shape, b.shape[0]
    low = F.linear(x.to(a.dtype), a)  # (..., R)
    charge(LOW_RANK, n, i, r, *_wanted(x, a))
    out = _width(o, coursework_out)
    charge(LOW_RANK_OUT, n, r, out, *_wanted(low, b))
    return _added(y, F.linear(low, b), scale)


def _added(y: Tensor, x: Tensor, scale: float = 1) -> Tensor:
    """y + scale · x in the type of y, and in its memory unless it is a view: autograd would copy all that it views."""
    if torch.compiler.is_compiling() or y._is_view():
        return torch.add(y, x, alpha=scale).to(y.dtype)
    return y.add_(x, alpha=scale)


RMS_NORM = Price(
    "norm",
    "N E gx gw",
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
    wanted = _wanted(x, weight)
    charge(RMS_NORM, x.numel() // x.shape[-1], x.shape[-1], *wanted)
    return _RMSNorm.apply(x, weight, eps) if any(wanted) else _normed(x, weight, eps)[0]


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = torch.mul(wide, inverse, out=empty(x.shape, x))  # in the type of x before the weight: Hugging Face's numerics
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


def count_up(n: int, device: torch.device) -> Tensor:
    """0, 1, ..., n-1. The meta device's own arange is written in Python, and slow to import."""
    return torch.arange(n).to(device) if device.type == "meta" else torch.arange(n, device=device)


ANGLES = Price("rotation", "N D", multiply="N*D//2", sine_cosine="N*D", only=("exact",))


def rotation_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each (B, T, 1, D), of position · theta^(-2i/D) for (B, T) absolute positions, in float32.

    Both halves of D hold the same D/2 angles, as Hugging Face pairs dimension i with i + D/2 (Su et al. 2021).
    """
    charge(ANGLES, positions.numel(), head_dim)
    exponents = 2 * count_up(head_dim // 2, positions.device).float() / head_dim
    # Not theta**-exponents, whose last bit is not always Hugging Face's: at position 32,767 that is .002 radians.
    angles = positions[:, :, None, None].float() * (1 / theta**exponents)  # (B, T, 1, D/2)
    return torch.cat((angles.cos(),) * 2, -1), torch.cat((angles.sin(),) * 2, -1)


ROTATION = Price(
    "rotation", "n gx", multiply="2*n", add="n+n//2", d_multiply="gx*2*n", d_add="gx*(n+n//2)", only=("exact",)
)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) of (B, T, heads, D) by its angle, in the type of x."""
    (wanted,) = _wanted(x)
    charge(ROTATION, x.numel(), wanted)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return _Rotation.apply(x, cos, sin) if wanted else _rotated(x, cos, sin)


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


# The gradient of a key or value head sums over the H/K query heads that share it.
SCORES = Price("scores", "B H K T S D gq gk", product="B*H*T,D,S", d_products=("gq*B*H*T,S,D", "gk*B*K*S,H//K*T,D"))
SCALE = Price("scores", "B H T S gx", multiply="B*H*T*S", d_multiply="gx*B*H*T*S")
SOFTMAX = Price(
    "softmax",
    "B H T S gx",
    exponential="B*H*T*S",
    add="B*H*T*(S-1)",
    divide="B*H*T*S",
    d_multiply="gx*2*B*H*T*S",
    d_add="gx*B*H*T*(2*S-1)",
)
VALUES = Price("values", "B H K T S D gw gv", product="B*H*T,S,D", d_products=("gw*B*H*T,D,S", "gv*B*K*S,H//K*T,D"))


def _charge_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    (b, h, t, d), (_, kv_heads, s, _) = q.shape, k.shape
    gq, gk, gv = _wanted(q, k, v)
    charge(SCORES, b, h, kv_heads, t, s, d, gq, gk)
    charge(SCALE, b, h, t, s, gq | gk)
    charge(SOFTMAX, b, h, t, s, gq | gk)
    charge(VALUES, b, h, kv_heads, t, s, d, gq | gk, gv)


def attend_explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v, written out: the attention to read. Arguments as `attend_fused`."""
    _charge_attention(q, k, v)
    (b, h, t, d), (_, kv_heads, s, _) = q.shape, k.shape
    if mask is None:
        mask = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    grouped = q.reshape(b, kv_heads, h // kv_heads * t, d)  # query heads that share a key head, one below the other
    scores = (grouped @ k.transpose(2, 3) * d**-0.5).view(b, h, t, s)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
    return (weights.view(b, kv_heads, h // kv_heads * t, s) @ v).view(b, h, t, d)


HEADS_ALWAYS_SHARED = ("cpu", "meta")
"""Kinds of device where torch's fused kernel takes fewer key heads than query heads whatever else it is given. On CUDA
none does so under a mask or in float32: torch would write all scores into memory."""


def attend_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v by torch's fused kernel, charged as the sum of its explicit parts.

    Args:
        q: (B, H, T, D). k, v: (B, K, S, D), each head shared by H/K query heads.
        mask: bool, broadcasting to (B, H, T, S), true where a query may look. None: each query looks at all but the
            tokens after it, the last query at everything; then T is 1 or S (the kernel's `is_causal` aligns the
            triangle to the top left, which for any other T would be wrong).

    Returns:
        (B, H, T, D).
    """
    _charge_attention(q, k, v)
    assert mask is not None or q.shape[2] in (1, k.shape[2])
    if q.shape[2] == 1:  # the queries that share a head as its tokens, so that it is read once
        grouped = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # (B, K, H/K, D)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).view(q.shape)
    if (mask is not None or q.dtype == torch.float32) and q.device.type not in HEADS_ALWAYS_SHARED:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    shared = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared)


SWIGLU = Price(
    "silu",
    "N F gg gu",
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
    charge(SWIGLU, gate.numel() // gate.shape[-1], gate.shape[-1], *_wanted(gate, up))
    if torch.is_grad_enabled() and gate.requires_grad:
        return _SwiGLU.apply(gate, up)
    return _gated(gate, up)


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


RESIDUAL = Price("residual", "N E gx", add="N*E", d_add="gx*N*E")  # backward: the two branches' gradients meet


def add_residual(x: Tensor, branch: Tensor) -> Tensor:
    """x + branch, both (B, T, E); `branch` is used up."""
    charge(RESIDUAL, x.numel() // x.shape[-1], x.shape[-1], *_wanted(x))
    return _added(branch, x)


LOGIT_BIAS = Price("logit_bias", "N V gb", add="N*V", d_add="gb*V*(N-1)")


def add_logit_bias(logits: Tensor, bias: Tensor) -> Tensor:
    """logits + bias for (..., V) and (V): the optional trainable bias of the course's starter code."""
    charge(LOGIT_BIAS, logits.numel() // logits.shape[-1], logits.shape[-1], *_wanted(bias))
    return logits + bias
