"""The ledger loses no FLOP, counts none twice, and never passes its budget, however its processes end."""

import json
import os
import random
import re
import select
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import tracemalloc
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from experiments.accounting import ledger as budget
from experiments.accounting.ledger import STAGES, AlreadyRunning, BudgetExceeded, Ledger
from experiments.run import main

ROOT = Path(__file__).parents[1]
WHOLE = {"training": 1000, "validation": 200, "inference": 50}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


@contextmanager
def edited(path):
    """The file as another program sees and changes it."""
    with closing(sqlite3.connect(path)) as database, database:
        yield database


def start(path, code, **options):
    program = f"""
import os, signal, sys
from experiments.accounting.ledger import *
with Ledger(sys.argv[1], budget=int(sys.argv[2])) as ledger:
{textwrap.indent(textwrap.dedent(code), "    ")}
"""
    command = [sys.executable, "-c", program, str(path), str(options.pop("budget", budget.BUDGET))]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, **options)


def run(path, code):
    start(path, code).communicate()


KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def test_a_settled_entry_keeps_what_was_spent_and_releases_the_rest(path):
    with Ledger(path, budget=2000) as ledger:
        entry = ledger.reserve("run", "cell", WHOLE)
        assert ledger.totals()["reserved"] == 1250 and ledger.totals()["left"] == 750
        ledger.spend(entry, "training", 600)
        ledger.spend(entry, "validation", 200)
        assert ledger.totals()["reserved"] == 450 and ledger.totals()["left"] == 750
        ledger.settle(entry)
        stages = {"training": 600, "validation": 200, "inference": 0}
        sums = {"wasted": 0, "reserved": 0, "spent": 800, "settled": 800, "budget": 2000, "left": 1200}
        assert ledger.totals() == stages | sums
    with Ledger(path, budget=2000) as ledger:  # and the file remembers
        (row,) = ledger.entries()
        assert (row["run"], row["cell"], row["state"], row["total"]) == ("run", "cell", "settled", 800)
        assert ledger.latest("run", "cell") == row and ledger.latest("run", "other") is None


def test_integers_above_2_to_the_53_are_exact(path):
    odd = 2**53 + 1
    with Ledger(path) as ledger:
        entry = ledger.reserve("run", "cell", {"training": 3 * odd})
        for _ in range(3):
            ledger.spend(entry, "training", odd)
        assert ledger.totals()["training"] == 3 * odd != int(float(3 * odd))
        assert ledger.totals()["left"] == 10**17 - 3 * odd
    with Ledger(path, budget=2**63 - 1) as ledger:
        entry = ledger.reserve("run", "largest", {"training": 2**63 - 1 - 3 * odd})
        ledger.spend(entry, "training", 2**63 - 1 - 3 * odd)
        assert ledger.totals()["spent"] == 2**63 - 1
        with pytest.raises(BudgetExceeded):
            ledger.spend(entry, "training", 2**63 - 1)
        assert json.loads(json.dumps(ledger.as_json()))["totals"]["spent"] == 2**63 - 1


@pytest.mark.parametrize(
    ("stage", "flops", "said"),
    [
        *(("training", flops, "FLOPs are .*: expected a whole") for flops in (2**63, -1, 1.0, 1e17, True, "1", None)),
        ("testing", 1, "stage is 'testing': expected one of training, validation, inference"),
    ],
)
def test_what_is_no_64_bit_count_of_a_known_stage_is_refused(path, stage, flops, said):
    with Ledger(path) as ledger:
        entry = ledger.reserve("run", "cell", WHOLE)
        for call in (
            lambda: ledger.spend(entry, stage, flops),
            lambda: ledger.reserve("run", "other", {stage: flops}),
            lambda: ledger.reserve("run", "other", WHOLE, done={stage: flops}),
        ):
            with pytest.raises(ValueError, match=said):
                call()
        with pytest.raises(ValueError, match="FLOPs are .*: expected a whole number from 0 to 2"):
            Ledger(path, budget=-1)
        assert len(ledger.entries()) == 1 and ledger.totals()["spent"] == 0


def test_what_does_not_fit_beside_spent_and_reserved_is_refused_before_it_starts(path):
    with Ledger(path, budget=2000) as ledger:
        ledger.settle(ledger.reserve("run", "nothing spent", {"training": 2000}))
        entry = ledger.reserve("run", "settled", {"training": 500})
        ledger.spend(entry, "training", 500)
        ledger.settle(entry)
        ledger.reserve("run", "running", {"training": 600})
        with pytest.raises(BudgetExceeded) as caught:
            ledger.reserve("run", "large", {"training": 900, "inference": 1})
        assert str(caught.value) == f"{path}: run/large needs 901 FLOPs, 900 are left of the budget of 2,000"
        with pytest.raises(ValueError, match="done is 1,001 FLOPs of training: expected at most 1,000, as predicted"):
            ledger.reserve("run", "large", WHOLE, done={"training": 1001})
        assert ledger.latest("run", "large") is None
        ledger.reserve("run", "exact", {"training": 900})
        assert ledger.totals()["left"] == 0


@pytest.mark.parametrize("end", ["fail", "leave", "kill"])
def test_a_cell_that_stopped_and_went_on_shows_the_settled_numbers_of_one_that_did_not(path, end):
    debits = "ledger.spend(entry, 'training', 700); ledger.spend(entry, 'validation', 100)"
    last = {"leave": "pass", "kill": KILL, "fail": "ledger.fail(entry)"}[end]
    for _ in range(2):
        run(path, f"entry = ledger.reserve('run', 'cell', {WHOLE}, {{'training': 300}}); {debits}; {last}")
    with Ledger(path) as ledger:
        done = {"training": 600, "validation": 100}
        entry = ledger.reserve("run", "cell", WHOLE, done=done)
        (row,) = ledger.entries()
        # 300 + 700 training and 100 validation were spent before; the first time nothing but the 300 was kept
        assert (row["wasted"], row["training"], row["validation"]) == (700 + 100 + 400, 600, 100)
        assert row["reserved"] == 400 + 100 + 50
        for stage in STAGES:
            ledger.spend(entry, stage, WHOLE[stage] - done.get(stage, 0))
        ledger.settle(entry)
        sums = {"wasted": 1200, "total": 1250 + 1200, "reserved": 0}
        assert ledger.entries() == [{"id": 1, "run": "run", "cell": "cell", "state": "settled"} | WHOLE | sums]


def test_a_settled_cell_is_counted_once_when_its_process_died_before_saying_so(path):
    spend = "; ".join(f"ledger.spend(entry, '{stage}', {WHOLE[stage]})" for stage in STAGES)
    run(path, f"entry = ledger.reserve('run', 'cell', {WHOLE}); {spend}; {KILL}")
    with Ledger(path, budget=10) as ledger:  # nothing more to do: no budget is needed for it
        for _ in range(2):
            ledger.settle_finished("run", "cell", WHOLE)
            ledger.settle_finished("run", "unknown", WHOLE)
            (row,) = ledger.entries()
            assert (row["state"], row["total"], row["wasted"]) == ("settled", 1250, 0)
            ledger.settle(ledger.reserve("run", "cell", WHOLE, done=WHOLE))
            assert ledger.entries() == [row]
        with pytest.raises(ValueError, match=r"run/cell is settled at .* 1000, .*: expected .* 8, "):
            ledger.settle_finished("run", "cell", {"training": 8})


def test_a_cell_that_runs_is_refused_with_its_process_named_and_taken_up_once_that_is_dead(path):
    code = f"entry = ledger.reserve('run', 'cell', {WHOLE}); ledger.spend(entry, 'training', 7)"
    process = start(path, code + "; print('ready', flush=True); sys.stdin.read()", stdin=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    with Ledger(path) as ledger:
        with pytest.raises(AlreadyRunning, match=f"run/cell is already running, in process {process.pid}"):
            ledger.reserve("run", "cell", WHOLE)
        (row,) = ledger.entries()
        assert row["state"] == "running" and row["reserved"] == 1243
        for call in (lambda: ledger.spend(row["id"], "training", 1), lambda: ledger.settle(row["id"])):
            with pytest.raises(ValueError, match=f"entry {row['id']} is not held: expected one of this process"):
                call()

        process.kill()
        # The dead process is not waited for yet: a zombie does not run.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        (row,) = ledger.entries()
        assert row["state"] == "interrupted" and row["training"] == 7 and row["reserved"] == 0
        assert ledger.reserve("run", "cell", WHOLE, done={"training": 5}) == row["id"]
        assert ledger.totals()["wasted"] == 2
        process.communicate()


def test_a_process_that_was_taken_for_dead_can_debit_no_more(path):
    """As one sees it that cannot see this process, or that has its number in another boot."""
    with Ledger(path) as first, Ledger(path) as second:
        entry = first.reserve("run", "cell", WHOLE)
        with edited(path) as other:
            other.execute("UPDATE entries SET started = 'another boot 123'")
        assert second.latest("run", "cell")["state"] == "interrupted"
        with pytest.raises(ValueError, match="not held"):
            first.spend(entry, "training", 1)


DEBIT = 2**45 + 1
WRITER = """
entry = ledger.reserve("run", cell, {"training": debits * DEBIT}, {"training": done * DEBIT})
for _ in range(debits - done):
    ledger.spend(entry, "training", DEBIT)
    os.write(1, b".")
sys.stdin.readline()  # until all have come so far
try:
    while True:
        ledger.spend(entry, "training", DEBIT)
        os.write(1, b".")
except BudgetExceeded:
    ledger.settle(entry)
"""


class Writer:
    """A process that debits a cell of its own and acknowledges each debit after it, and those after its kills."""

    def __init__(self, path, number, debits, budget):
        self.path, self.cell, self.debits, self.budget = path, f"cell {number}", debits, budget
        # The waste that the last kill found, and what it is once the writer has gone on from what it acknowledged.
        self.acknowledged = self.seen = self.wasted = 0
        self.start()

    def start(self):
        names = f"cell, debits, done, DEBIT = {self.cell!r}, {self.debits}, {self.acknowledged}, {DEBIT}\n"
        self.process = start(self.path, names + WRITER, budget=self.budget, stdin=subprocess.PIPE)

    def hear(self):
        heard = len(os.read(self.process.stdout.fileno(), 1 << 16))
        self.acknowledged += heard
        return heard

    def kill(self):
        """Kill it; what it was at is in the ledger wholly or not at all."""
        self.process.kill()
        while self.hear():
            pass
        self.end(-signal.SIGKILL)
        with Ledger(self.path, self.budget) as ledger:
            row = ledger.latest("run", self.cell) or {"training": 0, "wasted": 0}
        assert row["training"] - self.acknowledged * DEBIT in (0, DEBIT), (row, self.acknowledged)
        assert row["wasted"] in (self.seen, self.wasted)  # killed before it had the entry, or with it
        self.seen, self.wasted = row["wasted"], row["wasted"] + row["training"] - self.acknowledged * DEBIT

    def end(self, code):
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(timeout=60) == code


@contextmanager
def polled(path, budget):
    """Look at the totals all the time inside the block; yields a list of what was spent or reserved at each look."""
    seen, done = [], threading.Event()

    def look():
        with Ledger(path, budget) as ledger:
            over = False
            while not over:
                over = done.wait(0.005)  # it looks once more after that: the last debit may be new
                totals = ledger.totals()
                seen.append(totals["spent"] + totals["reserved"])

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(("debits", "kills"), [(50, 10), pytest.param(500, 100, marks=pytest.mark.endurance)])
def test_16_writers_at_once_some_killed_lose_no_debit_count_none_twice_and_never_pass_the_budget(path, debits, kills):
    """Each writes so many debits, is killed at random moments and started again; then all race for what is left."""
    count, draw = 16, random.Random(7)
    whole = (count * debits + kills + 20) * DEBIT
    moments = sorted(draw.sample(range(count * debits), kills))
    with polled(path, whole) as seen, ExitStack() as ends:
        writers = [Writer(path, number, debits, whole) for number in range(count)]
        for writer in writers:
            ends.callback(lambda writer=writer: writer.process.kill())
        while sum(writer.acknowledged for writer in writers) < count * debits:
            busy = {w.process.stdout.fileno(): w for w in writers if w.acknowledged < debits}
            for ready in select.select(list(busy), [], [], 60)[0]:
                assert busy[ready].hear(), "a writer ended"
            while moments and sum(writer.acknowledged for writer in writers) >= moments[0]:
                del moments[0]
                victim = draw.choice([w for w in writers if w.acknowledged < debits] or writers)
                victim.kill()
                victim.start()
        for writer in writers:
            writer.process.stdin.write("go\n")
            writer.process.stdin.flush()
        for writer in writers:
            while writer.hear():
                pass
            writer.end(0)
    with Ledger(path, whole) as ledger:
        rows, totals = ledger.entries(), ledger.totals()
    expected = {w.cell: ("settled", w.acknowledged * DEBIT, w.wasted) for w in writers}
    assert {row["cell"]: (row["state"], row["training"], row["wasted"]) for row in rows} == expected
    assert len(rows) == count and not moments
    assert totals["spent"] == whole == max(seen) and len(seen) > 10
    with edited(path) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_racing_reservers_never_pass_the_budget(path):
    code = """
    won = 0
    for i in range(40):
        try:
            entry = ledger.reserve("run", f"{os.getpid()} {i}", {"training": 7})
        except BudgetExceeded:
            continue
        totals = ledger.totals()
        assert totals["left"] >= 0 and totals["spent"] + totals["reserved"] <= 100, totals
        ledger.spend(entry, "training", 5)
        if i % 2:
            ledger.settle(entry)
        won += 1
    print(won)
    """
    processes = [start(path, code, budget=100) for _ in range(4)]
    won = [int(process.communicate()[0]) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    with Ledger(path, budget=100) as ledger:
        assert ledger.totals()["spent"] == 5 * sum(won) == 5 * len(ledger.entries())
        assert 60 <= ledger.totals()["spent"] <= 100  # what running entries held may be left over


def test_opening_waits_for_a_writer_that_holds_the_file_in_another_mode(path):
    Ledger(path).close()
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("BEGIN IMMEDIATE")
        other.execute("DELETE FROM entries")
        timer = threading.Timer(0.3, other.execute, ["COMMIT"])
        timer.start()
        with Ledger(path) as ledger, edited(path) as database:
            assert ledger.entries() == []
            assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        timer.join()


def changed(script):
    def damage(path):
        with edited(path) as database:
            database.executescript(script)

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "no such ledger"),
        (lambda path: (path.unlink(), path.mkdir()), "no such ledger"),
        (lambda path: path.write_bytes(path.read_bytes()[:9000]), "damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:50]), "damaged"),
        (lambda path: path.write_bytes(bytes(100) + path.read_bytes()[100:]), "damaged"),
        (lambda path: path.write_bytes(b"SQLite format 3\0" + b"\xff" * 3000), "damaged"),
        (lambda path: path.write_text("no database, but long enough to be looked at\n" * 20), "damaged"),
        (changed("UPDATE entries SET cell = CAST(x'ff' AS TEXT)"), "damaged"),
        (changed("UPDATE entries SET run = x'6100'"), "damaged"),
        (changed("DROP TABLE amounts"), "damaged"),
        (changed("PRAGMA ignore_check_constraints = ON; UPDATE amounts SET spent = 1.5"), "damaged"),
        (lambda path: (path.unlink(), changed("CREATE TABLE notes (text)")(path)), "another program's"),
        (changed("PRAGMA user_version = 2"), "version is 2: expected at most 1"),
    ],
)
def test_the_budget_verb_says_in_one_line_what_is_wrong_with_its_file_and_leaves_it(path, capsys, damage, said):
    with Ledger(path) as ledger:
        for i in range(100):
            ledger.settle(ledger.reserve("run", f"cell {i}", WHOLE))
    damage(path)
    before = path.is_file() and path.read_bytes()
    code, line = budget_verb(path, capsys)
    assert code == 2 and said in line
    if said in ("another program's", "version is 2: expected at most 1"):
        with edited(path) as database:
            assert database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] > 0
    elif not before or before[:6] != b"SQLite":
        assert (path.is_file() and path.read_bytes()) == before


def test_a_folder_or_a_device_is_no_ledger_and_none_is_made_in_a_folder_that_is_missing(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "none" / "ledger.sqlite", tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: is no file, or in no folder: expected a file"):
            Ledger(path)


def test_a_ledger_named_as_sqlites_memory_is_a_file():
    """Bug: with --ledger :memory: nothing was recorded, and no budget held."""
    with Ledger(":memory:") as ledger:
        ledger.settle(ledger.reserve("run", "cell", WHOLE))
    with Ledger(":memory:") as ledger:
        assert len(ledger.entries()) == 1


@pytest.mark.parametrize("change", ["removed", "moved", "replaced"])
def test_a_ledger_that_is_not_at_its_place_any_more_takes_no_debit(path, change):
    """Bug: SQLite went on with the file that it had open, and a whole grid was in no ledger."""
    with pytest.raises(OSError, match=f"^{path}: was moved or replaced while in use: expected"), Ledger(path) as ledger:
        entry = ledger.reserve("run", "cell", WHOLE)
        path.rename(path.with_name("moved")) if change == "moved" else path.unlink()
        if change == "replaced":
            path.touch()
        ledger.spend(entry, "training", 1)


def budget_verb(path, capsys):
    """Run `budget --json`; returns its exit code, and what it printed or its one line of error."""
    capsys.readouterr()
    code = main(["budget", "--json", "--ledger", str(path)])
    out, err = capsys.readouterr()
    if code:
        assert out == "" and err.startswith(f"{path}: ") and err.count("\n") == 1 and "expected" in err, (code, err)
        assert err[:-1].isprintable() and len(err) < 300 + len(str(path)), err
    return code, err if code else json.loads(out)["totals"]


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.endurance)])
def test_so_many_ledgers_with_damaged_pages_are_refused_in_one_line_or_still_add_up(path, capsys, count):
    """Cut anywhere, with pages of zeros or noise, or with bytes changed: a number that was changed can look right."""
    with Ledger(path) as ledger:
        for i in range(300):
            entry = ledger.reserve("run", f"cell {i}", WHOLE)
            ledger.spend(entry, "training", 1000 - i)
            (ledger.settle, ledger.fail)[i % 2](entry)
        totals = ledger.totals()
    whole, draw, refused = path.read_bytes(), random.Random(1), 0
    for number in range(count):
        data, at = bytearray(whole), 4096 * draw.randrange(len(whole) // 4096)
        kind = ("cut", "zeros", "noise", "bytes")[number % 4]
        if kind == "cut":
            del data[draw.randrange(1, len(data)) :]
        elif kind == "bytes":
            for _ in range(draw.randint(1, 20)):
                data[draw.randrange(len(data))] = draw.randrange(256)
        else:
            data[at : at + 4096] = bytes(4096) if kind == "zeros" else draw.randbytes(4096)
        path.write_bytes(data)
        code, printed = budget_verb(path, capsys)
        assert code == 2 or kind == "bytes" or printed == totals, kind
        refused += code == 2
        for beside in path.parent.glob("ledger.sqlite-*"):
            beside.unlink()
    assert refused > 0.7 * count


def test_a_ledger_that_is_damaged_in_the_middle_of_a_run_ends_it_in_one_line(path):
    """What SQLite finds in a page that it had not read yet, in each call of a run."""
    with Ledger(path) as ledger:
        entry = ledger.reserve("run", "cell", WHOLE)
        sound = ledger._database
        calls = (
            lambda: ledger.reserve("run", "other", WHOLE),
            lambda: ledger.spend(entry, "training", 1),
            lambda: ledger.spend(entry, "training", 10**6),
            lambda: ledger.settle(entry),
            lambda: ledger.settle_finished("run", "cell", WHOLE),
            lambda: ledger.set_aside("run", "shards", WHOLE),
            lambda: ledger.take_in("run", "shards", []),
            lambda: ledger.totals(),
        )
        for call in calls:
            ledger._database = Malformed(sound)
            with pytest.raises(ValueError, match=r"^.+ledger.sqlite: is damaged \(.*\): expected a ledger"):
                call()
            ledger._database = sound
            (row,) = ledger.entries()
            assert (row["state"], row["training"], row["reserved"]) == ("running", 0, 1250)


class Malformed:
    def __init__(self, database):
        self.database = database

    def __getattr__(self, name):
        return getattr(self.database, name)

    def execute(self, statement, *values):
        if statement not in ("BEGIN IMMEDIATE", "ROLLBACK"):
            raise sqlite3.DatabaseError("database disk image is malformed")
        return self.database.execute(statement, *values)


def test_the_table_aligns_and_its_totals_are_exact(path):
    with Ledger(path) as ledger:
        assert budget.table(ledger).splitlines()[1].split() == ["all", *"00000", "0.0000", "%"]
        assert budget.bar(ledger, width=4) == "[....] 0.00 % spent, 0.00 % reserved, 100.00 % left"
        for cell, spent in (("lr1e-5_r2", 2 * 10**15), ("lr1e-4_r8", 33)):
            entry = ledger.reserve("runs/grid", cell, {"training": 5 * 10**15})
            ledger.spend(entry, "training", spent)
        ledger.fail(entry)
        ledger.reserve("runs/grid", "lr1e-4_r8", {"training": 5 * 10**15}, done={"training": 30})
        text, line = budget.table(ledger), budget.bar(ledger, width=20)
    head, first, second, total, blank, *exact = text.splitlines()
    assert head.split() == ["run", "cell", "state", *STAGES, "wasted", "total", "share"]
    assert first.split() == ["runs/grid", "lr1e-5_r2", "running", "2.000e15", *"000", "2.000e15", "2.0000", "%"]
    amounts = ("3.000e1", *"00", "3.000e0", "3.300e1", "0.0000", "%")
    assert second.split() == ["runs/grid", "lr1e-4_r8", "running", *amounts]
    assert len({len(row) for row in (head, first, second, total)}) == 1 and not blank
    assert exact == [
        "spent       2,000,000,000,000,033 FLOPs",
        "reserved    7,999,999,999,999,970 FLOPs",
        "left       89,999,999,999,999,997 FLOPs",
        "budget    100,000,000,000,000,000 FLOPs",
    ]
    assert line == "[#==.................] 2.00 % spent, 8.00 % reserved, 90.00 % left"


def test_a_debit_keeps_nothing_in_memory(path):
    with Ledger(path) as ledger:
        entry = ledger.reserve("run", "cell", {"training": 10**6})
        ledger.spend(entry, "training", 1)
        tracemalloc.start()
        for _ in range(300):
            ledger.spend(entry, "training", 1)
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert grown < 20_000


class AgreesWithAPlainModel(RuleBasedStateMachine):
    """Two processes on a small budget, and a ledger of a shard, against lists and dictionaries that say what must be.

    Each process has its own `Ledger` of the one file, ends well or dies, and comes back.
    """

    BUDGET = 200
    steps = 0

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.alive, self.patch = {}, pytest.MonkeyPatch()
        self.patch.setattr(budget, "start_marker", lambda pid: self.alive.get(pid, ""))
        self.path, self.born, self.taken = Path(self.folder.name, "ledger.sqlite"), 0, 0
        self.entries, self.ledgers = [], [self.opened(self.path), self.opened(self.path)]
        self.begin_shard()

    def opened(self, path):
        self.born += 1
        ledger = Ledger(path, self.BUDGET)
        ledger._owner = {"pid": 10**6 + self.born, "started": f"boot {self.born}"}
        self.alive[10**6 + self.born] = f"boot {self.born}"
        return ledger

    def begin_shard(self):
        self.taken += 1
        self.shard = self.opened(Path(self.folder.name, f"shard-{self.taken}.sqlite"))
        self.shard_entries = []

    def teardown(self):
        for ledger in (*self.ledgers, self.shard):
            ledger.close()
        self.patch.undo()
        self.folder.cleanup()

    def end_process(self, owner):
        for entry in self.entries:
            if entry["owner"] == owner and entry["state"] == "running":
                entry["state"] = "interrupted"

    def committed(self, entries):
        running = [e for e in entries if e["state"] == "running"]
        reserved = sum(max(0, e["predicted"][stage] - e["spent"][stage]) for e in running for stage in STAGES)
        return reserved + sum(sum(e["spent"].values()) + sum(e["wasted"].values()) for e in entries)

    def newest(self, entries, cell):
        return next((e for e in reversed(entries) if e["cell"] == cell), None)

    def add(self, entries, **fields):
        entries.append({"id": max((e["id"] for e in entries), default=0) + 1} | fields)

    def reserved(self, ledger, entries, cell, predicted, done):
        """Reserve in the ledger, and in the model as the docstring of `reserve` has it."""
        predicted, done = (dict(zip(STAGES, amounts, strict=True)) for amounts in (predicted, done))
        old, kept = self.newest(entries, cell), sum(done.values())
        expected = None
        if any(done[stage] > predicted[stage] for stage in STAGES):
            expected = ValueError
        elif old and old["state"] == "running":
            expected = AlreadyRunning
        else:
            if old and old["state"] == "settled" and not kept:
                old = None
            wasted = {s: old["wasted"][s] + max(0, old["spent"][s] - done[s]) if old else 0 for s in STAGES}
            left = self.BUDGET - self.committed([e for e in entries if e is not old]) - sum(wasted.values()) - kept
            if sum(predicted.values()) - kept > max(0, left):
                expected = BudgetExceeded
        if expected:
            with pytest.raises(expected) as caught:
                ledger.reserve("run", cell, predicted, done)
            assert caught.type is expected
            return
        number = ledger.reserve("run", cell, predicted, done)
        fields = {"state": "running", "owner": ledger._owner["pid"], "wasted": wasted}
        fields |= {"cell": cell, "predicted": predicted, "spent": done}
        if old:
            old |= fields
        else:
            self.add(entries, **fields)
        assert number == self.newest(entries, cell)["id"]

    amounts = st.tuples(st.integers(0, 50), st.integers(0, 20), st.integers(0, 5))

    @rule(which=st.integers(0, 1), cell=st.sampled_from("abc"), predicted=amounts, done=st.just((0, 0, 0)) | amounts)
    def reserve(self, which, cell, predicted, done):
        self.reserved(self.ledgers[which], self.entries, cell, predicted, done)

    @precondition(lambda self: self.entries)
    @rule(data=st.data(), which=st.integers(0, 1), stage=st.sampled_from(STAGES), flops=st.integers(0, 40))
    def spend(self, data, which, stage, flops):
        entry, ledger = data.draw(st.sampled_from(self.entries)), self.ledgers[which]
        beyond = flops - max(0, entry["predicted"][stage] - entry["spent"][stage])
        if entry["state"] != "running" or entry["owner"] != ledger._owner["pid"]:
            with pytest.raises(ValueError, match="not held"):
                ledger.spend(entry["id"], stage, flops)
        elif beyond > max(0, self.BUDGET - self.committed(self.entries)):
            with pytest.raises(BudgetExceeded):
                ledger.spend(entry["id"], stage, flops)
        else:
            ledger.spend(entry["id"], stage, flops)
            entry["spent"][stage] += flops

    @precondition(lambda self: self.entries)
    @rule(data=st.data(), which=st.integers(0, 1), end=st.sampled_from(["settle", "fail"]))
    def end(self, data, which, end):
        entry, ledger = data.draw(st.sampled_from(self.entries)), self.ledgers[which]
        if entry["state"] == "running" and entry["owner"] == ledger._owner["pid"]:
            getattr(ledger, end)(entry["id"])
            entry["state"] = {"settle": "settled", "fail": "failed"}[end]
        else:
            with pytest.raises(ValueError, match="not held"):
                getattr(ledger, end)(entry["id"])

    @rule(which=st.integers(0, 1), cell=st.sampled_from("abc"))
    def settle_finished(self, which, cell):
        """A result that says what the ledger has: what was spent."""
        entry = self.newest(self.entries, cell)
        spent = dict(entry["spent"]) if entry else {"training": 3}
        if entry and entry["state"] == "running":
            with pytest.raises(AlreadyRunning):
                self.ledgers[which].settle_finished("run", cell, spent)
            return
        self.ledgers[which].settle_finished("run", cell, spent)
        if entry and entry["state"] != "settled":
            entry |= {"state": "settled", "predicted": spent, "owner": self.ledgers[which]._owner["pid"]}

    @rule(which=st.integers(0, 1))
    def close_and_reopen(self, which):
        self.end_process(self.ledgers[which]._owner["pid"])
        self.ledgers[which].close()
        self.ledgers[which] = self.opened(self.path)

    @rule(which=st.integers(0, 1))
    def die_and_come_back(self, which):
        """Without a word to the ledger, which the next reader has to notice."""
        pid = self.ledgers[which]._owner["pid"]
        self.end_process(pid)
        del self.alive[pid]
        self.ledgers[which]._database.close()
        self.ledgers[which] = self.opened(self.path)

    @rule(which=st.integers(0, 1), predicted=amounts)
    def set_aside(self, which, predicted):
        predicted = dict(zip(STAGES, predicted, strict=True))
        old = next((e for e in self.entries if e["owner"] == 0), None)
        left = self.BUDGET - self.committed([e for e in self.entries if e is not old])
        if sum(predicted.values()) > max(0, left):
            with pytest.raises(BudgetExceeded):
                self.ledgers[which].set_aside("run", "shards", predicted)
            return
        self.ledgers[which].set_aside("run", "shards", predicted)
        fields = {"predicted": predicted, "spent": dict.fromkeys(STAGES, 0), "wasted": dict.fromkeys(STAGES, 0)}
        if old:
            old |= fields
        else:
            self.add(self.entries, cell="shards", state="running", owner=0, **fields)

    @rule(cell=st.sampled_from("cd"), predicted=amounts, done=st.just((0, 0, 0)) | amounts)
    def reserve_in_the_shard(self, cell, predicted, done):
        self.reserved(self.shard, self.shard_entries, cell, predicted, done)

    @precondition(lambda self: self.shard_entries)
    @rule(data=st.data(), settles=st.booleans())
    def end_in_the_shard(self, data, settles):
        entry = data.draw(st.sampled_from(self.shard_entries))
        if entry["state"] == "running":
            (self.shard.settle if settles else self.shard.fail)(entry["id"])
            entry["state"] = "settled" if settles else "failed"

    @rule(which=st.integers(0, 1), dies=st.booleans())
    def take_in(self, which, dies):
        """What still runs in the shard has no owner here, whether its process lives or dies."""
        if dies:
            del self.alive[self.shard._owner["pid"]]
            for entry in self.shard_entries:
                entry["state"] = "interrupted" if entry["state"] == "running" else entry["state"]
        old = next((e for e in self.entries if e["owner"] == 0), None)
        assert self.ledgers[which].take_in("run", "shards", [self.shard]) == (old is not None)
        if old:
            self.entries.remove(old)
            for theirs in self.shard_entries:
                state = "interrupted" if theirs["state"] == "running" else theirs["state"]
                taken = {key: dict(theirs[key]) for key in ("predicted", "spent", "wasted")}
                self.add(self.entries, cell=theirs["cell"], state=state, owner=theirs["owner"], **taken)
        self.shard.close()
        self.begin_shard()

    @invariant()
    def both_processes_see_what_the_model_says(self):
        type(self).steps += 1
        rows = [
            {"id": e["id"], "run": "run", "cell": e["cell"], "state": e["state"]}
            | e["spent"]
            | {"wasted": sum(e["wasted"].values()), "total": self.committed([e | {"state": "ended"}])}
            | {"reserved": self.committed([e]) - self.committed([e | {"state": "ended"}])}
            for e in self.entries
        ]
        left = self.BUDGET - self.committed(self.entries)
        for ledger in self.ledgers:
            found = ledger.as_json()
            assert found["entries"] == rows and found["totals"]["left"] == left


@pytest.mark.parametrize("steps", [1000, pytest.param(10_000, marks=pytest.mark.endurance)])
def test_so_many_steps_of_two_processes_and_a_shard_agree_with_a_plain_model(steps, monkeypatch):
    monkeypatch.setattr(AgreesWithAPlainModel, "steps", 0)
    long = settings(max_examples=steps // 38, stateful_step_count=50, deadline=None, derandomize=True, database=None)
    run_state_machine_as_test(AgreesWithAPlainModel, settings=settings(long, suppress_health_check=list(HealthCheck)))
    assert AgreesWithAPlainModel.steps >= steps
