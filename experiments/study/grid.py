"""The table and figures of the hyperparameter grid, and of a search, from the records in the run folder alone.

RUN/results.md  figures/*.png, of which the page has the same   (the run folder is described in `study.py`)
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import plots
from experiments.run_folder import files, table
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
    for x in ("step", "flops"):
        plots.loss_curves(curves, figures / f"loss-cells-by-{x}.png", x=x, label=settings.label)
    losses = {(r["lr"], r["rank"]): r["validation_loss"] for r in results[1:]}
    plots.heat_map(losses, figures / "grid.png", label=settings.label)
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
        curves.append(_curve(RunFolder(out / row["folder"]), of))
    (out / "figures").mkdir(exist_ok=True)
    plots.search(curves, out / "figures" / "search.png", label=settings.label)
    files.write_text(out / "results.md", text)
    return rows


def _searched(settings: Settings, rows: Sequence[dict[str, str]], out: Path) -> str:
    """`results.md` of a search: every cell's loss at each rung, those that failed, the best, the FLOPs by stage."""
    untrained, *cells = rows
    rungs = settings.rungs or (settings.steps,)
    ended = [row for row in cells if row["folder"].startswith("cells/")]
    best = min(ended, key=lambda row: float(row["validation_loss"]))
    lines = [["cell", *(f"step {rung}" for rung in rungs), "FLOPs of its run"]]
    for row in cells:
        losses = [row[f"loss_at_{rung}"] for rung in rungs] if settings.rungs else [row["validation_loss"]]
        shown = [f"{float(loss):.4f}" if loss else "-" for loss in losses]
        shown[-1] = f"**{shown[-1]}**" if row is best else shown[-1]
        lines.append([f"`{row['cell']}`", *shown, f"{int(row['training_flops']) + int(row['validation_flops']):,}"])
    spent = {row["part"]: int(row["flops"]) for row in files.read_csv(out / "flops.csv")[1] if row["stage"] == "all"}
    failed = [f"- `{row.name}` failed: {row.error}" for row in status(out).runs if row.error]
    evaluate = ["python", "-m", "experiments.run", "evaluate", "--adapter", str(out / best["folder"] / "adapter")]
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
            f"Best: `{best['cell']}`, {float(best['validation_loss']):.4f}.",
            "",
            f"FLOPs: training {spent['training']:,}, validation {spent['validation']:,}, together {spent['total']:,}, "
            f"which is {spent['total'] / settings.budget:.2%} of the budget of {settings.budget:.3g}.",
            "",
            "Forecasts of the best cell:",
            "",
            f"    {shlex.join(evaluate)}",
            "",
        ]
    )


def markdown(settings: Settings, results: Sequence[dict[str, Any]], out: Path) -> str:
    """`results.md`: validation loss by learning rate and rank, the best cell, the FLOPs by stage."""
    untrained, *cells = results
    best = min(cells, key=lambda r: r["validation_loss"])
    losses = {(r["lr"], r["rank"]): r["validation_loss"] for r in cells}
    lines = [
        f"# Validation loss{f' ({settings.label})' if settings.label else ''}",
        "",
        f"Nats per real token after {settings.steps} steps of {settings.batch_size} x {settings.context} tokens, "
        f"on {settings.val_series or 'all'} series; untrained {untrained['validation_loss']:.4f}.",
        "",
    ]
    if not settings.lr:
        why = ", a hundred times the reports' 1e-5 to 1e-4, which teach so small a model next to nothing"
        of_pocket = why if settings.preset_name == "pocket" else ""
        lines += [f"Learning rates: the preset `{settings.preset_name}`{of_pocket}.", ""]
    rows = [["learning rate", *(f"rank {r}" for r in settings.ranks)]]
    for lr in settings.learning_rates:
        shown = [f"{losses[lr, r]:.4f}" if (lr, r) in losses else "left out" for r in settings.ranks]
        if lr == best["lr"]:
            column = settings.ranks.index(best["rank"])
            shown[column] = f"**{shown[column]}**"
        rows.append([f"{lr:g}", *shown])
    stages = {stage: sum(r["flops"].get(stage, 0) for r in results) for stage in ("training", "validation")}
    total = sum(stages.values())
    evaluate = ["python", "-m", "experiments.run", "evaluate", "--config", str(out / "config.toml")]
    evaluate += ["--adapter", str(out / "cells" / best["cell"] / "adapter")]
    lines += [
        *table.markdown(rows),
        "",
        f"Best: `{best['cell']}`, {best['validation_loss']:.4f}.",
        "",
        f"FLOPs ({best['convention']}): training {stages['training']:,}, validation {stages['validation']:,}, "
        f"together {total:,}, which is {total / settings.budget:.2%} of the budget of {settings.budget:.3g}.",
        "",
        "Forecasts of the best cell:",
        "",
        f"    {shlex.join(evaluate)}",
        "",
    ]
    return "\n".join(lines)
