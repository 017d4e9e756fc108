"""Forecasts as rows in the form of the field: one for each series, time and variable."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.forecasting.forecast import Forecasts
from experiments.forecasting.scores import quantiles
from experiments.task.task import Task

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def rows(task: Task, made: Forecasts, levels: Sequence[float] = LEVELS) -> list[dict[str, Any]]:
    """Forecasts of one origin: series, time, "target_name", "predictions", and of samples a column for each level.

    A step that did not parse is None. The names are those of Chronos-2's `predict_df`; those of series and time are
    the table's.
    """
    frame, points = task.dataset.frame, task.settings.points
    by, at = frame.keys if frame else ("unique_id", "ds")
    bands = None if made.samples is None else quantiles(made.samples, levels)  # (Q, N, h, V)
    found = []
    for i, v, step in np.ndindex(len(made.systems), len(task.dataset.names), task.settings.horizon):
        system = made.systems[i]
        row: dict[str, Any] = {by: task.called(system), at: task.when(system, points + step)}
        row |= {"target_name": task.dataset.names[v], "predictions": _number(made.values[i, step, v])}
        for q, level in enumerate(levels if bands is not None else ()):
            row[f"{level:g}"] = _number(bands[q, i, step, v])
        found.append(row)
    return found


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
