"""How good the forecasts are: over every series, beside forecasts that need no model, and by horizon step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from experiments import plots
from experiments.forecasting.judge import yes_or_no
from experiments.report.document import Block, Column, Figure, Inline, Items, Section, Table, Text, named
from experiments.report.evaluation import MODEL, Evaluation
from experiments.report.records import Row
from experiments.report.study import Run, Study

SQUARED = "MSE (raw units squared)"
ERRORS = ("rmse", "mae", "mape", "smape", "mase", "wql")
ANCHORS = (
    "MASE is the error over that of the one-step naive forecast within the context, without the variables that are "
    "constant there; sMAPE 2 |error| / (|value| + |forecast|); WQL the weighted quantile loss."
)


def together(study: Study) -> Section:
    """How good the forecasts are: the model by stage, the copies and the law's fit, in a table and by step."""
    blocks: list[Block] = []
    for part in ("validation", "test"):
        if study.answer and study.answer[1].score(part):
            blocks.append(_errors(study, part))
            if any(row["part"] == part for row in study.answer[1].horizon):
                blocks.append(_by_step(study, part))
    return Section("good", "The model beside the copies and the law", blocks)


def _errors(study: Study, part: str) -> Table:
    """MSE, MAE and R2 of the model by stage, and of what needs no model."""
    assert study.answer
    runs = [(run, one) for run, one in study.main() if one.score(part)]
    found = [(run.title, one.by_forecaster(part)[MODEL]) for run, one in runs]
    found += [(name, row) for name, row in study.answer[1].by_forecaster(part).items() if name != MODEL]
    ends = [(name, row, tuple(row[f"mse{end}"] for end in ("", "_low", "_high"))) for name, row in found]
    rows = [[name, mse, row["mae"], row["r2"]] for name, row, mse in ends]
    columns = named("forecaster mse mae r2", intervals="mse")
    caption = (
        f"Errors over the horizon of the {part} series, all species, raw units: the model by stage, and without one."
    )
    files, stages = [one.file("scores.csv") for _, one in runs], [run.stage for run, _ in runs]
    return Table(f"good-{part}", caption, columns, rows, files, stages)


def _by_step(study: Study, part: str) -> Figure:
    """MSE by step of the horizon: the model of every stage, and what needs no model."""
    assert study.answer
    _, evaluation = study.answer
    runs = [(run, one) for run, one in study.main() if one.score(part)]
    lines = {run.title: _mse(_steps(study, one, part))[MODEL] for run, one in runs}
    lines |= {name: line for name, line in _mse(_steps(study, evaluation, part)).items() if name != MODEL}
    said = {"ylabel": SQUARED, "title": f"Error by step of the horizon, {part} series", "label": study.label}
    draw = partial(plots.horizon_error, lines, strong=[run.title for run, _ in runs], **said)
    caption = (
        f"MSE at each step of the horizon over the {part} series, raw units: the model by stage, and without a model."
    )
    return Figure(
        f"horizon-{part}", caption, draw, [e.file("horizon.csv") for _, e in runs], [run.stage for run, _ in runs]
    )


def by_stage(study: Study) -> Section:
    """The untrained model, the default run and the final run beside each other, and the plan they belong to."""
    blocks: list[Block] = []
    if main := study.main():
        rows = []
        for run, evaluation in main:
            for part in evaluation.parts:
                if row := evaluation.score(part):
                    loss = evaluation.about.number("validation_loss") if part == "validation" else None
                    mse = row["mse"], row["mse_low"], row["mse_high"]
                    kept = [row[name] for name in (*ERRORS, "r2", "skill", "reference", "won", "series", "win_rate")]
                    trained = evaluation.about.values.get("trained_on_this_data")
                    rows.append([run.title, part, loss, mse, *kept, trained if trained is None else yes_or_no(trained)])
        names = f"run part loss mse {' '.join(ERRORS)} r2 skill reference won series win_rate trained_on_this_data"
        columns = named(names, intervals="mse", loss="validation loss", series="of")
        caption = (
            f"The model by stage: errors over {main[0][1].scored} alone, all species, raw units. Skill is 1 - MSE / "
            "MSE of the copy that is named, the better of the seasonal repeat and context parroting; a series is won "
            f"where the model's MSE is lower. {ANCHORS} Loss in nats per real token."
        )
        files = [evaluation.file(name) for _, evaluation in main for name in ("scores.csv", "evaluation.json")]
        stages = [run.stage for run, _ in main]
        blocks.append(Table("by-stage", caption, columns, rows, files, stages, heads=2).without_empty())
        said: list[Inline] = [
            [f"{run.title.capitalize()}, {part}: {found.verdict(part, study.untrained_mse(found, part))}"]
            for run, found in main
            for part in ("validation", "test")
            if found.score(part)
        ]
        blocks.append(Items(said))
        blocks += [_bars(study, main, part) for part in ("validation", "test") if main[-1][1].score(part)]
        blocks += [_losses(main), _unparsed(main)]
    if study.plan:
        blocks.append(_plan(study))
    return Section("stages", "By stage", blocks)


def scores(study: Study) -> Section:
    """Every measure of every forecaster, by part, species and unit; and the error by horizon step."""
    blocks: list[Block] = []
    for run, evaluation in reversed(study.main()):
        blocks.append(Text([run.title.capitalize()], "heading"))
        for each in (False, True):
            for unit, as_what in (("raw", ""), ("scaled", ", as the reports have them")):
                rows = [r for r in evaluation.scores if r["unit"] == unit and (r["variable"] != "all") == each]
                if rows:
                    blocks.append(_scores(run, evaluation, rows, each, f"{unit} units", as_what))
        for part in ("validation", "test"):
            if any(row["part"] == part for row in evaluation.horizon):
                blocks.append(_horizon(study, run, evaluation, part))
    return Section("scores", "Scores of all forecasters", blocks)


def _scores(run: Run, evaluation: Evaluation, rows: Sequence[Row], each: bool, unit: str, as_what: str) -> Table:
    """The scores in one unit: over all species, or of `each`, which is folded."""
    names = (
        "part forecaster variable series mse rmse mae mape smape mase wql r2 skill reference difference won win_rate "
    )
    columns = named(f"{names} unparsed_steps steps", intervals="mse mae difference", difference="MSE - its", steps="of")
    if not each:
        columns = [column for column in columns if column.name != "variable"]
    copied = {_key(row): row["mse"] for row in rows if row["forecaster"] == row["reference"]}
    values = []
    for row in rows:
        known = row["difference_low"] is not None and _key(row) in copied
        own = row | {"difference": row["mse"] - copied[_key(row)] if known else None}
        intervals = [column.name for column in columns if column.kind == "interval"]
        ends = {name: (own[name], own[f"{name}_low"], own[f"{name}_high"]) for name in intervals}
        values.append([ends[c.name] if c.name in ends else own[c.name] for c in columns])
    what = f"{run.title}, {'each' if each else 'all'} species, {unit}{as_what}"
    caption = f"Scores over {evaluation.scored}, {what}; intervals by a bootstrap over series. {ANCHORS}"
    name = f"scores-{run.stage}{'-species' * each}{'-scaled' * unit.startswith('scaled')}"
    made = Table(name, caption, columns, values, [evaluation.file("scores.csv")], [run.stage], choice=unit)
    return replace(made, heads=3 if each else 2, folded=each).without_empty()


def with_interval(row: Row) -> tuple[float, float, float]:
    """MSE and the ends of its interval, NaN where it has none."""
    low, high = (math.nan if row[f"mse_{end}"] is None else row[f"mse_{end}"] for end in ("low", "high"))
    return row["mse"], low, high


def _key(row: Row) -> tuple[str, str, str]:
    return row["part"], row["unit"], row["variable"]


def _bars(study: Study, main: Sequence[tuple[Run, Evaluation]], part: str) -> Figure:
    """MSE of every forecaster, and of the model by stage."""
    bars: dict[str, tuple[float, float, float]] = {}
    found = [
        (run.title if row["forecaster"] == MODEL else row["forecaster"], row)
        for run, evaluation in main
        for row in evaluation.scores
        if (row["part"], row["unit"], row["variable"]) == (part, "raw", "all")
    ]
    # the same series, so the forecasts without a model score the same in every run
    for name, row in sorted(found, key=lambda one: one[1]["forecaster"] != MODEL):
        bars[name] = with_interval(row)
    said = {"xlabel": SQUARED, "title": f"MSE over the {part} series, 95 % interval", "label": study.label}
    draw = partial(plots.score_bars, bars, strong=[run.title for run, _ in main], **said)
    caption = (
        f"MSE over the horizon of every {part} series, raw units, with its 95 % interval: the model by stage, and "
        "forecasts without a model."
    )
    files = [evaluation.file("scores.csv") for _, evaluation in main]
    return Figure(f"mse-{part}", caption, draw, files, [run.stage for run, _ in main])


def _losses(main: Sequence[tuple[Run, Evaluation]]) -> Table:
    rows, parts = [], list(dict.fromkeys(part for _, evaluation in main for part in evaluation.parts))
    for run, evaluation in main:
        about = evaluation.about
        own = [about.number("validation_loss"), about.number_or_none("validation_loss_with_padding")]
        rows.append([run.title, *own, about.number("perplexity"), about.count("validation_tokens")])
        for part in parts:
            rows[-1] += [about.number_or_none(f"horizon_{what}.{part}") for what in ("loss", "perplexity")]
    names = "run validation_loss validation_loss_with_padding perplexity validation_tokens"
    columns = named(names, validation_tokens="real tokens")
    for part in parts:
        columns += [Column(f"horizon_{what}_{part}", f"horizon {what}, {part}") for what in ("loss", "perplexity")]
    caption = (
        "Token cross-entropy in nats per real token, and perplexity, its exponential: over the validation windows, and "
        "over the tokens of the true horizon after its context."
    )
    files = [evaluation.file("evaluation.json") for _, evaluation in main]
    return Table("losses", caption, columns, rows, files, [run.stage for run, _ in main]).without_empty()


def _unparsed(main: Sequence[tuple[Run, Evaluation]]) -> Table:
    rows = []
    for run, evaluation in main:
        for part in evaluation.parts:
            lost, of = (evaluation.about.count(f"{name}_steps.{part}") for name in ("unparsed", "forecast"))
            rows.append([run.title, part, lost, of, lost / of if of else None])
    columns = named("run part unparsed steps share", unparsed="not parsed", steps="of steps")
    caption = "Steps of the forecasts that did not parse; each is scored as persistence, none is dropped or moved."
    files = [evaluation.file("evaluation.json") for _, evaluation in main]
    return Table("unparsed", caption, columns, rows, files, [run.stage for run, _ in main], heads=2)


def _plan(study: Study) -> Table:
    assert study.plan
    ran = {(run.stage, run.folder) for run in study.runs}
    rows: dict[tuple, list] = {}
    for one in study.plan.objects("stages"):
        flops = one.fields("predicted")
        known: list = [one.text("stage"), one.text("name"), one.number("lr"), one.count("rank")]
        known += [one.count("context"), one.count("steps")]
        predicted = sum(flops.count(part) for part in flops.values)
        at = known[0], one.text("folder")
        rows.setdefault(at, [*known, predicted, "run" if at in ran else "not run"])
    columns = named("stage name lr rank context steps predicted state", name="run", predicted="predicted FLOPs")
    files = ["study.json", *(["results.csv"] if study.runs else [])]
    return Table("plan", "Every run that was planned.", columns, list(rows.values()), files, heads=2)


def _steps(study: Study, evaluation: Evaluation, part: str) -> dict[tuple[str, str], list[Row]]:
    """The rows of horizon.csv of a part by forecaster and species, one for each step."""
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in evaluation.horizon:
        if row["part"] == part:
            lines.setdefault((row["forecaster"], row["variable"]), []).append(row)
    steps = sorted({row["step"] for rows in lines.values() for row in rows})
    for of, rows in lines.items():
        rows.sort(key=lambda row: row["step"])
        if missing := set(steps) - {row["step"] for row in rows}:
            where, step = study.root / evaluation.file("horizon.csv"), min(missing)
            raise ValueError(f"{where}: part {part} has no row of {of}, step {step}: expected each step of each")
    return lines


def _mse(lines: Mapping[tuple[str, str], Sequence[Row]]) -> dict[str, list[float]]:
    """The MSE by step of each forecaster, all variables."""
    return {name: [row["mse"] for row in rows] for (name, variable), rows in lines.items() if variable == "all"}


def _horizon(study: Study, run: Run, evaluation: Evaluation, part: str) -> Table:
    found = _steps(study, evaluation, part)
    lines, own = _mse(found), found[MODEL, "all"]
    steps, mae = [row["step"] for row in own], [row["mae"] for row in own]
    running = {v: [row["running_rmse"] for row in rows] for (name, v), rows in found.items() if name == MODEL}
    name, file = f"horizon-{run.stage}-{part}", [evaluation.file("horizon.csv")]
    columns = named("step")
    columns += [Column(f"mse_{name.replace(' ', '_')}", f"MSE, {name}") for name in lines]
    columns += [Column("mae_model", "MAE, model")]
    columns += [Column(f"running_rmse_{v}", f"running RMSE, model, {v}") for v in running]
    values = [
        [step, *(line[i] for line in lines.values()), mae[i], *(line[i] for line in running.values())]
        for i, step in enumerate(steps)
    ]
    caption = f"Error by horizon step over the {part} series, {run.title}, raw units."
    return Table(name, caption, columns, values, file, [run.stage], folded=True)
