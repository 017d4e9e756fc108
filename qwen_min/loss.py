"""Cross-entropy over the full vocabulary that never holds all logits."""

import math

import torch
from torch import Tensor

from qwen_min.flops import Price, charge
from qwen_min.layers import Linear
from qwen_min.ops import LINEAR, LOGIT_BIAS, _wanted

IGNORED = -100
"""The target of a token that does not count, as in torch and Hugging Face."""

LOGITS_AT_ONCE = 2**26
"""At most how many logits exist at a time, in chunks of equal size: for 512 tokens of Qwen's vocabulary two chunks of
156 MB. Chunks of 110 tokens took 2.4 s, of 256 tokens 1.9 s, all 512 at once 1.7 s (2 cores, measured)."""

# Per token: V exponentials and V-1 adds, a logarithm, a subtraction. Backward: the factor that makes probabilities of
# exponentials, the one at the target, and the factor that the mean brings to each gradient.
CROSS_ENTROPY = Price(
    "loss",
    "N V E gh gw gb",
    exponential="N*(V+1)",
    add="N*V",
    d_divide="max(gh,gw,gb)*N",
    d_add="max(gh,gw,gb)*N",
    d_multiply="max(gh,gw,gb)*N*V+gh*N*E+gw*V*E+gb*V",
    only=("exact",),
)


def linear_cross_entropy(
    hidden: Tensor, head: Linear, targets: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, int]:
    """The sum over tokens of -log softmax(h Wᵀ + bias)[target], exact, and how many tokens counted.

    Logits are made for a few tokens at a time; where a gradient will be wanted it is made from them on the spot, so
    the backward only scales it. Sums run in float64.

    Args:
        hidden: (B, T, E) final hidden states.
        head: the (V, E) head.
        targets: (B, T) token ids, `IGNORED` where a token does not count.
        bias: (V) added to the logits.

    Returns:
        The sum in nats, a float64 scalar, and the count.

    Raises:
        ValueError: the targets are of another shape than the tokens, or one is no token.

    Source: the chunked fused loss of Liger-Kernel (Hsu et al. 2024) and of Cut Your Losses (Wijmans et al. 2024).
    """
    total, _, counted = _cross_entropy(hidden, head, targets, bias)
    return total, targets.numel() if targets.is_meta else int(counted.sum())


def token_cross_entropy(hidden: Tensor, head: Linear, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each token's -log softmax(h Wᵀ + bias)[target] in nats, (B, T) float64, 0 where it does not count; no gradient.

    Arguments and errors as in `linear_cross_entropy`, which sums these.
    """
    return _cross_entropy(hidden, head, targets, bias)[1]


def _cross_entropy(hidden, head, targets, bias) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, each token's part of it, (B, T), and which tokens count, (B, T)."""
    rows, n = hidden.flatten(0, -2), targets.numel()
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets are {list(targets.shape)}: expected {list(hidden.shape[:-1])}, one for each token")
    counted = targets != IGNORED
    if not targets.is_meta and ((targets < 0) | (targets >= len(head.weight)))[counted].any():
        raise ValueError(f"a target is outside of the vocabulary: expected 0 to {len(head.weight) - 1}, or {IGNORED}")
    gh, gw, gb = _wanted(hidden, head.weight, bias)
    with head.charged():
        charge(LINEAR, n, rows.shape[1], head.weight.shape[0], gh, gw)
        if bias is not None:
            charge(LOGIT_BIAS, n, head.weight.shape[0], gb)
        charge(CROSS_ENTROPY, n, *head.weight.shape, gh, gw, gb)
    total, each = _LinearCrossEntropy.apply(rows, head.weight, targets.flatten(), bias, (gh, gw, gb))
    return total, each.view(targets.shape), counted


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, targets, bias, wanted):
        each = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        wide = weight.to(rows.dtype)
        gradients = [
            torch.zeros_like(t, dtype=torch.float32) if want else None
            for t, want in zip((rows, weight, bias), wanted, strict=True)
        ]
        chunks = max(1, math.ceil(len(rows) * weight.shape[0] / LOGITS_AT_ONCE))
        chunk = math.ceil(len(rows) / chunks)
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            counted = targets[part] != IGNORED
            index = targets[part].clamp(min=0)[:, None]  # (n, 1)
            logits = (rows[part] @ wide.T).float()  # (n, V)
            if bias is not None:
                logits += bias
            chosen = logits.gather(1, index)
            top = logits.amax(1, keepdim=True)
            logits.sub_(top).exp_()
            sums = logits.sum(1, keepdim=True)
            losses = sums.double().log() + (top.double() - chosen.double())  # (n, 1)
            each[part] = losses[:, 0] * counted
            if any(wanted):
                # d loss / d logits = softmax - one-hot, nothing for a token that does not count
                logits.mul_(counted[:, None] / sums)
                logits.scatter_add_(1, index, -counted[:, None].to(logits.dtype))
                _accumulate(gradients, part, logits, rows[part], wide)
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
        return rows, weight, None, bias, None


def _accumulate(gradients, part, d_logits, rows, weight):
    """Add a chunk's gradients: of its rows, of the head (V, E), of the bias (V)."""
    d_rows, d_weight, d_bias = gradients
    if d_rows is not None:
        d_rows[part] = d_logits.to(weight.dtype) @ weight
    if d_weight is not None:
        d_weight += d_logits.to(rows.dtype).T @ rows
    if d_bias is not None:
        d_bias += d_logits.sum(0)
