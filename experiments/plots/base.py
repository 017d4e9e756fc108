"""What every figure shares: colours, lines, scales, texts, a figure without global state, and its saving."""

import io
import textwrap
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from experiments.plots.live import svg
from experiments.run_folder.files import write_bytes, write_text

Floats = NDArray[np.float64]
Style = dict[str, Any]

# Okabe and Ito (2008), distinct under every common colour blindness; their yellow, too pale for a line, is a grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (7, 2)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = "os^DvxP*"
HATCHES = ("", "//", "..", "xx", "\\\\", "oo", "--", "++")
WIDTH = 7.0  # inches: on a phone, 390 pixels wide, 9 points are then 7 pixels high
SMALL = 9  # points, of the smallest text
_DPI, _DPI_OF_TALL, _TALL, _TALLEST = 150, 110, 12.0, 40.0  # heights in inches
_TITLE = 12  # points
_LARGE = 120_000  # bytes
_LOG_FROM = 4.0  # a logarithmic scale from this ratio of the largest to the smallest value on


def colour(index: int, of: int = 0) -> Any:
    """Return one of `of` colours; past the named ones they come round again, or are shades where `of` says so."""
    return COLOURS[index % len(COLOURS)] if of <= len(COLOURS) else colormaps["viridis"](index / of)


def line(index: int) -> tuple[Any, str]:
    """Return dashes and marker: with the colour, what tells one line from another."""
    return DASHES[index % len(DASHES)], MARKERS[index % len(MARKERS)]


def shaped(values: ArrayLike, what: str, expected: tuple[int | None, ...]) -> Floats:
    """Return `values` as float64. Raises ValueError unless each axis has the length expected (None: any)."""
    array = np.asarray(values, np.float64)
    if len(array.shape) != len(expected) or any(e not in (None, n) for e, n in zip(expected, array.shape, strict=True)):
        shape = tuple("any" if length is None else length for length in expected)
        raise ValueError(f"{what} has the shape {array.shape}: expected ({', '.join(map(str, shape))})")
    return array


def not_empty(things: Sized, what: str) -> None:
    """Raise ValueError where a figure has nothing to show."""
    if not things:
        raise ValueError(f"{what} is empty: expected at least one entry")


def is_wide(values: ArrayLike) -> bool:
    """Whether positive values span so much that only a logarithmic scale shows the small ones."""
    array = np.asarray(values, np.float64)
    array = array[np.isfinite(array)]
    return bool(array.size) and bool(array.min() > 0) and bool(array.max() > _LOG_FROM * array.min())


def log_ticks(axis: Axis, values: Floats) -> None:
    """Put ticks at round values, two at least in any range that is wide and no more than have room."""
    ratio = np.nanmax(values) / np.nanmin(values)
    if isinstance(axis, XAxis):  # labels side by side need more room
        subs: tuple[float, ...] = (1, 2, 5) if ratio < 20 else (1, 3) if ratio < 1e3 else (1,)
    else:
        subs = (1, 1.5, 2, 3, 4, 6) if ratio < 20 else (1, 2, 5) if ratio < 1e4 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    short_ticks(axis)
    axis.set_minor_locator(NullLocator())


def step_ticks(axis: Axis, most: int) -> None:
    """Put ticks at whole numbers that are round: steps, tokens."""
    axis.set_major_locator(MaxNLocator(most, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def short_ticks(axis: Axis) -> None:
    """Write 2e15 and 0.001 at ticks: an exponent of its own at the end of an axis is overlooked."""
    axis.set_major_formatter(lambda x, _: short(x))


def value_axis(axes: Axes, values: ArrayLike) -> None:
    """Give the y axis a grid, a logarithmic scale where the values are wide, and say so where there are none."""
    axes.grid(alpha=0.3, linewidth=0.5)
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    if not known.size:
        no_points(axes)
    elif is_wide(known):
        axes.set_yscale("log")
        log_ticks(axes.yaxis, known)


def no_points(axes: Axes) -> None:
    axes.text(0.5, 0.5, "no points", ha="center", va="center", transform=axes.transAxes, color="0.4")
    axes.set_yticks([])


def number(value: float) -> str:
    """Return 0.0001 as 1e-4: as learning rates are written."""
    mantissa, exponent = f"{value:e}".split("e")
    return f"{value:g}" if value == 0 or value >= 0.1 else f"{float(mantissa):g}e{int(exponent)}"


def scientific(flops: float) -> str:
    return short(flops, ".3e") if flops else "0"


def short(value: float, form: str = ".5g") -> str:
    """Return 1.235e-05 as 1.235e-5."""
    mantissa, _, exponent = f"{value:{form}}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def plain(text: str) -> str:
    return text.replace("$", r"\$")  # a dollar sign would begin a formula


def wrapped(text: str, width: float, points: float = SMALL) -> str:
    """Break a text into lines that fit `width` inches at a size in points."""
    whole = _inches(plain(text), points)
    if whole > width:  # lines of as many letters as fit on the mean, less a little
        text = textwrap.fill(text, max(1, int(0.93 * len(text) * width / whole)))
    return plain(text)


def _inches(text: str, points: float) -> float:
    return TextPath((0, 0), text, size=points).get_extents().width / 72 if text.strip() else 0.0


def new_figure(
    count: int, height: float | Sequence[float], columns: int = 1, sharex: Any = "col", sharey: Any = False
) -> tuple[Figure, list[Axes]]:
    """Return a figure of `count` panels, row by row; `height`, of each row, is in inches, title and legend aside.

    All figures are of one width. The last `columns` panels are the lowest of their columns."""
    rows = -(-count // columns)
    heights = [height] * rows if isinstance(height, (int, float)) else list(height)
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    options: dict[str, Any] = {"sharex": sharex, "sharey": sharey, "height_ratios": heights}
    panels = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for axes in panels[count:]:
        axes.remove()
    for axes in panels[max(0, count - columns) : count]:
        axes.tick_params(labelbottom=True)  # a shared axis would leave it to the panel that was removed
    return figure, panels[:count]


def panel_title(axes: Axes, text: str, columns: int, more: str = "") -> None:
    """Title one of the panels that share a row, wrapped to its width, and make the labels of its ticks small."""
    axes.set_title(wrapped(text, WIDTH / columns - 0.4) + more, fontsize=SMALL, pad=3)
    axes.tick_params(labelsize=SMALL)


def name_bars(axes: Axes, names: Sequence[str], texts: Sequence[str], size: float = SMALL) -> None:
    """Name horizontal bars, the first on top, and print a text at the right of each.

    These are tick labels, for which the layout makes room."""
    places = np.arange(len(names))
    axes.set_yticks(places, names, fontsize=size)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)
    right = axes.secondary_yaxis("right")
    right.set_yticks(places, texts, fontsize=SMALL)
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)


def side_label(figure: Figure, text: str) -> None:
    """Label the y axes of all panels at once, in lines that are no longer than the panels are high."""
    figure.supylabel(wrapped(text, 0.7 * figure.get_figheight(), 10), fontsize=10)


def legend_below(figure: Figure, handles: Sequence[Artist]) -> None:
    """Put one legend under all panels, in as many columns as fit, and add its height to the figure's."""
    if not handles:
        return
    longest = max(_inches(str(handle.get_label()), SMALL) for handle in handles)
    columns = int((figure.get_figwidth() - 0.2) / (longest + 0.8))
    columns = max(1, min(columns, len(handles)))
    rows = -(-len(handles) // columns)
    columns = -(-len(handles) // rows)  # as even as can be
    figure.set_figheight(figure.get_figheight() + 0.18 + 0.19 * rows)
    place: Style = {"loc": "outside lower center", "frameon": False, "fontsize": SMALL, "handlelength": 3}
    figure.legend(handles=list(handles), ncols=columns, **place)


def save(figure: Figure, path: str | Path, title: str, label: str) -> None:
    """Title the figure, wrapped to its width, and write it as PNG; the layout keeps everything inside.

    Where `path` ends in .svg it is written there as `live.svg` has it too, and the PNG beside it."""
    width = figure.get_figwidth()
    text = wrapped(f"{title} ({label})" if label else title, width, _TITLE)
    if label and "\n" in text:
        text = wrapped(title, width, _TITLE) + "\n" + wrapped(f"({label})", width, _TITLE)
    figure.suptitle(text, fontsize=_TITLE)
    figure.set_figheight(min(figure.get_figheight() + 0.3 + 0.2 * text.count("\n"), _TALLEST))
    figure.set_dpi(_DPI if figure.get_figheight() <= _TALL else _DPI_OF_TALL)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    path = Path(path)
    pixels = _png(np.asarray(canvas.buffer_rgba())[..., :3])  # (height, width, 3)
    if path.suffix == ".svg":
        write_text(path, svg(figure, path.stem))
    write_bytes(path.with_suffix(".png") if path.suffix == ".svg" else path, pixels)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """Return a PNG of 256 colours, or of 96 or 48 where it would still be large: a third of the bytes."""
    image = Image.fromarray(pixels)
    for colours in (256, 96, 48):
        small = io.BytesIO()
        image.quantize(colours, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(small, "png", optimize=True)
        if small.tell() <= _LARGE:
            break
    return small.getvalue()
