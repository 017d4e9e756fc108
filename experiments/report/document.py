"""What a page is made of: sections of tables, figures and text; and how a number is shown.

A number keeps its exact value beside the digits that are shown: 4 significant ones, FLOPs in scientific notation.
"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from experiments.plots import base
from experiments.run_folder.cells import spread

Kind = Literal["text", "code", "number", "integer", "flops", "share", "rate", "interval"]
NOTHING = "–"
"""What is shown where a value is not defined."""


@dataclass(frozen=True)
class Number:
    """A value of a record, within a text or a cell of a table; None where it is not defined."""

    value: Any
    kind: Kind = "number"

    @property
    def shown(self) -> str:
        return shown(self.value, self.kind)

    @property
    def exact(self) -> str:
        """The value as the record has it, or an interval's mean; empty where it is not defined."""
        return plain(self.value[0] if self.kind == "interval" else self.value)

    @property
    def is_numeric(self) -> bool:
        return self.kind not in ("text", "code")


Inline = Sequence[str | Number]


@dataclass(frozen=True)
class Column:
    """`name` heads the column in the CSV file, `title` on the page."""

    name: str
    title: str
    kind: Kind = "number"


_KINDS: dict[Kind, str] = {
    "text": "run part stage unit variable forecaster class unique_id system name state verdict primitive called note "
    "what how record records stages token id sampling constrained reference trained_on_this_data",
    "code": "matrix text piece command file sha256",
    "integer": "series steps step position point rank context won best_step unparsed unparsed_steps validation_tokens "
    "top_k num_samples points horizon price",
    "flops": "flops predicted difference claimed reproduced exact training_flops",
    "share": "mape smape wql win_rate share share_of_budget share_of_exact coverage50 coverage80",
    "rate": "lr top_p repetition_penalty",
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}
_TITLES = {
    **{"unique_id": "system", "variable": "species", "lr": "learning rate"},
    **{"mse": "MSE", "rmse": "RMSE", "mae": "MAE", "mape": "MAPE", "r2": "R²", "crps": "CRPS", "sha256": "SHA-256"},
    **{"smape": "sMAPE", "mase": "MASE", "wql": "WQL", "reference": "over"},
    **{"won": "series won", "unparsed_steps": "steps not parsed", "token": "token id", "id": "token id"},
    **{"training_flops": "training FLOPs", "validation_loss_with_padding": "with padding counted"},
}


def named(names: str, intervals: str = "", **titles: str) -> list[Column]:
    """The columns of these names, each of the kind that it has in every table, unless it is one of `intervals`.

    A title is the one given here, or that of every table, or the name in words."""
    columns = []
    for name in names.split():
        title, kind = titles.get(name) or _TITLES.get(name) or name.replace("_", " "), _KIND_OF.get(name, "number")
        interval = Column(name, f"{title} (95 % interval)", "interval")
        columns.append(interval if name in intervals.split() else Column(name, title, kind))
    return columns


@dataclass(frozen=True)
class Table:
    """Rows of values under columns, shown on the page and written to tables/`name`.csv.

    Of neighbours of one kind with a `choice` each, as "raw units" and "scaled units", the page shows one at a time.

    An interval is (mean, low, high), three columns of the CSV file. `sources` are records of the run's folder and
    `stages` those whose commands make them. `marks` says of a cell (row, column) what is special about it. The first
    `heads` columns name their row. A table that is `folded` shows its caption until it is opened. The label, which is
    the model's, stands over what is a `model`'s."""

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    sources: Sequence[str]
    stages: Sequence[str] = ()
    marks: Mapping[tuple[int, int], str] = field(default_factory=dict)
    heads: int = 1
    folded: bool = False
    model: bool = True
    choice: str = ""

    @property
    def cells(self) -> list[list[Number]]:
        return [[Number(v, c.kind) for v, c in zip(row, self.columns, strict=True)] for row in self.rows]

    def without_empty(self) -> "Table":
        """The table without the columns that no row has a value in."""
        kept = [
            i
            for i, column in enumerate(self.columns)
            if not self.rows or any(Number(row[i], column.kind).exact for row in self.rows)
        ]
        return replace(
            self,
            columns=[self.columns[i] for i in kept],
            rows=[[row[i] for i in kept] for row in self.rows],
            marks={(row, kept.index(i)): mark for (row, i), mark in self.marks.items()},
            heads=sum(i < self.heads for i in kept),
        )

    def csv(self, label: str = "") -> str:
        """The table as CSV: every value exact, an undefined one empty, and the label, if any, in every row."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        ends = {"interval": ("", "_low", "_high")}
        head = [column.name + end for column in self.columns for end in ends.get(column.kind, ("",))]
        labels = [label] if label else []
        writer.writerow(head + ["label"][: len(labels)])
        for row in self.rows:
            values: list[Any] = []
            for value, column in zip(row, self.columns, strict=True):
                values += value if column.kind == "interval" else [value]
            writer.writerow([plain(value) for value in values] + labels)
        return text.getvalue()


@dataclass(frozen=True)
class Figure:
    """A drawing, figures/`name`.png, that `draw` writes to the `path` it is given; `model`, `choice` as of a `Table`.

    A path that ends in .svg has the drawing as SVG, and the PNG beside it."""

    name: str
    caption: str
    draw: Callable[..., None]
    sources: Sequence[str]
    stages: Sequence[str] = ()
    model: bool = True
    choice: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph, a line of code ("pre"), a warning, a sub-heading, a file beside the page, or what it says first."""

    parts: Inline
    style: Literal["paragraph", "pre", "warning", "heading", "link", "verdict"] = "paragraph"


@dataclass(frozen=True)
class Items:
    """A list of paragraphs."""

    items: Sequence[Inline]


@dataclass(frozen=True)
class Facts:
    """Terms, each with what holds of it."""

    facts: Sequence[tuple[str, Inline]]
    sources: Sequence[str]
    stages: Sequence[str] = ()


Block = Table | Figure | Text | Items | Facts


@dataclass(frozen=True)
class Section:
    """A part of the page, left out where it has no blocks; `footnotes` are (number, text), `group` what it folds in."""

    id: str
    title: str
    blocks: Sequence[Block]
    footnotes: Sequence[tuple[int, str]] = ()
    group: str = ""


def shown(value: Any, kind: Kind = "number") -> str:
    """A value in the digits of the page."""
    if kind == "interval":
        mean, low, high = value
        if mean is None:
            return NOTHING
        ends = "" if low is None or high is None else f" ({shown(low)} to {shown(high)})"
        return shown(mean) + ends
    return NOTHING if value is None or value == "" else _SHOWN[kind](value)


def over_seeds(values: Sequence[float]) -> Inline:
    """A value, or the mean of one for each seed, with the lowest and the highest."""
    mean, low, high = map(Number, spread(values))
    return [mean, f" (mean of {len(values)} seeds, ", low, " to ", high, ")"] if len(values) > 1 else [mean]


def plain(value: Any) -> str:
    """A value as a record has it: `repr` precision, whole integers, nothing for None."""
    return "" if value is None else str(value)


def _significant(value: float) -> str:
    return base.short(value, "#.4g").removesuffix(".") if value else "0"


_SHOWN: dict[Kind, Callable[[Any], str]] = {
    **{"text": str, "code": str, "number": _significant, "integer": "{:,}".format},
    **{"flops": base.scientific, "rate": base.number},
    "share": lambda value: f"{_significant(100 * value)}\N{NO-BREAK SPACE}%",
}
