"""Cross-entropy of tokens: in training, in validation, and of a true continuation after a prompt."""

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_min.cache import Prefill
from qwen_min.flops import charge
from qwen_min.layers import Linear
from qwen_min.ops import LINEAR, LOGIT_BIAS, count_up, faster, wanted
from qwen_min.prices import Price

IGNORED = -100
"""The target of a token that does not count, as in torch and Hugging Face."""

# Per token: V exponentials and V-1 adds, a logarithm, a subtraction. Backward: the division by that sum, the target's
# part, and the factor that the mean brings to each gradient. A softmax in blocks of the vocabulary rescales between
# them, which depends on their size and is a ten-thousandth of the product: not charged.
CROSS_ENTROPY = Price(
    "loss",
    "N V E gh gw gb: x*N*V > 8*N; max(gh,gw,gb)*x*N*V+gh*x*N*E+gw*w*V*E > max(gh,gw,gb)*x*N*V+gh*x*N*E+gw*w*V*E",
    exponential="N*(V+1)",
    add="N*V",
    d_divide="gh*N*E+max(gw,gb)*N",
    d_add="(gh+gw)*N*E+gb*N",
    d_multiply="gh*N*E+max(gw,gb)*N*V+gw*V*E+gb*V",
    only=("exact",),
)

# A weight per token, times its loss and its part of each gradient.
WEIGHTS = Price(
    "weights",
    "N E gh gw gb: 12*N > 8*N; 4*N+x*((gh+gw)*N*E+max(gw,gb)*N) > x*((gh+gw)*N*E+max(gw,gb)*N)",
    component="loss",
    multiply="N",
    d_multiply="gh*N*E+max(gw,gb)*N+gw*N*E",
    only=("exact",),
)

# Per token: the D digits' logits, their softmax, and its mean distance from the true digit, which is looked up.
# Backward: the loss's factor times each distance, the softmax's own, and the sums with the cross-entropy's gradients.
NUMBER_LOSS = Price(
    "number_loss",
    "N E D b gb gh gw: x*N*D+8*N > 0; max(gh,gw,gb)*x*N*D > max(gh,gw,gb)*x*N*D",
    component="loss",
    product="N,E,D",
    exponential="N*D",
    divide="N*D",
    multiply="N*D",
    add="N*(2*D-2)+b*N*D",
    d_add="max(gh,gw,gb)*N*(2*D-1)+gh*N*E+gw*D*E+gb*N*D",
    d_multiply="max(gh,gw,gb)*3*N*D",
    only=("exact", "matmul"),
)


def linear_cross_entropy(
    hidden: Tensor,
    head: Linear,
    targets: Tensor,
    bias: Tensor | None = None,
    vocabulary: Tensor | None = None,
    weights: Tensor | None = None,
    digits: Tensor | None = None,
    digit_factor: float = 0.0,
) -> tuple[Tensor, int]:
    """The sum over tokens of -log softmax(h Wᵀ + bias)[target], and how many tokens counted.

    Args:
        hidden: (B, T, E) final hidden states.
        head: the (V, E) head.
        targets: (B, T) token ids, `IGNORED` where a token does not count.
        bias: (V) added to the logits.
        vocabulary: (N) token ids, each once: the softmax runs over these alone, which is another, lower loss. None
            is all V.
        weights: (B, T) float32, what each token's loss is multiplied by. None is 1.
        digits, digit_factor: the tokens of 0 to 9, whose `number_loss`, times this factor, is added.

    Returns:
        The sum in nats, a float64 scalar, and the count.

    Raises:
        ValueError: the targets or weights are of another shape than the tokens, or a target is no token, or not in
            `vocabulary`.
    """
    total, _ = _cross_entropy(hidden, head, targets, bias, vocabulary, weights)
    if digits is not None:
        total = total + digit_factor * number_loss(hidden, head, targets, digits, bias)
    return total, targets.numel() if targets.is_meta else int((targets != IGNORED).sum())


def token_cross_entropy(
    hidden: Tensor, head: Linear, targets: Tensor, bias: Tensor | None = None, vocabulary: Tensor | None = None
) -> Tensor:
    """Each token's -log softmax(h Wᵀ + bias)[target] in nats, (B, T) float64, 0 where it does not count; no gradient.

    Arguments and errors as in `linear_cross_entropy`, which sums these.
    """
    return _cross_entropy(hidden, head, targets, bias, vocabulary)[1].detach()


def number_loss(hidden: Tensor, head: Linear, targets: Tensor, digits: Tensor, bias: Tensor | None = None) -> Tensor:
    """The sum, over tokens whose target is a digit d, of sum_j p_j |j - d|; p is the softmax over the ten digits alone.

    Args:
        hidden, head, targets, bias: as in `linear_cross_entropy`, which refuses bad ones.
        digits: (10) the tokens of 0 to 9.

    Returns:
        A float64 scalar, with a gradient.

    Source: Zausinger et al. 2025, "Regress, Don't Guess", the Number Token Loss by Wasserstein-1 distance.
    """
    rows, weight = hidden.flatten(0, -2), head.weight[digits]  # (N, E), (10, E)
    bias = None if bias is None else bias[digits]
    with head.charged():
        charge(NUMBER_LOSS, *rows.shape, len(digits), int(bias is not None), *wanted(bias, rows, weight))
    logits = F.linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))  # (N, 10)
    true = targets.flatten()[:, None] == digits  # (N, 10)
    values = count_up(len(digits), digits.device)
    distance = (values - true.int().argmax(1, keepdim=True)).abs() * true.any(1, keepdim=True)
    return (logits.double().softmax(1) * distance).sum()


def _cross_entropy(hidden, head, targets, bias, vocabulary, weights=None) -> tuple[Tensor, Tensor]:
    """The sum, and each token's part of it, (B, T)."""
    for name, given in (("targets", targets), ("weights", weights)):
        if given is not None and given.shape != hidden.shape[:-1]:
            raise ValueError(f"{name} are {list(given.shape)}: expected {list(hidden.shape[:-1])}, one for each token")
    rows, weight, shape = hidden.flatten(0, -2), head.weight, targets.shape  # (N, E), (V, E)
    counted = targets != IGNORED
    if not targets.is_meta and ((targets < 0) | (targets >= len(weight)))[counted].any():
        raise ValueError(f"a target is outside of the vocabulary: expected 0 to {len(weight) - 1}, or {IGNORED}")
    if vocabulary is not None:
        targets = _places(targets, vocabulary, len(weight))
        weight, bias = weight[vocabulary], None if bias is None else bias[vocabulary]
    gh, gw, gb = wanted(hidden, weight, bias)
    with head.charged():
        charge(LINEAR, len(rows), rows.shape[1], len(weight), gh, gw)
        if bias is not None:
            charge(LOGIT_BIAS, len(rows), len(weight), gb)
        charge(CROSS_ENTROPY, len(rows), *weight.shape, gh, gw, gb)
        if weights is not None:
            charge(WEIGHTS, *rows.shape, gh, gw, gb)
    targets, weights = targets.flatten(), None if weights is None else weights.flatten()
    if answer := faster("cross_entropy"):
        total, each = answer(rows, head, weight, targets, bias, weights)
        return total, each.view(shape)
    logits = F.linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))  # (N, V)
    # In float64: over 151,936 tokens a float32 softmax is off by 4e-5.
    each = F.cross_entropy(logits.double(), targets, ignore_index=IGNORED, reduction="none")
    each = each if weights is None else each * weights
    return each.sum(), each.view(shape)


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


@torch.inference_mode()
def continuation_losses(model, prefill: Prefill, targets: Tensor) -> Tensor:
    """-log p in nats of the true tokens after the prompts, each given all before it: (B, N) float64.

    Args:
        model: the `Qwen` that made the prefill, which has room for N - 1 tokens.
        targets: (B, N) token ids; a shorter row ends in `IGNORED`, whose losses are 0.

    Raises:
        ValueError: the targets are of another batch, are no tokens, or one comes after an `IGNORED`.
    """
    if targets.ndim != 2 or len(targets) != len(prefill.ids) or targets.shape[1] == 0:
        raise ValueError(f"targets are {list(targets.shape)}: expected {len(prefill.ids)} rows of at least one token")
    inputs = targets[:, :-1]
    if not targets.is_meta and ((inputs == IGNORED) & (targets[:, 1:] != IGNORED)).any():
        raise ValueError(f"a target comes after {IGNORED}: expected {IGNORED} at the end of a row alone")
    cache, hidden = prefill.rewound(), prefill.hidden
    if inputs.shape[1]:
        later = model.model(inputs.masked_fill(inputs == IGNORED, 0), cache, prefill.padding)
        hidden = torch.cat((hidden, later), 1)  # (B, N, E)
    prefill.rewound()
    return token_cross_entropy(hidden, model.lm_head, targets, model.logit_bias)
