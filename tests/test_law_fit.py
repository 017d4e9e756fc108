"""The forecast by the fitted law: exact on its own law, near on the data set, finite on anything."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.integrate import solve_ivp

from data import lotka_volterra
from experiments.forecasting import law_fit as module
from experiments.forecasting.baselines import seasonal_repeat
from experiments.forecasting.law_fit import law_fit

TIME = np.linspace(0.0, 200.0, 100)
LAWS = {  # r, a, m, h, e, K, then the initial prey and predator; the last is outside of every range of the data
    "it decays": (0.2, 0.3, 0.2, 0.1, 0.5, 6.0, 1.1, 0.9),
    "it grows to a cycle with values near 0": (0.25, 0.4, 0.15, 0.2, 0.6, 14.0, 0.9, 1.1),
    "another unit": (0.4, 0.02, 0.15, 0.004, 0.6, 80.0, 30.0, 12.0),
}


@pytest.fixture(scope="module")
def dataset() -> lotka_volterra.Dataset:
    return lotka_volterra.load()


@pytest.fixture(scope="module")
def series() -> dict[str, np.ndarray]:
    def exact(*law: float) -> np.ndarray:
        span, start = (0.0, 200.0), law[6:]
        options = {"t_eval": TIME, "args": law[:6], "rtol": 1e-10, "atol": 1e-12}
        return solve_ivp(lotka_volterra.derivatives, span, start, "DOP853", **options).y.T

    return {name: exact(*law) for name, law in LAWS.items()}


@pytest.mark.parametrize("points", [30, 50, 80])
@pytest.mark.parametrize("name", LAWS)
def test_a_series_of_the_law_is_continued_right_to_a_thousandth(series, name, points):
    values = series[name]
    assert_allclose(law_fit(TIME, values[:points]), values[points:], atol=1e-3 * values.max(axis=0).min())


@pytest.mark.parametrize(
    ("system", "points", "most"), [(20, 80, 0.05), (506, 80, 0.05), (654, 80, 0.05), (906, 80, 0.05), (506, 14, 0.01)]
)
def test_on_the_data_set_it_is_far_better_than_the_seasonal_repeat(dataset, system, points, most):
    values = dataset.series[system, : points + 20].astype(np.float64)
    context, future = values[:points], values[points:]
    fitted, repeated = law_fit(dataset.time[: points + 20], context), seasonal_repeat(context, 20)
    error = np.mean((fitted - future) ** 2)
    assert error < most * np.mean((repeated - future) ** 2) and (error < 3e-4 or points < 80)


def test_the_context_and_the_times_are_all_it_depends_on(dataset):
    values = dataset.series[20].astype(np.float64)
    context = values[:80].copy()
    forecast = law_fit(dataset.time, context)
    assert_array_equal(forecast, law_fit(dataset.time, context))
    assert_array_equal(context, values[:80])
    assert_allclose(forecast[:5], law_fit(dataset.time[:85], context), rtol=1e-5)


def test_the_units_of_time_and_of_the_values_change_nothing_else(series):
    context = series["it decays"][:80]
    forecast = law_fit(10 + 1e6 * TIME, context * [3.0, 1e-6])
    assert_allclose(forecast, law_fit(TIME, context) * [3.0, 1e-6], rtol=1e-6)


def test_points_need_not_be_equally_spaced(series):
    kept = np.sort(np.random.default_rng(0).choice(80, 60, replace=False))
    values, time = series["it decays"], np.append(TIME[kept], TIME[80:])
    assert_allclose(law_fit(time, values[kept]), values[80:], atol=1e-3)


@pytest.mark.parametrize(
    "context",
    [
        np.full((80, 2), 2.0),
        np.zeros((80, 2)),
        np.zeros((14, 2)),
        np.tile([1.0, 0.0], (20, 1)),
        np.tile([0.0, 1.0], (20, 1)),
        np.full((20, 2), 1e300),
        np.random.default_rng(0).random((4, 2)),
        np.random.default_rng(1).random((14, 2)) * 1e-30,
        10 ** np.random.default_rng(2).uniform(-30, 30, (20, 2)),
    ],
    ids="constant zeros few-zeros no-predators no-prey huge four-points tiny wild".split(),
)
def test_any_context_has_a_finite_forecast_that_is_not_negative(context):
    forecast = law_fit(TIME, context)
    assert forecast.shape == (100 - len(context), 2)
    assert np.isfinite(forecast).all() and (forecast >= 0).all()


@pytest.mark.parametrize("point", [(2.0, 3.0), (2.0, 0.0), (0.0, 3.0), (0.0, 0.0)])
def test_what_stays_the_same_is_forecast_to_stay_so_and_zero_exactly(point):
    assert_allclose(law_fit(TIME, np.tile(point, (80, 1))), np.tile(point, (20, 1)), rtol=1e-6)


@pytest.mark.parametrize("defect", ["endless", "not a number", "noise"])
def test_a_law_that_cannot_be_integrated_is_an_answer_not_an_exception(monkeypatch, defect):
    random = np.random.default_rng(0)
    context = random.random((20, 2))
    if defect == "endless":
        monkeypatch.setattr(module, "MOST_DERIVATIVES", 3)
    elif defect == "not a number":
        monkeypatch.setattr(module, "derivatives", lambda t, state, *law: state * np.nan)
    else:  # of which scipy warns
        monkeypatch.setattr(module, "derivatives", lambda t, state, *law: 1e9 * random.standard_normal(state.shape))
    assert_array_equal(law_fit(TIME, context), np.repeat(context[-1:], 80, axis=0))


def test_what_dies_out_goes_on_to_do_so_over_any_horizon():
    decay = np.exp(-np.arange(20.0))
    forecast = law_fit(np.arange(20_000.0), np.stack([decay, decay], axis=1))
    assert np.isfinite(forecast).all() and forecast[-1, 1] < 1e-20


def test_the_start_by_gradients_is_near_the_law(series):
    context = series["it decays"][:80]
    law = np.exp(module.matched_gradients(TIME[:80], context))
    assert_allclose(law, LAWS["it decays"][:6], rtol=0.1)


@pytest.mark.parametrize(
    ("time", "context", "message"),
    [
        (TIME, np.zeros((80, 3)), r"shape \(80, 3\): expected \(4 points or more, 2\)"),
        (TIME, np.zeros((3, 2)), "4 points or more"),
        (TIME, np.full((80, 2), np.nan), "not finite or negative: expected"),
        (TIME, np.full((80, 2), -1.0), "expected finite ones from 0"),
        (TIME[:80], np.zeros((80, 2)), "more than 80 increasing numbers"),
        (TIME[::-1], np.zeros((80, 2)), "increasing"),
    ],
)
def test_what_cannot_be_fitted_is_refused(time, context, message):
    with pytest.raises(ValueError, match=message):
        law_fit(time, context)
