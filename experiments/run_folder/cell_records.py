"""What a cell's folder says of its training, read strictly: metrics.jsonl, result.json, checkpoint/state.json.

What follows from something else is computed again and compared, so that an altered number is named and not carried on.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.run_folder import files
from experiments.run_folder.folder import RunFolder

_FLOPS = {"training": int, "validation": int}
_STEP = {"step": int, "loss": float, "gradient_norm": float} | _FLOPS
_VALIDATION = {"step": int, "validation_loss": float} | _FLOPS
_STATE = {"step": int, "validated_at": int, "flops": _FLOPS}
_NUMBER_OR_NULL = (float, type(None))
_RESULT: dict[str, Any] = {
    **{"cell": str, "lr": float, "rank": int, "steps": int, "context": int, "label": str},
    **{"validation_loss": float, "validation_loss_with_padding": _NUMBER_OR_NULL},
    **{"best_validation_loss": float, "best_step": int},
    **{"first_loss": _NUMBER_OR_NULL, "last_losses_mean": _NUMBER_OR_NULL},
    **{"flops": _FLOPS, "predicted_flops": _FLOPS, "convention": str, "trainable_parameters": int},
    **{"train_windows": int, "validation_windows": int, "validation_tokens": int, "data_sha256": str},
}
_OPTIONAL = {"adapter_sha256": dict, "metrics_sha256": str, "keep": str, "stopped_early": (int, type(None))}
_OPTIONAL |= {"horizon_mse": _NUMBER_OR_NULL, "kept_step": int}


def summary(metrics: Sequence[Mapping[str, Any]], keep: str = "last") -> dict[str, Any]:
    """The part of `result.json` that follows from `metrics.jsonl`, the last line of which is a validation.

    `validation_loss` is that of the adapter that is kept: the "last", the "best" by that loss, or that of the lowest
    "horizon" error; of equals the first.
    """
    losses = [m["loss"] for m in metrics if "loss" in m]
    validation = [m for m in metrics if "validation_loss" in m]
    best, last = min(validation, key=lambda m: m["validation_loss"]), validation[-1]
    kept = last if keep == "last" else best
    by_horizon: dict[str, Any] = {}
    if keep == "horizon":
        kept = min(validation, key=lambda m: m.get("horizon_mse", math.inf))
        by_horizon = {"kept_step": kept["step"], "horizon_mse": kept.get("horizon_mse")}
    return by_horizon | {
        "steps": len(losses),
        "validation_loss": kept["validation_loss"],
        "validation_loss_with_padding": kept.get("validation_loss_with_padding"),
        "best_validation_loss": best["validation_loss"],
        "best_step": best["step"],
        "first_loss": losses[0] if losses else None,
        "last_losses_mean": sum(losses[-10:]) / len(losses[-10:]) if losses else None,
        "flops": {stage: last[stage] for stage in _FLOPS},
    }


def waited(metrics: Sequence[Mapping[str, Any]]) -> int:
    """How many validations in a row, up to the last, had no lower loss than one before them."""
    losses = [m["validation_loss"] for m in metrics if "validation_loss" in m]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def digest(metrics: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of the metrics up to a checkpoint or a result, which records it."""
    return hashlib.sha256(json.dumps(metrics, sort_keys=True).encode()).hexdigest()


def _check_digest(path: Path, found: Sequence[Mapping[str, Any]], recorded: Any, where: str) -> None:
    if recorded is not None and digest(found) != recorded:
        raise ValueError(
            f"{path}: sha256 of its lines is {digest(found)}, recorded in {where} {recorded!r:.66}: expected the file "
            "as it was written"
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`: steps from 1, one by one, with validations between them.

    Raises:
        ValueError: a line is not as a run writes it, or does not follow from the one before it.
    """
    lines, step, flops = files.read_jsonl(path), 0, (0, 0)
    for number, line in enumerate(lines, 1):
        where = f"{path}: line {number}"
        trains = "loss" in line
        files.check(where, line, _STEP if trains else _VALIDATION)
        files.check(where, line, {"horizon_mse": float} if "horizon_mse" in line else {})
        step += trains
        if line["step"] != step:
            raise ValueError(f"{where}: step is {line['step']}: expected {step}")
        spent = line["training"], line["validation"]
        if spent[0] < flops[0] or spent[1] < flops[1]:
            raise ValueError(f"{where}: fewer FLOPs than before, {spent}: expected at least {flops}")
        flops = spent
    return lines


def read_clock(path: Path, metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines of `clock.jsonl` for those of `metrics.jsonl`: the seconds of work up to each; none if one is missing.

    Runs of earlier versions have no clock. Raises ValueError where a line is not as a run writes it.
    """
    lines = files.read_jsonl(path) if path.is_file() else []
    for number, line in enumerate(lines, 1):
        files.check(f"{path}: line {number}", line, {"step": int, "seconds": float})
    lines = lines[: len(metrics)]
    return lines if [line["step"] for line in lines] == [line["step"] for line in metrics] else []


def read_gradients(path: Path) -> list[dict[str, Any]]:
    """The lines of `gradients.jsonl`; ValueError where one is not as a run writes it."""
    lines = files.read_jsonl(path)
    for number, line in enumerate(lines, 1):
        files.check(f"{path}: line {number}", line, {"step": int, "norms": dict})
        files.check(f"{path}: line {number}", line["norms"], dict.fromkeys(line["norms"], float))
    return lines


def read_result(folder: RunFolder) -> dict[str, Any]:
    """The `result.json` of a finished cell.

    Raises:
        ValueError: it is not as a run writes it, or not what the cell's `metrics.jsonl` says.
    """
    path = folder.result
    result = files.read_json(path)
    files.check(path, result, _RESULT, _OPTIONAL)
    metrics = read_metrics(folder.metrics)
    if not metrics or "validation_loss" not in metrics[-1]:
        raise ValueError(f"{folder.metrics}: ends without a validation: expected all of a finished run")
    for name, value in summary(metrics, result.get("keep", "last")).items():
        same = result.get(name) == value
        if name == "last_losses_mean" and value is not None:  # Python 3.12 adds up in another way
            same = math.isclose(result[name] or 0.0, value, rel_tol=1e-12)
        if not same:
            raise ValueError(f"{path}: {name} is {result.get(name)!r}: expected {value!r}, as metrics.jsonl says")
    if (early := result.get("stopped_early")) not in (None, result["steps"]):
        raise ValueError(f"{path}: stopped_early is {early}: expected {result['steps']}, the last step, or null")
    _check_digest(folder.metrics, metrics, result.get("metrics_sha256"), path.name)
    return result


def read_state(path: Path, steps: int, cell: str) -> dict[str, Any]:
    """The `state.json` of a checkpoint of a cell of `steps` steps; ValueError where it is not as a run writes it."""
    state = files.read_json(path)
    files.check(path, state, _STATE)
    if (found := state.get("cell", cell)) != cell:
        raise ValueError(f"{path}: cell is {found!r:.60}: expected {cell!r}, in whose folder it is")
    for name, least, most in (("step", 1, steps), ("validated_at", -1, state["step"])):
        if not least <= state[name] <= most:
            raise ValueError(f"{path}: {name} is {state[name]}: expected {least} to {most}")
    return state


def upto(state: Mapping[str, Any], folder: RunFolder) -> list[dict[str, Any]]:
    """The metrics of a cell up to a checkpoint, which its `state` describes; later ones will be written again.

    Raises:
        ValueError: they do not lead to it.
    """
    path, spent = folder.metrics, sum(state["flops"].values())
    metrics = [m for m in read_metrics(path) if m["training"] + m["validation"] <= spent]
    last: Mapping[str, Any] = metrics[-1] if metrics else {}
    validated = max((m["step"] for m in metrics if "validation_loss" in m), default=-1)
    found = {"step": last.get("step"), "validated_at": validated, "flops": {s: last.get(s) for s in _FLOPS}}
    for name, value in found.items():
        if state[name] != value:
            raise ValueError(f"{path}: {name} is {value!r} there: expected {state[name]!r}, as the checkpoint says")
    _check_digest(path, metrics, state.get("metrics_sha256"), "checkpoint/state.json")
    return metrics
