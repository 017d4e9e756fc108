"""Generation: the prompts are read once, then one forward makes each new token, over a key/value cache.

The prefill can be used again: to draw several continuations of each prompt, and to score the true one.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from qwen_min.cache import KVCache, Prefill
from qwen_min.ops import faster
from qwen_min.sampling import Choice, Constraint, Draft, Sampling, likeliest


@torch.inference_mode()
def prefill(model, ids: Tensor, room: int, padding: Tensor | None = None) -> Prefill:
    """Read the prompts.

    Args:
        model: a `Qwen`.
        ids: (B, T) prompts, left-padded to one length.
        room: how many more tokens of each the cache can hold: one less than are generated or scored will do.
        padding: (B) how many of each row's first tokens are padding; None for none.
    """
    cache = KVCache(model.config, ids.shape[0], ids.shape[1] + room, model.compute_dtype, model.device)
    if read := faster("read"):
        hidden = read(model, ids, cache, padding)
    else:
        hidden = model.model(ids, cache, padding)[:, -1:]  # (B, 1, E)
    return Prefill(cache, ids, padding, hidden)


@torch.inference_mode()
def steps(
    hidden: Tensor, max_new_tokens: int, choose: Callable[[Tensor], Tensor], forward: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """The loop: yield the (B) new tokens of each step; `hidden` (B, 1, E) is that of the prompts' last tokens."""
    for left in reversed(range(max_new_tokens)):
        new = choose(hidden)  # (B)
        yield new
        if left:
            hidden = forward(new[:, None])  # (B, 1, E)


def greedy(model) -> Callable[[Tensor], Tensor]:
    """The likeliest token (B) after hidden states (B, 1, E)."""
    return lambda hidden: likeliest(model.head(hidden)[:, -1])


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
    """The (B·samples) new tokens of each step, `max_new_tokens` times; the caller stops when it has enough.

    Args:
        model: the `Qwen` that made the prefill.
        prefill: the tokens of one sample go into its cache, and the next use overwrites them; several use a copy.
        samples: continuations of each prompt; row b·samples + s is sample s of prompt b.
        seed: of the samples; None draws a new one.
        constraint: what may be chosen; None for anything.
        draft: of one prompt, one sample, greedy: guesses that `fast.tree` verifies, several in a forward. The tokens
            are the same; without `fast` no guess is made. Guesses for which the cache has no room are left out.
        sampling: see `Sampling`.

    Raises:
        ValueError: an option is out of its range, or the cache is too small.
    """
    options = Sampling(**sampling)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: expected 0 or more")
    choose: Callable[[Tensor], Tensor] = Choice(model, prefill, samples, seed, constraint, options)
    cache = prefill.rewound() if samples == 1 else prefill.rewound().repeat(samples)
    cache.check(cache.batch, max_new_tokens - 1)
    model.model.check(cache.length + max_new_tokens - 1)
    if draft is not None and (tree := faster("tree")):
        return tree(model, prefill, max_new_tokens, choose, draft)
    if samples == 1 and constraint is None and options == Sampling():
        choose = greedy(model)
    padding = None if prefill.padding is None else prefill.padding.repeat_interleave(samples)
    forward = (faster("forward") or partial)(model.model, cache=cache, padding=padding)
    return steps(prefill.hidden, max_new_tokens, choose, forward)


def stream(model, ids: Tensor, max_new_tokens: int, *, padding: Tensor | None = None, **options) -> Iterator[Tensor]:
    """The (B) new tokens of each step after the prompts: arguments as in `prefill`, options as in `decode`."""
    if max_new_tokens == 0:
        return iter(())
    return decode(model, prefill(model, ids, max(0, max_new_tokens - 1), padding), max_new_tokens, **options)


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
    """Prompt and new tokens, greedy by default. Every choice is an argument; no file is consulted.

    Args:
        model: a `Qwen`.
        ids: (B, T) prompts of one length, or a list of prompts of any lengths (they run left-padded as one batch).
        max_new_tokens: new tokens per prompt.
        stop: tokens that end a prompt's generation; the stop token itself is kept. By default no token stops it.
        pad_id: what fills a row of the tensor after its stop token, and what pads short prompts (masked).
        seed: of the samples; None draws a new one.
        sampling: temperature, top_k, top_p, repetition_penalty: see `Sampling`.

    Returns:
        For a tensor, (B, T + new) of the same dtype; for a list, a list of lists, each cut after its stop token.

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
