"""Figure of the gradients of the LoRA matrices, a panel for each layer and projection."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import ArrayLike

from experiments.plots import base


def gradient_norms(
    steps: ArrayLike,
    norms: Mapping[str, ArrayLike],
    path: str | Path,
    title: str,
    label: str = "",
    flagged: Collection[str] = (),
) -> None:
    """Draw the L2 norm of the gradient of each LoRA matrix, a panel for each layer and projection, A and B in it.

    `steps` (n,); `norms` maps names such as "layers.0.q_proj.A" to (n,). The axes are shared and the norms
    logarithmic: a norm of zero (A's at step 1, where B is zero) has no place there and is not drawn. The panel
    of a name in `flagged` is framed and says which matrix vanishes or explodes."""
    at = base.shaped(steps, "steps", (None,))
    panels: dict[str, dict[str, base.Floats]] = {}
    for name, values in norms.items():
        module, _, matrix = name.rpartition(".")
        if matrix not in ("A", "B") or not module:
            raise ValueError(f'a matrix is named {name!r}: expected a name as "layers.0.q_proj.A" or B')
        panels.setdefault(module, {})[matrix] = base.shaped(values, name, at.shape)
    base.not_empty(panels, "a figure of gradient norms")
    if unknown := set(flagged) - norms.keys():
        raise ValueError(f"flagged has {sorted(unknown)[0]!r}: expected names of matrices")
    count = len(panels)
    columns = next((n for n in ((4, 5, 3, 2) if count > 8 else (2, 3, 5)) if count % n == 0), 1)  # no row is cut short
    figure, axes_of = base.new_figure(
        count, 1.15 if columns > 3 or count > 8 else 2.0, columns, sharex=True, sharey=True
    )
    for axes, module in zip(axes_of, sorted(panels, key=by_layer), strict=True):
        for matrix, values in sorted(panels[module].items()):
            seen = np.where(np.isfinite(values) & (values > 0), values, np.nan)
            alone: base.Style = {"marker": "os"[matrix == "B"], "markersize": 4} if np.isfinite(seen).sum() < 4 else {}
            axes.plot(at, seen, **_MATRICES[matrix], **alone, label=f"{matrix} of LoRA")
        if not np.isfinite(axes.dataLim.y0):  # no line has a point
            base.no_points(axes)
        bad = [matrix for matrix in "AB" if f"{module}.{matrix}" in flagged]
        base.panel_title(axes, _panel_name(module) + (f": {', '.join(bad)}" if bad else ""), columns)
        axes.grid(alpha=0.3, linewidth=0.5)
        if bad:
            axes.spines[:].set(edgecolor=base.COLOURS[1], linewidth=2.5)
            place: base.Style = {"transform": axes.transAxes, "ha": "center", "va": "top", "fontsize": base.SMALL}
            axes.text(0.5, 0.95, "vanishes/explodes", **place)
    every = np.concatenate([values for matrices in panels.values() for values in matrices.values()])
    every = every[np.isfinite(every) & (every > 0)]
    if every.size:
        axes_of[0].set_yscale("log")
        axes_of[0].yaxis.set_major_locator(LogLocator(numticks=5))
        axes_of[0].yaxis.set_minor_locator(NullLocator())
        base.short_ticks(axes_of[0].yaxis)
        room = (every.max() / every.min()) ** (0.3 if flagged else 0.05)  # above, for the text of a warning
        axes_of[0].set_ylim(every.min() / 2, every.max() * room * 2)
    base.step_ticks(axes_of[0].xaxis, 2 if columns > 3 and at.size and at.max() >= 10_000 else 4)
    for axes in axes_of[-columns:]:
        axes.set_xlabel("training step", fontsize=base.SMALL)
    base.side_label(figure, "L2 norm of the gradient (nats per token)")
    base.legend_below(figure, [Line2D([], [], label=f"{matrix} of LoRA", **_MATRICES[matrix]) for matrix in "AB"])
    base.save(figure, path, title, label)


_MATRICES: dict[str, base.Style] = {
    "A": {"color": base.COLOURS[0], "linestyle": "-", "linewidth": 1.1},
    "B": {"color": base.COLOURS[1], "linestyle": (0, (3, 1)), "linewidth": 1.1},
}


def _panel_name(module: str) -> str:
    """Return "layer 0, q" for "layers.0.q_proj"."""
    found = re.fullmatch(r"(?:.*\.)?layers\.(\d+)\.(?:.*\.)?(\w+)", module)
    return f"layer {found[1]}, {found[2].removesuffix('_proj')}" if found else module


def by_layer(name: str) -> list[tuple[int, str]]:
    """Return a key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
