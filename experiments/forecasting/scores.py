"""The measures by which forecasts are judged: errors of one forecast, and scores of many samples of it.

Letters: N series, h forecast steps, V variables, S samples. Only the horizon is ever scored. Errors have the
units of the data (MSE their square); MAPE, sMAPE, R2, MASE, WQL, skill and coverage have none. Everything is float64.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from experiments.forecasting.baselines import PARROT, RULES, SEASONAL
from experiments.settings.record import FEWEST_SERIES

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

AS_GOOD, MOST_TIMES = 1.05, 1e6  # ratios of two MSEs: below it they count as equal; above it none is named
LEVEL, DRAWS = 0.95, 2000  # of bootstrap intervals
EPSILON = float(np.finfo(np.float64).eps)
QUANTILES = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9)
DECILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the weighted quantile loss


def filled(forecast: ArrayLike, fallback: ArrayLike) -> tuple[Array, Mask]:
    """Take each step that was not parsed from another forecast, persistence as a rule: none is dropped or moved.

    A step with a NaN in any variable was not parsed, and is replaced whole. `forecast`, `fallback` (N, h, V).
    Returns the forecast without NaN (N, h, V), and which steps were replaced (N, h)."""
    got = _float(forecast)
    other = _finite("fallback", fallback, got.shape)
    unparsed: Mask = np.any(np.isnan(got), axis=-1)
    return np.where(unparsed[..., None], other, got), unparsed


def errors(truth: ArrayLike, forecast: ArrayLike) -> dict[str, Any]:
    """Return MSE, RMSE, MAE, MAPE, sMAPE and R2 of a forecast, pooled over everything given. Arguments (..., h, V).

    With e = forecast - y: mse = mean e^2, rmse = sqrt(mse), mae = mean |e|,
    mape = mean(|e| / max(|y|, machine epsilon)), a fraction, which the values nearest to 0 decide,
    smape = mean(2 |e| / (|y| + |forecast|)), a fraction from 0 to 2, 0 where both values are 0, and
    r2 = 1 - sum e^2 / sum (y - m)^2, where m is the mean of y over what is given, each variable's own. So two
    variables of unlike level do not explain each other; where no variable changes, r2 is None.

    Raises ValueError where shapes differ, nothing is given, or a value is not finite.
    Source: scikit-learn, "Metrics and scoring", regression metrics; sMAPE: Makridakis, Spiliotis & Assimakopoulos 2020,
    "The M4 competition"."""
    y, got = (values.reshape(-1, values.shape[-1]) for values in _pair(truth, forecast))  # (all steps, V)
    e = got - y
    above = y - y[0]  # exactly 0 where a variable is constant, as y less its rounded mean is not
    spread = float(np.sum((above - above.mean(axis=0)) ** 2))
    mse = float(np.mean(e**2))
    size = np.abs(y) + np.abs(got)
    return {
        "mse": mse,
        "rmse": float(np.sqrt(mse)),
        "mae": float(np.mean(np.abs(e))),
        "mape": float(np.mean(np.abs(e) / np.maximum(np.abs(y), EPSILON))),
        "smape": float(np.mean(np.divide(2 * np.abs(e), size, out=np.zeros_like(e), where=size > 0))),
        "r2": 1 - float(np.sum(e**2)) / spread if spread else None,
    }


def by_variable(truth: ArrayLike, forecast: ArrayLike, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return `errors` of all variables together, under "all", and of each one under its name.

    `truth`, `forecast` (..., h, V) and V names. R2 of "all" is the sum of squared errors over the sum of squared
    deviations from each variable's own mean: the variables' R2 weighted by their variances."""
    y, got = _pair(truth, forecast)
    if len(names) != y.shape[-1]:
        raise ValueError(f"names are {list(names)}: expected {y.shape[-1]}, one for each variable")
    columns = ((name, [variable]) for variable, name in enumerate(names))
    return {"all": errors(y, got)} | {name: errors(y[..., column], got[..., column]) for name, column in columns}


def per_series(truth: ArrayLike, forecast: ArrayLike) -> dict[str, Array]:
    """Return "mse" and "mae" of each series, (N,) each, over its steps and variables, from (N, h, V)."""
    y, got = _pair(truth, forecast, dimensions=3)
    e = got - y
    return {"mse": np.mean(e**2, axis=(1, 2)), "mae": np.mean(np.abs(e), axis=(1, 2))}


def by_step(truth: ArrayLike, forecast: ArrayLike) -> dict[str, Array]:
    """Return "mse", "mae" and "running_rmse", each (h,): how the error grows with the step. Arguments (N, h, V).

    mse and mae of step s are means over the series and variables at s alone; running_rmse of s is the root of the mean
    squared error over steps 1..s."""
    y, got = _pair(truth, forecast, dimensions=3)
    e = got - y
    mse, mae = np.mean(e**2, axis=(0, 2)), np.mean(np.abs(e), axis=(0, 2))
    return {"mse": mse, "mae": mae, "running_rmse": np.sqrt(np.cumsum(mse) / np.arange(1, len(mse) + 1))}


def naive_error(context: ArrayLike) -> Array:
    """Return mean |x[t] - x[t-1]| of each variable, (N, 1, V), from (N, P, V): 0 where it is constant, or P is 1."""
    x = _float(context)
    if x.ndim != 3 or not x.size or not np.isfinite(x).all():
        raise ValueError(f"context has shape {x.shape}: expected finite values, (series, points, variables)")
    return np.abs(np.diff(x, axis=1)).sum(axis=1, keepdims=True) / max(1, x.shape[1] - 1)


def mase(truth: ArrayLike, forecast: ArrayLike, naive: ArrayLike) -> float | None:
    """Return the mean absolute scaled error: mean(|e| / q), where q is the `naive_error` of the context of the series.

    1 is the error that the naive forecast of one step has within the context; over a horizon of several steps it has
    more. Where q is 0 the ratio is not defined: such a variable of a series is left out; None where all are.
    `truth`, `forecast` (N, h, V); `naive` (N, 1, V), or (N, h, V) where a step has a context of its own.
    Source: Hyndman & Koehler 2006, "Another look at measures of forecast accuracy", section 3."""
    y, got = _pair(truth, forecast, dimensions=3)
    q = np.broadcast_to(_float(naive), y.shape)
    return float(np.mean(np.abs(got - y)[q > 0] / q[q > 0])) if (q > 0).any() else None


def weighted_quantile_loss(truth: ArrayLike, deciles: ArrayLike) -> float | None:
    """Return 2 sum max(p e, (p - 1) e) / sum |y|, e = y - its forecast at level p, the mean over the levels DECILES.

    `truth` (N, h, V), `deciles` (9, N, h, V). Of a point forecast, which stands for each of its quantiles, it is
    sum |e| / sum |y|. None where every true value is 0.
    Source: Ansari et al. 2024, "Chronos: learning the language of time series", the metric WQL."""
    f = _float(deciles)
    y = _finite("truth", truth, f.shape[1:])
    e = y - _finite("deciles", f, (len(DECILES), *y.shape))
    p = np.reshape(DECILES, (-1, 1, 1, 1))
    size = float(np.abs(y).sum())
    return 2 * float(np.maximum(p * e, (p - 1) * e).sum()) / len(DECILES) / size if size else None


def interval(per_series_values: ArrayLike, seed: int) -> tuple[float, float]:
    """Return (low, high), the percentile bootstrap interval of the mean over series, of `LEVEL`.

    `per_series_values` (N,): one value for each series. N of them are drawn with replacement `DRAWS` times;
    the ends are the (1 - level)/2 and (1 + level)/2 quantiles of the means. One series gives an interval of
    width 0, which says nothing: show N beside it.
    Source: Efron 1979, "Bootstrap methods: another look at the jackknife"."""
    values = _one_for_each_series(per_series_values)
    drawn = np.random.default_rng(seed).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def paired_interval(a: ArrayLike, b: ArrayLike, seed: int) -> tuple[float, float]:
    """Return the bootstrap interval of mean(a - b), where `a` and `b` (N,) are two forecasters' errors.

    Each draw takes the same series from both, so a hard series counts against neither: an interval without 0
    tells two forecasters apart even where their own intervals overlap."""
    first = _one_for_each_series(a)
    return interval(first - _finite("the other's error", b, first.shape), seed)


def skill(model_mse: float, reference_mse: float) -> float | None:
    """Return 1 - model_mse / reference_mse: 1 without error, 0 as good as the reference, None if that has none."""
    return 1 - model_mse / reference_mse if reference_mse else None


def won(model: ArrayLike, reference: ArrayLike) -> int:
    """Return the number of series whose error is lower with the model. Both (N,); a tie is not won.

    Divided by N it is the win rate."""
    first = _one_for_each_series(model)
    return int(np.sum(first < _finite("the other's error", reference, first.shape)))


def verdict(mse: Mapping[str, float], series: int, untrained: float | None = None) -> str:
    """Return how good a model's forecasts are, in one sentence: beside the best of the copies, and the untrained model.

    `mse` by forecaster over the same `series`: "model", and of the others those that are copies, `baselines.RULES`; of
    equal copies the first is the best. `untrained`: the untrained model's on these series, where it is known."""
    best = best_copy(mse)
    said, link = compared(mse["model"], mse[best])
    subject, them = ("The forecast is", "it") if series == 1 else ("The forecasts are", "them")
    text = f"{subject} {said} (MSE) {link} {the(best)}, the best of the copies"
    if untrained is not None:
        said, link = compared(mse["model"], untrained)
        text += f", and training {'left' if link == 'as' else 'made'} {them} {said} {link} the untrained model's"
    few = "one series tells" if series == 1 else f"{series} series tell"
    return text + (f"; {few} little." if series < FEWEST_SERIES else ".")


def the(copy: str) -> str:
    """A copy's name as a sentence has it."""
    return copy if copy in ("persistence", PARROT) else f"the {copy}"


def reference(mse: Mapping[str, float]) -> str:
    """Return the copy that skill is measured against: context parroting where its MSE is lower than the seasonal
    repeat's on the same series, else the seasonal repeat. `mse` by forecaster."""
    return PARROT if mse.get(PARROT, math.inf) < mse[SEASONAL] else SEASONAL


def best_copy(mse: Mapping[str, float]) -> str:
    """Return the one of `baselines.RULES` with the lowest MSE; of equals the first."""
    return min((name for name in RULES if name in mse), key=lambda name: mse[name])


def compared(mse: float, other: float) -> tuple[str, str]:
    """Return "2.1 times worse" and "than", or "about as good" and "as"."""
    low, high = sorted((mse, other))
    ratio = high / low if low else math.inf if high else 1.0
    if ratio < AS_GOOD:
        return "about as good", "as"
    times = "over a million" if ratio > MOST_TIMES else f"{ratio:,.0f}" if ratio >= 9.95 else f"{ratio:.1f}"
    return f"{times} times {'worse' if mse > other else 'better'}", "than"


def quantiles(samples: ArrayLike, levels: Sequence[float] = QUANTILES) -> Array:
    """Return the quantiles of each step and variable over its parsed samples, (len(levels), N, h, V).

    `samples` (N, S, h, V). A sample's step with a NaN in any variable is left out whole; a step that no sample
    parsed is NaN. Between order statistics numpy's "linear" rule holds: position q (n - 1) of n.
    Source: Hyndman & Fan 1996, "Sample quantiles in statistical packages", definition 7."""
    parsed, count = _parsed(samples)
    none = (count == 0)[:, None]  # (N, 1, h, 1)
    found = np.nanquantile(np.where(none, 0.0, parsed), levels, axis=1)  # numpy warns of a column of NaN
    return np.where(none[:, 0], np.nan, found)


def mean(samples: ArrayLike) -> Array:
    """Return the mean of each step and variable over its parsed samples, (N, h, V), from `samples` (N, S, h, V).

    What was not parsed is left out as in `quantiles`."""
    parsed, count = _parsed(samples)
    return np.nansum(parsed, axis=1) / np.where(count, count, np.nan)


def crps(truth: ArrayLike, samples: ArrayLike) -> Array:
    """Return the continuous ranked probability score of each step and variable (N, h, V); lower is better.

    mean |x - y| - 1/2 mean |x - x'|, over all pairs x, x' of the n parsed samples: that of the samples' own
    distribution. With the samples sorted it is 2 / n^2 sum_i |x_i - y| w_i, where w_i = n - i + 1/2 above y and
    i - 1/2 below: no term is negative. It has the data's units, and for one sample it is |x - y|.

    `truth` (N, h, V), `samples` (N, S, h, V). A sample's step with a NaN in any variable is left out whole; a
    step that no sample parsed is NaN.
    Source: Gneiting & Raftery 2007, "Strictly proper scoring rules, prediction, and estimation", section 4.2."""
    parsed, count = _parsed(samples)
    y = _finite("truth", truth, parsed[:, 0].shape)
    e = np.sort(parsed - y[:, None], axis=1)  # (N, S, h, V), NaN last
    rank = np.arange(1, e.shape[1] + 1)[:, None, None]
    weight = np.where(e > 0, count[:, None] - rank + 0.5, rank - 0.5)
    return 2 * np.nansum(np.abs(e) * weight, axis=1) / np.where(count, count, np.nan) ** 2


def coverage(truth: ArrayLike, low: ArrayLike, high: ArrayLike) -> float | None:
    """Return the share of true values in [low, high], ends included. All of one shape.

    A step whose bounds are NaN, as no sample was parsed, is ignored here: those are counted elsewhere, and the
    count belongs beside this share. None where no step has bounds."""
    below, above = _bounds(low, high)
    y = _finite("truth", truth, below.shape)
    known = ~np.isnan(above - below)
    return float(np.mean(((below <= y) & (y <= above))[known])) if known.any() else None


def width(low: ArrayLike, high: ArrayLike) -> float | None:
    """Return the mean of high - low, in the data's units. Steps whose bounds are NaN as in `coverage`."""
    below, above = _bounds(low, high)
    known = ~np.isnan(above - below)
    return float(np.mean((above - below)[known])) if known.any() else None


def _float(values: ArrayLike) -> Array:
    return np.asarray(values, np.float64)


def _finite(what: str, values: ArrayLike, shape: tuple[int, ...]) -> Array:
    found = _float(values)
    if found.shape != shape or not np.isfinite(found).all():
        bad = int(np.sum(~np.isfinite(found)))
        raise ValueError(f"{what} has shape {found.shape}, {bad} values not finite: expected {shape}, all finite")
    return found


def _pair(truth: ArrayLike, forecast: ArrayLike, dimensions: int | None = None) -> tuple[Array, Array]:
    y = _float(truth)
    if y.ndim < 2 or dimensions not in (None, y.ndim) or not y.size:
        expected = "(..., steps, variables)" if dimensions is None else "(series, steps, variables)"
        raise ValueError(f"truth has shape {y.shape}: expected {expected}, none empty")
    return _finite("truth", y, y.shape), _finite("forecast", forecast, y.shape)


def _one_for_each_series(values: ArrayLike) -> Array:
    found = _float(values)
    if found.ndim != 1 or not found.size:
        raise ValueError(f"error has shape {found.shape}: expected a value for each series")
    return _finite("error", found, found.shape)


def _parsed(samples: ArrayLike) -> tuple[Array, NDArray[np.int64]]:
    """Samples with each step that was not parsed NaN in all variables (N, S, h, V), and how many are left (N, h, 1)."""
    found = _float(samples)
    if found.ndim != 4 or not found.size or np.isinf(found).any():
        raise ValueError(f"samples have shape {found.shape}: expected (series, samples, steps, variables), no infinity")
    unparsed = np.isnan(found).any(axis=-1, keepdims=True)  # (N, S, h, 1)
    return np.where(unparsed, np.nan, found), np.sum(~unparsed, axis=1)


def _bounds(low: ArrayLike, high: ArrayLike) -> tuple[Array, Array]:
    below, above = _float(low), _float(high)
    if below.shape != above.shape or np.isinf([below, above]).any() or (below > above).any():
        raise ValueError(f"bounds have shapes {below.shape}, {above.shape}: expected low <= high of one, finite or NaN")
    return below, above
