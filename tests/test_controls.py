"""A study's controls: models from random weights, trained whole, for no more FLOPs than the final run."""

from pathlib import Path

import pytest
import torch
from waves import contents, damped_waves, refused

from experiments.accounting.predict import predict
from experiments.run import main
from experiments.run_folder import files
from experiments.settings.record import POCKET, Settings
from experiments.study.plan import Plan, update
from experiments.task.model import load_model
from experiments.training import cell
from lora import add_lora
from qwen_min import FlopMeter, Qwen, QwenConfig

SIZES = """
steps = 2
default_steps = 2
context_steps = 2
final_steps = 12
contexts = [32]
context = 32
batch_size = 2
lr = [1e-2]
ranks = [2]
points = 5
horizon = 3
val_series = 2
forecast_series = 2
shown = [15]
val_every = 4
"""
STUDY = ["study", "--config", "sizes.toml", "--data", "waves.h5", "--controls"]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    damped_waves(Path("waves.h5"), 8)
    Path("sizes.toml").write_text(SIZES)
    monkeypatch.setattr("experiments.report.build", lambda out, progress: out / "report.html")


def exact(model: str | Path, rank: int) -> int:
    """FLOPs of a step of two windows of 32 tokens, without the gradients of frozen weights."""
    config = QwenConfig.from_file(Path(model) / "config.json")
    return predict(config, 2, 32, rank=rank, training=True, convention="exact").training


def test_controls_cost_no_more_than_the_final_run_are_judged_as_it_is_and_resume_to_the_same_bytes(monkeypatch):
    monkeypatch.setattr("experiments.task.model.SMALL", {"num_hidden_layers": 2})
    assert main([*STUDY, "--out", "whole"]) == 0
    final, *controls = (files.read_json(f"whole/{name}/result.json") for name in ("final", "scratch", "small"))
    for name, result in zip(("scratch", "small"), controls, strict=True):
        assert result["flops"] == result["predicted_flops"] and result["flops"]["training"] < final["flops"]["training"]
        own, lora = (exact(f"whole/{name}/adapter", 0), exact(POCKET, 2))
        assert result["steps"] * own <= final["steps"] * lora < (result["steps"] + 1) * own
        model = Qwen.from_pretrained(f"whole/{name}/adapter")
        assert result["trainable_parameters"] == sum(p.numel() for p in model.parameters())
        judged = files.read_json(f"whole/{name}/evaluation/evaluation.json")
        assert judged["parts"].keys() == {"validation", "shown", "test"} and judged["flops"]["inference"] > 0
        assert model.config.num_hidden_layers == {"scratch": 6, "small": 2}[name]
    assert [row["stage"] for row in files.read_csv("whole/results.csv")[1]][-2:] == ["scratch", "small"]

    true, steps = cell.training_step, []

    def stopping(model, *arguments):
        steps.extend([1] * all(p.requires_grad for p in model.parameters()))
        if len(steps) == 2:
            raise KeyboardInterrupt
        return true(model, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cell, "training_step", stopping)
        assert main([*STUDY, "--out", "stopped"]) == 130
    assert not Path("stopped/scratch/result.json").exists()
    assert main([*STUDY, "--out", "stopped"]) == 0
    assert contents("stopped") == contents("whole")


def test_a_study_without_controls_has_none_and_controls_beyond_the_budget_are_refused(capsys):
    assert main([*STUDY, "--dry-run"]) == 0
    printed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert printed[1:8] == ["baseline", "default", "grid", "context", "final", "scratch", "small"]
    assert main([*STUDY[:-1], "--dry-run"]) == 0
    assert "scratch" not in capsys.readouterr().out
    assert main([*STUDY, "--budget", "100000"]) == 3
    assert not list(Path().rglob("result.json"))
    Path("sizes.toml").write_text(SIZES.replace("final_steps = 12", "final_steps = 1"))
    assert "a step of 'scratch' costs more than the final run" in refused(capsys, *STUDY)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vocabulary": "symbols", "point": False},
        {"vocabulary": "symbols", "separator": " "},
        {"number_loss": 0.3, "digit_weights": (1.0, 0.5)},
        {"vocabulary": "symbols", "number_loss": 0.3, "scratch": "same"},
    ],
    ids=str,
)
def test_a_step_costs_what_it_was_priced_at_whatever_the_text_and_the_loss_are(changes):
    """It was priced with 13 symbols, and without the losses of numbers."""
    settings = Settings(data="waves.h5", points=5, horizon=3, context=32, batch_size=2, **changes)
    task, model = Plan(settings).task, load_model(settings)
    if not settings.scratch:
        add_lora(model, 2, targets=settings.targets)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    with FlopMeter() as meter:
        cell.training_step(model, task.train_batch(0), range(2), optimizer, number_loss=settings.number_loss)
    for meter.convention in ("exact", "matmul", "coursework"):
        assert update(settings, 2, task.symbols, meter.convention) == meter.training
