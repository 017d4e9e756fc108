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
    text = task.codec.encode(task.scaled(system)[:POINTS_SHOWN])
    ids = task.encode(text)
    return {
        "system": system,
        "points": POINTS_SHOWN,
        "names": list(task.dataset.names),
        "raw": task.raw(system)[:POINTS_SHOWN].tolist(),
        "alpha": float(np.max(task.alphas[system])),
        **({"alphas": task.alphas[system].tolist()} if np.ptp(task.alphas[system]) else {}),
        "scaled": task.scaled(system)[:POINTS_SHOWN].tolist(),
        "text": text,
        "ids": ids,
        "pieces": [task.tokenizer.decode([token]) for token in ids],
    }


def _round_trip(task: Task) -> dict[str, Any]:
    """Encode and decode whole series of the validation part: the absolute error of what comes back."""
    systems = task.split.validation
    each = [np.abs(_decoded(task, s) - task.scaled(s)) for s in systems.tolist()]  # (P, V) of each
    scaled = np.concatenate(each)
    raw = np.concatenate([one * task.alphas[s] for one, s in zip(each, systems.tolist(), strict=True)])
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
        "time": task.dataset.time[: len(task.raw(system))].tolist(),
        "raw": task.raw(system).tolist(),
        "decoded": (_decoded(task, system) * task.alphas[system]).tolist(),
    }


def _decoded(task: Task, system: int) -> NDArray[np.float64]:
    """A whole series by way of its tokens and back, scaled, (P, V)."""
    text = task.tokenizer.decode(task.tokens(system))
    return task.codec.decode(text, len(task.dataset.names)).values
