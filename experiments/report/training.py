"""Training: loss curves, and the gradient of every LoRA matrix."""

from functools import partial
from typing import Any

import numpy as np

from experiments import plots
from experiments.plots.gradients import by_layer
from experiments.plots.training import smoothing, training_shown
from experiments.report.document import Block, Figure, Number, Section, Table, Text, named
from experiments.report.evaluation import Floats
from experiments.report.study import STAGES, Run, Study

EXPLODES, VANISHES = 100.0, 1e-3
RULE = (
    "Rule: the median of the last tenth of the recorded norms beside that of the first tenth after step 1, where "
    f"B is zero, and so is A's gradient. More than {EXPLODES:g} times as large, or not finite: it explodes; less than "
    f"{VANISHES:g} of it: it vanishes."
)


def curves(study: Study) -> Section:
    """Training and validation loss over steps, FLOPs and, where it is recorded, time, by stage and all together."""
    groups = {
        "cells": ("every cell of the grid", ["grid"]),
        "contexts": ("every context", ["context"]),
        "default-and-final": ("the default and the final run", ["default", "final"]),
        "all": ("all runs", ["default", "grid", "context", "final"]),
    }
    if not study.runs:
        return Section("training", "Training", [])
    padded = "The training loss counts padding as tokens; the validation loss is per real token."
    blocks: list[Block] = [Text([padded])] if study.settings.get("count_padding") else []
    shown: list[list[str]] = []
    for name, (what, stages) in groups.items():
        ran = [stage for stage in stages if study.of(stage)]
        if ran and ran in shown:
            continue  # the same runs under another name
        shown.append(ran)
        if not (runs := study.each(*stages)):
            continue
        over = {"step": "steps", "flops": "training FLOPs"}
        over |= {"time": "time"} if all(_seconds(study, run) for run in runs) else {}
        for x in over:
            drawn, files = [curve_of(study, run, x) for run in runs], [metrics(run) for run in runs]
            files += [clock(run) for run in runs if x == "time"]
            if len(ran) == 1:  # a legend need not say what all have in common
                drawn = [curve | {"group": ""} for curve in drawn]
            smooth = any(smoothing(len(curve["train"])) > 1 for curve in drawn)
            raw = ", each step and the mean of the last ones," if smooth else ""
            less = f", less that of {drawn[0]['name']},"
            training = {
                "loss": f"Training loss{raw} and validation",
                "difference": f"Training loss{less} and validation",
            }
            said = training.get(training_shown(drawn), "Validation")
            caption = f"{said} loss of {what} over {over[x]}; step 0 is the untrained model."
            draw = partial(plots.loss_curves, drawn, x=x, label=study.label)
            blocks.append(Figure(f"loss-{name}-by-{x}", caption, draw, files, ran, choice=f"over {over[x]}"))
    for run in study.of("final"):
        half = [_second_half(curve_of(study, run))]
        caption = "Loss of the final run over the second half of its steps."
        draw = partial(plots.loss_curves, half, label=study.label)
        blocks.append(Figure("loss-final-second-half", caption, draw, [metrics(run)], ["final"]))
    return Section("training", "Training", [*blocks, _validations(study)])


def gradients(study: Study) -> Section:
    """The gradient norm of every A and B, with a warning where one vanishes or explodes."""
    runs = study.each("default", "final")
    blocks = [block for run in runs for block in _gradients(study, run)]
    return Section("gradients", "Gradients of A and B", [Text([RULE]), *blocks] if runs else [])


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


def metrics(run: Run) -> str:
    return f"{run.folder}/metrics.jsonl"


def clock(run: Run) -> str:
    return f"{run.folder}/clock.jsonl"


def _seconds(study: Study, run: Run) -> list[float]:
    """Seconds of work up to each line of the metrics; none where the clock lacks some, as in earlier versions."""
    lines = study.records.jsonl(clock(run)) if study.records.has(clock(run)) else []
    found = [line.number("seconds") for line in lines]
    return found if len(found) == len(study.records.jsonl(metrics(run))) else []


def curve_of(study: Study, run: Run, x: str = "step") -> dict[str, Any]:
    """A run as `plots.loss_curves` takes it for this `x`."""
    lines = study.records.jsonl(metrics(run))
    amounts = _seconds(study, run) if x == "time" else [line.count("training") for line in lines]
    found = {"name": run.title, "lr": run.row["lr"], "rank": run.row["rank"], "group": run.stage}
    if (untrained := study.untrained) and untrained.row["context"] == run.row["context"]:  # else of other windows
        found["untrained"] = untrained.row["validation_loss"]
    for kind, key in (("train", "loss"), ("validation", "validation_loss")):
        found[kind] = [
            (line.count("step"), amount, line.number(key))
            for line, amount in zip(lines, amounts, strict=True)
            if key in line.values
        ]
    return found


def _second_half(curve: dict[str, Any]) -> dict[str, Any]:
    last = max((step for kind in ("train", "validation") for step, _, _ in curve[kind]), default=0)
    halves = {kind: [p for p in curve[kind] if 2 * p[0] > last] for kind in ("train", "validation")}
    return curve | halves | {"untrained": None}


def _validations(study: Study) -> Table:
    rows = []
    for run in study.each(*STAGES):
        for line in study.records.jsonl(metrics(run)):
            if "validation_loss" in line.values:
                at = line.count("step"), line.count("training")
                padded = line.number_or_none("validation_loss_with_padding")
                rows.append([run.title, *at, line.number("validation_loss"), padded])
    titles = {"flops": "training FLOPs", "with_padding": "with padding counted"}
    columns = named("run step flops validation_loss with_padding", **titles)
    files = list(dict.fromkeys(metrics(run) for run in study.runs))
    stages = list(dict.fromkeys(run.stage for run in study.runs))
    caption = "Validation loss (nats per real token) of every run at every step where it was taken."
    return Table("validation-loss", caption, columns, rows, files, stages, folded=True).without_empty()
