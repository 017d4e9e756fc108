"""Evaluation: forecasts of a model, priced, reserved in the ledger, made and charged; once for all who ask."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from experiments.accounting.ledger import Ledger
from experiments.forecasting.forecast import Forecasts, forecast, predicted, predicted_loss
from experiments.task.model import trained
from experiments.task.task import Task
from experiments.training.progress import Counted, Report, counting
from experiments.training.step import validation_loss
from qwen_min import FlopMeter, Qwen


def priced(
    task: Task, model: Qwen, systems: Sequence[int], *, draft: int = 0, validate: bool = False
) -> dict[str, int]:
    """The most FLOPs that `evaluate` takes, by ledger stage. Raises ValueError for what the model has no place for."""
    expected = predicted(task, model.config, systems, draft, **trained(model))
    if validate:
        expected["validation"] += predicted_loss(task, model.config, **trained(model))
    return expected


def evaluate(
    task: Task,
    model: Qwen,
    systems: Sequence[int],
    expected: Mapping[str, int],
    ledger: Ledger,
    run: str,
    cell: str,
    *,
    draft: int = 0,
    validate: bool = False,
    progress: Callable[[str], Counted] = lambda doing: lambda done, of: None,
) -> tuple[Forecasts, dict[str, float], int]:
    """Forecasts of `systems` at every origin, joined; the loss of the validation windows with `validate`; the ledger's
    entry.

    Whoever asked settles the entry once what it got is written: stopped before, it runs again, and this is wasted.

    Args:
        expected: FLOPs by ledger stage, reserved before anything runs.
        run, cell: what the ledger calls it.
        draft: as in `forecast`.
        progress: gives what takes how far something is, such as "windows".

    Raises:
        BudgetExceeded: nothing was run. ValueError: see `forecast`.
    """
    losses: dict[str, float] = {}
    entry = ledger.reserve(run, cell, expected)
    with FlopMeter() as meter:
        if validate:
            windows, padding = task.validation_windows, task.settings.count_padding
            losses = validation_loss(model, windows, padding, progress=progress("windows"))
    ledger.spend(entry, "validation", meter.total)
    far, origins, each = progress("forecasts"), task.origins, list[Forecasts]()

    def within_all(done: int, of: int) -> None:
        far(len(each) * of + done, len(origins) * of)

    for one in origins:
        each.append(forecast(one, model, systems, draft, within_all))
        for stage, flops in each[-1].flops.items():
            ledger.spend(entry, stage, flops)
    made = Forecasts.joined(each)
    made.flops["validation"] += meter.total
    return made, losses, entry


def settled(
    task: Task,
    model: Qwen,
    systems: Sequence[int],
    ledger: Path,
    run: str,
    cell: str,
    *,
    doing: str = "forecast",
    draft: int = 0,
    validate: bool = False,
) -> tuple[Forecasts, dict[str, float], dict[str, int]]:
    """As `evaluate`, with a ledger's file, settled at once; the price, in the place of an entry. `doing` is shown."""
    expected = priced(task, model, systems, draft=draft, validate=validate)
    with closing(Report(1)) as report, Ledger(ledger, task.settings.budget) as charged:
        how: dict[str, Any] = {"draft": draft, "validate": validate, "progress": partial(counting, report, doing)}
        made, losses, entry = evaluate(task, model, systems, expected, charged, run, cell, **how)
        charged.settle(entry)
    return made, losses, expected
