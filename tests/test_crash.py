"""Nothing is lost: a grid that is killed, started twice, or meets a full disk or a loss that is not finite."""

import errno
import json
import os
import platform
import random
import resource
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from faults import PATIENCE, Action, Call, Calls, Ended, Running, die_after, die_before, ends, signalled, warm
from safetensors.torch import load_file
from waves import CLOCK, entries, inputs

from experiments.accounting.ledger import STAGES, Ledger
from experiments.settings.record import POCKET
from qwen_min import Qwen

SETTINGS = """
model = "model"
context = 32
batch_size = 2
val_series = 2
steps = 4
val_every = 2
checkpoint_every = 3
dropout = 0.1
points = 20
horizon = 1
shown = [15]
forecast_cells = true
"""
GRID = ["grid", "--config", "small.toml", "--data", "waves.h5", "--lr", "1e-3", "1e-2", "--ranks", "2", "--out", "g"]
TRAIN = ["train", "--config", "small.toml", "--data", "waves.h5", "--steps", "8", "--lr", "1e-2", "--rank", "2"]
TRAIN += ["--out", "g"]
CELL = "cells/lr0.01-r2"


def stand(folder: Path) -> Path:
    """Make a folder to stand in, with a tiny model and twenty damped waves of 30 points, of one variable."""
    inputs(30, folder, variables=1)
    (folder / "small.toml").write_text(SETTINGS)
    return folder


class Whole(NamedTuple):
    """What a run that was never stopped leaves, and the calls that it made."""

    files: dict[str, bytes]
    ledger: list[dict]
    calls: list[Call]
    seconds: float


def never_stopped(argv: list[str], folder: Path) -> Whole:
    warm(argv, stand(folder))
    began = time.monotonic()
    ended = ends(argv, folder, Calls)
    assert ended.code == 0, ended.err
    return Whole(contents(folder / "g"), entries(folder / "ledger.sqlite"), ended.calls, time.monotonic() - began)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Whole:
    return never_stopped(GRID, tmp_path_factory.mktemp("whole"))


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a run, leftovers too, less the moment at which it began and the time it took."""
    found = [p for p in sorted(out.rglob("*")) if p.is_file() and p.name not in (".lock", CLOCK)]
    held = {path.relative_to(out).as_posix(): path.read_bytes() for path in found}
    held["manifest.json"] = json.dumps(json.loads(held["manifest.json"]) | {"begun": None}).encode()
    return held


def assert_as_never_stopped(folder: Path, whole: Whole) -> int:
    """Compare all that a run leaves, byte for byte, and its settled FLOPs; returns what is wasted beside them."""
    found = contents(folder / "g")
    assert found.keys() == whole.files.keys()
    assert [name for name in found if found[name] != whole.files[name]] == []
    with Ledger(folder / "ledger.sqlite") as ledger:
        rows, totals = ledger.entries(), ledger.totals()
    both = rows, whole.ledger
    kept = [[(row["cell"], row["state"], *(row[stage] for stage in STAGES)) for row in some] for some in both]
    assert kept[0] == kept[1]
    assert totals["settled"] == sum(row["total"] for row in whole.ledger) and totals["reserved"] == 0
    assert totals["spent"] == totals["settled"] + totals["wasted"]
    return totals["wasted"]


def finishes(argv: list[str], folder: Path) -> None:
    ended = ends(argv, folder)
    assert ended.code == 0, ended.err


# Kills


def worst_moments(whole: Whole) -> list[tuple[int, Action]]:
    """In the middle of a record, a checkpoint's state and a line of metrics; and between the renames of a folder."""

    def nth(kind: str, name: str, n: int) -> int:
        return [i for i, call in enumerate(whole.calls, 1) if call.kind == kind and name in call.name][n]

    records = ("result.json", 1), ("state.json", 2), ("metrics.jsonl", -2)
    return [
        *((nth("write", *record), die_before) for record in records),
        (nth("rename", ".checkpoint.old", -1), die_after),
    ]


@pytest.mark.parametrize(
    ("by_call", "by_time", "seed"), [(5, 1, 0), pytest.param(81, 15, 1, marks=pytest.mark.endurance)]
)
def test_a_grid_killed_at_many_moments_ends_in_the_bytes_of_one_never_stopped(tmp_path, whole, by_call, by_time, seed):
    draw, count, moments = random.Random(seed), len(whole.calls), worst_moments(whole)
    kills = wasted = 0
    for point in range(by_call):  # one in each of as many equal parts of the run; before the call, or right after it
        moments.append((1 + int((point + draw.random()) * count / by_call), draw.choice([die_before, die_after])))
    for point, (chosen, act) in enumerate(moments):
        folder = stand(tmp_path / f"call{point}")
        killed = ends(GRID, folder, Calls, None, chosen, act)
        assert killed.code == -signal.SIGKILL, (killed.err, chosen)
        kills += 1
        if point % 3 == 0:  # and once more, on the way
            killed = ends(GRID, folder, Calls, None, draw.randint(1, count), die_before)
            assert killed.code in (0, -signal.SIGKILL), killed.err
            kills += killed.code != 0
        finishes(GRID, folder)
        wasted += bool(assert_as_never_stopped(folder, whole))
    for point in range(by_time):
        folder = stand(tmp_path / f"time{point}")
        running = Running(GRID, folder)
        time.sleep(draw.uniform(0, whole.seconds))
        running.kill()
        kills += running.end().code == -signal.SIGKILL
        finishes(GRID, folder)
        wasted += bool(assert_as_never_stopped(folder, whole))
    assert wasted >= len(moments) // 4  # kills between two checkpoints: what ran twice is listed apart
    print(f"{len(moments) + by_time} grids killed {kills} times, {wasted} with wasted FLOPs: all as never stopped")


# Races


def meet(folder: Path, late: float) -> None:
    """Wait until both processes are here; the later one then a moment more."""
    (folder / f"{os.getpid()}.here").touch()
    until = time.monotonic() + PATIENCE
    while len(list(folder.glob("*.here"))) < 2 and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(late)


RACES = {
    "two grids": (GRID, GRID),
    "a grid and a training run": (GRID, [*TRAIN, "--steps", "4"]),
    "a shard twice": ([*GRID, "--shard", "1/2"], [*GRID, "--shard", "1/2"]),
}


def test_of_two_processes_on_one_folder_in_8_races_one_works_and_the_other_names_it(tmp_path, whole):
    draw, refusals = random.Random(0), 0
    for number in range(8):
        kind = list(RACES)[number % 3]
        folder = stand(tmp_path / str(number))
        late = [0.0, draw.choice([0.0, draw.uniform(0, 0.1), draw.uniform(0, whole.seconds)])]
        argvs = list(RACES[kind])
        if draw.random() < 0.5:
            argvs.reverse()
        started = [Running(argv, folder, meet, folder, wait) for argv, wait in zip(argvs, late, strict=True)]
        ended = [one.end() for one in started]
        refused = [i for i in (0, 1) if ended[i].code]
        assert len(refused) <= 1 and all(ended[i].code == 2 for i in refused), ended
        for i in refused:
            refusals += 1
            error = ended[i].err.splitlines()[-1]
            first = f"process {started[1 - i].pid} on {platform.node()} is at work in it: expected a folder of its own"
            other = "expected the settings the run began with"  # the first has ended
            assert first in error or (kind == "a grid and a training run" and other in error), error
            assert "Traceback" not in ended[i].err
        assert_nothing_ran_twice(folder, "g/shards/1-of-2" if kind == "a shard twice" else "")
        if kind == "two grids":
            assert assert_as_never_stopped(folder, whole) == 0
    assert refusals >= 4
    print(f"8 races, {refusals} of the later ones refused by the name of the first, nothing ran twice")


def assert_nothing_ran_twice(folder: Path, ledger: str) -> None:
    with Ledger(folder / ledger / "ledger.sqlite") as held:
        rows, totals = held.entries(), held.totals()
    assert len({row["cell"] for row in rows}) == len(rows) >= 2
    assert {row["state"] for row in rows} == {"settled"} and totals["wasted"] == totals["reserved"] == 0
    for cell in (folder / "g" / "cells").iterdir():
        assert [line["step"] for line in lines(cell)] == [1, 2, 3, 4]


def lines(cell: Path) -> list[dict]:
    found = map(json.loads, (cell / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if "loss" in line]


# The machine fails

FAILURES = {  # as the system numbers and names them, and as SQLite does
    "full": (errno.ENOSPC, sqlite3.SQLITE_FULL, "database or disk is full"),
    "read-only": (errno.EROFS, sqlite3.SQLITE_READONLY, "attempt to write a readonly database"),
    "broken": (errno.EIO, sqlite3.SQLITE_IOERR, "disk I/O error"),
    "forbidden": (errno.EACCES, sqlite3.SQLITE_CANTOPEN, "unable to open database file"),
}
CAN_FAIL = {"mkdir", "open", "write", "fsync", "rename", "replace", "sqlite"}
WRITES = {"BEGIN", "COMMIT", "INSERT", "REPLACE", "UPDATE"}


class Fails:
    """Stands in place of a call: half of a write is done, and the error raised."""

    def __init__(self, failure: str):
        self.failure = failure

    def __call__(self, call, whole, half):
        half()
        number, code, text = FAILURES[self.failure]
        if call.kind == "sqlite":
            error = sqlite3.OperationalError(text)
            error.sqlite_errorcode = code
            raise error
        raise OSError(number, os.strerror(number), *[call.name] * (call.kind not in ("write", "fsync")))


def the_line(ended: Ended, reason: str) -> str:
    """The one line that says what ended a run, after the lines of its progress."""
    *progress, last = ended.err.splitlines()
    assert ended.code == 4 and "Traceback" not in ended.err, ended.err
    assert all(": step " in line or line.startswith("[") for line in progress), ended.err
    assert reason in last and "expected" in last, last
    return last


def load_checkpoints(folder: Path) -> int:
    """Read every checkpoint, at its place or aside of it, as a resumed run would; returns how many there are."""
    found = {path.parent.parent: path for path in sorted(folder.glob("g/cells/*/.checkpoint.old/state.safetensors"))}
    found |= {path.parent.parent: path for path in folder.glob("g/cells/*/checkpoint/state.safetensors")}
    for path in found.values():
        tensors, state = load_file(path), json.loads((path.parent / "state.json").read_text())
        assert all(value.float().isfinite().all() for value in tensors.values()) and 0 < state["step"] <= 4
    return len(found)


def points_of_failure(whole: Whole, count: int, seed: int) -> Iterator[tuple[int, Call, str]]:
    """Moments at which a machine may fail, of each kind of call in turn, spread over the run: number, call, failure."""
    draw = random.Random(seed)
    calls = [call for call in whole.calls if call.kind in CAN_FAIL]
    by_kind = {
        kind: [i for i, call in enumerate(calls) if call.kind == kind and (kind != "sqlite" or call.name in WRITES)]
        for kind in sorted(CAN_FAIL)
    }
    assert all(by_kind.values())
    for point in range(count):
        of_kind = list(by_kind.values())[point % len(by_kind)]
        turn, turns = point // len(by_kind), -(-count // len(by_kind))
        at = of_kind[int((turn + draw.random()) * len(of_kind) / turns)]
        yield at + 1, calls[at], list(FAILURES)[point % len(FAILURES)]


@pytest.mark.parametrize(("points", "seed"), [(14, 0), pytest.param(100, 1, marks=pytest.mark.endurance)])
def test_a_machine_that_fails_at_so_many_points_ends_the_grid_with_exit_4_and_one_line(tmp_path, whole, points, seed):
    checkpoints, kinds = 0, set()
    for point, (chosen, call, failure) in enumerate(points_of_failure(whole, points, seed)):
        folder = stand(tmp_path / str(point))
        ended = ends(GRID, folder, Calls, CAN_FAIL, chosen, Fails(failure))
        number, _, text = FAILURES[failure]
        line = the_line(ended, text if call.kind == "sqlite" else os.strerror(number))
        assert line.startswith("ledger.sqlite: " if call.kind == "sqlite" else "g/"), (call, line)
        checkpoints += load_checkpoints(folder)
        finishes(GRID, folder)
        assert_as_never_stopped(folder, whole)
        kinds.add((call.kind, failure))
    assert checkpoints > points // 4
    print(f"{points} failures of {len(kinds)} kinds: exit 4, one line; {checkpoints} checkpoints loaded; all went on")


def limit(size: int) -> None:
    """Let no file grow beyond so many bytes: a disk that is full in truth, for what is written in Rust and C too."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    ("size", "named"), [(100, "g/.owner: "), (20_000, "ledger.sqlite: "), (300_000, "g/cells/lr0.01-r32/checkpoint: ")]
)
def test_a_file_that_may_not_grow_ends_a_run_with_exit_4_and_one_line(tmp_path, size, named):
    folder, argv = stand(tmp_path), [*TRAIN, "--rank", "32", "--model", str(POCKET)]
    line = the_line(ends(argv, folder, limit, size), "" if "ledger" in named else "File too large")
    assert line.startswith(named), line
    finishes(argv, folder)
    with Ledger(folder / "ledger.sqlite") as ledger:
        assert {row["state"] for row in ledger.entries()} == {"settled"}
    assert not [p for p in (folder / "g").rglob(".*") if p.name != ".lock"]  # no half file is left


# Numbers that are not finite

TRUE_LOSS, TRUE_TOKEN_LOSSES = Qwen.loss, Qwen.token_losses


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Whole:
    return never_stopped(TRAIN, tmp_path_factory.mktemp("trained"))


def poison(where: str, step: int, value: float) -> Calls:
    """Put a value into the loss, or into one place of one gradient, of a step; or into a validation."""
    seen: list[int] = []
    validated: list[int] = []

    def loss(self, *batch, **options):
        found, count = TRUE_LOSS(self, *batch, **options)
        seen.append(1)
        if len(seen) == step and where == "loss":
            found = found * value
        if len(seen) == step and where == "gradient":
            parameters = [p for p in self.parameters() if p.requires_grad]
            chosen = parameters[step % len(parameters)]

            def broken(gradient):
                gradient = gradient.clone()
                gradient.view(-1)[step] = value
                return gradient

            chosen.register_hook(broken)
        return found, count

    def token_losses(self, *batch, **options):
        found = TRUE_TOKEN_LOSSES(self, *batch, **options)
        validated.append(1)
        return found * value if where == "validation" and len(validated) == step else found

    Qwen.loss, Qwen.token_losses = loss, token_losses
    return Calls({"step"})


def test_a_number_that_is_not_finite_in_8_steps_stops_in_that_step_and_the_last_checkpoint_goes_on(tmp_path, trained):
    """Each step with one of three values, in the loss or in a gradient. Checkpoints are after 2, 3, 4, 6 and 8."""
    values, cost = (float("nan"), float("inf"), float("-inf")), trained.ledger[1]["training"] // 8
    for point in range(8):
        step, value, where = 1 + point, values[point % 3], ("loss", "gradient")[point // 2 % 2]
        folder = stand(tmp_path / str(point))
        ended = ends(TRAIN, folder, poison, where, step, value)
        line = the_line(ended, "expected finite numbers")
        assert line.startswith(f"g/{CELL}: step {step}: the loss is "), line
        assert (
            len(ended.calls) == len(lines(folder / "g" / CELL)) == step - 1
        )  # the optimizer did not take the bad gradient
        last = max(after for after in (0, 2, 3, 4, 6) if after < step)
        state = folder / "g" / CELL / "checkpoint" / "state.json"
        assert (json.loads(state.read_text())["step"] if state.is_file() else 0) == last
        failed = entries(folder / "ledger.sqlite")[-1]
        assert (failed["state"], failed["training"]) == ("failed", step * cost)  # that step's too
        assert json.loads((folder / "g" / CELL / "failure.json").read_text())["step"] == step - 1
        finishes(TRAIN, folder)
        assert assert_as_never_stopped(folder, trained) == (step - last) * cost


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_validation_that_is_not_finite_fails_the_run_after_its_step(tmp_path, trained, value):
    """Bug: the record could not be written as JSON, which ended the run as bad input, with exit code 2."""
    folder = stand(tmp_path)
    ended = ends(TRAIN, folder, poison, "validation", 3, value)  # of the untrained model, after steps 2 and 4
    assert the_line(ended, "expected finite numbers").startswith(f"g/{CELL}: after step 4: "), ended.err
    assert entries(folder / "ledger.sqlite")[-1]["state"] == "failed"
    finishes(TRAIN, folder)
    assert_as_never_stopped(folder, trained)


def no_memory(how: str) -> None:
    def loss(self, *batch, **options):
        if how == "torch":
            torch.empty(2**60, dtype=torch.uint8)
        if how == "numpy":
            np.empty(2**60, np.uint8)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    Qwen.loss = loss


@pytest.mark.parametrize("how", ["torch", "numpy", "cuda"])
def test_no_memory_is_exit_4_and_one_line_that_says_what_to_lower(tmp_path, how):
    folder = stand(tmp_path)
    line = the_line(ends(TRAIN, folder, no_memory, how), "not enough memory")
    assert line.startswith("train: ") and "smaller --batch-size" in line
    assert entries(folder / "ledger.sqlite")[-1]["state"] == "interrupted"


# Stops


MOMENTS = {  # a function, which of its calls, and how many steps are done in all where it ends
    "while the first model loads": ("training.cell.load_model", 1, 0),
    "in the validation of the untrained model": ("training.cell.validation_loss", 1, 0),
    "in a step after a checkpoint": ("training.cell.training_step", 4, 4),
    "in the last validation of a cell": ("training.cell.validation_loss", 3, 4),
    "while a cell is forecast": ("forecasting.evaluate.forecast", 2, 4),
    "between two cells": ("training.cell.load_model", 3, 4),
    "in the second cell": ("training.cell.training_step", 5, 5),
    "in the last validation of all": ("training.cell.validation_loss", 5, 8),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_and_sigterm_end_after_the_current_step_with_a_checkpoint_and_exit_130(tmp_path, whole, moment):
    """Bug: asked for in the last step of a cell, or in the validation after it, the stop was forgotten."""
    name, at, steps = MOMENTS[moment]
    how = (signal.SIGINT, signal.SIGTERM)[list(MOMENTS).index(moment) % 2]
    folder = stand(tmp_path)
    ended = ends(GRID, folder, signalled, f"experiments.{name}", at, how)
    assert (ended.code, len(ended.calls)) == (130, steps), ended.err
    assert ended.err.splitlines()[-1] == "interrupted; the same command continues where it stopped"
    assert {row["state"] for row in entries(folder / "ledger.sqlite")} <= {"settled", "interrupted"}
    finishes(GRID, folder)
    assert assert_as_never_stopped(folder, whole) == 0  # no step ran twice
