"""How good a model's forecasts are: over the horizon only, in raw units, beside forecasts that need no model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments import baselines, predict
from experiments.budget import Ledger
from experiments.settings import Settings
from experiments.task import Task
from experiments.train import load_model, validation_loss
from lora import load_adapter
from lora.layer import lora_layers
from qwen_min import FlopMeter, Qwen, Tokenizer
from qwen_min.load import resolve

SERIES_AT_ONCE = 16


@dataclass(frozen=True)
class Forecasts:
    """Forecasts of several systems: truth and values (N, horizon, V) raw, NaN where a step did not parse."""

    systems: NDArray[np.int64]
    context: NDArray[np.float64]  # (N, points, V)
    truth: NDArray[np.float64]
    values: NDArray[np.float64]
    texts: list[str]  # the new text of each
    unparsed: list[int]  # steps of each that did not parse


def prepare(settings: Settings, adapter: str | Path | None) -> tuple[Task, Qwen]:
    """The task and the model of a run, with an adapter if one is named."""
    folder = resolve(settings.model, settings.revision or None, settings.offline)
    task = Task.prepare(settings, Tokenizer(folder / "tokenizer.json"))
    model = load_model(settings)
    return task, load_adapter(model, adapter).eval() if adapter else model


def forecast(task: Task, model: Qwen, systems: Sequence[int]) -> Forecasts:
    """Greedy forecasts of `horizon` points after the first `points` of each system, batched by sequences.

    Raises:
        ValueError: there is no such system.
    """
    task.check(systems)
    settings, series = task.settings, task.dataset.series.astype(np.float64)
    prompts = [task.tokens(int(system), settings.points) for system in systems]
    new: list[list[int]] = []
    for start in range(0, len(prompts), SERIES_AT_ONCE):
        part = prompts[start : start + SERIES_AT_ONCE]
        longer = model.generate(part, task.tokens_to_forecast)
        new += [ids[len(prompt) :] for ids, prompt in zip(longer, part, strict=True)]
    values, unparsed = zip(*(task.read_forecast(ids) for ids in new), strict=True)
    chosen, cut = series[np.asarray(systems, int)], settings.points
    return Forecasts(
        np.asarray(systems, np.int64),
        chosen[:, :cut],
        chosen[:, cut : cut + settings.horizon],
        np.stack(values),
        [task.tokenizer.decode(ids) for ids in new],
        list(unparsed),
    )


def predicted(task: Task, model: Qwen, systems: Sequence[int], loss: bool = True) -> dict[str, int]:
    """FLOPs of an evaluation by ledger stage, before it runs; batches whose prompts differ in length are padded."""
    rank = next((layer.rank for _, layer in lora_layers(model)), 0)
    lengths = [len(task.tokens(int(system), task.settings.points)) for system in systems]
    inference = 0
    for start in range(0, len(lengths), SERIES_AT_ONCE):
        part = lengths[start : start + SERIES_AT_ONCE]
        inference += predict.generation(model.config, len(part), max(part), task.tokens_to_forecast, rank=rank)
    validation = (
        predict.training_run(
            model.config,
            steps=0,
            batch=1,
            context=task.settings.context,
            rank=rank,
            validations=1,
            validation_windows=len(task.validation_windows),
        )
        if loss
        else {}
    )
    return {"validation": 0} | validation | {"training": 0, "inference": inference}


def evaluate(task: Task, model: Qwen, systems: Sequence[int], ledger: Ledger, run: str) -> tuple[dict, Forecasts]:
    """Validation loss, and forecasts scored beside persistence, the context's mean and a seasonal repeat.

    Returns:
        What `evaluate --json` prints, and the forecasts themselves. A step that did not parse is scored as
        persistence and counted.
    """
    task.check(systems)
    expected = predicted(task, model, systems)
    entry = ledger.reserve(run, "evaluate", expected)
    with FlopMeter() as meter:
        loss = validation_loss(model, task.validation_windows)
    ledger.spend(entry, "validation", meter.total)
    flops = {"validation": meter.total}
    with FlopMeter() as meter:
        forecasts = forecast(task, model, systems)
    ledger.spend(entry, "inference", meter.total)
    ledger.settle(entry)
    flops["inference"] = meter.total
    return {
        "model": task.settings.model,
        "label": task.settings.label,
        "data": str(task.dataset.path),
        "data_source": task.dataset.source,
        "data_sha256": task.dataset.digest,
        "validation_loss": loss,
        "validation_tokens": task.validation_windows.real_tokens,
        "systems": [int(s) for s in systems],
        "points": task.settings.points,
        "horizon": task.settings.horizon,
        "unparsed_steps": sum(forecasts.unparsed),
        "forecast_steps": len(systems) * task.settings.horizon,
        "scores": scores(task, forecasts),
        "flops": flops,
        "predicted_flops": expected,
        "convention": "coursework",
    }, forecasts


def scores(task: Task, forecasts: Forecasts) -> dict[str, dict[str, Any]]:
    """MSE, RMSE and MAE in raw units over the horizon, by forecaster, with a bootstrap interval of the MSE.

    The interval is of the mean over series, 95 %, from 2000 draws.
    """
    horizon = task.settings.horizon
    naive = {
        name: np.stack([rule(context, horizon) for context in forecasts.context])
        for name, rule in (
            ("persistence", baselines.persistence),
            ("context mean", baselines.context_mean),
            ("seasonal repeat", baselines.seasonal_repeat),
        )
    }
    found = {}
    for name, values in {"model": forecasts.values, **naive}.items():
        score = baselines.scores(forecasts.truth, values, missing="persistence", fallback=naive["persistence"])
        filled = np.where(np.isnan(values).any(-1, keepdims=True), naive["persistence"], values)
        each = ((filled - forecasts.truth) ** 2).mean((1, 2))
        score["mse_interval"] = list(baselines.bootstrap_interval(each, task.settings.seed))
        score["variables"] = dict(zip(task.dataset.names, score["variables"], strict=True))
        found[name] = score
    return found


def table(report: dict[str, Any]) -> str:
    """The scores as aligned text."""
    lines = []
    if report["label"]:
        lines.append(f"({report['label']})")
    lines += [
        f"validation loss {report['validation_loss']:.4f} nats per token, of {report['validation_tokens']:,}",
        f"forecasts of {len(report['systems'])} series, {report['points']} points -> {report['horizon']}, "
        f"in raw units; {report['unparsed_steps']} of {report['forecast_steps']} steps did not parse "
        "(scored as persistence)",
        "",
        f"{'':16} {'MSE':>8} {'95 % interval':>17} {'RMSE':>8} {'MAE':>8}",
    ]
    for name, score in report["scores"].items():
        low, high = score["mse_interval"]
        lines.append(f"{name:16} {score['mse']:8.4f} {low:8.4f}-{high:8.4f} {score['rmse']:8.4f} {score['mae']:8.4f}")
    flops = report["flops"]
    lines += ["", f"FLOPs (coursework): validation {flops['validation']:,}, inference {flops['inference']:,}"]
    return "\n".join(lines)
