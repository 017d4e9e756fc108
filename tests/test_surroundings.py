"""Streams that are closed or full, locales, odd paths, edited folders: one line and an exit code, and nothing lost."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from waves import INPUTS, inputs, no_figures, refused

from experiments import run
from experiments.accounting.ledger import Ledger
from experiments.run_folder import files

ROOT = Path(__file__).parents[1]
SMALL = [*INPUTS, "--context", "32", "--batch-size", "1", "--val-series", "1", "--steps", "2"]
TRAIN = ["train", *SMALL, "--val-every", "0", "--lr", "1e-2", "--rank", "2", "--out", "t"]
CELL = Path("t/cells/lr0.01-r2")
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


@pytest.fixture(autouse=True)
def here(monkeypatch):
    no_figures(monkeypatch)
    inputs(30)


def shell(command: str, **environment: str) -> tuple[int, str]:
    """Run `python -m experiments.run` with what a shell makes of its streams; the exit code, and all that it said."""
    line = f"{shlex.quote(sys.executable)} -m experiments.run {command}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(["sh", "-c", line], env=environment, capture_output=True, text=True, errors="replace")
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("command", "environment", "code", "said"),
    [
        ("budget", ASCII, 0, r"r\xfcn"),  # it was the end, after half of the table
        ("status \xfc", ASCII, 2, r"'\udcc3\udcbc' on the command line: expected text in ascii"),
        ("status $(printf '\\377')", {"LC_ALL": "C.UTF-8"}, 2, r"'\udcff' on the command line: expected text in utf-8"),
        ("status absent <&- >&- 2>&-", {}, 2, ""),
        ("status absent 2>/dev/full", {}, 2, ""),  # it was 1
        ("budget >/dev/full", {}, 4, "No space left on device"),
        ("budget --json >&-", {}, 0, ""),  # it was 1
        ("budget", {"COLUMNS": "1", "TERM": "dumb", "TZ": "XXX+23", "PYTHONHASHSEED": "7"}, 0, "100.00 % left"),
    ],
)
def test_a_verb_ends_as_its_exit_code_says_whatever_its_streams_and_its_locale_are(command, environment, code, said):
    with Ledger("ledger.sqlite") as ledger:
        ledger.settle(ledger.reserve("rün", "cell", {}))
    found, printed = shell(command, **environment)
    assert found == code and said in printed and "Traceback" not in printed, printed
    assert code == 0 or printed.count("\n") <= 1


def test_a_run_whose_standard_streams_are_all_closed_ends_in_the_bytes_of_another():
    """Bug: without stderr it ended in the middle, and without stdout after its end with a traceback."""
    assert run.main(TRAIN) == 0
    Path("t").rename("whole")
    code, printed = shell(f"{shlex.join(TRAIN)} --ledger other.sqlite <&- >&- 2>&-")
    assert (code, printed) == (0, "")
    for name in ("metrics.jsonl", "result.json", "checkpoint/state.json"):
        assert (CELL / name).read_bytes() == ("whole" / CELL.relative_to("t") / name).read_bytes()


@pytest.fixture
def place(tmp_path):
    Path("file").write_text("mine")
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("absent")
    os.mkfifo("pipe")
    for name in ("documents/evaluation/thesis.tex", "documents/config.toml", "documents/results.md"):
        files.write_text(name, "mine")


LONG = "x" * 300
NO_FOLDERS = ("file", "file/x", "pipe", "/dev/null", LONG)
FORECAST = ["--data", "waves.h5", "--points", "16", "--horizon", "2", "--val-series", "1", "--forecast-series", "1"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        *[([*TRAIN, "--out", out], out) for out in ("loop", "dangling", *NO_FOLDERS)],
        ([*TRAIN, "--out", "documents"], "documents/config.toml: is not of a run, which would write over it"),
        *[([*TRAIN, "--ledger", path], f"{path}: ") for path in ("documents", *NO_FOLDERS)],
        *[([*TRAIN, f"--{name}", ""], f"{name} is empty") for name in ("out", "ledger", "config", "model", "data")],
        *[([*TRAIN, f"--{name}", LONG], LONG[:200]) for name in ("config", "model", "data")],
        (["evaluate", *FORECAST, "--out", "documents"], "holds 'thesis.tex', which would be lost"),
        (["evaluate", *FORECAST, "--adapter", ""], "adapter is empty"),
        *[(["forecast", "--system", "1", *FORECAST, "--out", out], out) for out in ("documents", "pipe", "/")],
        (["status", ""], "run is empty"),
    ],
)
def test_a_path_that_cannot_be_is_one_line_and_nothing_is_written_over(argv, said, place, capsys):
    assert said in refused(capsys, *argv)
    assert Path("file").read_text() == Path("documents/results.md").read_text() == "mine"
    assert Path("pipe").is_fifo()  # a device was replaced by a file, /dev/null too


@pytest.mark.parametrize("out", ["a\nb", "-x", "ü 漢字 🙂", "$(x) 'y'", "t/", "u/../v", "logs", "link"])
def test_a_folder_of_any_name_holds_a_run_and_the_commands_that_it_prints_are_ready_to_be_run(out, capsys):
    Path("logs").mkdir()
    Path("logs/log.txt").touch()  # of a shell that writes there what is printed
    Path("u").mkdir()
    Path("link").symlink_to("u")
    assert run.main(["grid", *TRAIN[1:-4], "--ranks", "2", "--no-forecast-cells", f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    end = printed.index("\n\nwritten to")
    command = shlex.split(printed[printed.index("python -m experiments.run evaluate") : end])
    assert Path(command[-1], "adapter_config.json").is_file() and Path(command[-3]).is_file()


def swap(a: str | Path, b: str | Path) -> None:
    Path(a).rename("aside")
    Path(b).rename(a)
    Path("aside").rename(b)


OTHER = Path("o/cells/lr0.02-r2")


def swap_checkpoints() -> None:
    for cell in (CELL, OTHER):
        (cell / "result.json").unlink()
    for name in ("checkpoint", "metrics.jsonl", "gradients.jsonl"):
        swap(CELL / name, OTHER / name)


ALTERED = "adapter_config.json: its sha256 is"
AT_PLACE = f"{CELL}: cannot be written (File exists)"
EDITS = {  # what is done, and what is said of it; "" where the run ends as it was
    "cells swapped": (lambda: swap(CELL, OTHER), "result.json: cell is 'lr0.02-r2'"),
    "results swapped": (lambda: swap(CELL / "result.json", OTHER / "result.json"), "as metrics.jsonl says"),
    "adapters swapped": (lambda: swap(CELL / "adapter", OTHER / "adapter"), "model.safetensors: its sha256 is "),
    "adapter altered": (lambda: files.write_json(CELL / "adapter/adapter_config.json", {}), ALTERED),
    "adapter gone": (lambda: (CELL / "adapter").rename("aside"), "adapter_config.json: cannot be read"),
    "result gone": (lambda: (CELL / "result.json").unlink(), ""),
    "checkpoints swapped": (swap_checkpoints, "checkpoint/state.json: cell is 'lr0.02-r2': expected 'lr0.01-r2', in"),
    "a file for a cell": (lambda: (CELL.rename("aside"), CELL.touch()), AT_PLACE),
    "a loop": (lambda: (CELL.rename("aside"), CELL.symlink_to(CELL.name)), AT_PLACE),
    "manifests swapped": (lambda: swap("t/manifest.json", "o/manifest.json"), ""),
    "configs swapped": (lambda: swap("t/config.toml", "o/config.toml"), "config.toml: lr is (0.02,), now (0.01,)"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_run_folder_that_was_edited_is_named_or_ends_as_it_was(edit, capsys):
    """Bug: another cell's adapter was evaluated, and another cell's checkpoint went on, under this one's name."""
    assert run.main(TRAIN) == run.main([*TRAIN, "--lr", "2e-2", "--out", "o"]) == 0
    whole = (CELL / "metrics.jsonl").read_bytes()
    change, said = EDITS[edit]
    change()
    capsys.readouterr()
    code, line = run.main(TRAIN), capsys.readouterr().err
    assert code == (2 if said else 0) and said in line and "Traceback" not in line, line
    assert said or (CELL / "metrics.jsonl").read_bytes() == whole


def test_a_budget_that_was_lowered_below_what_is_spent_stops_new_work_and_no_finished_run(capsys):
    """Bug: "needs 0 FLOPs, 0 are left"."""
    assert run.main(TRAIN) == 0
    assert run.main([*TRAIN, "--budget", "1000"]) == 0
    assert run.main([*TRAIN, "--lr", "2e-2", "--out", "o", "--budget", "1000"]) == 3
    assert "0 are left of the budget of 1,000" in capsys.readouterr().err


def test_a_ledger_that_was_edited_is_refused_by_a_finished_run(capsys):
    assert run.main(TRAIN) == 0
    with Ledger("ledger.sqlite") as ledger:
        ledger._database.execute("UPDATE amounts SET spent = 5 WHERE spent > 5")
    assert "is settled at {'training': 0, 'validation': 5" in refused(capsys, *TRAIN)
