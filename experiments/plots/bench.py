"""Figures of the benchmark: every case beside the peer and its floor, and how time and memory grow with a size."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter, NullLocator

from experiments.plots import base

SIDES = ("ours", "peer")
_LOOKS: dict[str, base.Style] = {
    "ours": {"facecolor": base.COLOURS[0], "edgecolor": "white", "linewidth": 0},
    "peer": {"facecolor": "0.75", "edgecolor": "white", "linewidth": 0, "hatch": "//"},
}
_LINES: dict[str, base.Style] = {
    "ours": {"color": base.COLOURS[0], "linestyle": "-", "marker": "o", "markersize": 4},
    "peer": {"color": base.COLOURS[1], "linestyle": ":", "marker": "s", "markersize": 4},
}
_WHOLE: base.Style = {"linestyle": "-.", "markerfacecolor": "white"}
_FLOOR: base.Style = {"color": "black", "linestyle": "--", "linewidth": 1.6}


def bench_bars(cases: Sequence[Mapping[str, Any]], path: str | Path, title: str, label: str = "") -> None:
    """Draw the time of each case, the peer's being 1, with its floor as a line, and below it the peak memory.

    A case is a line of `bench.json`: `name`, `ours` and perhaps `peer` (`seconds`, `peak_bytes`), perhaps
    `floor_seconds`. Without a peer it is ours that is 1."""
    base.not_empty(cases, "a bar chart of the benchmark")
    timed = [case for case in cases if "peer" in case or case.get("floor_seconds") is not None] or cases
    figure, (time, memory) = base.new_figure(2, [0.7 + 0.42 * len(timed), 0.7 + 0.42 * len(cases)], sharex=False)
    units = [case.get("peer", case["ours"])["seconds"] for case in timed]
    for place, (case, unit) in enumerate(zip(timed, units, strict=True)):
        _pair(time, place, {side: case[side]["seconds"] / unit for side in SIDES if side in case})
        if case.get("floor_seconds") is not None:
            time.plot([case["floor_seconds"] / unit] * 2, [place - 0.42, place + 0.42], **_FLOOR, zorder=3)
    time.set_xlabel("time, as a part of the peer's (of ours where no peer ran)")
    for place, case in enumerate(cases):
        _pair(memory, place, {side: _peak(case[side]) for side in SIDES if side in case})
    memory.set_xlabel("peak memory (GB), libraries included")
    peaks = [" / ".join(f"{_peak(case[side]):.2f}" for side in SIDES if side in case) for case in cases]
    speeds = [_speed(case) for case in timed]
    for axes, drawn, texts in ((time, timed, speeds), (memory, cases, peaks)):
        base.name_bars(axes, [base.wrapped(case["name"], 2.5) for case in drawn], texts)
        axes.set_xlim(left=0)
        base.short_ticks(axes.xaxis)
    shown = [side for side in SIDES if any(side in case for case in cases)]
    handles: list[Artist] = [Rectangle((0, 0), 1, 1, label=side, **_LOOKS[side]) for side in shown]
    if any(case.get("floor_seconds") is not None for case in cases):
        handles.append(Line2D([], [], **_FLOOR, label="floor at the calibrated rates"))
    base.legend_below(figure, handles)
    base.save(figure, path, title, label)


def bench_scaling(points: Sequence[Mapping[str, Any]], path: str | Path, title: str, label: str = "") -> None:
    """Draw time (left) and peak memory (right) over each axis, logarithmic on both, with the floor of the time dashed.

    A point is a line of `bench.json` with `axis`, what grows, in words, `value`, its size, and `per`, what the time is
    of. Points of one axis share a row."""
    base.not_empty(points, "a figure of scaling")
    axes_of: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        axes_of.setdefault(point["axis"], []).append(point)
    figure, panels = base.new_figure(2 * len(axes_of), 1.9, columns=2, sharex=False)
    for row, (name, of) in enumerate(axes_of.items()):
        time, memory = panels[2 * row : 2 * row + 2]
        for side in (side for side in SIDES if side in of[0]):
            here = [(point["value"], point[side]) for point in of if side in point]
            at = [size for size, _ in here]
            time.plot(at, [found["seconds"] for _, found in here], **_LINES[side])
            if "whole_seconds" in of[0][side]:
                time.plot(at, [found["whole_seconds"] for _, found in here], **_LINES[side] | _WHOLE)
            memory.plot(at, [_peak(found) for _, found in here], **_LINES[side])
        floors = [(point["value"], point["floor_seconds"]) for point in of if point.get("floor_seconds") is not None]
        if floors:
            time.plot(*zip(*floors, strict=True), **_FLOOR)
        for axes, what, unit in ((time, base.wrapped(of[0]["per"], 3.0), "seconds"), (memory, "peak memory", "GB")):
            _logarithmic(axes, [point["value"] for point in of])
            axes.set_title(what, fontsize=base.SMALL)
            axes.set_ylabel(unit, fontsize=base.SMALL)
            axes.set_xlabel(base.plain(name), fontsize=base.SMALL)
            axes.tick_params(labelsize=base.SMALL)
    sides = [side for side in SIDES if any(side in point for point in points)]
    handles = [Line2D([], [], **_LINES[side], label=side) for side in sides]
    if any("whole_seconds" in point["ours"] for point in points):
        handles.append(Line2D([], [], **_LINES["ours"] | _WHOLE, label="with the prefill"))
    base.legend_below(figure, [*handles, Line2D([], [], **_FLOOR, label="floor at the calibrated rates")])
    base.save(figure, path, title, label)


def _pair(axes: Axes, place: int, values: Mapping[str, float]) -> None:
    """Two horizontal bars, ours above the peer's."""
    for offset, side in zip((-0.2, 0.2), SIDES, strict=True):
        if side in values:
            axes.barh([place + offset], [values[side]], height=0.36, **_LOOKS[side])


def _logarithmic(axes: Axes, sizes: Sequence[int]) -> None:
    """Both axes, with a tick at each size, and the vertical one only where it spans something."""
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3, linewidth=0.5)
    drawn = np.concatenate([np.asarray(line.get_ydata(), np.float64) for line in axes.lines])
    if base.is_wide(drawn):
        axes.set_yscale("log")
        base.log_ticks(axes.yaxis, drawn)
    else:
        axes.set_ylim(0, 1.15 * drawn.max())
        axes.yaxis.set_minor_formatter(NullFormatter())


def _speed(case: Mapping[str, Any]) -> str:
    """What is printed beside the bars of a case."""
    said = [f"{case['ratio']:.2f}x"] if "ratio" in case else []
    said += [f"{100 * case['share']:.2g} % of floor"] if "share" in case else []
    return ", ".join(said)


def _peak(side: Mapping[str, Any]) -> float:
    return side.get("device_peak_bytes", side["peak_bytes"]) / 1e9
