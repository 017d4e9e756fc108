"""Figures of errors: as they grow along the horizon, token by token, and of one forecaster beside another."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from experiments.plots import base

MODEL = "model"  # the forecaster that is drawn strongest


def running_rmse(
    systems: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    path: str | Path,
    title: str,
    label: str = "",
    ylabel: str = "running RMSE (units of the data)",
) -> None:
    """Draw the root of the mean squared error over the steps up to each step, a panel for each system.

    A system is `title` and `values` (h, V): that root for each variable, NaN where it is not defined."""
    base.not_empty(systems, "a figure of systems")
    values_of = [base.shaped(s["values"], f"the values of {s['title']}", (None, len(names))) for s in systems]
    columns = min(2, len(systems))
    figure, panels = base.new_figure(len(systems), 2.0, columns)
    looks = [_look(i) | {"label": base.plain(name)} for i, name in enumerate(names)]
    for axes, system, values in zip(panels, systems, values_of, strict=True):
        for variable, look in enumerate(looks):
            axes.plot(np.arange(1, len(values) + 1), values[:, variable], **look, markevery=_every(len(values)))
        base.value_axis(axes, values)
        base.panel_title(axes, system["title"], columns)
        base.step_ticks(axes.xaxis, 6)
        axes.set_xlim(0.5, max(map(len, values_of)) + 0.5)
    for axes in panels[-columns:]:
        axes.set_xlabel("step of the horizon")
    base.side_label(figure, ylabel)
    base.legend_below(figure, [Line2D([], [], **look) for look in looks])
    base.save(figure, path, title, label)


def horizon_error(
    lines: Mapping[str, ArrayLike],
    path: str | Path,
    ylabel: str,
    title: str,
    label: str = "",
    strong: Collection[str] = (MODEL,),
) -> None:
    """Draw an error at each step of the horizon for each forecaster, those in `strong` strongly, the last most.

    `lines` maps a forecaster to (h,), NaN where there is none; all of one length."""
    base.not_empty(lines, "an error by step")
    steps = np.asarray(next(iter(lines.values()))).shape[:1]
    errors = {name: base.shaped(values, f"the error of {name}", steps or (None,)) for name, values in lines.items()}
    figure, (axes,) = base.new_figure(1, 3.6)
    ours, handles = [name for name in errors if name in strong], []
    others = [name for name in errors if name not in strong]
    for name, values in errors.items():
        look = (
            _look(ours.index(name)) | _THICK if name in ours else _look(max(3, len(ours)) + others.index(name)) | _THIN
        )
        look = _STRONG if name in ours[-1:] else look
        handles += axes.plot(
            np.arange(1, len(values) + 1), values, **look, markevery=_every(len(values)), label=base.plain(name)
        )
    base.value_axis(axes, np.concatenate(list(errors.values())))
    base.step_ticks(axes.xaxis, 10)
    axes.set_xlim(0.5, len(next(iter(errors.values()))) + 0.5)
    axes.set_xlabel("step of the horizon")
    axes.set_ylabel(base.plain(ylabel))
    base.legend_below(figure, handles)
    base.save(figure, path, title, label)


def token_loss(
    nats: ArrayLike, step_of: ArrayLike, texts: Sequence[str], path: str | Path, title: str, label: str = ""
) -> None:
    """Draw the loss of each token of one true horizon; faint lines part its steps.

    `nats` (n,); `step_of` (n,), the step of the horizon that a token belongs to; `texts`, of n: digits and
    the separators "," ";" "." " " are distinguished."""
    losses = base.shaped(nats, "nats", (None,))
    steps = base.shaped(step_of, "step_of", losses.shape)
    if len(texts) != len(losses):
        raise ValueError(f"texts has {len(texts)} entries: expected {len(losses)}, one for each token")
    at = np.arange(1, len(losses) + 1)
    kinds = np.array([1 if text in (",", ";", ".", " ") else 0 if text.isdecimal() else 2 for text in texts], int)
    figure, (axes,) = base.new_figure(1, 3.6)
    for border in np.flatnonzero(np.diff(steps)) + 1.5:
        axes.axvline(border, color="0.85", linewidth=0.8, zorder=0)
    axes.plot(at, losses, color="0.6", linewidth=0.6, zorder=1)
    handles: list[Line2D] = []
    for kind, name in enumerate(("digit", "separator (, ; .)", "other")):
        of = kinds == kind
        known = losses[of & np.isfinite(losses)]
        if of.any():
            mean = f", mean {known.mean():.3g}" if known.size else ""
            look = base.Style(color=base.COLOURS[kind], marker="osx"[kind], markersize=3.5, linestyle="none")
            handles += axes.plot(at[of], losses[of], **look, label=name + mean)
    known = losses[np.isfinite(losses)]
    if known.size:
        axes.axhline(known.mean(), color="black", linestyle="--", linewidth=1.2)
        handles.append(Line2D([], [], color="black", linestyle="--", label=f"mean of all {known.mean():.3g}"))
    else:
        base.value_axis(axes, known)
    handles.append(Line2D([], [], color="0.85", linewidth=0.8, label="between two steps"))
    base.step_ticks(axes.xaxis, 8)
    axes.set_xlim(0, len(losses) + 1)
    axes.set_xlabel("token of the horizon")
    axes.set_ylabel("loss (nats)")
    base.legend_below(figure, handles)
    base.save(figure, path, title, label)


def score_bars(
    scores: Mapping[str, tuple[float, float, float]],
    path: str | Path,
    xlabel: str,
    title: str,
    label: str = "",
    strong: Collection[str] = (MODEL,),
) -> None:
    """Draw a mean and its interval for each forecaster as a dot and a line, and print the numbers beside it.

    `scores` maps a forecaster to (value, low, high); NaN for what is not defined. Those in `strong` stand out."""
    base.not_empty(scores, "a bar chart of scores")
    rows = base.shaped([list(score) for score in scores.values()], "scores", (None, 3))
    figure, (axes,) = base.new_figure(1, 0.8 + 0.34 * len(rows))
    for place, (name, (value, low, high)) in enumerate(zip(scores, rows, strict=True)):
        shade, marker = (base.COLOURS[0], "o") if name in strong else ("0.4", "D")
        axes.plot([low, high], [place, place], color=shade, linewidth=1.3, marker="|", markersize=8)
        axes.plot([value], [place], color=shade, marker=marker, markersize=7 if name in strong else 5)
    if base.is_wide(rows):
        axes.set_xscale("log")
        base.log_ticks(axes.xaxis, rows[np.isfinite(rows)])
        axes.set_xlim(np.nanmin(rows) / 1.5, np.nanmax(rows) * 1.3)
    elif np.isfinite(rows).any():
        axes.axvline(0, color="black", linewidth=0.8)
    else:
        axes.set_xticks([])
    base.name_bars(axes, [base.plain(name) for name in scores], [_with_interval(*row) for row in rows], 10)
    axes.grid(axis="x", alpha=0.3, linewidth=0.5)
    axes.set_xlabel(base.plain(xlabel))
    base.save(figure, path, title, label)


_THICK, _THIN = base.Style(linestyle="-", linewidth=2.2, zorder=4), base.Style(linewidth=1.2)
_STRONG = base.Style(color="black", linestyle="-", marker="*", markersize=7, linewidth=2.6, zorder=5)


def _look(index: int) -> base.Style:
    dashes, marker = base.line(index)
    return {"color": base.colour(index), "linestyle": dashes, "marker": marker, "markersize": 4, "linewidth": 1.4}


def _every(count: int) -> int:
    return max(1, count // 12)  # a marker on each of many points would hide the line


def _with_interval(value: float, low: float, high: float) -> str:
    if np.isnan(value):
        return "not defined"
    return f"{value:.4g}" + ("" if np.isnan(low + high) else f" ({low:.3g} to {high:.3g})")
