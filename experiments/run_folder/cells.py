"""The cells of a grid, from its rows in results.csv: each over its seeds, and at the rungs of a search. Without torch.

A row is a run; a cell's first seed bears the cell's name, a later one NAME-seedN.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Row = Mapping[str, Any]


def by_cell(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each cell, the first seed's first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(cell_of(row.get("name") or row["cell"]), []).append(row)
    return found


def cell_of(run: str) -> str:
    """The cell that a run of this name is of."""
    return re.sub(r"-seed\d+$", "", run)


def losses(rows: Iterable[Row]) -> list[float]:
    """The validation losses of some runs, nats per real token."""
    return [float(row["validation_loss"]) for row in rows]


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean over seeds, the lowest and the highest."""
    return math.fsum(values) / len(values), min(values), max(values)


def lowest(rows: Iterable[Row]) -> Row:
    """The first seed's row of the cell with the lowest mean validation loss; of equal ones the first cell's."""
    return min(by_cell(rows).values(), key=lambda some: spread(losses(some))[0])[0]


def noise(cells: Iterable[Sequence[float] | NDArray[np.float64]]) -> float | None:
    """The difference that the means of two cells need, to be more than chance of the seeds in 19 of 20 cases.

    Fisher's least significant difference where each seed is a block: t s sqrt(2 / seeds), s the standard deviation of
    what a cell's loss with a seed has beyond the means of its cell and of that seed. None of one cell or one seed.
    """
    every = list(cells)
    seeds = min(map(len, every), default=0)
    if min(len(every), seeds) < 2 or any(len(cell) > seeds for cell in every):
        return None
    free = (len(every) - 1) * (seeds - 1)
    values = np.array(every)  # (cells, seeds)
    beyond = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    return float(stdtrit(free, 0.975) * math.sqrt(2 / seeds * np.square(beyond).sum() / free))


def at_rungs(row: Row, rungs: Iterable[int]) -> list[tuple[int, int, float]]:
    """Step, training FLOPs and validation loss of a run at the rungs that it was judged at; its row may be text."""
    each = int(row["training_flops"]) // int(row["steps"] or 1)
    found = ((rung, row[f"loss_at_{rung}"]) for rung in rungs)
    return [(rung, rung * each, float(loss)) for rung, loss in found if loss not in (None, "")]
