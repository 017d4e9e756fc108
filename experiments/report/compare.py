"""Runs side by side, the differences first, from the records of each folder; see `build` of the room."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments.accounting.ledger import STAGES as PARTS
from experiments.forecasting.scores import best_copy, paired_interval
from experiments.report.accounting import total
from experiments.report.document import Block, Column, Inline, Items, Section, Table, Text, named
from experiments.report.evaluation import MODEL
from experiments.report.overview import flat, records_read, text
from experiments.report.study import Run, Study
from experiments.run_folder.cells import spread
from experiments.settings.record import Settings
from experiments.study.plan import CONTROLS, update
from qwen_min.prices import CONVENTIONS

UNCOMPARED = ("begun", "commands.", "validation_systems", "test_systems", "best.")
"""What of a manifest is no way of making the run, or follows from its settings."""
Made = Mapping[str, Study]


def sections(runs: Sequence[Path]) -> tuple[list[Section], str]:
    """The page's sections, and the label that all runs have; where they differ each has its own with its name.

    Raises:
        ValueError: a folder is no run's, or there twice, or a record is broken.
    """
    studies = [Study(run) for run in runs]
    for at, run in enumerate(runs):
        if any(run.resolve() == other.resolve() for other in runs[:at]):
            raise ValueError(f"{run}: is there twice: expected other runs to compare with")
    labels = {study.label for study in studies}
    label = labels.pop() if len(labels) == 1 else ""
    made = {f"{s.root} ({s.label})" if s.label != label else str(s.root): s for s in studies}
    said = Text([f"{len(made)} runs: {', '.join(made)}."], "verdict")
    first = [said, *_differences(made), _scores(made), *_chance(made), _flops(made), _times(made)]
    digests = [
        replace(records_read(study), name=f"compare-records-{i}", caption=f"Every record of {name} that was read.")
        for i, (name, study) in enumerate(made.items(), 1)
    ]
    made_of = Section("records", "Records", digests, group="How it was made")
    return [Section("summary", "", first), made_of], label


def _differences(made: Made) -> list[Block]:
    """Settings, files and environment of the runs where they are not all the same; an older run has the default."""
    rows = []
    usual = {field.name: field.default for field in fields(Settings)}
    settings = {run: usual | study.settings for run, study in made.items()}
    manifests = {
        run: {name: value for name, value in flat(study.manifest.values) if name not in usual}
        for run, study in made.items()
    }
    for of in (settings, manifests):
        for name in dict.fromkeys(name for values in of.values() for name in values):
            shown = [text(_listed(values[name])) or "not set" if name in values else None for values in of.values()]
            if len(set(shown)) > 1 and not name.startswith(UNCOMPARED):
                rows.append([name, *shown])
    if not rows:
        return [Text(["All settings, files and environments are the same."])]
    columns = [Column("name", "name", "code"), *(Column(run, run, "text") for run in made)]
    files = [f"{study.root}/{name}" for study in made.values() for name in ("config.toml", "manifest.json")]
    return [Table("compare-settings", "What differs: settings, files, environment.", columns, rows, files, model=False)]


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _scores(made: Made) -> Table:
    """The run that each page is about, and the loss of a grid's best cell where nothing was forecast."""
    rows, files = [], []
    for name, study in made.items():
        run = study.answer[0] if study.answer else study.best or study.untrained
        if run is None:
            rows.append([name, "nothing has run", *[None] * 4, (None, None, None), *[None] * 6])
            continue
        loss, untrained = spread(study.losses(run))[0], study.untrained
        losses = [loss, untrained.row["validation_loss"] if untrained else None]
        files.append(f"{study.root}/results.csv")
        evaluation = study.answer[1] if study.answer else None
        parts = [part for part in ("validation", "test") if evaluation and evaluation.score(part)] or ["validation"]
        for part in parts:
            row = evaluation.score(part) if evaluation else None
            found: list[Any] = [None, (None, None, None), *[None] * 6]
            if evaluation and row:
                files.append(f"{study.root}/{evaluation.file('scores.csv')}")
                mse = evaluation.mse(part)
                copy = best_copy(mse)
                found = [row["series"], (row["mse"], row["mse_low"], row["mse_high"])]
                found += [study.untrained_mse(evaluation, part), mse[copy], copy, row["mae"], row["r2"], row["skill"]]
            rows.append([name, run.title, part, *(losses if part == "validation" else [None, None]), *found])
    titles = {"run": "folder", "called": "run", "loss": "validation loss", "untrained_loss": "untrained"}
    titles |= {"untrained": "MSE, untrained", "copied": "MSE, best copy", "reference": "best copy"}
    names = "run called part loss untrained_loss series mse untrained copied reference mae r2 skill"
    caption = "Scores: losses in nats per real token; errors over the horizon alone, all species, raw units."
    return Table("compare-scores", caption, named(names, "mse", **titles), rows, files, heads=3)


def _chance(made: Made) -> list[Block]:
    """Whether each run's error differs from the first one's on the same series by more than chance."""
    said: list[Inline] = []
    (first, study), *others = made.items()
    for name, other in others:
        for part in ("validation", "test"):
            if not (study.answer and other.answer):
                continue
            ours, theirs = (one.answer[1].series_mse(part, MODEL) for one in (study, other) if one.answer)
            if ours and ours.keys() == theirs.keys():
                low, high = paired_interval([theirs[series] for series in ours], [*ours.values()], seed=0)
                what = "may be" if low <= 0 <= high else "is not"
                ends = f"{low:.4g} to {high:.4g}"
                said.append([f"{part}: the MSE of {name} less that of {first} is {ends} (95 %), which {what} chance."])
    return [Text(["By a bootstrap over the same series:"]), Items(said)] if said else []


def _flops(made: Made) -> Table:
    """What was spent, and what the training is under each convention."""
    rows = []
    for name, study in made.items():
        spent = {row["part"]: row["flops"] for row in study.flops if row["stage"] == "all"} if study.runs else {}
        others = [_training(study, convention) for convention in CONVENTIONS[1:]]
        share = total(study)["share_of_budget"] if study.runs else None
        rows.append([name, *(spent.get(part) for part in (*PARTS, "total")), share, *others])
    columns = [Column("run", "folder", "text"), *(Column(part, part, "flops") for part in (*PARTS, "total"))]
    columns += named("share_of_budget", share_of_budget="of the budget")
    columns += [Column(f"training_{name}", f"training, {name}", "flops") for name in CONVENTIONS[1:]]
    caption = f"FLOPs, {CONVENTIONS[0]}; and the training under the other conventions, where the model is at hand."
    return Table(
        "compare-flops", caption, columns, rows, [f"{study.root}/{study.flops_file}" for study in made.values()]
    )


def _training(study: Study, convention: str) -> int | None:
    """FLOPs of all training steps; None where the count of a run is not that of its settings, or no model is here."""
    runs = list({run.folder: run for run in study.runs if run.row["rank"]}.values())
    counted = [run.row["training_flops"] for run in runs]
    try:
        settings = Settings().updated(dict(study.settings) | {"offline": True})
        without_minus = 12 + settings.point + bool(settings.separator)
        for symbols in (0,) if settings.vocabulary == "full" else (without_minus, without_minus + 1):
            if [_steps(settings, run, symbols, CONVENTIONS[0]) for run in runs] == counted:
                return sum(_steps(settings, run, symbols, convention) for run in runs)
    except ValueError:
        pass
    return None


def _steps(settings: Settings, run: Run, symbols: int, convention: str) -> int:
    """FLOPs of a run's training, whose loss is over so many symbols."""
    control = {"scratch": CONTROLS[run.stage]} if run.stage in CONTROLS else {}
    own = settings.updated({"context": run.row["context"]} | control)
    return update(own, run.row["rank"], symbols, convention) * run.row["steps"]


def _times(made: Made) -> Table:
    """When each run began, and when its last result was written."""
    rows, files = [], ("result.json", "evaluation/evaluation.json")
    for name, study in made.items():
        begun = str(study.manifest.values.get("begun", "")) or None
        results = [study.root / run.folder / file for run in study.runs for file in files]
        ended = max((path.stat().st_mtime for path in results if path.is_file()), default=None)
        last = datetime.fromtimestamp(ended, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if ended else None
        hours = None
        if begun and ended:
            try:
                hours = (ended - datetime.fromisoformat(begun).timestamp()) / 3600
            except ValueError:
                raise ValueError(f"{study.manifest.where}: begun is {begun!r:.60}: expected a time") from None
        rows.append([name, begun, last, hours])
    columns = [Column("run", "folder", "text"), Column("begun", "begun", "text"), Column("ended", "ended", "text")]
    caption = "Times: from the beginning to the last result, by the time of its file; pauses between starts count too."
    return Table("compare-times", caption, [*columns, Column("hours", "hours")], rows, ["manifest.json"], model=False)
