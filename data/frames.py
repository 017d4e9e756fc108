"""Series of people's own: a table in long or wide form as named series of unequal length, at regular times.

Long: a row for each series and time, with a column for each variable. Wide: a row for each time, with a column for
each series. Letters: S series, P points of the longest, V variables.
"""

import calendar
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import tables
from data.tables import Table

IDS, TIMES = ("unique_id", "item_id", "id"), ("ds", "timestamp", "date", "time")
"""Names by which the columns of series and time are known where none are given."""
MISSING = {"", "na", "n/a", "nan", "null", "none", "nat", "<na>", "-"}
LARGEST = 1e100  # the square of an error stays finite
FILLS = ("", "previous", "linear")
ALONE = "0"  # the name of the one series of a table without names
Time = int | datetime
_MICROSECOND = timedelta(microseconds=1)
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")


@dataclass(frozen=True)
class Clock:
    """Regular times: number i is `first` + i `step`, whole numbers, or counted from `base` in `unit`."""

    first: int = 0
    step: int = 1
    unit: str = ""  # "microsecond" or "month" where there is a `base`
    base: datetime | None = None
    month_end: bool = False

    def at(self, i: int) -> Time:
        number = self.first + i * self.step
        if self.base is None:
            return number
        try:
            if self.unit == "microsecond":
                return self.base + number * _MICROSECOND
            year, month = divmod(number, 12)
            day = calendar.monthrange(year, month + 1)[1] if self.month_end else self.base.day
            return self.base.replace(year=year, month=month + 1, day=day)
        except (OverflowError, ValueError):
            raise ValueError(f"time {i} after {self.base}: is beyond the year 9999: expected earlier times") from None

    @property
    def pace(self) -> str:
        """The step in words."""
        if self.unit == "microsecond":
            return str(self.step * _MICROSECOND).removesuffix(", 0:00:00")
        return f"{self.step} month{'s' * (self.step > 1)}" if self.unit else str(self.step)

    def text(self, i: int) -> str | int:
        """`at(i)` as ISO 8601; a date alone where no time of day can come."""
        time = self.at(i)
        if isinstance(time, int):
            return time
        whole_days = self.unit == "month" or not self.step % (86400 * 10**6)
        bare = whole_days and time.tzinfo is None and time.time() == datetime.min.time()
        return time.date().isoformat() if bare else time.isoformat()


@dataclass(frozen=True)
class SeriesSet:
    """Named series: values[i] (P_i, V) float64, finite, whose point j is at clocks[i].at(j).

    context: how many of the first points of each are there to be seen only (see `pieces`). notes: what was filled.
    """

    ids: tuple[str, ...]
    names: tuple[str, ...]
    values: tuple[NDArray[np.float64], ...]
    clocks: tuple[Clock, ...]
    context: tuple[int, ...]
    name: str
    digest: str
    notes: tuple[str, ...] = ()
    keys: tuple[str, str] = IDS[0], TIMES[0]  # the columns of series and time

    def pieces(self, fractions: tuple[float, float, float]) -> "SeriesSet":
        """Every series in three: its first part to train, the next and the last, each with all that is before it.

        The 3 S pieces are in the order of the parts. The borders are those of `splits.in_order`, of points.
        Raises ValueError for a series of which a part would be empty.
        """
        found: list[tuple[int, NDArray[np.float64], int]] = []
        for part in range(3):
            for i, series in enumerate(self.values):
                first, last = (round(sum(fractions[:n]) * len(series)) for n in (part, part + 1))
                if first == last:
                    points = f"series {self.ids[i]!r:.60} has {len(series)} points"
                    raise ValueError(f"split by time: {points}: expected enough for three parts")
                found.append((i, series[:last], first))
        of, values, context = zip(*found, strict=True)
        ids, clocks = ([held[i] for i in of] for held in (self.ids, self.clocks))
        return replace(self, ids=tuple(ids), clocks=tuple(clocks), values=values, context=context)

    def aligned(self, least: int = 0) -> NDArray[np.float64]:
        """All series with their last points side by side, (S, P, V) with P at least `least`: NaN before each begins."""
        points = max(least, *map(len, self.values))
        found = np.full((len(self.values), points, len(self.names)), np.nan)
        for row, series in zip(found, self.values, strict=True):
            row[points - len(series) :] = series
        return found


def of_array(values: NDArray[np.float64]) -> SeriesSet:
    """Series (S, P, V) of an array, by number."""
    count, names = len(values), ("y",) if values.shape[2] == 1 else tuple(f"x{v}" for v in range(values.shape[2]))
    digest = hashlib.sha256(repr(values.shape).encode() + values.tobytes()).hexdigest()
    ids = tuple(map(str, range(count)))
    return SeriesSet(ids, names, tuple(values), (Clock(),) * count, (0,) * count, "array", digest)


def reads(path: Path) -> bool:
    """Whether `read` is the reader of a file of this name."""
    return path.suffix.lower() in tables.SUFFIXES


def read(path: Path, **options: Any) -> SeriesSet:
    """The series in a CSV or Parquet file; see `series_of` and `tables.read`."""
    return series_of(tables.read(path), **options)


def series_of(
    table: Table,
    id_column: str = "",
    time_column: str = "",
    target: Sequence[str] = (),
    wide: bool = False,
    fill: str = "",
) -> SeriesSet:
    """The series in a table.

    Args:
        id_column, time_column: by default the first of `IDS` and `TIMES` that the table has; without the one all rows
            are one series, without the other rows come in their order, at 0, 1, ...
        target: the columns of the variables (wide: of the series); by default all others.
        fill: "previous" or "linear" fills what is missing after a series' first value, with a count; "" refuses it.

    Raises:
        ValueError: one line with the row at fault, if it is one row's, and what was expected.
    """
    if fill not in FILLS:
        raise ValueError(f"fill is {fill!r:.60}: expected previous or linear")
    names = list(table.columns)
    by = "" if wide else _column(table, id_column, IDS, "id-column")
    at = _column(table, time_column, TIMES, "time-column")
    for one in target:
        _column(table, one, (), "target")
    variables = list(target) or [name for name in names if name not in (by, at)]
    if not variables or {by, at} & {*variables}:
        raise ValueError(f"{table.name}: has the columns {_listed(names)}: expected one of values besides series, time")
    values = np.array([_numbers(table, name, at) for name in variables]).T  # (rows, V)
    times = _times(table, at) if at else None
    if wide:
        groups = {name: _trimmed(table, name, values[:, i]) for i, name in enumerate(variables)}
    else:
        groups = {}
        for row, cell in enumerate(table.columns[by] if by else [ALONE] * len(values)):
            if not cell if isinstance(cell, str) else _is_missing(cell):  # "NA" may be a name
                raise table.fault(row, f"column {by!r:.60} is empty: expected the name of a series")
            groups.setdefault(str(cell), []).append(row)
    filled, clocks, found = 0, [], []
    for i, (name, rows) in enumerate(groups.items()):
        own = values[rows, i : i + 1] if wide else values[rows]
        clock, slots, rows = Clock(), list(range(len(rows))), list(rows)
        if times is not None:
            order = sorted(range(len(rows)), key=lambda j: (times[rows[j]], j))
            rows, own = [rows[j] for j in order], own[order]
            clock, slots = _clock(table, name, [times[row] for row in rows], rows, fill)
        series = np.full((slots[-1] + 1, own.shape[1]), np.nan)
        series[slots] = own
        filled += _fill(table, series, slots, rows, variables[i : i + 1] if wide else variables, fill)
        clocks.append(clock)
        found.append(series)
    notes = (f"{filled} missing values filled ({fill})",) if filled else ()
    known = (("y",) if wide else tuple(variables), tuple(found), tuple(clocks))
    keys = by or IDS[0], at or TIMES[0]
    return SeriesSet(tuple(groups), *known, (0,) * len(found), table.name, table.digest, notes, keys)


def _column(table: Table, asked: str, usual: Sequence[str], flag: str) -> str:
    """The column that was asked for, or the first of the usual ones that is there, or ""."""
    if asked and asked not in table.columns:
        raise ValueError(f"{table.name}: has no column {asked!r:.60} (--{flag}): expected {_listed(table.columns)}")
    return asked or next((name for name in usual if name in table.columns), "")


def _listed(names: Sequence[str] | dict[str, Any]) -> str:
    some = [repr(name)[:40] for name in list(names)[:8]]
    return "one of " * (len(names) > 1) + ", ".join(some) + ", ..." * (len(names) > 8)


def _is_missing(cell: Any) -> bool:
    if isinstance(cell, str):
        return cell.lower() in MISSING
    return cell is None or str(cell) in ("NaT", "<NA>") or isinstance(cell, float) and math.isnan(cell)


def _numbers(table: Table, name: str, at: str) -> NDArray[np.float64]:
    """A column as numbers, NaN where one is missing."""
    found = np.full(len(table.columns[name]), np.nan)
    for row, cell in enumerate(table.columns[name]):
        if _is_missing(cell):
            continue
        number = isinstance(cell, (int, float, Decimal)) and not isinstance(cell, bool)
        if not number and not (isinstance(cell, str) and _NUMBER.fullmatch(cell)):
            if isinstance(cell, str) and re.fullmatch(r"[+-]?(inf|infinity)", cell.lower()):
                raise table.fault(row, f"column {name!r:.60} is infinite: expected a finite number")
            hint = "" if at or not _as_time(cell) else " (the time is named by --time-column)"
            shown = f"column {name!r:.60} is {str(cell)!r:.60}"
            raise table.fault(row, f"{shown}: expected a number such as -1.5, or nothing{hint}")
        try:
            found[row] = float(cell)
        except OverflowError:
            found[row] = np.inf
        if not abs(found[row]) < LARGEST:
            size = "infinite" if math.isinf(found[row]) else f"{found[row]:g}"
            raise table.fault(row, f"column {name!r:.60} is {size}: expected a finite number, below 1e100 in size")
    return found


def _as_time(cell: Any) -> datetime | None:
    if isinstance(cell, datetime):
        return getattr(cell, "to_pydatetime", lambda: cell)()  # pandas has its own
    if isinstance(cell, date):
        return datetime.combine(cell, datetime.min.time())
    if not isinstance(cell, str) or not re.match(r"[0-9]{4}-[0-9]{2}", cell):
        return None
    try:
        return datetime.fromisoformat(f"{cell}-01" if len(cell) == 7 else cell)
    except ValueError:
        return None


def _times(table: Table, name: str) -> list[Any]:
    """A column as whole numbers, or as times of one zone."""
    found: list[Any] = []
    for row, cell in enumerate(table.columns[name]):
        whole = isinstance(cell, int) and not isinstance(cell, bool) or isinstance(cell, float) and cell.is_integer()
        if _is_missing(cell):
            raise table.fault(row, f"column {name!r:.60} is empty: expected a time")
        if whole or isinstance(cell, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", cell):
            time: Time | None = int(cell)
        else:
            time = _as_time(cell)
        rule = "a whole number, or ISO 8601 such as 2024-01-31 or 2024-01-31T12:00:00"
        if time is None:
            raise table.fault(row, f"column {name!r:.60} is {str(cell)!r:.60}: expected {rule}")
        if found and type(time) is not type(found[0]) and isinstance(time, int) != isinstance(found[0], int):
            raise table.fault(row, f"time {str(cell)!r:.60} is unlike those before: expected one kind, {rule}")
        if isinstance(time, datetime) and found and time.utcoffset() != found[0].utcoffset():
            before = found[0].utcoffset()
            zone = f"no zone, as row {table.first}" if before is None else f"the offset {before}, as row {table.first}"
            raise table.fault(row, f"time {str(cell)!r:.60} has another zone: expected {zone}")
        found.append(time)
    return found


def _counts(times: Sequence[Any]) -> Iterator[tuple[Clock, list[int]]]:
    """Each way to count times, with its clock but for the step."""
    if isinstance(times[0], int):
        yield Clock(times[0]), list(times)
        return
    yield Clock(unit="microsecond", base=times[0]), [(time - times[0]) // _MICROSECOND for time in times]
    ends = all((time + timedelta(days=1)).day == 1 for time in times)
    if len({(0 if ends else time.day, time.time()) for time in times}) == 1:
        months = [12 * time.year + time.month - 1 for time in times]
        yield Clock(months[0], unit="month", base=times[0], month_end=ends), months


def _clock(table: Table, name: str, times: Sequence[Any], rows: list[int], fill: str) -> tuple[Clock, list[int]]:
    """The clock of sorted times, and where on it each stands. Its step is the most frequent one."""
    gapped: list[tuple[Clock, list[int]]] = []
    for clock, numbers in _counts(times):
        gaps = [later - earlier for earlier, later in pairwise(numbers)]
        if 0 in gaps:
            again = rows[gaps.index(0) + 1]
            raise table.fault(again, f"time {times[gaps.index(0)]} of series {name!r:.60} again: expected each once")
        counts = Counter(gaps)
        step = min(counts, key=lambda gap: (-counts[gap], gap), default=86400 * 10**6 if clock.unit else 1)
        clock = replace(clock, step=step)
        if all(gap == step for gap in gaps):
            return clock, list(range(len(times)))
        gapped.append((clock, numbers))
    for clock, numbers in gapped:
        slots = [(number - numbers[0]) // clock.step for number in numbers]
        if all((number - numbers[0]) % clock.step == 0 for number in numbers) and slots[-1] < 2 * len(slots):
            if fill:
                return clock, slots
            at = next(j for j, slot in enumerate(slots) if slot != j)
            said = f"time {times[at]} of series {name!r:.60} comes after a gap of {slots[at] - at} points"
            raise table.fault(rows[at], f"{said}: expected a step of {clock.pace}, or --fill previous or linear")
    clock, numbers = gapped[0]
    at = next(j for j in range(1, len(numbers)) if numbers[j] - numbers[j - 1] != clock.step)
    gap = replace(clock, step=numbers[at] - numbers[at - 1]).pace
    said = f"time {times[at]} of series {name!r:.60} is {gap} after the one before"
    raise table.fault(rows[at], f"{said}: expected regular steps ({clock.pace} is the most frequent)")


def _trimmed(table: Table, name: str, values: NDArray[np.float64]) -> list[int]:
    """The rows from the first to the last that has a value in this column."""
    known = np.flatnonzero(~np.isnan(values))
    if not known.size:
        raise ValueError(f"{table.name}: column {name!r:.60} is empty: expected some values")
    return list(range(known[0], known[-1] + 1))


def _fill(
    table: Table,
    series: NDArray[np.float64],
    slots: Sequence[int],
    rows: Sequence[int],
    names: Sequence[str],
    fill: str,
) -> int:
    """Fill what is missing in a series (P, V), in place; returns how many values that was."""
    missing = np.isnan(series)
    if len(bad := np.argwhere(missing[:1] if fill else missing)):
        point, variable = bad[0].tolist()
        row = rows[next(j for j, slot in enumerate(slots) if slot >= point)]
        rule = "a first value, to fill others from" if fill else "a number, or --fill previous or linear"
        raise table.fault(row, f"column {names[variable]!r:.60} is missing: expected {rule}")
    for variable, gone in enumerate(missing.T):
        known = np.flatnonzero(~gone)
        if fill == "linear":
            series[gone, variable] = np.interp(np.flatnonzero(gone), known, series[known, variable])
        elif fill:
            latest = np.maximum.accumulate(np.where(gone, 0, np.arange(len(gone))))
            series[:, variable] = series[latest, variable]
    return int(missing.sum())
