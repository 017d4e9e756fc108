"""Generation: the prompts' prefill, then one forward per new token, over a KV cache.

The prefill runs once and can be used again: to draw several continuations of each prompt, and to score the true one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qwen_min.cache import KVCache
from qwen_min.loss import IGNORED, token_cross_entropy


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
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise ValueError(f"top_k is {self.top_k}: expected a whole number, 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: expected more than 0, at most 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}: expected more than 0 (1 is off)")


class Constraint(Protocol):
    """Says which tokens may follow, and is told which were chosen."""

    def allowed(self) -> Tensor:
        """(rows, V) bool: what may come next, at least one token in each row."""

    def advance(self, new: Tensor, kept: Tensor) -> None:
        """Take note of the chosen tokens (rows), and of the probability that was allowed (rows), float64.

        It is the model's own: at temperature 1, before any option of `Sampling`.
        """


@dataclass(frozen=True)
class Prefill:
    """Prompts that a model has read. Each use starts behind them, whatever an earlier one left; one at a time."""

    cache: KVCache
    ids: Tensor  # (B, T)
    padding: Tensor | None  # (B)
    hidden: Tensor  # (B, 1, E), of the last token

    def rewound(self) -> KVCache:
        """The cache with the prompts alone in it."""
        self.cache.rewind(self.ids.shape[1])
        return self.cache


@torch.inference_mode()
def prefill(model, ids: Tensor, room: int, padding: Tensor | None = None) -> Prefill:
    """One forward over the prompts.

    Args:
        model: a `Qwen`.
        ids: (B, T) prompts, left-padded to one length.
        room: how many more tokens of each the cache can hold: one less than are generated or scored will do.
        padding: (B) how many of each row's first tokens are padding; None for none.
    """
    cache = KVCache(model.config, ids.shape[0], ids.shape[1] + room, model.compute_dtype, model.device)
    return Prefill(cache, ids, padding, model.model(ids, cache, padding)[:, -1:])


@torch.inference_mode()
def continuation_losses(model, prefill: Prefill, targets: Tensor) -> Tensor:
    """-log p in nats of the true tokens behind the prompts, each given all before it: (B, N) float64.

    Args:
        model: the `Qwen` that made the prefill, which has room for N - 1 tokens.
        targets: (B, N) token ids; a shorter row ends in -100, whose losses are 0.

    Raises:
        ValueError: the targets are of another batch, are no tokens, or one comes behind a -100.
    """
    if targets.ndim != 2 or len(targets) != len(prefill.ids) or targets.shape[1] == 0:
        raise ValueError(f"targets are {list(targets.shape)}: expected {len(prefill.ids)} rows of at least one token")
    inputs = targets[:, :-1]
    if not targets.is_meta and ((inputs == IGNORED) & (targets[:, 1:] != IGNORED)).any():
        raise ValueError(f"a target comes behind {IGNORED}: expected {IGNORED} at the end of a row alone")
    cache, hidden = prefill.rewound(), prefill.hidden
    if inputs.shape[1]:
        later = model.model(inputs.masked_fill(inputs == IGNORED, 0), cache, prefill.padding)
        hidden = torch.cat((hidden, later), 1)  # (B, N, E)
    prefill.rewound()
    return token_cross_entropy(hidden, model.lm_head, targets, model.logit_bias)


@torch.inference_mode()
def decode(
    model,
    prefill: Prefill,
    max_new_tokens: int,
    *,
    samples: int = 1,
    seed: int | None = None,
    constraint: Constraint | None = None,
    **sampling,
) -> Iterator[Tensor]:
    """Yield the (B·samples) new tokens of each step, `max_new_tokens` times; the caller stops when it has enough.

    Args:
        model: the `Qwen` that made the prefill.
        prefill: it stays as it is where there are several samples, which work on a copy of its cache; one sample is
            written behind the prompts, where the next use starts over.
        samples: continuations of each prompt; row b·samples + s is sample s of prompt b.
        seed: of the samples; None draws a new one.
        constraint: what may be chosen; None for anything.
        sampling: see `Sampling`.
    """
    options = Sampling(**sampling)
    _check(max_new_tokens)
    if samples < 1:
        raise ValueError(f"samples is {samples}: expected at least 1")
    generator = torch.Generator(model.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    cache = prefill.rewound() if samples == 1 else prefill.rewound().repeat(samples)
    cache.check(cache.batch, max_new_tokens - 1)
    padding = None if prefill.padding is None else prefill.padding.repeat_interleave(samples)
    seen = _seen(prefill, model.config.vocab_size).repeat_interleave(samples, 0)  # (B·samples, V)
    hidden = prefill.hidden
    for step in range(max_new_tokens):
        logits = model.head(hidden)[:, 0].float()  # (B, V) from the prefill, then (B·samples, V)
        if step == 0:
            logits = logits.repeat_interleave(samples, 0)
        scores = penalise(logits, seen, options.repetition_penalty)
        if constraint is not None:
            allowed = constraint.allowed()
            scores = scores.masked_fill(~allowed, float("-inf"))
        new = sample(scores, options, generator) if options.temperature else scores.argmax(-1)
        seen.scatter_(1, new[:, None], True)
        if constraint is not None:
            constraint.advance(new, _mass(logits, allowed))
        yield new
        if step + 1 < max_new_tokens:
            hidden = model.model(new[:, None], cache, padding)


def stream(model, ids: Tensor, max_new_tokens: int, *, padding: Tensor | None = None, **options) -> Iterator[Tensor]:
    """Yield the (B) new tokens of each step behind the prompts: arguments as in `prefill`, options as in `decode`."""
    _check(max_new_tokens)
    if max_new_tokens:
        yield from decode(model, prefill(model, ids, max_new_tokens - 1, padding), max_new_tokens, **options)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """(B, V) logits with those of the tokens `seen`, (B, V) bool, made less likely: see `Sampling`."""
    if penalty == 1:
        return logits
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


def generate(
    model,
    ids: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop: Sequence[int] = (),
    pad_id: int = 0,
    seed: int | None = None,
    **sampling,
) -> Tensor | list[list[int]]:
    """Prompt and new tokens, greedy unless a temperature is given. Every choice is an argument; no file is consulted.

    Args:
        model: a `Qwen`.
        ids: (B, T) prompts of one length, or a list of prompts of any lengths (they run left-padded as one batch).
        max_new_tokens: new tokens per prompt.
        stop: tokens that end a prompt's generation; the stop token itself is kept. None stops unless passed.
        pad_id: what fills a row of the tensor behind its stop token, and what pads short prompts (masked).
        seed: of the samples; None draws a new one.
        sampling: temperature, top_k, top_p, repetition_penalty: see `Sampling`.

    Returns:
        For a tensor, (B, T + new) of the same dtype; for a list, a list of lists, each cut behind its stop token.

    Raises:
        ValueError: an empty prompt, a token outside of the vocabulary, or an option out of its range.
    """
    if isinstance(ids, Tensor):
        prompts = ids.tolist() if ids.ndim == 2 else []
    else:
        prompts = [list(p) for p in ids]
    if not prompts or not all(prompts):
        raise ValueError("prompts are empty or not (batch, tokens): expected at least one token each")
    vocabulary = model.config.vocab_size
    for number in (t for p in (*prompts, stop, [pad_id]) for t in p):
        if not 0 <= number < vocabulary:
            raise ValueError(f"token {number} is outside of the vocabulary: expected 0 to {vocabulary - 1}")
    padded, padding = left_padded(prompts, pad_id, model.device)

    new: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for step in stream(model, padded, max_new_tokens, padding=padding, seed=seed, **sampling):
        for row, token in enumerate(step.tolist()):
            if not done[row]:
                new[row].append(token)
                done[row] = token in stop
        if all(done):
            break
    if not isinstance(ids, Tensor):
        return [p + n for p, n in zip(prompts, new, strict=True)]
    width = max(map(len, new))
    rows = [p + n + [pad_id] * (width - len(n)) for p, n in zip(prompts, new, strict=True)]
    return torch.tensor(rows, dtype=ids.dtype, device=ids.device)


def left_padded(
    prompts: Sequence[Sequence[int]], pad_id: int = 0, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor | None]:
    """Prompts of any lengths as (B, T) ids, and how many of each row's first tokens are padding, (B): None for none."""
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(p) for p in prompts], device=device)
    ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts], device=device)
    return ids, padding if any(len(p) < longest for p in prompts) else None


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


def _check(max_new_tokens: int) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: expected 0 or more")
