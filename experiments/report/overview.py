"""The first and the last parts of the page: the scores in short, worked examples of preprocessing, and the settings."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from experiments import plots
from experiments.forecasting.scores import best_copy, the
from experiments.report.accounting import spent_of_budget
from experiments.report.document import Column, Facts, Figure, Inline, Number, Section, Table, Text, named, over_seeds
from experiments.report.evaluation import MODEL, Evaluation
from experiments.report.records import Fields
from experiments.report.study import Study


def facts(study: Study) -> Section:
    """Best cell, final score, skill, series won, budget."""
    if not study.runs:
        return Section("facts", "In short", [])
    main = study.main()
    files = ["results.csv", study.flops_file, *(evaluation.file("scores.csv") for _, evaluation in main)]
    facts: list[tuple[str, Inline]] = [
        (f"The {study.answer[0].title}, {part}", _beside(study, study.answer[1], part))
        for part in ("validation", "test")
        if study.answer and study.answer[1].score(part)
    ]
    if best := _best(study):
        facts.append(("Best cell", best))
    final = next(((run, found) for run, found in main if run.stage == "final"), None)
    if final:
        run, evaluation = final
        about = evaluation.about
        loss, perplexity = Number(about.number("validation_loss")), Number(about.number("perplexity"))
        facts.append(("Final validation loss", [loss, " nats per real token, perplexity ", perplexity]))
        files.append(evaluation.file("evaluation.json"))
        for part in ("validation", "test"):
            if not (row := evaluation.score(part)):
                continue
            mse, low, high = (Number(row[name]) for name in ("mse", "mse_low", "mse_high"))
            interval: Inline = [mse, " over the horizon, raw units, 95 % interval ", low, " to ", high]
            facts.append((f"Final MSE, {part}", interval))
            skill, copy = Number(row["skill"]), row["reference"]
            facts.append((f"Skill over {the(copy)}, {part}", [skill, " (1 - MSE / its MSE)"]))
            won, of = Number(row["won"], "integer"), Number(row["series"], "integer")
            facts.append((f"Series won, {part}", [won, " of ", of, f" have a lower MSE than {the(copy)}"]))
    facts.append(("Budget", spent_of_budget(study)))
    if study.plan:
        files.append("study.json")
        if (share := study.plan.number("shortened")) < 1:
            cut: Inline = ["the steps and series of the protocol are cut to ", Number(share, "share"), " of it"]
            facts.append(("Shortened", cut))
    stages = list(dict.fromkeys(run.stage for run in study.runs))
    return Section("facts", "In short", [Facts(facts, files, stages)])


def _beside(study: Study, evaluation: Evaluation, part: str) -> Inline:
    """What the last model's forecasts are worth: the verdict, and the MSEs that it compares."""
    mse, untrained = evaluation.mse(part), study.untrained_mse(evaluation, part)
    best = best_copy(mse)
    parts: list[str | Number] = [f"{evaluation.verdict(part, untrained)} MSE ", Number(mse[MODEL])]
    parts += [f", {best} ", Number(mse[best])]
    return parts if untrained is None else [*parts, ", untrained ", Number(untrained)]


def _best(study: Study) -> Inline:
    """The cell that the study took on, or the lowest of a grid alone."""
    if study.plan and study.plan.values.get("best"):
        best = study.plan.fields("best")
        parts: list[str | Number] = [best.text("cell"), ": learning rate ", Number(best.number("lr"), "rate")]
        parts += [", rank ", Number(best.count("rank"), "integer")]
        if best.number_or_none("context") is not None:
            parts += [", context ", Number(best.count("context"), "integer")]
        return [*parts, " (set by hand)" if best.flag("overridden") else f" ({best.text('rule')})"]
    if run := study.best:
        return [run.row["name"], ": validation loss ", *over_seeds(study.losses(run)), " nats per real token"]
    return []


def preprocessing(study: Study) -> Section:
    """Two series from numbers to token ids, and what encoding and decoding loses."""
    title, file = "Preprocessing", "preprocessing.json"
    if not study.records.has(file):
        return Section("preprocessing", title, [])
    record = study.records.json(file)
    decimals = Number(record.count("decimals"), "integer")
    layout = f", {record.text('layout')}" if "layout" in record.values else ""
    scale = f"Scale: {record.text('alpha_rule')}; "
    blocks: list[Table | Text] = [Text([scale, decimals, f" decimals{layout}."])]
    for i, one in enumerate(record.objects("examples"), 1):
        names, system = one.texts("names"), one.count("system")
        raw, scaled = one.matrix("raw"), one.matrix("scaled")
        ids, pieces = one.counts("ids"), one.texts("pieces")
        if len(raw) != len(scaled) or any(len(row) != len(names) for row in raw + scaled):
            raise ValueError(f"{one.where}: raw and scaled differ in shape: expected a row a point, a value a name")
        if len(ids) != len(pieces):
            raise ValueError(f"{one.where}: {len(ids)} ids and {len(pieces)} pieces: expected one for one")
        columns = named("point")
        columns += [Column(f"{name}_{unit}", f"{name}, {unit}") for unit in ("raw", "scaled") for name in names]
        rows = [[p, *a, *b] for p, (a, b) in enumerate(zip(raw, scaled, strict=True), 1)]
        points = one.count("points")
        caption = f"Example {i}: the first {points} points of system {system}, before and after scaling."
        tokens = [[at, *token] for at, token in enumerate(zip(ids, pieces, strict=True), 1)]
        said = f"Example {i}: its token ids and their text."
        blocks += [
            Text([f"System {system}"], "heading"),
            Text(["Divided by ", *_divided(one), "."]),
            Table(f"preprocessing-{i}", caption, columns, rows, [file]),
            Text([one.text("text")], "pre"),
            Text([" ".join(map(str, ids))], "pre"),
            Table(f"tokens-example-{i}", said, named("position id piece", piece="text"), tokens, [file], folded=True),
        ]
    return Section("preprocessing", title, [*blocks, _round_trip(study), _check(study)])


def _divided(one: Fields) -> Inline:
    """By what an example was divided: a number, or one for each variable."""
    each = one.numbers("alphas") if "alphas" in one.values else [one.number("alpha")]
    return [part for i, alpha in enumerate(each) for part in (", " * (i > 0), Number(alpha))]


def _round_trip(study: Study) -> Table:
    trip = study.records.json("preprocessing.json").fields("round_trip")
    columns = named("unit max mean", max="largest absolute error")
    rows: list[list] = []
    for unit in ("scaled", "raw"):
        rows.append([unit, trip.number(f"max_abs_error_{unit}"), trip.number(f"mean_abs_error_{unit}")])
    rows.append(["half a unit of the last decimal, scaled", trip.number("half_unit_scaled"), None])
    caption = (
        f"Encoded and decoded again: absolute error over {trip.count('values'):,} values of {trip.count('series'):,} "
        "series."
    )
    return Table("round-trip", caption, columns, rows, ["preprocessing.json"])


def _check(study: Study) -> Figure:
    """One series beside what its tokens read back to."""
    check = study.records.json("preprocessing.json").fields("check")
    values = np.array(check.numbers("time")), np.array(check.matrix("raw")), np.array(check.matrix("decoded"))
    title = f"System {check.count('system')}"
    draw = partial(plots.round_trip, *values, check.texts("names"), title=f"{title}, encoded and decoded")
    caption = f"{title} beside what its tokens read back to, and the absolute error, in raw units."
    return Figure("round-trip-check", caption, partial(draw, label=study.label), ["preprocessing.json"])


def settings(study: Study) -> Section:
    """Every setting, version and digest, and the command of every stage."""
    columns = [Column("name", "name", "code"), Column("value", "value", "text")]
    rows = [[name, text(value)] for name, value in study.settings.items()]
    made = [[name, text(value)] for name, value in flat(study.manifest.values) if not name.startswith("commands.")]
    commands = [[stage, command] for stage, command in study.commands.items()]
    return Section(
        "settings",
        "Settings, versions, digests, commands",
        [
            Table(
                "commands",
                "The command of every stage, and of this page.",
                named("stage command"),
                commands,
                ["manifest.json"],
            ),
            Table("settings", "Every setting.", columns, rows, ["config.toml"]),
            Table("manifest", "What it was made with.", columns, made, ["manifest.json"]),
        ],
    )


def made_from(made: Sequence[Table | Figure]) -> Table:
    """The records of every figure and table of the page, and the stages whose commands make them."""
    rows = [
        [f"{'tables' if isinstance(b, Table) else 'figures'}/{b.name}.{'csv' if isinstance(b, Table) else 'png'}"]
        + [", ".join(dict.fromkeys(b.sources)), ", ".join(dict.fromkeys(b.stages))]
        for b in made
    ]
    columns = named("file records stages", stages="stages that make them")
    return Table("files", "What every figure and table is made from.", columns, rows, [], folded=True)


def records_read(study: Study) -> Table:
    """The digest of every record that the page was made from; the last of the page."""
    columns = named("file sha256", file="record")
    rows = [[name, digest] for name, digest in sorted(study.records.digests.items())]
    return Table("records", "Every record that this page was made from.", columns, rows, [], folded=True)


def flat(values: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """The values of an object and of those in it, each with its way down: "flops.training"."""
    found = []
    for name, value in values.items():
        found += flat(value, f"{above}{name}.") if isinstance(value, dict) else [(above + name, value)]
    return found


def text(value: Any) -> str:
    """A setting as the page shows it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(text, value)) if isinstance(value, list) else str(value)
