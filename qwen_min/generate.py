"""Generation: the prompts' prefill, then one forward per new token, over a KV cache; fewer where a draft guesses ahead.

The prefill runs once and can be used again: to draw several continuations of each prompt, and to score the true one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qwen_min import captured
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
        if type(self.top_k) is not int or self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: expected a whole number, 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: expected more than 0, at most 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}: expected more than 0 (1 is off)")


class Constraint(Protocol):
    """Says which tokens may follow, and is told which were chosen.

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
    """Guesses which tokens are chosen next, as a tree, and is told which were. A guess can cost time, never a token."""

    def guess(self) -> Sequence[tuple[int, int]]:
        """(parent, token) of each guess, the most useful first: the guesses are counted from 1, and each follows an
        earlier one, or 0, the token chosen last."""

    def advance(self, token: int) -> None:
        """Take note of a chosen token."""


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
    """Read the prompts, as many at once as `Qwen.sequences_at_once` says.

    Args:
        model: a `Qwen`.
        ids: (B, T) prompts, left-padded to one length.
        room: how many more tokens of each the cache can hold: one less than are generated or scored will do.
        padding: (B) how many of each row's first tokens are padding; None for none.
    """
    cache = KVCache(model.config, ids.shape[0], ids.shape[1] + room, model.compute_dtype, model.device)
    hidden, rows = [], model.sequences_at_once(ids.shape[1])
    for start in range(0, len(ids), rows):
        some, left = ids[start : start + rows], None if padding is None else padding[start : start + rows]
        hidden.append(model.model(some, cache.rows(start, start + rows), left)[:, -1:])
    cache.advance(ids.shape[1])
    return Prefill(cache, ids, padding, torch.cat(hidden))


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
    draft: Draft | None = None,
    **sampling,
) -> Iterator[Tensor]:
    """Yield the (B·samples) new tokens of each step, `max_new_tokens` times; the caller stops when it has enough.

    With a draft, a forward carries the token chosen last and a tree of guesses at what follows. Each of them sees its
    ancestors, so the logits behind it are those that a forward of its own would give; tokens are chosen from them as
    ever, for as long as what is chosen was guessed, and the other guesses are forgotten. The tokens are the same, to
    the rounding of products of another shape (speculative decoding, Leviathan et al. 2023, with the tree attention
    of Miao et al. 2023).

    Args:
        model: the `Qwen` that made the prefill.
        prefill: it stays as it is where there are several samples, which work on a copy of its cache; one sample is
            written behind the prompts, where the next use starts over.
        samples: continuations of each prompt; row b·samples + s is sample s of prompt b.
        seed: of the samples; None draws a new one.
        constraint: what may be chosen; None for anything.
        draft: of one prompt, one sample, greedy. Guesses for which the cache has no room are left out, so a prefill
            with as much more room as a tree has guesses is used to the full.
        sampling: see `Sampling`.
    """
    options = Sampling(**sampling)
    _check(max_new_tokens)
    if samples < 1:
        raise ValueError(f"samples is {samples}: expected at least 1")
    if draft is not None and (len(prefill.ids) * samples > 1 or options.temperature):
        asked = f"{len(prefill.ids)} prompts, {samples} samples of each, temperature {options.temperature:g}"
        raise ValueError(f"a draft with {asked}: expected one prompt, one sample, greedy")
    generator = torch.Generator(model.device)
    if seed is None:
        generator.seed()
    elif type(seed) is int and 0 <= seed < 2**64:
        generator.manual_seed(seed)
    else:
        raise ValueError(f"seed is {seed!r:.200}: expected a whole number, 0 to 2^64 - 1")
    cache = prefill.rewound() if samples == 1 else prefill.rewound().repeat(samples)
    cache.check(cache.batch, max_new_tokens - 1)
    padding = None if prefill.padding is None else prefill.padding.repeat_interleave(samples)
    tokens = None if constraint is None else constraint.tokens  # (N), or all V: C of them
    seen = _seen(prefill, model.config.vocab_size).repeat_interleave(samples, 0)  # (B·samples, V)
    seen = seen if tokens is None else seen[:, tokens]  # (B·samples, C)

    def choose(logits: Tensor) -> Tensor:
        """The next tokens (B·samples), from logits (B·samples, C)."""
        scores = penalise(logits, seen, options.repetition_penalty)
        if constraint is not None:
            allowed = constraint.allowed()
            scores = scores.masked_fill(~allowed, float("-inf"))
        if not (highest := scores.amax(-1)).isfinite().all():  # of which argmax would make some token
            raise ValueError(f"the highest logits are {highest.tolist()!s:.100}: expected finite ones")
        chosen = sample(scores, options, generator) if options.temperature else scores.argmax(-1)
        seen.scatter_(1, chosen[:, None], True)
        new = chosen if tokens is None else tokens[chosen]
        if constraint is not None:
            constraint.advance(new, _mass(logits, allowed) if tokens is None else None)
        return new

    alone: Callable[[Tensor], Tensor] | None = None  # the forward of a token without guesses
    tree, hidden, left = _Tree(), prefill.hidden, max_new_tokens
    while left:
        logits = model.head(hidden, tokens).float()  # (B, T, C), T nodes of the tree
        if left == max_new_tokens:
            logits = logits.repeat_interleave(samples, 0)  # (B·samples, T, C), as they come from then on
        node: int | None = 0
        path = []
        while node is not None and left:  # down the tree, for as long as what is chosen was guessed
            path.append(node)
            new = choose(logits[:, node])
            left -= 1
            yield new
            if draft is not None:
                draft.advance(int(new))
            node = tree.child(node, int(new)) if tree.tokens else None
        if left:
            first = cache.length - len(tree.parents)
            cache.keep(first, [first + node for node in path])
            if draft is not None:
                tree = _Tree.grown(draft.guess(), cache.capacity - cache.length, left, model.config.vocab_size)
            guesses = torch.tensor([tree.tokens], dtype=new.dtype, device=new.device)  # (1, T - 1)
            ids = torch.cat((new[:, None], guesses.expand(len(new), -1)), 1)  # (B·samples, T)
            if tree.tokens:
                hidden = model.model(ids, cache, padding, tree.parents)
            else:
                alone = alone or captured.forward_of_one(model, cache, padding)
                hidden = alone(ids)


@dataclass(frozen=True)
class _Tree:
    """The token chosen last, which is node 0, and the guesses behind it: nodes 1, 2, ..., each behind its parent."""

    tokens: Sequence[int] = ()  # of the guesses
    parents: Sequence[int] = (-1,)  # of all nodes

    @classmethod
    def grown(cls, guesses: Sequence[tuple[int, int]], most: int, deepest: int, vocabulary: int) -> "_Tree":
        """Of the guesses those that fit: `most` nodes, `deepest` one behind the other; parents come first."""
        tokens: list[int] = []
        parents, node, depth = [-1], {0: 0}, [1]  # node: that of each guess that fits
        for number, (parent, token) in enumerate(guesses, 1):
            if not 0 <= parent < number or not 0 <= token < vocabulary:
                rule = f"an earlier one or 0, and a token from 0 to {vocabulary - 1}"
                raise ValueError(f"guess {number} is token {token} behind {parent}: expected {rule}")
            if parent in node and depth[node[parent]] < deepest and len(parents) < most:
                node[number] = len(parents)
                tokens.append(token)
                parents.append(node[parent])
                depth.append(depth[node[parent]] + 1)
        return cls(tokens, parents)

    def child(self, node: int, token: int) -> int | None:
        """The node with this token behind another, if it was guessed."""
        pairs = zip(self.parents[1:], self.tokens, strict=True)
        return next((child for child, pair in enumerate(pairs, 1) if pair == (node, token)), None)


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
    else:  # of a single prompt each element is a token
        prompts = [] if any(isinstance(p, (int, str)) for p in ids) else [list(p) for p in ids]
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
