"""The numbers that a report printed, each beside ours, which is looked up in the records."""

from collections.abc import Mapping
from typing import Any

from experiments.report.document import Block, Column, Section, Table, Text, named
from experiments.report.records import Fields
from experiments.report.study import STAGES, TITLES, Study

PROTOCOL = "protocol.toml"
BESIDE = (Column("claimed", "the report"), Column("ours", "ours"))


def look_up(study: Study, folder: str, where: Mapping[str, Any]) -> float | None:
    """The number that `where` names in a run's folder: its `file`, and there `column` of the row that `match` fits,
    or for JSON the key. None where the run has no such file, or the file no such row.

    Raises:
        ValueError: the file has no such column, or more than one such row.
    """
    entry = Fields(str(study.root / PROTOCOL), where)
    file, column = f"{folder}/{entry.text('file')}", entry.text("column")
    if not study.records.has(file):
        return None
    if file.endswith(".json"):
        return study.records.json(file).number_or_none(column)
    match = {name: str(value) for name, value in where.get("match", {}).items()}
    rows = study.records.csv(file, **dict.fromkeys(match, "text"), **{column: "number or nothing"})
    found = [row for row in rows if match.items() <= row.items()]
    if len(found) > 1:
        raise ValueError(f"{study.root / file}: {len(found)} rows have {match}: expected one, as {PROTOCOL} asks for")
    return found[0][column] if found else None


def source(where: Mapping[str, Any]) -> str:
    """Where ours is recorded, in words: file, column, and what its row matches."""
    row = "".join(f", {value}" for value in where.get("match", {}).values())
    return f"{where.get('file', '')}: {where.get('column', '')}{row}"


def sweep(study: Study, stage: str) -> list[Block]:
    """The report's own numbers of the grid or of the contexts, each beside ours of the same choice.

    There is a table for each part of `claimed` whose name begins as the stage's, such as "grid" and "grid_loss"."""
    tables = [_sweep(study, stage, name) for name in study.claimed if name.split("_")[0] == stage]
    return [*(_not_comparable(study) if tables else []), *tables]


def _not_comparable(study: Study) -> list[Block]:
    """A warning where ours are the numbers of a toy."""
    said = f"Not comparable: ours are the numbers of a {study.label}, the report's those of Qwen2.5-0.5B."
    return [Text([said], "warning")] if study.label.startswith("toy") else []


def _sweep(study: Study, stage: str, name: str) -> Table:
    key, by = ("cells", ("lr", "rank")) if stage == "grid" else ("values", ("context",))
    entry = Fields(f"{study.root / PROTOCOL}", study.claimed).fields(name)
    measure, where = entry.text("measure"), dict(entry.values)
    if "file" not in where and measure.startswith("validation loss"):
        where |= {"file": "result.json", "column": "validation_loss"}
    rows, files = [], [PROTOCOL]
    for one in entry.objects(key):
        choice = {field: one.number(field) for field in by}
        same = [run for run in study.of(stage) if choice.items() <= run.row.items()]
        ours = look_up(study, same[0].folder, where) if same and "file" in where else None
        if ours is not None:
            files.append(f"{same[0].folder}/{where['file']}")
        rows.append([*choice.values(), one.number("value"), ours])
    columns = [*named(" ".join(by)), *BESIDE]
    caption = f"The report's own numbers ({measure}) beside ours, where ours has the same choice"
    caption += f" ({source(where)})." if "file" in where else "."
    return Table(f"{name.replace('_', '-')}-claimed", caption, columns, rows, files, [stage], heads=len(by))


def figures(study: Study) -> Section:
    """Every other number of the report beside ours."""
    title = "Claimed beside ours"
    if not (claimed := study.claimed.get("figure")):
        return Section("claimed", title, [])
    rows, files, ran = [], [PROTOCOL], []
    for one in Fields(str(study.root / PROTOCOL), {"figure": claimed}).objects("figure"):
        stage = one.text("stage")
        if stage not in STAGES:
            raise ValueError(f"{one.where}: stage is {stage!r}: expected one of {', '.join(STAGES)}")
        ours, run = None, next(iter(study.of(stage)), None)
        if run:
            ours = look_up(study, run.folder, one.values)
            if ours is not None:
                files.append(f"{run.folder}/{one.text('file')}")
            ran.append(stage)
        state = "" if ours is not None else "not recorded" if run else "not run"
        how = state or (one.text("ours") if "ours" in one.values else "")
        rows.append([TITLES.get(stage, stage), one.text("what"), one.number("value"), ours, how, source(one.values)])
    columns = [*named("stage what", stage="run"), *BESIDE, *named("how record", how="how ours is found")]
    caption = "The report's own numbers beside ours, found in the records of the same stage."
    table = Table("claimed", caption, columns, rows, list(dict.fromkeys(files)), list(dict.fromkeys(ran)), heads=2)
    return Section("claimed", title, [*_not_comparable(study), table] if ran else [])
