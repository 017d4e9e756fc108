"""Grouped-query attention with q/k/v biases (Ainslie et al. 2023, as Qwen2 has it)."""

from typing import NamedTuple

from torch import Tensor

from qwen_min import ops
from qwen_min.cache import KVCache
from qwen_min.config import QwenConfig
from qwen_min.flops import Metered
from qwen_min.layers import Linear

ATTENTIONS = {"fused": ops.attend_fused, "explicit": ops.attend_explicit}
"""Two implementations of one function: a kernel to run, and the maths to read."""


class View(NamedTuple):
    """Where the new tokens stand and what they may look at: the same for every layer of a forward."""

    cos: Tensor  # (B, T, 1, D); here and below, 1 in the place of B where all rows are alike
    sin: Tensor  # (B, T, 1, D)
    mask: Tensor | None  # (B, 1, T, S) bool; None is plainly causal


class Attention(Metered):
    """H query heads over K key/value heads: o(attend(rotate(q(x)), rotate(k(x)), v(x)))."""

    def __init__(self, config: QwenConfig, layer: int, kind: str = "fused"):
        super().__init__()
        if kind not in ATTENTIONS:
            raise ValueError(f"attention is {kind!r}: expected one of {', '.join(ATTENTIONS)}")
        e, h, k, d = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_dim, self.layer, self.attend = d, layer, ATTENTIONS[kind]
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
        out = self.attend(q, k, v, view.mask)  # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).flatten(2))
