"""How an update is made: the learning rate of each step, AdamW, a clipped gradient, LoRA's targets and scale."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from waves import Killed, damped_waves, refused, stopped_after_each_step, tiny_model

from data.windows import batch_indices
from experiments.accounting.ledger import Ledger
from experiments.forecasting.forecast import forecast
from experiments.run import main
from experiments.settings.record import Settings
from experiments.settings.schedule import SCHEDULES, factor
from experiments.task.model import prepare
from experiments.task.task import Task
from experiments.training import cell as train
from experiments.training.cell import Cell
from lora.layer import lora_layers

RUN = ["train", "--lr", "1e-2", "--rank", "2", "--steps", "6", "--context", "96", "--batch-size", "2"]
RUN += ["--val-series", "1", "--val-every", "6", "--data", "waves.h5"]
WILD = [*RUN, "--lr", "0.3", "--val-every", "1"]  # a rate at which the loss rises again
SMALL = Settings(context=96, batch_size=2, val_series=1, points=5, horizon=3, data="waves.h5")
PEERS = {
    "constant": lambda o, w, n: transformers.get_constant_schedule_with_warmup(o, w),
    "linear": lambda o, w, n: transformers.get_linear_schedule_with_warmup(o, w, n),
    "cosine": lambda o, w, n: transformers.get_cosine_schedule_with_warmup(o, w, n),
    "warmup-stable-decay": lambda o, w, n: transformers.get_wsd_schedule(
        o, w, num_decay_steps=n // 4, num_training_steps=n, decay_type="linear"
    ),
}


@pytest.fixture(autouse=True)
def elsewhere():
    damped_waves(Path("waves.h5"), 8)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 40), (10, 40), (39, 40), (1, 2)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_steps_rate_is_that_of_transformers_but_that_the_first_is_not_0(schedule, warmup, steps):
    warmup = min(warmup, steps - steps // 4) if schedule == "warmup-stable-decay" else warmup
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    peer, expected = PEERS[schedule](optimizer, warmup, steps), []
    for _ in range(steps + 1):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        peer.step()
    found = [factor(schedule, step, steps, warmup, 0.25) for step in range(steps)]
    assert found == pytest.approx([expected[step + (step < warmup)] for step in range(steps)], abs=1e-12)


def test_warm_up_and_decay_are_steps_or_a_part_of_the_run():
    settings = Settings(schedule="warmup-stable-decay", steps=200, warmup=0.1, decay=50, final_lr=0.5)
    rates = [settings.rate(2.0, step) for step in range(200)]
    assert rates[:20] == pytest.approx([0.1 * step for step in range(1, 21)])
    assert rates[20:151] == [2.0] * 131
    assert rates[151:] == pytest.approx([2.0 - 0.02 * step for step in range(1, 50)])


OTHER_LOSS = ["--digit-weights", "1", "0.5", "--number-loss", "0.3", "--windows", "anywhere", "--context", "48"]


@pytest.mark.parametrize("more", [*(["--schedule", s] for s in SCHEDULES), OTHER_LOSS], ids=" ".join)
def test_a_run_stopped_in_its_warm_up_and_in_its_decay_ends_in_the_bytes_of_one_never_stopped(more, monkeypatch):
    model = str(tiny_model(Path("model")))
    recipe = [*RUN, *more, "--warmup", "3", "--decay", "2", "--clip", "0.5", "--weight-decay", "0.1", "--model", model]
    assert main([*recipe, "--out", "whole"]) == 0
    assert stopped_after_each_step(monkeypatch, [*recipe, "--out", "stopped"]) == 6
    assert records("stopped", "gradients.jsonl") == records("whole", "gradients.jsonl")


def records(out: str, *more: str) -> dict[str, bytes]:
    (cell,) = Path(out, "cells").iterdir()
    names = "metrics.jsonl", "result.json", "adapter/adapter_model.safetensors", *more
    return {name: (cell / name).read_bytes() for name in names}


def result_of(out: str) -> dict:
    return json.loads(records(out)["result.json"])


class NoLedger:
    def spend(self, *_) -> None:
        pass


def begun(rank: int = 2, **changes) -> tuple[Task, train._State]:
    task, model = prepare(dataclasses.replace(SMALL, **changes), None)
    return task, train._State(model, Cell(1e-2, rank), task.settings)


@pytest.mark.parametrize(
    ("keep", "by", "step"), [("best", "validation_loss", "best_step"), ("horizon", "horizon_mse", "kept_step")]
)
def test_the_best_adapter_is_kept_through_stops_and_is_that_of_a_run_which_ended_there(keep, by, step, monkeypatch):
    Path("few.toml").write_text("points = 5\nhorizon = 3\nconstrained = false\nnum_samples = 2\nkeep_series = 1\n")
    kept = [*WILD, "--config", "few.toml", "--keep", keep]
    assert main([*kept, "--out", "best"]) == 0
    result = result_of("best")
    lines = [line for line in map(json.loads, records("best")["metrics.jsonl"].splitlines()) if by in line]
    least = min(lines, key=lambda line: line[by])
    assert len(lines) == 6 and (result[by], result[step]) == (least[by], least["step"])
    assert result[step] < 6 and result["validation_loss"] == least["validation_loss"]
    assert main([*WILD, "--steps", str(result[step]), "--out", "ended"]) == 0
    price, spent = result["predicted_flops"], result["flops"]
    each, rest = divmod(result_of("ended")["flops"]["validation"], result[step])
    assert price["training"] == spent["training"] and rest == 0
    assert 6 * each < spent["validation"] <= price["validation"] if keep == "horizon" else price == spent
    adapter = "adapter/adapter_model.safetensors"
    assert records("best")[adapter] == records("ended")[adapter]
    assert main([*kept, "--out", "best"]) == 0  # read back, and left as it is

    true = train._State.save

    def dying(self, folder):
        if self.step == result[step] and not stopped:
            stopped.append(self.step)
            raise Killed  # between the adapter and the checkpoint
        true(self, folder)

    stopped: list[int] = []
    monkeypatch.setattr(train._State, "save", dying)
    with pytest.raises(Killed):
        main([*kept, "--out", "killed"])
    assert main([*kept, "--out", "killed"]) == 0
    assert records("killed") == records("best")


def test_a_run_ends_when_its_patience_does_through_stops_too_and_the_rest_of_its_budget_is_free_again(monkeypatch):
    recipe = [*WILD, "--patience", "2", "--keep", "best"]
    assert main([*recipe, "--out", "whole"]) == 0
    losses = [
        line["validation_loss"]
        for line in map(json.loads, records("whole")["metrics.jsonl"].splitlines())
        if "validation_loss" in line
    ]
    result = result_of("whole")
    assert (result["steps"], result["stopped_early"]) == (len(losses), len(losses)) and len(losses) < 6
    assert result["best_step"] == losses.index(min(losses)) + 1 == len(losses) - 2
    assert result["flops"]["training"] * 6 == result["predicted_flops"]["training"] * len(losses)
    assert f"Stopped early (patience 2): `lr0.3-r2` after {len(losses)} steps." in Path("whole/results.md").read_text()
    with Ledger("ledger.sqlite") as ledger:
        totals, (_, entry) = ledger.totals(), ledger.entries()
    assert (totals["reserved"], totals["wasted"]) == (0, 0) and entry["total"] == sum(result["flops"].values())
    assert stopped_after_each_step(monkeypatch, [*recipe, "--out", "stopped"]) == len(losses)
    assert records("stopped") == records("whole")
    monkeypatch.delattr(train._State, "train")
    assert main([*recipe, "--out", "whole"]) == 0  # nothing is left to do
    assert main(["status", "whole"]) == main(["report", "whole"]) == 0


@pytest.mark.parametrize(("point_forecast", "taken"), [("median", np.nanmedian), ("mean", np.nanmean)])
def test_of_several_samples_the_forecast_is_the_median_or_the_mean(point_forecast, taken):
    task, model = prepare(dataclasses.replace(SMALL, num_samples=3, point_forecast=point_forecast), None)
    made = forecast(task, model, [0, 1])
    np.testing.assert_allclose(made.values, taken(made.samples, axis=1), rtol=1e-12)
    assert made.samples.std() > 0


def test_an_update_is_adamws_at_the_steps_rate_with_a_gradient_cut_to_the_clip():
    recipe = {"schedule": "linear", "steps": 4, "clip": 1e-3, "weight_decay": 0.5, "betas": (0.8, 0.9)}
    task, ours = begun(**recipe)
    plain = {name: p.detach().clone().requires_grad_() for name, p in ours._trainable()}
    peer = torch.optim.AdamW(plain.values(), betas=(0.8, 0.9), weight_decay=0.5)
    for step in range(3):
        batch = batch_indices(len(task.train_windows), 2, step, 0)
        still = torch.optim.SGD([p for _, p in ours._trainable()], lr=0.0)
        _, norm = train.training_step(ours.model, task.train_windows, batch, still)
        for name, p in ours._trainable():
            plain[name].grad = p.grad * min(1.0, 1e-3 / (norm + 1e-6))
        peer.param_groups[0]["lr"] = 1e-2 * (1 - step / 4)
        peer.step()
        ours.train(task, NoLedger(), 0)
        for name, p in ours._trainable():
            torch.testing.assert_close(p, plain[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("changes", "scale"),
    [({}, 1.0), ({"lora_alpha": 16.0}, 2.0), ({"lora_alpha": 16.0, "rank_stabilised": True}, 16 / math.sqrt(8))],
)
def test_the_update_is_scaled_by_alpha_over_the_rank_or_its_root(changes, scale):
    _, ours = begun(8, **changes)
    assert [layer.scale for _, layer in lora_layers(ours.model)] == pytest.approx([scale] * 42)


def test_lora_sits_on_the_targets_and_the_prices_are_those_of_what_runs(capsys):
    assert main([*RUN, "--targets", "all-linear", "--lora-alpha", "4", "--out", "all"]) == 0
    _, ours = begun(targets=("all-linear",))
    assert len(list(lora_layers(ours.model))) == 7 * 6
    result = json.loads(Path("all/cells/lr0.01-r2/result.json").read_text())
    assert result["flops"] == result["predicted_flops"]
    config = json.loads(Path("all/cells/lr0.01-r2/adapter/adapter_config.json").read_text())
    assert set(config["target_modules"]) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert config["lora_alpha"] == 4
    judge = ["--config", "all/config.toml", "--points", "5", "--horizon", "3", "--forecast-series", "1"]
    assert main(["evaluate", *judge, "--adapter", "all/cells/lr0.01-r2/adapter"]) == 0
    capsys.readouterr()
    assert main(["budget", "--json"]) == 0
    totals = json.loads(capsys.readouterr().out)["totals"]
    assert totals["reserved"] == totals["wasted"] == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--targets", "q_proj", "nothing"], "target 'nothing' matches no linear layer"),
        (["--warmup", "6"], "warmup is 6 steps: expected fewer than the run's 6"),
        (["--schedule", SCHEDULES[-1], "--warmup", "3", "--decay", "4"], "decay is 4 steps: expected at most 3"),
        (["--schedule", "up"], "schedule is 'up': expected one of constant"),
        (["--keep", "all"], "keep is 'all': expected one of last, best, horizon"),
        (["--keep", "horizon"], "has 8 points: expected at least the 80 that a forecast sees and the 20"),
        (["--patience", "2", "--val-every", "0"], "patience is 2: expected 0 where no validation comes before"),
        (["--patience", "-1"], "patience is -1: expected 0 or more"),
        (["--clip", "-1"], "clip is -1.0: expected 0 or more"),
        (["--final-lr", "2"], "final_lr is 2.0: expected 0 to 1"),
        (["--separator", "_"], "separator is '_': expected one of '', ' '"),
        (["--windows", "everywhere"], "windows is 'everywhere': expected one of strided, anywhere"),
        (["--protocol", "fung", "--no-point"], "point is False: expected true where trailing_zeros is false"),
        (["--digit-weights", "1", "-0.5"], "digit_weights is [1.0, -0.5]: expected numbers of 0 or more, not all 0"),
        (["--digit-weights", "nan"], "digit_weights is [nan]: expected numbers of 0 or more, not all 0"),
        (["--digit-weights", "0", "0"], "digit_weights is [0.0, 0.0]: expected numbers of 0 or more, not all 0"),
        (["--number-loss", "-1"], "number_loss is -1.0: expected 0 or more"),
        (["--betas", "1", "0.9"], "betas is [1.0, 0.9]: expected two numbers"),
    ],
)
def test_a_recipe_that_cannot_be_is_one_line_and_nothing_is_written(flags, said, capsys):
    assert said in refused(capsys, *RUN, *flags, "--out", "none")
