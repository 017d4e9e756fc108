"""Rolling origins: where the cut-offs of a series are, what a forecast at each of them sees, what all of them cost."""

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from waves import damped_waves, no_figures, refused

from experiments import run
from experiments.run_folder.files import read_csv, read_json
from experiments.settings.record import POCKET, Settings
from experiments.task.task import Task
from qwen_min import FlopMeter, Tokenizer

FLAGS = ["--points", "12", "--horizon", "4", "--forecast-series", "3", "--val-series", "1", "--context", "64"]


@pytest.fixture(autouse=True)
def elsewhere():
    damped_waves(Path("waves.h5"), 30, variables=1)  # of which no law is fitted, which takes a while


def task(**changes) -> Task:
    settings = Settings(data="waves.h5", points=12, horizon=4, **changes)
    return Task.prepare(settings, Tokenizer.from_pretrained(POCKET))


@pytest.mark.parametrize(
    ("origins", "starts"), [(1, [0]), (2, [0, 14]), (3, [0, 7, 14]), (4, [0, 4, 8, 12]), (15, list(range(15)))]
)
def test_origins_are_evenly_spaced_from_the_first_point_on_as_far_as_all_have_a_truth(origins, starts):
    assert [one.start for one in task(origins=origins).origins] == starts


def test_a_forecast_at_a_later_origin_is_that_of_a_file_that_begins_there():
    """Its text, its scale where that is of the points seen, its time and what is true; never a point before."""
    rolled = task(origins=3, scaling="context percentile").origins[1]
    with h5py.File("waves.h5") as file, h5py.File("later.h5", "w") as later:
        later["trajectories"], later["time"] = file["trajectories"][:, 7:], file["time"][7:]
    alone = Task.prepare(replace(rolled.settings, origins=1, data="later.h5"), Tokenizer.from_pretrained(POCKET))
    np.testing.assert_array_equal(rolled.alphas, alone.alphas)
    np.testing.assert_array_equal(rolled.time, alone.time)
    np.testing.assert_array_equal(rolled.series, alone.series)
    assert rolled.text(3, 16) == alone.text(3, 16) and rolled.tokens(3, 12) == alone.tokens(3, 12)
    fixed = task(origins=3)
    assert {tuple(one.alphas) for one in fixed.origins} == {tuple(fixed.alphas)}


def test_evaluate_forecasts_at_each_origin_for_its_price_and_scores_all_and_each(capsys):
    asked = ["evaluate", "--data", "waves.h5", *FLAGS, "--num-samples", "3"]
    assert run.main([*asked, "--out", "one"]) == 0
    with FlopMeter() as meter:
        assert run.main([*asked, "--origins", "3", "--out", "three"]) == 0
    one, three = (read_json(f"{out}/evaluation/evaluation.json") for out in ("one", "three"))
    assert meter.total == sum(three["flops"].values())
    assert three["predicted_flops"] == three["flops"] | {"training": 0}
    assert three["flops"]["inference"] == pytest.approx(3 * one["flops"]["inference"], rel=0.02)  # 10.01 is wider
    assert (one["by_origin"], three["origins"], three["forecast_steps"]["validation"]) == ([], 3, 3 * 3 * 4)
    assert [origin["cut_off"] for origin in three["by_origin"]] == [12, 19, 26]
    for name in ("forecasts.csv", "history.csv", "tokens.csv"):
        assert Path("one/evaluation", name).read_bytes() == Path("three/evaluation", name).read_bytes()

    def rows(out: str) -> dict[tuple, dict]:
        found = [row for row in read_csv(Path(out, "evaluation/scores.csv"))[1] if row["unit"] == "raw"]
        return {(row["part"], row["forecaster"]): row for row in found if row["variable"] == "all"}

    first, joint = rows("one"), rows("three")
    each = [{(row["part"], row["forecaster"]): row for row in origin["scores"]} for origin in three["by_origin"]]
    assert each[0].keys() == joint.keys()
    for key, row in joint.items():
        for name in ("mse", "mae", "mase", "smape"):
            assert float(first[key][name]) == pytest.approx(each[0][key][name], rel=1e-12)
            assert float(row[name]) == pytest.approx(np.mean([one[key][name] for one in each]), rel=1e-12)
    _, by_step = read_csv(Path("three/evaluation/horizon.csv"))
    model = [r for r in by_step if (r["part"], r["forecaster"], r["variable"]) == ("validation", "model", "all")]
    assert len(model) == 4
    assert np.mean([float(r["mse"]) for r in model]) == pytest.approx(float(joint["validation", "model"]["mse"]))
    said = capsys.readouterr().out
    assert "at 3 origins, after points 12, 19, 26" in said and said.count("\nafter point ") == 3


def test_more_origins_than_fit_are_one_line_that_says_how_many_do(capsys):
    asked = ["evaluate", "--data", "waves.h5", *FLAGS, "--origins"]
    assert "origins is 16: expected at most 15, where 12 + 4 of 30 points fit" in refused(capsys, *asked, "16")
    assert "origins is 2: expected at most 1, where 12 + 18 of" in refused(capsys, *asked, "2", "--horizon", "18")
    assert "origins is 0: expected at least 1" in refused(capsys, *asked, "0")


def test_a_study_prices_and_judges_every_origin(capsys, monkeypatch):
    no_figures(monkeypatch)
    Path("o.toml").write_text("origins = 2\nlr = [1e-2]\nranks = [2]\nsteps = 1\nshown_series = 1\n")
    asked = ["grid", "--config", "o.toml", "--data", "waves.h5", *FLAGS, "--steps", "1", "--batch-size", "1"]
    assert run.main([*asked, "--out", "grid"]) == 0
    found = read_json("grid/cells/lr0.01-r2/evaluation/evaluation.json")
    assert found["predicted_flops"] == found["flops"] | {"training": 0} and len(found["by_origin"]) == 2
    assert {path.name for path in Path("grid/naive").iterdir()} == {
        f"{part}{number}.csv" for part in ("validation", "shown") for number in ("", "-2")
    }
    capsys.readouterr()
    assert run.main(["budget", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["totals"]["reserved"] == 0
