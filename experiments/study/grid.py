"""The table and figures of the hyperparameter grid, from the folders of its cells alone.

RUN/results.md  figures/*.png, of which the page has the same   (the run folder is described in `study.py`)
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import plots
from experiments.run_folder import files, table
from experiments.run_folder.folder import RunFolder
from experiments.settings.record import Settings
from experiments.study.plan import runs_of


def write_results(settings: Settings, out: Path) -> list[dict[str, Any]]:
    """Write `results.md` and the figures; returns the results of the cells, the untrained model's first."""
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


def markdown(settings: Settings, results: Sequence[dict[str, Any]], out: Path) -> str:
    """`results.md`: validation loss by learning rate and rank, the best cell, the FLOPs by stage."""
    untrained, *cells = results
    best = min(cells, key=lambda r: r["validation_loss"])
    losses = {(r["lr"], r["rank"]): r["validation_loss"] for r in cells}
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
