"""Each figure is a whole PNG of a sensible size, also for the records at the edges."""

import math
import struct
import warnings

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments import plots


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns when a layout does not fit
        yield


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to look into."""
    figures = []
    real = Figure.savefig

    def savefig(self, *arguments, **options):
        assert "bbox_inches" not in options, "a tight box clips or changes the size"
        figures.append(self)
        return real(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def _size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary
    return struct.unpack(">II", data[16:24])


def _sensible(path):
    width, height = _size(path)
    return 400 <= width <= 2000 and 200 <= height <= 6100


def _is_inside(figure):
    """Whether the axes with their labels, the legends and the title all lie within the page."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    parts = [*figure.axes, *figure.legends, figure._suptitle]
    boxes = [part.get_tightbbox(renderer) for part in parts]
    width, height = figure.bbox.size
    return all(b.x0 > -1 and b.y0 > -1 and b.x1 < width + 1 and b.y1 < height + 1 for b in boxes)


def _cell(lr=1e-4, rank=8, steps=20, name="cell", losses=None):
    losses = losses or [3 / step + 0.5 for step in range(1, steps + 1)]
    points = [(step, step * 6_776_280_778_752, loss) for step, loss in enumerate(losses, 1)]
    return {"name": name, "lr": lr, "rank": rank, "train": points, "validation": points[4::5]}


GRID = [_cell(lr, rank) for lr in (1e-5, 5e-5, 1e-4) for rank in (2, 4, 8)]


@pytest.mark.parametrize("x", ["step", "flops"])
@pytest.mark.parametrize(
    "cells",
    [
        GRID,
        [_cell(name=f"context {c}") for c in (128, 512, 768)],
        [_cell()],
        [_cell(steps=1)],
        [_cell(steps=5000)],
        [_cell(losses=[1.0, math.nan, math.inf, 2.0, 3.0])],
        [{"name": "none yet", "lr": 1e-4, "rank": 8, "train": [], "validation": []}],
        [],
    ],
    ids=["9 cells", "3 contexts", "1 cell", "1 step", "long", "not finite", "no points", "no cells"],
)
def test_loss_curves_are_drawn(tmp_path, drawn, cells, x):
    plots.loss_curves(cells, tmp_path / "loss.png", x=x)
    assert _sensible(tmp_path / "loss.png") and _is_inside(drawn[0])
    label = "training FLOPs (coursework)" if x == "flops" else "training step"
    assert [axes.get_xlabel() for axes in drawn[0].axes] == [label, label]


def test_the_cells_of_a_grid_differ_by_colour_and_by_line_and_have_one_legend(tmp_path, drawn):
    plots.loss_curves(GRID, tmp_path / "loss.png", label="pocket model, a toy")
    (figure,) = drawn
    training, validation = figure.axes
    lines = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in validation.lines}
    assert len(lines) == 9 and len({c for c, _, _ in lines}) == 3 and len({s for _, s, _ in lines}) == 3
    assert len(training.lines) == 18  # raw and smoothed
    (legend,) = figure.legends
    expected = ["lr 1e-5", "lr 5e-5", "lr 1e-4", "rank 2", "rank 4", "rank 8"]
    assert [text.get_text() for text in legend.get_texts()] == expected
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)
    assert "(pocket model, a toy)" in figure.get_suptitle()


def test_cells_that_share_rate_and_rank_are_told_apart_by_name(tmp_path, drawn):
    plots.loss_curves([_cell(name=f"context {c}") for c in (128, 512, 768)], tmp_path / "loss.png")
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["context 128", "context 512", "context 768"]
    assert len({line.get_color() for line in drawn[0].axes[1].lines}) == 3


def test_smoothing_is_the_mean_of_the_last_steps():
    np.testing.assert_allclose(plots._trailing_mean(np.array([4.0, 2.0, 6.0, 1.0]), 2), [4, 3, 4, 3.5])


def test_loss_curves_refuse_an_axis_they_do_not_know(tmp_path):
    with pytest.raises(ValueError, match='"step" or "flops"'):
        plots.loss_curves(GRID, tmp_path / "loss.png", x="epoch")


TABLE = {(lr, rank): lr * 1e4 + 1 / rank for lr in (1e-5, 5e-5, 1e-4) for rank in (2, 4, 8)}


@pytest.mark.parametrize(
    "table",
    [
        TABLE,
        TABLE | {(1e-5, 2): None, (1e-5, 4): math.nan},
        {(1e-5, 2): 0.7, (1e-4, 4): 0.6},
        {(1e-4, 8): 0.66},
        {(1e-4, 8): None},
        {key: 100 * value**4 for key, value in TABLE.items()},
    ],
    ids=["9 cells", "3 without a result", "holes", "1 cell", "no result", "wide"],
)
def test_a_heat_map_is_drawn(tmp_path, drawn, table):
    plots.heat_map(table, tmp_path / "heat.png", label="toy")
    assert _sensible(tmp_path / "heat.png") and _is_inside(drawn[0])
    texts = [text.get_text() for text in drawn[0].axes[0].texts]
    losses = [loss for loss in table.values() if loss is not None and math.isfinite(loss)]
    assert sorted(t.split("\n")[0] for t in texts if t != "no result") == sorted(f"{loss:.4f}" for loss in losses)
    assert [t for t in texts if t.endswith("\nlowest")] == [f"{loss:.4f}\nlowest" for loss in sorted(losses)[:1]]


def test_the_numbers_of_a_heat_map_stand_out_from_their_cells(tmp_path, drawn):
    plots.heat_map(TABLE, tmp_path / "heat.png")
    axes = drawn[0].axes[0]
    image = axes.images[0]
    for text in axes.texts:
        column, row = (int(value) for value in text.get_position())
        red, green, blue, _ = image.to_rgba(image.get_array())[row, column]
        luminance = 0.299 * red + 0.587 * green + 0.114 * blue
        assert abs(luminance - (text.get_color() == "white")) > 0.45


def test_a_heat_map_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one cell"):
        plots.heat_map({}, tmp_path / "heat.png")


def _forecast(path, gaps=(), variables=2, points=80, horizon=20, title="System 906", **options):
    time = np.linspace(0, 200, points + horizon)
    series = 2 + np.sin(time[:, None] / 6 + np.arange(variables))
    guess = series[points:] + 0.1
    guess[list(gaps)] = np.nan
    names = ["prey", "predator", "grass"][:variables]
    plots.forecast(time, series[:points], series[points:], guess, names, path, title, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gaps": [3, 4, 5, 9]},
        {"gaps": range(20)},
        {"variables": 1},
        {"variables": 3},
        {"horizon": 1},
        {"points": 1},
        {"title": "A title with a $\\frac$ in it and " + "many words " * 20},
    ],
    ids=["plain", "gaps", "nothing parsed", "1 variable", "3 variables", "1 step", "1 point", "title"],
)
def test_a_forecast_is_drawn(tmp_path, drawn, options):
    _forecast(tmp_path / "forecast.png", label="toy", **options)
    assert _sensible(tmp_path / "forecast.png") and _is_inside(drawn[0])
    assert len(drawn[0].axes) == options.get("variables", 2)


def test_a_forecast_shows_context_cut_off_truth_and_gaps(tmp_path, drawn):
    _forecast(tmp_path / "forecast.png", gaps=[3, 4, 5, 9])
    (figure,) = drawn
    for axes in figure.axes:
        cut, truth, guess = axes.lines
        assert cut.get_xdata()[0] == pytest.approx((80 + 79) / 2 * 200 / 99)
        assert len(truth.get_xdata()) == 100 and truth.get_linestyle() == "-"
        assert len(guess.get_xdata()) == 20 and guess.get_linestyle() == "--"
        assert list(np.flatnonzero(np.isnan(guess.get_ydata()))) == [3, 4, 5, 9]
        assert axes.get_ylabel().endswith("(units of the data)")
    prey, predator = (axes.lines[1] for axes in figure.axes)
    assert prey.get_marker() != predator.get_marker()
    (legend,) = figure.legends
    assert "4 of 20 steps not parsed" in legend.get_texts()[-1].get_text()


@pytest.mark.parametrize("change", [{"names": ["prey"]}, {"time": [0.0, 1.0]}, {"forecast": np.zeros((2, 2))}])
def test_a_forecast_of_unlike_shapes_is_refused_and_nothing_is_written(tmp_path, change):
    records = {
        "time": np.arange(7.0),
        "context": np.zeros((4, 2)),
        "truth": np.zeros((3, 2)),
        "forecast": np.zeros((3, 2)),
        "names": ["prey", "predator"],
    }
    with pytest.raises(ValueError, match="must be"):
        plots.forecast(**records | change, path=tmp_path / "forecast.png", title="")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "amounts",
    [
        {"q": 10**15, "down": 4 * 10**17, "a component with a long name in it": 3, "$x": 0},
        {"q": 10**17},
        {"q": 0},
        {f"layer {i}": 10**15 for i in range(200)},
    ],
    ids=["four", "one", "zero", "many"],
)
def test_bars_of_flops_are_drawn(tmp_path, drawn, amounts):
    plots.flops_bars(amounts, tmp_path / "bars.png", "FLOPs of one step")
    assert _sensible(tmp_path / "bars.png") and _is_inside(drawn[0])


def test_bars_are_sorted_and_carry_their_shares(tmp_path, drawn):
    plots.flops_bars({"q": 250, "down": 700, "norm": 50}, tmp_path / "bars.png", "FLOPs")
    (axes,) = drawn[0].axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["down", "q", "norm"]
    assert axes.yaxis_inverted()
    assert [text.get_text() for text in axes.texts] == ["7.000e2 (70.00 %)", "2.500e2 (25.00 %)", "5.000e1 (5.00 %)"]
    with pytest.raises(ValueError, match="at least one component"):
        plots.flops_bars({}, tmp_path / "none.png", "FLOPs")
