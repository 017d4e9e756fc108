"""Cross-entropy over the full vocabulary that never holds all logits.

Logits are made for a part of the vocabulary at a time; where the hidden states' gradient will be wanted it is made from
them on the spot, so the backward only scales it. Sums run in float64.

Source: the online softmax of Milakov and Gimelshein 2018, over a head as in Cut Your Losses (Wijmans et al. 2024).
"""

import torch
from torch import Tensor

from qwen_min.fast.product import product
from qwen_min.layers import Linear
from qwen_min.loss import IGNORED
from qwen_min.ops import wanted

LOGITS_AT_ONCE = {"cpu": 2**21}
"""At most how many logits exist at a time, in blocks of the vocabulary: on a CPU as many as its caches hold (8 MB)."""

LOGITS_ELSEWHERE = 2**28
"""The same on any other device; on torch's meta device, where prices are predicted, a block is but overhead."""

LOGITS_KEPT = 2**26
"""At most how many are kept where the head or a bias has a gradient, in chunks of tokens."""


def cross_entropy(
    rows: Tensor, head: Linear, weight: Tensor, targets: Tensor, bias: Tensor | None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The sum of the losses of hidden states (N, E) under `weight` (V, E), a scalar with a gradient, and each, (N).

    `weights` (N) multiply the losses. Both float64. `head` says with its attribute `losses`, if it has one, by what a
    compiler made of the function here.
    """
    losses = getattr(head, "losses", token_losses)
    return _LinearCrossEntropy.apply(rows, weight, targets, bias, weights, wanted(rows, weight, bias), losses)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, targets, bias, weights, wanted, losses):
        each = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        gradients = [
            torch.zeros_like(t, dtype=torch.float32) if want else None
            for t, want in zip((rows, weight, bias), wanted, strict=True)
        ]
        chunk = max(1, LOGITS_KEPT // len(weight)) if wanted[1] or wanted[2] else max(1, len(rows))
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            d_rows = None if gradients[0] is None else gradients[0][part]
            some = None if weights is None else weights[part]
            each[part] = losses(rows[part], weight, targets[part], bias, (d_rows, *gradients[1:]), some)
        ctx.save_for_backward(*(g for g in gradients if g is not None))
        ctx.wanted, ctx.dtypes = wanted, [None if t is None else t.dtype for t in (rows, weight, bias)]
        ctx.mark_non_differentiable(each)
        return each.sum(), each

    @staticmethod
    def backward(ctx, grad, _):
        saved = iter(ctx.saved_tensors)
        rows, weight, bias = (
            (next(saved) * grad.float()).to(dtype) if want else None
            for want, dtype in zip(ctx.wanted, ctx.dtypes, strict=True)
        )
        return rows, weight, None, bias, None, None, None


def token_losses(rows, weight, targets, bias, gradients, token_weights=None) -> Tensor:
    """The losses (n) of tokens with hidden states (n, E), times `token_weights` (n), and into `gradients` their sum's.

    d_rows (n, E) is written; d_weight (V, E) and d_bias (V) are added to; each may be None.
    """
    d_rows, d_weight, d_bias = gradients
    counted, index = (targets != IGNORED)[:, None], targets.clamp(min=0)[:, None]  # (n, 1)
    share = counted if token_weights is None else counted * token_weights[:, None]
    # Not -inf, which a bias may make of a whole block: their difference would be NaN.
    top = torch.full_like(index, torch.finfo(torch.float32).min, dtype=torch.float32)
    sums, chosen, kept = torch.zeros_like(index, dtype=torch.float64), torch.zeros_like(top), []
    size = max(1, LOGITS_AT_ONCE.get(rows.device.type, LOGITS_ELSEWHERE) // len(rows))
    for first in range(0, len(weight), size):
        block = slice(first, first + size)
        logits = product(rows, weight[block]).float()  # (n, size)
        if bias is not None:
            logits += bias[block]
        inside = (first <= index) & (index < first + logits.shape[1])
        chosen = logits.gather(1, (index - first).clamp(0, logits.shape[1] - 1)).where(inside, chosen)
        higher = torch.maximum(top, logits.amax(1, keepdim=True))
        shrink = (top - higher).exp_()  # of what the earlier blocks gave, to the new highest logit
        weights, top = logits.sub_(higher).exp_(), higher
        sums = sums * shrink + weights.sum(1, keepdim=True)
        if d_rows is not None:
            d_rows.mul_(shrink).add_(product(weights.to(rows.dtype), weight[block].T))
        if d_weight is not None or d_bias is not None:
            kept.append((block, weights, higher))
    # d loss / d logits = softmax - one-hot, nothing for a token that does not count
    if d_rows is not None:
        d_rows.div_(sums).sub_(weight[index[:, 0]]).mul_(share)
    for block, weights, higher in kept:
        weights.mul_(share * (higher - top).exp_() / sums)
        if d_weight is not None:
            d_weight[block] += weights.to(rows.dtype).T @ rows
        if d_bias is not None:
            d_bias[block] += weights.sum(0)
    if d_weight is not None:
        d_weight.index_add_(0, index[:, 0], -(rows * share).to(d_weight.dtype))
    if d_bias is not None:
        d_bias.index_add_(0, index[:, 0], -share[:, 0].to(d_bias.dtype))
    each = (sums.log() + (top.double() - chosen.double())).where(counted, 0)[:, 0]  # not times 0: it may be infinite
    return each if token_weights is None else each * token_weights
