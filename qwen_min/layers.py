"""The decoder's layers: token embedding, linear, RMSNorm, attention, SwiGLU."""

import torch
from torch import Tensor, nn

from qwen_min import ops
from qwen_min.cache import KVCache
from qwen_min.config import QwenConfig
from qwen_min.flops import Metered
from qwen_min.view import View


class Embedding(Metered):
    """Token ids (B, T) to hidden states (B, T, E), in `compute_dtype` whatever type the table is kept in.

    tied: whether the output head uses the same table.
    """

    def __init__(self, vocabulary: int, hidden: int, tied: bool = False):
        super().__init__()
        self.tied = tied
        self.weight = nn.Parameter(torch.empty(vocabulary, hidden))
        self.compute_dtype: torch.dtype | None = None

    def forward(self, ids: Tensor) -> Tensor:
        weight = ops.shared(self.weight, readers=1 + self.tied)
        return ops.embedding(ids, weight).to(self.compute_dtype or self.weight.dtype)


class Linear(Metered):
    """y = x Wᵀ + b, for (..., in) to (..., out).

    Args:
        inputs, outputs: widths.
        bias: whether there is a b.
        coursework_outputs: the width that the `coursework` convention charges, where it is not `outputs`.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False, coursework_outputs: int | None = None):
        super().__init__()
        self.coursework_outputs = coursework_outputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias, self.coursework_outputs)


class RMSNorm(Metered):
    """w · x / sqrt(mean(x²) + eps), over the last dimension of (B, T, E)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Attention(Metered):
    """Grouped-query attention, H query heads over K key/value heads: o(attend(rotate(q(x)), rotate(k(x)), v(x))).

    Source: Ainslie et al. 2023; biases on q, k and v as Qwen2 has them.
    """

    def __init__(self, config: QwenConfig, layer: int):
        super().__init__()
        e, h, k, d = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_dim, self.layer = d, layer
        self.q_proj = Linear(e, h * d, bias=True)
        # Coursework charges grouped-query attention as plain multi-head attention: k and v with all H heads.
        self.k_proj = Linear(e, k * d, bias=True, coursework_outputs=h * d)
        self.v_proj = Linear(e, k * d, bias=True, coursework_outputs=h * d)
        self.o_proj = Linear(h * d, e)

    def forward(self, x: Tensor, view: View, cache: KVCache | None) -> Tensor:
        x = ops.shared(x, readers=3)
        q, k, v = (proj(x).unflatten(2, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = ops.rotate(q, view.cos, view.sin), ops.rotate(k, view.cos, view.sin)  # (B, T, heads, D)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, D)
        out = ops.attend(q, k, v, view.mask)  # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class SwiGLU(Metered):
    """down(silu(gate(x)) · up(x)), the feed-forward of every layer (Shazeer 2020)."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        e, f = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(e, f)
        self.up_proj = Linear(e, f)
        self.down_proj = Linear(f, e)

    def forward(self, x: Tensor) -> Tensor:
        x = ops.shared(x, readers=2)
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))
