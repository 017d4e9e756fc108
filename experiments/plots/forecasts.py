"""Figures of forecasts beside the truth: over time, and prey against predator.

Dimension letters: P context points, h forecast points, V variables. A step with a NaN in the forecast was not
parsed: it is a gap, and is counted.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike, NDArray

from experiments.plots import base

UNITS = "units of the data"
_BANDS = ((0.1, 0.9, "80 % band", "#EBD3E1"), (0.25, 0.75, "50 % band", "#D9A3C3"))  # two tints of one colour
_COPIES: tuple[Any, ...] = (":", "-.", (0, (6, 2)))
_DENSITY = "#F0C987"
_FORECAST: base.Style = {"color": "black", "linestyle": "--", "linewidth": 1.4, "markerfacecolor": "white"}


def forecast(
    time: ArrayLike,
    context: ArrayLike,
    truth: ArrayLike,
    forecast: ArrayLike,
    names: Sequence[str],
    path: str | Path,
    title: str,
    label: str = "",
    quantiles: Mapping[float, ArrayLike] | None = None,
    densities: Sequence[tuple[ArrayLike, ArrayLike]] = (),
) -> None:
    """Draw one forecast beside the truth, a panel for each variable over one time axis.

    `time` (P+h,); `context` (P, V), shaded; `truth` and `forecast` (h, V), in the units of the data.
    `quantiles`, each (h, V), has the levels 0.1, 0.25, 0.75 and 0.9 at least: the 80 % and the 50 % band.
    `densities`, of each variable or none: values (n,) and probabilities (n,) of the first step, drawn under it."""
    series = _Series.of(
        {"time": time, "context": context, "truth": truth, "forecast": forecast, "quantiles": quantiles}, names
    )
    figure, panels = base.new_figure(len(names), 2.0)
    for i, (axes, name) in enumerate(zip(panels, names, strict=True)):
        _over_time(axes, series, i, name)
        if densities:
            values, probabilities = (np.asarray(one, np.float64) for one in densities[i])
            wide = probabilities / probabilities.max() * np.ptp(series.time) / 12
            axes.fill_betweenx(
                values, at := series.time[len(series.past)], at + wide, color=_DENSITY, linewidth=0, zorder=1
            )
        axes.set_ylabel(f"{base.plain(name)}\n({UNITS})")
    panels[-1].set_xlabel(f"time ({UNITS})")
    figure.align_ylabels(panels)
    handles = _entries(names, bool(series.bands), series.gaps)
    handles += [Rectangle((0, 0), 1, 1, color=_DENSITY, label="density of the first step")] * bool(densities)
    base.legend_below(figure, handles)
    base.save(figure, path, title, label)


def forecast_grid(
    systems: Sequence[Mapping[str, Any]], names: Sequence[str], path: str | Path, title: str, label: str = ""
) -> None:
    """Draw the forecasts of several systems, a row for each system and a column for each variable, of three at most.

    A system is `title`, and `time`, `context`, `truth`, `forecast` and optionally `quantiles` as in `forecast`, and
    `copies`: forecasts (h, V) without a model that are drawn faintly over it, by name."""
    all_series = _all(systems, names)
    variables, columns = len(names), min(3, len(names))
    figure, panels = base.new_figure(len(systems) * variables, 1.55, columns)
    for i, axes in enumerate(panels):
        system, series = systems[i // variables], all_series[i // variables]
        _over_time(axes, series, i % variables, names[i % variables], small=True)
        base.panel_title(axes, f"{system['title']}: {names[i % variables]}", columns, series.gaps.replace(" (", "\n("))
    for axes in panels[::columns]:
        axes.set_ylabel(UNITS, fontsize=base.SMALL)
    for axes in panels[-columns:]:
        axes.set_xlabel(f"time ({UNITS})")
    figure.align_ylabels(panels[::columns])
    copies = dict.fromkeys(name for series in all_series for name in series.copies)
    base.legend_below(figure, _entries(names, any(series.bands for series in all_series), copies=copies))
    base.save(figure, path, title, label)


def glance(
    systems: Sequence[Mapping[str, Any]], names: Sequence[str], path: str | Path, title: str, label: str = ""
) -> None:
    """Draw a column for each system and a row for each variable, systems as in `forecast_grid`.

    Of the context only the last points are drawn, twice as many as the horizon has."""
    all_series = [series.cut(2 * len(series.future)) for series in _all(systems, names)]
    columns = len(systems)
    figure, panels = base.new_figure(len(names) * columns, 1.25, columns)
    for i, axes in enumerate(panels):
        variable, column = divmod(i, columns)
        _over_time(axes, all_series[column], variable, names[variable], small=True)
        text, gaps = (systems[column]["title"], all_series[column].gaps) if not variable else ("", "")
        base.panel_title(axes, text, columns, gaps.replace(" (", "\n("))
    for axes, name in zip(panels[::columns], names, strict=True):
        axes.set_ylabel(base.plain(name), fontsize=base.SMALL)
    for axes in panels[-columns:]:
        axes.set_xlabel("time", fontsize=base.SMALL)
    figure.align_ylabels(panels[::columns])
    copies = dict.fromkeys(name for series in all_series for name in series.copies)
    base.legend_below(figure, _entries(names, any(series.bands for series in all_series), copies=copies))
    base.save(figure, path, title, label)


def phase_plane(
    systems: Sequence[Mapping[str, Any]], names: Sequence[str], path: str | Path, title: str, label: str = ""
) -> None:
    """Draw the second variable against the first, a panel for each system: the orbit, without its time.

    A system is as in `forecast_grid`; there must be two variables. Truth and forecast start at the context's end."""
    if len(names) != 2:
        raise ValueError(f"a phase plane has {len(names)} variables: expected 2")
    all_series = _all(systems, names)
    columns = min(2, len(systems))
    figure, panels = base.new_figure(len(systems), 2.6, columns, sharex=False)
    looks: list[base.Style] = [
        {"color": "0.6", "linewidth": 0.8, "label": "context"},
        {"color": base.COLOURS[0], "linewidth": 1.6, "marker": "o", "markersize": 3, "label": "truth"},
        _FORECAST | {"marker": "s", "markersize": 3.5, "label": "forecast"},
        base.Style(color=base.COLOURS[1], linestyle="none", marker="*", markersize=11, label="end of the context"),
    ]
    for axes, system, series in zip(panels, systems, all_series, strict=True):
        end = series.past[-1:]
        truth, guess = (_joined(series.past, values) for values in (series.future, series.guess))
        for values, look in zip((series.past, truth, guess, end), looks, strict=True):
            axes.plot(values[:, 0], values[:, 1], **look)
        base.panel_title(axes, system["title"], columns, series.gaps.replace(" (", "\n("))
        axes.grid(alpha=0.3, linewidth=0.5)
    for axes in panels[-columns:]:
        axes.set_xlabel(f"{base.plain(names[0])} ({UNITS})")
    for axes in panels[::columns]:
        axes.set_ylabel(f"{base.plain(names[1])} ({UNITS})")
    base.legend_below(figure, [Line2D([], [], **look) for look in looks])
    base.save(figure, path, title, label)


@dataclass(frozen=True)
class _Series:
    """One system: time (P+h,), past (P, V), future, guess and copies (h, V), and the bands (low, high, name, tint)."""

    time: base.Floats
    past: base.Floats
    future: base.Floats
    guess: base.Floats
    bands: list[tuple[base.Floats, base.Floats, str, str]]
    copies: dict[str, base.Floats]

    @classmethod
    def of(cls, system: Mapping[str, Any], names: Sequence[str]) -> "_Series":
        at, past, future, guess = (np.asarray(system[k], np.float64) for k in ("time", "context", "truth", "forecast"))
        shapes = past.shape, future.shape, guess.shape
        alike = future.shape == guess.shape and past.shape[1:] == future.shape[1:] == (len(names),) and len(future)
        if not alike:
            rule = f"(P, V), (h, V), (h, V) with V = {len(names)} and h at least 1"
            raise ValueError(f"context, truth and forecast have the shapes {shapes}: expected {rule}")
        if at.shape != (len(past) + len(future),):
            raise ValueError(f"time has the shape {at.shape}: expected ({len(past)} + {len(future)},)")
        quantiles = system.get("quantiles") or {}
        given = (system.get("copies") or {}).items()
        copies = {name: base.shaped(values, name, future.shape) for name, values in given}
        if missing := {level for low, high, *_ in _BANDS for level in (low, high)} - quantiles.keys():
            if quantiles:
                raise ValueError(f"quantiles: has no level {min(missing)}: expected 0.1, 0.25, 0.75 and 0.9")
            return cls(at, past, future, guess, [], copies)
        level = {q: base.shaped(values, f"the quantile {q}", future.shape) for q, values in quantiles.items()}
        bands = [(level[low], level[high], text, tint) for low, high, text, tint in _BANDS]
        return cls(at, past, future, guess, bands, copies)

    def cut(self, points: int) -> "_Series":
        """The same with no more than the last points of the context."""
        first = max(0, len(self.past) - points)
        return replace(self, time=self.time[first:], past=self.past[first:])

    @property
    def gaps(self) -> str:
        count = int(np.isnan(self.guess).any(axis=1).sum())
        return f" ({count} of {len(self.guess)} steps not parsed)" if count else ""


def _all(systems: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[_Series]:
    base.not_empty(systems, "a figure of systems")
    return [_Series.of(system, names) for system in systems]


def _over_time(axes: Axes, series: _Series, variable: int, name: str, small: bool = False) -> None:
    """Draw one variable: shaded context, cut-off, bands, truth and forecast (a marker for each step if not small)."""
    at, points = series.time, len(series.past)
    cut = at[points - 1 : points + 1].mean() if points else at[0]
    ahead = at[points:]
    axes.axvspan(at[0], cut, color="0.92", zorder=0, label="context")
    axes.axvline(cut, color="0.35", linewidth=1, label="cut-off")
    for low, high, text, tint in series.bands:
        bottom, top = low[:, variable], high[:, variable]
        axes.fill_between(ahead, bottom, top, color=tint, linewidth=0, zorder=1, label=text)
        alone = _alone(bottom + top)
        axes.vlines(ahead[alone], bottom[alone], top[alone], color=tint, linewidth=4, zorder=1, label=text)
    size = 2.5 if small else 4
    truth: base.Style = _truth(variable) | {"markersize": 0.8 * size, "markevery": 5}
    axes.plot(at, np.concatenate([series.past, series.future])[:, variable], **truth, label=_named(name))
    joined = at[max(0, points - 1) :]  # from the end of the context on
    for i, (copy, values) in enumerate(series.copies.items()):
        axes.plot(joined, _joined(series.past, values)[:, variable], **_copy(i), label=copy)
    guess = _joined(series.past, series.guess)[:, variable]
    marks = base.Style(marker=base.line(variable)[1], markersize=size, markevery=_alone(guess) if small else 1)
    axes.plot(joined, guess, **_FORECAST, **marks, label=f"forecast{'' if small else series.gaps}")
    axes.margins(x=0.01)


def _joined(past: base.Floats, ahead: base.Floats) -> base.Floats:
    """Values (h, V) after the last point of the context, where there is one."""
    return np.concatenate([past[-1:], ahead])


def _alone(values: base.Floats) -> NDArray[np.bool_]:
    """Return which values stand between two gaps: neither a line nor an area would show them."""
    known = np.pad(np.isfinite(values), 1)
    return known[1:-1] & ~known[:-2] & ~known[2:]


def _truth(variable: int) -> base.Style:
    return {"color": base.colour(variable), "marker": base.line(variable)[1], "linewidth": 2.2}


def _named(variable: str) -> str:
    return f"{base.plain(variable)}, truth"


def _copy(index: int) -> base.Style:
    return {"color": "0.45", "linestyle": _COPIES[index % len(_COPIES)], "linewidth": 1.3}


def _entries(names: Sequence[str], bands: bool, gaps: str = "", copies: Iterable[str] = ()) -> list[Artist]:
    handles: list[Artist] = [
        Rectangle((0, 0), 1, 1, color="0.92", label="context"),
        Line2D([], [], color="0.35", linewidth=1, label="cut-off"),
    ]
    handles += [Line2D([], [], **_truth(i), markersize=3, label=_named(n)) for i, n in enumerate(names)]
    handles.append(Line2D([], [], **_FORECAST, label=f"forecast{gaps}"))
    handles += [Line2D([], [], **_copy(i), label=name) for i, name in enumerate(copies)]
    if bands:
        handles += [Rectangle((0, 0), 1, 1, color=tint, label=text) for *_, text, tint in _BANDS]
    return handles
