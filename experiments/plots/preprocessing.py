"""The figure of what encoding and decoding loses."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from experiments.plots import base


def round_trip(
    time: ArrayLike,
    raw: ArrayLike,
    decoded: ArrayLike,
    names: Sequence[str],
    path: str | Path,
    title: str,
    label: str = "",
) -> None:
    """Draw a series beside what its text reads back to, and below the absolute error, all over time.

    `time` (P,); `raw` and `decoded` (P, V), in the units of the data."""
    at, before, after = (np.asarray(a, np.float64) for a in (time, raw, decoded))
    if before.shape != after.shape or before.shape != (len(at), len(names)):
        rule = f"({len(at)}, {len(names)}), a row a time, a column a name"
        raise ValueError(f"raw and decoded have the shapes {before.shape}, {after.shape}: expected {rule}")
    figure, (series, errors) = base.new_figure(2, [2.4, 1.6])
    handles = []
    for i, name in enumerate(names):
        shade, (dashes, marker) = base.colour(i, len(names)), base.line(i)
        name = base.plain(name)
        kept, again = f"{name}, as it is", f"{name}, decoded again"
        series.plot(at, before[:, i], color=shade, linestyle=dashes, linewidth=1.4, label=kept)
        dots: base.Style = {"linestyle": "none", "marker": marker, "markersize": 4, "markerfacecolor": "none"}
        series.plot(at, after[:, i], color=shade, **dots, label=again)
        look: base.Style = {"color": shade, "linestyle": dashes, "marker": marker, "markersize": 3, "label": name}
        errors.plot(at, np.abs(after[:, i] - before[:, i]), **look, gid=again)
        handles += [
            Line2D([], [], color=shade, linestyle=dashes, label=kept),
            Line2D([], [], color=shade, label=again, **dots),
        ]
    series.set_ylabel("units of the data")
    errors.set_ylabel("absolute error\n(units of the data)")
    errors.set_xlabel("time (units of the data)")
    errors.set_ylim(bottom=0)
    figure.align_ylabels([series, errors])
    base.legend_below(figure, handles)
    base.save(figure, path, title, label)
