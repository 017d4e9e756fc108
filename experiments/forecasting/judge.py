"""The judgement of a run: its forecasts beside naive ones, scored over the horizon, as tables in a folder.

FOLDER/evaluation.json  forecasts.csv  history.csv  scores.csv  systems.csv  systems_scaled.csv  horizon.csv  tokens.csv
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.forecasting import scores
from experiments.forecasting.forecast import Forecasts
from experiments.forecasting.future import number
from experiments.run_folder import files
from experiments.run_folder.folder import Record, RunFolder
from experiments.task.task import Task

Parts = Mapping[str, list[int]]
Row = dict[str, Any]
TABLES = (
    *("evaluation.json", "forecasts.csv", "history.csv", "scores.csv", "systems.csv", "systems_scaled.csv"),
    *("horizon.csv", "tokens.csv"),
)
SETTINGS = "label points horizon origins top_k top_p repetition_penalty num_samples constrained".split()
BANDS = (("coverage50", "width50", 0.25, 0.75), ("coverage80", "width80", 0.1, 0.9))


def tables(
    task: Task,
    made: Forecasts,
    naive: Mapping[str, Mapping[str, NDArray[np.float64]]],
    parts: Parts,
    result: Mapping[str, Any],
    expected: Mapping[str, int],
    adapter: Path | None,
) -> dict[str, Any]:
    """Every file of an evaluation by name.

    Args:
        made, naive: the forecasts, of several origins joined; and the naive ones of each part by forecaster, (N, h, V).
            Files of single steps (forecasts.csv, history.csv, tokens.csv) are of the first origin; scores of all.
        parts: the systems of each part; "shown" is always one.
        result: of the run: its `result.json`, or its losses alone.
        expected: FLOPs as predicted.
        adapter: the run's, None for the untrained model.
    """
    of = {part: made.of(systems) for part, systems in parts.items()}
    guesses = {part: {"model": of[part].values, **naive[part]} for part in parts}
    settings, loss = task.settings, result["validation_loss"]
    origins = task.origins
    every = [row for part in parts for row in _scores(origins, part, of[part], guesses[part])]
    first = made.at(0, len(origins))
    horizon_loss = {part: float(np.concatenate(of[part].losses).mean()) for part in parts}
    return {
        "evaluation.json": {
            **{name: getattr(settings, name) for name in SETTINGS},
            "parts": dict(parts),
            "verdict": {part: verdict(every, part) for part in parts},
            "shown_names": {str(system): task.shape_of(system) for system in parts["shown"]},
            "by_origin": list(_by_origin(origins, of, guesses)) if len(origins) > 1 else [],
            "validation_loss": loss,
            "validation_loss_with_padding": result.get("validation_loss_with_padding"),
            "validation_tokens": result["validation_tokens"],
            "perplexity": math.exp(loss),
            "horizon_loss": horizon_loss,
            "horizon_perplexity": {part: math.exp(nats) for part, nats in horizon_loss.items()},
            "sampling": settings.judged,
            "temperature": settings.sampling_temperature,
            "unparsed_steps": {part: int(np.isnan(of[part].values).any(-1).sum()) for part in parts},
            "forecast_steps": {part: of[part].values[..., 0].size for part in parts},
            "flops": made.flops,
            "predicted_flops": dict(expected),
            "convention": "coursework",
            "data_sha256": task.dataset.digest,
            "trained_on_this_data": trained_on(task, adapter),
            "adapter_sha256": adapter and files.file_digest(next(adapter.glob("*model.safetensors"))),
        },
        "forecasts.csv": list(_forecasts(task, first)),
        "history.csv": list(_history(task, first.of(parts["shown"]))),
        "scores.csv": every,
        "systems.csv": _systems(task, of, guesses, parts),
        "systems_scaled.csv": _systems(task, of, guesses, {"shown": parts["shown"]}, scaled=True),
        "horizon.csv": [row for part in parts for row in _horizon(task, part, of[part], guesses[part])],
        "tokens.csv": list(_tokens(task, of["shown"])),
    }


def trained_on(task: Task, adapter: Path | None) -> bool | str:
    """Whether an adapter's run trained on series of the task's data set, by the digest in the `result.json` of its
    folder; "unknown" where there is none that can be read. The untrained model (None) did not."""
    if adapter is None:
        return False
    try:
        digest = Record(RunFolder(adapter.resolve().parent).result).held.get("data_sha256")
    except ValueError:
        digest = None
    return "unknown" if digest is None else digest == task.dataset.digest


def verdict(rows: Sequence[Row], part: str) -> str:
    """The model's forecasts of a part in one sentence, from the rows of scores.csv."""
    asked = [row for row in rows if (row["part"], row["unit"], row["variable"]) == (part, "raw", "all")]
    return scores.verdict({row["forecaster"]: row["mse"] for row in asked}, asked[0]["series"])


def write(folder: Path, tables: Mapping[str, Any]) -> None:
    """Write every table into `folder`, which then holds these or, if that fails, what it held before."""
    with files.atomic_folder(folder) as new:
        for name, content in tables.items():
            (files.write_json if name.endswith(".json") else files.write_csv)(new / name, content)


def _by_origin(origins: Sequence[Task], of: Mapping[str, Forecasts], guesses) -> Iterator[Row]:
    """The scores in raw units, all variables, at each origin alone."""
    for i, one in enumerate(origins):
        found: list[Row] = []
        for part, made in of.items():
            own = {name: np.split(values, len(origins), 1)[i] for name, values in guesses[part].items()}
            found += _scores([one], part, made.at(i, len(origins)), own, ["raw"])
        rows = [row for row in found if row["variable"] == "all"]
        yield {"cut_off": one.cut_off, "scores": rows}


def _scales(origins: Sequence[Task], systems: Sequence[int]) -> NDArray[np.float64]:
    """What each step of each system is divided by, (N, h, 1), or (N, h, V)."""
    alphas = np.stack([one.alphas[systems] for one in origins], 1)  # (N, origins), or (N, origins, V)
    by = np.repeat(alphas, origins[0].settings.horizon, 1)
    return by if by.ndim == 3 else by[..., None]


def _scores(
    origins: Sequence[Task],
    part: str,
    made: Forecasts,
    guesses: Mapping[str, NDArray[np.float64]],
    units: Sequence[str] = ("raw", "scaled"),
) -> Iterator[Row]:
    names, settings = origins[0].dataset.names, origins[0].settings
    seed, horizon = settings.seed, settings.horizon
    contexts = np.split(made.context, len(origins), 1)
    error = np.concatenate([np.repeat(_naive_error(one), horizon, 1) for one in contexts], 1)  # (N, h, V)
    for unit in units:
        by = _scales(origins, made.systems)
        by = by if unit == "scaled" else np.ones_like(by)
        truth, fallback = made.truth / by, guesses["persistence"] / by
        naive = error / by
        filled = {forecaster: scores.filled(values / by, fallback) for forecaster, values in guesses.items()}
        every = {forecaster: scores.by_variable(truth, full, names) for forecaster, (full, _) in filled.items()}
        for forecaster, (full, unparsed) in filled.items():
            deciles = _deciles(made, forecaster, full, by)
            for v, (variable, errors) in enumerate(every[forecaster].items()):
                of = slice(v - 1, v) if v else slice(None)
                mse = {name: found[variable]["mse"] for name, found in every.items()}
                reference = scores.reference(mse)
                each = scores.per_series(truth[..., of], full[..., of])
                copied = scores.per_series(truth[..., of], filled[reference][0][..., of])["mse"]
                row: Row = {"part": part, "unit": unit, "forecaster": forecaster, "variable": variable}
                row |= {"series": len(truth), "steps": unparsed.size, "unparsed_steps": int(unparsed.sum())}
                for name, values_of_each in each.items():
                    row[f"{name}_low"], row[f"{name}_high"] = scores.interval(values_of_each, seed)
                row |= errors | {"mase": scores.mase(truth[..., of], full[..., of], naive[..., of])}
                row |= {"mase_undefined": int((naive[:, ::horizon, of] == 0).sum())}
                row |= {"wql": scores.weighted_quantile_loss(truth[..., of], deciles[..., of])}
                row |= {"reference": reference, "skill": scores.skill(errors["mse"], mse[reference])}
                row["won"] = scores.won(each["mse"], copied)
                row["win_rate"] = row["won"] / len(truth)
                row["difference_low"], row["difference_high"] = scores.paired_interval(each["mse"], copied, seed)
                yield row | _probabilistic(made, forecaster, by, of)


def _naive_error(context: NDArray[np.float64]) -> NDArray[np.float64]:
    """`scores.naive_error`, of shorter series over the points that they have."""
    if not np.isnan(context).any():
        return scores.naive_error(context)
    return np.concatenate([scores.naive_error(one[None, ~np.isnan(one[:, 0])]) for one in context])


def _deciles(made: Forecasts, forecaster: str, full: NDArray[np.float64], by) -> NDArray[np.float64]:
    """Those of the samples, (9, N, h, V); where there are none, the forecast itself at every level."""
    if forecaster != "model" or made.samples is None:
        return np.broadcast_to(full, (len(scores.DECILES), *full.shape))
    found = scores.quantiles(made.samples / by[:, None])
    deciles = found[[scores.QUANTILES.index(level) for level in scores.DECILES]]
    return np.where(np.isnan(deciles), full, deciles)


def _probabilistic(made: Forecasts, forecaster: str, by, of: slice) -> Row:
    """CRPS, coverage and width of the samples' bands; nothing but for a model that was sampled."""
    row: Row = dict.fromkeys(("crps", "coverage50", "coverage80", "width50", "width80"))
    if forecaster != "model" or made.samples is None:
        return row
    truth, bands = made.truth[..., of] / by, scores.quantiles(made.samples[..., of] / by[:, None])
    parsed = ~np.isnan(bands[0])
    if not parsed.any():
        return row
    row["crps"] = float(np.nanmean(scores.crps(truth, made.samples[..., of] / by[:, None])))
    for coverage, width, low, high in BANDS:
        lower, upper = (bands[scores.QUANTILES.index(q)] for q in (low, high))
        row[coverage], row[width] = scores.coverage(truth, lower, upper), scores.width(lower, upper)
    return row


def _systems(task: Task, of, guesses, parts: Parts, scaled: bool = False) -> list[Row]:
    """A row for each system, forecaster and variable; a system of several parts once."""
    rows: dict[tuple, Row] = {}
    for part, systems in parts.items():
        for i, system in enumerate(systems):
            by = _scales(task.origins, [system])[0] if scaled else 1.0
            for forecaster, values in guesses[part].items():
                full, unparsed = scores.filled(values[i] / by, guesses[part]["persistence"][i] / by)
                for variable, errors in scores.by_variable(of[part].truth[i] / by, full, task.dataset.names).items():
                    if known := rows.get((system, forecaster, variable)):
                        known["parts"] += f" {part}"
                        continue
                    row = {"unique_id": system, "class": task.shape_of(system), "parts": part}
                    row |= {"forecaster": forecaster, "variable": variable} | errors
                    row |= {"unparsed_steps": int(unparsed.sum())} | _cut(of[part], i, forecaster)
                    rows[system, forecaster, variable] = row
    return list(rows.values())


def _cut(made: Forecasts, i: int, forecaster: str) -> Row:
    if forecaster != "model" or made.cut is None or made.cut_mean is None:
        return {"cut_mass": None, "cut_mass_mean": None}
    return {"cut_mass": float(made.cut[i]), "cut_mass_mean": float(made.cut_mean[i])}


def _horizon(task: Task, part: str, made: Forecasts, guesses) -> Iterator[Row]:
    for forecaster, values in guesses.items():
        full, _ = scores.filled(values, guesses["persistence"])
        for v, variable in enumerate(("all", *task.dataset.names)):
            of = slice(v - 1, v) if v else slice(None)
            each = (-1, horizon := task.settings.horizon, full[..., of].shape[2])  # a row for a series at an origin
            by_step = scores.by_step(made.truth[..., of].reshape(each), full[..., of].reshape(each))
            for step in range(horizon):
                row = {"part": part, "forecaster": forecaster, "variable": variable, "step": step + 1}
                yield row | {name: float(values[step]) for name, values in by_step.items()}


def _forecasts(task: Task, made: Forecasts) -> Iterator[Row]:
    """In the long form of the forecasting ecosystem: unique_id, ds, y, y_hat, and quantiles."""
    time = task.time[task.settings.points :]  # (h,)
    parsed: NDArray[np.bool_] = ~np.isnan(made.values.sum(axis=2))  # (N, h)
    bands = made.quantiles
    for i, v, step in np.ndindex(len(made.systems), len(task.dataset.names), len(time)):
        row: Row = {"unique_id": made.systems[i], "ds": float(time[step]), "variable": task.dataset.names[v]}
        row |= {"y": float(made.truth[i, step, v]), "y_hat": number(float(made.values[i, step, v]))}
        for q, level in enumerate(scores.QUANTILES):
            row[f"q{level:g}"] = None if bands is None else number(bands[q, i, step, v])
        yield row | {"parsed": int(parsed[i, step])}


def _history(task: Task, made: Forecasts) -> Iterator[Row]:
    points, variables = made.context.shape[1:]
    for i, v, point in np.ndindex(len(made.systems), variables, points):
        row = {"unique_id": made.systems[i], "ds": float(task.time[point]), "variable": task.dataset.names[v]}
        if not np.isnan(y := float(made.context[i, point, v])):  # of a series that begins later
            yield row | {"y": y}


def _tokens(task: Task, made: Forecasts) -> Iterator[Row]:
    """The true horizon token by token, with what each cost the model."""
    settings = task.settings
    for system, losses in zip(made.systems, made.losses, strict=True):
        whole = task.tokens(system, settings.points + settings.horizon)
        true, step = whole[len(task.tokens(system, settings.points)) :], 0
        for position, (token, nats) in enumerate(zip(true, losses[: len(true)], strict=True)):
            text = task.tokenizer.decode([token])
            row = {"unique_id": system, "position": position, "step": step, "token": token, "text": text}
            yield row | {"nats": float(nats)}
            step += token == task.step_end


def table(evaluation: Mapping[str, Any], rows: Sequence[Row], part: str) -> str:
    """The scores of one part in raw units as aligned text."""
    lines = [f"({evaluation['label']})"] if evaluation["label"] else []
    cut = ", ".join(str(one["cut_off"]) for one in evaluation["by_origin"])
    cut = f"at {evaluation['origins']} origins, after points {cut}, " if cut else ""
    series, steps = len(evaluation["parts"][part]), evaluation["forecast_steps"][part]
    asked = [row for row in rows if (row["part"], row["unit"], row["variable"]) == (part, "raw", "all")]
    lines += [
        f"validation loss {evaluation['validation_loss']:.4f} nats per real token "
        f"(perplexity {evaluation['perplexity']:.3f}), of {evaluation['validation_tokens']:,}; "
        f"of the true horizon {evaluation['horizon_loss'][part]:.4f}",
        f"forecasts of {series} series ({part}), {evaluation['points']} points -> {evaluation['horizon']}, {cut}"
        f"raw units, {evaluation['sampling']}; "
        f"{evaluation['unparsed_steps'][part]} of {steps} steps did not parse (scored as persistence)",
        *_compared(asked, evaluation["by_origin"], part),
    ]
    flops = evaluation["flops"]
    lines += [
        f"trained on this data: {yes_or_no(evaluation['trained_on_this_data'])}",
        f"FLOPs (coursework): validation {flops['validation']:,}, inference {flops['inference']:,}",
    ]
    return "\n".join(lines)


def _compared(rows: Sequence[Row], by_origin: Sequence[Mapping[str, Any]], part: str) -> list[str]:
    """The scores of the model and of forecasts without one, one below the other, and the verdict."""
    lines = [
        "",
        f"{'':17} {'MSE':>8} {'95 % interval':>17} {'RMSE':>8} {'MAE':>8} {'MASE':>8} {'sMAPE':>8} {'WQL':>8} "
        f"{'R2':>8} {'skill':>8} {'won':>5}",
    ]
    for row in rows:
        lines.append(
            f"{row['forecaster']:17} {row['mse']:8.4f} {row['mse_low']:8.4f}-{row['mse_high']:8.4f} "
            f"{row['rmse']:8.4f} {row['mae']:8.4f} {_shown(row['mase'])} {_shown(row['smape'])} "
            f"{_shown(row['wql'])} {_shown(row['r2'])} {_shown(row['skill'])} {row['win_rate']:5.0%}"
        )
    for one in by_origin:
        mse = {row["forecaster"]: row for row in one["scores"] if row["part"] == part}
        lines.append(
            f"after point {one['cut_off']}: MSE of the model {mse['model']['mse']:.4f}, of the "
            f"{mse['model']['reference']} {mse[mse['model']['reference']]['mse']:.4f}"
        )
    reference, series = rows[-1]["reference"], rows[-1]["series"]
    return lines + [
        "",
        verdict(rows, part),
        "MASE: error / the one-step naive error within the context; sMAPE: 2 |error| / (|value| + |forecast|); "
        "WQL: weighted quantile loss",
        f"skill: 1 - MSE / MSE of {scores.the(reference)}; won: part of the {series} series with a lower MSE than its",
    ]


def backtest(task: Task, made: Forecasts, naive: Mapping[str, NDArray[np.float64]]) -> tuple[list[Row], str]:
    """The scores of forecasts at all origins, joined, in raw units as rows of scores.csv, and as aligned text."""
    part, origins, guesses = "backtest", task.origins, {"model": made.values, **naive}
    rows = list(_scores(origins, part, made, guesses, ["raw"]))
    every = [row for row in rows if row["variable"] == "all"]
    by_origin = list(_by_origin(origins, {part: made}, {part: guesses}))
    return rows, "\n".join(_compared(every, by_origin, part)[1:])


def yes_or_no(trained: bool | str) -> str:
    """What `trained_on` returns, in words."""
    return trained if isinstance(trained, str) else "yes" if trained else "no"


def _shown(value: float | None) -> str:
    return f"{'':8}" if value is None else f"{value:8.3f}"
