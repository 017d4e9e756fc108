"""Each figure is a whole, small PNG of a sensible size that shows its records, also for the records at the edges."""

import io
import math
import struct
import warnings

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import same_color, to_hex
from matplotlib.text import Text
from PIL import Image

from experiments import plots
from experiments.plots import base, training


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns when a layout does not fit
        yield


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, to look into; with half the dots, in half the time."""
    monkeypatch.setattr(base, "_DPI", base._DPI / 2)
    monkeypatch.setattr(base, "_DPI_OF_TALL", base._DPI_OF_TALL / 2)
    figures = []
    real = FigureCanvasAgg.draw

    def draw(self):
        figures.append(self.figure)
        return real(self)

    monkeypatch.setattr(FigureCanvasAgg, "draw", draw)
    return figures


def _is_sound(path):
    """Whether the file is one whole PNG of a sensible size, and no temporary is left beside it."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    width, height = struct.unpack(">II", data[16:24])
    return 200 <= width <= 2000 and 75 <= height <= 6100


def _is_legible(figure):
    """Whether all lies within the page, no legend on a panel, no tick label on the next, no text below 9 points."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [part.get_tightbbox(renderer) for part in [*figure.axes, *figure.legends, figure._suptitle]]
    width, height = figure.bbox.size
    inside = all(b.x0 > -1 and b.y0 > -1 and b.x1 < width + 1 and b.y1 < height + 1 for b in boxes)
    panels, rest = boxes[: len(figure.axes)], boxes[len(figure.axes) :]
    apart = not any(a.overlaps(b) for i, a in enumerate(rest) for b in [*panels, *rest[i + 1 :]])
    for axes in figure.axes:
        low, high = sorted(axes.get_xlim())
        ticks = [t for t in axes.xaxis.get_major_ticks() if t.label1.get_visible() and low <= t.get_loc() <= high]
        labels = sorted(
            (t.label1.get_window_extent(renderer) for t in ticks if t.label1.get_text()), key=lambda b: b.x0
        )
        apart &= all(a.x1 < b.x0 for a, b in zip(labels, labels[1:], strict=False))
    return inside and apart and all(t.get_fontsize() >= 9 for t in figure.findobj(Text) if t.get_text())


def _texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def _cell(lr=1e-4, rank=8, steps=20, name="cell", losses=None):
    losses = losses or [3 / step + 0.5 for step in range(1, steps + 1)]
    points = [(step, step * 6_776_280_778_752, loss) for step, loss in enumerate(losses, 1)]
    return {"name": name, "lr": lr, "rank": rank, "train": points, "validation": points[4::5]}


GRID = [_cell(lr, rank) for lr in (1e-5, 5e-5, 1e-4) for rank in (2, 4, 8)]


STUDY = [
    _cell(1e-4, 4, name="default") | {"group": "default"},
    *(cell | {"group": "grid"} for cell in GRID),
    *(_cell(1e-4, 8, name=f"context {c}") | {"group": "context"} for c in (128, 512, 768)),
    _cell(1e-4, 8, steps=400, name="final") | {"group": "final"},
]


@pytest.mark.parametrize(
    "cells",
    [
        GRID,
        STUDY,
        [_cell(steps=1)],
        [_cell(steps=5000)],
        [{"name": "none yet", "lr": 1e-4, "rank": 8, "train": [], "validation": []}],
        [],
    ],
    ids=["9 cells", "14 runs", "1 step", "long", "no points", "no cells"],
)
def test_loss_curves_are_drawn(tmp_path, drawn, cells):
    x, label = ("flops", "training FLOPs (coursework)") if cells is STUDY else ("step", "training step")
    plots.loss_curves(cells, tmp_path / "loss.png", x=x, label="toy: the pocket model")
    assert _is_sound(tmp_path / "loss.png") and _is_legible(drawn[0])
    assert "(toy: the pocket model)" in drawn[0].get_suptitle()
    assert [axes.get_xlabel() for axes in drawn[0].axes] == ["", label]  # one axis for both panels


def test_the_cells_of_a_grid_differ_by_colour_and_by_line_and_have_one_legend(tmp_path, drawn):
    plots.loss_curves(GRID, tmp_path / "loss.png", label="pocket model, a toy")
    (figure,) = drawn
    training, validation = figure.axes
    lines = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in validation.lines}
    assert len(lines) == 9 and [len(set(part)) for part in zip(*lines, strict=True)] == [3, 3, 3]
    assert len(training.lines) == 18  # raw and smoothed
    (legend,) = figure.legends
    assert _texts(legend) == ["lr 1e-5", "lr 5e-5", "lr 1e-4", "rank 2", "rank 4", "rank 8"]
    assert "(pocket model, a toy)" in figure.get_suptitle()


def test_cells_that_share_rate_and_rank_are_told_apart_by_name(tmp_path, drawn):
    plots.loss_curves([_cell(name=f"context {c}") for c in (128, 512, 768)], tmp_path / "loss.png")
    assert _is_legible(drawn[0])
    (legend,) = drawn[0].legends
    assert _texts(legend) == ["context 128", "context 512", "context 768"]
    assert len({line.get_color() for line in drawn[0].axes[1].lines}) == 3


def test_the_runs_of_a_study_differ_by_more_than_colour_and_are_named_by_their_group(tmp_path, drawn):
    plots.loss_curves(STUDY, tmp_path / "loss.png", x="flops")
    (figure,) = drawn
    training, validation = figure.axes
    assert len({(line.get_marker(), str(line._unscaled_dash_pattern)) for line in validation.lines}) == 14
    grid = [f"grid: {text}" for text in ("lr 1e-5", "lr 5e-5", "lr 1e-4", "rank 2", "rank 4", "rank 8")]
    assert _texts(figure.legends[0]) == ["default", *grid, "context 128", "context 512", "context 768", "final"]
    for raw, smooth, seen, run in zip(training.lines[::2], training.lines[1::2], validation.lines, STUDY, strict=True):
        _, flops, loss = np.transpose(run["train"])
        np.testing.assert_array_equal(raw.get_xydata(), np.stack([flops, loss], axis=1))
        window = len(loss) // 20  # of each run its own
        np.testing.assert_allclose(smooth.get_ydata()[-1], loss[-window:].mean())
        np.testing.assert_array_equal(seen.get_xydata(), np.array(run["validation"])[:, 1:])
    assert {axes.get_xscale() for axes in figure.axes} == {"log"}  # 20 and 400 steps
    heights = [axes.get_position().height * figure.get_figheight() for axes in figure.axes]
    assert min(heights) > 2  # inches, whatever the legend takes


def test_runs_of_like_length_have_a_linear_axis_and_losses_that_are_not_finite_are_left_out(tmp_path, drawn):
    plots.loss_curves([_cell(losses=[1.0, math.nan, math.inf, 2.0, 3.0])], tmp_path / "loss.png")
    raw = drawn[0].axes[0].lines[0]
    np.testing.assert_array_equal(raw.get_xydata(), [[1, 1], [4, 2], [5, 3]])
    assert drawn[0].axes[0].get_xscale() == "linear"


def test_runs_of_unlike_length_that_begin_at_step_zero_have_a_linear_axis(tmp_path, drawn):
    plots.loss_curves([_cell(steps=9) | {"validation": [(0, 0, 2.0)]}, _cell(2, steps=90)], tmp_path / "loss.png")
    assert drawn[0].axes[0].get_xscale() == "linear"  # zero has no place on a logarithmic one


def test_smoothing_is_the_mean_of_the_last_steps():
    np.testing.assert_allclose(training._trailing_mean(np.array([4.0, 2.0, 6.0, 1.0]), 2), [4, 3, 4, 3.5])


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
    assert _is_sound(tmp_path / "heat.png") and _is_legible(drawn[0])
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


def _forecast(path, gaps=(), variables=2, points=80, horizon=20, title="System 906", bands=False, **options):
    time = np.linspace(0, 200, points + horizon)
    series = 2 + np.sin(time[:, None] / 6 + np.arange(variables))
    guess = series[points:] + 0.1
    guess[list(gaps)] = np.nan
    if bands:
        options["quantiles"] = {q: guess + (q - 0.5) * np.ones(2) for q in (0.1, 0.25, 0.5, 0.75, 0.9)}
    names = ["prey", "predator", "grass"][:variables]
    plots.forecast(time, series[:points], series[points:], guess, names, path, title, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gaps": range(20), "bands": True},
        {"variables": 1},
        {"variables": 3},
        {"horizon": 1},
        {"points": 1},
        {"title": "A title with a $\\frac$ in it and " + "many words " * 20},
    ],
    ids=["plain", "nothing parsed", "1 variable", "3 variables", "1 step", "1 point", "title"],
)
def test_a_forecast_is_drawn(tmp_path, drawn, options):
    _forecast(tmp_path / "forecast.png", label="toy", **options)
    assert _is_sound(tmp_path / "forecast.png") and _is_legible(drawn[0])
    assert len(drawn[0].axes) == options.get("variables", 2)


def test_a_forecast_shows_context_cut_off_truth_and_gaps(tmp_path, drawn):
    _forecast(tmp_path / "forecast.png", gaps=[3, 4, 5, 9])
    (figure,) = drawn
    assert _is_legible(figure)
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
    assert "4 of 20 steps not parsed" in _texts(legend)[-1]


def _corners(area):
    return {tuple(point) for path in area.get_paths() for point in path.vertices.tolist()}


def test_the_bands_of_a_forecast_are_its_quantiles(tmp_path, drawn):
    _forecast(tmp_path / "forecast.png", gaps=[2, 4], bands=True)
    (figure,) = drawn
    assert _is_sound(tmp_path / "forecast.png") and _is_legible(figure)
    time = np.linspace(0, 200, 100)[80:]
    for axes in figure.axes:
        guess = axes.lines[2].get_ydata()
        wide, alone, narrow, _ = axes.collections
        for area, half in ((wide, 0.4), (narrow, 0.25)):
            known = np.isfinite(guess)
            edges = [np.stack([time, guess + side], axis=1)[known].tolist() for side in (-half, half)]
            assert _corners(area) == {tuple(point) for edge in edges for point in edge}
        assert _corners(alone) == {(time[3], guess[3] - 0.4), (time[3], guess[3] + 0.4)}  # between two gaps
        assert not same_color(wide.get_facecolor(), narrow.get_facecolor())
    assert _texts(figure.legends[0])[-2:] == ["80 % band", "50 % band"]


@pytest.mark.parametrize(
    ("quantiles", "message"),
    [
        ({0.1: np.zeros((3, 2)), 0.9: np.zeros((3, 2))}, "no level 0.25"),
        ({q: [1.0] for q in (0.1, 0.25, 0.75, 0.9)}, "shape"),
    ],
)
def test_quantiles_that_make_no_bands_are_refused(tmp_path, quantiles, message):
    with pytest.raises(ValueError, match=message):
        series = np.zeros((3, 2))
        plots.forecast(np.arange(6), series, series, series, ["x", "y"], tmp_path / "f.png", "", quantiles=quantiles)


@pytest.mark.parametrize("change", [{"names": ["prey"]}, {"time": [0.0, 1.0]}, {"forecast": np.zeros((2, 2))}])
def test_a_forecast_of_unlike_shapes_is_refused_and_nothing_is_written(tmp_path, change):
    records = {
        "time": np.arange(7.0),
        "context": np.zeros((4, 2)),
        "truth": np.zeros((3, 2)),
        "forecast": np.zeros((3, 2)),
        "names": ["prey", "predator"],
    }
    with pytest.raises(ValueError, match="ha(s|ve) the shapes? .*: expected"):
        plots.forecast(**records | change, path=tmp_path / "forecast.png", title="")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "amounts",
    [
        {"q": 10**15, "down": 4 * 10**17, "a component with a long name in it": 3, "$x": 0},
        {"q": 10**17},
        {"q": 0},
        {f"layer {i}": 10**15 for i in range(60)},
    ],
    ids=["four", "one", "zero", "many"],
)
def test_bars_of_flops_are_drawn(tmp_path, drawn, amounts):
    plots.flops_bars(amounts, tmp_path / "bars.png", "FLOPs of one step")
    assert _is_sound(tmp_path / "bars.png") and _is_legible(drawn[0])


def test_bars_are_sorted_and_carry_their_shares(tmp_path, drawn):
    plots.flops_bars({"q": 250, "down": 700, "norm": 50}, tmp_path / "bars.png", "FLOPs")
    (axes,) = drawn[0].axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["down", "q", "norm"]
    assert axes.yaxis_inverted()
    assert [text.get_text() for text in axes.texts] == ["7.000e2 (70.00 %)", "2.500e2 (25.00 %)", "5.000e1 (5.00 %)"]
    with pytest.raises(ValueError, match="components is empty"):
        plots.flops_bars({}, tmp_path / "none.png", "FLOPs")


def _system(title="System 1 (growing)", points=12, horizon=5, gaps=()):
    time = np.arange(points + horizon) / 2
    series = 2 + np.stack([np.sin(time), np.cos(time)], axis=1)
    guess = series[points:] * 1.1
    guess[list(gaps)] = np.nan
    return {"title": title, "time": time, "context": series[:points], "truth": series[points:], "forecast": guess}


def test_a_grid_of_forecasts_has_a_row_for_each_system_and_a_column_for_each_variable(tmp_path, drawn):
    systems = [_system(), _system("System 2 $x", gaps=[1, 2]), _system("System 3 " + "(long) " * 9, gaps=range(5))]
    plots.forecast_grid(systems, ["prey", "predator"], tmp_path / "grid.png", "Shown", "toy: the pocket model")
    assert _is_sound(tmp_path / "grid.png") and _is_legible(drawn[0])
    panels = np.reshape(drawn[0].axes, (3, 2))
    for row, system in zip(panels, systems, strict=True):
        for i, axes in enumerate(row):
            _, truth, guess = axes.lines
            whole = np.concatenate([system["context"], system["truth"]])
            np.testing.assert_array_equal(truth.get_xydata(), np.stack([system["time"], whole[:, i]], axis=1))
            np.testing.assert_array_equal(
                guess.get_xydata(), np.stack([system["time"][12:], system["forecast"][:, i]], 1)
            )
    assert [axes.get_title() for axes in panels[:2].flat] == [
        "System 1 (growing): prey",
        "System 1 (growing): predator",
        "System 2 \\$x: prey\n(2 of 5 steps not parsed)",
        "System 2 \\$x: predator\n(2 of 5 steps not parsed)",
    ]
    (legend,) = drawn[0].legends
    assert _texts(legend) == ["context", "cut-off", "prey, truth", "predator, truth", "forecast"]
    assert "(toy: the pocket model)" in drawn[0].get_suptitle()


@pytest.mark.parametrize("variables", [1, 3, 5, 8])
def test_a_grid_of_any_number_of_variables_is_legible(tmp_path, drawn, variables):
    systems = [_system(), _system("System 2 (oscillating)")]
    series = ("context", "truth", "forecast")
    wide = [s | {name: np.tile(s[name], 4)[:, :variables] for name in series} for s in systems]
    names = [f"x{i}" for i in range(variables)]
    plots.forecast_grid(wide, names, tmp_path / "grid.png", "Shown")
    assert _is_legible(drawn[0]) and len(drawn[0].axes) == 2 * variables
    boxes = [axes.get_tightbbox() for axes in drawn[0].axes]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    titles = [axes.get_title().replace("\n", " ") for axes in drawn[0].axes]
    assert titles == [f"{system['title']}: {name}" for system in systems for name in names]


def test_a_phase_plane_draws_the_predator_over_the_prey_and_marks_where_the_forecast_starts(tmp_path, drawn):
    systems = [_system(), _system("System 2", gaps=[0, 2]), _system("System 3", gaps=range(5))]
    plots.phase_plane(systems, ["prey", "predator"], tmp_path / "phase.png", "Phase plane", "toy")
    assert _is_sound(tmp_path / "phase.png") and _is_legible(drawn[0])
    assert len(drawn[0].axes) == 3
    for axes, system, first in zip(drawn[0].axes, systems, (0, 1, 5), strict=True):
        context, truth, guess, start = axes.lines
        for line, values in ((context, "context"), (truth, "truth"), (guess, "forecast")):
            np.testing.assert_array_equal(line.get_xydata(), system[values])
        np.testing.assert_array_equal(start.get_xydata(), system["forecast"][first : first + 1])
        assert guess.get_linestyle() == "--" and truth.get_linestyle() == "-" and start.get_marker() == "*"
    assert drawn[0].axes[2].get_xlabel() == "prey (units of the data)"
    assert drawn[0].axes[2].get_ylabel() == "predator (units of the data)"
    with pytest.raises(ValueError, match="names has 3 variables: expected two"):
        plots.phase_plane(systems, ["x", "y", "z"], tmp_path / "none.png", "")


@pytest.mark.parametrize("draw", [plots.forecast_grid, plots.phase_plane, plots.running_rmse])
def test_a_figure_of_no_systems_is_refused(tmp_path, draw):
    with pytest.raises(ValueError, match="is empty: expected at least one"):
        draw([], ["prey", "predator"], tmp_path / "none.png", "")
    assert list(tmp_path.iterdir()) == []


def test_the_running_error_has_a_panel_for_each_system(tmp_path, drawn):
    close = np.array([[1.0, 2.0], [1.5, 2.5], [2.0, 3.0]])
    wide = np.array([[0.01, math.nan], [0.1, 0.2], [1.0, 0.3]])
    values = [close, wide, close * 0, close[:1], close * math.nan]
    systems = [{"title": f"System {i}", "values": v} for i, v in enumerate(values)]
    plots.running_rmse(systems, ["prey", "predator"], tmp_path / "rmse.png", "Running RMSE", "toy")
    assert _is_sound(tmp_path / "rmse.png") and _is_legible(drawn[0])
    for axes, drawn_values in zip(drawn[0].axes, values, strict=True):
        assert [list(line.get_xdata()) for line in axes.lines] == 2 * [list(range(1, len(drawn_values) + 1))]
        np.testing.assert_array_equal(np.transpose([line.get_ydata() for line in axes.lines]), drawn_values)
        assert len({(line.get_marker(), line.get_linestyle()) for line in axes.lines}) == 2
    assert [axes.get_yscale() for axes in drawn[0].axes] == ["linear", "log", "linear", "linear", "linear"]
    assert [text.get_text() for text in drawn[0].axes[4].texts] == ["no points"]
    labelled = [axes.xaxis.get_major_ticks()[0].label1.get_visible() for axes in drawn[0].axes]
    assert labelled == [False, False, False, True, True]  # the lowest of each column
    assert _texts(drawn[0].legends[0]) == ["prey", "predator"]
    with pytest.raises(ValueError, match=r"System 7 has the shape \(3,\): expected \(any, 2\)"):
        plots.running_rmse([{"title": "System 7", "values": [1, 2, 3]}], ["x", "y"], tmp_path / "none.png", "")


def test_the_error_by_step_shows_the_model_strongest(tmp_path, drawn):
    lines = {"persistence": [0.2, 0.3, 0.4], "model": [0.01, math.nan, 0.03], "law fit": [1e-5, 1e-5, 2e-5]}
    plots.horizon_error(lines, tmp_path / "error.png", "MSE", "Error by step", "toy")
    assert _is_sound(tmp_path / "error.png") and _is_legible(drawn[0])
    (axes,) = drawn[0].axes
    assert [line.get_label() for line in axes.lines] == list(lines)
    for line, values in zip(axes.lines, lines.values(), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), np.stack([[1, 2, 3], values], axis=1))
    assert len({(line.get_marker(), line.get_linestyle()) for line in axes.lines}) == 3
    other, model, _ = axes.lines
    assert model.get_linewidth() > other.get_linewidth() and model.get_zorder() > other.get_zorder()
    assert axes.get_yscale() == "log" and axes.get_ylabel() == "MSE"
    with pytest.raises(ValueError, match=r"error of b has the shape \(3,\): expected \(2\)"):
        plots.horizon_error({"a": [1, 2], "b": [1, 2, 3]}, tmp_path / "none.png", "MSE", "")
    with pytest.raises(ValueError, match="at least one forecaster"):
        plots.horizon_error({}, tmp_path / "none.png", "MSE", "")


@pytest.mark.parametrize("values", [[0.0, 0.1, 10.0], [math.nan] * 3])
def test_an_error_that_is_zero_or_absent_has_a_linear_axis(tmp_path, drawn, values):
    plots.horizon_error({"model": values}, tmp_path / "error.png", "MSE", "Error by step")
    assert _is_legible(drawn[0]) and drawn[0].axes[0].get_yscale() == "linear"


def test_the_loss_of_tokens_parts_the_steps_and_tells_digits_from_separators(tmp_path, drawn):
    texts = [*"1.2,0.5;", *"3.4,0.6;", *"1.0,9.9", " x"]
    nats = np.linspace(0, 2.3, 24)
    plots.token_loss(nats, np.arange(24) // 8, texts, tmp_path / "tokens.png", "Token loss", "toy")
    assert _is_sound(tmp_path / "tokens.png") and _is_legible(drawn[0])
    first, second, path, digits, separators, other, mean = drawn[0].axes[0].lines
    assert (first.get_xdata()[0], second.get_xdata()[0]) == (8.5, 16.5)
    np.testing.assert_array_equal(path.get_xydata(), np.stack([np.arange(1, 25), nats], axis=1))
    is_separator = np.array([text in {".", ",", ";"} for text in texts])
    of_kind = [~is_separator & (np.arange(24) < 23), is_separator, np.arange(24) == 23]
    for line, kind in zip((digits, separators, other), of_kind, strict=True):
        np.testing.assert_array_equal(line.get_xydata(), path.get_xydata()[kind])
    assert len({line.get_marker() for line in (digits, separators, other)}) == 3
    assert mean.get_ydata()[0] == pytest.approx(1.15)
    digit_mean, separator_mean = (f"{nats[kind].mean():.3g}" for kind in of_kind[:2])
    assert _texts(drawn[0].legends[0]) == [
        f"digit, mean {digit_mean}",
        f"separator (, ; .), mean {separator_mean}",
        "other, mean 2.3",
        "mean of all 1.15",
        "between two steps",
    ]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_loss_of_few_or_unknown_tokens_is_drawn(tmp_path, drawn, count):
    nats = [math.nan] * 3 if count == 3 else [0.5] * count
    plots.token_loss(nats, np.arange(count), ["1"] * count, tmp_path / "tokens.png", "Token loss")
    assert _is_sound(tmp_path / "tokens.png") and _is_legible(drawn[0])


@pytest.mark.parametrize(
    ("step_of", "texts", "message"),
    [([0, 0], ["1"] * 3, r"step_of has the shape \(2,\): expected \(3\)"), ([0] * 3, ["1"], "texts has 1: expected 3")],
)
def test_tokens_of_unlike_lengths_are_refused(tmp_path, step_of, texts, message):
    with pytest.raises(ValueError, match=message):
        plots.token_loss([0.1, 0.2, 0.3], step_of, texts, tmp_path / "none.png", "")


def _norms(layers, count):
    names = [f"layers.{i}.{p}_proj.{m}" for i in reversed(range(layers)) for p in "vq" for m in "BA"]
    return {name: np.linspace(0, 10, count) ** 2 * (i + 1) for i, name in enumerate(names)}


def test_the_gradients_of_24_layers_are_48_panels_with_one_scale(tmp_path, drawn):
    steps, norms = np.arange(0, 20_001, 1000), _norms(24, 21)
    plots.gradient_norms(steps, norms, tmp_path / "norms.png", "Gradient norms", "toy", {"layers.3.q_proj.A"})
    assert _is_sound(tmp_path / "norms.png") and _is_legible(drawn[0])
    panels = drawn[0].axes
    expected = [f"layer {i}, {p}" for i in range(24) for p in "qv"]
    expected[6] += ": A"
    assert [axes.get_title() for axes in panels] == expected
    assert len({(axes.get_yscale(), *axes.get_xlim(), *axes.get_ylim()) for axes in panels}) == 1
    assert panels[0].get_yscale() == "log" and panels[0].get_ylim()[1] > 20 * 9600  # room for a warning
    for i, axes in enumerate(panels):
        a, b = axes.lines
        for line, matrix in ((a, "A"), (b, "B")):
            values = norms[f"layers.{i // 2}.{'qv'[i % 2]}_proj.{matrix}"].copy()
            values[0] = math.nan  # zero, which a logarithmic axis has no place for
            np.testing.assert_array_equal(line.get_xydata(), np.stack([steps, values], axis=1))
        assert a.get_color() != b.get_color() and a.get_linestyle() != b.get_linestyle()
        assert [text.get_text() for text in axes.texts] == (["vanishes/explodes"] if i == 6 else [])
        assert to_hex(axes.spines["left"].get_edgecolor()) == (base.COLOURS[1].lower() if i == 6 else "#000000")
    assert _texts(drawn[0].legends[0]) == ["A of LoRA", "B of LoRA"]


@pytest.mark.parametrize(
    ("layers", "values"),
    [(2, [0.0, 1.0, 2.0]), (2, [0.5]), (1, [0.0, math.nan, math.inf]), (1, [])],
    ids=["toy", "1 step", "nothing above zero", "no steps"],
)
def test_few_gradients_are_drawn(tmp_path, drawn, layers, values):
    steps = np.arange(1, len(values) + 1)
    plots.gradient_norms(steps, dict.fromkeys(_norms(layers, 1), values), tmp_path / "norms.png", "Gradient norms")
    assert _is_sound(tmp_path / "norms.png") and _is_legible(drawn[0])
    assert len(drawn[0].axes) == 2 * layers


@pytest.mark.parametrize(
    ("norms", "flagged", "message"),
    [
        ({"layers.0.q_proj": [1.0, 2.0]}, (), 'a name such as "layers.0.q_proj.A"'),
        ({"layers.0.q_proj.A": [1.0]}, (), r"layers.0.q_proj.A has the shape \(1,\): expected \(2\)"),
        (
            {"layers.0.q_proj.A": [1.0, 2.0]},
            ["layers.0.q_proj.B"],
            "flagged has 'layers.0.q_proj.B': expected names of matrices",
        ),
        ({}, (), "at least one matrix"),
    ],
)
def test_gradients_without_a_place_are_refused(tmp_path, norms, flagged, message):
    with pytest.raises(ValueError, match=message):
        plots.gradient_norms([1, 2], norms, tmp_path / "none.png", "", flagged=flagged)
    assert list(tmp_path.iterdir()) == []


def _printed(axes):
    """The numbers at the right of the bars."""
    return [tick.get_text() for tick in axes.child_axes[0].get_yticklabels()]


def test_bars_of_scores_carry_interval_and_number(tmp_path, drawn):
    scores = {
        "model": (0.04, 0.03, 0.05),
        "persistence": (1.23, 0.9, 1.6),
        "law fit": (math.nan,) * 3,
        "one": (2, math.nan, math.nan),
    }
    plots.score_bars(scores, tmp_path / "scores.png", "MSE", "Mean squared error", "toy", strong=["model", "one"])
    assert _is_sound(tmp_path / "scores.png") and _is_legible(drawn[0])
    (axes,) = drawn[0].axes
    np.testing.assert_array_equal([bar.get_width() for bar in axes.patches], [0.04, 1.23, math.nan, 2])
    np.testing.assert_array_equal([line.get_xdata() for line in axes.lines[:2]], [[0.03, 0.05], [0.9, 1.6]])
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(scores) and axes.yaxis_inverted()
    assert _printed(axes) == ["0.04 (0.03 to 0.05)", "1.23 (0.9 to 1.6)", "not defined", "2"]
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "MSE"
    model, persistence, _, one = ((bar.get_hatch(), bar.get_facecolor()) for bar in axes.patches)
    assert model == one and all(a != b for a, b in zip(model, persistence, strict=True))


@pytest.mark.parametrize("scores", [{"model": (0.4, 0.3, 0.5), "b": (-9.0, -12, -5)}, {"model": (math.nan,) * 3}])
def test_scores_below_zero_or_absent_have_a_linear_axis(tmp_path, drawn, scores):
    plots.score_bars(scores, tmp_path / "scores.png", "skill", "Skill")
    assert _is_legible(drawn[0]) and drawn[0].axes[0].get_xscale() == "linear"


@pytest.mark.parametrize(
    ("scores", "message"), [({}, "at least one forecaster"), ({"a": (1, 2)}, r"expected \(any, 3\)")]
)
def test_scores_without_an_interval_are_refused(tmp_path, scores, message):
    with pytest.raises(ValueError, match=message):
        plots.score_bars(scores, tmp_path / "none.png", "MSE", "")


def test_the_budget_bar_stacks_the_stages_and_shows_the_parts_below(tmp_path, drawn):
    stages = {
        "baseline": {"training": 0, "validation": 3 * 10**14, "inference": 10**13},
        "final": {"training": 10**18, "validation": 10**15, "inference": 0},
    }
    plots.budget_bar(stages, 10**17, tmp_path / "budget.png", "FLOPs by stage", "toy")
    assert _is_sound(tmp_path / "budget.png") and _is_legible(drawn[0])
    whole, by_part = drawn[0].axes
    first, second = whole.patches
    assert (first.get_x(), first.get_width()) == (0, 31e13) and (second.get_x(), second.get_width()) == (31e13, 1001e15)
    assert list(whole.lines[0].get_xdata()) == [1e17, 1e17] and whole.get_xlim()[1] > 1.002e18
    assert whole.get_title() == "spent 1.001e18 of 1e17, 1001 %: more than the budget"
    assert [bar.get_width() for bar in by_part.patches] == [0, 3e14, 1e13, 1e18, 1e15, 0]
    assert [tick.get_text() for tick in by_part.get_yticklabels()] == [f"{s}: {p}" for s in stages for p in stages[s]]
    assert _printed(by_part) == ["0", "3.000e14", "1.000e13", "1.000e18", "1.000e15", "0"]
    assert by_part.get_xscale() == "log" and whole.get_xscale() == "linear"
    looks = [{(bar.get_hatch(), bar.get_facecolor()) for bar in bars} for bars in ([first], by_part.patches[:3])]
    assert looks[0] == looks[1] and first.get_hatch() != second.get_hatch()
    shares = ["baseline, 0.31 % of the budget", "final, 1e+03 % of the budget", "budget, 1e17"]
    assert _texts(drawn[0].legends[0]) == shares


def test_a_budget_of_which_nothing_is_spent_is_drawn(tmp_path, drawn):
    plots.budget_bar({"baseline": {"training": 0}}, 10**17, tmp_path / "budget.png", "FLOPs by stage")
    assert _is_sound(tmp_path / "budget.png") and _is_legible(drawn[0])
    assert drawn[0].axes[1].get_xscale() == "linear" and _printed(drawn[0].axes[1]) == ["0"]


@pytest.mark.parametrize(
    ("stages", "budget", "message"),
    [
        ({"final": {"training": 1}}, 0, "budget is 0: expected a positive number"),
        ({"final": {}}, 1, "stages is empty"),
        ({"final": {"training": -1}}, 1, "training of final is -1 FLOPs: expected 0 or more"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(tmp_path, stages, budget, message):
    with pytest.raises(ValueError, match=message):
        plots.budget_bar(stages, budget, tmp_path / "none.png", "")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_of_many_colours_is_written_in_few_and_those_are_close():
    random = np.random.default_rng(0)
    pixels = np.full((400, 400, 3), 255, np.uint8)
    pixels[50:350] = random.normal([0, 114, 178], 10, (300, 400, 3)).clip(0, 255)  # noise around a blue
    whole, small = io.BytesIO(), io.BytesIO(base._png(pixels))
    Image.fromarray(pixels).save(whole, format="png")
    image = Image.open(small)
    assert len(small.getvalue()) < 0.5 * len(whole.getvalue())
    assert len(image.getcolors()) <= 256
    written = np.asarray(image.convert("RGB")).astype(int)
    assert (written[:50] == 255).all()
    assert np.abs(written - pixels).mean() < 4  # of 255; the noise alone deviates by 8


def test_a_picture_that_would_be_large_is_written_in_fewer_colours(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)
    whole = base._png(pixels)
    monkeypatch.setattr(base, "_LARGE", len(whole) - 1)
    assert len(base._png(pixels)) < len(whole)


def test_the_picture_keeps_its_colours_on_white_and_is_the_same_each_time(tmp_path):
    lines = {name: [i + 1.0, 2.0] for i, name in enumerate(["model", "a", "b"])}
    for name in ("first.png", "second.png"):
        plots.horizon_error(lines, tmp_path / name, "MSE", "Error by step")
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    image = Image.open(tmp_path / "first.png")
    assert image.mode == "P"
    colours = {rgb for _, rgb in image.convert("RGB").getcolors(256)}
    expected = {
        tuple(int(shade[i : i + 2], 16) for i in (1, 3, 5)) for shade in ("#FFFFFF", "#000000", *base.COLOURS[:2])
    }
    assert expected <= colours


def test_a_round_trip_shows_both_series_and_their_absolute_error(tmp_path, drawn):
    time, raw = np.arange(30.0), np.random.RandomState(0).uniform(0, 3, (30, 2))
    decoded = raw.round(2)
    plots.round_trip(time, raw, decoded, ("prey", "predator"), tmp_path / "r.png", "System 972, encoded", "toy")
    assert _is_sound(tmp_path / "r.png") and _is_legible(drawn[0])
    series, errors = drawn[0].axes
    for i in range(2):
        before, after = series.lines[2 * i : 2 * i + 2]
        np.testing.assert_array_equal(before.get_ydata(), raw[:, i])
        np.testing.assert_array_equal(after.get_ydata(), decoded[:, i])
        np.testing.assert_allclose(errors.lines[i].get_ydata(), np.abs(raw - decoded)[:, i])
    assert len({line.get_marker() for line in series.lines}) == 3  # two kinds, and none


def test_a_round_trip_of_unlike_shapes_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"(raw|decoded) has the shape .*: expected \(3, 2\)"):
        plots.round_trip(np.arange(3), np.ones((3, 2)), np.ones((4, 2)), ("a", "b"), tmp_path / "r.png", "t")
