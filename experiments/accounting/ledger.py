"""The ledger of FLOPs: what all runs of a project folder reserved, spent and wasted, in one SQLite file.

FLOPs are integers from end to end: 10^17 is above 2^53, where floats begin to skip integers, and below 2^63,
where SQLite's integers end. Sums are taken in Python, whose integers do not end.

An entry is the work on one cell of one run. Reserving sets its prediction aside before anything runs, so runs
that race cannot pass the budget together; each step is debited as it is done; settling releases what was not
needed. A cell that stopped continues in its old entry: that keeps what the last checkpoint stands for, and the
rest of what it had spent is wasted. So the settled numbers of a run do not depend on how often it was
stopped.
"""

import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.run_folder.owner import start_marker
from experiments.run_folder.table import aligned

BUDGET = 10**17
STAGES = ("training", "validation", "inference")

_INT64 = 2**63 - 1
_APPLICATION = 0x464C4F50  # "FLOP", in the header field that SQLite keeps for this purpose
_VERSION = 1
_PATIENCE = 60  # seconds to wait for another writer
_OF_THE_MACHINE = (  # SQLite's codes for what is no fault of the file's content
    *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY),
    *(sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN),
    *(sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_NOLFS),
)
_NOBODY = 0  # for a process's number: what is set aside for other ledgers
_SCHEMA = f"""
CREATE TABLE entries (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, cell TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('running', 'interrupted', 'failed', 'settled')),
    pid INTEGER NOT NULL, started TEXT NOT NULL
);
CREATE TABLE amounts (
    entry INTEGER NOT NULL REFERENCES entries (id), stage TEXT NOT NULL CHECK (stage IN {STAGES}),
    predicted INTEGER NOT NULL CHECK (typeof(predicted) = 'integer' AND predicted >= 0),
    spent INTEGER NOT NULL CHECK (typeof(spent) = 'integer' AND spent >= 0),
    wasted INTEGER NOT NULL CHECK (typeof(wasted) = 'integer' AND wasted >= 0),
    PRIMARY KEY (entry, stage)
) WITHOUT ROWID;
"""
_SELECT = (
    "SELECT id, run, cell, state, pid, stage, predicted, spent, wasted "
    "FROM entries JOIN amounts ON entry = id ORDER BY id"
)
_HELD = "EXISTS (SELECT 1 FROM entries WHERE id = :entry AND state = 'running' AND pid = :pid AND started = :started)"


class BudgetExceeded(ValueError):
    """The work needs `needed` FLOPs, and `left` are left of the `budget`."""

    def __init__(self, ledger: Path, what: str, needed: int, left: int, budget: int):
        rest = f"{max(0, left):,} are left of the budget of {budget:,}"
        super().__init__(f"{ledger}: {what} needs {needed:,} FLOPs, {rest}")


class AlreadyRunning(ValueError):
    """The cell is being worked on by a process that lives."""


class Ledger:
    """A ledger file, made if it is missing; a context manager, for one process.

    Closing it interrupts the entries that were reserved through it and did not end.

    Raises ValueError for a file that is damaged, of a newer version or no ledger, and OSError for one that
    cannot be read and written."""

    def __init__(self, path: str | Path, budget: int = BUDGET):
        self.path, self.budget = Path(path), _flops(budget)
        self._owner: dict[str, Any] = {"pid": os.getpid(), "started": start_marker(os.getpid())}
        self._held: set[int] = set()
        if (self.path.exists() and not self.path.is_file()) or not self.path.parent.is_dir():
            raise ValueError(f"{self.path}: is no file, or in no folder: expected a file, or a place for one")
        self._place = self.path.absolute()  # with its folder: the name ":memory:" alone is none of a file
        self._file: os.stat_result | None = None  # what is open
        with self._errors():
            self._database = sqlite3.connect(self._place, timeout=_PATIENCE, isolation_level=None)
            try:
                self._prepare()
                self._file = self._place.stat()
            except BaseException:
                self._database.close()
                raise

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Interrupt what was reserved here and did not end, and close the file."""
        try:
            while self._held:
                self._mark(self._held.pop(), "interrupted")
        finally:
            self._database.close()

    def reserve(self, run: str, cell: str, predicted: Mapping[str, int], done: Mapping[str, int] | None = None) -> int:
        """Set FLOPs aside for a cell before it runs; return the number of its entry, now "running".

        `predicted` is the whole cell by stage, `done` the part that its last checkpoint stands for. If the
        newest entry of the cell is unfinished (interrupted, failed, its process dead) it is taken up: its
        `spent` becomes `done`, and what it had spent beyond that is wasted. So is a settled one if anything
        is `done`: a process may die after it settled and before it says so in its own files. Otherwise a new
        entry begins.

        Raises BudgetExceeded if what is still to do does not fit beside what others spent and reserved,
        AlreadyRunning, and ValueError for a `done` beyond `predicted`; the ledger is then as it was."""
        whole, kept = _by_stage(predicted), _by_stage(done or {})
        for stage in STAGES:
            if kept[stage] > whole[stage]:
                most = f"at most {whole[stage]:,}, as predicted"
                raise ValueError(f"{run}/{cell}: done is {kept[stage]:,} FLOPs of {stage}: expected {most}")
        with self._transaction():
            entries = self._read()
            fresh = _Entry(None, run, cell)
            old = next((entry for entry in reversed(entries) if (entry.run, entry.cell) == (run, cell)), fresh)
            if old.state == "running":
                raise AlreadyRunning(f"{self.path}: {run}/{cell} is already running, in process {old.pid}")
            if old.state == "settled" and not any(kept.values()):
                old = fresh
            wasted = {stage: old.wasted[stage] + max(0, old.spent[stage] - kept[stage]) for stage in STAGES}
            needed = sum(whole.values()) - sum(kept.values())
            left = self._left(entries, but=old) - sum(wasted.values()) - sum(kept.values())
            self._check_fits(f"{run}/{cell}", needed, left)
            new = _Entry(old.number, run, cell, "running", self._owner["pid"], whole, kept, wasted)
            entry = self._write(new, self._owner["started"])
        self._held.add(entry)
        return entry

    def spend(self, entry: int, stage: str, flops: int) -> None:
        """Debit FLOPs that were done; beyond the prediction of the stage, from what is left of the budget.

        A kill after this loses nothing; a power cut may lose the last seconds, which the next `done`
        corrects. Raises BudgetExceeded, and ValueError if this process does not hold the entry; nothing is
        debited then."""
        values = self._owner | {"entry": entry, "stage": stage, "flops": _by_stage({stage: flops})[stage]}
        debit = "UPDATE amounts SET spent = spent + :flops WHERE entry = :entry AND stage = :stage"
        with self._errors():
            # Within the reservation, spent and reserved add up to what they did: no other entry matters.
            within = f"{debit} AND predicted - spent >= :flops AND {_HELD}"
            if self._database.execute(within, values).rowcount:
                return
        with self._transaction():
            if not self._database.execute(f"SELECT {_HELD}", values).fetchone()[0]:
                raise ValueError(f"{self.path}: entry {entry} is not held: expected one of this process")
            entries = self._read()
            mine = next(e for e in entries if e.number == entry)
            beyond = flops - max(0, mine.predicted[stage] - mine.spent[stage])
            what = f"{mine.run}/{mine.cell}, beyond its prediction of {stage},"
            self._check_fits(what, beyond, self._left(entries))
            self._database.execute(debit, values)

    def settle(self, entry: int) -> None:
        """The cell is finished: keep what was spent, release the rest of the reservation."""
        self._end(entry, "settled")

    def settle_finished(self, run: str, cell: str, spent: Mapping[str, int]) -> None:
        """Settle a cell whose result says that it is finished and what it `spent`, if it is not settled yet.

        For a process that was killed after it wrote the result; a cell unknown to the ledger is left. Raises ValueError
        for one that is settled at something else."""
        row = self.latest(run, cell)
        if row and row["state"] != "settled":
            self.settle(self.reserve(run, cell, spent, done=spent))
        elif row and (held := {stage: row[stage] for stage in STAGES}) != _by_stage(spent):
            raise ValueError(f"{self.path}: {run}/{cell} is settled at {held}: expected {_by_stage(spent)}, its record")

    def fail(self, entry: int) -> None:
        """The cell failed: what was spent stays spent, the rest of the reservation is released."""
        self._end(entry, "failed")

    def set_aside(self, run: str, cell: str, predicted: Mapping[str, int]) -> None:
        """Reserve FLOPs for work that other ledgers account for, in place of what was set aside under this name.

        No process holds the entry: it stays "running" until `take_in`. Raises BudgetExceeded; the ledger is then as
        it was."""
        whole = _by_stage(predicted)
        with self._transaction():
            entries = self._read()
            old = _set_aside(entries, run, cell) or _Entry(None, run, cell)
            self._check_fits(f"{run}/{cell}", sum(whole.values()), self._left(entries, but=old))
            self._write(_Entry(old.number, run, cell, "running", _NOBODY, predicted=whole), started="")

    def take_in(self, run: str, cell: str, ledgers: Iterable["Ledger"]) -> bool:
        """Put the entries of other ledgers in place of what was set aside for them; return whether anything was.

        Nothing is refused: those FLOPs are spent."""
        taken = []
        for ledger in ledgers:
            with ledger._transaction():
                taken += ledger._read()
        with self._transaction():
            old = _set_aside(self._read(), run, cell)
            if old is None:
                return False
            self._database.execute("DELETE FROM amounts WHERE entry = ?", (old.number,))
            self._database.execute("DELETE FROM entries WHERE id = ?", (old.number,))
            for entry in taken:
                self._write(replace(entry, number=None), started="")
        return True

    def entries(self) -> list[dict[str, Any]]:
        """A row for each entry, oldest first: `id`, `run`, `cell`, `state`, and in FLOPs the stages, `wasted`, `total`
        (stages and wasted) and `reserved` (what a running entry may still spend)."""
        with self._transaction():
            entries = self._read()
        return [
            {"id": entry.number, "run": entry.run, "cell": entry.cell, "state": entry.state}
            | entry.spent
            | {"wasted": sum(entry.wasted.values()), "total": entry.total, "reserved": entry.reserved}
            for entry in entries
        ]

    def latest(self, run: str, cell: str) -> dict[str, Any] | None:
        """Return the newest row of `entries` for a cell, or None."""
        rows = [row for row in self.entries() if (row["run"], row["cell"]) == (run, cell)]
        return rows[-1] if rows else None

    def totals(self) -> dict[str, int]:
        """FLOPs over all entries: the stages, `wasted`, `spent` (stages and wasted), `settled` (the stages of settled
        entries alone), `reserved`, `budget`, and `left` = budget - spent - reserved."""
        return self.as_json()["totals"]

    def as_json(self) -> dict[str, Any]:
        """Return `ledger` (its path), `totals` and `entries`, all of one moment."""
        entries = self.entries()
        totals = {key: sum(row[key] for row in entries) for key in (*STAGES, "wasted", "reserved")}
        spent = sum(row["total"] for row in entries)
        settled = sum(row[stage] for row in entries if row["state"] == "settled" for stage in STAGES)
        left = self.budget - spent - totals["reserved"]
        totals |= {"spent": spent, "settled": settled, "budget": self.budget, "left": left}
        return {"ledger": str(self.path), "totals": totals, "entries": entries}

    def _left(self, entries: list["_Entry"], but: "_Entry | None" = None) -> int:
        """FLOPs of the budget that no entry has, but perhaps one."""
        return self.budget - sum(e.committed for e in entries if but is None or e.number != but.number)

    def _check_fits(self, what: str, needed: int, left: int) -> None:
        if needed > max(0, left):  # what needs nothing more may always end
            raise BudgetExceeded(self.path, what, needed, left, self.budget)

    def _write(self, entry: "_Entry", started: str) -> int:
        """Write an entry in the place of the one with its number, or under the next number; within a transaction."""
        number = self._database.execute(
            "REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?)",
            (entry.number, entry.run, entry.cell, entry.state, entry.pid, started),
        ).lastrowid
        assert number is not None
        self._database.executemany(
            "REPLACE INTO amounts VALUES (?, ?, ?, ?, ?)",
            [(number, stage, entry.predicted[stage], entry.spent[stage], entry.wasted[stage]) for stage in STAGES],
        )
        return number

    def _end(self, entry: int, state: str) -> None:
        if not self._mark(entry, state):
            raise ValueError(f"{self.path}: entry {entry} is not held: expected one of this process")
        self._held.discard(entry)

    def _mark(self, entry: int, state: str) -> bool:
        """Change the state of an entry that this process holds; return whether it does."""
        values = self._owner | {"state": state, "entry": entry}
        with self._errors():
            update = f"UPDATE entries SET state = :state WHERE id = :entry AND {_HELD}"
            return self._database.execute(update, values).rowcount == 1

    def _read(self) -> list["_Entry"]:
        """Return all entries, once those of dead processes are marked interrupted; within a transaction."""
        running = "SELECT id, pid, started FROM entries WHERE state = 'running'"
        for number, pid, started in self._database.execute(running).fetchall():
            if pid != _NOBODY and not (started and start_marker(pid) == started):
                self._database.execute("UPDATE entries SET state = 'interrupted' WHERE id = ?", (number,))
        entries: dict[int, _Entry] = {}
        for number, run, cell, state, pid, stage, *amounts in self._database.execute(_SELECT):
            if not (isinstance(run, str) and isinstance(cell, str)):
                raise sqlite3.DatabaseError(f"the name of entry {number} is no text")
            entry = entries.setdefault(number, _Entry(number, run, cell, state, pid))
            entry.predicted[stage], entry.spent[stage], entry.wasted[stage] = amounts
        return list(entries.values())

    def _prepare(self) -> None:
        """Make an empty file a ledger; refuse what is not one."""
        database = self._database
        self._write_ahead()
        database.execute("PRAGMA synchronous = NORMAL")  # no fsync for each debit
        with self._transaction():
            (application,) = database.execute("PRAGMA application_id").fetchone()
            (version,) = database.execute("PRAGMA user_version").fetchone()
            (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if not (application or version or tables):
                for statement in _SCHEMA.split(";"):
                    database.execute(statement)
                database.execute(f"PRAGMA application_id = {_APPLICATION}")
                database.execute(f"PRAGMA user_version = {_VERSION}")
            elif application != _APPLICATION:
                raise ValueError(f"{self.path}: is another program's SQLite file: expected a ledger of FLOPs")
            elif version > _VERSION:
                raise ValueError(f"{self.path}: version is {version}: expected at most {_VERSION}, of this program")
            (fault,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if fault != "ok":
                raise sqlite3.DatabaseError(" ".join(fault.split()))
            database.execute(_SELECT)

    def _write_ahead(self) -> None:
        """Set WAL mode; SQLite itself does not wait for a writer that began in another mode."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                self._database.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors():
            # IMMEDIATE: who begins by reading and writes later is refused if another wrote in between.
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            if self._file and not os.path.samestat(self._file, self._place.stat()):
                raise FileNotFoundError
        except FileNotFoundError:  # SQLite would debit what is open, which nobody finds again
            moved = f"{self.path}: was moved or replaced while in use: expected it to stay in its place"
            raise OSError(moved) from None
        try:
            yield
        except sqlite3.ProgrammingError:  # a ledger that is closed: no fault of the file
            raise
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _OF_THE_MACHINE:
                rule = "a file that can be read and written, on a disk with free space"
                raise OSError(f"{self.path}: the ledger cannot be used ({error}): expected {rule}") from error
            said = "".join(c for c in str(error)[:150] if c.isprintable())  # it may quote what is in the file
            raise ValueError(f"{self.path}: is damaged ({said}): expected a ledger of FLOPs") from error


@dataclass
class _Entry:
    number: int | None
    run: str
    cell: str
    state: str = "new"
    pid: int = 0
    predicted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    spent: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    wasted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))

    @property
    def total(self) -> int:
        return sum(self.spent.values()) + sum(self.wasted.values())

    @property
    def reserved(self) -> int:
        if self.state != "running":
            return 0
        return sum(max(0, self.predicted[stage] - self.spent[stage]) for stage in STAGES)

    @property
    def committed(self) -> int:
        """FLOPs that no other entry can have."""
        return self.total + self.reserved


def _set_aside(entries: Iterable[_Entry], run: str, cell: str) -> _Entry | None:
    wanted = run, cell, "running", _NOBODY
    return next((e for e in entries if (e.run, e.cell, e.state, e.pid) == wanted), None)


def table(ledger: Ledger) -> str:
    """Return the ledger as aligned text: a line for each entry, their sum, and the exact totals."""
    json = ledger.as_json()
    totals: dict[str, int] = json["totals"]
    lines = [("run", "cell", "state", *STAGES, "wasted", "total", "share")]
    last = {"run": "all", "cell": "", "state": ""} | totals | {"total": totals["spent"]}
    for row in [*json["entries"], last]:
        amounts = (_short(row[key]) for key in lines[0][3:-1])
        share = f"{100 * row['total'] / ledger.budget:.4f} %"
        lines.append((row["run"], row["cell"], row["state"], *amounts, share))
    width = len(f"{ledger.budget:,}")
    exact = [f"{key:8}  {totals[key]:>{width},} FLOPs" for key in ("spent", "reserved", "left", "budget")]
    return "\n".join([*aligned(lines, left=3), "", *exact])


def bar(ledger: Ledger, width: int = 40) -> str:
    """Return one line with `#` for the part of the budget that is spent, `=` for reserved, `.` for left."""
    totals = ledger.totals()
    spent = min(width, -(-width * totals["spent"] // ledger.budget))  # rounded up, so that a little can be seen
    reserved = min(width - spent, -(-width * totals["reserved"] // ledger.budget))
    shares = (f"{100 * totals[key] / ledger.budget:.2f} % {key}" for key in ("spent", "reserved", "left"))
    return f"[{'#' * spent}{'=' * reserved}{'.' * (width - spent - reserved)}] {', '.join(shares)}"


def _short(flops: int) -> str:
    return f"{flops:.3e}".replace("e+0", "e").replace("e+", "e") if flops else "0"


def _by_stage(amounts: Mapping[str, int]) -> dict[str, int]:
    for stage in amounts:
        if stage not in STAGES:
            raise ValueError(f"stage is {stage!r}: expected one of {', '.join(STAGES)}")
    return {stage: _flops(amounts.get(stage, 0)) for stage in STAGES}


def _flops(value: int) -> int:
    if type(value) is not int or not 0 <= value <= _INT64:
        raise ValueError(f"FLOPs are {value!r}: expected a whole number from 0 to 2^63 - 1")
    return value
