"""Figures from plain records, written as PNG atomically; no window, no global state, colour-blind safe."""
# ruff: noqa: F401 (what is imported is what this room offers)

from experiments.plots.bench import bench_bars, bench_scaling
from experiments.plots.flops import budget_bar, flops_bars
from experiments.plots.forecasts import forecast, forecast_grid, glance, phase_plane
from experiments.plots.gradients import gradient_norms
from experiments.plots.preprocessing import round_trip
from experiments.plots.scores import horizon_error, running_rmse, score_bars, token_loss
from experiments.plots.training import heat_map, loss_curves, search
