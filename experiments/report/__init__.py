"""The page of a run: report.html, one self-contained file, and report.md, from the records of its folder alone.

`records` reads a file strictly, `study` and `evaluation` say what is where, `document` is what a page is made of;
`answer` makes the first screen, the other modules the sections below it, which fold, and templates/ its two forms.
"""

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.report import (
    accounting,
    answer,
    cells,
    claims,
    compare,
    forecasts,
    ops,
    overview,
    sampling,
    scoring,
    training,
)
from experiments.report.document import Block, Figure, Inline, Section, Table
from experiments.report.records import Fields
from experiments.report.study import Study
from experiments.run_folder import files
from experiments.run_folder.command import command
from experiments.training.progress import Counted

B = TypeVar("B", Table, Figure)
GROUPS: dict[str, tuple[Callable[[Study], Section], ...]] = {
    "": (answer.summary,),
    "How good": (
        *(scoring.together, overview.facts, scoring.by_stage, forecasts.forecasts, scoring.scores),
        *(sampling.sampling, claims.figures),
    ),
    "What it cost": (accounting.accounting,),
    "How it was found": (cells.grid, cells.context, training.curves, training.gradients),
    "How it was made": (overview.preprocessing, overview.settings),
}
"""The sections by what they fold in; the first screen does not."""
ABOUT = {
    **dict.fromkeys(("preprocessing", "scaling", "split"), "preprocessing"),
    **dict.fromkeys(("loss", "figures"), "training"),
    **{name: name for name in ("forecasts", "scores", "accounting", "sampling", "grid", "context")},
    "final": "stages",
}
"""The section that a footnote stands in, by what it is about."""
NARROW = 4
"""Of more columns than these a phone shows each row as lines, a column's title before its value."""


def build(run: Path, progress: Counted = lambda done, of: None) -> Path:
    """Write report.html, report.md, flops.html, figures/*.png and tables/*.csv into a run's folder; return the first.

    Nothing but the records in the folder is read. Each file is written atomically, and none before all are made.
    `progress` takes how many figures are drawn, which takes a while, and of how many.

    Raises:
        ValueError: a record is missing or broken; one line names the file, the fault and what was expected.
            Nothing is written then.
    """
    run = Path(run)
    if not run.is_dir():
        raise ValueError(f"{run}: no such folder: expected that of a study or a grid")
    study = Study(run)
    sections = annotated(study)
    images = drawn(sections, progress)
    html, markdown = rendered(study.title, study.label, study.commands["report"], sections, images)
    if explorer := ops.page(study):
        files.write_text(run / ops.FILE, explorer)
    for name, (png, _) in images.items():
        files.write_bytes(run / "figures" / f"{name}.png", png)
    return _write(run, "report", sections, study.label, html, markdown)


def build_comparison(run: Path, others: Sequence[Path]) -> Path:
    """Write compare.html, compare.md and their tables/*.csv into the folder of the first of several runs.

    Each folder is read as by `build`, and times of its files. Raises as it does, and for a folder that is there twice.
    """
    sections, label = compare.sections([run, *others])
    made_by = command("report", run, "--compare", *others)
    html, markdown = rendered("Runs side by side", label, made_by, sections, {})
    return _write(run, "compare", sections, label, html, markdown)


def _write(run: Path, name: str, sections: list[Section], label: str, html: str, markdown: str) -> Path:
    """Write the tables of a page, and its two forms."""
    for table in blocks(sections, Table):
        files.write_text(run / "tables" / f"{table.name}.csv", table.csv(label if table.model else ""))
    files.write_text(run / f"{name}.md", markdown)
    files.write_text(run / f"{name}.html", html)
    return run / f"{name}.html"


def annotated(study: Study) -> list[Section]:
    """The sections that have something to show, with footnotes numbered over the whole page, the digests at the end."""
    notes = Fields(str(study.root / "protocol.toml"), {"footnote": study.protocol.get("footnote", [])})
    by_section: dict[str, list[str]] = {}
    for note in notes.objects("footnote"):
        if note.text("about") not in ABOUT:
            raise ValueError(f"{note.where}: about is {note.text('about')!r}: expected one of {', '.join(ABOUT)}")
        by_section.setdefault(ABOUT[note.text("about")], []).append(note.text("text"))
    number, sections = 0, []
    for group, make in ((group, make) for group, makers in GROUPS.items() for make in makers):
        if not (section := make(study)).blocks:
            continue
        texts = by_section.get(section.id, [])
        sections.append(replace(section, footnotes=list(enumerate(texts, number + 1)), group=group))
        number += len(texts)
    made = [block for section in sections for block in section.blocks if isinstance(block, Table | Figure)]
    ends = [overview.made_from(made), overview.records_read(study)]
    return [*sections[:-1], replace(sections[-1], blocks=[*sections[-1].blocks, *ends])]


def blocks(sections: list[Section], kind: type[B]) -> list[B]:
    return [block for section in sections for block in section.blocks if isinstance(block, kind)]


def drawn(sections: list[Section], progress: Counted) -> dict[str, tuple[bytes, str]]:
    """Every figure of the page as PNG and as SVG, by name."""
    figures = blocks(sections, Figure)
    with tempfile.TemporaryDirectory() as folder:
        images: dict[str, tuple[bytes, str]] = {}
        for figure in figures:
            progress(len(images), len(figures))
            path = Path(folder, f"{figure.name}.svg")
            figure.draw(path=path)
            images[figure.name] = path.with_suffix(".png").read_bytes(), path.read_text(encoding="utf-8")
    progress(len(images), len(figures))
    return images


def switched(made: Sequence[Block]) -> list[list[Block]]:
    """Blocks in groups: those of which the page shows one at a time, else each alone."""
    groups: list[list[Block]] = []
    for block in made:
        choice = getattr(block, "choice", "")
        chosen = [getattr(one, "choice", "") for one in groups[-1]] if groups else [""]
        if choice and all(chosen) and choice not in chosen:
            groups[-1].append(block)
        else:
            groups.append([block])
    return groups


def opened(svg: str) -> tuple[float, float, str]:
    """Width, height and content of an SVG file, which a page holds as an element of its own."""
    found = re.search(r'<svg[^>]* viewBox="0 0 (\S+) (\S+)"[^>]*>(.*)</svg>', svg, re.DOTALL)
    assert found, "a figure is no SVG file"
    return float(found[1]), float(found[2]), found[3]


def rendered(
    title: str, label: str, made_by: str, sections: list[Section], images: dict[str, tuple[bytes, str]]
) -> tuple[str, str]:
    """The page that a command makes as HTML, with its figures inside, and as Markdown, with links to them."""

    values: dict[str, Any] = {
        "title": title,
        "label": label,
        "report": made_by,
        "first": sections[0],
        "stacked": [table for table in blocks(sections, Table) if len(table.columns) > NARROW],
        "groups": [(group, list(of)) for group, of in groupby(sections[1:], key=lambda section: section.group)],
        "kind": lambda block: type(block).__name__,
        "opened": lambda figure: opened(images[figure.name][1]),
    }
    html, markdown = (_environment().get_template(f"report.{name}.jinja").render(values) for name in ("html", "md"))
    return html, markdown


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        undefined=StrictUndefined,
        finalize=lambda value: value.translate(_CONTROLS) if isinstance(value, str) else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["inline"] = inline
    environment.filters["switched"] = switched
    environment.filters["cell"] = escaped
    environment.filters["code"] = lambda text: (
        escaped(text) if set(text) & set("`|") or not text.isprintable() else f"`{text}`"
    )
    environment.filters["css"] = lambda text: "".join(c if c.isalnum() else f"\\{ord(c):x} " for c in text)
    environment.tests["text"] = lambda part: isinstance(part, str)
    return environment


def inline(parts: Inline) -> str:
    """Parts of a text as plain text."""
    return "".join(part if isinstance(part, str) else part.shown for part in parts)


_ESCAPES: dict[str, str | int | None] = {c: f"\\{c}" for c in "\\`*_[]|#~$"}
_ESCAPES |= {"<": "&lt;", "&": "&amp;", "\n": "↵", "\r": ""}
_CONTROLS = dict.fromkeys(c for c in range(32) if chr(c) not in "\n\t")  # which a page may not hold, nor a terminal get


def escaped(text: str) -> str:
    """A text that Markdown shows as it stands, in one line, so in a table's cell too."""
    return text.translate(str.maketrans(_ESCAPES))
