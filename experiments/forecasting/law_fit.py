"""What a person with the equation could do: fit the law to the context, and integrate on over the horizon.

The law is that of `data.lotka_volterra`, with its parameters r, a, m, h, e, K and its initial state unknown. The fit
sees the context alone: neither the future, nor the parameters, nor the ranges they were drawn from.

1. Gradient matching (Varah 1982): a cubic spline through the points gives derivatives, and for a fixed h the
   law is linear in r, r/K and a, and in ea and m. Two regressions for each of a few h are a start.
2. From there, least squares between the integrated law and the points (a trust region, after Gauss-Newton).

Logarithms are fitted, so that everything stays positive, and the state is integrated as logarithms. A residual is
a difference in units of the variable's mean over the context: prey and predator count alike, and small values, where
predators have nearly died out, do not count for more than they will in the forecast's squared error. Differences of
logarithms or of square roots forecast no better (measured: MSE 2.8e-5 and 2.7e-5).

Measured on systems 850-999, 80 -> 20 points: MSE 2.6e-5, MAE .0030 (seasonal repeat: .0402, .0915), .07 s a series;
by the first step alone .0045, and from the middle of the parameters' ranges instead of it 6 of the 150 have an MSE
above .01 (here none). It is not 0 because the data are LSODA's at a tolerance of 1e-3: the true parameters, integrated
exactly, have 3.8e-4.

P context points, H forecast points, B sets of parameters integrated as one; all float64.
"""

import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import solve_ivp
from scipy.interpolate import CubicSpline
from scipy.optimize import least_squares, nnls

from data.lotka_volterra import derivatives

Array = NDArray[np.float64]

LAW = 6  # r, a, m, h, e, K; two logarithms of the initial state follow
FEWEST_POINTS = 4  # the 8 unknowns need 8 values
SMALLEST = 1e-4  # of a parameter or a state to start from, in units of the means and of the mean time step
LARGEST_LOGARITHM = 50.0  # e^50 to the fourth power is still far from float64's overflow
MOST_TRIALS, MOST_DERIVATIVES = 50, 10_000  # steps of one fit; evaluations of the law in one integration
SEARCH_TOLERANCE, FINAL_TOLERANCE = 1e-6, 1e-9
DIFFERENCE = 1e-4  # of logarithms, for the Jacobian
OFF = 1e3  # the residual of a law that cannot be integrated


def law_fit(time: Array, context: ArrayLike) -> Array:
    """Forecast by the law, fitted to the context and integrated on: `time` (P+H,), `context` (P, 2) -> (H, 2).

    Deterministic, and the same in any unit of time and of the values. A variable that is 0 in the whole context stays
    0. Where nothing could be integrated, the last point is repeated. Raises ValueError for fewer than 4 points, or
    values that are not finite or negative.
    """
    values, time = np.asarray(context, np.float64), np.asarray(time, np.float64)
    points = len(values)
    if values.ndim != 2 or values.shape[1] != 2 or points < FEWEST_POINTS:
        raise ValueError(f"law fit: context has shape {values.shape}: expected ({FEWEST_POINTS} points or more, 2)")
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("law fit: context has values that are not finite or negative: expected finite ones from 0")
    if time.ndim != 1 or len(time) <= points or not (np.diff(time) > 0).all():
        raise ValueError(f"law fit: time has shape {time.shape}: expected more than {points} increasing numbers")
    means = values.mean(axis=0)
    unit = np.where(means > 0, means, 1.0)
    clock = (time - time[0]) / (time[points - 1] - time[0]) * (points - 1)  # 0 at the first point, P - 1 at the last
    unknowns = _fitted(clock[:points], values / unit)
    forecast = _integrated(unknowns[:, None], np.append(0.0, clock[points:]), FINAL_TOLERANCE)
    if forecast is None:
        return np.repeat(values[-1:], len(time) - points, axis=0)
    return forecast[0, 1:] * means  # not `unit`: 0 has no logarithm, and the fit only comes near it


def _fitted(clock: Array, values: Array) -> Array:
    """The unknowns (8,), as logarithms, whose law is nearest to the values (P, 2)."""

    def residuals(unknowns: Array) -> Array:
        law = _integrated(unknowns[:, None], clock, SEARCH_TOLERANCE)
        return np.full(values.size, OFF) if law is None else (law[0] - values).ravel()

    def jacobian(unknowns: Array) -> Array:
        # One integration for all: they share their steps, so its errors cancel in the differences.
        moved = np.column_stack([unknowns, unknowns[:, None] + DIFFERENCE * np.eye(len(unknowns))])  # (8, 9)
        law = _integrated(moved, clock, SEARCH_TOLERANCE)
        if law is None:
            return np.zeros((values.size, len(unknowns)))
        return ((law[1:] - law[0]) / DIFFERENCE).reshape(len(unknowns), -1).T

    start = np.concatenate([matched_gradients(clock, values), np.log(np.maximum(values[0], SMALLEST))])
    return least_squares(residuals, start, jacobian, max_nfev=MOST_TRIALS, ftol=1e-6, xtol=1e-6).x


def matched_gradients(clock: Array, values: Array) -> Array:
    """The law (6,), as logarithms, whose derivatives are nearest to those of a spline through the values (P, 2)."""
    x, y = values.T
    dx, dy = CubicSpline(clock, values)(clock, 1).T
    best, smallest_error = np.ones(LAW), np.inf
    for h in np.geomspace(0.003, 3.0, 25):  # in units of 1 / mean prey
        met = x * y / (1 + h * x)
        (r, r_over_K, a), prey_error = nnls(np.column_stack([x, -(x**2), -met]), dx)
        (ea, m), predator_error = nnls(np.column_stack([met, -y]), dy)
        if (error := prey_error**2 + predator_error**2) < smallest_error:
            r, r_over_K, a, ea = (max(value, SMALLEST) for value in (r, r_over_K, a, ea))
            best, smallest_error = np.array([r, a, max(m, SMALLEST), h, ea / a, r / r_over_K]), error
    return np.log(best)


def _integrated(unknowns: Array, clock: Array, tolerance: float) -> Array | None:
    """The law's values for unknowns (8, B) at the times `clock`, from its first on: (B, times, 2), or None."""
    positive = _exp(unknowns)
    law, count, calls = positive[:LAW], unknowns.shape[1], 0

    def logarithmic(t: float, logarithms: Array) -> Array:
        nonlocal calls
        calls += 1
        if calls > MOST_DERIVATIVES:
            raise _Endless
        state = _exp(logarithms).reshape(2, count)
        return (np.asarray(derivatives(t, state, *law)) / state).ravel()

    start, ends = np.log(positive[LAW:]).ravel(), (clock[0], clock[-1])
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # a law that cannot be integrated is an answer here
            solution = solve_ivp(logarithmic, ends, start, "LSODA", clock, rtol=tolerance, atol=tolerance)
    except _Endless:
        return None
    if not solution.success or not np.isfinite(solution.y).all():
        return None
    return _exp(solution.y).reshape(2, count, len(clock)).transpose(1, 2, 0)


def _exp(logarithms: Array) -> Array:
    return np.exp(np.clip(logarithms, -LARGEST_LOGARITHM, LARGEST_LOGARITHM))


class _Endless(Exception):
    """An integration that takes more steps than any sensible law does."""
