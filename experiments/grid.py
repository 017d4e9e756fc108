"""The hyperparameter grid: its run folder, its cells one after another, its tables and figures.

RUN/config.toml  manifest.json  results.csv  results.md  figures/*.png
RUN/untrained/   and   RUN/cells/<name>/   each with metrics.jsonl, result.json;
                       a cell also has checkpoint/ and adapter/
"""

import csv
import io
import os
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import torch

from experiments import files, plots
from experiments.budget import BudgetExceeded, Ledger
from experiments.settings import Settings
from experiments.task import Task
from experiments.train import Cell, Progress, predicted, run_cell
from qwen_min import QwenConfig, Tokenizer
from qwen_min.load import resolve, weight_files

UNTRAINED = Cell(0.0, 0)
PACKAGES = ("torch", "safetensors", "tokenizers", "numpy", "h5py", "scipy", "huggingface-hub")


def cells_of(settings: Settings) -> list[Cell]:
    """Every learning rate with every rank, rank by rank."""
    return [Cell(lr, rank) for rank in settings.ranks for lr in settings.learning_rates]


def plan(settings: Settings) -> tuple[Task, list[tuple[Cell, dict[str, int]]]]:
    """The task, and every cell (the untrained model first) with its predicted FLOPs by stage; nothing is run."""
    folder = resolve(settings.model, settings.revision or None, settings.offline)
    config = QwenConfig.from_file(folder / "config.json")
    task = Task.prepare(settings, Tokenizer(folder / "tokenizer.json"))
    windows = len(task.validation_windows)
    return task, [(cell, predicted(settings, cell, config, windows)) for cell in [UNTRAINED, *cells_of(settings)]]


def run_grid(settings: Settings, out: Path, ledger_path: Path, progress: Progress) -> list[dict[str, Any]]:
    """Run every cell that is not finished, then write the tables and figures; returns the results, untrained first.

    Raises:
        BudgetExceeded: all that is still to do does not fit what is left; nothing has been run.
        ValueError: the folder holds a run of other settings, model or data, or another process works in it.
    """
    task, cells = plan(settings)
    with claimed(out), Ledger(ledger_path, settings.budget) as ledger:
        begin(task, out)
        run = os.path.relpath(out.resolve(), ledger_path.resolve().parent)
        to_do = [(cell, flops) for cell, flops in cells if not (cell_folder(out, cell) / "result.json").is_file()]
        require_room(ledger, run, to_do)
        for cell, flops in cells:
            run_cell(task, cell, flops, cell_folder(out, cell), ledger, run, progress)
    return write_results(settings, out)


def require_room(ledger: Ledger, run: str, to_do: Sequence[tuple[Cell, dict[str, int]]]) -> None:
    """Refuse a run that would pass the budget before any of it has run."""
    needed = 0
    for cell, flops in to_do:
        before = ledger.latest(run, cell.name)
        done = sum(before[stage] for stage in flops) if before and before["state"] != "settled" else 0
        needed += max(0, sum(flops.values()) - done)
    left = ledger.totals()["left"]
    if needed > left:
        raise BudgetExceeded(ledger.path, run, needed, left, ledger.budget)


def cell_folder(out: Path, cell: Cell) -> Path:
    return out / "cells" / cell.name if cell.rank else out / cell.name


@contextmanager
def claimed(out: Path):
    """Hold a run's folder for this process; a second one is refused with a line that names the first."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file: expected a folder for the run")
    out.mkdir(parents=True, exist_ok=True)
    owner = out / ".owner"
    lock = filelock.FileLock(out / ".lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        who = owner.read_text().strip() if owner.is_file() else "another process"
        raise ValueError(f"{out}: {who} is at work in it: expected a folder of its own") from None
    try:
        owner.write_text(f"process {os.getpid()}\n")
        yield
    finally:
        lock.release()


def begin(task: Task, out: Path) -> None:
    """Write `config.toml` and `manifest.json`, or check that those of an earlier start are this run's."""
    now = manifest(task)
    path, config = out / "manifest.json", out / "config.toml"
    if path.is_file() and config.is_file():
        was, before = files.read_json(path), Settings.from_toml(config)
        for name in Settings.__dataclass_fields__:
            old, new = getattr(before, name), getattr(task.settings, name)
            # A larger budget, or the same files under another name, make no other run.
            if old != new and name not in ("budget", "offline", "model", "data"):
                raise ValueError(
                    f"{config}: {name} is {old!r}, now {new!r}: expected the settings the run began with, "
                    "or another --out"
                )
        for name in ("model_sha256", "config_sha256", "tokenizer_sha256", "data_sha256"):
            if was.get(name) != now[name]:
                raise ValueError(
                    f"{path}: {name} differs from what is there now: expected the same files, or another --out"
                )
        return
    files.write_text(config, task.settings.to_toml())
    files.write_json(path, now)


def manifest(task: Task) -> dict[str, Any]:
    """What the run was made with: versions, digests, device, threads."""
    settings = task.settings
    folder = resolve(settings.model, settings.revision or None, settings.offline)
    return {
        "label": settings.label,
        "model": settings.model,
        "model_folder": folder.name,
        "model_sha256": {path.name: files.file_digest(path) for path in weight_files(folder)},
        "config_sha256": files.file_digest(folder / "config.json"),
        "tokenizer_sha256": files.file_digest(folder / "tokenizer.json"),
        "data": str(task.dataset.path),
        "data_source": task.dataset.source,
        "data_sha256": task.dataset.digest,
        "alpha": task.alpha,
        "train_systems": len(task.split.train),
        "validation_systems": [int(s) for s in task.validation_systems],
        "device": settings.device,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "python": sys.version.split()[0],
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "begun": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write_results(settings: Settings, out: Path) -> list[dict[str, Any]]:
    """The tables and figures of the finished cells, from their folders alone."""
    folders = [cell_folder(out, cell) for cell in [UNTRAINED, *cells_of(settings)]]
    results = [files.read_json(folder / "result.json") for folder in folders]
    files.write_text(out / "results.csv", _csv(results))
    files.write_text(out / "results.md", markdown(settings, results, out))
    figures = out / "figures"
    figures.mkdir(exist_ok=True)
    curves = [_curve(folder, result) for folder, result in zip(folders[1:], results[1:], strict=True)]
    for x in ("step", "flops"):
        plots.loss_curves(curves, figures / f"loss_by_{x}.png", x=x, label=settings.label)
    table = {(r["lr"], r["rank"]): r["validation_loss"] for r in results[1:]}
    plots.heat_map(table, figures / "validation_loss.png", label=settings.label)
    return results


def _curve(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    metrics = files.read_jsonl(folder / "metrics.jsonl")
    return {"name": result["cell"], "lr": result["lr"], "rank": result["rank"]} | {
        kind: [(m["step"], m["training"], m[field]) for m in metrics if field in m]
        for kind, field in (("train", "loss"), ("validation", "validation_loss"))
    }


def _csv(results: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    rows = [
        {k: v for k, v in r.items() if not isinstance(v, dict)}
        | {f"{stage}_flops": n for stage, n in r["flops"].items()}
        for r in results
    ]
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown(settings: Settings, results: Sequence[dict[str, Any]], out: Path) -> str:
    """`results.md`: validation loss by learning rate and rank, the best cell, the FLOPs by stage."""
    untrained, *cells = results
    best = min(cells, key=lambda r: r["validation_loss"])
    losses = {(r["lr"], r["rank"]): r["validation_loss"] for r in cells}
    lines = [
        f"# Validation loss{f' ({settings.label})' if settings.label else ''}",
        "",
        f"Nats per real token after {settings.steps} steps of {settings.batch_size} x {settings.context} tokens, "
        f"on {settings.val_series} series; untrained {untrained['validation_loss']:.4f}.",
        "",
    ]
    if not settings.lr:
        lines += [
            f"Learning rates: the preset `{settings.preset_name}`"
            + (
                ", a hundred times the reports' 1e-5 to 1e-4, which teach so small a model next to nothing."
                if settings.preset_name == "pocket"
                else "."
            ),
            "",
        ]
    lines += [
        "| learning rate | " + " | ".join(f"rank {r}" for r in settings.ranks) + " |",
        "|---|" + "---|" * len(settings.ranks),
    ]
    for lr in settings.learning_rates:
        shown = (
            f"**{losses[lr, r]:.4f}**" if (lr, r) == (best["lr"], best["rank"]) else f"{losses[lr, r]:.4f}"
            for r in settings.ranks
        )
        lines.append(f"| {lr:g} | " + " | ".join(shown) + " |")
    stages = {stage: sum(r["flops"].get(stage, 0) for r in results) for stage in ("training", "validation")}
    total = sum(stages.values())
    lines += [
        "",
        f"Best: `{best['cell']}`, {best['validation_loss']:.4f}.",
        "",
        f"FLOPs ({best['convention']}): training {stages['training']:,}, validation {stages['validation']:,}, "
        f"together {total:,}, which is {total / settings.budget:.2%} of the budget of {settings.budget:.3g}.",
        "",
        "Forecasts of the best cell:",
        "",
        f"    python -m experiments.run evaluate --config {out / 'config.toml'} "
        f"--adapter {out / 'cells' / best['cell'] / 'adapter'}",
        "",
    ]
    return "\n".join(lines)
