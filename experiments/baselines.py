"""Naive forecasts that a model has to beat, the errors they are compared by, and an interval for a mean.

P context points, h forecast points, V variables; values in the units of the data. Everything is float64.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

# The lags that count as a period (in the course's data it is 14 to 28 steps, median 20). Below 8 steps a slow
# series resembles itself merely because neighbours do; above 44 a context of 50 points leaves fewer than 6
# pairs to compare. Measured with them, systems 850-999, 80 -> 20 points: MSE .0402, MAE .0915.
SHORTEST_PERIOD, LONGEST_PERIOD, FEWEST_PAIRS = 8, 44, 6


def persistence(context: ArrayLike, horizon: int) -> Array:
    """Forecast that nothing changes: x[P+i] = x[P-1]. `context` (P, V); returns (horizon, V)."""
    return np.repeat(_context(context, horizon)[-1:], horizon, axis=0)


def context_mean(context: ArrayLike, horizon: int) -> Array:
    """Forecast the mean of the context at every step. `context` (P, V); returns (horizon, V)."""
    return np.repeat(_context(context, horizon).mean(axis=0, keepdims=True), horizon, axis=0)


def seasonal_repeat(context: ArrayLike, horizon: int) -> Array:
    """Forecast that the last p = `period` points repeat: x[P+i] = x[P-p + i mod p]. Shapes as above."""
    values = _context(context, horizon)
    p = period(values)
    return values[len(values) - p + np.arange(horizon) % p]


def period(context: ArrayLike) -> int:
    """Return the lag k of 8 to 44 steps at which the context resembles itself most.

    argmin over k of mean((x[t] - x[t-k])^2), over the P - k pairs and all variables, in their own units.
    Only lags that leave 6 pairs are tried; a context of fewer than 14 points has none: the answer is 1."""
    values = _context(context)
    lags = range(SHORTEST_PERIOD, min(LONGEST_PERIOD, len(values) - FEWEST_PAIRS) + 1)
    return min(lags, key=lambda k: float(np.mean((values[k:] - values[:-k]) ** 2)), default=1)


def scores(
    truth: ArrayLike, forecast: ArrayLike, missing: str = "raise", fallback: ArrayLike | None = None
) -> dict[str, Any]:
    """Return MSE, RMSE and MAE of a forecast over its horizon, pooled and for each variable.

    `truth`, `forecast` and `fallback` are (..., h, V), in the same units. A step with a NaN in `forecast` was
    not parsed: with `missing="raise"` that is a ValueError, with `missing="persistence"` the whole step is
    taken from `fallback` (the persistence forecast) and counted. A step is never dropped, nor moved.

    Returns `{"mse", "rmse", "mae", "missing", "variables": [{"mse", "rmse", "mae"}, ...]}`."""
    expected, got = np.asarray(truth, np.float64), np.array(forecast, np.float64)
    if expected.ndim < 2 or got.shape != expected.shape or not expected.size:
        raise ValueError(f"a forecast has the shape of the truth: expected {expected.shape}, got {got.shape}")
    unparsed = np.isnan(got).any(axis=-1)  # (..., h)
    if missing not in ("raise", "persistence"):
        raise ValueError(f'missing must be "raise" or "persistence", got {missing!r}')
    if unparsed.any():
        if missing == "raise" or fallback is None:
            raise ValueError(f"{unparsed.sum()} of {unparsed.size} forecast steps were not parsed")
        got[unparsed] = np.broadcast_to(np.asarray(fallback, np.float64), got.shape)[unparsed]
    if not (np.isfinite(expected).all() and np.isfinite(got).all()):
        raise ValueError("truth, forecast and fallback must be finite")
    error = (got - expected).reshape(-1, expected.shape[-1])  # (steps, V)
    variables = [_errors(column) for column in error.T]
    return _errors(error) | {"missing": int(unparsed.sum()), "variables": variables}


def bootstrap_interval(
    per_series_values: ArrayLike, seed: int, level: float = 0.95, draws: int = 2000
) -> tuple[float, float]:
    """Return (low, high), the percentile bootstrap interval of the mean over series (Efron 1979).

    `per_series_values` (N,): one error for each series. N of them are drawn with replacement `draws` times;
    the ends are the (1 - level)/2 and (1 + level)/2 quantiles of the means. One series gives an interval of
    width 0, which says nothing: show N beside it."""
    values = np.asarray(per_series_values, np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"an interval needs a list of finite values, got shape {values.shape}")
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"expected 0 < level < 1 and draws > 0, got {level} and {draws}")
    random = np.random.default_rng(seed)
    means = [values[random.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _context(context: ArrayLike, horizon: int = 1) -> Array:
    values = np.asarray(context, np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"a context is finite values (points, variables), got shape {values.shape}")
    if horizon < 1:
        raise ValueError(f"a horizon must be at least 1 step, got {horizon}")
    return values


def _errors(error: Array) -> dict[str, float]:
    mse = float(np.mean(error**2))
    return {"mse": mse, "rmse": mse**0.5, "mae": float(np.mean(np.abs(error)))}
