"""`status`: what is running, done, failed and waiting, how far, and the time left, from a run's files alone."""

import json
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import pytest
from faults import Calls, Running, ends, signalled, wait_for, warm
from test_crash import CELL, GRID, TRAIN, poison, stand
from waves import stamps

from experiments import run
from experiments.run_folder.owner import Owner, claimed, owner_of
from experiments.run_folder.status import duration, status, text
from experiments.training import cell as train

ROOT = Path(__file__).parents[1]
HOST = platform.node()
STUDY = [
    *("study", "--protocol", "default", "--config", "study.toml", "--data", "waves.h5", "--out", "g"),
    *("--lr", "1e-2", "1e-3", "--ranks", "2"),
]
SIZES = "default_steps = 2\ncontexts = [16, 32]\ncontext_steps = 3\nfinal_steps = 5\n"


@pytest.fixture
def place(tmp_path) -> Path:
    folder = stand(tmp_path)
    warm(GRID, folder)
    return folder


def pausing(step: int) -> Calls:
    """Wait at the beginning of a step, until a file says to go on."""
    true, seen = train.training_step, []

    def training_step(*args, **kwargs):
        seen.append(1)
        if len(seen) == step:
            Path("paused").touch()
            while not Path("go").exists():
                time.sleep(0.005)
        return true(*args, **kwargs)

    train.training_step = training_step
    return Calls({"step"})


def paused(argv: list[str], place: Path, step: int) -> Running:
    running = Running(argv, place, pausing, step)
    wait_for("paused")
    return running


def goes_on(*running: Running) -> None:
    """Let it go on to its end, and look whether all is reported as done then."""
    Path("go").touch()
    assert [one.end().code for one in running] == [0] * len(running)
    assert set(states().values()) == {"done"} and status(Path("g")).at_work == []


def states(folder: str = "g") -> dict[str, str]:
    return {row.name: row.state for row in status(Path(folder)).runs}


def test_a_run_that_is_running_is_reported_while_it_is_at_work_and_nothing_is_written(place, capsys):
    running = paused(GRID, place, 4 + 3)  # two steps of the second cell are done
    metrics = Path("g") / CELL / "metrics.jsonl"
    whole = metrics.read_bytes()
    metrics.write_bytes(whole + b'{"step": 3, "lo')  # a line that is being written
    before = stamps()
    assert run.main(["status", "g", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert run.main(["status", "g"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert stamps() == before
    found = {row["name"]: row["state"] for row in printed["runs"]}
    assert found == {"untrained": "done", "lr0.001-r2": "done", "lr0.01-r2": "running"}
    now, last = printed["runs"][2], [json.loads(line) for line in whole.splitlines()]
    assert (now["step"], now["steps"], now["folder"]) == (2, 4, CELL)
    assert now["loss"] == last[1]["loss"] and now["validation_loss"] == last[2]["validation_loss"]
    assert now["flops"] == last[2]["training"] + last[2]["validation"] < now["predicted_flops"]
    assert printed["done"] == 2 and printed["at_work"] == [f"process {running.pid} on {HOST}"]
    assert printed["flops"] == sum(row["flops"] for row in printed["runs"]) < printed["predicted_flops"]
    # The rule of the time left: what this process did, from its beginning to its last record, holds for the rest.
    seconds = metrics.stat().st_mtime - Path("g/.owner").stat().st_mtime
    left = now["predicted_flops"] - now["flops"]
    assert seconds > 0 and printed["seconds_left"] == pytest.approx(left * seconds / printed["flops"], rel=1e-9)
    assert lines[3].split()[:4] == ["lr0.01-r2", "running", "2/4", f"{now['loss']:.4f}"]
    assert lines[-1].startswith("g: 2 of 3 runs done, ")
    assert f"at work: process {running.pid} on {HOST}; time left: about " in lines[-1]
    metrics.write_bytes(whole)
    goes_on(running)
    assert text(status(Path("g"))).splitlines()[-1].endswith("; no process at work")


def test_a_run_that_was_killed_is_interrupted_and_its_time_left_unknown(place):
    running = paused(GRID, place, 3)
    running.kill()
    running.end()
    assert owner_of(Path("g")) is not None  # it had no time to go in order
    found = status(Path("g"))
    assert states() == {"untrained": "done", "lr0.001-r2": "interrupted", "lr0.01-r2": "waiting"}
    assert (found.at_work, found.seconds_left) == ([], None)
    assert text(found).splitlines()[-1].endswith("no process at work; time left: unknown")


def test_a_run_that_goes_on_counts_from_where_it_began_again(place):
    """FLOPs of an earlier process are not taken for this one's."""
    assert ends(GRID, place, signalled, "experiments.training.cell.training_step", 5, 2).code == 130
    running = paused(GRID, place, 2)
    began = owner_of(Path("g"))
    assert began is not None and began.process == running.pid
    found = status(Path("g"))
    flops = sum(row.flops for row in found.runs)
    assert 0 < began.flops < flops
    seconds = (Path("g") / CELL / "metrics.jsonl").stat().st_mtime - Path("g/.owner").stat().st_mtime
    left = sum(row.predicted_flops - row.flops for row in found.runs)
    assert found.seconds_left == pytest.approx(left * seconds / (flops - began.flops), rel=1e-9)
    goes_on(running)


def test_a_run_that_failed_says_why_until_it_is_started_again(place):
    assert ends(TRAIN, place, poison, "loss", 4, float("inf")).code == 4
    found = status(Path("g"))
    assert states() == {"untrained": "done", "lr0.01-r2": "failed"} and found.runs[1].step == 3
    assert "lr0.01-r2 failed: step 4: the loss is inf" in text(found)
    running = paused(TRAIN, place, 3)
    assert states()["lr0.01-r2"] == "running"
    goes_on(running)
    assert not (Path("g") / CELL / "failure.json").exists()


def test_two_shards_at_work_are_both_reported(place):
    running = [Running([*GRID, "--shard", f"{i}/2"], place, pausing, 3) for i in (1, 2)]
    wait_for("g/cells/lr0.001-r2/checkpoint", "g/cells/lr0.01-r2/checkpoint")
    found = status(Path("g"))
    assert states() == {"untrained": "done", "lr0.001-r2": "running", "lr0.01-r2": "running"}
    assert found.at_work == [f"process {one.pid} on {HOST}" for one in running]
    assert found.seconds_left is not None
    goes_on(*running)


def test_a_study_is_reported_by_stages_also_those_whose_runs_are_not_chosen_yet(place):
    Path("study.toml").write_text(Path("small.toml").read_text() + SIZES)
    # In the first run of the context stage.
    assert ends(STUDY, place, signalled, "experiments.training.cell.load_model", 5, 15).code == 130
    found = status(Path("g"))
    assert [(row.stage, row.folder, row.state) for row in found.runs] == [
        ("baseline", "untrained", "done"),
        ("default", "default", "done"),
        ("grid", "cells/lr0.01-r2", "done"),
        ("grid", "cells/lr0.001-r2", "done"),
        ("context", "contexts/16", "waiting"),
        ("context", "contexts/32", "waiting"),
        ("final", "final", "waiting"),
    ]
    assert [row.steps for row in found.runs] == [0, 2, 4, 4, 3, 3, 5]
    losses = {row.folder: row.validation_loss for row in found.runs if row.stage == "grid"}
    best = {"cells/lr0.01-r2": 0.01, "cells/lr0.001-r2": 0.001}[min(losses, key=losses.__getitem__)]
    planned = {one["stage"]: one["runs"] for one in json.loads(Path("g/plan.json").read_text())["stages"]}
    assert [run["lr"] for run in planned["context"]] == [best, best] == [0.01, 0.01]  # the last rate stood for it


def test_the_folder_of_a_process_of_another_machine_is_named_by_its_own_record(place):
    assert ends(GRID, place, signalled, "experiments.training.cell.training_step", 2, 2).code == 130
    Owner(1, "elsewhere", "", ("untrained", "cells/lr0.001-r2"), 0).write(Path("g"))
    assert states()["lr0.001-r2"] == "running"
    assert status(Path("g")).at_work == ["process 1 on elsewhere, unverified (another host)"]


def test_who_holds_a_folder_is_written_while_it_is_held_and_gone_after_that(tmp_path):
    with claimed(tmp_path) as claim:
        claim.begins(["a", "b"], 7)
        owner = owner_of(tmp_path)
        assert owner is not None and owner.alive and (owner.runs, owner.flops) == (("a", "b"), 7)
    assert owner_of(tmp_path) is None
    gone = Owner(owner.process, owner.host, "another start", (), 0)
    gone.write(tmp_path)
    assert owner_of(tmp_path) == gone and gone.alive is False


def test_a_folder_that_its_holder_is_about_to_leave_is_waited_for(tmp_path):
    """Its name goes a moment before the lock is free: the next was refused, by the name of "another process"."""
    leaving = filelock.FileLock(tmp_path / ".lock", thread_local=False)
    leaving.acquire()
    timer = threading.Timer(0.1, leaving.release)
    timer.start()
    with claimed(tmp_path):
        assert owner_of(tmp_path) is not None
    timer.join()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    folder = stand(tmp_path_factory.mktemp("stopped"))
    warm(GRID, folder)
    assert ends(GRID, folder, signalled, "experiments.training.cell.training_step", 7, 2).code == 130
    Owner(1, "elsewhere", "", (), 0).write(folder / "g")
    return folder


ROW = '{"stages": [{"stage": "s", "runs": [{"name": "a", "stage": "s", "folder": "f", "parts": [], %s}]}]}'
DAMAGED = {
    "plan.json": [
        *("", "[]", "{}", '{"stages": 1}', '{"stages": [{"stage": "grid", "runs": [{"name": "a"}]}]}'),
        *(ROW % '"steps": "4", "predicted": {}', ROW % '"steps": 4, "predicted": {"training": 1.5}'),
    ],
    f"{CELL}/metrics.jsonl": ["x\n", "[1]\n", '{"training": "1"}\n', '{"step": 1, "loss": [1.0]}\n'],
    "cells/lr0.001-r2/evaluation/evaluation.json": ["x", "1", "{}", '{"flops": {"inference": 1.5}}'],
    ".owner": ["x", "[]", "{}", '{"process": "1", "host": "a", "started": "", "runs": [], "flops": 0}'],
}


@pytest.mark.parametrize(("name", "damage"), [(name, damage) for name, texts in DAMAGED.items() for damage in texts])
def test_a_damaged_record_is_exit_code_2_and_one_line_that_names_it(stopped, name, damage, capsys):
    path = stopped / "g" / name
    before = path.read_bytes()
    path.write_text(damage)
    try:
        assert run.main(["status", str(stopped / "g")]) == 2
    finally:
        path.write_bytes(before)
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith(f"{path}: ") and "expected" in printed.err


@pytest.mark.parametrize("name", [".", "absent", "waves.h5"])
def test_a_folder_in_which_nothing_has_begun_is_exit_code_2_and_one_line(place, name, capsys):
    assert run.main(["status", name]) == 2
    assert capsys.readouterr().err == f"{name}: has no plan.json: expected the folder of a run that has begun\n"


def test_status_needs_no_torch(stopped):
    code = f"import sys; from experiments import run; run.main(['status', {str(stopped / 'g')!r}])\n"
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("\n") == 6, done.stderr


def test_a_duration_is_reported_in_the_largest_unit_that_it_is_more_than_two_of():
    said = {0.4: "0 seconds", 120: "120 seconds", 121: "2 minutes", 7200: "120 minutes", 7201: "2 hours"}
    said |= {172_800: "48 hours", 172_801: "2 days"}
    assert {seconds: duration(seconds) for seconds in said} == said
    in_minutes = {29: "0 minutes", 121: "2 minutes", 172_800: "48 hours", 8_640_000: "100 days"}
    assert {seconds: duration(seconds, "minutes") for seconds in in_minutes} == in_minutes
