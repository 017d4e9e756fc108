"""Splits by system: a series is for training, validation or test as a whole, so no part of it leaks."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FRACTIONS = (0.70, 0.15, 0.15)


@dataclass(frozen=True)
class Split:
    """Indices of systems, each of 0 .. systems - 1 in exactly one part: int64 arrays, ascending."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def in_order(systems: int, fractions: tuple[float, float, float] = FRACTIONS) -> Split:
    """The first systems train, the next validate, the last test.

    fractions: of train, validation and test; they add up to 1. The borders are their sums, rounded.
    Raises ValueError for other fractions, or where a part would have no system.
    """
    return _cut(np.arange(systems, dtype=np.int64), fractions)


def seeded(systems: int, fractions: tuple[float, float, float] = FRACTIONS, seed: int = 0) -> Split:
    """As `in_order`, after the permutation that numpy's default generator draws for `seed` (0 .. 2^32 - 1)."""
    return _cut(np.random.default_rng(_checked(seed)).permutation(systems).astype(np.int64), fractions)


def held_out_first(systems: int, fractions: tuple[float, float, float] = FRACTIONS, seed: int = 0) -> Split:
    """As `seeded`, with the permutation's first systems held out, and the rest to train.

    What is held out is the set that scikit-learn's `train_test_split(range(systems), random_state=seed)` holds out.
    """
    order = np.random.RandomState(_checked(seed)).permutation(systems).astype(np.int64)
    held_out = round((fractions[1] + fractions[2]) * systems)
    return _cut(np.concatenate([order[held_out:], order[:held_out]]), fractions)


def _checked(seed: int) -> int:
    if not 0 <= seed < 2**32:
        raise ValueError(f"split: seed is {seed}: expected 0 to 2^32 - 1")
    return seed


def _cut(order: NDArray[np.int64], fractions: tuple[float, float, float]) -> Split:
    if len(fractions) != 3 or not min(fractions) > 0 or not abs(sum(fractions) - 1) < 1e-9:
        raise ValueError(f"split: fractions is {fractions}: expected three positive numbers that add up to 1")
    borders = [round(fractions[0] * len(order)), round((fractions[0] + fractions[1]) * len(order))]
    parts = [np.sort(part) for part in np.split(order, borders)]
    if not all(len(part) for part in parts):
        sizes = tuple(len(part) for part in parts)
        raise ValueError(f"split: {len(order)} systems give parts of {sizes}: expected no empty part")
    return Split(*parts)
