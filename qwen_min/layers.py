"""The decoder's small layers: token embedding, linear, RMSNorm, SwiGLU."""

import torch
from torch import Tensor, nn

from qwen_min import ops
from qwen_min.config import QwenConfig
from qwen_min.flops import Metered


class Embedding(Metered):
    """Token ids (B, T) to hidden states (B, T, E), in `compute_dtype` whatever type the table is kept in.

    tied: the head reads the table too.
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
