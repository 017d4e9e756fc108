"""How the recipe was found: the grid of learning rates and ranks, a search, and the contexts."""

from collections.abc import Mapping, Sequence
from functools import partial

from experiments import plots
from experiments.report.claims import sweep
from experiments.report.document import Block, Column, Figure, Kind, Section, Table, named
from experiments.report.evaluation import MODEL
from experiments.report.scoring import SQUARED, with_interval
from experiments.report.study import Run, Study
from experiments.report.training import curve_of, metrics
from experiments.run_folder.cells import at_rungs, by_cell, losses, noise, spread


def grid(study: Study) -> Section:
    """Validation loss by learning rate and rank, beside the report's own numbers."""
    runs = study.of("grid")
    if not runs:
        return Section("grid", "Learning rate and rank", [])
    if study.settings.get("rungs") or study.settings.get("over"):
        return Section("grid", "Search", [*_search(study, runs), _runs("grid", "Every cell of the grid.", runs)])
    cells = by_cell(run.row for run in runs).values()
    found = {(some[0]["lr"], some[0]["rank"]): losses(some) for some in cells}
    caption = f"Validation loss (nats per real token) by learning rate and LoRA rank{_over(study)}."
    matrix = _matrix("grid", caption, found, ["results.csv"])
    caption, draw = "Validation loss over learning rate and rank, the lowest framed.", partial(plots.heat_map, found)
    heat = Figure("grid", caption, partial(draw, label=study.label), ["results.csv"], ["grid"])
    blocks: list[Block] = [matrix, heat, *_judged(study, runs), *sweep(study, "grid")]
    blocks += [_runs("grid", "Every cell of the grid.", runs), *_errors(study, runs, "grid")]
    return Section("grid", "Learning rate and rank", blocks)


def _over(study: Study) -> str:
    """What a caption says of several seeds."""
    return f", the mean of {study.seeds} seeds (the lowest to the highest)" if study.seeds > 1 else ""


def _matrix(
    name: str, caption: str, values: Mapping[tuple[float, int], Sequence[float]], files: Sequence[str]
) -> Table:
    """Values, one for each seed, by learning rate (rows) and rank (columns), the lowest mean marked."""
    rates, ranks = sorted({lr for lr, _ in values}), sorted({rank for _, rank in values})
    spreads = {cell: spread(some) for cell, some in values.items()}
    several = any(len(some) > 1 for some in values.values())
    lr, rank = min(spreads, key=lambda cell: spreads[cell][0])
    kind: Kind = "interval" if several else "number"
    columns = [*named("lr"), *(Column(f"rank_{rank}", f"rank {rank}", kind) for rank in ranks)]
    shown = spreads if several else {cell: mean for cell, (mean, _, _) in spreads.items()}
    nothing = (None, None, None) if several else None
    rows = [[lr, *(shown.get((lr, rank), nothing) for rank in ranks)] for lr in rates]
    marks = {(rates.index(lr), 1 + ranks.index(rank)): "lowest"}
    return Table(name, caption, columns, rows, files, ["grid"], marks)


def _judged(study: Study, runs: Sequence[Run]) -> list[Block]:
    """The MSE of every cell's forecasts of the validation series, beside the untrained model's and the copies'."""
    found = [
        (run, evaluation) for run in runs if (evaluation := study.evaluation(run)) and evaluation.score("validation")
    ]
    if not found:
        return []
    files = [evaluation.file("scores.csv") for _, evaluation in found]
    mse: dict[tuple[float, int], list[float]] = {}
    for run, evaluation in found:
        mse.setdefault((run.row["lr"], run.row["rank"]), []).append(evaluation.mse("validation")[MODEL])
    caption = f"MSE of the forecasts of the validation series, raw units, by learning rate and LoRA rank{_over(study)}."
    matrix = _matrix("grid-mse", caption, mse, files)
    bars = {run.title: with_interval(evaluation.by_forecaster("validation")[MODEL]) for run, evaluation in found}
    last = found[-1][1]
    if untrained := study.untrained_beside(last, "validation"):
        bars["untrained model"] = with_interval(untrained.by_forecaster("validation")[MODEL])
        files.append(untrained.file("scores.csv"))
    rest = {name: with_interval(row) for name, row in last.by_forecaster("validation").items() if name != MODEL}
    said = {"xlabel": SQUARED, "title": "MSE of every cell, 95 % interval", "label": study.label}
    draw = partial(plots.score_bars, bars | rest, strong=list(bars), **said)
    caption = "MSE of the forecasts of every cell, of the untrained model, and without a model: the same series."
    return [matrix, Figure("mse-cells", caption, draw, files, ["grid"])]


def _search(study: Study, runs: Sequence[Run]) -> list[Block]:
    """The loss of every cell at each rung, or over its seeds, and over FLOPs."""
    caption = f"Validation loss of every cell over training FLOPs, the best of the longest marked{_over(study)}."
    curves = [curve_of(study, run) | {"judged": at_rungs(run.row, study.rungs)} for run in runs]
    draw = partial(plots.search, curves, label=study.label)
    figure = Figure("search", caption, draw, [metrics(run) for run in runs], ["grid"])
    if study.seeds > 1:  # which rungs do not go with
        cells = {cell: losses(some) for cell, some in by_cell(run.row for run in runs).items()}
        caption = f"Validation loss (nats per token) of every cell{_over(study)}"
        if least := noise(cells.values()):
            caption += f"; of two means less than {least:.2g} apart it is not known which is lower (95 %)"
        spreads = [spread(found) for found in cells.values()]
        best, rows = spreads.index(min(spreads)), [list(row) for row in zip(cells, spreads, strict=True)]
        columns = [Column("cell", "cell", "text"), Column("validation_loss", "validation loss", "interval")]
        return [Table("cells", f"{caption}.", columns, rows, ["results.csv"], ["grid"], {(best, 1): "lowest"}), figure]
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
        return Section("context", "Context length", [])
    blocks = [_runs("context", "Every context.", runs), *_errors(study, runs, "context"), *sweep(study, "context")]
    return Section("context", "Context length", blocks)


def _runs(name: str, caption: str, runs: Sequence[Run]) -> Table:
    """Runs with their losses: nats per real token."""
    names = "name lr rank context steps validation_loss validation_loss_with_padding best_validation_loss best_step"
    titles = {"name": "run", "best_validation_loss": "lowest on the way", "best_step": "at step"}
    titles |= {"last_losses_mean": "training loss, last 10"}
    columns = named(f"{names} last_losses_mean training_flops", **titles)
    rows = [[run.title, *(run.row.get(column.name) for column in columns[1:])] for run in runs]
    found = losses(run.row for run in runs)
    caption += " Losses in nats per real token."
    marks = {(found.index(min(found)), names.split().index("validation_loss")): "lowest"}
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
