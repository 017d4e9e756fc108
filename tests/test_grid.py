"""The main job, end to end, on the pocket model and a small data set; stopped, resumed, refused."""

import csv
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from waves import damped_waves

from experiments import run
from experiments.accounting.ledger import Ledger
from qwen_min import FlopMeter, Qwen

ROOT = Path(__file__).parents[1]
SMALL = ["--steps", "6", "--val-every", "2", "--context", "64", "--batch-size", "2", "--val-series", "2"]


@pytest.fixture
def data(tmp_path) -> Path:
    """Twenty damped waves of 30 points."""
    return damped_waves(tmp_path / "waves.h5", 30)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Ledger and runs land in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)


def grid(data: Path, out: str, *more: str) -> int:
    return run.main(
        ["grid", "--data", str(data), "--lr", "1e-3", "1e-2", "--ranks", "2", "4", "--out", out, *SMALL, *more]
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run that must not depend on when or how often it was started."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("manifest.json", ".owner", ".lock", "config.toml", "results.md")
    }


def test_the_grid_trains_every_cell_and_its_flops_equal_the_prediction(data, capsys):
    assert grid(data, "grid") == 0
    results = [json.loads(p.read_text()) for p in sorted(Path("grid/cells").glob("*/result.json"))]
    assert [(r["lr"], r["rank"]) for r in results] == [(0.001, 2), (0.001, 4), (0.01, 2), (0.01, 4)]
    untrained = json.loads(Path("grid/untrained/result.json").read_text())
    for result in results:
        assert result["flops"] == result["predicted_flops"]
        assert result["validation_loss"] < untrained["validation_loss"]
        assert result["label"] == "toy: the pocket model"
    rows = list(csv.DictReader(Path("grid/results.csv").read_text().splitlines()))
    assert [row["cell"] for row in rows] == ["untrained", "lr0.001-r2", "lr0.01-r2", "lr0.001-r4", "lr0.01-r4"]
    assert {p.name for p in Path("grid/figures").iterdir()} == {
        "loss-cells-by-step.png",
        "loss-cells-by-flops.png",
        "grid.png",
    }
    printed = capsys.readouterr().out
    for result in results:
        assert f"{result['validation_loss']:.4f}" in printed
    with Ledger(Path("ledger.sqlite")) as ledger:
        totals = ledger.totals()
    assert totals["training"] == sum(r["flops"]["training"] for r in results)
    assert totals["validation"] == sum(r["flops"]["validation"] for r in [untrained, *results])
    assert totals["wasted"] == totals["reserved"] == 0


def test_a_grid_counts_each_cell_once_says_what_it_wrote_and_its_page_draws_each_picture_once(data, capsys):
    """Bug: the cell that a study's default run would be was filed as that, and missing on the page."""
    Path("small.toml").write_text("default_steps = 6\ndefault_rank = 2\n")
    assert grid(data, "grid", "--config", "small.toml") == 0
    *_, said = capsys.readouterr().out.splitlines()
    assert said.startswith("written to grid: results.md, ") and said.endswith("; FLOPs charged to ledger.sqlite")
    written = said.removeprefix("written to grid: ").partition(";")[0].split(", ")
    assert all(list(Path("grid").glob(name)) for name in written)
    rows = list(csv.DictReader(Path("grid/results.csv").read_text().splitlines()))
    assert [row["stage"] for row in rows] == ["baseline", *["grid"] * 4]
    drawn = {path.name: path.read_bytes() for path in Path("grid/figures").iterdir()}
    assert run.main(["report", "grid"]) == 0
    assert capsys.readouterr().out == "grid/report.html\nwritten to grid: report.html, report.md, figures/, tables/\n"
    again = {path.name: path.read_bytes() for path in Path("grid/figures").iterdir()}
    assert drawn.items() < again.items() and len(set(again.values())) == len(again)


def test_a_finished_grid_started_again_changes_nothing(data):
    assert grid(data, "grid") == 0
    before, stamps = contents(Path("grid")), {p: p.stat().st_mtime_ns for p in Path("grid/cells").rglob("*")}
    assert grid(data, "grid") == 0
    assert contents(Path("grid")) == before
    assert {p: p.stat().st_mtime_ns for p in Path("grid/cells").rglob("*")} == stamps
    with Ledger(Path("ledger.sqlite")) as ledger:
        assert len(ledger.entries()) == 5


def test_a_grid_beyond_the_budget_is_refused_with_exit_3_before_anything_runs(data, capsys):
    assert grid(data, "grid", "--budget", "1000000") == 3
    assert "1,000,000" in capsys.readouterr().err
    assert not Path("grid/cells").exists() and not Path("grid/untrained").exists()


def test_a_run_of_other_settings_or_other_data_in_the_same_folder_is_refused(data, capsys):
    assert grid(data, "grid") == 0
    before = contents(Path("grid"))
    assert grid(data, "grid", "--seed", "1") == 2
    assert "seed is 0, now 1" in capsys.readouterr().err
    with h5py.File(data, "r+") as file:
        file["trajectories"][3, 4, 0] += 1
    assert grid(data, "grid") == 2
    assert "data_sha256" in capsys.readouterr().err
    assert contents(Path("grid")) == before


def test_a_run_whose_model_has_another_config_now_is_refused(data, tmp_path, capsys):
    """Bug: the same weights with another rope theta went on in the old folder."""
    model = shutil.copytree(ROOT / "weights" / "pocket", tmp_path / "model")
    assert grid(data, "grid", "--model", str(model)) == 0
    config = json.loads((model / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 2e4
    (model / "config.json").write_text(json.dumps(config))
    assert grid(data, "grid", "--model", str(model)) == 2
    assert "config_sha256" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_at_that_step_with_exit_4(data, capsys, monkeypatch):

    true, calls = Qwen.loss, []

    def poisoned(self, ids, targets, padding=None, vocabulary=None):
        loss, count = true(self, ids, targets)
        calls.append(self.training)
        return (loss * float("nan") if self.training and calls.count(True) == 4 else loss), count

    monkeypatch.setattr(Qwen, "loss", poisoned)
    assert run.main(["train", "--data", str(data), "--out", "t", "--rank", "2", *SMALL]) == 4
    error = capsys.readouterr().err.splitlines()[-1]
    assert "step 4" in error and "nan" in error
    monkeypatch.undo()
    monkeypatch.chdir(data.parent)
    assert not Path("t/cells/lr0.01-r2/result.json").exists()
    with Ledger(Path("ledger.sqlite")) as ledger:
        assert ledger.entries()[-1]["state"] == "failed"
    assert run.main(["train", "--data", str(data), "--out", "t", "--rank", "2", *SMALL]) == 0  # from its checkpoint


def test_a_dry_run_prices_the_grid_and_runs_nothing(data, capsys, tmp_path):
    assert grid(data, "grid", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert not Path("grid").exists() and not Path("ledger.sqlite").exists()
    assert grid(data, "grid") == 0
    with Ledger(Path("ledger.sqlite")) as ledger:
        assert f"{ledger.totals()['spent']:,}" in printed


def test_train_with_json_prints_one_object_whose_adapter_loads(data, capsys):
    from lora import load_adapter

    assert run.main(["train", "--data", str(data), "--out", "t", "--rank", "3", "--json", *SMALL]) == 0
    result = json.loads(capsys.readouterr().out)
    model = Qwen.from_pretrained(ROOT / "weights" / "pocket")
    load_adapter(model, Path("t/cells") / result["cell"] / "adapter")
    assert result["validation_loss"] < result["untrained_validation_loss"]


def test_evaluate_scores_the_horizon_beside_naive_forecasts_and_charges_what_it_predicted(data, capsys):
    flags = ["--data", str(data), "--val-series", "3", "--points", "20", "--horizon", "5", "--context", "64"]
    assert run.main(["evaluate", "--json", "--out", "e", *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    scores = {row["forecaster"]: row for row in report["scores"] if row["variable"] == "all"}
    assert set(scores) == {"model", "persistence", "context mean", "seasonal repeat", "context parroting", "law fit"}
    assert report["predicted_flops"] == report["flops"] | {"training": 0}
    assert report["forecast_steps"]["validation"] == 15 and report["parts"]["validation"] == [14, 15, 16]
    assert report["unparsed_steps"]["validation"] == 0  # constrained
    written = json.loads(Path("e/evaluation/evaluation.json").read_text())
    assert report["out"] == "e"
    assert written == {key: value for key, value in report.items() if key not in ("scores", "out")}
    capsys.readouterr()
    assert run.main(["evaluate", "--out", "e", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert written["verdict"]["validation"] in lines and "the best of the copies; 3 series" in lines[-4]
    assert lines[-1] == "written to e: evaluation/, figures/forecasts.png; FLOPs charged to ledger.sqlite"
    with pytest.raises(SystemExit):
        run.main(["evaluate", "--help"])
    assert "evaluation.json, scores.csv, forecasts.csv and more go into its evaluation/" in " ".join(
        capsys.readouterr().out.split()
    )
    assert Path("e/figures/forecasts.png").read_bytes().startswith(b"\x89PNG")
    with h5py.File(data) as file:
        series = file["trajectories"][14:17].astype(float)
    mse = ((series[:, 19:20] - series[:, 20:25]) ** 2).mean()
    assert scores["persistence"]["mse"] == pytest.approx(mse, rel=1e-12)


def test_a_forecast_longer_than_the_series_is_refused(data, capsys):
    assert run.main(["evaluate", "--data", str(data), "--points", "20", "--horizon", "11"]) == 2
    assert "has 30 points: expected at least the 20" in capsys.readouterr().err
    assert run.main(["forecast", "--system", "20", "--data", str(data), "--points", "9", "--horizon", "9"]) == 2
    assert "no system 20: expected 0 to 19" in capsys.readouterr().err


def test_a_malformed_forecast_is_counted_and_never_shifts_a_column_or_a_step(data):
    from experiments.settings.record import Settings
    from experiments.task.task import Task
    from qwen_min import Tokenizer

    tokenizer = Tokenizer(ROOT / "weights" / "pocket" / "tokenizer.json")
    task = Task.prepare(Settings(data=str(data), points=20, horizon=4, alpha=2.0), tokenizer)
    values = task.read_forecast(tokenizer.encode("1.00,2.00;1.0x,3.00;4.00;0.50,0.25;9.99,9.99;"), system=3)
    np.testing.assert_array_equal(values, [[2, 4], [np.nan] * 2, [np.nan] * 2, [1, 0.5]])


def test_a_meter_around_a_whole_run_sees_what_the_ledger_was_charged(data):
    with FlopMeter() as meter:
        assert (
            run.main(
                [
                    "evaluate",
                    "--data",
                    str(data),
                    "--points",
                    "20",
                    "--horizon",
                    "5",
                    "--context",
                    "64",
                    "--val-series",
                    "2",
                ]
            )
            == 0
        )
    with Ledger(Path("ledger.sqlite")) as ledger:
        assert meter.total == ledger.totals()["spent"]
