"""Runs side by side: what differs first, then scores, FLOPs and times, each from its folder's records or missing."""

import os
import shutil
from pathlib import Path

import pytest
import study_folder
from waves import refused

from experiments import run
from experiments.run_folder import files
from experiments.settings.record import Settings


@pytest.fixture(autouse=True)
def here() -> None:
    study_folder.write(Path("study"), label="")
    study_folder.write_grid(Path("grid"))


def table(name: str) -> dict[str, dict[str, str]]:
    _, rows = files.read_csv(f"study/tables/compare-{name}.csv")
    return {row.get("name") or row["run"]: row for row in rows}


def test_two_runs_stand_side_by_side_with_their_differences_scores_flops_and_times(capsys):
    manifest = files.read_json("study/manifest.json")
    files.write_json("study/manifest.json", manifest | {"begun": "1970-01-01T00:00:00Z", "data_sha256": "abc"})
    Path("grid/config.toml").write_text(Path("grid/config.toml").read_text() + "seed = 3\n")
    os.utime("study/final/evaluation/evaluation.json", (4_102_444_800, 4_102_444_800))
    assert run.main(["report", "study", "--compare", "grid"]) == 0
    said = "written to study: compare.html, compare.md, tables/"
    assert capsys.readouterr().out == f"study/compare.html\n{said}\n"
    toy = "grid (toy: the pocket model)"  # only one of the two
    assert {name: (row["study"], row[toy]) for name, row in table("settings").items()} == {
        **{"seed": ("0", "3"), "data_sha256": ("abc", ""), "label": ("not set", "toy: the pocket model")}
    }
    _, rows = files.read_csv("study/final/evaluation/scores.csv")
    asked = {"part": "test", "unit": "raw", "forecaster": "model", "variable": "all"}
    score = next(row for row in rows if asked.items() <= row.items())
    scores = table("scores")
    assert {k: scores["study"][k] for k in ("part", "mse", "mse_low", "mse_high", "mae")} == {
        k: score[k] for k in ("part", "mse", "mse_low", "mse_high", "mae")
    }
    assert [scores[toy][k] for k in ("mse", "mse_low", "mse_high", "copied", "mae", "series")] == [""] * 6
    _, results = files.read_csv("grid/results.csv")
    best = min((row for row in results if row["rank"] != "0"), key=lambda row: float(row["validation_loss"]))
    assert (scores[toy]["called"], scores[toy]["loss"]) == (best["cell"], best["validation_loss"])
    _, flops = files.read_csv("study/flops.csv")
    spent = {row["part"]: row["flops"] for row in flops if row["stage"] == "all"}
    assert {part: table("flops")["study"][part] for part in spent} == spent
    assert table("flops")["study"]["training_exact"] == ""  # its count is not that of its settings
    times = table("times")
    assert (times["study"]["ended"], times["study"]["hours"]) == ("2100-01-01T00:00:00Z", str(4_102_444_800 / 3600))
    text = Path("study/compare.md").read_text()
    titles = "What differs", "Scores", "FLOPs, coursework", "Times", "How it was made"
    assert sorted(text.index(title) for title in titles) == [text.index(title) for title in titles]
    page = Path("study/compare.html").read_text()
    assert score["mse"] in page and 'src="http' not in page and page.rstrip().endswith("</html>")


def test_the_difference_of_two_models_on_the_same_series_is_said_to_be_chance_or_not():
    for name in ("same", "worse"):
        shutil.copytree("study", name)
    task = study_folder._task(Settings(points=study_folder.POINTS, horizon=8, constrained=False))
    study_folder._evaluate(Path("worse/final"), task, 2.0, study_folder.PARTS)
    assert run.main(["report", "study", "--compare", "same", "worse"]) == 0
    text = Path("study/compare.md").read_text()
    assert "validation: the MSE of same less that of study is 0 to 0 (95 %), which may be chance." in text
    assert text.count("which is not chance") == 2 and "All settings" not in text.partition("Scores")[2]


def test_what_cannot_be_compared_is_one_line_and_nothing_is_written(capsys):
    Path("file").touch()
    line = "has no config.toml: expected the folder of a study or a grid"
    for other in ("absent", ".", "file"):
        assert refused(capsys, "report", "study", "--compare", other) == f"{other}: {line}\n"
    twice = "study/../study: is there twice: expected other runs to compare with\n"
    assert refused(capsys, "report", "study", "--compare", "grid", "study/../study") == twice
    Path("grid/results.csv").write_text("x")
    assert refused(capsys, "report", "study", "--compare", "grid").startswith("grid/results.csv: has no column")
    Path("study/compare.md").mkdir()
    assert run.main(["report", "study", "--compare", "grid"]) == 2
