"""A run that was stopped continues to the bits of one that was not; in other settings or elsewhere it is refused.

The data set has 14 training windows and a batch has 4 of them: steps 4 and 11 straddle two epochs, and step 7 ends the
second.
"""

import dataclasses
import itertools
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from waves import CLOCK, Killed, contents, inputs, no_figures, refused

from data.windows import batch_indices
from experiments import run
from experiments.accounting.ledger import Ledger
from experiments.run_folder import files
from experiments.run_folder.folder import Record
from experiments.settings.record import Settings
from experiments.study.manifest import FREE, check_drift, environment
from experiments.study.plan import Plan
from experiments.study.run import run_stages
from experiments.training import cell as train
from experiments.training import parallel
from experiments.training.parallel import ALONE
from experiments.verbs import arguments
from qwen_min.fast.limits import FEED_FORWARD_AT_ONCE

STEPS = 12
CELL = Path("cells/lr0.01-r2")
BEGUN = {"lr": (1e-2,), "ranks": (2,), "steps": STEPS, "batch_size": 4, "context": 96, "stride": 1.0, "val_every": 6}
BEGUN |= {"val_series": 1, "checkpoint_every": 2, "dropout": 0.3, "points": 5, "horizon": 3, "forecast_series": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with twenty damped waves of 8 points, and a tiny model."""
    return inputs(8, tmp_path_factory.mktemp("data"))


def begun_with(data: Path, **changes) -> Settings:
    return Settings(data=str(data / "waves.h5"), model=str(data / "model"), **BEGUN | changes)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch) -> None:
    no_figures(monkeypatch)


STARTS = itertools.count(0, 1000)


def train_cell(settings: Settings, out: str = "run", allow_drift: bool = False) -> None:
    """Run the cell with a clock that begins somewhere and goes on by a second whenever it is read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "time", SimpleNamespace(perf_counter=itertools.count(next(STARTS)).__next__))
        run_stages(settings, Path(out), Path("ledger.sqlite"), lambda record: None, ("grid",), ALONE, allow_drift)


def clock() -> list[dict[str, Any]]:
    return files.read_jsonl(Path("run", CELL, CLOCK))


def row() -> dict:
    with Ledger("ledger.sqlite") as ledger:
        return ledger.latest("run", CELL.name)


def stops(monkeypatch, step: int, how: str) -> None:
    """Stop the cell once, after a step: as Ctrl-C does, which leaves a checkpoint, or as a kill."""
    true, done = train._State.train, []

    def stopping(self, *arguments):
        line = true(self, *arguments)
        if line["step"] == step and not done:
            done.append(step)
            if how == "kill":
                raise Killed
            os.kill(os.getpid(), signal.SIGINT)
        return line

    monkeypatch.setattr(train._State, "train", stopping)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The run that was never stopped, by what cuts its batches: its files, its row of the ledger, its clock."""
    made = {}

    def files_and_row(rows: int):
        if rows not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(tmp_path_factory.mktemp("whole"))
                train_cell(begun_with(data))
                made[rows] = contents("run"), row(), clock()
        return made[rows]

    return files_and_row


HERE = [
    *((1, "kill", 4), (3, "interrupt", 4), (4, "kill", 3), (4, "interrupt", 3), (5, "interrupt", 4)),
    *((7, "kill", 4), (7, "interrupt", 3), (8, "kill", 3), (11, "interrupt", 4), (11, "kill", 3)),
]
EVERYWHERE = itertools.product(range(1, STEPS), ("interrupt", "kill"), (4, 3))
POINTS = [pytest.param(*p, marks=[] if p in HERE else pytest.mark.endurance) for p in EVERYWHERE]


@pytest.mark.parametrize(("step", "how", "rows"), POINTS)
def test_a_run_stopped_at_10_points_of_3_epochs_ends_in_the_bits_of_a_whole(data, whole, monkeypatch, step, how, rows):
    """`rows` sequences run at once: with 3 of them a batch is a group of three and one of one."""
    width = files.read_json(data / "model" / "config.json")["intermediate_size"]
    monkeypatch.setitem(FEED_FORWARD_AT_ONCE, "cpu", rows * BEGUN["context"] * width)
    expected, settled, seconds = whole(rows)
    assert [line["seconds"] for line in seconds] == [*range(1, STEPS + 2 + 1)]  # of the steps and two validations
    settings = begun_with(data)
    with monkeypatch.context() as patch:
        stops(patch, step, how)
        with pytest.raises(Killed if how == "kill" else KeyboardInterrupt):
            train_cell(settings)
    after = step if how == "interrupt" else (step - 1) // 2 * 2
    state = Record(Path("run", CELL, "checkpoint", "state.json"))
    assert state.held.get("step", 0) == after
    torch.manual_seed(999)  # as another process has it
    train_cell(settings)
    assert contents("run") == expected and clock() == seconds
    entry = row()
    assert {**entry, "wasted": 0, "total": 0} == {**settled, "total": 0}
    assert entry["wasted"] == entry["training"] // STEPS * (step - after)


def test_three_epochs_are_three_orders_and_a_step_straddles_two(data):
    """What the row above rests on."""
    task = Plan(begun_with(data)).task
    assert len(task.train_windows) == 14
    order = np.concatenate([batch_indices(14, 4, step, 0) for step in range(STEPS)])[:42].reshape(3, 14)
    assert [sorted(epoch) for epoch in order.tolist()] == [list(range(14))] * 3
    assert len({tuple(epoch) for epoch in order.tolist()}) == 3


def test_what_a_step_draws_depends_on_the_seed_the_step_and_the_rank_alone(monkeypatch):
    """Bug: a checkpoint kept the CPU's generator and not the GPU's, so that a run with dropout there went on with other
    draws. torch.manual_seed sets those of every device."""
    drawn = []
    for before, seed, step in [(1, 0, 3), (2, 0, 3), (2, 0, 4), (2, 1, 3)]:
        torch.manual_seed(before)
        ALONE.draw(seed, step)
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3
    parallel.Ranks(1, 2).draw(0, 3)
    assert torch.rand(1).item() not in drawn


# The rest is of a run that is stopped after its second step, and of one that is finished; each test has copies.


@pytest.fixture(scope="module")
def places(data, tmp_path_factory) -> dict[str, Path]:
    """A folder with the run, its ledger and its `settings.toml`: begun, and finished."""
    made = {}
    for name in ("begun", "finished"):
        made[name] = tmp_path_factory.mktemp(name) / "place"
        made[name].mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(made[name])
            no_figures(patch)
            Path("settings.toml").write_text(begun_with(data, steps=4, forecast_cells=False).to_toml())
            if name == "begun":
                stops(patch, 2, "interrupt")
            assert run.main(GRID) == (130 if name == "begun" else 0)
    return made


GRID = ["grid", "--config", "settings.toml", "--out", "run"]


@pytest.fixture(params=["begun"])
def begun(request, places, tmp_path, monkeypatch) -> Path:
    """The folder of a copy of the run that was begun, or of the one that a test asks for, from beside it."""
    shutil.copytree(places[request.param], tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return Path("run")


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (None, None),  # of a version that had none
        ('{"seconds": 1.0, "step": 1}\n', None),
        ('{"seconds": "1", "step": 1}\n', "clock.jsonl: line 1: seconds is '1': expected a number"),
        ('{"seconds": 1.0}\n', "clock.jsonl: line 1: has no step: expected"),
        ("x\n", "clock.jsonl: line 1: not valid JSON"),
    ],
)
def test_a_run_without_a_whole_clock_goes_on_without_one_and_one_that_is_damaged_is_refused(begun, capsys, held, said):
    path = Path("run", CELL, CLOCK)
    path.unlink() if held is None else path.write_text(held)
    if said:
        assert said in refused(capsys, *GRID)
    else:
        assert run.main(GRID) == 0 and clock() == []


# Another value of every field; those of `FREE` come last.
CHANGED = {
    **{"protocol": "default", "revision": "main", "seed": 1, "split": "shuffled", "split_seed": 1},
    **{"fractions": (0.6, 0.2, 0.2), "scaling": "context percentile", "alpha": 2.0, "decimals": 3},
    **{
        "trailing_zeros": False,
        "point": False,
        "separator": " ",
        "windows": "anywhere",
        "stride": 0.5,
        "pad_side": "left",
        "count_padding": True,
        "vocabulary": "symbols",
        "digit_weights": (1.0, 0.5),
        "number_loss": 0.3,
    },
    **{"preset": "reports", "lr": (5e-3,), "ranks": (4,), "skip": ("lr0.1-r2",), "steps": 9, "batch_size": 3},
    **{"context": 64, "dropout": 0.2, "logit_bias": True, "val_every": 1, "checkpoint_every": 3, "val_series": 2},
    **{"default_lr": 1e-3, "default_rank": 2, "default_steps": 3, "contexts": (64, 96), "context_steps": 3},
    **{"final_steps": 9, "points": 4, "horizon": 2, "forecast_series": 2, "forecast_cells": True, "shown": (15,)},
    **{"shown_series": 1, "constrained": False, "num_samples": 3, "temperature": 0.5, "top_k": 3, "top_p": 0.5},
    **{"repetition_penalty": 1.5, "shortened": 0.5, "targets": ("q_proj",), "lora_alpha": 4.0, "rank_stabilised": True},
    **{"schedule": "cosine", "warmup": 1.0, "decay": 0.5, "final_lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.1},
    **{"clip": 1.0, "keep": "best", "point_forecast": "mean", "patience": 2, "scratch": "small", "control_lr": 1e-2},
    **{"origins": 2, "rungs": (2, 4), "survivors": 0.5, "over": ("clip=0|1",), "keep_series": 2},
    **{"seeds": 2, "origin_step": 3, "id_column": "lake", "time_column": "day", "target": ("level",), "wide": True},
    **{"fill": "linear", "beyond": "clip"},
    **{"model": "model", "offline": True, "device": "cuda", "dtype": "float32", "budget": 10**16, "data": "data.h5"},
    **{"best_lr": 1e-3, "best_rank": 4, "best_context": 64, "compile": True, "compute_dtype": "bfloat16"},
}
OF_THE_ENVIRONMENT = ("device", "dtype", "compute_dtype", "compile")


def test_there_is_a_case_for_every_field_of_the_settings():
    assert CHANGED.keys() == {field.name for field in dataclasses.fields(Settings)}
    assert set(CHANGED) - set(list(CHANGED)[: -len(FREE)]) == set(FREE)


def change(name: str) -> None:
    settings = Settings.from_toml("settings.toml").updated({name: CHANGED[name]})
    Path("settings.toml").write_text(settings.to_toml())


@pytest.mark.parametrize("name", [name for name in CHANGED if name not in FREE])
def test_a_resume_with_a_changed_field_is_refused_by_its_name_with_the_old_and_the_new_value(begun, capsys, name):
    old = getattr(Settings.from_toml("settings.toml"), name)
    change(name)
    line = refused(capsys, *GRID)
    expected = "expected the settings the run began with, or another --out"
    assert line == f"run/config.toml: {name} is {old!r}, now {CHANGED[name]!r}: {expected}\n"


@pytest.mark.parametrize("begun", ["finished"], indirect=True)
@pytest.mark.parametrize("name", [name for name in FREE if name not in OF_THE_ENVIRONMENT])
def test_a_field_that_makes_no_other_run_may_change(begun, data, name):
    before = {path: data for path, data in contents(begun).items() if path.startswith(("cells", "untrained"))}
    shutil.copytree(data / "model", "model")
    shutil.copy(data / "waves.h5", "data.h5")
    change(name)
    assert run.main(GRID) == 0
    assert before.items() <= contents(begun).items() and len(before) > 6


ENVIRONMENT = {
    **{"torch": "1.0", "device": "NVIDIA H200", "dtype": "bfloat16", "compute_dtype": "bfloat16", "threads": 77},
    **{"processes": 4, "machine": "vax", "processor": "80286", "bfloat16_kernel": "yes", "compiled": "yes"},
}


def rewrite(out: Path, **changes) -> None:
    held = manifest(out)
    files.write_json(out / "manifest.json", held | {"environment": held["environment"] | changes})


def manifest(out: Path) -> dict:
    return files.read_json(out / "manifest.json")


def test_a_fresh_run_records_its_environment_and_no_drift(begun):
    now = environment(Settings())
    assert manifest(begun)["environment"] == now and "drift" not in manifest(begun)
    assert now.keys() == ENVIRONMENT.keys()
    assert (now["torch"], now["device"], now["threads"], now["processes"]) == (torch.__version__, "cpu", 1, 1)
    assert (now["dtype"], now["compute_dtype"]) == ("stored", "float32")


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_a_resume_where_one_of_10_things_differs_is_refused_by_name_and_goes_on_with_allow_drift(begun, capsys, name):
    now = environment(Settings())[name]
    rewrite(begun, **{name: ENVIRONMENT[name]})
    line = refused(capsys, *GRID)
    expected = "expected the same, or --allow-drift, which continues with bits that may differ"
    assert line == f"run/manifest.json: {name} was {ENVIRONMENT[name]}, is {now}: {expected}\n"
    train_cell(Settings.from_toml("settings.toml"), allow_drift=True)
    assert (begun / CELL / "result.json").is_file()
    (change,) = manifest(begun)["drift"]
    assert change.pop("begun")[:2] == "20"
    assert change == {"what": name, "was": ENVIRONMENT[name], "now": now}
    assert manifest(begun)["environment"][name] == ENVIRONMENT[name]
    train_cell(Settings.from_toml("settings.toml"))  # where it went on last
    assert len(manifest(begun)["drift"]) == 1


def test_every_change_of_the_environment_is_listed_there_and_back(begun):
    settings, now = Settings.from_toml("settings.toml"), environment(Settings())
    rewrite(begun, threads=8, torch="1.0")
    check_drift(settings, begun, allowed=True)
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="json: threads was 1, is 2: expected"):
            check_drift(settings, begun, allowed=False)
        check_drift(settings, begun, allowed=True)
    finally:
        torch.set_num_threads(1)
    changes = [(change["what"], change["was"], change["now"]) for change in manifest(begun)["drift"]]
    assert changes == [("torch", "1.0", now["torch"]), ("threads", 8, 1), ("threads", 1, 2)]


def test_a_run_of_a_version_that_recorded_no_environment_says_so_and_goes_on_only_with_allow_drift(begun, capsys):
    before = manifest(begun)
    del before["environment"]
    files.write_json(begun / "manifest.json", before)
    assert "threads was not recorded, is 1, " in refused(capsys, *GRID)
    check_drift(Settings.from_toml("settings.toml"), begun, allowed=True)
    assert len(manifest(begun)["drift"]) == 10


@pytest.mark.parametrize("damage", [{"environment": 3}, {"drift": 3}, {"drift": [3]}, {"drift": [{"what": "torch"}]}])
def test_a_manifest_whose_environment_is_damaged_is_refused(begun, capsys, damage):
    files.write_json(begun / "manifest.json", manifest(begun) | damage)
    assert "run/manifest.json: has no environment and drift: expected a manifest" in refused(capsys, *GRID)


@pytest.mark.parametrize(
    "verb", [["grid"], ["train"], ["grid", "--shard", "1/1"], *([stage] for stage in ("baseline", "default", "study"))]
)
def test_every_verb_that_trains_asks_for_allow_drift(begun, capsys, verb):
    rewrite(begun, threads=77)
    if "--shard" in verb:
        shutil.rmtree(begun / "cells")
        shutil.rmtree(begun / "untrained")
    argv = [*verb, "--config", "settings.toml", "--out", "run"]
    if verb[0] in ("baseline", "default", "study"):  # which say a protocol of their own
        config = begun / "config.toml"
        config.write_text(Settings.from_toml(config).updated({"protocol": "default"}).to_toml())
    before = contents("run")
    assert run.main(argv) == 2
    assert "run/manifest.json: threads was 77, is 1: expected the same, or --allow-drift" in capsys.readouterr().err
    changed = {name for name, data in contents("run").items() if before.get(name) != data}
    assert not any("checkpoint" in name or "result" in name for name in changed) and "drift" not in manifest(begun)
    assert vars(arguments.parser().parse_args([*argv, "--allow-drift"]))["allow_drift"] is True


def test_a_run_begun_on_a_gpu_goes_on_without_one_only_with_allow_drift(begun, capsys):
    """Bug: its config.toml could not even be read where there is no GPU."""
    config = begun / "config.toml"
    config.write_text(Settings.from_toml(config).updated({"device": "cuda", "dtype": "bfloat16"}).to_toml())
    rewrite(begun, device="NVIDIA H200", dtype="bfloat16", compute_dtype="bfloat16")
    line = refused(capsys, *GRID)
    assert "device was NVIDIA H200, is cpu, dtype was bfloat16, is stored, compute_dtype was bfloat16, is" in line
    assert run.main([*GRID, "--allow-drift"]) == 0
    assert [change["what"] for change in manifest(begun)["drift"]] == ["device", "dtype", "compute_dtype"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_here_is_refused_before_anything_is_written(begun, capsys):
    for argv in ([*GRID, "--device", "cuda"], ["generate", "--prompt", "1", "--device", "cuda"]):
        assert "device is 'cuda': expected cpu, as torch finds no CUDA device here" in refused(capsys, *argv)
