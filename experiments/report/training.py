"""Training: loss curves, the grid, the contexts, and the gradient of every LoRA matrix."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from experiments import plots
from experiments.plots.gradients import by_layer
from experiments.report.claims import sweep
from experiments.report.document import Block, Column, Figure, Number, Section, Table, Text, named, not_run
from experiments.report.evaluation import Floats
from experiments.report.study import STAGES, Run, Study

EXPLODES, VANISHES = 100.0, 1e-3
RULE = (
    "Rule: the median of the last tenth of the recorded norms beside that of the first tenth after step 1, where "
    f"B is zero, and so is A's gradient. More than {EXPLODES:g} times as large, or not finite: it explodes; less than "
    f"{VANISHES:g} of it: it vanishes."
)


def curves(study: Study) -> Section:
    """Training and validation loss over steps and FLOPs, by stage and all together."""
    groups = {
        "cells": ("every cell of the grid", ["grid"]),
        "contexts": ("every context", ["context"]),
        "default-and-final": ("the default and the final run", ["default", "final"]),
        "all": ("all runs", ["default", "grid", "context", "final"]),
    }
    padded = "The training loss counts padding as tokens; the validation loss is per real token."
    blocks: list[Block] = [Text([padded])] if study.settings.get("count_padding") else []
    shown: list[list[str]] = []
    for name, (what, stages) in groups.items():
        ran = [stage for stage in stages if study.of(stage)]
        if ran and ran in shown:
            continue  # the same runs under another name
        shown.append(ran)
        if not (runs := study.each(*stages)):
            blocks.append(not_run(f"Loss of {what}"))
            continue
        drawn, files = [_curve(study, run) for run in runs], [_metrics(run) for run in runs]
        if len(ran) == 1:  # a legend need not say what all have in common
            drawn = [curve | {"group": ""} for curve in drawn]
        for x in ("step", "flops"):
            over = "steps" if x == "step" else "training FLOPs"
            caption = f"Training loss, raw and smoothed, and validation loss of {what} over {over}."
            draw = partial(plots.loss_curves, drawn, x=x, label=study.label)
            blocks.append(Figure(f"loss-{name}-by-{x}", caption, draw, files, ran))
    for run in study.of("final"):
        half = [_second_half(_curve(study, run))]
        caption = "Loss of the final run over the second half of its steps."
        draw = partial(plots.loss_curves, half, label=study.label)
        blocks.append(Figure("loss-final-second-half", caption, draw, [_metrics(run)], ["final"]))
    if study.runs:
        blocks.append(_validations(study))
    return Section("training", "Training", blocks)


def grid(study: Study) -> Section:
    """Validation loss by learning rate and rank, beside the report's own numbers."""
    runs = study.of("grid")
    if not runs:
        return Section("grid", "Learning rate and rank", [not_run("The grid"), *sweep(study, "grid")])
    if study.settings.get("rungs") or study.settings.get("over"):
        return Section("grid", "Search", [*_search(study, runs), _runs("grid", "Every cell of the grid.", runs)])
    losses = {(run.row["lr"], run.row["rank"]): run.row["validation_loss"] for run in runs}
    rates, ranks = sorted({lr for lr, _ in losses}), sorted({rank for _, rank in losses})
    at = min(losses, key=lambda cell: losses[cell])
    columns = [*named("lr"), *(Column(f"rank_{rank}", f"rank {rank}") for rank in ranks)]
    rows = [[lr, *(losses.get((lr, rank)) for rank in ranks)] for lr in rates]
    marks = {(rates.index(at[0]), 1 + ranks.index(at[1])): "lowest"}
    caption = "Validation loss (nats per real token) by learning rate and LoRA rank."
    matrix = Table("grid", caption, columns, rows, ["results.csv"], ["grid"], marks)
    caption, draw = "Validation loss over learning rate and rank, the lowest framed.", partial(plots.heat_map, losses)
    heat = Figure("grid", caption, partial(draw, label=study.label), ["results.csv"], ["grid"])
    blocks: list[Block] = [matrix, heat, *sweep(study, "grid"), _runs("grid", "Every cell of the grid.", runs)]
    return Section("grid", "Learning rate and rank", [*blocks, *_errors(study, runs, "grid")])


def _search(study: Study, runs: Sequence[Run]) -> list[Block]:
    """The loss of every cell at each rung, and over FLOPs."""
    caption = "Validation loss of every run over training FLOPs, the best of the longest marked."
    curves = [_curve(study, run) | {"judged": _judged(study, run)} for run in runs]
    draw = partial(plots.search, curves, label=study.label)
    figure = Figure("search", caption, draw, [_metrics(run) for run in runs], ["grid"])
    if not study.rungs:
        return [figure]
    names = [f"loss_at_{rung}" for rung in study.rungs]
    columns = [
        Column("name", "run", "text"),
        *(Column(n, f"step {r}") for n, r in zip(names, study.rungs, strict=True)),
    ]
    rows = [[run.title, *(run.row[name] for name in names)] for run in runs]
    caption = "Validation loss (nats per real token) of every cell at each rung that it was judged at."
    return [Table("rungs", caption, columns, rows, ["results.csv"], ["grid"]), figure]


def context(study: Study) -> Section:
    """Validation loss by the length of the context, beside the report's own numbers."""
    runs = study.of("context")
    if not runs:
        return Section("context", "Context length", [not_run("The contexts"), *sweep(study, "context")])
    blocks = [_runs("context", "Every context.", runs), *_errors(study, runs, "context"), *sweep(study, "context")]
    return Section("context", "Context length", blocks)


def gradients(study: Study) -> Section:
    """The gradient norm of every A and B, with a warning where one vanishes or explodes."""
    blocks: list[Block] = [Text([RULE])]
    for stage in ("default", "final"):
        if not (runs := study.of(stage)):
            blocks.append(not_run(f"Gradients of the {stage} run"))
        for run in runs:
            blocks += _gradients(study, run)
    return Section("gradients", "Gradients of A and B", blocks)


def verdict(norms: Floats) -> tuple[float | None, float | None, str]:
    """Median of the first and of the last tenth of the norms (n,) after step 1, and what `RULE` says of them.

    "explodes", "vanishes", or "" for neither; a median of norms that are not finite is None."""
    tenth = max(1, len(norms) // 10)
    first, last = (float(np.median(part)) for part in (norms[:tenth], norms[-tenth:]))
    if not np.isfinite(norms).all() or last > EXPLODES * first:
        found = "explodes"
    else:
        found = "vanishes" if last < VANISHES * first or first == last == 0 else ""
    return _finite(first), _finite(last), found


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _gradients(study: Study, run: Run) -> list[Block]:
    file = f"{run.folder}/gradients.jsonl"
    lines = study.records.jsonl(file)
    names = sorted(lines[0].fields("norms").values if lines else [], key=by_layer)
    if not names:
        raise ValueError(f"{study.root / file}: holds no norms: expected a line for each recorded step")
    steps = np.array([line.count("step") for line in lines])
    rows = [line.fields("norms") for line in lines]
    for row in rows:
        if row.values.keys() != set(names):
            raise ValueError(f"{row.where}: names other matrices than the first line: expected {len(names)}")
    # null stands for a norm that is not finite, of which JSON knows none
    norms = {name: np.array([row.number_or_none(name) for row in rows], np.float64) for name in names}
    after = steps > 1 if (steps > 1).any() else steps > 0
    found = {name: verdict(values[after]) for name, values in norms.items()}
    flagged = [name for name, (_, _, what) in found.items() if what]
    name, title = f"gradients-{run.stage}", f"Gradient norm of every A and B, {run.title}"
    caption = f"Gradient norm of every LoRA matrix in the {run.title}, by layer and projection."
    draw = partial(plots.gradient_norms, steps, norms, title=title, label=study.label, flagged=flagged)
    figure = Figure(name, caption, draw, [file], [run.stage])
    titles = {"first": "first tenth", "last": "last tenth", "ratio": "last / first"}
    columns = named("matrix first last ratio verdict", **titles)
    values = [
        [matrix, first, last, last / first if first and last is not None else None, what or "neither"]
        for matrix, (first, last, what) in found.items()
    ]
    caption = f"Gradient norms of the {run.title}: medians of the first and the last tenth, and the rule's verdict."
    table = Table(name, caption, columns, values, [file], [run.stage], folded=True)
    said: list[Block] = []
    for what in ("explodes", "vanishes"):
        if these := [name for name in flagged if found[name][2] == what]:
            many, of = Number(len(these), "integer"), Number(len(names), "integer")
            start = f"Warning: in the {run.title} the gradient {what} in "
            said.append(Text([start, many, " of ", of, f" matrices: {', '.join(these)}."], "warning"))
    none = Text([f"In the {run.title} no gradient vanishes or explodes."])
    return [Text([run.title.capitalize()], "heading"), *(said or [none]), figure, table]


def _metrics(run: Run) -> str:
    return f"{run.folder}/metrics.jsonl"


def _curve(study: Study, run: Run) -> dict[str, Any]:
    """A run as `plots.loss_curves` takes it."""
    lines = study.records.jsonl(_metrics(run))
    found = {"name": run.title, "lr": run.row["lr"], "rank": run.row["rank"], "group": run.stage}
    for kind, key in (("train", "loss"), ("validation", "validation_loss")):
        found[kind] = [
            (line.count("step"), line.count("training"), line.number(key)) for line in lines if key in line.values
        ]
    return found


def _judged(study: Study, run: Run) -> list[tuple[int, int, float]]:
    """Step, FLOPs and loss of a run of a search at the rungs that it was judged at."""
    losses = {rung: run.row[f"loss_at_{rung}"] for rung in study.rungs}
    each = run.row["training_flops"] // run.row["steps"]
    return [(rung, rung * each, loss) for rung, loss in losses.items() if loss is not None]


def _second_half(curve: dict[str, Any]) -> dict[str, Any]:
    last = max((step for kind in ("train", "validation") for step, _, _ in curve[kind]), default=0)
    return curve | {kind: [p for p in curve[kind] if 2 * p[0] > last] for kind in ("train", "validation")}


def _validations(study: Study) -> Table:
    rows = []
    for run in study.each(*STAGES):
        for line in study.records.jsonl(_metrics(run)):
            if "validation_loss" in line.values:
                at = line.count("step"), line.count("training")
                padded = line.number_or_none("validation_loss_with_padding")
                rows.append([run.title, *at, line.number("validation_loss"), padded])
    titles = {"flops": "training FLOPs", "with_padding": "with padding counted"}
    columns = named("run step flops validation_loss with_padding", **titles)
    files = list(dict.fromkeys(_metrics(run) for run in study.runs))
    stages = list(dict.fromkeys(run.stage for run in study.runs))
    caption = "Validation loss (nats per real token) of every run at every step where it was taken."
    return Table("validation-loss", caption, columns, rows, files, stages, folded=True).without_empty()


def _runs(name: str, caption: str, runs: Sequence[Run]) -> Table:
    """Runs with their losses: nats per real token."""
    names = "name lr rank context steps validation_loss validation_loss_with_padding best_validation_loss best_step"
    titles = {"name": "run", "best_validation_loss": "lowest on the way", "best_step": "at step"}
    titles |= {"last_losses_mean": "training loss, last 10"}
    columns = named(f"{names} last_losses_mean training_flops", **titles)
    rows = [[run.title, *(run.row.get(column.name) for column in columns[1:])] for run in runs]
    losses = [run.row["validation_loss"] for run in runs]
    caption += " Losses in nats per real token."
    marks = {(losses.index(min(losses)), names.split().index("validation_loss")): "lowest"}
    return Table(f"{name}-runs", caption, columns, rows, ["results.csv"], [name], marks).without_empty()


def _errors(study: Study, runs: Sequence[Run], stage: str) -> list[Table]:
    """The forecasts of runs that were evaluated: MSE and MAE by part and unit."""
    rows, files = [], []
    for run in runs:
        if evaluation := study.evaluation(run):
            files.append(evaluation.file("scores.csv"))
            for row in evaluation.scores:
                if (row["forecaster"], row["variable"]) == ("model", "all"):
                    mse = (row["mse"], row["mse_low"], row["mse_high"])
                    rows.append([run.title, row["part"], row["unit"], row["series"], mse, row["mae"], row["skill"]])
                    rows[-1].append(row["reference"])
    columns = named("run part unit series mse mae skill reference", intervals="mse")
    caption = "Errors of the forecasts of these runs, all species."
    return [Table(f"{stage}-errors", caption, columns, rows, files, [stage])] if rows else []
