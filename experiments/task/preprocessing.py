"""Two worked examples of how a series becomes tokens, and what writing it as digits loses."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.task.task import Task

POINTS_SHOWN = 2


def preprocessing(task: Task) -> dict[str, Any]:
    """`preprocessing.json`: the first two training systems step by step, and the round trip of the validation part.

    `check` is the round trip of one series, the first that is shown.
    """
    return {
        "alpha_rule": task.alpha_rule,
        "decimals": task.settings.decimals,
        **({"layout": task.layout} if task.layout else {}),
        "examples": [_example(task, int(system)) for system in task.split.train[:2]],
        "round_trip": _round_trip(task),
        "check": _check(task, task.forecast_systems("shown")[0]),
    }


def _example(task: Task, system: int) -> dict[str, Any]:
    text = task.text(system, POINTS_SHOWN)
    ids = task.encode(text)
    return {
        "system": system,
        "points": POINTS_SHOWN,
        "names": list(task.dataset.names),
        "raw": task.dataset.series[system, :POINTS_SHOWN].astype(float).tolist(),
        "alpha": float(task.alphas[system]),
        "scaled": task.scaled(system)[:POINTS_SHOWN].tolist(),
        "text": text,
        "ids": ids,
        "pieces": [task.tokenizer.decode([token]) for token in ids],
    }


def _round_trip(task: Task) -> dict[str, Any]:
    """Encode and decode whole series of the validation part: the absolute error of what comes back."""
    systems = task.split.validation
    scaled = np.stack([np.abs(_decoded(task, s) - task.scaled(s)) for s in systems.tolist()])  # (N, P, V)
    raw = scaled * task.alphas[systems][:, None, None]
    return {
        "series": len(systems),
        "values": scaled.size,
        "max_abs_error_scaled": float(scaled.max()),
        "mean_abs_error_scaled": float(scaled.mean()),
        "max_abs_error_raw": float(raw.max()),
        "mean_abs_error_raw": float(raw.mean()),
        "half_unit_scaled": 0.5 * 10.0**-task.settings.decimals,
    }


def _check(task: Task, system: int) -> dict[str, Any]:
    return {
        "system": system,
        "names": list(task.dataset.names),
        "time": task.dataset.time.tolist(),
        "raw": task.dataset.series[system].astype(float).tolist(),
        "decoded": (_decoded(task, system) * task.alphas[system]).tolist(),
    }


def _decoded(task: Task, system: int) -> NDArray[np.float64]:
    """A whole series by way of its tokens and back, scaled, (P, V)."""
    text = task.tokenizer.decode(task.tokens(system))
    return task.codec.decode(text, task.dataset.series.shape[2]).values
