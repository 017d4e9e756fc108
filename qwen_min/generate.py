"""Generation: the prompt's prefill, then one forward per new token, over a KV cache."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qwen_min.cache import KVCache


@torch.inference_mode()
def stream(
    model,
    ids: Tensor,
    max_new_tokens: int,
    *,
    padding: Tensor | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[Tensor]:
    """Yield the (B) new tokens of each step, `max_new_tokens` times; the caller stops when it has enough.

    Args:
        model: a `Qwen`.
        ids: (B, T) prompts, left-padded to one length.
        max_new_tokens: how many steps.
        padding: (B) how many of each row's first tokens are padding; None for none.
        temperature: 0 takes the likeliest token; else logits are divided by it and sampled from.
        top_p: sample only among the likeliest tokens that together have this probability.
        seed: of the samples; None draws a new one.
    """
    _check(max_new_tokens, temperature, top_p)
    generator = torch.Generator(model.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    cache = KVCache(model.config, ids.shape[0], ids.shape[1] + max_new_tokens, model.compute_dtype, model.device)
    for _ in range(max_new_tokens):
        hidden = model.model(ids, cache, padding)[:, -1:]  # the head runs for the last token alone
        logits = model.head(hidden)[:, 0].float()  # (B, V)
        new = sample(logits, temperature, top_p, generator) if temperature else logits.argmax(-1)
        yield new
        ids = new[:, None]


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One draw per row of (B, V) logits: temperature first, then the nucleus of mass `top_p` (Holtzman et al. 2020)."""
    probabilities = (logits / max(temperature, 1e-30)).softmax(-1)  # below, float32 overflows; it is greedy already
    if top_p < 1:
        ordered, index = probabilities.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the mass before a token; so the likeliest is always in
        probabilities = torch.zeros_like(ordered).scatter(-1, index, ordered.masked_fill(outside, 0))
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def generate(
    model,
    ids: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop: Sequence[int] = (),
    pad_id: int = 0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Tensor | list[list[int]]:
    """Prompt and new tokens, greedy unless a temperature is given. Every choice is an argument; no file is consulted.

    Args:
        model: a `Qwen`.
        ids: (B, T) prompts of one length, or a list of prompts of any lengths (they run left-padded as one batch).
        max_new_tokens: new tokens per prompt.
        stop: tokens that end a prompt's generation; the stop token itself is kept. None stops unless passed.
        pad_id: what fills a row of the tensor behind its stop token, and what pads short prompts (masked).
        temperature, top_p, seed: see `stream`.

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
    longest = max(map(len, prompts))
    lengths = torch.tensor([len(p) for p in prompts], device=model.device)
    padded = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts], device=model.device)
    padding = None if bool((lengths == longest).all()) else longest - lengths

    new: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for step in stream(model, padded, max_new_tokens, padding=padding, temperature=temperature, top_p=top_p, seed=seed):
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


def _check(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: expected 0 or more")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}: expected 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: expected more than 0, at most 1")
