"""The model that reads a task: the base model of a run, with its adapter."""

from pathlib import Path
from typing import Any

from experiments.settings.record import DTYPES, Settings
from experiments.task.task import Task
from lora import load_adapter
from lora.layer import lora_layers
from qwen_min import Qwen, Tokenizer
from qwen_min.load import resolve


def load_model(settings: Settings) -> Qwen:
    """The base model of a run, frozen. Raises ValueError where it is to be compiled, and cannot be."""
    kept = DTYPES[settings.dtype], settings.device
    where = settings.revision or None, settings.offline
    model = Qwen.from_pretrained(settings.model, *kept, *where, compute_dtype=settings.compute_dtype)
    if settings.compile:
        model.compile()
    return model.requires_grad_(False)


def prepare(settings: Settings, adapter: str | Path | None, needs_split: bool = True) -> tuple[Task, Qwen]:
    """The task and the model of a run, with an adapter if one is named; `needs_split` as in `Task.prepare`."""
    folder = resolve(settings.model, settings.revision or None, settings.offline)
    task = Task.prepare(settings, Tokenizer(folder / "tokenizer.json"), needs_split)
    model = trained_model(settings, adapter)
    task.check_fits(model.config)
    return task, model


def trained_model(settings: Settings, adapter: str | Path | None) -> Qwen:
    """The base model, with an adapter if one is named."""
    model = load_model(settings)
    return load_adapter(model, adapter).eval() if adapter else model.eval()


def trained(model: Qwen) -> dict[str, Any]:
    """What of a model was trained, as `predict` takes it: LoRA's rank and layers, and a bias on the logits."""
    layers = dict(lora_layers(model))
    rank = next((layer.rank for layer in layers.values()), 0)
    return {"rank": rank, "targets": tuple(layers), "logit_bias": model.logit_bias is not None}
