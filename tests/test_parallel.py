"""More than one process: data-parallel training as torchrun starts it, and a grid in shards."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from faults import Ended, Running, ends, signalled, wait_for
from torch.distributed import TCPStore
from waves import INPUTS, contents, entries, inputs, no_figures, refused

from experiments import run
from experiments.accounting.ledger import BudgetExceeded, Ledger
from experiments.run_folder import files
from experiments.run_folder.owner import claimed
from experiments.study.shards import Shard
from experiments.training import parallel
from qwen_min import Qwen
from qwen_min.fast.limits import FEED_FORWARD_AT_ONCE

ROOT = Path(__file__).parents[1]
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
SMALL = [*(*INPUTS, "--context", "32", "--batch-size", "5", "--val-series", "3"), *("--steps", "6", "--val-every", "3")]
TRAIN = ["train", *SMALL, "--lr", "1e-2", "--rank", "2", "--out", "t"]
GRID = ["grid", *SMALL, "--steps", "2", "--lr", "1e-3", "1e-2", "--ranks", "2", "4", "--out", "g"]
GRID += ["--no-forecast-cells"]
CELL = Path("t/cells/lr0.01-r2")
STEP = "experiments.training.cell.training_step"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The folder that a test stands in, with a tiny model and twenty damped waves of 30 points."""
    no_figures(monkeypatch)
    return inputs(30, tmp_path)


def joins(environment: dict[str, str], number: int, fault: Callable | None = None, *arguments) -> None:
    """Make a process the rank of this number, and break in it what a test breaks there."""
    os.environ |= environment
    if fault:
        fault(number, *arguments)


def on(number: int, rank: int, fault: Callable, *arguments) -> None:
    if number == rank:
        fault(*arguments)


def ranks(store: TCPStore, numbers: Sequence[int], argv: list[str], *fault) -> list[Running]:
    """Processes of one group of two, as torchrun starts them."""
    world = {
        **{"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)},
        **{"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "GLOO_SOCKET_IFNAME": LOOPBACK},
    }
    return [
        Running(argv, Path.cwd(), joins, world | dict.fromkeys(("RANK", "LOCAL_RANK"), f"{n}"), n, *fault)
        for n in numbers
    ]


def torchrun(argv: list[str], *fault) -> list[Ended]:
    """A command in two processes of one group; this one holds their rendezvous, on a port that the system chose."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return [one.end() for one in ranks(store, (0, 1), argv, *fault)]


def last_line(first: Ended, second: Ended) -> str:
    """The line of error: the last of the first process, after its progress; the others say nothing."""
    assert second.err == second.out == "" and "Traceback" not in first.err, (first, second)
    return first.err.splitlines()[-1]


def codes(ended: Sequence[Ended]) -> list[int]:
    return [one.code for one in ended]


# Data-parallel training


def one_by_one(number: int) -> None:
    """Sequences run one at a time, as those of a large model do: gradients accumulate within a rank."""
    FEED_FORWARD_AT_ONCE["cpu"] = 1


@pytest.mark.parametrize(
    "config",
    [
        "",
        "count_padding = true\nlogit_bias = true\npad_side = 'left'\nwindows = 'anywhere'\n"
        "digit_weights = [1, 0.5, 0.25]\nnumber_loss = 0.3\n",
    ],
)
def test_two_processes_train_the_curve_of_one_and_are_charged_what_it_is_charged(place, config):
    """Five windows a step and three or more a validation, so that the shares differ: a mean of means would show."""
    Path("c.toml").write_text(config)
    argv = [*TRAIN, "--config", "c.toml"]
    assert run.main(argv) == 0
    Path("two").mkdir()
    for name in ("waves.h5", "model", "c.toml"):
        Path("two", name).symlink_to(place / name)
    os.chdir("two")
    first, second = torchrun(argv, one_by_one)
    assert first.code == second.code == 0, first.err
    assert second.out == second.err == "" and "validation loss" in first.out
    os.chdir("..")
    for name in ("metrics.jsonl", "gradients.jsonl"):
        one, two = files.read_jsonl(CELL / name), files.read_jsonl("two" / CELL / name)
        assert [line.keys() for line in one] == [line.keys() for line in two]
        for a, b in zip(one, two, strict=True):
            for key, value in a.items():
                expected = value if isinstance(value, int) else pytest.approx(value, rel=1e-5, abs=1e-5)
                assert b[key] == expected, (name, key, a["step"])
    result = files.read_json("two" / CELL / "result.json")
    assert result["flops"] == result["predicted_flops"]
    assert entries("two/ledger.sqlite") == entries()
    assert entries()[-1]["total"] == sum(result["flops"].values()) and entries()[-1]["state"] == "settled"
    assert contents("two/t").keys() == contents("t").keys()


def test_a_group_of_processes_stopped_by_a_signal_to_one_goes_on_to_the_same_bytes(place):
    """With dropout: every rank draws its own, from the seed, the step and its number."""
    argv = [*TRAIN, "--steps", "16", "--val-every", "5", "--dropout", "0.2", "--ledger"]
    assert codes(torchrun([*argv, "a.sqlite"])) == [0, 0]
    Path("t").rename("whole")
    ended = torchrun([*argv, "b.sqlite"], on, 1, signalled, STEP, 7, signal.SIGTERM)
    assert codes(ended) == [130, 130] and "interrupted" in last_line(*ended)
    assert not (CELL / "result.json").exists() and (CELL / "checkpoint").is_dir()
    assert codes(torchrun([*argv, "b.sqlite"])) == [0, 0]
    assert contents("t", "results.md") == contents("whole", "results.md")
    assert entries("b.sqlite") == entries("a.sqlite")


def not_finite(number: int) -> None:
    true, calls = Qwen.loss, []

    def poisoned(self, *batch, **options):
        loss, count = true(self, *batch, **options)
        calls.append(1)
        return (loss * float("nan") if number == 1 and len(calls) == 3 else loss), count

    Qwen.loss = poisoned


def disk_full(number: int) -> None:
    true, calls = files.append_jsonl, []

    def full(path, record):
        calls.append(1)
        if len(calls) == 4:
            raise OSError(f"{path}: no space left")
        true(path, record)

    files.append_jsonl = full


def overspent(number: int) -> None:
    def spend(self, entry, stage, flops):
        if stage == "training":
            raise BudgetExceeded(self.path, "t", flops, 0, self.budget)

    Ledger.spend = spend


def lacks_its_data(number: int) -> None:
    if number == 1:
        os.mkdir("elsewhere")
        os.chdir("elsewhere")
        os.symlink("../model", "model")


@pytest.mark.parametrize(
    ("argv", "fault", "code", "said"),
    [
        (TRAIN, not_finite, 4, "step 3: the loss is nan"),
        (TRAIN, disk_full, 4, "no space left"),
        (TRAIN, overspent, 3, "0 are left of the budget"),
        (TRAIN, lacks_its_data, 2, "process 1: waves.h5"),
        ([*TRAIN, "--config", "c.toml"], lacks_its_data, 2, "process 1: c.toml"),  # while the other is further on
        ([*TRAIN, "--budget", "1000"], None, 3, "of the budget of 1,000"),
        ([*TRAIN, "--batch-size", "1"], None, 2, "batch_size is 1: expected a window or more for each of 2 processes"),
        ([*TRAIN, "--data", "absent.h5"], None, 2, "absent.h5"),
        ([*TRAIN, "--rank", "x"], None, 2, "--rank"),
        ([*TRAIN, "--dry-run"], None, 2, "expected torchrun for training alone"),
        (["data"], None, 2, "expected torchrun for training alone"),
    ],
)
def test_what_ends_one_process_ends_all_with_one_line_and_the_exit_code_of_one(place, argv, fault, code, said):
    Path("c.toml").touch()
    ended = torchrun(argv, fault)
    assert codes(ended) == [code, code], ended
    assert said in last_line(*ended)
    if fault is None:  # nothing had begun
        assert ended[0].err.count("\n") == 1
    if fault in (not_finite, disk_full, overspent):
        assert entries()[-1]["state"] == ("failed" if fault is not_finite else "interrupted")
        assert not (CELL / "result.json").exists()


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(("where", "call"), [("loss", 1), ("loss", 4), ("token_losses", 1), ("from_pretrained", 1)])
def test_a_process_that_is_killed_leaves_none_waiting(place, victim, where, call):
    """In the first step, a later one, a validation, and before any; the second is silent, as torchrun speaks then."""
    ended = torchrun(TRAIN, on, victim, signalled, f"qwen_min.Qwen.{where}", call, signal.SIGKILL)
    assert codes(ended) == ([4, -signal.SIGKILL] if victim else [-signal.SIGKILL, 4]), ended
    assert "Traceback" not in ended[1 - victim].err
    assert not victim or "another process of the group has ended" in last_line(*ended)


def announced(number: int) -> None:
    """Say that the group is waited for; the others never come."""
    true = torch.distributed.init_process_group

    def begins(*args, **options):
        Path("waits").touch()
        true(*args, **options)

    torch.distributed.init_process_group = begins


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_process_whose_group_never_comes_ends_by_a_signal(place, monkeypatch, how):
    """Bug: it saw none, and waited for a day."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    (alone,) = ranks(store, [0], TRAIN, announced)
    wait_for("waits")
    alone.kill(how)
    assert alone.end().code == -how and not Path("t").exists()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *[("RANK", value, "0 to 1") for value in ("a", "2", "-1", "", "1.0", "٣")],
        *[("WORLD_SIZE", value, "1 to 1048576") for value in ("two", "0", "-2", "9" * 12)],
    ],
)
def test_numbers_that_torchrun_never_sets_are_refused_in_one_line(name, value, expected, monkeypatch, capsys):
    world = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"} | {name: value}
    for variable, text in world.items():
        monkeypatch.setenv(variable, text)
    line = refused(capsys, *TRAIN)
    assert line == f"{name} is {value!r}: expected a whole number from {expected}, as torchrun sets it\n"


def test_a_study_carries_its_best_cell_forward_in_every_process(place):
    """The others learn it from the first one, and wait while that one judges."""
    sizes = "contexts = [16]\ncontext_steps = 2\nforecast_cells = true\npoints = 20\nhorizon = 2\nshown = [15]\n"
    Path("study.toml").write_text(sizes)
    argv = [*GRID[1:-1], "--protocol", "default", "--config", "study.toml", "--steps", "2", "--ranks", "2"]
    assert run.main(["grid", *argv]) == 0
    ended = torchrun(["context", *argv, "--allow-drift"])  # the grid ran in one process
    assert codes(ended) == [0, 0], ended
    losses = {row["name"]: float(row["validation_loss"]) for row in files.read_csv("g/results.csv")[1]}
    best = min((name for name in losses if name.startswith("lr")), key=lambda name: losses[name])
    result = files.read_json("g/contexts/16/result.json")
    assert f"lr{result['lr']:g}-r{result['rank']}" == best
    assert Path("g/contexts/16/evaluation/evaluation.json").is_file()
    assert all(row["state"] == "settled" for row in entries())


def test_without_torchrun_there_is_no_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # of something else: torchrun sets RANK, MASTER_ADDR, MASTER_PORT too
    with parallel.joined("train", trains=True) as group:
        assert group is parallel.ALONE and not torch.distributed.is_initialized()


def test_torchrun_starts_it_as_the_readme_says(place):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += ["-m", "experiments.run", *TRAIN, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["flops"] == result["predicted_flops"]
    assert result["validation_loss"] < result["untrained_validation_loss"]
    assert [row["cell"] for row in entries()] == ["untrained", "lr0.01-r2"]


# A grid in shards


def shard(text: str, *more: str) -> list[str]:
    return [*GRID, *more, "--shard", text]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_shards_deal_out_every_cell_once_and_the_untrained_model_to_the_first(count):
    runs = ["untrained", "a", "b", "c", "d"]
    parts = [one.part(runs) for one in Shard(1, count).all]
    assert sorted(sum(parts, [])) == sorted(runs)
    assert parts[0][:2] == ["untrained", "a"] and parts[-1][0] in (runs[count], "untrained")
    assert all(part == [name for name in runs if name in part] for part in parts)


def test_shards_at_the_same_time_end_in_the_bytes_of_the_whole_grid_and_are_charged_once(place, capsys):
    assert run.main(GRID) == 0
    shown = capsys.readouterr().out
    Path("parts").mkdir()
    for name in ("waves.h5", "model"):
        Path("parts", name).symlink_to(place / name)
    os.chdir("parts")
    running = [Running(shard(f"{i}/3"), Path.cwd()) for i in (1, 2, 3)]
    assert codes([one.end() for one in running]) == [0, 0, 0]
    with Ledger("ledger.sqlite") as ledger:
        totals = ledger.totals()
    assert totals["spent"] == 0 and totals["reserved"] == sum(row["total"] for row in entries("../ledger.sqlite"))
    assert not Path("g/results.csv").exists()
    for _ in range(2):  # merging again charges nothing
        assert run.main(["grid", "--merge", "--out", "g"]) == 0
        assert capsys.readouterr().out == shown
        assert contents("g") == contents("../g")
        assert sorted(entries(), key=str) == sorted(entries("../ledger.sqlite"), key=str)
    assert run.main(GRID) == 0  # the whole grid has nothing left to do
    assert sorted(entries(), key=str) == sorted(entries("../ledger.sqlite"), key=str)


def test_missing_cells_are_named_and_shards_and_a_whole_run_keep_out_of_each_others_way(place, capsys):
    assert "has no shards" in refused(capsys, *GRID, "--merge")
    assert "at most 4 shards" in refused(capsys, *shard("1/5"))
    assert not Path("g").exists() and not Path("ledger.sqlite").exists()
    assert run.main(shard("2/2")) == 0
    error = refused(capsys, *GRID, "--merge")
    assert "3 of 5 runs are not finished: untrained, lr0.001-r2, lr0.001-r4:" in error
    assert "dealt to 2 shards" in refused(capsys, *GRID)
    assert "dealt to 2 shards" in refused(capsys, *shard("1/3"))
    assert "seed is 0, now 1" in refused(capsys, *shard("1/2", "--seed", "1"))
    with claimed(Shard(1, 2).folder(Path("g"))):
        assert "is at work in it" in refused(capsys, *shard("1/2"))
    with claimed(Path("g")):
        assert "is at work in it" in refused(capsys, *shard("1/2"))
    assert run.main(shard("1/2")) == 0
    with claimed(Shard(1, 2).folder(Path("g"))):
        assert "is at work in it" in refused(capsys, *GRID, "--merge")
    Ledger("other.sqlite").close()
    assert "knows no shards of g" in refused(capsys, *GRID, "--merge", "--ledger", "other.sqlite")
    assert run.main([*GRID, "--merge"]) == 0
    assert "the shards are merged" in refused(capsys, *shard("1/2"))


def test_no_shard_begins_unless_the_whole_grid_fits_and_what_it_needs_is_set_aside(place, capsys):
    assert run.main([*GRID, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    total = int(printed.partition("together ")[2].split()[0].replace(",", ""))
    assert run.main(shard("2/2", "--dry-run")) == 0
    assert capsys.readouterr().out.count("lr0.01-r") == 2  # its own cells alone
    assert run.main(shard("2/2", "--budget", str(total - 1))) == 3
    assert f"{total - 1:,} are left" in capsys.readouterr().err
    assert not Path("g/cells").exists() and not Path("g/untrained").exists()
    assert run.main(shard("2/2", "--budget", str(total))) == 0
    assert run.main([*TRAIN, "--budget", str(total)]) == 3
    assert "0 are left" in capsys.readouterr().err
    allowances = files.read_json("g/shards/plan.json")["allowances"]
    assert sum(allowances) == total
    with Ledger("g/shards/2-of-2/ledger.sqlite") as own:
        assert own.totals()["spent"] == allowances[1]


def test_a_shard_that_was_killed_goes_on_with_what_the_kill_wasted_added_to_its_allowance(place, capsys):
    more = ["--steps", "9", "--val-every", "4", "--ranks", "2"]
    assert ends(shard("1/2", *more), place, signalled, STEP, 7, signal.SIGKILL).code == -signal.SIGKILL
    first = files.read_json("g/shards/plan.json")
    assert run.main(shard("1/2", *more)) == run.main(shard("2/2", *more)) == 0
    second = files.read_json("g/shards/plan.json")
    assert run.main(["grid", "--merge", "--out", "g"]) == 0
    wasted = sum(row["wasted"] for row in entries())
    assert second["allowances"][0] - first["allowances"][0] == wasted > 0
    assert sum(row["total"] for row in entries()) == sum(second["allowances"])


def test_a_cell_that_a_run_without_shards_has_begun_is_left_to_it(place, capsys):
    more = ["--steps", "9"]
    assert ends([*GRID, *more], place, signalled, STEP, 5, signal.SIGTERM).code == 130
    assert "lr0.001-r2: was begun without shards" in refused(capsys, *shard("1/2", *more))
    assert [row["cell"] for row in entries()] == ["untrained", "lr0.001-r2"]


def test_what_is_set_aside_outlives_its_process_and_is_replaced_once(place):
    with Ledger("main.sqlite", 1000) as ledger:
        ledger.set_aside("g", "shards", {"training": 600})
        ledger.set_aside("g", "shards", {"training": 700})  # in place of the first
        with pytest.raises(BudgetExceeded, match="g/shards needs 1,001 FLOPs, 1,000 are left"):
            ledger.set_aside("g", "shards", {"training": 1001})
    with Ledger("main.sqlite", 1000) as ledger, Ledger("shard.sqlite", 700) as own:
        assert (ledger.totals()["reserved"], ledger.totals()["left"]) == (700, 300)
        with pytest.raises(BudgetExceeded):
            ledger.reserve("other", "cell", {"training": 301})
        entry = own.reserve("g", "cell", {"training": 500, "validation": 20})
        own.spend(entry, "training", 480)
        own.settle(entry)
        assert ledger.take_in("g", "shards", [own]) and not ledger.take_in("g", "shards", [own])
        (row,) = ledger.entries()
        assert row | {"id": 1} == own.entries()[0] and ledger.totals()["left"] == 520
