"""What kind of series a system has, computed from its values by one stated rule.

P points, V variables; values in any unit.
"""

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

Shape = Literal["growing", "decaying", "oscillating", "settled"]
SHAPES: tuple[Shape, ...] = get_args(Shape)  # the order in which they are shown

FEWEST_POINTS = 4
CHANGED, NEGLIGIBLE = 1.08, 0.05  # ratios of the late range to the early one
RULE = (
    "A series is cut in two halves, and the range of each variable (its largest value less its smallest) in the "
    "second half is divided by that in the first; the mean of these ratios over the variables decides. "
    f"Above {CHANGED} the series is growing, below 1/{CHANGED} decaying, between them oscillating, and "
    f"below {NEGLIGIBLE} settled."
)


def shape(series: ArrayLike) -> Shape:
    """Return the kind of a series, (P, V), by `RULE`: q = mean over variables of range(late half) / range(early half).

    settled: q < .05; decaying: q < 1 / 1.08; growing: q > 1.08; oscillating: the others. A variable that never changes
    counts with a ratio of 0, and one that only begins to change in the late half with infinity. Each half should hold
    a whole period (in the course's data a half is 50 points, and the longest period 28). The middle point of an
    odd number is in the late half. The thresholds are chosen so that the published 1000 systems divide about as
    published. Raises ValueError for fewer than 4 points, or values that are not finite.
    """
    values = np.asarray(series, np.float64)
    if values.ndim != 2 or len(values) < FEWEST_POINTS or not values.size or not np.isfinite(values).all():
        raise ValueError(f"series has shape {values.shape}: expected finite values, (4 points or more, variables)")
    early, late = (np.ptp(half, axis=0) for half in np.split(values, [len(values) // 2]))  # (V,)
    begins = np.where(late > 0, np.inf, 0.0)
    ratio = np.divide(late, early, out=begins, where=early > 0).mean()
    if ratio < NEGLIGIBLE:
        return "settled"
    if ratio < 1 / CHANGED:
        return "decaying"
    return "growing" if ratio > CHANGED else "oscillating"
