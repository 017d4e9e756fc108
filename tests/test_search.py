"""A search: cells of a grid in rungs, each going on from its checkpoint; priced, resumed, judged, shown."""

import shutil
import time
from pathlib import Path

import pytest
from waves import FIGURES, INPUTS, contents, entries, inputs, no_figures, refused, stopped_after_each_step

from experiments import plots, run
from experiments.accounting.ledger import STAGES
from experiments.plots import training
from experiments.run_folder import files
from experiments.run_folder.errors import RunFailed
from experiments.run_folder.owner import owner_of
from experiments.run_folder.status import status, text
from experiments.settings.record import POCKET
from experiments.training import cell as train

SMALL = [*INPUTS, "--context", "96", "--batch-size", "2", "--val-series", "1", "--val-every", "4"]
RATES = [*SMALL, "--lr", "1e-3", "1e-2", "5e-3", "--ranks", "2"]
SEARCH = ["grid", *RATES, "--rungs", "3,5,7", "--out", "search"]
NAMES = ["lr0.001-r2", "lr0.01-r2", "lr0.005-r2"]
RUN = "metrics.jsonl", "gradients.jsonl", "result.json", "adapter/adapter_model.safetensors"


@pytest.fixture(autouse=True)
def here(monkeypatch) -> None:
    inputs(8)
    no_figures(monkeypatch)


def spent() -> int:
    return sum(row[stage] for row in entries() for stage in STAGES)


def same(one: str, other: str, *names: str) -> None:
    assert [Path(one, name).read_bytes() for name in names] == [Path(other, name).read_bytes() for name in names]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "warmup-stable-decay"])
def test_a_survivor_is_to_the_byte_a_run_at_once_and_a_search_stopped_each_step_one_not_stopped(schedule, monkeypatch):
    recipe = ["--schedule", schedule, "--warmup", "2", "--decay", "2", "--clip", "0.5", "--dropout", "0.1"]
    assert run.main([*SEARCH, *recipe]) == 0
    before, cost = contents("search"), spent()
    best = next(name for name in NAMES if Path("search/cells", name, "result.json").exists())
    one = ["train", *SMALL, *recipe, "--lr", best[2:].partition("-")[0], "--rank", "2"]
    assert run.main([*one, "--steps", "7", "--out", "whole"]) == 0
    same(f"search/cells/{best}", f"whole/cells/{best}", *RUN)
    if schedule == "warmup-stable-decay":  # what it was judged by after 3 steps is a whole run of 5
        assert run.main([*one, "--steps", "5", "--out", "judged"]) == 0
        same(f"search/rungs/3/{best}", f"judged/cells/{best}", *RUN)
    shutil.rmtree("search")
    Path("ledger.sqlite").unlink()
    assert stopped_after_each_step(monkeypatch, [*SEARCH, *recipe]) > 12
    assert contents("search") == before
    assert spent() == cost and {row["state"] for row in entries()} == {"settled"}


def test_shards_that_run_in_turns_end_in_the_bytes_of_one_search_and_charge_the_same(monkeypatch, capsys):
    recipe = ["--schedule", "warmup-stable-decay", "--survivors", "2/3"]
    assert run.main([*SEARCH, *recipe]) == 0
    before, cost = contents("search"), spent()
    shutil.rmtree("search")
    Path("ledger.sqlite").unlink()
    said = []
    for _ in range(3):
        for shard in ("1/2", "2/2"):
            stopped_after_each_step(monkeypatch, [*SEARCH, *recipe, "--shard", shard])
            said.append(capsys.readouterr().out.rpartition("when all have run: ")[2].strip())
        if len(said) == 2:
            line = refused(capsys, "grid", "--merge", "--out", "search")
            assert "search: the search is before its rung 5: expected all 2 shards to have run again" in line
    waits = [f"run each again: the rung at step {step} waits for other shards" for step in (3, 5, 7)]
    assert said == [*waits, *["grid --merge --out search"] * 3]
    assert run.main(["grid", "--merge", "--out", "search"]) == 0
    assert contents("search") == before and spent() == cost
    assert {row["state"] for row in entries()} == {"settled"} and not any(row["reserved"] for row in entries())


@pytest.mark.parametrize("keep", ["last", "best"])
def test_cells_are_judged_at_each_rung_and_a_third_of_them_goes_on(keep):
    assert run.main([*SEARCH, "--survivors", "2/3", "--lr", "1e-3", "1e-2", "0.5", "--keep", keep]) == 0
    _, table = files.read_csv("search/results.csv")
    found = {row["cell"]: [row[f"loss_at_{rung}"] for rung in (3, 5, 7)] for row in table}
    judged = {
        name: [files.read_json(path)["validation_loss"] if (path := Path("search", at)).exists() else ""
               for at in (f"rungs/3/{name}/result.json", f"rungs/5/{name}/result.json", f"cells/{name}/result.json")]
        for name in ("lr0.001-r2", "lr0.01-r2", "lr0.5-r2")
    }  # fmt: skip
    assert found == {"untrained": ["", "", ""]} | {name: [*map(str, losses)] for name, losses in judged.items()}
    first = sorted(judged, key=lambda name: judged[name][0])
    second = sorted(first[:2], key=lambda name: judged[name][1])
    reached = {name: sum(loss != "" for loss in losses) for name, losses in judged.items()}
    assert reached == {first[2]: 1, second[1]: 2, second[0]: 3}
    shown = {row.name: (row.state, row.step) for row in status(Path("search")).runs}
    assert shown == {"untrained": ("done", 0), first[2]: ("done", 3), second[1]: ("done", 5), second[0]: ("done", 7)}
    assert f"Best: `{second[0]}`" in Path("search/results.md").read_text()
    _, flops = files.read_csv("search/flops.csv")
    total = next(row for row in flops if (row["stage"], row["part"]) == ("all", "total"))
    assert int(total["flops"]) == int(total["predicted"]) == spent()


def test_a_search_is_priced_at_what_it_costs_and_refused_one_flop_below_that_before_anything_runs(capsys):
    recipe = ["--schedule", "warmup-stable-decay"]
    assert run.main([*SEARCH, *recipe, "--dry-run"]) == 0
    total = int(capsys.readouterr().out.partition("together at most ")[2].partition(" ")[0].replace(",", ""))
    assert not Path("search").exists() and not Path("ledger.sqlite").exists()
    assert run.main([*SEARCH, *recipe, "--budget", str(total - 1)]) == 3
    assert f"search needs {total:,} FLOPs" in capsys.readouterr().err and not Path("search/untrained").exists()
    assert run.main([*SEARCH, *recipe, "--budget", str(total)]) == 0
    assert spent() == total
    assert run.main([*SEARCH, *recipe, "--budget", "1"]) == 0  # nothing is left to do


def test_of_a_search_that_runs_status_has_cells_that_wait_as_paused_and_counts_to_the_end_of_each(monkeypatch):
    """Bug: they were interrupted, and each was counted as if it went on to the last rung."""
    true, seen = train.training_step, []

    def watched(*arguments):
        seen.append((status(Path("search")), owner_of(Path("search")), spent(), time.time()))
        return true(*arguments)

    monkeypatch.setattr(train, "training_step", watched)
    start = time.time()
    assert run.main([*SEARCH, "--schedule", "warmup-stable-decay"]) == 0
    at = next(at for at, (found, *_) in enumerate(seen) if found.runs[2].step == 1)
    found, owner, _, now = seen[at]  # the second cell has made a step
    assert [row.state for row in found.runs] == ["done", "paused", "running", "waiting"]
    most, total = found.totals()["predicted_flops"], spent()
    assert most == total < sum(row.predicted_flops for row in found.runs)  # as if each went on to the last rung
    assert f" of at most {total:.3e} FLOPs" in text(found) and " at most " not in text(ended := status(Path("search")))
    assert ended.totals()["flops"] == ended.totals()["predicted_flops"] == total > sum(row.flops for row in ended.runs)
    began = next(cost for later, _, cost, _ in seen if later.runs[2].state == "running")
    assert owner.left == spent() - began  # the price of all that was run after that
    flops = found.runs[2].flops
    assert flops > 0 and found.seconds_left is not None
    assert 0 < found.seconds_left * flops / (owner.left - flops) < now - start


def test_of_cells_at_other_prices_the_dearest_are_reckoned_to_go_on_and_here_they_do(capsys):
    search = ["grid", *SMALL, "--lr", "1e-2", "--ranks", "2", "--rungs", "2,4", "--survivors", "1/2", "--out", "s"]
    search += ["--model", str(POCKET), "--over", "context=48|96", "--over", "targets=q_proj|q_proj+v_proj"]
    assert run.main([*search, "--dry-run"]) == 0
    out = capsys.readouterr().out
    names = [f"lr0.01-r2-context={c}-targets={t}" for c in (48, 96) for t in ("q_proj", "q_proj+v_proj")]
    assert out.splitlines()[0] == ", ".join(names)
    assert run.main(search) == 0
    assert spent() == int(out.partition("together at most ")[2].partition(" ")[0].replace(",", ""))
    for name in names:
        result = files.read_json(f"s/rungs/2/{name}/result.json")
        assert result["flops"] == result["predicted_flops"]
    settings = [files.read_json(f"s/rungs/2/{name}/adapter/adapter_config.json")["target_modules"] for name in names]
    assert settings == [["q_proj"], ["q_proj", "v_proj"]] * 2


def test_the_page_of_a_search_has_its_rungs_and_its_figure(monkeypatch):
    for name in FIGURES:
        monkeypatch.setattr(plots, name, getattr(training, name))
    assert run.main([*SEARCH, "--rungs", "1,2"]) == 0
    drawn = Path("search/figures/search.png").read_bytes()
    assert run.main(["report", "search"]) == 0
    assert Path("search/figures/search.png").read_bytes() == drawn
    _, shown = files.read_csv("search/tables/rungs.csv")
    _, table = files.read_csv("search/results.csv")
    assert [row.get("loss_at_1") for row in shown] == [row["loss_at_1"] for row in table[1:]]


def test_of_equal_losses_the_first_cell_goes_on():
    """A constant rate falls to nothing, so `final_lr` makes no difference."""
    search = [*SEARCH, "--lr", "1e-2", "--rungs", "1,2", "--survivors", "0.5", "--over", "final_lr=0.5|0.25"]
    assert run.main(search) == 0
    assert [path.name for path in Path("search/cells").glob("*/result.json") for path in [path.parent]] == [
        "lr0.01-r2-final_lr=0.5"
    ]


def test_a_cell_that_fails_is_out_its_flops_are_spent_and_the_search_goes_on(monkeypatch, capsys):
    true = train.training_step

    def failing(model, windows, chosen, optimizer, *options):
        done = true(model, windows, chosen, optimizer, *options)
        if optimizer.param_groups[0]["lr"] in fails and any("exp_avg" in s for s in optimizer.state.values()):
            raise RunFailed("loss is nan: expected a finite number")
        return done

    monkeypatch.setattr(train, "training_step", failing)
    fails = [1e-2]
    assert run.main(SEARCH) == 0
    report = Path("search/results.md").read_text()
    assert "- `lr0.01-r2` failed: step 1: loss is nan" in report and "Best: `lr0.005-r2`" in report
    (failed,) = [row for row in entries() if row["state"] == "failed"]
    assert failed["cell"] == "lr0.01-r2" and failed["training"] > 0
    before = contents("search"), entries()
    assert run.main(SEARCH) == 0 and (contents("search"), entries()) == before
    fails += [1e-3, 5e-3]
    capsys.readouterr()
    assert run.main([*SEARCH[:-1], "another"]) == 4
    assert "another: every cell failed before step 3: expected one to go on" in capsys.readouterr().err


def test_a_list_of_values_of_another_setting_makes_a_grid_without_rungs_too():
    argv = ["grid", *SMALL, "--steps", "2", "--lr", "1e-2", "--ranks", "2", "--over", "schedule=constant|cosine"]
    argv += ["--points", "5", "--horizon", "3", "--forecast-series", "1"]
    assert run.main([*argv, "--out", "grid"]) == 0
    _, table = files.read_csv("grid/results.csv")
    names = [f"lr0.01-r2-schedule={schedule}" for schedule in ("constant", "cosine")]
    assert [row["cell"] for row in table] == ["untrained", *names]
    assert len({row["validation_loss"] for row in table}) == 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rungs", "3,3"], "rungs is [3, 3]: expected growing numbers of steps, from 1"),
        (["--rungs", "0,3"], "rungs is [0, 3]: expected growing numbers of steps, from 1"),
        (["--steps", "9"], "steps is 9: expected 7, the last of rungs"),
        (["--survivors", "1"], "survivors is 1.0: expected a part of the cells, more than 0 and less than 1"),
        (["--survivors", "0"], "survivors is 0.0: expected a part of the cells"),
        (["--keep", "horizon"], "keep is 'horizon': expected last or best with rungs"),
        (["--over", "decimals=2|3"], "over is 'decimals=2|3': expected NAME=VALUE|VALUE, NAME one of batch_size"),
        (["--over", "clip"], "over clip=: clip is '': expected a number"),
        (["--over", "clip=1|1.0"], "over is 'clip=1|1.0': expected each value once"),
        (["--over", "clip=1", "--over", "clip=2"], "expected each setting once"),
        (["--over", "dropout=0|2"], "over dropout=2: dropout is 2.0: expected at least 0, less than 1"),
        (["--over", "schedule=up"], "over schedule=up: schedule is 'up': expected one of constant, linear"),
        (["--over", "targets=x_proj"], "x_proj"),
        (["--schedule", "warmup-stable-decay", "--decay", "3"], "not stable: expected 0 to 4"),
        (["--schedule", "warmup-stable-decay", "--warmup", "4", "--decay", "2"], "not stable: expected 4 to 5"),
        (["--protocol", "default"], "rungs is [3, 5, 7]: expected none in a study, whose grid is whole"),
    ],
)
def test_bad_input_is_one_line(flags, said, capsys):
    assert said in refused(capsys, *SEARCH, *flags)


@pytest.mark.parametrize("flags", [["--rungs", "3;5"], ["--survivors", "a"], ["--survivors", "1/0"]])
def test_a_flag_that_cannot_be_read_is_one_line(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main([*SEARCH, *flags])
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "expected" in line
