"""Naive forecasts: by hand, on periodic series, and their published errors."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from data import lotka_volterra
from experiments.forecasting import baselines, scores

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
    assert_array_equal(baselines.parrot(series[:80], 50), series[80:])


def test_the_parrot_copies_what_followed_the_nearest_stretch_and_then_its_own_forecast():
    context = np.random.default_rng(0).random((30, 2))
    context[5:13] = context[22:] + 0.001  # nearer than any other, and what follows it is points 13 to 29
    assert_array_equal(baselines.parrot(context, 20), np.concatenate([context[13:], context[13:16]]))
    line = np.arange(30.0)[:, None]  # where the nearest stretch is the latest that may be
    assert_array_equal(baselines.parrot(line, 6)[:, 0], [26, 27, 28, 29, 26, 27])


def test_a_context_without_room_for_a_period_is_continued_by_persistence():
    context = np.random.default_rng(0).random((13, 2))
    assert_array_equal(baselines.seasonal_repeat(context, 3), baselines.persistence(context, 3))
    assert baselines.period(np.tile(context[:8], (2, 1))[:14]) == 8


@pytest.mark.parametrize(
    ("rule", "points", "horizon", "mse", "mae"),
    [
        *((baselines.seasonal_repeat, 80, 20, 0.0402, 0.0915), (baselines.seasonal_repeat, 50, 50, 0.164, 0.196)),
        *((baselines.seasonal_repeat, 50, 20, 0.087, 0.134), (baselines.seasonal_repeat, 70, 30, 0.0547, 0.1114)),
        *((baselines.parrot, 80, 20, 0.02, 0.0666), (baselines.parrot, 50, 20, 0.049, 0.1086)),
    ],
)
def test_the_copies_have_the_published_errors_on_systems_850_to_999(rule, points, horizon, mse, mae):
    series = lotka_volterra.load().series[850:].astype(np.float64)
    forecast = np.stack([rule(one[:points], horizon) for one in series])
    found = scores.errors(series[:, points : points + horizon], forecast)
    assert_allclose([found["mse"], found["mae"]], [mse, mae], rtol=0.005)  # they have three digits


@pytest.mark.parametrize("forecast", baselines.RULES.values())
def test_a_bad_context_or_horizon_is_refused(forecast):
    for context, horizon in ((np.zeros((0, 2)), 1), (np.zeros(5), 1), (np.full((5, 2), np.nan), 1), (CONTEXT, 0)):
        with pytest.raises(ValueError, match="(context has shape|horizon is) .*: expected"):
            forecast(context, horizon)
    assert_array_equal(CONTEXT, [[1, 10], [2, 30], [6, 20]])
