"""The ledger loses no FLOP, counts none twice, and never passes its budget, however its processes end."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from experiments import budget
from experiments.budget import STAGES, AlreadyRunning, BudgetExceeded, Ledger

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
    """Start another process that runs `code` with an open `ledger`."""
    program = f"""
import os, signal, sys
from experiments.budget import *
with Ledger(sys.argv[1], budget=int(sys.argv[2])) as ledger:
{textwrap.indent(textwrap.dedent(code), "    ")}
"""
    command = [sys.executable, "-c", program, str(path), str(options.pop("budget", budget.BUDGET))]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, **options)


def run(path, code, **options):
    process = start(path, code, **options)
    return process.communicate()[0], process.returncode


KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def test_a_settled_entry_keeps_what_was_spent_and_releases_the_rest(path):
    with Ledger(path, budget=2000) as ledger:
        entry = ledger.reserve("run", "cell", WHOLE)
        assert ledger.totals()["reserved"] == 1250 and ledger.totals()["left"] == 750
        ledger.spend(entry, "training", 600)
        ledger.spend(entry, "validation", 200)
        assert ledger.totals()["reserved"] == 450 and ledger.totals()["left"] == 750
        ledger.settle(entry)
        assert ledger.totals() == {
            "training": 600,
            "validation": 200,
            "inference": 0,
            "wasted": 0,
            "reserved": 0,
            "spent": 800,
            "settled": 800,
            "budget": 2000,
            "left": 1200,
        }
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


@pytest.mark.parametrize("flops", [2**63, -1, 1.0, 1e17, True, "1", None])
def test_what_is_no_64_bit_count_is_refused(path, flops):
    with Ledger(path) as ledger:
        entry = ledger.reserve("run", "cell", WHOLE)
        for call in (
            lambda: ledger.spend(entry, "training", flops),
            lambda: ledger.reserve("run", "other", {"training": flops}),
            lambda: ledger.reserve("run", "other", WHOLE, done={"training": flops}),
            lambda: Ledger(path, budget=flops),
        ):
            with pytest.raises(ValueError, match="FLOPs are integers"):
                call()
        assert len(ledger.entries()) == 1 and ledger.totals()["spent"] == 0


def test_a_stage_that_is_unknown_is_refused(path):
    with Ledger(path) as ledger:
        entry = ledger.reserve("run", "cell", WHOLE)
        for call in (
            lambda: ledger.spend(entry, "testing", 1),
            lambda: ledger.reserve("run", "other", {"testing": 1}),
            lambda: ledger.reserve("run", "other", WHOLE, done={"testing": 1}),
        ):
            with pytest.raises(ValueError, match="unknown stage 'testing', expected one of training"):
                call()


def test_what_does_not_fit_beside_spent_and_reserved_is_refused_before_it_starts(path):
    with Ledger(path, budget=2000) as ledger:
        ledger.settle(ledger.reserve("run", "nothing spent", {"training": 2000}))
        entry = ledger.reserve("run", "settled", {"training": 500})
        ledger.spend(entry, "training", 500)
        ledger.settle(entry)
        ledger.reserve("run", "running", {"training": 600})
        with pytest.raises(BudgetExceeded) as caught:
            ledger.reserve("run", "large", {"training": 900, "inference": 1})
        expected = f"{path}: run/large needs 901 FLOPs, 900 are left of the budget of 2,000"
        assert str(caught.value) == expected
        assert (caught.value.needed, caught.value.left, caught.value.budget) == (901, 900, 2000)
        assert ledger.latest("run", "large") is None
        ledger.reserve("run", "exact", {"training": 900})
        assert ledger.totals()["left"] == 0


def test_a_debit_beyond_its_prediction_takes_what_is_left_and_no_more(path):
    with Ledger(path, budget=2000) as ledger:
        entry = ledger.reserve("run", "cell", {"training": 1000, "validation": 500})
        ledger.spend(entry, "training", 1400)  # 400 of the 500 that are left
        assert ledger.totals()["left"] == 100
        with pytest.raises(BudgetExceeded, match="needs 101 FLOPs, 100 are left"):
            ledger.spend(entry, "training", 101)
        ledger.spend(entry, "validation", 500)  # what was reserved is safe
        ledger.spend(entry, "validation", 100)
        assert ledger.totals()["spent"] == 2000


def test_an_entry_that_ended_takes_no_debit_and_does_not_end_again(path):
    with Ledger(path) as ledger:
        for end in (ledger.settle, ledger.interrupt, ledger.fail):
            entry = ledger.reserve("run", end.__name__, WHOLE)
            end(entry)
            for call in (lambda e=entry: ledger.spend(e, "training", 1), lambda e=entry: ledger.settle(e)):
                with pytest.raises(ValueError, match=f"entry {entry} is not held by this process"):
                    call()
        assert [row["state"] for row in ledger.entries()] == ["settled", "interrupted", "failed"]


@pytest.mark.parametrize("end", ["interrupt", "fail", "leave", "kill"])
def test_a_cell_that_stopped_and_went_on_shows_the_settled_numbers_of_one_that_did_not(path, tmp_path, end):
    with Ledger(tmp_path / "straight.sqlite") as ledger:
        entry = ledger.reserve("run", "cell", WHOLE)
        for stage in STAGES:
            ledger.spend(entry, stage, WHOLE[stage])
        ledger.settle(entry)
        straight = ledger.entries()

    debits = "ledger.spend(entry, 'training', 700); ledger.spend(entry, 'validation', 100)"
    last = {"leave": "pass", "kill": KILL}.get(end, f"ledger.{end}(entry)")
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
        (row,) = ledger.entries()
    assert row.pop("wasted") == 1200 and row.pop("total") == 2450
    (expected,) = straight
    assert expected.pop("wasted") == 0 and expected.pop("total") == 1250
    assert row == expected


def test_a_cell_that_begins_again_without_a_checkpoint_has_wasted_all(path):
    with Ledger(path, budget=1400) as ledger:
        entry = ledger.reserve("run", "cell", WHOLE)
        ledger.spend(entry, "training", 150)
        ledger.interrupt(entry)
        assert ledger.totals()["training"] == 150 and ledger.totals()["wasted"] == 0
        assert ledger.reserve("run", "cell", WHOLE) == entry
        assert ledger.totals()["training"] == 0 and ledger.totals()["wasted"] == 150
        ledger.spend(entry, "training", 1)
        ledger.interrupt(entry)
        with pytest.raises(BudgetExceeded, match="needs 1,250 FLOPs, 1,249 are left"):
            ledger.reserve("run", "cell", WHOLE)
        assert ledger.totals()["training"] == 1  # refused, and as it was
        ledger.reserve("run", "cell", WHOLE, done={"training": 1})


def test_a_checkpoint_that_stands_for_more_than_the_ledger_saw_is_believed(path):
    """A power cut may take the last debits from the ledger, and not the checkpoint."""
    with Ledger(path) as ledger:
        entry = ledger.reserve("run", "cell", WHOLE)
        ledger.spend(entry, "training", 100)
        ledger.interrupt(entry)
        ledger.reserve("run", "cell", WHOLE, done={"training": 130})
        assert ledger.totals()["training"] == 130 and ledger.totals()["wasted"] == 0
        with pytest.raises(ValueError, match="done is more than predicted, 1,001 of 1,000 FLOPs of training"):
            ledger.reserve("run", "other", WHOLE, done={"training": 1001})


def test_a_settled_cell_is_counted_once_when_its_process_died_before_saying_so(path):
    with Ledger(path, budget=1250) as ledger:
        entry = ledger.reserve("run", "cell", WHOLE)
        for stage in STAGES:
            ledger.spend(entry, stage, WHOLE[stage])
        ledger.settle(entry)
        settled = ledger.entries()
        assert ledger.reserve("run", "cell", WHOLE, done=WHOLE) == entry
        ledger.settle(entry)
        assert ledger.entries() == settled
    with Ledger(path, budget=10) as ledger:  # nothing more to do: no budget is needed for it
        ledger.settle(ledger.reserve("run", "cell", WHOLE, done=WHOLE))
        assert ledger.entries() == settled


def test_a_cell_that_was_killed_after_its_result_is_settled_at_that_result(path):
    spend = "; ".join(f"ledger.spend(entry, '{stage}', {WHOLE[stage]})" for stage in STAGES)
    run(path, f"entry = ledger.reserve('run', 'cell', {WHOLE}); {spend}; {KILL}")
    with Ledger(path) as ledger:
        for _ in range(2):
            ledger.settle_finished("run", "cell", WHOLE)
            ledger.settle_finished("run", "unknown", WHOLE)
            (row,) = ledger.entries()
            assert (row["state"], row["total"], row["wasted"]) == ("settled", 1250, 0)


def test_a_settled_cell_that_runs_anew_is_a_new_entry(path):
    with Ledger(path) as ledger:
        first = ledger.reserve("run", "cell", WHOLE)
        ledger.spend(first, "training", 10)
        ledger.settle(first)
        second = ledger.reserve("run", "cell", WHOLE)
        assert second != first and ledger.totals()["training"] == 10
        assert ledger.latest("run", "cell")["id"] == second


def test_a_cell_that_runs_is_refused_with_its_process_named_and_taken_up_once_that_is_dead(path):
    code = f"entry = ledger.reserve('run', 'cell', {WHOLE}); ledger.spend(entry, 'training', 7)"
    process = start(path, code + "; print('ready', flush=True); sys.stdin.read()", stdin=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    with Ledger(path) as ledger:
        with pytest.raises(AlreadyRunning, match=f"run/cell is already running, in process {process.pid}"):
            ledger.reserve("run", "cell", WHOLE)
        (row,) = ledger.entries()
        assert row["state"] == "running" and row["reserved"] == 1243
        with pytest.raises(ValueError, match="not held by this process"):
            ledger.spend(row["id"], "training", 1)
        with pytest.raises(ValueError, match="not held by this process"):
            ledger.settle(row["id"])

        process.kill()
        # The dead process is not waited for yet: a zombie does not run.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        (row,) = ledger.entries()
        assert row["state"] == "interrupted" and row["training"] == 7 and row["reserved"] == 0
        assert ledger.reserve("run", "cell", WHOLE, done={"training": 5}) == row["id"]
        assert ledger.totals()["wasted"] == 2
        process.communicate()


def test_a_process_number_that_another_process_has_now_is_not_the_one_that_ran(path):
    with Ledger(path) as ledger:
        ledger.reserve("run", "cell", WHOLE)
        with edited(path) as other:
            other.execute("UPDATE entries SET started = 'another boot 123'")
        assert ledger.latest("run", "cell")["state"] == "interrupted"


def test_a_process_that_was_taken_for_dead_can_debit_no_more(path):
    with Ledger(path) as first, Ledger(path) as second:
        entry = first.reserve("run", "cell", WHOLE)
        with edited(path) as other:  # as one sees it that cannot see this process
            other.execute("UPDATE entries SET state = 'interrupted', pid = 1, started = 'elsewhere'")
        second.reserve("run", "other", WHOLE)
        with pytest.raises(ValueError, match="not held"):
            first.spend(entry, "training", 1)


def test_leaving_the_block_interrupts_what_did_not_end(path):
    with pytest.raises(KeyboardInterrupt), Ledger(path) as ledger:
        ledger.settle(ledger.reserve("run", "settled", WHOLE))
        ledger.spend(ledger.reserve("run", "left", WHOLE), "training", 3)
        raise KeyboardInterrupt
    with Ledger(path) as ledger:
        assert [row["state"] for row in ledger.entries()] == ["settled", "interrupted"]
        assert ledger.totals()["spent"] == 3 and ledger.totals()["reserved"] == 0


def test_8_processes_of_50_debits_each_lose_nothing_and_open_the_file_at_once(path):
    code = """
    entry = ledger.reserve("run", f"cell {os.getpid()}", {"training": 50 * (2**50 + 1)})
    for _ in range(50):
        ledger.spend(entry, "training", 2**50 + 1)
    ledger.settle(entry)
    """
    processes = [start(path, code, budget=2**62) for _ in range(8)]
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0] * 8
    with Ledger(path, budget=2**62) as ledger:
        assert [row["total"] for row in ledger.entries()] == [50 * (2**50 + 1)] * 8
        assert ledger.totals()["settled"] == 400 * (2**50 + 1)


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


def test_a_killed_process_loses_no_debit_and_its_entry_becomes_interrupted(path):
    code = f"""
    entry = ledger.reserve("run", "cell", {WHOLE})
    for i in range(123):
        ledger.spend(entry, "training", 1)
    {KILL}
    """
    _, status = run(path, code)
    assert status == -signal.SIGKILL
    with Ledger(path) as ledger:
        (row,) = ledger.entries()
        assert (row["state"], row["training"], row["reserved"]) == ("interrupted", 123, 0)


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


def _other_program(path):
    with edited(path) as database:
        database.execute("CREATE TABLE notes (text)")


def _newer(path):
    Ledger(path).close()
    with edited(path) as database:
        database.execute("PRAGMA user_version = 2")


def _without_a_table(path):
    Ledger(path).close()
    with edited(path) as database:
        database.execute("DROP TABLE amounts")


def _with_a_float(path):
    with Ledger(path) as ledger:
        ledger.reserve("run", "cell", WHOLE)
    with edited(path) as database:
        database.execute("PRAGMA ignore_check_constraints = ON")
        database.execute("UPDATE amounts SET spent = 1.5")


def _truncated(path):
    with Ledger(path) as ledger:
        for i in range(200):
            ledger.settle(ledger.reserve("run", f"cell {i}", WHOLE))
    path.write_bytes(path.read_bytes()[:9000])


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda path: path.write_text("no database, but long enough to be looked at\n" * 20), "damaged"),
        (lambda path: path.write_bytes(b"SQLite format 3\0" + b"\xff" * 3000), "damaged"),
        (_truncated, "damaged"),
        (_without_a_table, "damaged"),
        (_with_a_float, "damaged"),
        (_other_program, "another program's"),
        (_newer, "version 2, this program knows up to 1"),
    ],
)
def test_a_file_that_is_no_ledger_is_named_in_one_line_and_left_as_it_is(path, damage, fault):
    damage(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=fault) as caught, Ledger(path) as ledger:
        ledger.totals()
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    if fault != "damaged":
        with edited(path) as database:
            assert database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] > 0
    elif before[:6] != b"SQLite":
        assert path.read_bytes() == before


def test_a_folder_that_is_missing_is_an_error_of_the_system(tmp_path):
    with pytest.raises(OSError, match="unable to open"):
        Ledger(tmp_path / "none" / "ledger.sqlite")


def test_the_table_aligns_and_its_totals_are_exact(path):
    with Ledger(path) as ledger:
        for cell, spent in (("lr1e-5_r2", 2 * 10**15), ("lr1e-4_r8", 33)):
            entry = ledger.reserve("runs/grid", cell, {"training": 5 * 10**15})
            ledger.spend(entry, "training", spent)
        ledger.interrupt(entry)
        ledger.reserve("runs/grid", "lr1e-4_r8", {"training": 5 * 10**15}, done={"training": 30})
        text, line = budget.table(ledger), budget.bar(ledger, width=20)
    head, first, second, total, blank, *exact = text.splitlines()
    assert head.split() == ["run", "cell", "state", *STAGES, "wasted", "total", "share"]
    assert first.split() == ["runs/grid", "lr1e-5_r2", "running", "2.000e15", *"000", "2.000e15", "2.0000", "%"]
    assert second.split() == [
        "runs/grid",
        "lr1e-4_r8",
        "running",
        "3.000e1",
        *"00",
        "3.000e0",
        "3.300e1",
        "0.0000",
        "%",
    ]
    assert len({len(row) for row in (head, first, second, total)}) == 1 and not blank
    assert exact[0] == "spent       2,000,000,000,000,033 FLOPs"
    assert exact[1] == "reserved    7,999,999,999,999,970 FLOPs"
    assert exact[2] == "left       89,999,999,999,999,997 FLOPs"
    assert exact[3] == "budget    100,000,000,000,000,000 FLOPs"
    assert line == "[#==.................] 2.00 % spent, 8.00 % reserved, 90.00 % left"


def test_an_empty_ledger_has_a_table_too(path):
    with Ledger(path) as ledger:
        assert "all" in budget.table(ledger)
        assert budget.bar(ledger, width=4) == "[....] 0.00 % spent, 0.00 % reserved, 100.00 % left"
        assert ledger.as_json()["entries"] == []


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
    """Random reservations, debits and ends on a small budget, against dictionaries that say what must be."""

    @initialize()
    def begin(self):
        self.ledger = Ledger(":memory:", budget=100)
        self.cells = {}  # by name; `base` is what the settled entries before the newest one spent

    def teardown(self):
        self.ledger.close()

    def committed(self, but=None):
        total = 0
        for name, cell in self.cells.items():
            if name != but:
                still = max(0, cell["predicted"] - cell["spent"]) if cell["state"] == "running" else 0
                total += cell["base"] + cell["spent"] + cell["wasted"] + still
        return total

    @rule(name=st.sampled_from("abc"), predicted=st.integers(0, 60), done=st.integers(0, 60))
    def reserve(self, name, predicted, done):
        cell = self.cells.get(name)
        arguments = ("run", name, {"training": predicted}, {"training": done})
        if done > predicted:
            with pytest.raises(ValueError, match="more than predicted"):
                self.ledger.reserve(*arguments)
            return
        if cell and cell["state"] == "running":
            with pytest.raises(AlreadyRunning):
                self.ledger.reserve(*arguments)
            return
        base = cell["base"] if cell else 0
        wasted, spent = (cell["wasted"], cell["spent"]) if cell else (0, 0)
        if cell and cell["state"] == "settled" and not done:
            base, wasted, spent = base + spent + wasted, 0, 0
        wasted += max(0, spent - done)
        needed, left = predicted - done, 100 - self.committed(but=name) - base - wasted - done
        if needed > max(0, left):
            with pytest.raises(BudgetExceeded):
                self.ledger.reserve(*arguments)
            return
        number = self.ledger.reserve(*arguments)
        cell = {"number": number, "predicted": predicted, "spent": done, "wasted": wasted, "base": base}
        self.cells[name] = cell | {"state": "running"}

    @precondition(lambda self: self.cells)
    @rule(data=st.data(), flops=st.integers(0, 40))
    def spend(self, data, flops):
        name = data.draw(st.sampled_from(sorted(self.cells)))
        cell = self.cells[name]
        beyond = flops - max(0, cell["predicted"] - cell["spent"])
        if cell["state"] != "running":
            with pytest.raises(ValueError, match="not held"):
                self.ledger.spend(cell["number"], "training", flops)
        elif beyond > max(0, 100 - self.committed()):
            with pytest.raises(BudgetExceeded):
                self.ledger.spend(cell["number"], "training", flops)
        else:
            self.ledger.spend(cell["number"], "training", flops)
            cell["spent"] += flops

    @precondition(lambda self: self.cells)
    @rule(data=st.data(), end=st.sampled_from(["settle", "interrupt", "fail"]))
    def end(self, data, end):
        name = data.draw(st.sampled_from(sorted(self.cells)))
        cell = self.cells[name]
        if cell["state"] == "running":
            getattr(self.ledger, end)(cell["number"])
            cell["state"] = {"settle": "settled", "interrupt": "interrupted", "fail": "failed"}[end]

    @invariant()
    def totals_agree(self):
        totals = self.ledger.totals()
        assert totals["spent"] + totals["reserved"] == self.committed() == 100 - totals["left"]
        for name, cell in self.cells.items():
            row = self.ledger.latest("run", name)
            assert (row["state"], row["id"]) == (cell["state"], cell["number"])
            assert (row["training"], row["wasted"]) == (cell["spent"], cell["wasted"])


AgreesWithAPlainModel.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestAgreesWithAPlainModel = AgreesWithAPlainModel.TestCase
