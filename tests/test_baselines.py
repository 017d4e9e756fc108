"""Naive forecasts, errors over the horizon, and the interval of a mean."""

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from experiments import baselines

DATA = Path(__file__).parents[2] / "shared" / "data" / "lotka_volterra_data.h5"
CONTEXT = np.array([[1.0, 10.0], [2.0, 30.0], [6.0, 20.0]])


def test_persistence_repeats_the_last_point():
    assert_array_equal(baselines.persistence(CONTEXT, 2), [[6, 20], [6, 20]])


def test_the_context_mean_is_taken_over_time():
    assert_array_equal(baselines.context_mean(CONTEXT, 2), [[3, 20], [3, 20]])


@pytest.mark.parametrize("steps", [9, 14, 20, 28, 40])
def test_a_periodic_series_is_continued_exactly(steps):
    wave = np.random.default_rng(steps).random((steps, 2))
    series = np.tile(wave, (200 // steps + 1, 1))[:130]
    assert baselines.period(series[:80]) == steps
    assert_array_equal(baselines.seasonal_repeat(series[:80], 50), series[80:])


def test_a_context_without_room_for_a_period_is_continued_by_persistence():
    context = np.random.default_rng(0).random((13, 2))
    assert_array_equal(baselines.seasonal_repeat(context, 3), baselines.persistence(context, 3))
    assert baselines.period(np.tile(context[:8], (2, 1))[:14]) == 8


@pytest.mark.skipif(not DATA.exists(), reason="the course's data set is not beside this repository")
@pytest.mark.parametrize(
    ("points", "horizon", "mse", "mae"),
    [(80, 20, 0.0402, 0.0915), (50, 50, 0.164, 0.196), (50, 20, 0.087, 0.134), (70, 30, 0.0547, 0.1114)],
)
def test_the_seasonal_repeat_has_the_published_errors_on_systems_850_to_999(points, horizon, mse, mae):
    h5py = pytest.importorskip("h5py")
    with h5py.File(DATA) as file:
        series = file["trajectories"][850:].astype(np.float64)
    forecast = np.stack([baselines.seasonal_repeat(one[:points], horizon) for one in series])
    scores = baselines.scores(series[:, points : points + horizon], forecast)
    assert_allclose([scores["mse"], scores["mae"]], [mse, mae], rtol=0.005)  # they have three digits


def test_errors_are_pooled_and_by_variable():
    truth = [[0, 0], [0, 0]]
    scores = baselines.scores(truth, [[1, 2], [-1, -4]])
    assert_allclose([scores["mse"], scores["rmse"], scores["mae"]], [5.5, 5.5**0.5, 2.0])
    prey, predator = scores["variables"]
    assert (prey["mse"], prey["rmse"], prey["mae"]) == (1, 1, 1)
    assert_allclose([predator["mse"], predator["rmse"], predator["mae"]], [10, 10**0.5, 3])
    assert scores["missing"] == 0


def test_many_series_pool_as_one_long_one():
    random = np.random.default_rng(1)
    truth, forecast = random.random((2, 5, 7, 2))
    assert baselines.scores(truth, forecast) == baselines.scores(truth.reshape(35, 2), forecast.reshape(35, 2))


def test_steps_that_were_not_parsed_raise_or_are_filled_whole_and_counted():
    truth = np.zeros((3, 2))
    forecast = np.array([[1.0, 1.0], [np.nan, 9.0], [np.nan, np.nan]])
    for options in ({}, {"missing": "persistence"}):
        with pytest.raises(ValueError, match="2 of 3 forecast steps were not parsed"):
            baselines.scores(truth, forecast, **options)
    filled = baselines.scores(truth, forecast, missing="persistence", fallback=np.full((3, 2), 2.0))
    assert filled["missing"] == 2
    assert filled["mse"] == (1 + 4 + 4) / 3  # the 9 that stood beside a NaN is gone
    assert np.isnan(forecast).sum() == 3  # the caller's array is as it was


@pytest.mark.parametrize(
    ("truth", "forecast"),
    [
        (np.zeros((3, 2)), np.zeros((2, 2))),
        (np.zeros((0, 2)), np.zeros((0, 2))),
        (np.full((3, 2), np.nan), np.zeros((3, 2))),
        (np.zeros((3, 2)), np.full((3, 2), np.inf)),
    ],
)
def test_scores_of_unlike_empty_or_infinite_arrays_are_refused(truth, forecast):
    with pytest.raises(ValueError):
        baselines.scores(truth, forecast)


def test_a_missing_rule_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match="got 'drop'"):
        baselines.scores(np.zeros((1, 1)), np.zeros((1, 1)), missing="drop")


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    random = np.random.default_rng(2)
    covered = 0
    for seed in range(200):
        low, high = baselines.bootstrap_interval(random.normal(3, 1, 60), seed, level=0.8, draws=200)
        covered += low < 3 < high
    assert 140 <= covered <= 178  # 160 expected of 200, 3 standard deviations of 5.7 either side


def test_the_interval_is_that_of_the_mean_and_follows_its_seed():
    values = np.random.default_rng(3).exponential(size=150)
    low, high = baselines.bootstrap_interval(values, seed=0)
    assert (low, high) == baselines.bootstrap_interval(values, seed=0) != baselines.bootstrap_interval(values, 1)
    width = 2 * 1.96 * values.std() / 150**0.5
    assert_allclose([low, high], values.mean() + np.array([-width, width]) / 2, atol=width / 10)
    assert baselines.bootstrap_interval([2.5], seed=0) == (2.5, 2.5)


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [[1.0]]])
def test_an_interval_of_nothing_is_refused(values):
    with pytest.raises(ValueError, match="finite values"):
        baselines.bootstrap_interval(values, seed=0)


@pytest.mark.parametrize("forecast", [baselines.persistence, baselines.context_mean, baselines.seasonal_repeat])
def test_a_bad_context_or_horizon_is_refused(forecast):
    for context, horizon in ((np.zeros((0, 2)), 1), (np.zeros(5), 1), (np.full((5, 2), np.nan), 1), (CONTEXT, 0)):
        with pytest.raises(ValueError):
            forecast(context, horizon)
    assert_array_equal(CONTEXT, [[1, 10], [2, 30], [6, 20]])
