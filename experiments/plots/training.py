"""Figures of training: the losses of runs against steps and FLOPs, and the grid of learning rates and ranks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm, Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, SymmetricalLogLocator

from experiments.plots import base
from experiments.run_folder.cells import by_cell, cell_of, noise

MOST_NAMED = 12  # runs whose names fit into a figure
AXES = {"step": "training step", "flops": "training FLOPs (coursework)", "time": "seconds of training and validation"}
MOST_RAW = 3  # runs whose training losses are not one braid


def loss_curves(cells: Sequence[Mapping[str, Any]], path: str | Path, x: str = "step", label: str = "") -> None:
    """Draw the training loss of all runs, as `training_shown` says, and, below it, the validation loss.

    A run is `name`, `lr`, `rank`, optionally `group`, and `train` and `validation`: lists of (step, FLOPs so far, loss
    in nats per token), and optionally `untrained`, the validation loss of step 0. `x` is "step", "flops", or "time":
    the lists then have seconds of work so far where the FLOPs stand.
    In a group (all runs without one are a group) the learning rate is colour and marker and the rank the dashes; runs
    of a group that agree in both (they differ in something else) get a look and an entry each. Training is drawn raw
    and, in a run that is long enough, faint, and as the mean of the last `smoothing` steps. Losses that are not finite
    are left out."""
    if x not in AXES:
        raise ValueError(f"x is {x!r}: expected one of {', '.join(AXES)}")
    how = training_shown(cells)
    figure, panels = base.new_figure(2 if how else 1, 2.7)
    validation, reference = panels[-1], cells[0]["train"] if how == "difference" else None
    styles, handles = _styles(cells)
    drawn: tuple[list[base.Floats], list[base.Floats]] = ([], [])
    windows: set[int] = set()
    starts: list[float] = []
    ends: list[float] = []
    for cell, (shade, dashes, marker, entries) in zip(cells, styles, strict=True):
        window = smoothing(len(cell["train"]))
        windows.add(window)
        look: base.Style = {"color": shade, "linestyle": dashes, "marker": marker, "markersize": 4, "gid": entries}
        look |= {"label": base.plain(cell["name"])}
        at, loss = _points(cell["train"], x, reference)
        smooth = _trailing_mean(loss, window)
        for training in panels[:-1]:
            if not reference:
                training.plot(at, loss, color=shade, linewidth=0.6, alpha=0.22, gid=entries)
            training.plot(at, smooth, **look, linewidth=1.3, markevery=max(1, len(at) // 7))
        drawn[0].append(smooth)
        starts.extend(at[:1])
        ends.extend(at[-1:])
        at, loss = _points(_from_untrained(cell), x)
        validation.plot(at, loss, **look, linewidth=1.3, markevery=max(1, len(at) // 12))  # more would hide the line
        drawn[1].append(loss)
        starts.extend(at[:1])
    means = " to ".join(str(w) for w in sorted({min(windows, default=1), max(windows, default=1)}))
    mean, raw = ("each step", "") if means == "1" else (f"mean of the last {means}", "faint: each step; line: ")
    title = f"training ({raw}{mean})"
    if reference:
        title = f"training, less that of {cells[0]['name']} ({mean})"
    titles = (title, "validation") if how else ("validation",)
    for axes, title, losses in zip(panels, titles, drawn[-len(panels) :], strict=True):
        axes.set_title(base.plain(title), fontsize=10)
        axes.set_ylabel(
            "difference (nats per token)" if reference and axes is not validation else "loss (nats per token)"
        )
        axes.tick_params(labelbottom=True)
        base.value_axis(axes, np.concatenate(losses) if losses else [])
    validation.set_xlabel(AXES[x])
    if base.is_wide(ends):  # else the short runs would be a line at the edge
        if min(starts) > 0:
            validation.set_xscale("log")
            validation.xaxis.set_major_locator(LogLocator(numticks=9))
        else:  # step 0 stands a decade before the first step
            first = min(start for start in starts if start > 0)
            validation.set_xscale("symlog", linthresh=first)
            validation.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=first))
        base.short_ticks(validation.xaxis)
    elif x != "step":
        validation.xaxis.set_major_locator(MaxNLocator(6, min_n_ticks=1))
        base.short_ticks(validation.xaxis)
    else:
        base.step_ticks(validation.xaxis, 8)
    base.legend_below(figure, handles)
    base.save(figure, path, "Loss of one run" if len(cells) == 1 else f"Loss of {len(cells)} runs", label)


def training_shown(cells: Sequence[Mapping[str, Any]]) -> str:
    """How the training losses of runs as in `loss_curves` are drawn: "loss"; of more than `MOST_RAW`, a braid, the
    "difference" from the first at the same step, where all have the same steps, else "", not at all."""
    steps = {tuple(step for step, _, _ in cell["train"]) for cell in cells}
    return "loss" if len(cells) <= MOST_RAW else "difference" if len(steps) == 1 else ""


def search(cells: Sequence[Mapping[str, Any]], path: str | Path, label: str = "") -> None:
    """Draw the validation loss of every cell over its FLOPs, a colour for each length, the best of the longest marked.

    A run is as in `loss_curves`, and may have "judged": (step, flops, loss) at the rungs that it was judged at. Of runs
    that differ in the seed alone the mean is drawn, as far as all go, over a band from the lowest to the highest."""
    base.not_empty(cells, "the figure of a search")
    figure, (axes,) = base.new_figure(1, 3.6)
    each = by_cell(cells).values()
    seeds = [[_points(sorted([*run["validation"], *run.get("judged", ())]), "flops") for run in some] for some in each]
    ends = [min(len(loss) for _, loss in some) for some in seeds]
    losses = [np.stack([loss[:end] for _, loss in some]) for some, end in zip(seeds, ends, strict=True)]  # (seeds, end)
    points = [(some[0][0][:end], of.mean(0)) for some, end, of in zip(seeds, ends, losses, strict=True)]
    cells = [some[0] for some in each]
    steps = [max((step for step, _, _ in cell["validation"]), default=0) for cell in cells]
    lengths, most = sorted(set(steps)), max(at.max(initial=0) for at, _ in points)
    last = {i: loss[-1] for i, (_, loss) in enumerate(points) if steps[i] == lengths[-1] and len(loss)}
    best = min(last, key=last.__getitem__, default=None)
    for i, (at, loss) in enumerate(points):
        look: base.Style = {"color": base.colour(lengths.index(steps[i]), len(lengths)), "markersize": 3}
        look |= {"label": base.plain(cells[i]["name"]), "gid": f"up to step {steps[i]}"}
        axes.plot(at, loss, **look, marker="o", linewidth=2.2 if i == best else 0.9, alpha=1 if i == best else 0.6)
        if len(losses[i]) > 1:
            band: base.Style = {"color": look["color"], "gid": look["gid"], "alpha": 0.15, "linewidth": 0}
            axes.fill_between(at, losses[i].min(0), losses[i].max(0), **band)
        if len(cells) <= MOST_NAMED and len(at):
            side = "right" if at[-1] > most / 2 else "left"  # into the figure
            place = (-6 if side == "right" else 6, 5)
            axes.annotate(cells[i]["name"], (at[-1], loss[-1]), place, textcoords="offset points", ha=side, fontsize=7)
    handles = [
        _entry(f"up to step {length}", base.colour(i, len(lengths)), "-", "o") for i, length in enumerate(lengths)
    ]
    if best is not None:
        at, loss = points[best]
        axes.plot(at[-1:], loss[-1:], "*", color="black", markersize=12, zorder=3)
        handles.append(_entry(f"best: {cells[best]['name']}", "black", "", "*"))
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_xlabel("training FLOPs of the run (coursework)")
    base.value_axis(axes, np.concatenate([of.ravel() for of in losses]))
    axes.xaxis.set_major_locator(MaxNLocator(6, min_n_ticks=1))
    base.short_ticks(axes.xaxis)
    base.legend_below(figure, handles)
    base.save(figure, path, "Search" if len(cells) > 1 else "Search of one run", label)


def heat_map(
    table: Mapping[tuple[float, int], float | Sequence[float] | None], path: str | Path, label: str = ""
) -> None:
    """Draw the validation loss over learning rate and rank, each value printed in its cell, the lowest
    framed, and say with the scale which differences are chance of the seeds.

    `table` maps (learning rate, rank) to a loss in nats per token, or one for each seed, of which the mean and the ends
    are drawn; None for a cell without a result. Cells that chance alone may part from the lowest have a dashed frame,
    and the colours span no less than that."""
    base.not_empty(table, "a heat map")
    rates, ranks = sorted({lr for lr, _ in table}), sorted({rank for _, rank in table})
    seeds = {cell: np.atleast_1d(np.array(values, np.float64)) for cell, values in table.items()}  # None becomes NaN
    found = [[seeds[lr, rank].mean() if (lr, rank) in seeds else np.nan for rank in ranks] for lr in rates]
    losses = np.array(found, np.float64)  # (rates, ranks)
    finite = losses[np.isfinite(losses)]
    several, least = max(map(len, seeds.values())), noise([one for one in seeds.values() if np.isfinite(one).all()])
    figure, (axes,) = base.new_figure(1, max(1.3 + 0.6 * len(rates), 3.1 if several > 1 else 0))
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    if high == low:  # one shade for all
        low, high = low - 0.5, high + 0.5
    wide = base.is_wide(finite) and high - low >= (least or 0)
    if least and high - low < least:
        low, high = (low + high - least) / 2, (low + high + least) / 2
    norm = LogNorm(low, high) if wide else Normalize(low, high)
    colours = colormaps["cividis_r"].with_extremes(bad="white")
    image = axes.imshow(np.ma.masked_invalid(losses), cmap=colours, norm=norm, aspect="auto")
    between = " " if len(ranks) < 5 else "\n"
    for (row, column), loss in np.ndenumerate(losses):
        if not np.isfinite(loss):
            box: base.Style = {"fill": False, "hatch": "///", "edgecolor": "0.75", "linewidth": 0}
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **box))
            axes.text(column, row, "no result", ha="center", va="center", color="0.25", fontsize=9)
            continue
        best = loss == finite.min()
        red, green, blue, _ = colours(norm(loss))
        ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
        text, each = f"{loss:.4f}", seeds[rates[row], ranks[column]]
        if several > 1:
            text += f"\n{each.min():.4f}{between}to {each.max():.4f}"
        elif best:
            text += "\nlowest"
        bold, size = "bold" if best else None, 9 if several > 1 else None
        axes.text(column, row, text, ha="center", va="center", color=ink, fontweight=bold, fontsize=size)
        if best or (least and loss - finite.min() < least):
            box = {"fill": False, "edgecolor": base.COLOURS[1], "linewidth": 3 if best else 1.5, "zorder": 3}
            box["linestyle"] = "-" if best else "--"
            axes.add_patch(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, **box))
    axes.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    axes.set_yticks(range(len(rates)), [base.number(lr) for lr in rates])
    axes.set_xlabel("LoRA rank")
    axes.set_ylabel("learning rate")
    if finite.size and finite.max() > finite.min():
        said = "one seed: noise not known" if several == 1 else f"mean of {several} seeds"
        if least:
            said += f" (dashed: as low);\na difference below {least:.2g} is noise"
        bar = figure.colorbar(image, ax=axes, label=f"validation loss (nats per token)\n{said}")
        if wide:
            base.log_ticks(bar.ax.yaxis, finite)
    base.save(figure, path, "Validation loss after training", label)


def _styles(cells: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[Any, Any, str, str]], list[Line2D]]:
    """Return colour, dashes, marker and entries of each run, a line each, and the entries of the one legend."""
    groups: dict[str, list[int]] = {}
    for i, cell in enumerate(cells):
        groups.setdefault(cell.get("group") or "", []).append(i)
    rates_of = {group: sorted({cells[i]["lr"] for i in members}) for group, members in groups.items()}
    crossed = {}
    for group, members in groups.items():
        firsts = [i for i in members if cells[i]["name"] == cell_of(cells[i]["name"])]  # of several seeds
        choices = {(cells[i]["lr"], cells[i]["rank"]) for i in members}
        crossed[group] = len(members) > 1 and len(choices) == len(firsts)
    slots = sum(len(rates_of[group]) if crossed[group] else len(members) for group, members in groups.items())
    styles: dict[int, tuple[Any, Any, str, str]] = {}
    handles: list[Line2D] = []
    slot = 0
    for group, members in groups.items():
        start = f"{group}: " if group else ""
        if not crossed[group]:
            for i in members:
                name = cells[i]["name"]
                look = base.colour(slot, slots), *base.line(slot)
                handles.append(_entry(name if name.startswith(group) else start + name, *look))
                styles[i] = (*look, str(handles[-1].get_label()))
                slot += 1
            continue
        ranks = sorted({cells[i]["rank"] for i in members})
        looks = {rate: (base.colour(slot + j, slots), base.line(slot + j)[1]) for j, rate in enumerate(rates_of[group])}
        slot += len(looks)
        for i in members:
            shade, marker = looks[cells[i]["lr"]]
            entries = f"{start}lr {base.number(cells[i]['lr'])}\n{start}rank {cells[i]['rank']}"
            styles[i] = (shade, base.line(ranks.index(cells[i]["rank"]))[0], marker, entries)
        handles += [
            _entry(f"{start}lr {base.number(rate)}", shade, "-", marker) for rate, (shade, marker) in looks.items()
        ]
        handles += [_entry(f"{start}rank {rank}", "0.3", base.line(j)[0], "") for j, rank in enumerate(ranks)]
    return [styles[i] for i in range(len(cells))], handles


def _entry(name: str, shade: Any, dashes: Any, marker: str) -> Line2D:
    return Line2D([], [], color=shade, linestyle=dashes, marker=marker, markersize=4, label=base.plain(name))


def _points(
    history: Sequence[tuple[int, int, float]], x: str, less: Sequence[tuple[int, int, float]] | None = None
) -> tuple[base.Floats, base.Floats]:
    """Return where (see `loss_curves`) and loss, less that of another history, of the finite points, in order."""
    values = np.array([(step if x == "step" else amount, loss) for step, amount, loss in history], np.float64)
    values = values.reshape(-1, 2)
    if less:
        values[:, 1] -= [loss for _, _, loss in less]
    values = values[np.isfinite(values[:, 1])]
    return values[:, 0], values[:, 1]


def smoothing(steps: int) -> int:
    """Return how many steps a mean is taken of in a run of this length: a twentieth, at most 100."""
    return min(100, steps // 20) or 1


def _from_untrained(cell: Mapping[str, Any]) -> list[tuple[int, int, float]]:
    """The validation losses of a run, from step 0 on where that is known."""
    seen = list(cell["validation"])
    if cell.get("untrained") is not None and not (seen and seen[0][0] == 0):
        seen.insert(0, (0, 0, cell["untrained"]))
    return seen


def _trailing_mean(values: base.Floats, window: int) -> base.Floats:
    """Return the mean of each value and up to window - 1 before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
