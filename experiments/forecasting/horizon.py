"""The horizon error of a few validation series, by which a run can choose the adapter that it keeps."""

from typing import Any

import numpy as np

from experiments.forecasting import scores
from experiments.forecasting.baselines import persistence
from experiments.forecasting.forecast import forecast, predicted
from experiments.task.task import Task
from qwen_min import Qwen, QwenConfig


def price(task: Task, config: QwenConfig, **trained: Any) -> int:
    """The most FLOPs of one `error`; `trained` as in `predict`. Raises ValueError for series that are too short."""
    task.check(task.keep_systems)
    return sum(predicted(_greedy(task), config, task.keep_systems, scored=False, **trained).values())


def error(task: Task, model: Qwen) -> float:
    """MSE in raw units of greedy forecasts that are constrained to valid text, whatever other forecasts are."""
    made = forecast(_greedy(task), model, task.keep_systems, scored=False)
    fallback = np.stack([persistence(context, task.settings.horizon) for context in made.context])
    return scores.errors(made.truth, scores.filled(made.values, fallback)[0])["mse"]


def _greedy(task: Task) -> Task:
    greedy = {"origins": 1, "constrained": True, "num_samples": 1, "temperature": 0.0, "repetition_penalty": 1.0}
    return task.under(task.settings.updated(greedy))
