"""Cross-entropy over the full vocabulary that never holds all logits."""

from collections.abc import Callable

import torch
from torch import Tensor

from qwen_min.flops import Price, charge
from qwen_min.layers import Linear
from qwen_min.ops import LINEAR, LOGIT_BIAS, _wanted, product

IGNORED = -100
"""The target of a token that does not count, as in torch and Hugging Face."""

LOGITS_AT_ONCE = {"cpu": 2**21}
"""At most how many logits exist at a time, in blocks of the vocabulary: on a CPU as many as its caches hold (8 MB)."""

LOGITS_ELSEWHERE = 2**28
"""The same on any other device; on torch's meta device, where prices are predicted, a block is but overhead."""

LOGITS_KEPT = 2**26
"""At most how many are kept where the head or a bias has a gradient, in chunks of tokens."""

# Per token: V exponentials and V-1 adds, a logarithm, a subtraction. Backward: the division by that sum, the target's
# part, and the factor that the mean brings to each gradient. The rescaling between blocks depends on their size and is
# a ten-thousandth of the product: not charged.
CROSS_ENTROPY = Price(
    "loss",
    "N V E gh gw gb",
    exponential="N*(V+1)",
    add="N*V",
    d_divide="gh*N*E+max(gw,gb)*N",
    d_add="(gh+gw)*N*E+gb*N",
    d_multiply="gh*N*E+max(gw,gb)*N*V+gw*V*E+gb*V",
    only=("exact",),
)


def linear_cross_entropy(
    hidden: Tensor,
    head: Linear,
    targets: Tensor,
    bias: Tensor | None = None,
    vocabulary: Tensor | None = None,
    compiled: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, int]:
    """The sum over tokens of -log softmax(h Wᵀ + bias)[target], exact, and how many tokens counted.

    Logits are made for a part of the vocabulary at a time; where the hidden states' gradient will be wanted it is
    made from them on the spot, so the backward only scales it. Sums run in float64.

    Args:
        hidden: (B, T, E) final hidden states.
        head: the (V, E) head.
        targets: (B, T) token ids, `IGNORED` where a token does not count.
        bias: (V) added to the logits.
        vocabulary: (N) token ids, each once: the softmax runs over these alone, which is another, lower loss. None
            is all V.
        compiled: `_losses` as torch's compiler makes it; None for itself.

    Returns:
        The sum in nats, a float64 scalar, and the count.

    Raises:
        ValueError: the targets are of another shape than the tokens, or one is no token, or not in `vocabulary`.

    Source: the online softmax of Milakov and Gimelshein 2018, over a head as in Cut Your Losses (Wijmans et al. 2024).
    """
    total, _, counted = _cross_entropy(hidden, head, targets, bias, vocabulary, compiled)
    return total, targets.numel() if targets.is_meta else int(counted.sum())


def token_cross_entropy(
    hidden: Tensor,
    head: Linear,
    targets: Tensor,
    bias: Tensor | None = None,
    vocabulary: Tensor | None = None,
    compiled: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Each token's -log softmax(h Wᵀ + bias)[target] in nats, (B, T) float64, 0 where it does not count; no gradient.

    Arguments and errors as in `linear_cross_entropy`, which sums these.
    """
    return _cross_entropy(hidden, head, targets, bias, vocabulary, compiled)[1]


def _cross_entropy(hidden, head, targets, bias, vocabulary, compiled) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, each token's part of it, (B, T), and which tokens count, (B, T)."""
    rows, n, weight = hidden.flatten(0, -2), targets.numel(), head.weight
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets are {list(targets.shape)}: expected {list(hidden.shape[:-1])}, one for each token")
    counted = targets != IGNORED
    if not targets.is_meta and ((targets < 0) | (targets >= len(weight)))[counted].any():
        raise ValueError(f"a target is outside of the vocabulary: expected 0 to {len(weight) - 1}, or {IGNORED}")
    if vocabulary is not None:
        targets = _places(targets, vocabulary, len(weight))
        weight, bias = weight[vocabulary], None if bias is None else bias[vocabulary]
    gh, gw, gb = _wanted(hidden, weight, bias)
    with head.charged():
        charge(LINEAR, n, rows.shape[1], weight.shape[0], gh, gw)
        if bias is not None:
            charge(LOGIT_BIAS, n, weight.shape[0], gb)
        charge(CROSS_ENTROPY, n, *weight.shape, gh, gw, gb)
    total, each = _LinearCrossEntropy.apply(rows, weight, targets.flatten(), bias, (gh, gw, gb), compiled or _losses)
    return total, each.view(targets.shape), counted


def _places(targets: Tensor, vocabulary: Tensor, size: int) -> Tensor:
    """Where in `vocabulary` each target stands."""
    inside = (vocabulary >= 0) & (vocabulary < size)
    if not targets.is_meta and not 0 < len(vocabulary) == len(vocabulary[inside].unique()):
        raise ValueError(f"the vocabulary asked for is no set of tokens: expected some of 0 to {size - 1}, each once")
    place = torch.full((size,), -1, device=targets.device)
    place[vocabulary] = torch.arange(len(vocabulary), device=targets.device)
    placed = place[targets.clamp(min=0)].where(targets != IGNORED, IGNORED)
    if not targets.is_meta and (placed == -1).any():
        token = int(targets[placed == -1][0])
        raise ValueError(f"target {token} is not in the vocabulary asked for: expected one of its {len(vocabulary)}")
    return placed


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, targets, bias, wanted, losses):
        each = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        gradients = [
            torch.zeros_like(t, dtype=torch.float32) if want else None
            for t, want in zip((rows, weight, bias), wanted, strict=True)
        ]
        chunk = max(1, LOGITS_KEPT // len(weight)) if wanted[1] or wanted[2] else max(1, len(rows))
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            d_rows = None if gradients[0] is None else gradients[0][part]
            each[part] = losses(rows[part], weight, targets[part], bias, (d_rows, *gradients[1:]))
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
        return rows, weight, None, bias, None, None


def _losses(rows, weight, targets, bias, gradients) -> Tensor:
    """The losses (n) of tokens with hidden states (n, E), and into `gradients` those of their sum.

    d_rows (n, E) is written; d_weight (V, E) and d_bias (V) are added to; each may be None.
    """
    d_rows, d_weight, d_bias = gradients
    counted, index = (targets != IGNORED)[:, None], targets.clamp(min=0)[:, None]  # (n, 1)
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
        d_rows.div_(sums).sub_(weight[index[:, 0]]).mul_(counted)
    for block, weights, higher in kept:
        weights.mul_(counted * (higher - top).exp_() / sums)
        if d_weight is not None:
            d_weight[block] += weights.to(rows.dtype).T @ rows
        if d_bias is not None:
            d_bias[block] += weights.sum(0)
    if d_weight is not None:
        d_weight.index_add_(0, index[:, 0], -(rows * counted).to(d_weight.dtype))
    if d_bias is not None:
        d_bias.index_add_(0, index[:, 0], -counted[:, 0].to(d_bias.dtype))
    return (sums.log() + (top.double() - chosen.double())).where(counted, 0)[:, 0]  # not times 0: it may be infinite
