"""The main job, end to end, on the pocket model and a small data set; priced, finished, refused."""

import io
import json
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import h5py
import numpy as np
import pytest
from waves import contents, damped_waves, refused

from experiments import run
from experiments.accounting.ledger import Ledger
from experiments.run_folder import files
from experiments.settings.record import POCKET, Settings
from experiments.task.task import Task
from lora import load_adapter
from qwen_min import FlopMeter, Qwen, Tokenizer

SMALL = ["--data", "waves.h5", "--steps", "6", "--val-every", "2", "--context", "64", "--batch-size", "2"]
SMALL += ["--val-series", "2"]
GRID = ["grid", "--config", "small.toml", *SMALL, "--lr", "1e-3", "1e-2", "--ranks", "2", "4", "--out", "grid"]
CELLS = ["lr0.001-r2", "lr0.01-r2", "lr0.001-r4", "lr0.01-r4"]
FOLDERS = ["untrained", *(f"cells/{name}" for name in CELLS)]


@pytest.fixture
def here() -> None:
    damped_waves(Path("waves.h5"), 30)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of a grid of four cells; what it printed when it was priced, and when it had run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place := tmp_path_factory.mktemp("grid"))
        damped_waves(Path("waves.h5"), 30)
        Path("small.toml").write_text("points = 16\nhorizon = 3\nforecast_series = 2\nshown_series = 2\n")
        texts = []
        for more in (["--dry-run"], []):
            assert not Path("grid").exists() and not Path("ledger.sqlite").exists()
            with redirect_stdout(io.StringIO()) as out:
                assert run.main([*GRID, *more]) == 0
            texts.append(out.getvalue())
    return place, texts


@pytest.fixture
def printed(made, monkeypatch) -> list[str]:
    monkeypatch.chdir(made[0])
    return made[1]


def test_the_grid_trains_every_cell_and_its_flops_equal_the_prediction(printed):
    untrained, *results = (files.read_json(f"grid/{name}/result.json") for name in FOLDERS)
    assert [(r["cell"], r["lr"], r["rank"]) for r in results] == [
        (name, float(name[2:].partition("-")[0]), int(name[-1])) for name in CELLS
    ]
    for result in results:
        assert result["flops"] == result["predicted_flops"]
        assert result["validation_loss"] < untrained["validation_loss"]
        assert result["label"] == "toy: the pocket model" and f"{result['validation_loss']:.4f}" in printed[1]
    judged = [files.read_json(f"grid/{name}/evaluation/evaluation.json") for name in FOLDERS]
    assert all(e["flops"]["validation"] + e["flops"]["inference"] > 0 for e in judged)
    with Ledger("ledger.sqlite") as ledger:
        found = ledger.totals()
    for stage in ("training", "validation", "inference"):
        assert found[stage] == sum(r["flops"].get(stage, 0) for r in [untrained, *results, *judged])
    assert found["wasted"] == found["reserved"] == 0 and f"{found['spent']:,}" in printed[0]


def test_a_grid_counts_each_cell_once_says_what_it_wrote_and_its_page_draws_each_picture_once(printed, capsys):
    """Bug: the cell that a study's default run would be was filed as that, and missing on the page."""
    said = printed[1].splitlines()[-1]
    assert said.startswith("written to grid: results.md, ") and said.endswith("; FLOPs charged to ledger.sqlite")
    written = said.removeprefix("written to grid: ").partition(";")[0].split(", ")
    assert all(list(Path("grid").glob(name)) for name in written)
    then = printed[1].splitlines()[-5:-2]  # its forecasts are made
    assert then == ["Next, the page of this run:", "", "    python -m experiments.run report grid"]
    _, rows = files.read_csv("grid/results.csv")
    names = [(row["stage"], row["cell"]) for row in rows]
    assert names == [("baseline", "untrained"), *(("grid", name) for name in CELLS)]
    drawn = {path.name: path.read_bytes() for path in Path("grid/figures").iterdir()}
    assert sorted(drawn) == ["forecasts.png", "grid.png", "loss-cells-by-flops.png", "loss-cells-by-step.png"]
    assert run.main(["report", "grid"]) == 0
    said = "written to grid: report.html, report.md, flops.html, figures/, tables/"
    assert capsys.readouterr().out == f"grid/report.html\n{said}\n"
    again = {path.name: path.read_bytes() for path in Path("grid/figures").iterdir()}
    assert drawn.items() < again.items() and len(set(again.values())) == len(again)


def test_a_finished_grid_started_again_changes_nothing(printed):
    before, stamps = contents("grid"), {p: p.stat().st_mtime_ns for p in Path("grid/cells").rglob("*")}
    assert run.main(GRID) == 0
    assert contents("grid") == before
    assert {p: p.stat().st_mtime_ns for p in Path("grid/cells").rglob("*")} == stamps
    with Ledger("ledger.sqlite") as ledger:
        assert len(ledger.entries()) == 10


def test_a_grid_beyond_the_budget_is_refused_with_exit_3_before_anything_runs(here, capsys):
    assert "expected at least the 80 that a forecast sees and the 20 that it makes, or --no-forecast-cells" in refused(
        capsys, "grid", *SMALL, "--out", "grid"
    )
    assert run.main(["grid", *SMALL, "--out", "grid", "--budget", "1000000", "--no-forecast-cells"]) == 3
    assert "1,000,000" in capsys.readouterr().err
    assert not Path("grid/cells").exists() and not Path("grid/untrained").exists()


def test_a_run_whose_model_has_another_config_now_is_refused(here, capsys, monkeypatch):
    """Bug: the same weights with another rope theta went on in the old folder."""
    shutil.copytree(POCKET, "model")
    argv = ["train", *SMALL, "--steps", "1", "--model", "model", "--out", "t"]
    adapter = "t/cells/lr0.0001-r8/adapter"
    for typed, program in (("bin/qwen-min", "qwen-min"), ("experiments/run.py", "python -m experiments.run")):
        monkeypatch.setattr("sys.argv", [typed])
        assert run.main(argv) == 0
        then = f"{program} evaluate --config t/config.toml --adapter {adapter}"
        assert capsys.readouterr().out.splitlines()[-2] == f"its forecasts, scored: {then}" and Path(adapter).is_dir()
        with pytest.raises(SystemExit):
            run.main(["status", "--help"])
        assert f"  {program} status runs/grid\n" in capsys.readouterr().out
    config = files.read_json("model/config.json")
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 2e4
    files.write_json("model/config.json", config)
    assert "config_sha256" in refused(capsys, *argv)


def test_train_with_json_prints_one_object_whose_adapter_loads(here, capsys):
    assert run.main(["train", *SMALL, "--out", "t", "--rank", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    load_adapter(Qwen.from_pretrained(POCKET), Path("t/cells") / result["cell"] / "adapter")
    assert result["validation_loss"] < result["untrained_validation_loss"]


def test_evaluate_scores_the_horizon_beside_naive_forecasts_and_charges_what_it_predicted(here, capsys):
    flags = ["--data", "waves.h5", "--val-series", "3", "--points", "20", "--horizon", "5", "--context", "64"]
    with FlopMeter() as meter:
        assert run.main(["evaluate", "--json", "--out", "e", *flags]) == 0
    with Ledger("ledger.sqlite") as ledger:
        assert meter.total == ledger.totals()["spent"]
    report = json.loads(capsys.readouterr().out)
    scores = {row["forecaster"]: row for row in report["scores"] if row["variable"] == "all"}
    assert set(scores) == {"model", "persistence", "context mean", "seasonal repeat", "context parroting", "law fit"}
    assert report["predicted_flops"] == report["flops"] | {"training": 0}
    assert report["forecast_steps"]["validation"] == 15 and report["parts"]["validation"] == [14, 15, 16]
    assert report["unparsed_steps"]["validation"] == 0  # constrained
    written = files.read_json("e/evaluation/evaluation.json")
    assert report["out"] == "e"
    assert written == {key: value for key, value in report.items() if key not in ("scores", "out")}
    assert run.main(["evaluate", "--out", "e", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert written["verdict"]["validation"] in lines and "the best of the copies; 3 series" in lines[-6]
    assert lines[-3] == "trained on this data: no"
    assert lines[-1] == "written to e: evaluation/, figures/forecasts.png; FLOPs charged to ledger.sqlite"
    with pytest.raises(SystemExit):
        run.main(["evaluate", "--help"])
    help_ = " ".join(capsys.readouterr().out.split())
    assert "evaluation.json, scores.csv, forecasts.csv and more go into its evaluation/" in help_
    assert Path("e/figures/forecasts.png").read_bytes().startswith(b"\x89PNG")
    with h5py.File("waves.h5") as file:
        series = file["trajectories"][14:17].astype(float)
    mse = ((series[:, 19:20] - series[:, 20:25]) ** 2).mean()
    assert scores["persistence"]["mse"] == pytest.approx(mse, rel=1e-12)


def test_a_forecast_longer_than_the_series_is_refused(here, capsys):
    data = ["--data", "waves.h5", "--points"]
    assert "has 30 points: expected at least the 20" in refused(capsys, "evaluate", *data, "20", "--horizon", "11")
    line = refused(capsys, "forecast", "--system", "20", *data, "9", "--horizon", "9")
    assert "no system 20: expected 0 to 19" in line


def test_a_malformed_forecast_is_counted_and_never_shifts_a_column_or_a_step(here):
    tokenizer = Tokenizer.from_pretrained(POCKET)
    task = Task.prepare(Settings(data="waves.h5", points=20, horizon=4, alpha=2.0), tokenizer)
    values = task.read_forecast(tokenizer.encode("1.00,2.00;1.0x,3.00;4.00;0.50,0.25;9.99,9.99;"), system=3)
    np.testing.assert_array_equal(values, [[2, 4], [np.nan] * 2, [np.nan] * 2, [1, 0.5]])
