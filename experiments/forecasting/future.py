"""Forecasts as rows in the form of the field: one for each series, time and variable."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.forecasting.forecast import Forecasts
from experiments.forecasting.scores import filled, quantiles
from experiments.task.task import Task

MODEL = "qwen_min"
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def rows(task: Task, made: Forecasts, levels: Sequence[float] = LEVELS) -> list[dict[str, Any]]:
    """Forecasts of one origin: series, time, "target_name", "predictions", and of samples a column for each level.

    A step that did not parse is None. The names are those of Chronos-2's `predict_df`; those of series and time are
    the table's.
    """
    frame, points = task.dataset.frame, task.settings.points
    by, at = frame.keys if frame else ("unique_id", "ds")
    bands: Any = [] if made.samples is None else quantiles(made.samples, levels)  # (Q, N, h, V)
    found = []
    for i, v, step in np.ndindex(len(made.systems), len(task.dataset.names), task.settings.horizon):
        system = made.systems[i]
        row: dict[str, Any] = {by: task.called(system), at: task.when(system, points + step)}
        row |= {"target_name": task.dataset.names[v], "predictions": number(float(made.values[i, step, v]))}
        row |= {f"{level:g}": number(band[i, step, v]) for level, band in zip(levels, bands, strict=False)}
        found.append(row)
    return found


def windows(
    task: Task, made: Forecasts, naive: Mapping[str, NDArray[np.float64]], level: Sequence[float] = ()
) -> list[dict[str, Any]]:
    """Forecasts of every origin, joined, beside the naive ones: a row for each series, variable, cut-off and step.

    The names are nixtla's: "cutoff" is the time of the last point that was seen; "variable" stands there where there
    are several. A step that did not parse is filled as its score is, by persistence.
    """
    frame, names, points, horizon = task.dataset.frame, task.dataset.names, task.settings.points, task.settings.horizon
    by, at = frame.keys if frame else ("unique_id", "ds")
    full, _ = filled(made.values, naive["persistence"])
    ends = [end for one in level for end in ((f"lo-{one:g}", 0.5 - one / 200), (f"hi-{one:g}", 0.5 + one / 200))]
    bands: Any = [] if made.samples is None else quantiles(made.samples, [q for _, q in ends])  # (Q, N, h, V)
    found = []
    for (i, system), (v, name) in product(enumerate(made.systems), enumerate(names)):
        for (n, origin), step in product(enumerate(task.origins), range(horizon)):
            row: dict[str, Any] = {by: task.called(system), at: origin.when(system, points + step)}
            row |= {"cutoff": origin.when(system, points - 1)} | ({"variable": name} if len(names) > 1 else {})
            place = i, n * horizon + step, v
            row |= {name if len(names) == 1 else "y": float(made.truth[place]), MODEL: float(full[place])}
            row |= {f"{MODEL}-{end}": number(band[place]) for (end, _), band in zip(ends, bands, strict=False)}
            found.append(row | {copy: float(values[place]) for copy, values in naive.items()})
    return found


def number(value: float) -> float | None:
    """A value as JSON and CSV have it: None where it is NaN."""
    return None if np.isnan(value) else float(value)
