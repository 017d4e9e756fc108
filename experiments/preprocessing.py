"""Two worked examples of how a series becomes tokens, and what writing it as digits loses."""

from typing import Any

import numpy as np

from experiments.task import Task

POINTS_SHOWN = 2


def preprocessing(task: Task) -> dict[str, Any]:
    """`preprocessing.json`: the first two training systems step by step, and the round trip of the validation part."""
    return {
        "alpha_rule": task.alpha_rule,
        "decimals": task.settings.decimals,
        "examples": [_example(task, int(system)) for system in task.split.train[:2]],
        "round_trip": _round_trip(task),
    }


def _example(task: Task, system: int) -> dict[str, Any]:
    text = task.text(system, POINTS_SHOWN)
    ids = task.tokenizer.encode(text)
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
    variables = task.dataset.series.shape[2]
    errors = []
    for system in systems.tolist():
        ids = task.tokens(system)
        decoded = task.codec.decode(task.tokenizer.decode(ids), variables)
        errors.append(np.abs(decoded.values - task.scaled(system)))
    scaled = np.stack(errors)  # (N, P, V)
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
