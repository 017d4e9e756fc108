"""More than one process: data-parallel training as torchrun starts it, and a grid in shards."""

import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed import TCPStore
from waves import damped_waves

from experiments import plots, run
from experiments.accounting.ledger import BudgetExceeded, Ledger
from experiments.run_folder import files
from experiments.run_folder.owner import claimed
from experiments.study.shards import Shard
from experiments.training import cell as train
from experiments.training import parallel
from qwen_min import Qwen
from qwen_min.fast.limits import FEED_FORWARD_AT_ONCE

ROOT = Path(__file__).parents[1]
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
SMALL = [
    *("--data", "waves.h5", "--context", "32", "--batch-size", "5", "--val-series", "3"),
    *("--steps", "6", "--val-every", "3"),
]
TRAIN = ["train", *SMALL, "--lr", "1e-2", "--rank", "2", "--out", "t"]
GRID = ["grid", *SMALL, "--steps", "2", "--lr", "1e-3", "1e-2", "--ranks", "2", "4", "--out", "g"]
CELL = Path("t/cells/lr0.01-r2")
FIGURES = ("loss_curves", "heat_map")  # would take longer than the training
PATIENCE = 300
"""Seconds that a process may take on a machine that is busy."""

# A process is forked from a server that has the libraries imported, which would take most of its time.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        *("torch.nn.parallel", "torch.distributed", "torch._dynamo", "safetensors.torch", "tokenizers", "filelock"),
        *("h5py", "matplotlib.pyplot", "scipy.integrate", "scipy.optimize", "tqdm", "pytest"),
    ]
)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder to stand in, with twenty damped waves of 30 points."""
    monkeypatch.chdir(tmp_path)
    for name in FIGURES:
        monkeypatch.setattr(plots, name, no_figure)
    damped_waves(tmp_path / "waves.h5", 30)
    return tmp_path


def no_figure(*_, **__) -> None:
    pass


class Ended(NamedTuple):
    codes: list[int]
    out: list[str]
    err: list[str]


def process(number: int, argv: list[str], environment: dict[str, str], folder: str, fault: Callable | None) -> None:
    """What one process does: the command line with its output in files, after what a test breaks in it."""
    os.chdir(folder)
    os.environ |= environment
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    for name in FIGURES:
        setattr(plots, name, no_figure)
    if fault:
        fault(number)
    sys.exit(run.main(argv))


class Processes:
    """Several processes in one folder: of one group, each with its rank, unless `apart`."""

    def __init__(
        self,
        *argvs: list[str],
        apart: bool = False,
        fault: Callable | None = None,
        environment: dict[str, str] | None = None,
    ):
        # The rendezvous of torchrun: it holds the store, on a port that the system chose.
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        world = {
            **{"WORLD_SIZE": str(len(argvs)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port)},
            **{"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"},
            **{"GLOO_SOCKET_IFNAME": LOOPBACK},
        }
        self.running = []
        for number, argv in enumerate(argvs):
            own = {} if apart else world | {"RANK": str(number), "LOCAL_RANK": str(number)} | (environment or {})
            arguments = number, argv, own, os.getcwd(), fault
            self.running.append(SERVER.Process(target=process, args=arguments))
            self.running[-1].start()

    def end(self) -> Ended:
        until = time.monotonic() + PATIENCE
        for p in self.running:
            p.join(max(0, until - time.monotonic()))
        hanging = [p for p in self.running if p.is_alive()]
        for p in hanging:
            p.kill()
            p.join()
        numbers = range(len(self.running))
        out, err = ([Path(f"{n}.{name}").read_text() for n in numbers] for name in ("out", "err"))
        assert not hanging, f"did not end: {err}"
        return Ended([p.exitcode for p in self.running], out, err)


def signalled(rank: int, step: int, how: signal.Signals, number: int) -> None:
    """Let the process of this rank send itself a signal at the beginning of a step: no later than that, however busy
    the machine is."""
    true, seen = train.training_step, []

    def training_step(*args, **kwargs):
        seen.append(1)
        if len(seen) == step and number == rank:
            os.kill(os.getpid(), how)
        return true(*args, **kwargs)

    train.training_step = training_step


def torchrun(argv: list[str], fault: Callable | None = None) -> Ended:
    """A command in two processes of one group."""
    return Processes(argv, argv, fault=fault).end()


def last_line(ended: Ended) -> str:
    """The line of error: the last of the first process, after its progress; the others say nothing."""
    assert ended.err[1] == "" and ended.out[1] == "" and "Traceback" not in ended.err[0], ended.err
    return ended.err[0].splitlines()[-1]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run that must not depend on when, how often or in how many parts it was started."""
    names = (".owner", ".lock", "manifest.json")
    found = {p.relative_to(folder): p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in names}
    return {str(name): path.read_bytes() for name, path in found.items() if name.parts[0] != "shards"}


def entries(ledger: str = "ledger.sqlite") -> list[dict[str, Any]]:
    with Ledger(ledger) as held:
        return [{key: value for key, value in row.items() if key != "id"} for row in held.entries()]


# Data-parallel training


def one_by_one(number: int) -> None:
    """Sequences run one at a time, as those of a large model do: gradients accumulate within a rank."""
    FEED_FORWARD_AT_ONCE["cpu"] = 1


@pytest.mark.parametrize("config", ["", "count_padding = true\nlogit_bias = true\npad_side = 'left'\n"])
def test_two_processes_train_the_curve_of_one_and_are_charged_what_it_is_charged(place, config):
    """Five windows a step and three or more a validation, so that the shares differ: a mean of means would show."""
    Path("c.toml").write_text(config)
    argv = [*TRAIN, "--config", "c.toml"]
    assert run.main(argv) == 0
    Path("two").mkdir()
    for name in ("waves.h5", "c.toml"):
        Path("two", name).symlink_to(place / name)
    os.chdir("two")
    ended = torchrun(argv, one_by_one)
    assert ended.codes == [0, 0], ended.err
    assert ended.out[1] == ended.err[1] == "" and "validation loss" in ended.out[0]
    os.chdir("..")
    for name in ("metrics.jsonl", "gradients.jsonl"):
        one, two = lines(CELL / name), lines("two" / CELL / name)
        assert [line.keys() for line in one] == [line.keys() for line in two]
        for a, b in zip(one, two, strict=True):
            for key, value in a.items():
                expected = value if isinstance(value, int) else pytest.approx(value, rel=1e-5, abs=1e-5)
                assert b[key] == expected, (name, key, a["step"])
    result = json.loads(("two" / CELL / "result.json").read_text())
    assert result["flops"] == result["predicted_flops"]
    assert entries("two/ledger.sqlite") == entries()
    assert entries()[-1]["total"] == sum(result["flops"].values()) and entries()[-1]["state"] == "settled"
    assert contents(Path("two/t")).keys() == contents(Path("t")).keys()


def test_a_group_of_processes_stopped_by_a_signal_to_one_goes_on_to_the_same_bytes(place):
    """With dropout: every rank draws its own, from the seed, the step and its number."""
    argv = [*TRAIN, "--steps", "16", "--val-every", "5", "--dropout", "0.2", "--ledger"]
    assert torchrun([*argv, "a.sqlite"]).codes == [0, 0]
    Path("t").rename("whole")
    ended = torchrun([*argv, "b.sqlite"], partial(signalled, 1, 7, signal.SIGTERM))
    assert ended.codes == [130, 130] and "interrupted" in last_line(ended)
    assert not (CELL / "result.json").exists() and (CELL / "checkpoint").is_dir()
    assert torchrun([*argv, "b.sqlite"]).codes == [0, 0]
    assert {k: v for k, v in contents(Path("t")).items() if k != "results.md"} == {
        k: v for k, v in contents(Path("whole")).items() if k != "results.md"
    }
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
    assert ended.codes == [code, code], ended.err
    assert said in last_line(ended)
    if fault is None:  # nothing had begun
        assert ended.err[0].count("\n") == 1
    if fault in (not_finite, disk_full, overspent):
        assert entries()[-1]["state"] == ("failed" if fault is not_finite else "interrupted")
        assert not (CELL / "result.json").exists()


def killed(victim: int, where: str, call: int, number: int) -> None:
    """Let one process die in a call of one of the model's methods."""
    true, calls = getattr(Qwen, where), []

    def dies(*args, **options):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return true(*args, **options)

    if number == victim:
        setattr(Qwen, where, dies)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(("where", "call"), [("loss", 1), ("loss", 4), ("token_losses", 1), ("from_pretrained", 1)])
def test_a_process_that_is_killed_leaves_none_waiting(place, victim, where, call):
    """In the first step, a later one, a validation, and before any; the second is silent, as torchrun speaks then."""
    ended = torchrun(TRAIN, partial(killed, victim, where, call))
    assert ended.codes == ([4, -signal.SIGKILL] if victim else [-signal.SIGKILL, 4])
    assert "Traceback" not in ended.err[1 - victim]
    assert not victim or "another process of the group has ended" in last_line(ended)


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
    alone = Processes(TRAIN, environment={"WORLD_SIZE": "2"}, fault=announced)
    until = time.monotonic() + 60
    while not Path("waits").exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(alone.running[0].pid, how)
    assert alone.end().codes == [-how] and not Path("t").exists()


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
    line = refused(capsys, TRAIN)
    assert line == f"{name} is {value!r}: expected a whole number from {expected}, as torchrun sets it\n"


def test_a_study_carries_its_best_cell_forward_in_every_process(place):
    """The others learn it from the first one, and wait while that one judges."""
    sizes = "contexts = [16]\ncontext_steps = 2\nforecast_cells = true\npoints = 20\nhorizon = 2\nshown = [15]\n"
    Path("study.toml").write_text(sizes)
    argv = [*GRID[1:], "--protocol", "default", "--config", "study.toml", "--steps", "2", "--ranks", "2"]
    assert run.main(["grid", *argv]) == 0
    ended = torchrun(["context", *argv, "--allow-drift"])  # the grid ran in one process
    assert ended.codes == [0, 0], ended.err
    losses = {row["name"]: float(row["validation_loss"]) for row in table(Path("g/results.csv"))}
    best = min((name for name in losses if name.startswith("lr")), key=lambda name: losses[name])
    result = json.loads(Path("g/contexts/16/result.json").read_text())
    assert f"lr{result['lr']:g}-r{result['rank']}" == best
    assert Path("g/contexts/16/evaluation/evaluation.json").is_file()
    assert all(row["state"] == "settled" for row in entries())


def test_without_torchrun_there_is_no_group_and_with_it_every_rank_draws_its_own(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # of something else: torchrun sets RANK, MASTER_ADDR, MASTER_PORT too
    with parallel.joined("train", trains=True) as group:
        assert group is parallel.ALONE and not torch.distributed.is_initialized()
    drawn = {}
    for rank, step in [(0, 0), (1, 0), (0, 1), (1, 0)]:
        parallel.Ranks(rank, 2).draw(7, step)
        drawn.setdefault((rank, step), set()).add(torch.rand(1).item())
    assert [len(one) for one in drawn.values()] == [1, 1, 1] and len(set.union(*drawn.values())) == 3


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_torchrun_starts_it_as_the_readme_says(place):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "experiments.run", *TRAIN, "--json"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["flops"] == result["predicted_flops"] and result["validation_loss"] < 2
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
    Path("parts/waves.h5").symlink_to(place / "waves.h5")
    os.chdir("parts")
    ended = Processes(*(shard(f"{i}/3") for i in (1, 2, 3)), apart=True).end()
    assert ended.codes == [0, 0, 0], ended.err
    with Ledger("ledger.sqlite") as ledger:
        totals = ledger.totals()
    assert totals["spent"] == 0 and totals["reserved"] == sum(row["total"] for row in entries("../ledger.sqlite"))
    assert not Path("g/results.csv").exists()
    for _ in range(2):  # merging again charges nothing
        assert run.main(["grid", "--merge", "--out", "g"]) == 0
        assert capsys.readouterr().out == shown
        assert contents(Path("g")) == contents(Path("../g"))
        assert sorted(entries(), key=str) == sorted(entries("../ledger.sqlite"), key=str)
    assert run.main(GRID) == 0  # the whole grid has nothing left to do
    assert sorted(entries(), key=str) == sorted(entries("../ledger.sqlite"), key=str)


def refused(capsys, argv: list[str], code: int = 2) -> str:
    capsys.readouterr()
    assert run.main(argv) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    return captured.err


def test_missing_cells_are_named_and_shards_and_a_whole_run_keep_out_of_each_others_way(place, capsys):
    assert "has no shards" in refused(capsys, [*GRID, "--merge"])
    assert "at most 4 shards" in refused(capsys, shard("1/5"))
    assert not Path("g").exists() and not Path("ledger.sqlite").exists()
    assert run.main(shard("2/2")) == 0
    error = refused(capsys, [*GRID, "--merge"])
    assert "3 of 5 runs are not finished: untrained, lr0.001-r2, lr0.001-r4:" in error
    assert "dealt to 2 shards" in refused(capsys, GRID)
    assert "dealt to 2 shards" in refused(capsys, shard("1/3"))
    assert "seed is 0, now 1" in refused(capsys, shard("1/2", "--seed", "1"))
    with claimed(Shard(1, 2).folder(Path("g"))):
        assert "is at work in it" in refused(capsys, shard("1/2"))
    with claimed(Path("g")):
        assert "is at work in it" in refused(capsys, shard("1/2"))
    assert run.main(shard("1/2")) == 0
    with claimed(Shard(1, 2).folder(Path("g"))):
        assert "is at work in it" in refused(capsys, [*GRID, "--merge"])
    Ledger("other.sqlite").close()
    assert "knows no shards of g" in refused(capsys, [*GRID, "--merge", "--ledger", "other.sqlite"])
    assert run.main([*GRID, "--merge"]) == 0
    assert "the shards are merged" in refused(capsys, shard("1/2"))


def test_no_shard_begins_unless_the_whole_grid_fits_and_what_it_needs_is_set_aside(place, capsys):
    assert run.main([*GRID, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    total = int(printed.partition("together ")[2].split()[0].replace(",", ""))
    assert run.main(shard("2/2", "--dry-run")) == 0
    assert capsys.readouterr().out.count("lr0.01-r") == 2  # its own cells alone
    assert f"{total - 1:,} are left" in refused(capsys, shard("2/2", "--budget", str(total - 1)), code=3)
    assert not Path("g/cells").exists() and not Path("g/untrained").exists()
    assert run.main(shard("2/2", "--budget", str(total))) == 0
    assert "0 are left" in refused(capsys, [*TRAIN, "--budget", str(total)], code=3)
    allowances = json.loads(Path("g/shards/plan.json").read_text())["allowances"]
    assert sum(allowances) == total
    with Ledger("g/shards/2-of-2/ledger.sqlite") as own:
        assert own.totals()["spent"] == allowances[1]


def test_a_shard_that_was_killed_goes_on_with_what_the_kill_wasted_added_to_its_allowance(place, capsys):
    more = ["--steps", "9", "--val-every", "4", "--ranks", "2"]
    started = Processes(shard("1/2", *more), apart=True, fault=partial(signalled, 0, 7, signal.SIGKILL))
    assert started.end().codes == [-signal.SIGKILL]
    first = json.loads(Path("g/shards/plan.json").read_text())
    assert run.main(shard("1/2", *more)) == run.main(shard("2/2", *more)) == 0
    second = json.loads(Path("g/shards/plan.json").read_text())
    assert run.main(["grid", "--merge", "--out", "g"]) == 0
    wasted = sum(row["wasted"] for row in entries())
    assert second["allowances"][0] - first["allowances"][0] == wasted > 0
    assert sum(row["total"] for row in entries()) == sum(second["allowances"])


def test_a_cell_that_a_run_without_shards_has_begun_is_left_to_it(place, capsys):
    more = ["--steps", "9"]
    started = Processes([*GRID, *more], apart=True, fault=partial(signalled, 0, 5, signal.SIGTERM))
    assert started.end().codes == [130]
    assert "lr0.001-r2: was begun without shards" in refused(capsys, shard("1/2", *more))
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
