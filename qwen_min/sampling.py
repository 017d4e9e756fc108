"""How a token is chosen where it is not simply the likeliest: sampling, penalties, constraints; and guesses at it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qwen_min.cache import Prefill


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits; options, and the order in which they act, are those of transformers.

    repetition_penalty: the logit of each token that the prompt holds or that was generated is divided by this where
        it is positive and multiplied where it is negative, also under greedy (Keskar et al. 2019); 1 is off.
    temperature: 0 takes the likeliest token; else logits are divided by it and sampled from.
    top_k: sample only among so many likeliest tokens, and those that equal the last of them; 0 is off.
    top_p: sample only among the likeliest tokens that together have this probability (Holtzman et al. 2020).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}: expected 0 (greedy) or more")
        if type(self.top_k) is not int or self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: expected a whole number, 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: expected more than 0, at most 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}: expected more than 0 (1 is off)")


class Constraint(Protocol):
    """Says which tokens may follow, and takes note of those that were chosen.

    tokens: (N) all that can ever come, where what else the model would have said is of no interest: no other logits
        are computed. None for the whole vocabulary.
    """

    tokens: Tensor | None

    def allowed(self) -> Tensor:
        """(rows, V) bool, or (rows, N) of `tokens`: what may come next, at least one token in each row."""

    def advance(self, new: Tensor, kept: Tensor | None) -> None:
        """Take note of the chosen tokens (rows), and of the probability that was allowed (rows), float64.

        It is the model's own: at temperature 1, before any option of `Sampling`. None where `tokens` are given.
        """


class Draft(Protocol):
    """Guesses which tokens are chosen next, as a tree, and takes note of those that were.

    A guess can cost time, never a token.
    """

    def guess(self) -> Sequence[tuple[int, int]]:
        """(parent, token) of each guess, the most useful first: the guesses are counted from 1, and each follows an
        earlier one, or 0, the token chosen last."""

    def advance(self, token: int) -> None:
        """Take note of a chosen token."""


class Choice:
    """Chooses the next token of each row, from the hidden state of the last one: see `generate.decode`.

    Args:
        model: the `Qwen` that made the prefill.
        prefill: of the prompts, B of them.
        samples: rows of each prompt, one after the other; all are chosen from the same first logits.
        seed: of the samples; None draws a new one.
        constraint: what may be chosen; None for anything.
        options: how.
    """

    def __init__(
        self,
        model,
        prefill: Prefill,
        samples: int = 1,
        seed: int | None = None,
        constraint: Constraint | None = None,
        options: Sampling | None = None,
    ):
        if samples < 1:
            raise ValueError(f"samples is {samples}: expected at least 1")
        self.model, self.constraint, self.options = model, constraint, options or Sampling()
        self.rows = len(prefill.ids) * samples
        self.tokens = None if constraint is None else constraint.tokens  # (N), or all V: C of them
        self.generator = torch.Generator(model.device)
        if seed is None:
            self.generator.seed()
        elif type(seed) is int and 0 <= seed < 2**64:
            self.generator.manual_seed(seed)
        else:
            raise ValueError(f"seed is {seed!r:.200}: expected a whole number, 0 to 2^64 - 1")
        self.seen: Tensor | None = None  # (rows, C)
        if self.options.repetition_penalty != 1:
            seen = _seen(prefill, model.config.vocab_size).repeat_interleave(samples, 0)  # (rows, V)
            self.seen = seen if self.tokens is None else seen[:, self.tokens]

    def __call__(self, hidden: Tensor) -> Tensor:
        """(rows) tokens after hidden states (rows or B, 1, E)."""
        return self.choose(self.logits(hidden)[:, -1])

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, T, C) float32, of hidden states (rows or B, T, E)."""
        logits = self.model.head(hidden, self.tokens).float()
        return logits.repeat_interleave(self.rows // len(logits), 0)

    def choose(self, logits: Tensor) -> Tensor:
        """(rows) tokens from logits (rows, C)."""
        scores, constraint = logits, self.constraint
        if self.seen is not None:
            scores = penalise(logits, self.seen, self.options.repetition_penalty)
        if constraint is not None:
            allowed = constraint.allowed()
            scores = scores.masked_fill(~allowed, float("-inf"))
        greedy = likeliest(scores)
        chosen = sample(scores, self.options, self.generator) if self.options.temperature else greedy
        if self.seen is not None:
            self.seen.scatter_(1, chosen[:, None], True)
        new = chosen if self.tokens is None else self.tokens[chosen]
        if constraint is not None:
            constraint.advance(new, _mass(logits, allowed) if self.tokens is None else None)
        return new


def likeliest(scores: Tensor) -> Tensor:
    """The token with the highest of scores (B, V), (B). Raises ValueError where that is not finite."""
    if not (highest := scores.amax(-1)).isfinite().all():  # argmax would give some token
        raise ValueError(f"the highest logits are {highest.tolist()!s:.100}: expected finite ones")
    return scores.argmax(-1)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """(B, V) logits with those of the tokens `seen`, (B, V) bool, made less likely: see `Sampling`."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def sample(logits: Tensor, options: Sampling, generator: torch.Generator) -> Tensor:
    """One draw per row of (B, V) logits, from `probabilities`."""
    weights, tokens = probabilities(logits, options)
    drawn = torch.multinomial(weights, 1, generator=generator)
    return (drawn if tokens is None else tokens.gather(1, drawn))[:, 0]


def probabilities(logits: Tensor, options: Sampling) -> tuple[Tensor, Tensor | None]:
    """What is sampled from: temperature first, then `top_k`, then `top_p`.

    Returns:
        (B, N) probabilities, not normalised, and the token that each is of, (B, N): None where N is V, in order.
    """
    logits = logits / max(options.temperature, 1e-30)  # below, float32 overflows; it is greedy already
    alive = logits > float("-inf")
    if options.top_k:
        alive &= logits >= logits.topk(min(options.top_k, logits.shape[1])).values[:, -1:]
    tokens, most = None, int(alive.sum(-1).max())
    if most < logits.shape[1]:
        # Only these are sorted and drawn from: all of Qwen's tokens would take 18 ms a row (one thread, measured),
        # as long as a row's forward.
        logits, tokens = logits.masked_fill(~alive, float("-inf")).topk(most)
    weights = logits.softmax(-1)
    if options.top_p < 1:
        ordered, index = weights.sort(-1)  # upwards, as in transformers: of equals the same are kept
        outside = ordered.cumsum(-1) <= 1 - options.top_p
        outside[:, -1] = False
        weights = torch.zeros_like(ordered).scatter(-1, index, ordered.masked_fill(outside, 0))
    return weights, tokens


def _seen(prefill: Prefill, vocabulary: int) -> Tensor:
    """Which tokens each prompt holds, (B, V) bool, padding aside."""
    ids = prefill.ids
    if prefill.padding is not None:
        padded = torch.arange(ids.shape[1], device=ids.device) < prefill.padding[:, None]
        ids = torch.where(padded, ids[:, -1:], ids)  # the last token is never padding
    return torch.zeros(len(ids), vocabulary, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)


def _mass(logits: Tensor, allowed: Tensor) -> Tensor:
    """The probability of the tokens `allowed`, both (B, V): (B) float64, so that what is missing to 1 is exact."""
    weights = (logits - logits.amax(-1, keepdim=True)).exp_()
    return (weights * allowed).sum(-1, dtype=torch.float64) / weights.sum(-1, dtype=torch.float64)
