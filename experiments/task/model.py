"""The model that reads a task: the base model of a run, with its adapter; or one from random weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from experiments.settings.record import Settings
from experiments.task.task import Task
from lora import load_adapter, save_adapter
from lora.layer import lora_layers
from qwen_min import Qwen, QwenConfig, Tokenizer
from qwen_min.load import resolve

SMALL: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
"""The shape of a small model from random weights, besides the vocabulary and what else it takes from the base model."""


def shape_of(settings: Settings, base: QwenConfig | None = None) -> QwenConfig:
    """The configuration of a run's model; no weights are read, nor that of the base model where it is given."""
    if base is None:
        folder = resolve(settings.model, settings.revision or None, settings.offline)
        base = QwenConfig.from_file(folder / "config.json")
    return replace(base, **SMALL) if settings.scratch == "small" else base


def load_model(settings: Settings) -> Qwen:
    """The base model of a run, frozen; or one from random weights, of the run's seed, all of which trains.

    Raises ValueError where it is to be compiled, and cannot be."""
    if settings.scratch:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            return Qwen(shape_of(settings)).to(settings.device)
    kept = settings.kept_in, settings.device
    where = settings.revision or None, settings.offline
    model = Qwen.from_pretrained(settings.model, *kept, *where, compute_dtype=settings.computed_in)
    if settings.compile:
        model.compile()
    return model.requires_grad_(False)


def prepare(
    settings: Settings, adapter: str | Path | None, needs_split: bool = True, ahead: bool = False
) -> tuple[Task, Qwen]:
    """The task and the model of a run, with an adapter if one is named; the rest as in `Task.prepare`."""
    folder = resolve(settings.model, settings.revision or None, settings.offline)
    task = Task.prepare(settings, Tokenizer(folder / "tokenizer.json"), needs_split, ahead)
    model = trained_model(settings, adapter)
    task.check_fits(model.config)
    return task, model


def trained_model(settings: Settings, adapter: str | Path | None) -> Qwen:
    """The base model, with an adapter if one is named; or a model that `save_trained` wrote there."""
    if settings.scratch and adapter:
        return Qwen.from_pretrained(adapter, None, settings.device).eval()
    model = load_model(settings)
    return load_adapter(model, adapter).eval() if adapter else model.eval()


def save_trained(model: Qwen, folder: Path, settings: Settings) -> None:
    """Write what a run trained: the adapter, or all of a model from random weights."""
    if not settings.scratch:
        return save_adapter(model, folder, base=settings.model)
    model.save_pretrained(folder)


def trained(model: Qwen) -> dict[str, Any]:
    """What of a model was trained, as `predict` takes it: LoRA's rank and layers, and a bias on the logits."""
    layers = dict(lora_layers(model))
    ranks = tuple(layer.rank for layer in layers.values())
    rank = ranks if len(set(ranks)) > 1 else ranks[0] if ranks else 0
    return {"rank": rank, "targets": tuple(layers), "logit_bias": model.logit_bias is not None}
