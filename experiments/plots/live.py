"""A figure as SVG, with the values of its lines, which a page shows where it is pointed at."""

import io
import json
import re
from collections import Counter
from itertools import chain
from typing import Any
from xml.sax.saxutils import escape
from zlib import crc32

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

POINTS, OF_ALL = 400, 2000  # of a line and of a figure, whose values are kept: a page is to stay below 3 MB
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def svg(figure: Figure, name: str) -> str:
    """A figure whose layout is done as SVG; `name` makes the ids in it differ from those of other figures.

    An entry of its legend is a group with `data-entry`, its number; a line or area that belongs to entries, those that
    are the lines of its gid, or of its label where it has none, is one with `data-series`, its number. `metadata` holds
    as JSON "panels", with "box" (left, top, right, bottom), "x" and "y", the axes' labels; and "series", with "panel",
    "name", "entries", and the "points" of a line: (left, top, x, y), of many every n-th."""
    figure.set_layout_engine("none")
    figure.set_dpi(72)  # at which SVG has its points
    entries: dict[str, int] = {}
    for legend in figure.legends:
        for number, (text, handle) in enumerate(zip(legend.get_texts(), legend.legend_handles, strict=True)):
            entries[text.get_text()] = number
            for artist in (text, handle):
                if artist:
                    artist.set_gid(f"entry-{number}")
    panels: list[dict[str, Any]] = []
    series: list[dict[str, Any]] = []
    height = figure.bbox.height
    most = min(POINTS, OF_ALL // max(1, sum(len(axes.lines) for axes in figure.axes)))
    for axes in figure.axes:
        left, bottom, right, top = np.round(axes.get_window_extent().extents, 1).tolist()
        labels = {"x": axes.get_xlabel() or figure.axes[-1].get_xlabel()}
        labels["y"] = axes.get_ylabel() or figure.axes[0].get_ylabel()
        panels.append({"box": (left, height - top, right, height - bottom)} | labels)
        for artist in chain(axes.lines, axes.collections, axes.patches):
            label = str(artist.get_label())
            of = [entries[one] for one in (artist.get_gid() or label).split("\n") if one in entries]
            named = isinstance(artist, Line2D) and artist.get_transform() is axes.transData and label[:1] != "_"
            artist.set_gid(None)
            if of or named:
                artist.set_gid(f"series-{len(series)}")
                points = _points(artist, height, most) if named else []
                series.append({"panel": len(panels) - 1, "name": label, "entries": of, "points": points})
        for line in axes.lines:
            _thin(line, int(axes.bbox.width / 1.5))
    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(out, metadata=_NO_METADATA)
    values = json.dumps({"panels": panels, "series": series}, separators=(",", ":")).replace(r"\\$", "$")
    return _smaller(out.getvalue()).replace("</svg>", f"<metadata>{escape(values)}</metadata></svg>")


def _points(line: Any, height: float, most: int) -> list[tuple[float, ...]]:
    values = np.stack([np.asarray(of, np.float64) for of in line.get_data()], axis=1)  # (n, 2)
    values = values[np.isfinite(values).all(axis=1)]
    values = values[:: -(-len(values) // most) or 1]
    places = np.round(line.get_transform().transform(values), 1).tolist() if len(values) else []
    exact = [[int(x) if x.is_integer() else x for x in pair] for pair in values.tolist()]
    return [(x, round(height - y, 1), *pair) for (x, y), pair in zip(places, exact, strict=True)]


def _thin(line: Any, width: int) -> None:
    """Of a line of many points keep the lowest and highest in each of `width` parts, and gaps: it looks the same."""
    x, y = (np.asarray(of, np.float64) for of in line.get_data())
    if len(x) <= 2 * width or (np.diff(x) < 0).any():
        return
    known = np.isfinite(y)
    ends = [
        part[one]
        for part in np.array_split(np.arange(len(x)), width)
        for one in (np.where(known, y, np.inf)[part].argmin(), np.where(known, y, -np.inf)[part].argmax())
    ]
    kept = np.union1d(ends, np.flatnonzero(~known))
    if isinstance(every := line.get_markevery(), int):
        line.set_markevery(max(1, every * len(kept) // len(x)))
    line.set_data(x[kept], y[kept])


def _smaller(text: str) -> str:
    """The same picture in fewer bytes: coordinates to a hundredth, the page's font, no ids but those that are used."""
    text = re.sub(r' (d|x|y|points|transform)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), text)
    text = re.sub(r' d="[^"]*"', lambda found: re.sub(r"\s*([MLQCZz])\s*", r"\1", found[0]), text)
    text = re.sub(r'(style="[^"]*?font: [^";]*?px) [^";]*', r"\1 system-ui, sans-serif", text)
    text = re.sub(r'(style="[^"]*?font-family:) [^";]*', r"\1 system-ui, sans-serif", text)  # of newer matplotlib
    text = re.sub(r"\n +", "\n", text)
    text = re.sub(r'<g id="(entry|series)-(\d+)"', r'<g data-\1="\2"', text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    often = [style for style, count in Counter(re.findall(r' style="([^"]*)"', text)).items() if count > 2]
    classes = {style: f"s{crc32(style.encode()):x}" for style in often}  # the same in every figure of a page
    text = re.sub(
        r' style="([^"]*)"', lambda found: f' class="{classes[found[1]]}"' if found[1] in classes else found[0], text
    )
    text = re.sub(r"(<g[^>]*)>\n((?:<use [^>]*>\n)+)", _shared, text.replace("xlink:href", "href"))
    rules = "".join(f".{name}{{{style}}}" for style, name in classes.items())
    return re.sub("(<svg[^>]*>)", rf"\1<style>{rules}</style>", text, count=1)


def _shared(group: re.Match[str]) -> str:
    """A group of marks, with their style in its own tag where all have one."""
    styles = set(re.findall(r' class="\w+"', group[2]))
    if len(styles) != 1 or "class" in group[1] or group[2].count(style := styles.pop()) < group[2].count("<use"):
        return group[0]
    return f"{group[1]}{style}>\n{group[2].replace(style, '')}"
