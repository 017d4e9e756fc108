"""Figures from plain records, written as PNG atomically; no window, no global state, colour-blind safe."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from experiments.files import write_bytes

Floats = NDArray[np.float64]
Style = dict[str, Any]

# Okabe and Ito (2008), told apart under every common colour blindness; their yellow is too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (7, 2)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = "os^Dvx"
_DPI = 150
_LOG_FROM = 4.0  # a logarithmic scale from this ratio of the largest to the smallest value on


def loss_curves(cells: Sequence[Mapping[str, Any]], path: str | Path, x: str = "step", label: str = "") -> None:
    """Draw the training and the validation loss of all cells, two panels side by side.

    A cell is `name`, `lr`, `rank`, and `train` and `validation`: lists of (step, FLOPs so far, loss in nats
    per token). `x` is "step" or "flops". The learning rate is the colour and the rank the line style; cells
    that agree in both (they differ in something else) get a colour and an entry each. Training is drawn raw,
    faint, and as the mean of the last w steps, w a twentieth of the run and at most 100. Losses that are not
    finite are left out."""
    if x not in ("step", "flops"):
        raise ValueError(f'x must be "step" or "flops", got {x!r}')
    figure, (training, validation) = _figure(11, 4.6, columns=2)
    styles, handles = _styles(cells)
    drawn: tuple[list[Floats], list[Floats]] = ([], [])
    window = min(100, max((len(cell["train"]) for cell in cells), default=0) // 20) or 1
    for cell, (colour, dashes, marker) in zip(cells, styles, strict=True):
        at, loss = _points(cell["train"], x)
        smooth = _trailing_mean(loss, window)
        training.plot(at, loss, color=colour, linewidth=0.6, alpha=0.22)
        mark: Style = {"marker": marker, "markersize": 4} if len(at) == 1 else {}
        training.plot(at, smooth, color=colour, linestyle=dashes, linewidth=1.5, **mark)
        drawn[0].append(smooth)
        at, loss = _points(cell["validation"], x)
        every = max(1, len(at) // 12)  # a marker on each of many points would hide the line
        validation.plot(at, loss, color=colour, linestyle=dashes, marker=marker, markersize=4, markevery=every)
        drawn[1].append(loss)
    smoothing = f"faint: each step; line: mean of the last {window}" if window > 1 else "each step"
    for axes, title, losses in ((training, f"training ({smoothing})", drawn[0]), (validation, "validation", drawn[1])):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("training FLOPs (coursework)" if x == "flops" else "training step")
        axes.set_ylabel("loss (nats per token)")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=x == "step", min_n_ticks=1))
        _loss_axis(axes, np.concatenate(losses) if losses else np.empty(0))
    if handles:
        figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9, handlelength=3)
    _save(figure, path, "Loss of one run" if len(cells) == 1 else "Loss of all cells", label)


def heat_map(table: Mapping[tuple[float, int], float | None], path: str | Path, label: str = "") -> None:
    """Draw the validation loss over learning rate and rank, each value printed in its cell, the lowest
    framed.

    `table` maps (learning rate, rank) to a loss in nats per token, or None for a cell without a result."""
    if not table:
        raise ValueError("a heat map needs at least one cell, got none")
    rates, ranks = sorted({lr for lr, _ in table}), sorted({rank for _, rank in table})
    found = [[table.get((lr, rank)) for rank in ranks] for lr in rates]
    losses = np.array(found, np.float64)  # (rates, ranks), None becomes NaN
    finite = losses[np.isfinite(losses)]
    figure, (axes,) = _figure(3.2 + 1.1 * len(ranks), 2.2 + 0.7 * len(rates))
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    if high == low:  # one shade for all
        low, high = low - 0.5, high + 0.5
    norm = LogNorm(low, high) if _is_wide(finite) else Normalize(low, high)
    colours = colormaps["cividis_r"].with_extremes(bad="white")
    image = axes.imshow(np.ma.masked_invalid(losses), cmap=colours, norm=norm, aspect="auto")
    for (row, column), loss in np.ndenumerate(losses):
        if not np.isfinite(loss):
            box: Style = {"fill": False, "hatch": "///", "edgecolor": "0.75", "linewidth": 0}
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **box))
            axes.text(column, row, "no result", ha="center", va="center", color="0.25", fontsize=9)
            continue
        best = loss == finite.min()
        red, green, blue, _ = colours(norm(loss))
        ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
        text = f"{loss:.4f}\nlowest" if best else f"{loss:.4f}"
        axes.text(column, row, text, ha="center", va="center", color=ink, fontweight="bold" if best else None)
        if best:
            box = {"fill": False, "edgecolor": COLOURS[1], "linewidth": 3, "zorder": 3}
            axes.add_patch(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, **box))
    axes.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    axes.set_yticks(range(len(rates)), [_number(lr) for lr in rates])
    axes.set_xlabel("LoRA rank")
    axes.set_ylabel("learning rate")
    if finite.size and finite.max() > finite.min():
        bar = figure.colorbar(image, ax=axes, label="validation loss (nats per token)")
        if _is_wide(finite):
            _log_ticks(bar.ax, finite)
    _save(figure, path, "Validation loss after training", label)


def forecast(
    time: ArrayLike,
    context: ArrayLike,
    truth: ArrayLike,
    forecast: ArrayLike,
    names: Sequence[str],
    path: str | Path,
    title: str,
    label: str = "",
) -> None:
    """Draw one forecast beside the truth, a panel for each variable over one time axis.

    `time` (P+h,); `context` (P, V), shaded; `truth` and `forecast` (h, V), in the units of the data. A step
    with a NaN in `forecast` was not parsed: it is a gap, and is counted in the legend."""
    at, past, future, guess = (np.asarray(a, np.float64) for a in (time, context, truth, forecast))
    shapes = past.shape, future.shape, guess.shape
    if future.shape != guess.shape or past.shape[1:] != future.shape[1:] or past.shape[1:] != (len(names),):
        raise ValueError(f"context, truth and forecast must be (P, V), (h, V), (h, V), V = {len(names)}: got {shapes}")
    if at.shape != (len(past) + len(future),):
        raise ValueError(f"time must be ({len(past)} + {len(future)},), got {at.shape}")
    unparsed = int(np.isnan(guess).any(axis=1).sum())
    figure, panels = _figure(9, 1.2 + 2.1 * len(names), rows=len(names))
    cut = at[len(past) - 1 : len(past) + 1].mean() if len(past) and len(future) else at[0]
    series = np.concatenate([past, future])
    handles: list[Any] = [
        Rectangle((0, 0), 1, 1, color="0.92", label="context"),
        Line2D([], [], color="0.35", linewidth=1, label="cut-off"),
    ]
    for i, (axes, name) in enumerate(zip(panels, map(_plain, names), strict=True)):
        marker = MARKERS[i % len(MARKERS)]
        axes.axvspan(at[0], cut, color="0.92", zorder=0)
        axes.axvline(cut, color="0.35", linewidth=1)
        seen: Style = {"color": _colour(i, len(names)), "marker": marker, "markersize": 3, "linewidth": 1.4}
        handles += axes.plot(at, series[:, i], **seen, markevery=5, label=f"{name}, truth")
        guessed: Style = {"color": "black", "linestyle": "--", "linewidth": 1.4, "markerfacecolor": "white"}
        axes.plot(at[len(past) :], guess[:, i], **guessed, marker=marker, markersize=4)
        axes.set_ylabel(f"{name}\n(units of the data)")
        axes.margins(x=0.01)
    panels[-1].set_xlabel("time (units of the data)")
    gaps = f" ({unparsed} of {len(guess)} steps not parsed)" if unparsed else ""
    handles.append(Line2D([], [], color="black", linestyle="--", label=f"forecast{gaps}"))
    columns = min(len(handles), 5)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    _save(figure, path, title, label)


def flops_bars(by_component: Mapping[str, int], path: str | Path, title: str, label: str = "") -> None:
    """Draw FLOPs by component as horizontal bars, largest first, each with its share of the sum."""
    if not by_component:
        raise ValueError("a bar chart of FLOPs needs at least one component, got none")
    ordered = sorted(by_component.items(), key=lambda item: -item[1])
    total = sum(by_component.values())
    figure, (axes,) = _figure(8.5, 1.4 + 0.3 * len(ordered))
    bars = axes.barh([_plain(name) for name, _ in ordered], [float(flops) for _, flops in ordered], color=COLOURS[0])
    texts = [f"{_scientific(flops)} ({100 * flops / total:.2f} %)" if total else "0" for _, flops in ordered]
    axes.bar_label(bars, texts, padding=4, fontsize=9)
    axes.set_xlim(0, (ordered[0][1] or 1) * 1.35)  # room for the text of the longest bar
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.set_xlabel(f"FLOPs (sum {total:,})")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path, title, label)


def _styles(cells: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[str, Any, str]], list[Line2D]]:
    """Return colour, dashes and marker of each cell, and the entries of the one legend."""
    rates, ranks = sorted({cell["lr"] for cell in cells}), sorted({cell["rank"] for cell in cells})
    if len({(cell["lr"], cell["rank"]) for cell in cells}) < len(cells):
        styles = [(_colour(i, len(cells)), *_line(i)) for i in range(len(cells))]
        handles = [
            Line2D([], [], color=colour, linestyle=dashes, marker=marker, markersize=4, label=_plain(cell["name"]))
            for cell, (colour, dashes, marker) in zip(cells, styles, strict=True)
        ]
        return styles, handles
    colours = {lr: _colour(i, len(rates)) for i, lr in enumerate(rates)}
    lines = {rank: _line(i) for i, rank in enumerate(ranks)}
    handles = [Line2D([], [], color=colour, linewidth=3, label=f"lr {_number(lr)}") for lr, colour in colours.items()]
    handles += [
        Line2D([], [], color="0.3", linestyle=dashes, marker=marker, markersize=4, label=f"rank {rank}")
        for rank, (dashes, marker) in lines.items()
    ]
    return [(colours[cell["lr"]], *lines[cell["rank"]]) for cell in cells], handles


def _colour(index: int, of: int) -> Any:
    return COLOURS[index] if of <= len(COLOURS) else colormaps["viridis"](index / of)


def _line(index: int) -> tuple[Any, str]:
    return DASHES[index % len(DASHES)], MARKERS[index % len(MARKERS)]


def _points(history: Sequence[tuple[int, int, float]], x: str) -> tuple[Floats, Floats]:
    """Return where (step or FLOPs) and loss of the finite points, in order."""
    values = np.array([(flops if x == "flops" else step, loss) for step, flops, loss in history], np.float64)
    values = values.reshape(-1, 2)
    values = values[np.isfinite(values[:, 1])]
    return values[:, 0], values[:, 1]


def _trailing_mean(values: Floats, window: int) -> Floats:
    """Return the mean of each value and up to window - 1 before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _loss_axis(axes: Axes, losses: Floats) -> None:
    """Take a logarithmic axis where the losses span much, and say so where there are none."""
    axes.grid(alpha=0.3, linewidth=0.5)
    if not losses.size:
        axes.text(0.5, 0.5, "no points", ha="center", va="center", transform=axes.transAxes, color="0.4")
    if _is_wide(losses):
        axes.set_yscale("log")
        _log_ticks(axes, losses)


def _log_ticks(axes: Axes, values: Floats) -> None:
    few = values.max() < 20 * values.min()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6) if few else (1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _is_wide(values: Floats) -> bool:
    return bool(values.size) and values.min() > 0 and values.max() > _LOG_FROM * values.min()


def _number(value: float) -> str:
    """Return 0.0001 as 1e-4: as learning rates are written."""
    mantissa, exponent = f"{value:e}".split("e")
    return f"{value:g}" if value >= 0.1 else f"{float(mantissa):g}e{int(exponent)}"


def _scientific(flops: int) -> str:
    return f"{flops:.3e}".replace("e+0", "e").replace("e+", "e")


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # a dollar sign would begin a formula


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, min(height, 40)), dpi=_DPI, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, sharex="col").flat)


def _save(figure: Figure, path: str | Path, title: str, label: str) -> None:
    """Title the figure, wrapped to its width, and write it; the layout keeps everything inside."""
    whole = f"{title} ({label})" if label else title
    columns = int(figure.get_figwidth() * 10)  # at 12 points a character is about a tenth of an inch wide
    figure.suptitle(_plain(textwrap.fill(whole, columns)), fontsize=12)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_bytes(path, png.getvalue())
