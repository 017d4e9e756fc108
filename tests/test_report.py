"""The page of a run: every number from a record of its folder, whole or not at all, readable without a network."""

import csv
import io
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import unescape
from html.parser import HTMLParser
from inspect import isfunction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import study_folder
from waves import dot

from experiments import plots, report
from experiments.accounting.predict import predict
from experiments.forecasting.scores import verdict as verdict_of
from experiments.report.document import Column, Facts, Figure, Table, Text, shown
from experiments.report.study import Study
from experiments.report.training import verdict
from experiments.run_folder import files
from qwen_min import QwenConfig

Change = Callable[[Path], Any]
Calls = list[tuple[str, str]]


@contextmanager
def sketching(but: Sequence[str] = ()) -> Iterator[Calls]:
    """Yield what is asked to be drawn, (function, arguments); each picture but some is one dot, which takes no time."""
    asked: Calls = []

    def sketch(name: str) -> Callable[..., None]:
        def draw(*arguments: Any, **options: Any) -> None:
            dot(Path(options.pop("path")))
            asked.append((name, re.sub(r"\s+", " ", repr((arguments, options)))))

        return draw

    with pytest.MonkeyPatch.context() as patch:
        for name in (name for name, found in vars(plots).items() if isfunction(found) and name not in but):
            patch.setattr(plots, name, sketch(name))
        yield asked


class Page(HTMLParser):
    """A page's elements; fails where one is not closed."""

    VOID = {"meta", "img"}

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, str] = {}
        self.values: dict[str, list[str]] = {}  # the exact numbers by section
        self.sections: list[str] = []
        self.section = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = attributes["id"]
            self.sections.append(self.section)
        if tag == "data":
            self.values.setdefault(self.section, []).append(attributes["value"])

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.texts[self.section] = self.texts.get(self.section, "") + data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


class Built(NamedTuple):
    folder: Path
    html: str
    calls: Calls

    @property
    def page(self) -> Page:
        return Page(self.html)

    def table(self, name: str, **where: Any) -> list[dict[str, str]]:
        return rows_of(self.folder / "tables" / f"{name}.csv", **where)

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())


def build(folder: Path) -> Built:
    with sketching() as calls:
        path = report.build(folder)
    return Built(folder, path.read_text(), calls)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Built:
    return build(study_folder.write(tmp_path_factory.mktemp("made") / "study"))


@pytest.fixture(scope="module")
def sampled(tmp_path_factory) -> Built:
    """The same with constrained samples, and without a label."""
    folder = tmp_path_factory.mktemp("sampled") / "study"
    return build(study_folder.write(folder, label="", num_samples=5, constrained=True))


@pytest.fixture
def study(made, tmp_path) -> Path:
    return shutil.copytree(made.folder, tmp_path / "study", ignore=shutil.ignore_patterns("figures", "tables"))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows_of(path: Path, **where: Any) -> list[dict[str, str]]:
    rows = csv.DictReader(io.StringIO(path.read_text()))
    return [row for row in rows if all(row[name] == str(value) for name, value in where.items())]


def named(folder: Path, kind: type) -> dict[str, Any]:
    """The tables, or the figures, of a page by their names, without rendering; no name is given twice."""
    blocks = report.blocks(report.annotated(Study(folder)), kind)
    assert len({block.name for block in blocks}) == len(blocks)
    return {block.name: block for block in blocks}


def change_csv(column: str, value: Any, **where: Any) -> Change:
    def change(path: Path) -> None:
        rows = rows_of(path)
        row = next(r for r in rows if all(r[name] == str(v) for name, v in where.items()))
        assert column in row
        row[column] = str(value)
        files.write_csv(path, rows)

    return change


def put(record: Any, key: str, value: Any) -> None:
    """Put a value at a key of JSON; "stages/2/lr" goes down."""
    *above, last = [int(part) if part.isdecimal() else part for part in key.split("/")]
    for part in above:
        record = record[part]
    assert last in record
    record[last] = value


def change_json(key: str, value: Any) -> Change:
    """Also of a file of lines, whose key begins with the line's number."""

    def change(path: Path) -> None:
        of_lines = path.suffix == ".jsonl"
        record: Any = (files.read_jsonl if of_lines else files.read_json)(path)
        put(record, key, value)
        (files.write_jsonl if of_lines else files.write_json)(path, record)

    return change


def change_text(old: str, new: str) -> Change:
    def change(path: Path) -> None:
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return change


def texts(folder: Path) -> dict[str, str]:
    """The paragraphs and facts of each section, without rendering."""
    found = {}
    for section in report.annotated(Study(folder)):
        parts = [report.inline(block.parts) for block in section.blocks if isinstance(block, Text)]
        parts += [report.inline(p) for b in section.blocks if isinstance(b, Facts) for _, p in b.facts]
        found[section.id] = " ".join(parts)
    return found


# The page as a whole


def test_the_page_of_a_grid_alone_is_drawn_without_what_was_not_run(tmp_path):
    folder = study_folder.write_grid(tmp_path / "grid")
    (folder / "cells/lr1e-05-r2/clock.jsonl").unlink()  # as in a run of an earlier version: no loss over time
    page = Page(report.build(folder).read_text())
    assert page.sections == ["summary", "facts", "accounting", "grid", "training", "settings"]
    assert not [section for section, text in page.texts.items() if "not run" in text]
    assert "the validation loss of lr0.0001-r8 is" in page.texts["summary"] and "lowest" in page.texts["grid"]
    drawn = {path.name: path.read_bytes() for path in (folder / "figures").iterdir()}
    assert drawn.keys() == {"budget.png", "loss-cells-by-step.png", "loss-cells-by-flops.png", "grid.png"}
    assert len(set(drawn.values())) == len(drawn)  # no picture under two names
    rows = rows_of(folder / "results.csv")
    spent = sum(int(row["training_flops"]) + int(row["validation_flops"]) for row in rows)
    total = rows_of(folder / "tables" / "flops.csv")[-1]
    assert (int(total["flops"]), float(total["share_of_budget"])) == (spent, spent / study_folder.BUDGET)
    images = page.all("svg")
    assert len(images) == len(drawn) and not page.all("img")
    sizes = [[float(side) for side in image["viewbox"].split()] for image in images]
    assert all(width > 400 and height > 100 for _, _, width, height in sizes)
    assert len((folder / "report.html").read_bytes()) < 3_000_000


def test_the_page_of_a_grid_that_forecasts_answers_with_its_best_cell_and_has_every_cells_mse(tmp_path):
    judged = {"untrained": 0.1, "cells/lr0.0001-r8": 0.3, "cells/lr1e-05-r2": 0.05}
    built = build(study_folder.write_grid(tmp_path / "grid", judged=judged))
    assert "training has made the forecasts" in built.page.texts["summary"]
    losses = [shown(float(row["validation_loss"])) for row in rows_of(built.folder / "results.csv")]
    said = re.search(r"Validation loss: (\S+) untrained, (\S+) after training\.", built.page.texts["summary"])
    assert said and list(said.groups()) == [losses[0], min(losses)]
    assert re.findall("<dt>(.*?)</dt>", built.html)[:2] == ["untrained", "best cell"]
    whole = {"part": "validation", "forecaster": "model", "unit": "raw", "variable": "all"}
    mse = {run: rows_of(built.folder / run / "evaluation/scores.csv", **whole)[0]["mse"] for run in judged}
    assert built.page.values["summary"][1::3][:2] == [mse["untrained"], mse["cells/lr0.0001-r8"]]
    by_rate = {row["lr"]: row for row in built.table("grid-mse")}
    assert by_rate["0.0001"]["rank_8"] == mse["cells/lr0.0001-r8"]
    assert by_rate["1e-05"]["rank_2"] == mse["cells/lr1e-05-r2"]
    (bars,) = [call for name, call in built.calls if name == "score_bars" and "every cell" in call]
    names = [*("lr1e-05-r2", "lr0.0001-r8", "untrained model"), *("persistence", "context mean", "seasonal repeat")]
    assert [name for name in names if f"'{name}': ({''}" in bars] == names


VERDICTS = {
    "worse": (lambda untrained, copy: 2 * untrained, "training has made the forecasts 2.0 times worse than the"),
    "equal": (lambda untrained, copy: untrained, "training has left the forecasts about as good as the untrained"),
    "better": (lambda untrained, copy: 3 * copy, "untrained model's, and still 3.0 times worse than copying the past"),
    "best": (lambda untrained, copy: copy / 2, "untrained model's, and 2.0 times better than copying the past (seaso"),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_the_verdict_says_whether_training_helped(case, study, made):
    mse_of, said = VERDICTS[case]
    whole = {"part": "validation", "unit": "raw", "variable": "all"}
    (untrained,) = rows_of(study / "untrained/evaluation/scores.csv", forecaster="model", **whole)
    copies = [row for row in rows_of(study / "final/evaluation/scores.csv", **whole) if row["forecaster"] != "model"]
    copy = min(float(row["mse"]) for row in copies)
    change = change_csv("mse", mse_of(float(untrained["mse"]), copy), forecaster="model", **whole)
    change(study / "final/evaluation/scores.csv")
    (flops,) = rows_of(study / "flops.csv", stage="all", part="total")
    verdict = texts(study)["summary"]
    assert verdict.startswith(f"After {shown(int(flops['flops']), 'flops')} FLOPs ") and said in verdict


def test_the_figures_that_a_grid_has_not_are_drawn_from_the_records_of_a_study(sampled, tmp_path):
    """One of each kind; the other tests look at what is asked to be drawn."""
    figures = named(sampled.folder, Figure)
    kinds = ("mse-test", "gradients-final", "forecasts-final", "running-rmse-final", "phase-final", "glance")
    for name in (*kinds, "token-loss-final", "horizon-validation"):
        path = tmp_path / f"{name}.png"
        figures[name].draw(path=path)
        assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 5000


def test_the_page_stands_alone_and_is_sound_html(made, sampled):
    for built in (made, sampled):
        page = built.page
        assert not {"link", "iframe", "img"} & {tag for tag, _ in page.elements} and "http" not in built.html
        assert page.all("script") == [{}] and re.search(r"<script>\n\"use strict\";", built.html)
        ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
        assert len(ids) == len(set(ids))
        for target in (link["href"] for link in page.all("a")):
            assert target[1:] in ids if target.startswith("#") else (built.folder / target).is_file(), target
        assert all(image["aria-label"] for image in page.all("svg"))
        assert all(cell["scope"] in ("row", "col") for cell in page.all("th"))
        assert len(page.all("caption")) == len(page.all("table"))
        assert built.html.count('<div class="scroll"') == len(page.all("table"))
        shadows = re.search(r"\.scroll {[^}]* local,[^}]* local,[^}]*--edge[^}]*--edge", built.html)
        assert shadows  # which say that there is more of a table
        viewport = next(meta["content"] for meta in page.all("meta") if meta.get("name") == "viewport")
        assert viewport == "width=device-width, initial-scale=1"


def test_on_a_phone_a_row_of_a_wide_table_is_lines_with_its_columns_titles(made):
    rules = re.findall(
        r'#table-([\w-]+) tbody :is\(td, th.n\):nth-child\((\d+)\)::before { content: "(.*?)"; }', made.html
    )
    tables = named(made.folder, Table)
    assert rules == [
        (name, str(at), re.sub(r"[^\w]", lambda c: f"\\{ord(c[0]):x} ", column.title))
        for name, table in tables.items()
        if len(table.columns) > report.NARROW
        for at, column in enumerate(table.columns, 1)
    ]
    assert ("by-stage", "4", r"MSE\20 \28 95\20 \25 \20 interval\29 ") in rules
    stacked = set(re.findall(r'<div class="block stack" id="table-([\w-]+)"', made.html))
    assert stacked == {name for name, *_ in rules} != tables.keys()


def test_the_markdown_links_every_figure_and_table_that_was_written(made):
    text = (made.folder / "report.md").read_text()
    for kind in ("figures", "tables"):
        linked = {Path(link).name for link in re.findall(rf"\]\(({kind}/[^)]+)\)", text)}
        assert linked == {path.name for path in (made.folder / kind).iterdir()} and linked


def test_each_row_of_a_markdown_table_has_a_cell_for_each_column(made):
    lines = (made.folder / "report.md").read_text().splitlines()
    rules = [i for i, line in enumerate(lines) if line.startswith("|---")]
    assert len(rules) == len(list((made.folder / "tables").iterdir()))
    for rule in rules:
        rows = [lines[rule - 1], *lines[rule + 1 :]]
        rows = rows[: next(i for i, line in enumerate(rows) if not line.startswith("|"))]
        assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {lines[rule].count("|")}


def test_made_again_it_has_the_same_bytes_and_leaves_nothing_behind(made):
    once = contents(made.folder)
    build(made.folder)
    assert contents(made.folder) == once
    assert not [name for name in once if ".tmp" in name]


def test_of_every_table_and_figure_the_records_and_their_commands_stand_in_one_table(made):
    listed = {row["file"]: row for row in made.table("files")}
    written = {f"{kind}/{path.name}" for kind in ("figures", "tables") for path in (made.folder / kind).iterdir()}
    assert written - listed.keys() == {"tables/files.csv", "tables/records.csv"} and listed.keys() <= written
    digests = {row["file"]: row["sha256"] for row in made.table("records")}
    for row in listed.values():
        for name in row["records"].split(", "):
            assert digests[name] == files.file_digest(made.folder / name), row["file"]
    assert listed["figures/forecasts-final.png"]["stages"] == "final"
    (command,) = [row["command"] for row in made.table("commands", stage="final")]
    assert command == "python -m experiments.run final --out RUN" and command in made.html
    assert unescape(made.html).count(f"experiments.run report {shlex.quote(str(made.folder))}") == 2  # and as a command


def test_the_label_stands_over_the_page_once_and_in_every_figure_and_table_that_leaves_it(made, sampled):
    for built, label in ((made, study_folder.TOY), (sampled, "")):
        assert built.html.count('class="label"') == built.html.count(f'class="label">{label}<') == bool(label)
        assert not [name for name, call in built.calls if label and label not in call]
        for path in (built.folder / "tables").iterdir():
            expected = "" if path.stem == "systems-naive" else label
            assert all(row.get("label", "") == expected for row in rows_of(path)), path.name


def test_everything_below_the_first_screen_is_folded_and_of_each_fold_the_first_part_opens_with_it(made):
    _, *below = re.split(r'(?=<details class="group"|<footer>)', made.html)
    assert [re.findall("<h2>(.*?)</h2>", fold) for fold in below] == [
        *(["How good"], ["What it cost"], ["How it was found"], ["How it was made"], [])
    ]
    for fold in below[:-1]:
        assert re.findall(r'<details class="(\w+)"( open)?>', fold)[:2] == [("group", ""), ("part", " open")]
        assert fold.count(" open>") == 1
    assert made.page.sections[:2] == ["summary", "good"] and made.html.index('id="good"') > made.html.index("How good")


def test_a_text_of_a_record_is_shown_and_never_run(study):
    change_text("Fung: four systems", "<script>alert(1)</script> | a & b")(study / "protocol.toml")
    html = build(study).html
    assert html.count("<script>") == 1 and "<script>" not in (study / "report.md").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt; | a &amp; b" in html


HOSTILE = "<script>a</script> \"'`x`| \x1b[2J\n\n# H\n- [a](javascript:b) ![i](http://c/d.png) $x$"


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("manifest.json", change_json("label", HOSTILE)),
        ("manifest.json", change_json("commands/final", HOSTILE)),
        ("manifest.json", change_json("versions/torch", HOSTILE)),
        ("preprocessing.json", change_json("examples/0/text", HOSTILE)),
        ("preprocessing.json", change_json("examples/0/names", [HOSTILE, "b"])),
        ("results.csv", change_csv("name", HOSTILE, name="lr5e-05-r4")),
        ("final/evaluation/evaluation.json", change_json("sampling", HOSTILE)),
        ("final/evaluation/systems.csv", change_csv("class", HOSTILE, unique_id=17)),
        ("accounting.json", change_json("mistakes", [HOSTILE])),
    ],
)
def test_a_text_of_a_record_makes_no_element_no_link_no_heading_and_no_control(file, change, study):
    """Bug: a label and a command went into report.md as they were."""
    change(study / file)
    page, text = build(study).page, (study / "report.md").read_text()
    assert len(page.all("script")) == 1 and not page.all("b") + page.all("img")
    assert len(page.all("svg")) == len(list((study / "figures").iterdir()))
    assert all(link["href"].startswith(("#", "tables/", "figures/")) for link in page.all("a"))
    assert "\x1b" not in text + (study / "report.html").read_text()
    for line in text.split("\n"):
        if not line.startswith("    "):  # of code
            assert "<script" not in line and not re.search(r"^# H|(?<!\\)\]\((javascript|http)", line), line


# Every number from a record


def test_every_number_of_the_summary_is_found_in_a_record(made):
    def scalars(value: Any) -> set[str]:
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return {str(value)} if inside is None else set().union(*map(scalars, inside))

    recorded: set[str] = set()
    for path in made.folder.rglob("*"):
        if path.parent.name != "tables" and path.suffix in (".json", ".csv"):
            recorded |= scalars(made.json(str(path)) if path.suffix == ".json" else rows_of(path))
    summary, found = (made.page.values[section] for section in ("summary", "facts"))
    assert (len(summary), len(found)) == (16, 26)
    assert set(summary + found) <= recorded
    whole = {"part": "validation", "unit": "raw", "variable": "all"}
    (untrained,) = rows_of(made.folder / "untrained/evaluation/scores.csv", forecaster="model", **whole)
    ours = {row["forecaster"]: row for row in rows_of(made.folder / "final/evaluation/scores.csv", **whole)}
    beside = [untrained, ours["model"], ours["seasonal repeat"]]
    assert summary[1:10] == [row[column] for row in beside for column in ("mse", "mse_low", "mse_high")]
    assert found[2] == untrained["mse"] and untrained["mse"] not in found[3:]
    for part, first, start in (("validation", 0, 10), ("test", 3, 16)):
        (row,) = rows_of(made.folder / "final/evaluation/scores.csv", forecaster="model", **whole | {"part": part})
        assert found[first] == row["mse"]
        columns = ("mse", "mse_low", "mse_high", "skill", "won", "series")
        assert found[start : start + 6] == [row[column] for column in columns]


def test_the_final_model_stands_first_beside_the_best_copy_and_the_untrained_one(made):
    mse = {
        (run, row["part"], row["forecaster"]): float(row["mse"])
        for run in ("untrained", "default", "final")
        for row in rows_of(made.folder / run / "evaluation/scores.csv", unit="raw", variable="all")
    }
    page, said = made.page, {}
    for run, part in (*((run, "validation") for run in ("untrained", "default", "final")), ("final", "test")):
        beside = {name: value for (r, p, name), value in mse.items() if (r, p) == (run, part)}
        untrained = mse["untrained", part, "model"] if part == "validation" and run != "untrained" else None
        said[run, part] = verdict_of(beside, len(study_folder.PARTS[part]), untrained)
        assert said[run, part] in page.texts["stages"]
    assert "and training made them" in said["final", "validation"] and "training" not in said["final", "test"]
    terms = re.findall(r"<dt>(.*?)</dt>", made.html)
    assert terms[:3] == ["untrained", "final", "best copy: seasonal repeat"]
    assert terms[3:6] == ["The final run, validation", "The final run, test", "Best cell"]
    facts = page.texts["facts"]
    validation, test, best = map(facts.index, (said["final", "validation"], said["final", "test"], "Best cell"))
    assert 0 < validation < test < best


CHANGES: list[tuple[str, Callable[[Any], Change]]] = [
    ("results.csv", lambda x: change_csv("validation_loss", x, name="lr5e-05-r4")),
    ("study.json", lambda x: change_json("stages/3/lr", x)),
    ("preprocessing.json", lambda x: change_json("examples/1/scaled", [[x, 1.0], [2.0, 3.0]])),
    ("flops.csv", lambda x: change_csv("share_of_budget", x, stage="all", part="total")),
    ("accounting.csv", lambda x: change_csv("share_of_exact", x, stage="final")),
    ("accounting.json", lambda x: change_json("mistakes", [f"a mistake of {x}"])),
    ("protocol.toml", lambda x: change_text("value = 6.177", f"value = {x}")),
    ("config.toml", lambda x: change_text("[1e-5, 5e-5]", f"[{x}]")),
    ("manifest.json", lambda x: change_json("versions/torch", str(x))),
    ("cells/lr0.0001-r8/result.json", lambda x: change_json("validation_loss", x)),
    ("cells/lr0.0001-r8/metrics.jsonl", lambda x: change_json("5/loss", x)),
    ("final/metrics.jsonl", lambda x: change_json("10/validation_loss", x)),
    ("default/gradients.jsonl", lambda x: change_json("7/norms/layers.1.q_proj.A", x)),
    ("untrained/evaluation/evaluation.json", lambda x: change_json("horizon_loss/shown", x)),
    ("final/evaluation/scores.csv", lambda x: change_csv("mape", x, forecaster="seasonal repeat", variable="prey")),
    ("final/evaluation/systems.csv", lambda x: change_csv("r2", x, forecaster="model", unique_id=17)),
    ("final/evaluation/systems_scaled.csv", lambda x: change_csv("mae", x, forecaster="model", unique_id=15)),
    ("final/evaluation/horizon.csv", lambda x: change_csv("mse", x, part="test", variable="all", step=3)),
    ("final/evaluation/tokens.csv", lambda x: change_csv("nats", x, unique_id=15, position=4)),
    ("final/evaluation/forecasts.csv", lambda x: change_csv("y_hat", x, unique_id=17, variable="predator")),
    ("final/evaluation/history.csv", lambda x: change_csv("y", x, unique_id=15)),
    ("naive/shown.csv", lambda x: change_csv("y_hat", x, forecaster="seasonal repeat", unique_id=17)),
]


def marker(number: int) -> float:
    return (777101 + 2 * number) / 1e6


@pytest.fixture(scope="module")
def changed(made, tmp_path_factory) -> Built:
    """The study with one value in each kind of record replaced by a number that nothing else has."""
    folder = shutil.copytree(made.folder, tmp_path_factory.mktemp("changed") / "study")
    for number, (file, change) in enumerate(CHANGES):
        change(marker(number))(folder / file)
    return build(folder)


@pytest.mark.parametrize("number", range(len(CHANGES)), ids=[file for file, _ in CHANGES])
def test_the_page_shows_what_a_record_says(made, changed, number):
    """The exact number stands after the rounded one in the page, or in what is asked to be drawn."""
    now, before = ("".join([built.html, *(call for _, call in built.calls)]) for built in (changed, made))
    new = re.compile(rf"\b{marker(number)}\b".replace(".", "\\."))
    assert new.search(now) and not new.search(before)


def test_a_table_on_disk_has_every_number_of_the_record_to_the_last_digit(made):
    rows = rows_of(made.folder / "final/evaluation/scores.csv", unit="raw", variable="all")
    for name in ("forecaster", "part", "mse", "mse_low", "mse_high", "mae_high", "mape", "r2", "skill", "won", "steps"):
        assert [row[name] for row in made.table("scores-final")] == [row[name] for row in rows], name
    flops = [row["flops"] for row in rows_of(made.folder / "flops.csv")]
    assert [row["flops"] for row in made.table("flops")] == flops
    assert f'title="{flops[-1]}"' in made.html


ANCHORS = "smape", "mase", "wql", "win_rate", "reference"


def test_the_anchors_and_the_reference_stand_beside_each_score_and_an_older_evaluation_is_shown_without(study, made):
    for name in ("scores-final", "by-stage"):
        assert {"seasonal repeat"} == {row["reference"] for row in made.table(name)}
        assert all(row[column] for row in made.table(name) for column in ANCHORS)
    assert {row["trained_on_this_data"] for row in made.table("by-stage")} == {"no"}
    for path in sorted(study.glob("*/evaluation/scores.csv")):
        path_rows = rows_of(path)
        files.write_csv(path, [{k: v for k, v in row.items() if k not in ANCHORS} for row in path_rows])
        about = path.with_name("evaluation.json")
        old = {k: v for k, v in files.read_json(about).items() if k != "trained_on_this_data"}
        files.write_json(about, old)
    put_origins = change_json("origins", 3)
    put_origins(study / "default/evaluation/evaluation.json")
    older = build(study)
    assert "Scores over the horizons at 3 origins, default run" in older.html
    assert "Scores over the horizon, final run" in older.html
    assert "Skill over the seasonal repeat, test" in older.html
    for name in ("scores-final", "by-stage"):
        assert [row["skill"] for row in older.table(name)] == [row["skill"] for row in made.table(name)]
        assert {row["reference"] for row in older.table(name)} == {"seasonal repeat"}
        assert not {"smape", "mase", "wql", "win_rate", "trained_on_this_data"} & older.table(name)[0].keys()


def test_running_rmse_ends_at_the_rmse_of_the_horizon_in_both_units(made):
    for suffix, record in (("", "systems.csv"), ("-scaled", "systems_scaled.csv")):
        last = made.table(f"running-rmse-final{suffix}")[-1]
        assert last["step"] == "8"
        for row in rows_of(made.folder / "final/evaluation" / record):
            if row["forecaster"] == "model" and row["variable"] != "all" and "shown" in row["parts"]:
                found = float(last[f"{row['unique_id']}_{row['variable']}"])
                assert found == pytest.approx(float(row["rmse"]), rel=1e-9)


def test_the_forecast_that_is_drawn_is_the_one_that_is_recorded(made, monkeypatch, tmp_path):
    drawn: dict[str, Any] = {}

    def draw(systems: Any, names: Any, **options: Any) -> None:
        drawn.update(options, systems=systems, names=names)

    monkeypatch.setattr(plots, "forecast_grid", draw)
    named(made.folder, Figure)["forecasts-final"].draw(path=tmp_path / "x.png")
    assert (drawn["names"], drawn["label"]) == (["prey", "predator"], study_folder.TOY)
    for system, number in zip(drawn["systems"], study_folder.PARTS["shown"], strict=True):
        assert system["title"].startswith(f"system {number} (")
        assert system["context"].shape == (study_folder.POINTS, 2) and len(system["time"]) == study_folder.POINTS + 8
        for what, column in {"truth": "y", "forecast": "y_hat"}.items():
            mine = rows_of(made.folder / "final/evaluation/forecasts.csv", unique_id=number)
            each = [[float(r[column] or "nan") for r in mine if r["variable"] == name] for name in drawn["names"]]
            np.testing.assert_array_equal(system[what], np.transpose(each))
    assert np.isnan(drawn["systems"][1]["forecast"]).sum() == 2  # the step that did not parse, of both species


# Sections


@pytest.mark.parametrize(
    ("stage", "section", "name"),
    [
        ("baseline", "stages", "untrained model"),
        ("default", "stages", "default run"),
        ("grid", "grid", "grid"),
        ("context", "context", "contexts"),
        ("final", "stages", "final run"),
    ],
)
def test_a_stage_that_did_not_run_is_left_out_and_is_what_comes_next(made, study, stage, section, name):
    rows = rows_of(study / "results.csv")
    files.write_csv(study / "results.csv", [row for row in rows if row["stage"] != stage])
    said = f"Next: the {name}, not run yet: python -m experiments.run {stage} "
    before, after = texts(made.folder), texts(study)
    assert said in after["summary"] and said not in before["summary"] and section in before
    assert (section in after) == (section == "stages")  # which has the others and the plan
    assert not [text for where, text in after.items() if where != "summary" and "not run" in text]


@pytest.mark.parametrize("write", [study_folder.write, study_folder.write_grid], ids=["of a protocol", "alone"])
def test_what_comes_after_the_one_run_of_train_is_its_forecasts_and_no_stage_of_a_study(tmp_path, write):
    """Bug: of a protocol's run it was the default run."""
    folder = write(tmp_path / "t")
    cells = [row for row in rows_of(folder / "results.csv") if row["name"].startswith("lr")]
    files.write_csv(folder / "results.csv", [rows_of(folder / "results.csv")[0], cells[-1]])
    shutil.rmtree(folder / "untrained/evaluation", ignore_errors=True)
    then = f"evaluate --config {folder}/config.toml --adapter {folder}/cells/{cells[-1]['name']}/adapter"
    assert f"Next: forecasts with this adapter, scored: python -m experiments.run {then}" in texts(folder)["summary"]


def test_a_study_of_which_nothing_has_run_has_a_page(study):
    for name in ("results.csv", "flops.csv", "preprocessing.json"):
        (study / name).unlink()
    page = build(study).page
    assert page.sections == ["summary", "stages", "accounting", "settings"]  # the plan, the report's FLOPs
    assert "Nothing has run yet." in page.texts["summary"]


def test_a_run_that_two_stages_share_stands_in_both(study):
    """Without its plan, a default run that is a cell of the grid would leave a hole in the grid."""
    change_csv("stage", "default", name="lr1e-05-r4")(study / "results.csv")
    rows = [row for row in rows_of(study / "results.csv") if row["folder"] != "default"]
    files.write_csv(study / "results.csv", rows)
    record = json.loads((study / "study.json").read_text())
    cell = next(row for row in record["stages"] if row["name"] == "lr1e-05-r4")
    record["stages"] = [row for row in record["stages"] if row["stage"] != "default"] + [cell | {"stage": "default"}]
    files.write_json(study / "study.json", record)
    tables = named(study, Table)
    assert len(tables["grid"].rows) == 3 and all(value is not None for row in tables["grid"].rows for value in row)
    assert tables["gradients-default"].rows


def test_the_lowest_cell_is_marked_and_the_chosen_one_named(study):
    change_csv("validation_loss", 0.01, name="lr1e-05-r4")(study / "results.csv")
    change_json("best/overridden", True)(study / "study.json")
    grid = named(study, Table)["grid"]
    (row, column), mark = next(iter(grid.marks.items()))
    assert (grid.rows[row][column], mark) == (0.01, "lowest")
    assert "lr0.0001-r8: learning rate 1e-4, rank 8, context 512 (set by hand)" in texts(study)["facts"]


def test_a_mark_stands_in_its_cell(made):
    marked = re.findall(r'<td class="n best"[^>]*>([^<]+) <strong class="mark">lowest</strong></td>', made.html)
    assert marked[0] == shown(min(float(row["rank_8"]) for row in made.table("grid")))


def test_footnotes_stand_in_their_section_with_a_mark_that_links_them(made):
    page = made.page
    assert "The report drew <sampled> text" in page.texts["forecasts"]
    assert "The split is random." in page.texts["preprocessing"]
    for number in (1, 2):
        assert f'href="#note-{number}" id="mark-{number}"' in made.html and f'id="note-{number}"' in made.html


def test_claims_stand_beside_ours_and_say_where_ours_is_not_recorded(made):
    wanted = {"unique_id": 17, "forecaster": "model", "variable": "prey"}
    mse = rows_of(made.folder / "final/evaluation/systems_scaled.csv", **wanted)[0]["mse"]
    nats = made.json("default/evaluation/evaluation.json")["horizon_loss"]["shown"]
    claims = made.table("claimed")
    beside = [(row["claimed"], row["ours"]) for row in claims]
    assert beside == [("6.177", mse), ("0.25", ""), ("0.9651", str(nats))]
    assert [row["how"] for row in claims] == ["the same system and unit", "not recorded", ""]
    assert claims[0]["record"] == "evaluation/systems_scaled.csv: mse, 17, model, prey"
    losses = [made.json(f"cells/{name}/result.json")["validation_loss"] for name in ("lr1e-05-r2", "lr0.0001-r8")]
    assert [row["ours"] for row in made.table("grid-claimed")] == [*map(str, losses), ""]
    assert made.table("context-claimed")[0]["ours"] != ""
    about = made.json("contexts/128/evaluation/evaluation.json")
    assert [row["ours"] for row in made.table("context-loss-claimed")] == [str(about["horizon_loss"]["shown"]), ""]


def test_bands_are_scored_where_there_are_samples_and_cut_mass_shown_where_constrained(made, sampled):
    for built in (made, sampled):
        tables = {path.stem for path in (built.folder / "tables").iterdir()}
        assert ({"probabilistic", "cut-mass", "cut-mass-shown"} <= tables) == (built is sampled)
        assert any("'quantiles': {0.1: array" in call for _, call in built.calls) == (built is sampled)
    rows = rows_of(sampled.folder / "final/evaluation/systems.csv", variable="all")
    cut = [float(row["cut_mass"]) for row in rows if row["cut_mass"] and "test" in row["parts"]]
    (ours,) = sampled.table("cut-mass", run="final run", part="test")
    assert (int(ours["series"]), float(ours["largest"])) == (len(cut), max(cut))
    assert float(ours["mean"]) == pytest.approx(np.mean(cut))
    scores = rows_of(sampled.folder / "final/evaluation/scores.csv", unit="raw")
    crps = [row["crps"] for row in scores if row["crps"]]
    assert [row["crps"] for row in sampled.table("probabilistic", run="final run")] == crps


def test_a_gradient_is_flagged_where_it_explodes_or_vanishes():
    norms = {"steady": np.full(40, 0.1), "grows a little": np.linspace(1, 5, 40), "one record": np.array([0.1])}
    norms |= {"explodes": np.geomspace(1, 1e3, 40), "not finite": np.array([0.1, np.nan, 0.1])}
    norms |= {"vanishes": np.geomspace(1, 1e-4, 40), "zero": np.zeros(40)}
    flagged = {"explodes": "explodes", "not finite": "explodes", "vanishes": "vanishes", "zero": "vanishes"}
    assert {name: verdict(values)[2] for name, values in norms.items()} == dict.fromkeys(norms, "") | flagged


def test_step_1_where_the_gradient_of_a_is_zero_is_no_beginning(study):
    lines = files.read_jsonl(study / "default/gradients.jsonl")[:5]
    assert lines[0]["step"] == 1 and 0.0 in lines[0]["norms"].values()
    files.write_jsonl(study / "default/gradients.jsonl", lines)
    assert "In the default run no gradient vanishes or explodes." in texts(study)["gradients"]


def test_a_vanishing_gradient_is_warned_of_by_name(made):
    said = texts(made.folder)["gradients"]
    assert "Warning: in the final run the gradient vanishes in 1 of 8 matrices: layers.1.v_proj.B." in said
    assert "In the default run no gradient vanishes or explodes." in said
    default, final = [call for name, call in made.calls if name == "gradient_norms"]
    assert "'flagged': []" in default and "'flagged': ['layers.1.v_proj.B']" in final


NUMBERS = {0.0402449: "0.04024", 0.5: "0.5000", 1234.56: "1235", 0.0000123456: "1.235e-5", -3.0: "-3.000", 0.0: "0"}
SHOWN: dict[str, dict[Any, str]] = {
    "number": NUMBERS | {None: "–"},
    "flops": {271051231150080123: "2.711e17", 0: "0"},
    "rate": {0.0001: "1e-4", 5e-05: "5e-5", 0.95: "0.95"},
    "share": {0.04138: "4.138\N{NO-BREAK SPACE}%"},
    "integer": {15000: "15,000"},
    "interval": {(0.04, 0.03, 0.05): "0.04000 (0.03000 to 0.05000)", (0.04, None, None): "0.04000"},
}


@pytest.mark.parametrize("kind", SHOWN)
def test_numbers_are_shown_in_four_digits(kind):
    assert {value: shown(value, kind) for value in SHOWN[kind]} == SHOWN[kind]


def test_a_table_is_written_exact_with_an_interval_in_three_columns():
    columns = [Column("a", "A", "text"), Column("n", "N", "flops"), Column("m", "M", "interval")]
    table = Table("t", "", columns, [["x,y", 10**17 + 1, (0.1 + 0.2, None, 1.0)]], [])
    assert table.csv("toy") == 'a,n,m,m_low,m_high,label\n"x,y",100000000000000001,0.30000000000000004,,1.0,toy\n'


# Broken records

BROKEN: list[tuple[str, Change, str]] = [
    ("study.json", lambda p: p.write_text("{"), "not valid JSON"),
    ("study.json", lambda p: p.write_text("[]"), "is a list: expected an object"),
    ("study.json", change_json("budget", "much"), "budget is 'much': expected a whole number"),
    ("study.json", change_json("stages/2/predicted", 7), "predicted is '7': expected an object"),
    ("config.toml", Path.unlink, "cannot be read"),
    ("config.toml", lambda p: p.write_text("a = "), "expected a TOML file"),
    ("manifest.json", lambda p: p.write_bytes(b"\xff"), "expected UTF-8 text"),
    ("results.csv", lambda p: p.write_text(p.read_text() + "1,2\n"), "has 2 values: expected"),
    ("results.csv", lambda p: p.write_bytes(b""), "expected a first line that names each column once"),
    ("results.csv", change_csv("rank", "many", name="lr5e-05-r4"), "line 7: rank is 'many': expected a whole number"),
    ("results.csv", change_csv("stage", "warm-up", name="final"), "expected a name, and a stage of"),
    ("study.json", change_json("stages/0/stage", "warm-up"), "a stage is 'warm-up': expected one of baseline"),
    ("flops.csv", change_text("share_of_budget", "share"), "has no column share_of_budget"),
    ("flops.csv", change_csv("stage", "whole", stage="all", part="total"), "0 rows of all, total: expected one"),
    ("final/metrics.jsonl", Path.unlink, "cannot be read"),
    ("final/metrics.jsonl", change_json("3/loss", "low"), "line 4: loss is 'low': expected a number"),
    ("final/gradients.jsonl", lambda p: p.write_bytes(b""), "holds no norms"),
    ("final/gradients.jsonl", change_json("2/norms", {"other": 1.0}), "names other matrices"),
    ("final/evaluation/scores.csv", change_csv("mse", "nan", part="test"), "mse is 'nan': expected a finite number"),
    ("final/evaluation/scores.csv", change_csv("won", "", part="test"), "won is '': expected a whole number"),
    ("final/evaluation/scores.csv", Path.unlink, "cannot be read"),
    ("final/evaluation/evaluation.json", change_json("perplexity", None), "has no perplexity: expected a number"),
    ("final/evaluation/forecasts.csv", change_text("\n17,", "\n7,"), "forecasts.csv: system 17 has 0 of prey, 0 of"),
    ("final/evaluation/horizon.csv", change_csv("step", 99, part="test", variable="all"), "part test has no row of"),
    ("preprocessing.json", change_json("examples/0/pieces", ["1"]), "and 1 pieces: expected one for one"),
    ("protocol.toml", change_text('about = "split"', 'about = "spilt"'), "about is 'spilt': expected one of"),
    ("protocol.toml", change_text('column = "mse"\nvalues', 'column = "mes"\nvalues'), "has no column mes"),
    ("protocol.toml", change_text(', variable = "prey"}', "}"), "3 rows have"),
    ("accounting.csv", change_csv("exact", "1e17", stage="final"), "exact is '1e17': expected a whole number"),
]


@pytest.fixture(scope="module")
def workshop(made, tmp_path_factory) -> Path:
    """A study with its page, of which one record at a time is broken and mended."""
    return shutil.copytree(made.folder, tmp_path_factory.mktemp("workshop") / "study")


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(("file", "damage", "message"), BROKEN, ids=[f"{f}: {m}" for f, _, m in BROKEN])
def test_a_broken_record_is_one_line_and_nothing_is_written(made, workshop, file, damage, message):
    damage(workshop / file)
    before = stamps(workshop)
    with pytest.raises(ValueError) as caught:
        report.build(workshop)
    line = str(caught.value)
    assert message in line and "\n" not in line and str(workshop) in line
    assert stamps(workshop) == before
    shutil.copyfile(made.folder / file, workshop / file)


def test_a_figure_that_cannot_be_drawn_leaves_everything_as_it_was(study):
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("a heat map needs at least one cell")

    before = stamps(study)
    with sketching(), pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="at least one cell"):
        patch.setattr(plots, "heat_map", refuse)
        report.build(study)
    assert stamps(study) == before


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none: no such folder: expected that of a study or a grid"):
        report.build(tmp_path / "none")


def test_tables_and_figures_have_names_of_their_own(sampled):
    for kind in (Table, Figure):
        assert all(re.fullmatch(r"[\w-]+", name) for name in named(sampled.folder, kind))


def test_the_step_of_the_run_stands_by_module_and_in_the_explorer_beside_the_page(study):
    manifest = json.loads((study / "manifest.json").read_text())
    config = QwenConfig.named("Qwen2.5-0.5B")
    files.write_json(study / "manifest.json", manifest | {"model": "M", "model_config": config.to_dict()})
    made = build(study)
    run, _ = Study(study).answer
    meter = predict(config, 2, run.row["context"], rank=run.row["rank"], targets=["all-linear"], training=True)
    rows = made.table("flops-by-module")
    whole = [int(rows[0][name]) for name in ("forward", "backward", "both")]
    assert whole == [meter.total, meter.backward, meter.training]
    both = {row["part"]: int(row["both"]) for row in rows}
    assert both["model"] + both["lm_head"] == both["the model"] and both["model.layers"] == both["model.layers.0-23"]
    assert {"href": "flops.html"} in made.page.all("a")
    assert "[flops.html](flops.html)" in (study / "report.md").read_text()
    start = json.loads(re.search(r'"start":({.*?})', (study / "flops.html").read_text())[1])
    asked = {"model": "M", "phase": "training", "batch": 2, "context": run.row["context"], "rank": run.row["rank"]}
    assert start == start | asked
    files.write_json(study / "manifest.json", manifest | {"model_config": config.to_dict() | {"hidden_size": -1}})
    with pytest.raises(ValueError, match=r"manifest.json: model_config: hidden_size is -1: expected a positive whole"):
        report.build(study)
