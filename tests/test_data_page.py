"""docs/data.md: its data set is what its script makes, and its commands and its Python run."""

import re
import shlex
from pathlib import Path

import pytest

from data import example
from experiments import run
from experiments.run_folder.files import read_csv

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def elsewhere():
    Path("lakes.csv").write_text(example.lakes(), encoding="utf-8")
    Path("weights").symlink_to(ROOT / "weights")


def test_the_data_set_is_what_its_script_makes():
    assert (ROOT / "docs" / "lakes.csv").read_text(encoding="utf-8") == example.lakes()


def test_every_command_of_the_page_goes_from_the_file_to_what_it_says(capsys):
    commands = [shlex.split(line)[3:] for line in re.findall("^    python -m experiments.run .*", PAGE, re.MULTILINE)]
    for command in commands:
        assert run.main(command) == 0, command
    said = capsys.readouterr().out
    assert said.count("a table; 4 missing values filled (linear)") == 2 and said.count("context parroting") >= 2
    rows = read_csv("forecast.csv")[1]
    assert len(rows) == 2 * 3 * 3 and {row["ds"] for row in rows if row["unique_id"] == "south"} == {
        "2024-02-20", "2024-02-21", "2024-02-22"
    }  # fmt: skip
    assert {row["cutoff"] for row in read_csv("backtest/backtest.csv")[1] if row["unique_id"] == "north"} == {
        "2024-03-04", "2024-03-07"
    }  # fmt: skip
    for path in (
        "forecast.png",
        "backtest/forecasts.png",
        "runs/lakes/results.md",
        "runs/judged/evaluation/scores.csv",
    ):
        assert Path(path).is_file()


def test_the_python_of_the_page_runs(capsys):
    pytest.importorskip("pandas", reason="pandas is not installed")
    held: dict = {}
    exec(re.findall("```python\n(.*?)```", PAGE, re.DOTALL)[0], held)
    assert len(held["future"]) == 2 * 3 * 3 and len(held["rolled"]) == 2 * 2 * 3
