"""FLOPs before anything runs: the model's own forward on the meta device, so the prediction is the model."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch

from lora import add_logit_bias, add_lora
from lora.layer import TARGETS, adapt
from qwen_min import FlopMeter, Qwen, QwenConfig
from qwen_min.cache import KVCache
from qwen_min.flops import unmetered


def predict(
    config: QwenConfig,
    batch: int,
    tokens: int,
    *,
    cached: int = 0,
    training: bool = False,
    convention: str = "coursework",
    last_only: bool = False,
    symbols: int = 0,
    weights: bool = False,
    digits: bool = False,
    **trained: Any,
) -> FlopMeter:
    """A meter that has seen one forward of (batch, tokens) after `cached` tokens, without weights or memory.

    Args:
        config: the model's shape.
        training: record the gradients that a LoRA step would need (all parameters' where rank is 0), and the loss.
        last_only: run the head for the last token alone, as generation does.
        symbols: logits of so many tokens alone; 0 for the whole vocabulary.
        weights, digits: whether the loss has a weight for each target, and the loss of numbers.
        trained: rank, targets and logit_bias, as in `on_meta`.
    """
    model, ids, cache = on_meta(config, batch, tokens, cached=cached, **trained)
    some = torch.empty(symbols, dtype=torch.int64, device="meta") if symbols else None
    with unmetered(), FlopMeter(convention) as meter, torch.set_grad_enabled(training):
        if training and not cached:
            more = {"weights": ids.float() if weights else None, "digits": ids.new_empty(10) if digits else None}
            model.loss(ids, ids, vocabulary=some, **more)
        else:
            model.head(model.model(ids, cache)[:, -1 if last_only else 0 :], some)
    return meter


def on_meta(
    config: QwenConfig,
    batch: int,
    tokens: int,
    rank: int | Sequence[int] = 0,
    targets: Sequence[str] = TARGETS,
    cached: int = 0,
    logit_bias: bool = False,
) -> tuple[Qwen, torch.Tensor, KVCache | None]:
    """A model without weights, (batch, tokens) ids, and its cache of `cached` tokens, all on the meta device.

    Args:
        rank, targets: of LoRA, as in `add_lora`; rank 0 for none, several for one of each target, a whole name.
        logit_bias: with a trainable bias on the logits.
    """
    with torch.device("meta"):
        model = Qwen(config)
        ids = torch.empty(batch, tokens, dtype=torch.int64)
    if logit_bias:
        add_logit_bias(model)
    if not isinstance(rank, int):
        adapt(model, {name: (one, one) for name, one in zip(targets, rank, strict=True)})
    elif rank:
        add_lora(model, rank, targets=targets)
    cache = None
    if cached:
        cache = KVCache(config, batch, cached + tokens, device="meta")
        cache.advance(cached)
    return model, ids, cache


@cache
def generation(
    config: QwenConfig, batch: int, prompt: int, new: int, *, samples: int = 1, scored: int = 0, **trained: Any
) -> int:
    """Coursework FLOPs of `new` tokens after a prompt of `prompt`, for `batch` sequences, `samples` times each.

    The prefill runs once and yields the first token; each later one is a forward of one token, whose cost is affine
    in the tokens attended; so the sum over steps is that of an arithmetic progression.

    Args:
        samples: continuations of each sequence.
        scored: tokens of each sequence's true continuation whose loss is taken, over the same prefill.
        trained: rank, targets and logit_bias, as in `predict`.
    """
    if new < 1 and scored < 1:
        return 0
    one: Callable[..., FlopMeter] = partial(predict, config, **trained)
    prefill = one(batch, prompt, last_only=True)
    parts = prefill.by_component()
    head = parts["head"] + parts.get("logit_bias", 0)  # of the prompts' last token, for each of the two uses
    total = prefill.total - head + head * ((new > 0) + (scored > 0))
    if scored > 1:
        total += one(batch, scored - 1, cached=prompt).total
    if new > 1:
        first, last = (one(batch * samples, 1, cached=c).total for c in (prompt, prompt + new - 2))
        total += (first + last) * (new - 1) // 2
    return total


@cache
def training_run(
    config: QwenConfig,
    *,
    steps: int,
    batch: int,
    context: int,
    validations: int,
    validation_windows: int,
    symbols: int = 0,
    **trained: Any,
) -> dict[str, int]:
    """Coursework FLOPs of a cell by ledger stage: `steps` updates, and `validations` passes over the windows.

    `trained` is rank, targets and logit_bias, as in `predict`."""
    one = partial(predict, config, tokens=context, symbols=symbols, **trained)
    update = one(batch=batch).training if steps else 0
    window = one(batch=1).total
    return {"training": steps * update, "validation": validations * validation_windows * window}
