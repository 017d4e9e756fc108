"""Each figure is a whole, small PNG of a sensible size that shows its records, also for the records at the edges."""

import io
import json
import math
import re

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import same_color, to_hex
from matplotlib.text import Text
from PIL import Image

from experiments import plots
from experiments.plots import base, live, training
from experiments.plots.training import training_shown


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """A function that draws a figure, sees that its file and its texts are sound, and returns it to look into.

    With half the dots, in half the time."""
    monkeypatch.setattr(base, "_DPI", base._DPI / 2)
    monkeypatch.setattr(base, "_DPI_OF_TALL", base._DPI_OF_TALL / 2)
    figures = []
    real = FigureCanvasAgg.draw
    monkeypatch.setattr(FigureCanvasAgg, "draw", lambda self: figures.append(self.figure) or real(self))

    def draw(make, *values, **options):
        path = tmp_path / "figure.png"
        make(*values, path=path, **options)
        assert [p.name for p in tmp_path.iterdir()] == [path.name]  # and no temporary beside it
        with Image.open(path) as image:
            image.load()  # so that it is whole
            assert image.format == "PNG" and 200 <= image.width <= 2000 and 75 <= image.height <= 6100
        assert _is_legible(figures[0])
        return figures[0]

    return draw


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
        labels = [t.label1.get_window_extent(renderer) for t in ticks if t.label1.get_text()]
        labels.sort(key=lambda b: b.x0)
        apart &= all(a.x1 < b.x0 for a, b in zip(labels, labels[1:], strict=False))
    return inside and apart and all(t.get_fontsize() >= 9 for t in figure.findobj(Text) if t.get_text())


def _legend(figure):
    (legend,) = figure.legends
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

CELLS = {
    "1 step": [_cell(steps=1)],
    "long": [_cell(steps=5000)],
    "no points": [{"name": "none yet", "lr": 1e-4, "rank": 8, "train": [], "validation": []}],
    "no cells": [],
}


@pytest.mark.parametrize("cells", CELLS.values(), ids=CELLS)
def test_loss_curves_are_drawn(draw, cells):
    figure = draw(plots.loss_curves, cells, label="toy: the pocket model")
    assert "(toy: the pocket model)" in figure.get_suptitle()
    assert figure.axes[-1].get_xlabel() == "training step"


def test_the_cells_of_a_grid_differ_by_colour_and_by_line_and_have_one_legend(draw):
    figure = draw(plots.loss_curves, GRID, label="pocket model, a toy")
    training, validation = figure.axes
    lines = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in validation.lines}
    assert len(lines) == 9 and [len(set(part)) for part in zip(*lines, strict=True)] == [3, 3, 3]
    assert len(training.lines) == 9
    assert _legend(figure) == ["lr 1e-5", "lr 5e-5", "lr 1e-4", "rank 2", "rank 4", "rank 8"]
    assert "(pocket model, a toy)" in figure.get_suptitle()


def test_cells_that_share_rate_and_rank_are_told_apart_by_name(draw):
    figure = draw(plots.loss_curves, [_cell(name=f"context {c}") for c in (128, 512, 768)])
    assert _legend(figure) == ["context 128", "context 512", "context 768"]
    assert len({line.get_color() for line in figure.axes[1].lines}) == 3


def test_the_runs_of_a_study_differ_by_more_than_colour_and_are_named_by_their_group(draw):
    figure = draw(plots.loss_curves, STUDY, x="flops")
    (validation,) = figure.axes  # the training losses of 14 runs of unlike length are one braid
    assert len({(line.get_marker(), str(line._unscaled_dash_pattern)) for line in validation.lines}) == 14
    grid = [f"grid: {text}" for text in ("lr 1e-5", "lr 5e-5", "lr 1e-4", "rank 2", "rank 4", "rank 8")]
    assert _legend(figure) == ["default", *grid, "context 128", "context 512", "context 768", "final"]
    for seen, run in zip(validation.lines, STUDY, strict=True):
        np.testing.assert_array_equal(seen.get_xydata(), np.array(run["validation"])[:, 1:])
    assert validation.get_xlabel() == "training FLOPs (coursework)"
    assert {axes.get_xscale() for axes in figure.axes} == {"log"}  # 20 and 400 steps
    heights = [axes.get_position().height * figure.get_figheight() for axes in figure.axes]
    assert min(heights) > 2  # inches, whatever the legend takes


def test_of_a_braid_of_training_losses_the_difference_from_the_first_run_is_drawn_or_nothing(draw):
    losses = [[3 / step + i * step / 10 for step in range(1, 41)] for i in range(4)]
    runs = [_cell(name=f"run {i}", losses=of) for i, of in enumerate(losses)]
    training, _ = draw(plots.loss_curves, runs).axes
    assert training.get_title() == "training, less that of run 0 (mean of the last 2)"
    assert training.get_ylabel().startswith("difference")
    for i, line in enumerate(training.lines):
        np.testing.assert_allclose(line.get_ydata()[[0, 39]], [i * 0.1, i * 3.95], atol=1e-12)
    assert training_shown(runs[:3]) == "loss" and training_shown([*runs[:3], _cell(steps=50)]) == ""


def test_a_few_training_losses_are_drawn_raw_and_as_the_mean_of_the_last_steps(draw):
    runs = [_cell(steps=steps, name=str(steps)) for steps in (20, 400)]
    training, _ = draw(plots.loss_curves, runs, x="flops").axes
    for raw, smooth, run in zip(training.lines[::2], training.lines[1::2], runs, strict=True):
        _, flops, loss = np.transpose(run["train"])
        np.testing.assert_array_equal(raw.get_xydata(), np.stack([flops, loss], axis=1))
        window = len(loss) // 20  # of each run its own
        np.testing.assert_allclose(smooth.get_ydata()[-1], loss[-window:].mean())


def test_of_a_long_run_the_svg_is_small_and_shows_values_of_the_record(tmp_path):
    losses = [3 / step + math.sin(step) for step in range(1, 15_001)]
    losses[7000] = 9.0  # is seen in the picture, and stands out
    plots.loss_curves([_cell(losses=losses)], tmp_path / "a.svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg"]
    text = (tmp_path / "a.svg").read_text()
    assert len(text) < 100_000 and not re.search(r'(?<=<g )id="', text)
    known = json.loads(re.search("<metadata>(.*)</metadata>", text)[1])
    validation = known["series"][-1]
    assert validation["name"] == "cell" and 300 < len(validation["points"]) <= live.POINTS
    assert {loss == losses[step - 1] for *_, step, loss in validation["points"]} == {True}
    top = known["panels"][0]["box"][1]
    raw = text.split('data-series="0"')[1].partition("</g>")[0]
    assert top < min(float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", raw)) < top + 20


@pytest.mark.parametrize(("steps", "scale"), [((20, 20), "linear"), ((20, 400), "symlog")])
def test_validation_starts_at_step_0_with_the_loss_of_the_untrained_model(draw, steps, scale):
    cells = [_cell(steps=count, name=str(i)) | {"untrained": 4.0 + i} for i, count in enumerate(steps)]
    cells[1]["validation"] = [(0, 0, 3.5), *cells[1]["validation"]]  # which it took itself
    training, validation = draw(plots.loss_curves, cells).axes
    assert [line.get_xydata()[0].tolist() for line in validation.lines] == [[0, 4.0], [0, 3.5]]
    assert [len(line.get_xdata()) for line in validation.lines] == [count // 5 + 1 for count in steps]
    assert validation.get_xscale() == scale and training.lines[0].get_xdata()[0] == 1


def test_runs_of_like_length_have_a_linear_axis_and_losses_that_are_not_finite_are_left_out(draw):
    figure = draw(plots.loss_curves, [_cell(losses=[1.0, math.nan, math.inf, 2.0, 3.0])])
    raw = figure.axes[0].lines[0]
    np.testing.assert_array_equal(raw.get_xydata(), [[1, 1], [4, 2], [5, 3]])
    assert figure.axes[0].get_xscale() == "linear"


def test_smoothing_is_the_mean_of_the_last_steps():
    np.testing.assert_allclose(training._trailing_mean(np.array([4.0, 2.0, 6.0, 1.0]), 2), [4, 3, 4, 3.5])


TABLE = {(lr, rank): lr * 1e4 + 1 / rank for lr in (1e-5, 5e-5, 1e-4) for rank in (2, 4, 8)}

TABLES = {
    "9 cells": TABLE,
    "2 without a result": TABLE | {(1e-5, 2): None, (1e-5, 4): math.nan},
    "holes": {(1e-5, 2): 0.7, (1e-4, 4): 0.6},
    "1 cell": {(1e-4, 8): 0.66},
    "no result": {(1e-4, 8): None},
    "wide": {key: 100 * value**4 for key, value in TABLE.items()},
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_heat_map_is_drawn(draw, table):
    figure = draw(plots.heat_map, table, label="toy")
    texts = [text.get_text() for text in figure.axes[0].texts]
    losses = [loss for loss in table.values() if loss is not None and math.isfinite(loss)]
    assert sorted(t.split("\n")[0] for t in texts if t != "no result") == sorted(f"{loss:.4f}" for loss in losses)
    assert [t for t in texts if t.endswith("\nlowest")] == [f"{loss:.4f}\nlowest" for loss in sorted(losses)[:1]]


@pytest.mark.parametrize(
    ("apart", "dashed"), [(0.01, ["0.5100\n0.5000 to 0.5200"]), (0.1, [])], ids=["chance", "more than that"]
)
def test_a_heat_map_over_seeds_shows_means_and_ends_and_frames_what_chance_parts_from_the_lowest(draw, apart, dashed):
    seeds = {(1e-4, 2): [0.49, 0.51], (1e-4, 4): [0.50 + apart - 0.01, 0.52 + apart - 0.01], (1e-4, 8): [0.9, 0.88]}
    axes, bar = draw(plots.heat_map, seeds).axes
    texts = {text.get_position()[0]: text.get_text() for text in axes.texts}
    assert texts[0] == "0.5000\n0.4900 to 0.5100" and texts[2] == "0.8900\n0.8800 to 0.9000"
    framed = {round(box.get_x() + 0.46): box.get_linestyle() for box in axes.patches}
    assert framed.pop(0) == "-" and [texts[at] for at, line in framed.items() if line == "--"] == dashed
    assert bar.get_ylabel().endswith("mean of 2 seeds (dashed: as low);\na difference below 0.07 is noise")


def test_the_scale_of_a_heat_map_says_that_one_seed_leaves_the_noise_unknown(draw):
    assert draw(plots.heat_map, TABLE).axes[1].get_ylabel().endswith("\none seed: noise not known")


def test_the_colours_of_a_heat_map_span_no_less_than_the_noise_of_its_seeds(draw):
    image = draw(plots.heat_map, {(1e-4, 2): [0.5, 0.52], (1e-4, 4): [0.52, 0.501]}).axes[0].images[0]
    assert image.norm.vmax - image.norm.vmin == pytest.approx(0.247770992)  # t(.975, 1) * .0195; the means: .0005


def test_the_numbers_of_a_heat_map_stand_out_from_their_cells(draw):
    figure = draw(plots.heat_map, TABLE)
    axes = figure.axes[0]
    image = axes.images[0]
    for text in axes.texts:
        column, row = (int(value) for value in text.get_position())
        red, green, blue, _ = image.to_rgba(image.get_array())[row, column]
        luminance = 0.299 * red + 0.587 * green + 0.114 * blue
        assert abs(luminance - (text.get_color() == "white")) > 0.45


def _forecast(draw, gaps=(), variables=2, points=80, horizon=20, title="System 906", bands=False, **options):
    time = np.linspace(0, 200, points + horizon)
    series = 2 + np.sin(time[:, None] / 6 + np.arange(variables))
    guess = series[points:] + 0.1
    guess[list(gaps)] = np.nan
    if bands:
        options["quantiles"] = {q: guess + (q - 0.5) * np.ones(2) for q in (0.1, 0.25, 0.5, 0.75, 0.9)}
    names = ["prey", "predator", "grass"][:variables]
    return draw(plots.forecast, time, series[:points], series[points:], guess, names, title=title, **options)


FORECASTS: dict[str, dict] = {
    "plain": {},
    "nothing parsed": {"gaps": range(20), "bands": True},
    **{"1 variable": {"variables": 1}, "3 variables": {"variables": 3}, "1 step": {"horizon": 1}},
    "1 point": {"points": 1},
    "title": {"title": "A title with a $\\frac$ in it and " + "many words " * 20},
}


@pytest.mark.parametrize("options", FORECASTS.values(), ids=FORECASTS)
def test_a_forecast_is_drawn(draw, options):
    figure = _forecast(draw, label="toy", **options)
    assert len(figure.axes) == options.get("variables", 2)


def test_a_forecast_shows_context_cut_off_truth_and_gaps(draw):
    figure = _forecast(draw, gaps=[3, 4, 5, 9])
    for axes in figure.axes:
        cut, truth, guess = axes.lines
        assert cut.get_xdata()[0] == pytest.approx((80 + 79) / 2 * 200 / 99)
        assert len(truth.get_xdata()) == 100 and truth.get_linestyle() == "-"
        assert len(guess.get_xdata()) == 21 and guess.get_linestyle() == "--"  # it starts at the end of the context
        assert guess.get_xydata()[0].tolist() == truth.get_xydata()[79].tolist()
        assert list(np.flatnonzero(np.isnan(guess.get_ydata()[1:]))) == [3, 4, 5, 9]
        assert truth.get_linewidth() > guess.get_linewidth()  # so that it is seen under it
        assert axes.get_ylabel().endswith("(units of the data)")
    prey, predator = (axes.lines[1] for axes in figure.axes)
    assert prey.get_marker() != predator.get_marker()
    assert "4 of 20 steps not parsed" in _legend(figure)[-1]


def _corners(area):
    return {tuple(point) for path in area.get_paths() for point in path.vertices.tolist()}


def test_the_bands_of_a_forecast_are_its_quantiles(draw):
    figure = _forecast(draw, gaps=[2, 4], bands=True)
    time = np.linspace(0, 200, 100)[80:]
    for axes in figure.axes:
        guess = axes.lines[2].get_ydata()[1:]
        wide, alone, narrow, _ = axes.collections
        for area, half in ((wide, 0.4), (narrow, 0.25)):
            known = np.isfinite(guess)
            edges = [np.stack([time, guess + side], axis=1)[known].tolist() for side in (-half, half)]
            assert _corners(area) == {tuple(point) for edge in edges for point in edge}
        assert _corners(alone) == {(time[3], guess[3] - 0.4), (time[3], guess[3] + 0.4)}  # between two gaps
        assert not same_color(wide.get_facecolor(), narrow.get_facecolor())
    assert _legend(figure)[-2:] == ["80 % band", "50 % band"]


def test_bars_are_sorted_and_carry_their_shares(draw):
    figure = draw(plots.flops_bars, {"q": 250, "down": 700, "norm": 50}, title="FLOPs")
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["down", "q", "norm"]
    assert axes.yaxis_inverted()
    assert [text.get_text() for text in axes.texts] == ["7.000e2 (70.00 %)", "2.500e2 (25.00 %)", "5.000e1 (5.00 %)"]


def _system(title="System 1 (growing)", points=12, horizon=5, gaps=()):
    time = np.arange(points + horizon) / 2
    series = 2 + np.stack([np.sin(time), np.cos(time)], axis=1)
    guess = series[points:] * 1.1
    guess[list(gaps)] = np.nan
    return {"title": title, "time": time, "context": series[:points], "truth": series[points:], "forecast": guess}


def test_a_grid_of_forecasts_has_a_row_for_each_system_and_a_column_for_each_variable(draw):
    systems = [_system(), _system("System 2 $x", gaps=[1, 2]), _system("System 3 " + "(long) " * 9, gaps=range(5))]
    figure = draw(plots.forecast_grid, systems, ["prey", "predator"], title="Shown", label="toy: the pocket model")
    panels = np.reshape(figure.axes, (3, 2))
    for row, system in zip(panels, systems, strict=True):
        for i, axes in enumerate(row):
            _, truth, guess = axes.lines
            whole = np.concatenate([system["context"], system["truth"]])
            time, forecast = system["time"], system["forecast"]
            np.testing.assert_array_equal(truth.get_xydata(), np.stack([time, whole[:, i]], axis=1))
            joined = np.concatenate([whole[11:12], forecast])
            np.testing.assert_array_equal(guess.get_xydata(), np.stack([time[11:], joined[:, i]], axis=1))
    titles = [f"System 1 (growing): {name}" for name in ("prey", "predator")]
    titles += [f"System 2 \\$x: {name}\n(2 of 5 steps not parsed)" for name in ("prey", "predator")]
    assert [axes.get_title() for axes in panels[:2].flat] == titles
    assert _legend(figure) == ["context", "cut-off", "prey, truth", "predator, truth", "forecast"]
    assert "(toy: the pocket model)" in figure.get_suptitle()


@pytest.mark.parametrize("variables", [1, 3, 5, 8])
def test_a_grid_of_any_number_of_variables_is_legible(draw, variables):
    systems = [_system(), _system("System 2 (oscillating)")]
    series = ("context", "truth", "forecast")
    wide = [s | {name: np.tile(s[name], 4)[:, :variables] for name in series} for s in systems]
    names = [f"x{i}" for i in range(variables)]
    figure = draw(plots.forecast_grid, wide, names, title="Shown")
    assert len(figure.axes) == 2 * variables
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    titles = [axes.get_title().replace("\n", " ") for axes in figure.axes]
    assert titles == [f"{system['title']}: {name}" for system in systems for name in names]


def test_a_glance_has_a_column_for_each_system_with_the_end_of_its_context_and_the_copies(draw):
    systems = [_system(), _system("System 2", gaps=[1])]
    systems = [system | {"copies": {"persistence": np.ones((5, 2)), "law fit": system["truth"]}} for system in systems]
    figure = draw(plots.glance, systems, ["prey", "predator"], title="Forecasts", label="toy")
    for i, axes in enumerate(figure.axes):
        variable, column = divmod(i, 2)
        system, (_, truth, *copies, guess) = systems[column], axes.lines
        np.testing.assert_array_equal(truth.get_xdata(), system["time"][2:])  # 10 points before 5
        for line, values in zip([guess, *copies], [system["forecast"], *system["copies"].values()], strict=True):
            np.testing.assert_array_equal(line.get_ydata()[1:], values[:, variable])
        assert len({line.get_linestyle() for line in (guess, *copies)}) == 3
    titles = ["System 1 (growing)", "System 2\n(1 of 5 steps not parsed)"]
    assert [axes.get_title() for axes in figure.axes[:2]] == titles
    assert _legend(figure)[-3:] == ["forecast", "persistence", "law fit"]


def test_a_phase_plane_joins_truth_and_forecast_to_the_end_of_the_context(draw):
    systems = [_system(), _system("System 2", gaps=[0, 2]), _system("System 3", gaps=range(5))]
    figure = draw(plots.phase_plane, systems, ["prey", "predator"], title="Phase plane", label="toy")
    assert len(figure.axes) == 3
    for axes, system in zip(figure.axes, systems, strict=True):
        context, truth, guess, start = axes.lines
        end = system["context"][-1:]
        np.testing.assert_array_equal(context.get_xydata(), system["context"])
        for line, values in ((truth, "truth"), (guess, "forecast")):
            np.testing.assert_array_equal(line.get_xydata(), np.concatenate([end, system[values]]))
        np.testing.assert_array_equal(start.get_xydata(), end)
        assert guess.get_linestyle() == "--" and truth.get_linestyle() == "-" and start.get_marker() == "*"
    assert figure.axes[2].get_xlabel() == "prey (units of the data)"
    assert figure.axes[2].get_ylabel() == "predator (units of the data)"


def test_the_running_error_has_a_panel_for_each_system(draw):
    close = np.array([[1.0, 2.0], [1.5, 2.5], [2.0, 3.0]])
    wide = np.array([[0.01, math.nan], [0.1, 0.2], [1.0, 0.3]])
    values = [close, wide, close * 0, close[:1], close * math.nan]
    systems = [{"title": f"System {i}", "values": v} for i, v in enumerate(values)]
    figure = draw(plots.running_rmse, systems, ["prey", "predator"], title="Running RMSE", label="toy")
    for axes, drawn_values in zip(figure.axes, values, strict=True):
        assert [list(line.get_xdata()) for line in axes.lines] == 2 * [list(range(1, len(drawn_values) + 1))]
        np.testing.assert_array_equal(np.transpose([line.get_ydata() for line in axes.lines]), drawn_values)
        assert len({(line.get_marker(), line.get_linestyle()) for line in axes.lines}) == 2
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "log", "linear", "linear", "linear"]
    assert [text.get_text() for text in figure.axes[4].texts] == ["no points"]
    labelled = [axes.xaxis.get_major_ticks()[0].label1.get_visible() for axes in figure.axes]
    assert labelled == [False, False, False, True, True]  # the lowest of each column
    assert _legend(figure) == ["prey", "predator"]


def test_the_error_by_step_shows_the_model_strongest(draw):
    lines = {"persistence": [0.2, 0.3, 0.4], "model": [0.01, math.nan, 0.03], "law fit": [1e-5, 1e-5, 2e-5]}
    figure = draw(plots.horizon_error, lines, ylabel="MSE", title="Error by step", label="toy")
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == list(lines)
    for line, values in zip(axes.lines, lines.values(), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), np.stack([[1, 2, 3], values], axis=1))
    assert len({(line.get_marker(), line.get_linestyle()) for line in axes.lines}) == 3
    other, model, _ = axes.lines
    assert model.get_linewidth() > other.get_linewidth() and model.get_zorder() > other.get_zorder()
    assert axes.get_yscale() == "log" and axes.get_ylabel() == "MSE"


def test_the_loss_of_tokens_parts_the_steps_and_tells_digits_from_separators(draw):
    texts = [*"1.2,0.5;", *"3.4,0.6;", *"1.0,9.9", " x"]
    nats = np.linspace(0, 2.3, 24)
    figure = draw(plots.token_loss, nats, np.arange(24) // 8, texts, title="Token loss", label="toy")
    first, second, path, digits, separators, other, mean = figure.axes[0].lines
    assert (first.get_xdata()[0], second.get_xdata()[0]) == (8.5, 16.5)
    np.testing.assert_array_equal(path.get_xydata(), np.stack([np.arange(1, 25), nats], axis=1))
    is_separator = np.array([text in {".", ",", ";"} for text in texts])
    of_kind = [~is_separator & (np.arange(24) < 23), is_separator, np.arange(24) == 23]
    for line, kind in zip((digits, separators, other), of_kind, strict=True):
        np.testing.assert_array_equal(line.get_xydata(), path.get_xydata()[kind])
    assert len({line.get_marker() for line in (digits, separators, other)}) == 3
    assert mean.get_ydata()[0] == pytest.approx(1.15)
    digit_mean, separator_mean = (f"{nats[kind].mean():.3g}" for kind in of_kind[:2])
    assert _legend(figure) == [
        f"digit, mean {digit_mean}",
        f"separator (, ; .), mean {separator_mean}",
        "other, mean 2.3",
        "mean of all 1.15",
        "between two steps",
    ]


def _norms(layers, count):
    names = [f"layers.{i}.{p}_proj.{m}" for i in reversed(range(layers)) for p in "vq" for m in "BA"]
    return {name: np.linspace(0, 10, count) ** 2 * (i + 1) for i, name in enumerate(names)}


def test_the_gradients_of_24_layers_are_48_panels_with_one_scale(draw):
    steps, norms = np.arange(0, 20_001, 1000), _norms(24, 21)
    titled = {"title": "Gradient norms", "label": "toy", "flagged": {"layers.3.q_proj.A"}}
    figure = draw(plots.gradient_norms, steps, norms, **titled)
    panels = figure.axes
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
    assert _legend(figure) == ["A of LoRA", "B of LoRA"]


def _printed(axes):
    return [tick.get_text() for tick in axes.child_axes[0].get_yticklabels()]


def test_bars_of_scores_carry_interval_and_number(draw):
    scores = {"model": (0.04, 0.03, 0.05), "persistence": (1.23, 0.9, 1.6)}
    scores |= {"law fit": (math.nan,) * 3, "one": (2, math.nan, math.nan)}
    titled = {"title": "Mean squared error", "label": "toy", "strong": ["model", "one"]}
    figure = draw(plots.score_bars, scores, xlabel="MSE", **titled)
    (axes,) = figure.axes
    assert not axes.patches  # a bar on a logarithmic axis has no length
    dots, ends = axes.lines[1::2], axes.lines[::2]
    np.testing.assert_array_equal(np.ravel([dot.get_xdata() for dot in dots]), [0.04, 1.23, math.nan, 2])
    np.testing.assert_array_equal([line.get_xdata() for line in ends[:2]], [[0.03, 0.05], [0.9, 1.6]])
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(scores) and axes.yaxis_inverted()
    assert _printed(axes) == ["0.04 (0.03 to 0.05)", "1.23 (0.9 to 1.6)", "not defined", "2"]
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "MSE"
    model, persistence, _, one = ((dot.get_marker(), dot.get_color()) for dot in dots)
    assert model == one and all(a != b for a, b in zip(model, persistence, strict=True))


def test_the_budget_bar_stacks_the_stages_and_shows_the_parts_below(draw):
    stages = {
        "baseline": {"training": 0, "validation": 3 * 10**14, "inference": 10**13},
        "final": {"training": 10**18, "validation": 10**15, "inference": 0},
    }
    figure = draw(plots.budget_bar, stages, 10**17, title="FLOPs by stage", label="toy")
    whole, by_part = figure.axes
    first, second = whole.patches
    assert (first.get_x(), first.get_width()) == (0, 31e13) and (second.get_x(), second.get_width()) == (31e13, 1001e15)
    assert list(whole.lines[0].get_xdata()) == [1e17, 1e17] and whole.get_xlim()[1] > 1.002e18
    assert whole.get_title() == "spent 1.001e18 of 1e17, 1001 %: more than the budget"
    assert [bar.get_width() for bar in by_part.patches] == [0, 3e14, 1e13, 1e18, 1e15, 0]
    assert [tick.get_text() for tick in by_part.get_yticklabels()] == [f"{s}: {p}" for s in stages for p in stages[s]]
    assert _printed(by_part) == ["0", "3.000e14", "1.000e13", "1.000e18", "1.000e15", "0"]
    assert {axes.get_xscale() for axes in (whole, by_part)} == {"linear"} and by_part.get_xlim()[0] == 0
    looks = [{(bar.get_hatch(), bar.get_facecolor()) for bar in bars} for bars in ([first], by_part.patches[:3])]
    assert looks[0] == looks[1] and first.get_hatch() != second.get_hatch()
    shares = ["baseline, 0.31 % of the budget", "final, 1e+03 % of the budget", "budget, 1e17"]
    assert _legend(figure) == shares


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
    assert {tuple(bytes.fromhex(shade[1:])) for shade in ("#FFFFFF", "#000000", *base.COLOURS[3:5])} <= colours


def test_a_round_trip_shows_both_series_and_their_absolute_error(draw):
    time, raw = np.arange(30.0), np.random.RandomState(0).uniform(0, 3, (30, 2))
    decoded = raw.round(2)
    figure = draw(plots.round_trip, time, raw, decoded, ("prey", "predator"), title="System 972, encoded", label="toy")
    series, errors = figure.axes
    for i in range(2):
        before, after = series.lines[2 * i : 2 * i + 2]
        np.testing.assert_array_equal(before.get_ydata(), raw[:, i])
        np.testing.assert_array_equal(after.get_ydata(), decoded[:, i])
        np.testing.assert_allclose(errors.lines[i].get_ydata(), np.abs(raw - decoded)[:, i])
    assert len({line.get_marker() for line in series.lines}) == 3  # two kinds, and none


NO_TOKENS = {"nats": [], "step_of": [], "texts": []}
NAN = [math.nan] * 3


def _gradients(layers, values):
    norms = dict.fromkeys(_norms(layers, 1), values)
    return {"steps": np.arange(1, len(values) + 1), "norms": norms, "title": "Gradient norms"}


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (plots.flops_bars, {"by_component": {"q": 10**15, "a component with a long name in it": 3, "$x": 0}}),
        (plots.flops_bars, {"by_component": {"q": 10**17}}),
        (plots.flops_bars, {"by_component": {"q": 0}}),
        (plots.flops_bars, {"by_component": {f"layer {i}": 10**15 for i in range(60)}}),
        (plots.token_loss, NO_TOKENS),
        (plots.token_loss, NO_TOKENS | {"nats": [0.5], "step_of": [0], "texts": ["1"]}),
        (plots.token_loss, NO_TOKENS | {"nats": NAN, "step_of": [0, 1, 2], "texts": ["1"] * 3}),
        (plots.horizon_error, {"lines": {"model": [0.0, 0.1, 10.0]}, "ylabel": "MSE"}),
        (plots.horizon_error, {"lines": {"model": NAN}, "ylabel": "MSE"}),
        (plots.gradient_norms, _gradients(1, [0.0, math.nan, math.inf])),
        (plots.gradient_norms, _gradients(1, [])),
        (plots.score_bars, {"scores": {"model": (0.4, 0.3, 0.5), "b": (-9.0, -12, -5)}, "xlabel": "skill"}),
        (plots.score_bars, {"scores": {"model": tuple(NAN)}, "xlabel": "skill"}),
        (plots.budget_bar, {"stages": {"baseline": {"training": 0}}, "budget": 10**17}),
    ],
)
def test_what_is_zero_absent_or_one_is_drawn_on_a_linear_axis(draw, make, values):
    """A logarithmic one has no place for zero."""
    titled = {} if make is plots.loss_curves else {"title": "A title"}
    figure = draw(make, **titled | values)
    assert {axes.get_xscale() for axes in figure.axes} | {axes.get_yscale() for axes in figure.axes} == {"linear"}
    assert make is not plots.budget_bar or _printed(figure.axes[1]) == ["0"]


@pytest.mark.parametrize(("layers", "columns"), [(2, 2), (3, 2), (5, 5), (6, 4)])
def test_every_row_of_gradients_is_full(draw, layers, columns):
    panels = draw(plots.gradient_norms, **_gradients(layers, [0.5, 0.6])).axes
    assert len(panels) == 2 * layers and len({round(axes.get_position().x0, 3) for axes in panels}) == columns


@pytest.mark.parametrize("values", [[0.0, 1.0, 2.0], [0.5]])
def test_few_gradients_are_drawn(draw, values):
    assert len(draw(plots.gradient_norms, **_gradients(2, values)).axes) == 4


TIME, FLAT = np.arange(6.0), np.zeros((3, 2))
BOTH = ["prey", "predator"]
SERIES = {"time": TIME, "context": FLAT, "truth": FLAT, "forecast": FLAT, "names": BOTH, "title": ""}
UNEVEN = dict(lines={"a": [1, 2], "b": [1, 2, 3]}, ylabel="")
NATS, NORMS = [0.1, 0.2], {"layers.0.q_proj.A": [1.0, 2.0]}
QUANTILES = [dict.fromkeys((0.1, 0.9), FLAT), dict.fromkeys((0.1, 0.25, 0.75, 0.9), [1.0])]
ONE = dict(title="System 7", values=[1, 2, 3])
TRIP = dict(time=TIME, raw=FLAT, decoded=FLAT[1:], names=BOTH)
REFUSED = [
    (plots.loss_curves, dict(cells=GRID, x="epoch"), "x is 'epoch': expected one of step, flops, time"),
    (plots.heat_map, dict(table={}), "a heat map is empty: expected at least one entry"),
    (plots.forecast, SERIES | {"names": ["prey"]}, "with V = 1 and h at least 1"),
    (plots.forecast, SERIES | {"time": [0.0, 1.0]}, "time has the shape (2,): expected (3 + 3,)"),
    (plots.forecast, SERIES | {"forecast": FLAT[1:]}, "have the shapes ((3, 2), (3, 2), (2, 2)): expected (P, V)"),
    (plots.forecast, SERIES | {"quantiles": QUANTILES[0]}, "quantiles: has no level 0.25: expected 0.1"),
    (plots.forecast, SERIES | {"quantiles": QUANTILES[1]}, "the quantile 0.1 has the shape (1,): expected (3, 2)"),
    (plots.forecast_grid, dict(systems=[], names=BOTH), "a figure of systems is empty"),
    (plots.glance, dict(systems=[], names=BOTH), "a figure of systems is empty"),
    (plots.phase_plane, dict(systems=[], names=BOTH), "a figure of systems is empty"),
    (plots.phase_plane, dict(systems=[SERIES], names="xyz"), "a phase plane has 3 variables: expected 2"),
    (plots.running_rmse, dict(systems=[], names=BOTH), "a figure of systems is empty"),
    (plots.running_rmse, dict(systems=[ONE], names=BOTH), "System 7 has the shape (3,): expected (any, 2)"),
    (plots.horizon_error, UNEVEN, "the error of b has the shape (3,): expected (2)"),
    (plots.horizon_error, dict(lines={}, ylabel=""), "an error by step is empty"),
    (plots.token_loss, dict(nats=NATS, step_of=[0], texts="11"), "step_of has the shape (1,): expected (2)"),
    (plots.token_loss, dict(nats=NATS, step_of=[0, 0], texts="1"), "texts has 1 entries: expected 2, one for"),
    (plots.gradient_norms, dict(norms={"layers.0.q_proj": [1, 2]}), "is named 'layers.0.q_proj': expected a name"),
    (plots.gradient_norms, dict(norms={"layers.0.q_proj.A": [1.0]}), "q_proj.A has the shape (1,): expected (2)"),
    (plots.gradient_norms, dict(norms=NORMS, flagged=["other"]), "flagged has 'other': expected names of matrices"),
    (plots.gradient_norms, dict(norms={}), "a figure of gradient norms is empty"),
    (plots.score_bars, dict(scores={}, xlabel=""), "a bar chart of scores is empty"),
    (plots.score_bars, dict(scores={"a": (1, 2)}, xlabel=""), "scores has the shape (1, 2): expected (any, 3)"),
    (plots.flops_bars, dict(by_component={}), "a bar chart of FLOPs is empty"),
    (plots.budget_bar, dict(stages={"final": {"training": 1}}, budget=0), "the budget is 0: expected more than 0"),
    (plots.budget_bar, dict(stages={"final": {}}, budget=1), "a budget bar is empty"),
    (plots.budget_bar, dict(stages={"final": {"training": -1}}, budget=1), "training of final is -1 FLOPs: expected"),
    (plots.round_trip, TRIP, "(3, 2), (2, 2): expected (6, 2), a row a time, a column a name"),
    (plots.bench_bars, dict(cases=[]), "a bar chart of the benchmark is empty: expected at least one"),
    (plots.bench_scaling, dict(points=[]), "a figure of scaling is empty: expected at least one"),
]


@pytest.mark.parametrize(("make", "values", "message"), REFUSED)
def test_what_cannot_be_drawn_is_refused_in_one_line_and_nothing_is_written(tmp_path, make, values, message):
    if make not in (plots.loss_curves, plots.heat_map):
        values = {"title": ""} | values
    if make is plots.gradient_norms:
        values = {"steps": [1, 2]} | values
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        make(**values, path=tmp_path / "none.png")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []
