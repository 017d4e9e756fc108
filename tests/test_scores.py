"""The measures of forecasts, against values worked out by hand and against formulas written another way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.testing import assert_allclose, assert_array_equal

from experiments.forecasting import scores

NAN = np.nan
# Whole hundredths, as decoded digits are: sums and differences of them cannot underflow.
DIGITS = st.integers(-1000, 1000).map(lambda value: value / 100)
FORECASTS = arrays(np.float64, array_shapes(min_dims=3, max_dims=3, max_side=4), elements=DIGITS)
SAMPLES = arrays(np.float64, array_shapes(min_dims=4, max_dims=4, max_side=4), elements=DIGITS)
quick = settings(max_examples=60)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(2, 1, shape)


# One forecast


def test_a_step_with_any_nan_is_taken_whole_from_the_fallback_and_counted():
    forecast = np.array([[[1.0, 1.0], [NAN, 9.0], [3.0, 4.0]], [[5.0, NAN], [6.0, 7.0], [NAN, NAN]]])
    fallback = np.full((2, 3, 2), 2.0)
    filled, unparsed = scores.filled(forecast, fallback)
    assert_array_equal(filled, [[[1, 1], [2, 2], [3, 4]], [[2, 2], [6, 7], [2, 2]]])
    assert_array_equal(unparsed, [[False, True, False], [True, False, True]])
    assert np.isnan(forecast).sum() == 4  # the caller's array is as it was


def test_errors_worked_out_by_hand():
    """e = 1, -1, 2, 0 on y = 1, 2, 4, 5: sum e^2 = 6, sum |e| = 4, mean y = 3, deviations 4 + 1 + 1 + 4 = 10."""
    found = scores.errors([[1], [2], [4], [5]], [[2], [1], [6], [5]])
    assert_allclose(
        [found[name] for name in ("mse", "rmse", "mae", "mape", "smape", "r2")],
        [6 / 4, 1.5**0.5, 4 / 4, (1 / 1 + 1 / 2 + 2 / 4 + 0 / 5) / 4, (2 / 3 + 2 / 3 + 4 / 10 + 0) / 4, 1 - 6 / 10],
        rtol=1e-15,
    )


def test_mape_divides_by_the_size_of_the_true_value_and_by_epsilon_where_that_is_less():
    mape = scores.errors([[-2.0], [0.0], [1e-20]], [[-1.0], [3.0], [0.0]])["mape"]
    assert mape == (1 / 2 + 3 / 2.0**-52 + 1e-20 / 2.0**-52) / 3


def test_smape_is_2_where_signs_differ_and_0_where_both_values_are_0():
    assert scores.errors([[-2.0], [0.0], [0.0]], [[1.0], [3.0], [0.0]])["smape"] == (2 + 2 + 0) / 3


def test_errors_come_together_and_by_variable_and_r2_takes_each_variables_own_mean():
    """Grand means would let the gap between the variables pass for explained variance: .9967 in place of 0."""
    truth = np.array([[[0.0, 100.0], [2.0, 104.0]]])
    forecast = np.array([[[1.0, 102.0], [1.0, 102.0]]])  # each variable's mean
    found = scores.by_variable(truth, forecast, ("prey", "predator"))
    assert list(found) == ["all", "prey", "predator"]
    assert [one["mse"] for one in found.values()] == [2.5, 1, 4]
    assert [one["rmse"] for one in found.values()] == [2.5**0.5, 1, 2]
    assert [one["mae"] for one in found.values()] == [1.5, 1, 2]
    assert [one["r2"] for one in found.values()] == [0, 0, 0]
    better = scores.by_variable(truth, [[[0, 102], [2, 102]]], ("prey", "predator"))
    assert_allclose([one["r2"] for one in better.values()], [1 - 8 / (2 + 8), 1, 0], rtol=1e-15)
    assert found["all"] == scores.errors(truth, forecast)


@given(FORECASTS)
@quick
def test_the_truth_has_no_error_and_an_r2_of_1_and_the_mean_an_r2_of_0(truth):
    exact = scores.errors(truth, truth)
    mean = scores.errors(truth, np.broadcast_to(truth.mean(axis=(0, 1)), truth.shape))
    assert [exact[name] for name in ("mse", "rmse", "mae", "mape")] == [0, 0, 0, 0]
    if (truth == truth[:1, :1]).all():
        assert exact["r2"] is None and mean["r2"] is None
    else:
        assert exact["r2"] == 1
        assert_allclose(mean["r2"], 0, atol=1e-9)


def test_a_truth_that_never_changes_has_no_r2():
    """The mean of thirty times .1 is not .1 in float64: by deviations from it R2 would be -1e31, not undefined."""
    assert np.full(30, 0.1).mean() != 0.1
    assert scores.errors(np.full((30, 1), 0.1), np.full((30, 1), 0.2))["r2"] is None


@given(FORECASTS, st.sampled_from([0.25, 8.0]))
@quick
def test_errors_follow_the_unit(truth, scale):
    forecast = truth[::-1] + 1
    plain, scaled = scores.errors(truth, forecast), scores.errors(scale * truth, scale * forecast)
    assert scaled["mse"] == scale**2 * plain["mse"]
    assert (scaled["rmse"], scaled["mae"]) == (scale * plain["rmse"], scale * plain["mae"])
    assert scaled["r2"] == plain["r2"]
    if truth.all():
        assert scaled["mape"] == plain["mape"]


def test_the_error_of_each_series_is_over_its_steps_and_variables():
    truth, forecast = np.zeros((2, 2, 2)), np.array([[[1.0, 1.0], [1.0, -3.0]], [[0.0, 2.0], [0.0, 0.0]]])
    found = scores.per_series(truth, forecast)
    assert_array_equal((found["mse"], found["mae"]), [[12 / 4, 4 / 4], [6 / 4, 2 / 4]])


def test_errors_by_step_and_the_running_rmse_worked_out_by_hand():
    truth, forecast = np.zeros((2, 3, 2)), np.zeros((2, 3, 2))
    forecast[0] = [[1, -1], [2, 4], [0, 0]]
    forecast[1] = [[1, 1], [2, 0], [6, 0]]
    found = scores.by_step(truth, forecast)
    assert_allclose(found["mse"], [1, 6, 9], rtol=1e-15)
    assert_allclose(found["mae"], [1, 2, 1.5], rtol=1e-15)
    assert_allclose(found["running_rmse"], np.sqrt([1, (1 + 6) / 2, (1 + 6 + 9) / 3]), rtol=1e-15)


@given(FORECASTS)
@quick
def test_the_measures_of_series_steps_and_variables_agree_with_the_pooled_ones(truth):
    forecast = np.roll(truth, 1, axis=1) + 0.5
    pooled, steps = scores.errors(truth, forecast), scores.by_step(truth, forecast)
    variables = scores.by_variable(truth, forecast, [str(v) for v in range(truth.shape[-1])])
    del variables["all"]
    for measure in ("mse", "mae"):
        each = scores.per_series(truth, forecast)[measure]
        means = each.mean(), steps[measure].mean(), np.mean([one[measure] for one in variables.values()])
        assert_allclose(means, pooled[measure], rtol=1e-12)
    assert_allclose(steps["running_rmse"][-1], pooled["rmse"], rtol=1e-12)
    for step, value in enumerate(steps["running_rmse"], 1):
        assert_allclose(value, scores.errors(truth[:, :step], forecast[:, :step])["rmse"], rtol=1e-12)


# Many series


def test_the_interval_is_that_of_one_resample_after_another():
    values = np.random.default_rng(4).exponential(size=37)
    draw = np.random.default_rng(5)
    means = [values[draw.integers(37, size=37)].mean() for _ in range(2000)]
    assert_allclose(scores.interval(values, 5), np.quantile(means, [0.025, 0.975]), rtol=1e-12)


def test_the_interval_is_that_of_the_mean_and_follows_its_seed():
    values = np.random.default_rng(3).exponential(size=150)
    low, high = scores.interval(values, seed=0)
    assert (low, high) == scores.interval(values, seed=0) != scores.interval(values, 1)
    width = 2 * 1.96 * values.std() / 150**0.5
    assert_allclose([low, high], values.mean() + np.array([-width, width]) / 2, atol=width / 10)
    assert scores.interval([2.5], seed=0) == (2.5, 2.5)


def test_a_paired_interval_keeps_each_series_together():
    """A constant advantage is certain however much the series differ; unpaired, its interval would hold 0."""
    hard = np.random.default_rng(6).exponential(size=50) * 10
    low, high = scores.paired_interval(hard + 0.5, hard, seed=0)
    assert_allclose([low, high], 0.5, rtol=1e-12)
    other = np.random.default_rng(7).exponential(size=50)
    assert scores.paired_interval(hard, other, 1) == scores.interval(hard - other, 1)
    assert scores.interval(hard, 0)[0] < scores.interval(hard + 0.5, 0)[0] < scores.interval(hard, 0)[1]


def test_mase_is_the_error_over_that_of_one_naive_step_in_the_context_and_leaves_out_what_is_constant_there():
    context = np.array([[[1.0, 5.0], [3.0, 5.0], [2.0, 5.0]], [[0.0, 1.0], [0.5, 4.0], [1.0, 4.0]]])
    naive = scores.naive_error(context)
    assert_array_equal(naive, [[[1.5, 0.0]], [[0.5, 1.5]]])
    truth = np.zeros((2, 2, 2))
    forecast = np.array([[[3.0, 9.0], [0.0, 9.0]], [[1.0, -3.0], [1.0, 0.0]]])
    assert scores.mase(truth, forecast, naive) == (3 / 1.5 + 0 + 1 / 0.5 + 1 / 0.5 + 3 / 1.5 + 0) / 6
    assert scores.mase(truth[:1, :, 1:], forecast[:1, :, 1:], naive[:1, :, 1:]) is None
    assert_array_equal(scores.naive_error(context[:, :1]), np.zeros((2, 1, 2)))


def test_the_weighted_quantile_loss_is_that_of_one_level_after_another():
    truth, samples = random(3, 4, 2), random(3, 50, 4, 2, seed=1)
    deciles = np.quantile(samples, scores.DECILES, axis=1)
    total = 0.0
    for level, forecast in zip(scores.DECILES, deciles, strict=True):
        for y, f in zip(truth.ravel(), forecast.ravel(), strict=True):
            total += 2 * (level * (y - f) if y >= f else (1 - level) * (f - y)) / 9
    assert_allclose(scores.weighted_quantile_loss(truth, deciles), total / np.abs(truth).sum(), rtol=1e-12)
    point = np.broadcast_to(deciles[2], deciles.shape)
    absolute = np.abs(deciles[2] - truth).sum() / np.abs(truth).sum()
    assert_allclose(scores.weighted_quantile_loss(truth, point), absolute, rtol=1e-12)
    assert scores.weighted_quantile_loss(0 * truth, deciles) is None


def test_the_reference_is_the_parrot_only_where_it_is_better():
    names = ("context parroting", "seasonal repeat")
    found = [scores.reference(dict(zip(names, pair, strict=True))) for pair in ((1.0, 2.0), (2.0, 1.0), (1.0, 1.0))]
    assert found == ["context parroting", "seasonal repeat", "seasonal repeat"]
    assert scores.reference({"seasonal repeat": 1.0, "persistence": 0.0}) == "seasonal repeat"


def test_skill_is_the_share_of_the_references_error_that_is_gone():
    assert [scores.skill(mse, 2.0) for mse in (0.0, 0.5, 2.0, 6.0)] == [1, 0.75, 0, -2]
    assert scores.skill(1.0, 0.0) is None


def test_a_tie_is_not_won():
    assert scores.won([1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 2.0, 5.0]) == 2


BEST = "the seasonal repeat, the best of the copies"


@pytest.mark.parametrize(
    ("model", "untrained", "series", "said"),
    [
        (0.21, None, 20, f"The forecasts are 2.1 times worse (MSE) than {BEST}."),
        (0.05, 0.04, 20, f"are 2.0 times better (MSE) than {BEST}, and training made them 1.2 times worse than the un"),
        (0.0102, 0.0145, 20, f"are 9.8 times better (MSE) than {BEST}, and training made them 1.4 times better than"),
        (1.26, 1.3, 20, f"are 13 times worse (MSE) than {BEST}, and training left them about as good as the untrained"),
        (0.104, None, 20, f"The forecasts are about as good (MSE) as {BEST}."),
        (0.1, 0.1, 20, f"as good (MSE) as {BEST}, and training left them about as good as the untrained model's."),
        (500.0, None, 20, f"are 5,000 times worse (MSE) than {BEST}."),
        (0.0, 0.0, 20, f"are over a million times better (MSE) than {BEST}, and training left them about as good as"),
        (0.2, 0.0, 20, "and training made them over a million times worse than the untrained model's."),
        (0.2, None, 19, f"The forecasts are 2.0 times worse (MSE) than {BEST}; 19 series tell little."),
        (0.2, 0.1, 1, f"The forecast is 2.0 times worse (MSE) than {BEST}, and training made it 2.0 times worse"),
        (0.2, None, 1, "the best of the copies; one series tells little."),
    ],
)
def test_the_verdict_is_one_plain_sentence(model, untrained, series, said):
    mse = {"model": model, "persistence": 0.3, "context mean": 0.1000001, "seasonal repeat": 0.1, "law fit": 1e-5}
    verdict = scores.verdict(mse, series, untrained)
    assert said in verdict and verdict.endswith(".") and verdict.count(". ") == 0


def test_of_equal_copies_the_first_is_the_best_and_one_without_error_is_no_ratio():
    alike = {"model": 0.2, "persistence": 0.0, "context mean": 0.0, "seasonal repeat": 0.0}
    assert scores.verdict(alike, 20) == (
        "The forecasts are over a million times worse (MSE) than persistence, the best of the copies."
    )
    assert "as good (MSE) as persistence" in scores.verdict(alike | {"model": 0.0}, 20)


# Many samples of one forecast


def crps_by_pairs(y: float, x: np.ndarray) -> float:
    pairs = [abs(a - b) for a in x for b in x]
    return float(np.mean(np.abs(x - y)) - np.mean(pairs) / 2)


def crps_by_integration(y: float, x: np.ndarray) -> float:
    """The integral over z of (F(z) - 1[z >= y])^2, which is constant between neighbours of the samples and y."""
    ends = np.sort(np.append(x, y))
    middle = (ends[1:] + ends[:-1]) / 2
    cdf = (x[:, None] <= middle).mean(axis=0)
    return float(np.sum((cdf - (middle >= y)) ** 2 * np.diff(ends)))


@pytest.mark.parametrize("formula", [crps_by_pairs, crps_by_integration])
def test_the_crps_equals_the_energy_form_and_the_integral_over_the_distribution(formula):
    truth, samples = random(3, 4, 2), random(3, 9, 4, 2, seed=1)
    samples[:, 5] = samples[:, 4]  # ties
    samples[0, 2] = truth[0]
    expected = np.empty(truth.shape)
    for n, step, v in np.ndindex(truth.shape):
        expected[n, step, v] = formula(truth[n, step, v], samples[n, :, step, v])
    assert_allclose(scores.crps(truth, samples), expected, rtol=1e-11)


@given(SAMPLES, st.sampled_from([-4.0, -1.0, 0.5, 8.0]), st.randoms(use_true_random=False))
@quick
def test_the_crps_follows_the_unit_and_no_order_of_the_samples(samples, scale, order):
    truth = np.roll(samples[:, 0], 1) + 0.5
    plain = scores.crps(truth, samples)
    assert_allclose(scores.crps(scale * truth, scale * samples), abs(scale) * plain, rtol=1e-12)
    rows = order.sample(range(samples.shape[1]), samples.shape[1])
    assert_array_equal(scores.crps(truth, samples[:, rows]), plain)
    assert_array_equal(scores.quantiles(samples[:, rows]), scores.quantiles(samples))


def test_quantiles_are_those_of_numpy():
    samples = random(3, 8, 5, 2)
    found = scores.quantiles(samples)
    assert found.shape == (11, 3, 5, 2)
    assert_allclose(found, np.quantile(samples, scores.QUANTILES, axis=1), rtol=1e-12)
    ramp = np.arange(11.0).reshape(1, 11, 1, 1)
    assert_allclose(scores.quantiles(ramp).ravel(), 10 * np.array(scores.QUANTILES), rtol=1e-12)


def test_samples_of_a_step_that_were_not_parsed_are_left_out_whole():
    truth, samples = random(2, 3, 2), random(2, 5, 3, 2, seed=1)
    samples[0, 1, 2, 0] = NAN  # the other variable of that step goes too
    samples[0, 3, 2] = NAN
    samples[1, :, 0, 1] = NAN  # no sample parsed
    samples[1, 1:, 2] = NAN  # one did: it is every quantile
    kept = samples[:1, [0, 2, 4], 2:]
    crps, quantiles = scores.crps(truth, samples), scores.quantiles(samples)
    assert_allclose(crps[0, 2], scores.crps(truth[:1, 2:], kept)[0, 0], rtol=1e-12)
    assert_allclose(quantiles[:, 0, 2], np.quantile(kept[0, :, 0], scores.QUANTILES, axis=0), rtol=1e-12)
    assert_allclose(scores.mean(samples)[0, 2], kept[0, :, 0].mean(0), rtol=1e-12)
    assert_array_equal(np.isnan(scores.mean(samples)), np.isnan(crps))
    assert_array_equal(np.argwhere(np.isnan(crps)), [[1, 0, 0], [1, 0, 1]])
    assert_array_equal(np.isnan(quantiles), np.broadcast_to(np.isnan(crps), quantiles.shape))
    assert_array_equal(quantiles[:, 1, 2], np.broadcast_to(samples[1, 0, 2], (11, 2)))
    assert_array_equal(crps[1, 2], np.abs(samples[1, 0, 2] - truth[1, 2]))
    steps_0_and_1 = scores.crps(truth[:1, :2], samples[:1, :, :2])
    assert_array_equal(crps[:1, :2], steps_0_and_1)
    assert np.isnan(samples).sum() == 1 + 2 + 5 + 4 * 2  # the caller's array is as it was


def test_coverage_counts_the_ends_as_inside():
    truth = np.array([[[0.0], [1.0], [2.0], [3.0]]])
    assert scores.coverage(truth, np.full((1, 4, 1), 1.0), np.full((1, 4, 1), 2.0)) == 2 / 4
    assert scores.width([[1.0, 0.0]], [[2.0, 4.0]]) == (1 + 4) / 2


def test_steps_without_bounds_do_not_enter_coverage_nor_width():
    truth = np.array([[[0.0], [1.0], [9.0]]])
    low, high = np.array([[[0.0], [2.0], [NAN]]]), np.array([[[1.0], [5.0], [NAN]]])
    assert (scores.coverage(truth, low, high), scores.width(low, high)) == (1 / 2, (1 + 3) / 2)
    none = np.full((1, 3, 1), NAN)
    assert (scores.coverage(truth, none, none), scores.width(none, none)) == (None, None)


# What is no forecast

STEPS, ONE = np.zeros((1, 3, 2)), np.zeros((1, 1, 1))
NO_PAIR = (
    *((STEPS, STEPS[:, :2]), (np.zeros((2, 3, 2)), STEPS[0]), (STEPS[:, :0], STEPS[:, :0]), (STEPS[0, :, 0],) * 2),
    *((STEPS + NAN, STEPS), (STEPS, STEPS + NAN), (STEPS, STEPS + np.inf)),
)
NO_SAMPLES = (ONE,), (np.zeros((1, 0, 1, 1)),), (np.full((1, 1, 1, 1), np.inf),)
NO_BOUNDS = (ONE, np.zeros((1, 2, 1))), (ONE + 1, ONE), (ONE, ONE + np.inf)


@pytest.mark.parametrize(
    ("measures", "arguments", "said"),
    [
        ((scores.errors, scores.per_series, scores.by_step), NO_PAIR, r"(truth|forecast) has shape .*: expected \("),
        ((lambda *pair: scores.by_variable(*pair, ("a", "b")),), NO_PAIR, r"(truth|forecast) has shape .*: expected"),
        ((scores.per_series, scores.by_step), [(STEPS[0], STEPS[0])], r"expected \(series, steps, variables\)"),
        ((scores.by_variable,), [(STEPS, STEPS, ["prey"])], r"names are \['prey'\]: expected 2"),
        ((scores.filled,), [(STEPS, STEPS[0]), (STEPS, STEPS + NAN)], r"fallback has shape .*: expected \(1, 3, 2\)"),
        ((scores.interval,), [([], 0), ([1.0, NAN], 0), ([[1.0]], 0)], "error has shape .*: expected"),
        ((scores.won,), [([1, 2], [1]), ([1], [NAN])], "the other's error has shape .*: expected"),
        ((lambda a, b: scores.paired_interval(a, b, 0),), [([1, 2], [1])], r"the other's error has shape \(1,\)"),
        ((scores.naive_error,), [(STEPS[0],), (STEPS + NAN,)], "context has shape .*: expected finite values"),
        ((scores.weighted_quantile_loss,), [(STEPS, STEPS), (STEPS, np.zeros((8, *STEPS.shape)))], "has shape .*: exp"),
        ((scores.quantiles, lambda x: scores.crps(ONE, x)), NO_SAMPLES, "samples have shape .*: expected"),
        ((lambda y: scores.crps(y, np.zeros((1, 3, 1, 1))),), [(STEPS,), (ONE + NAN,)], "truth has shape .*: expected"),
        ((lambda y: scores.coverage(y, ONE, ONE),), [(STEPS,), (ONE + NAN,)], "truth has shape .*: expected"),
        ((scores.width, lambda *b: scores.coverage(ONE, *b)), NO_BOUNDS, "bounds have shapes .*: expected low <= high"),
    ],
)
def test_values_of_unlike_shape_or_not_finite_are_refused_in_one_line(measures, arguments, said):
    for measure in measures:
        for values in arguments:
            with pytest.raises(ValueError, match=said) as refusal:
                measure(*values)
            assert "\n" not in str(refusal.value)
