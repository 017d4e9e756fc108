"""The table and figures of the hyperparameter grid, and of a search, from the records in the run folder alone.

RUN/results.md  figures/*.png, of which the page has the same   (the run folder is described in `study.py`)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import plots
from experiments.accounting.ledger import STAGES
from experiments.forecasting.baselines import RULES
from experiments.forecasting.scores import verdict
from experiments.run_folder import files, table
from experiments.run_folder.cells import at_rungs, by_cell, losses, lowest, noise, spread
from experiments.run_folder.command import command
from experiments.run_folder.folder import RunFolder
from experiments.run_folder.status import status
from experiments.settings.record import Settings
from experiments.study.plan import runs_of


def write_results(settings: Settings, out: Path) -> list[dict[str, Any]]:
    """Write `results.md` and the figures; returns the results of the cells, the untrained model's first.

    Of a search: the rows of `results.csv`.
    """
    if settings.rungs or settings.over:
        return _write_search(settings, out)
    folders = [RunFolder(out / run.folder) for run in runs_of(settings, "grid")]
    results = [files.read_json(folder.result) for folder in folders]
    files.write_text(out / "results.md", markdown(settings, results, out))
    figures = out / "figures"
    figures.mkdir(exist_ok=True)
    curves = [_curve(folder, result) for folder, result in zip(folders[1:], results[1:], strict=True)]
    curves = [curve | {"untrained": results[0]["validation_loss"]} for curve in curves]
    for x in ("step", "flops"):
        plots.loss_curves(curves, figures / f"loss-cells-by-{x}.png", x=x, label=settings.label)
    plots.heat_map(_losses(results[1:]), figures / "grid.png", label=settings.label)
    return results


def _curve(folder: RunFolder, result: dict[str, Any]) -> dict[str, Any]:
    metrics = files.read_jsonl(folder.metrics)
    return {"name": result["cell"], "lr": result["lr"], "rank": result["rank"]} | {
        kind: [(m["step"], m["training"], m[field]) for m in metrics if field in m]
        for kind, field in (("train", "loss"), ("validation", "validation_loss"))
    }


def _write_search(settings: Settings, out: Path) -> list[dict[str, Any]]:
    _, rows = files.read_csv(out / "results.csv")
    text, curves = _searched(settings, rows, out), []
    for row in rows[1:]:
        of = {"cell": row["cell"], "lr": float(row["lr"]), "rank": int(row["rank"])}
        curves.append(_curve(RunFolder(out / row["folder"]), of) | {"judged": at_rungs(row, settings.rungs)})
    (out / "figures").mkdir(exist_ok=True)
    plots.search(curves, out / "figures" / "search.png", label=settings.label)
    files.write_text(out / "results.md", text)
    return rows


def _searched(settings: Settings, rows: Sequence[dict[str, str]], out: Path) -> str:
    """`results.md` of a search: every cell's loss at each rung, those that failed, the best, the FLOPs by stage."""
    untrained, *cells = rows
    rungs = settings.rungs or (settings.steps,)
    ended = [row for row in cells if row["folder"].startswith("cells/")]
    best = lowest(ended)
    lines = [["cell", *(f"step {rung}" for rung in rungs), f"FLOPs of its run{'s' * (settings.seeds > 1)}"]]
    for cell, some in by_cell(cells).items():
        at = {rung: [loss] for rung, _, loss in at_rungs(some[0], settings.rungs)}
        at = at if settings.rungs else {settings.steps: losses(some)}
        shown = [_shown(at[rung]) if rung in at else "-" for rung in rungs]
        shown[-1] = f"**{shown[-1]}**" if some[0] is best else shown[-1]
        flops = sum(int(row["training_flops"]) + int(row["validation_flops"]) for row in some)
        lines.append([f"`{cell}`", *shown, f"{flops:,}"])
    spent = {row["part"]: int(row["flops"]) for row in files.read_csv(out / "flops.csv")[1] if row["stage"] == "all"}
    failed = [f"- `{row.name}` failed: {row.error}" for row in status(out).runs if row.error]
    return "\n".join(
        [
            f"# Validation loss of a search{f' ({settings.label})' if settings.label else ''}",
            "",
            f"Nats per real token on {settings.val_series or 'all'} series; untrained "
            f"{float(untrained['validation_loss']):.4f}.",
            "",
            *table.markdown(lines),
            "",
            *([*failed, ""] if failed else []),
            *_best(settings, ended),
            *_ending(settings, out, spent, best["cell"]),
        ]
    )


def markdown(settings: Settings, results: Sequence[dict[str, Any]], out: Path) -> str:
    """`results.md`: validation loss and forecasts by learning rate and rank, the best cell, the FLOPs by stage."""
    untrained, *cells = results
    best = lowest(cells)
    at = best["lr"], best["rank"]
    most = "at most " if settings.patience else ""
    early = [f"`{r['cell']}` after {r['stopped_early']}" for r in cells if r.get("stopped_early")]
    lines = [
        f"# Validation loss{f' ({settings.label})' if settings.label else ''}",
        "",
        f"Nats per real token after {most}{settings.steps} steps of {settings.batch_size} x {settings.context} "
        f"tokens, on {settings.val_series or 'all'} series; untrained {untrained['validation_loss']:.4f}.",
        "",
    ]
    if not settings.lr:
        why = ", a hundred times the reports' 1e-5 to 1e-4, which teach so small a model next to nothing"
        of_pocket = why if settings.preset_name == "pocket" else ""
        lines += [f"Learning rates: the preset `{settings.preset_name}`{of_pocket}.", ""]
    if early:
        lines += [f"Stopped early (patience {settings.patience}): {', '.join(early)} steps.", ""]
    lines += [*_by_cell(settings, _losses(cells), at), "", *_best(settings, cells)]
    runs = runs_of(settings, "grid")
    folders = [RunFolder(out / run.folder) for run in runs]
    spent = [r["flops"] for r in results] + [folder.evaluated.flops for folder in folders]
    if runs[0].parts:
        lines += _forecasts(settings, folders, results, at)
    stages = {stage: sum(flops.get(stage, 0) for flops in spent) for stage in STAGES}
    return "\n".join([*lines, *_ending(settings, out, stages, best["cell"])])


def _losses(results: Sequence[Mapping[str, Any]]) -> dict[tuple[float, int], list[float]]:
    """The validation losses of each learning rate and rank, one for each seed."""
    return {(some[0]["lr"], some[0]["rank"]): losses(some) for some in by_cell(results).values()}


def _best(settings: Settings, results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The best cell, and where there are several seeds what of the differences is their noise."""
    best, found = lowest(results)["cell"], by_cell(results)
    lines = [f"Best: `{best}`, {_shown(losses(found[best]))}.", ""]
    if settings.seeds == 1:
        return lines
    least = noise(losses(some) for some in found.values())
    lines[0] += f" Means of {settings.seeds} seeds, with the lowest and the highest; the adapter below is of the first."
    if least:
        lines[0] += f" Of two means less than {least:.2g} apart it is not known which is lower (95 %)."
    return lines


def _shown(values: Sequence[float]) -> str:
    """A mean over seeds, with its ends where there are several."""
    mean, low, high = spread(values)
    return f"{mean:.4f}" + (f" ({low:.4f} to {high:.4f})" if len(values) > 1 else "")


def following(out: Path, cell: str) -> tuple[str, str]:
    """What comes after the training of a cell, and its command: forecasts, or the page where these are made."""
    folder = RunFolder(out / "cells" / cell)
    if folder.evaluated.there:
        return "page", command("report", out)
    return "forecasts, scored", command("evaluate", "--config", out / "config.toml", "--adapter", folder.adapter)


def _ending(settings: Settings, out: Path, spent: Mapping[str, int], best: str) -> list[str]:
    """What was spent, by stage, and the command that comes next."""
    what, then = following(out, best)
    total = sum(spent[stage] for stage in STAGES)
    return [
        f"FLOPs (coursework): {', '.join(f'{stage} {spent[stage]:,}' for stage in STAGES)}, "
        f"together {total:,}, {100 * total / settings.budget:.2g} % of the budget of {settings.budget:.3g}.",
        "",
        "Next, the page of this run:" if what == "page" else f"Next, the best cell's {what}:",
        "",
        f"    {then}",
        "",
    ]


def _forecasts(settings: Settings, folders: Sequence[RunFolder], results, best: tuple[float, int]) -> list[str]:
    """The MSE of every cell's forecasts of the validation series, beside the untrained model's and the copies'."""
    judged = [_mse(folder) for folder in folders]
    mse: dict[tuple[float, int], list[float]] = {}
    for result, scores in zip(results, judged, strict=True):
        mse.setdefault((result["lr"], result["rank"]), []).append(scores["model"])
    of_best, series = judged[[*mse].index(best)], len(folders[0].evaluated.held["parts"]["validation"])
    copies = ", ".join(f"{name} {of_best[name]:.4f}" for name in RULES)
    return [
        f"MSE of the forecasts of {series} validation series, {settings.points} points -> {settings.horizon}, raw "
        f"units; untrained {judged[0]['model']:.4f}, {copies}.",
        "",
        *_by_cell(settings, mse, best),
        "",
        verdict(of_best, series, judged[0]["model"]),
        "",
    ]


def _mse(folder: RunFolder) -> dict[str, float]:
    """Of all variables of the validation part, raw units, by forecaster."""
    _, rows = files.read_csv(folder.evaluation / "scores.csv")
    asked = {"part": "validation", "unit": "raw", "variable": "all"}
    return {row["forecaster"]: float(row["mse"]) for row in rows if asked.items() <= row.items()}


def _by_cell(
    settings: Settings, values: Mapping[tuple[float, int], Sequence[float]], best: tuple[float, int]
) -> list[str]:
    """A table of learning rates and ranks, a value for each seed, the best cell's number bold."""
    rows = [["learning rate", *(f"rank {r}" for r in settings.ranks)]]
    for lr in settings.learning_rates:
        shown = {r: _shown(values[lr, r]) if (lr, r) in values else "left out" for r in settings.ranks}
        if lr == best[0]:
            shown[best[1]] = f"**{shown[best[1]]}**"
        rows.append([f"{lr:g}", *shown.values()])
    return table.markdown(rows)
