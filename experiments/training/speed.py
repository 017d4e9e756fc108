"""How fast this machine works, measured on small pieces of the work itself: for an estimate before anything runs."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from experiments.run_folder.status import duration
from experiments.settings.record import Settings
from lora import add_lora
from qwen_min import FlopMeter, Qwen, QwenConfig
from qwen_min.fast.limits import sequences_at_once
from qwen_min.generate import decode, prefill

LAYERS, TOKENS, ROWS, NEW = 4, 8192, 16, 8
"""Of the piece: layers and tokens of the vocabulary at most, series that are forecast at once, new tokens."""


def seconds(settings: Settings, config: QwenConfig, flops: Mapping[str, int]) -> float:
    """About how long FLOPs by ledger stage take here, as fast as a piece of each kind of work just ran.

    The piece is a model of the same widths with random weights, a few of its layers and a part of its vocabulary.
    """
    small = replace(
        config, num_hidden_layers=min(config.num_hidden_layers, LAYERS), vocab_size=min(config.vocab_size, TOKENS)
    )
    model = add_lora(Qwen(small), 8).to(settings.device)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.to(settings.computed_in)
    rows = min(settings.batch_size, sequences_at_once(model, settings.context))
    ids = torch.zeros(rows, settings.context, dtype=torch.int64, device=settings.device)
    prompts = ids[:1, : settings.context // 2].repeat(ROWS, 1)

    def train() -> None:
        model.loss(ids, ids)[0].backward()

    def validate() -> None:
        with torch.no_grad():
            model.token_losses(ids, ids).sum().item()

    def forecast() -> None:
        torch.stack(list(decode(model, prefill(model, prompts, NEW), NEW))).sum().item()

    kinds = {"training": train, "validation": validate, "inference": forecast}
    return sum(flops[stage] / _rate(work, stage) for stage, work in kinds.items() if flops.get(stage))


def _rate(work: Callable[[], None], stage: str) -> float:
    """FLOP/s (coursework) of the faster of two runs, after one to warm up."""
    work()
    taken = []
    for _ in range(2):
        with FlopMeter() as meter:
            began = time.perf_counter()
            work()
            taken.append(time.perf_counter() - began)
    return (meter.training if stage == "training" else meter.total) / min(taken)


def estimate(settings: Settings, config: QwenConfig, flops: Mapping[str, int]) -> str:
    """The same as a sentence."""
    return (
        f"about {duration(seconds(settings, config, flops), 'minutes')} here, at the speed of a training step, a "
        "validation and a few new tokens just now. Nothing was run."
    )
