"""Naive forecasts that a model has to beat.

P context points, h forecast points, V variables; values in the units of the data. Everything is float64.
"""

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


# Chosen on the validation part, systems 700-849, among 4 to 12 for each: MSE .0294, MAE .0732 there (80 -> 20 points),
# where the seasonal repeat has .1128, .1204. On systems 850-999 it is .0200, .0665.
ALIKE, EARLIER = 8, 4


def parrot(context: ArrayLike, horizon: int) -> Array:
    """Forecast what followed the past stretch that is nearest to the last D = 8 points (arXiv 2505.11349).

    x[P+i] = x[s+D+i], the forecast itself where that is beyond the context; s is argmin of the sum of
    (x[s+d] - x[P-D+d])^2 over d < D and all variables, of stretches that end at least 4 points before the last one, as
    neighbours in time are alike anyway. A context of fewer than 12 points is repeated as `seasonal_repeat` does it.
    """
    values = _context(context, horizon)
    points = len(values)
    if points < ALIKE + EARLIER:
        return seasonal_repeat(values, horizon)
    stretches = np.lib.stride_tricks.sliding_window_view(values, ALIKE, axis=0)  # (P - D + 1, V, D)
    apart = ((stretches[: points - ALIKE - EARLIER + 1] - stretches[-1]) ** 2).sum(axis=(1, 2))
    follows = int(apart.argmin()) + ALIKE
    copied = [*values]
    for step in range(horizon):
        copied.append(copied[follows + step])
    return np.stack(copied[points:])


SEASONAL, PARROT = "seasonal repeat", "context parroting"  # one of them is the reference of a skill
RULES = {"persistence": persistence, "context mean": context_mean, SEASONAL: seasonal_repeat, PARROT: parrot}
"""The copies: forecasts that only repeat what the context holds, by name."""


def _context(context: ArrayLike, horizon: int = 1) -> Array:
    values = np.asarray(context, np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"context has shape {values.shape}: expected finite values, (points, variables)")
    if horizon < 1:
        raise ValueError(f"horizon is {horizon}: expected at least 1 step")
    return values
