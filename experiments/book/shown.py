"""What the cells of the book show: tables as Markdown, worked prices, and pictures."""

import ast
import io
from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from experiments.accounting import explain
from experiments.plots.base import COLOURS, MARKERS, SMALL, line  # noqa: F401 (of cells)
from experiments.settings.record import POCKET
from qwen_min import Qwen, Tokenizer
from qwen_min.cache import KVCache

WIDTH = 6.0  # inches: on a phone the smallest text is then 7 pixels high


class Markdown(str):
    """A text that a notebook shows as Markdown."""

    def _repr_markdown_(self) -> str:
        return str(self)


class Said(str):
    """A text that stands in a sentence without quotes."""

    def __repr__(self) -> str:
        return str(self)


class Picture(Figure):
    """A figure that a notebook shows as SVG, without a backend; as an image of HTML where it has an `alt`."""

    alt = ""

    def _repr_html_(self) -> str | None:
        if not self.alt:
            return None
        drawn = b64encode(self._repr_svg_().encode()).decode()
        return f'<img alt="{escape(self.alt)}" src="data:image/svg+xml;base64,{drawn}">'

    def _repr_svg_(self) -> str:
        drawn = io.StringIO()
        self.savefig(drawn, format="svg", bbox_inches="tight")
        return drawn.getvalue()


def pocket() -> tuple[Qwen, Tokenizer]:
    """The pocket model in float32, and its tokenizer."""
    return Qwen.from_pretrained(POCKET).eval(), Tokenizer.from_pretrained(POCKET)


def n(number: float) -> Said:
    """1234567 as 1,234,567, and 0.123456 as 0.1235."""
    whole = isinstance(number, int) or abs(number) >= 1000
    return Said(f"{number:,.0f}" if whole else f"{number:.4g}")


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> Markdown:
    """A table; numbers to the right."""
    cells = [list(row) for row in rows]
    numeric = [all(isinstance(row[i], int | float) for row in cells) for i in range(len(head))]
    lines = [head, ["--:" if right else "---" for right in numeric]]
    lines += [[n(x) if isinstance(x, int | float) else str(x) for x in row] for row in cells]
    return Markdown("\n".join("| " + " | ".join(str(x).replace("|", "\\|") for x in row) + " |" for row in lines))


def costs(
    model: Qwen, ids: Tensor, *what: str, convention: str = "coursework", cache: KVCache | None = None
) -> Markdown:
    """What ops, or modules by the ends of their names, charge in a forward: formula, numbers, FLOPs, how often."""
    rows = []
    for call, times in explain.grouped(explain.calls(model, ids, cache)).items():
        if call.op in what or any(f".{call.module}".endswith(f".{name}") for name in what):
            for part, formula, numbers, flops in explain.worked(call, convention):
                if flops:
                    rows.append((f"`{part}`", formula, numbers, flops, times))
    return table(("part", "formula", "with numbers", "FLOPs", "times"), rows)


def panels(count: int = 1, height: float = 2.4, rows: int = 1, **options: Any) -> tuple[Picture, list[Axes]]:
    """A picture of panels side by side, in `rows`, and these; `height` in inches."""
    picture = Picture(figsize=(WIDTH, height), layout="constrained")
    axes = list(picture.subplots(rows, -(-count // rows), squeeze=False, **options).flat)
    for one in axes:
        one.tick_params(labelsize=SMALL)
    return picture, axes


def heat(axes: Axes, values: Any, title: str = "", x: str = "", y: str = "", signed: bool = False) -> None:
    """A matrix as colours, its first row on top; `signed` from purple over white to orange, with 0 white."""
    matrix = np.asarray(torch.as_tensor(values).detach().float())
    most = float(np.nanmax(np.abs(matrix))) or 1.0
    scale: dict[str, Any] = {"cmap": "PuOr", "vmin": -most, "vmax": most} if signed else {"cmap": "viridis"}
    image = axes.imshow(matrix, aspect="auto", interpolation="nearest", **scale)
    axes.figure.colorbar(image, ax=axes, shrink=0.9).ax.tick_params(labelsize=SMALL)
    axes.set_title(title, fontsize=SMALL + 1)
    axes.set_xlabel(x, fontsize=SMALL)
    axes.set_ylabel(y, fontsize=SMALL)


def marks(axes: Axes, text: Sequence[str], which: str = "x") -> None:
    """Characters as the ticks of an axis."""
    (axes.set_xticks if which == "x" else axes.set_yticks)(range(len(text)), list(text), fontsize=SMALL - 1)


def code_map() -> Markdown:
    """Every folder of the code and its files, with the first sentence of their docstrings."""
    root, lines = POCKET.parents[1], []
    for room in ("qwen_min", "lora", "data", "experiments"):
        for path in sorted((root / room).rglob("*.py"), key=lambda path: (path.parent, path.name)):
            said = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())
            sentence = said if ": `" in said.partition(". ")[0] else said.partition(". ")[0].rstrip(".")
            folder = path.parent.relative_to(root).as_posix()
            lines.append((f"**`{folder}`**" if path.stem == "__init__" else f"`{path.name}`", sentence))
    return table(("file", "what it is"), lines)
