"""How a series becomes text and windows: each option end to end, at the price that was predicted."""

import json
from pathlib import Path

import numpy as np
import pytest
from waves import INPUTS, contents, dot, inputs, no_figures

from experiments.plots import base
from experiments.run import main
from experiments.run_folder import files
from experiments.settings.record import POCKET, Settings
from experiments.task.task import Task
from qwen_min import Tokenizer

SMALL = [*INPUTS, "--steps", "2", "--batch-size", "2", "--context", "48", "--val-series", "1"]
SMALL += ["--lr", "1e-2", "--ranks", "2", "--points", "5", "--horizon", "3", "--forecast-series", "2"]
ADAPTER = "cells/lr0.01-r2/adapter"

# Flags, what they make of a series' first two points, tokens of a step, symbols, and the words.
OPTIONS = [
    ([], "6.24,3.67;4.18,3.69;", 10, 13, ""),
    (["--no-point"], "624,367;418,369;", 8, 12, ", no point"),
    (["--separator", " "], "6 . 2 4,3 . 6 7;4 . 1 8,3 . 6 9;", 16, 14, ", a space between digits"),
    (["--no-point", "--separator", " "], "6 2 4,3 6 7;4 1 8,3 6 9;", 12, 13, ", no point, a space between digits"),
    (["--decimals", "0", "--alpha", "0.4"], "5,3;3,3;", 4, 13, ""),
]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    inputs(8)
    no_figures(monkeypatch)
    monkeypatch.setattr(base, "save", lambda figure, path, *_: dot(path))  # of a page: test_grid draws them


@pytest.mark.parametrize(
    ("flags", "text", "width", "symbols", "said"), OPTIONS, ids=[" ".join(o[0]) or "default" for o in OPTIONS]
)
def test_a_grid_its_forecasts_and_page_follow_the_text_at_its_price(flags, text, width, symbols, said, capsys):
    assert main(["data", "--data", "waves.h5", *flags]) == 0
    printed = capsys.readouterr().out
    assert f"text    {text}\n" in printed and f"decimals{said}\n" in printed
    assert f"a series is {8 * width} tokens" in printed
    grid = ["grid", *SMALL, "--vocabulary", "symbols", "--windows", "anywhere"]
    assert main([*grid, *flags, "--out", "g"]) == 0
    result = files.read_json(f"g/{Path(ADAPTER).parent}/result.json")
    assert result["flops"] == result["predicted_flops"] and result["validation_tokens"] == 8 * width - 1
    task = Task.prepare(Settings.from_toml("g/config.toml"), Tokenizer.from_pretrained(POCKET))
    assert (task.symbols, task.tokens_to_forecast) == (symbols, 3 * width)
    capsys.readouterr()
    assert main(["evaluate", "--config", "g/config.toml", "--adapter", f"g/{ADAPTER}", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["predicted_flops"] == report["flops"] | {"training": 0}
    assert report["unparsed_steps"]["validation"] == 0
    for draft in ("0", "12"):
        assert main(["forecast", "--config", "g/config.toml", "--system", "17", "--draft", draft]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("written")]
    half = len(lines) // 2
    assert lines[:half] == lines[half:]
    assert main(["report", "g"]) == 0
    assert f"decimals{said}." in Path("g/report.md").read_text()


def test_windows_that_hold_whole_series_train_the_same_anywhere_and_shorter_ones_do_not():
    made = {}
    for context in ("96", "48"):
        for windows in ("strided", "anywhere"):
            run = ["train", *SMALL[:-8], "--lr", "1e-2", "--context", context, "--windows", windows, "--out", "t"]
            assert main([*run[:-1], f"{windows}-{context}", "--rank", "2"]) == 0
            made[windows, context] = contents(f"{windows}-{context}", "config.toml", "results.md")
    assert made["strided", "96"] == made["anywhere", "96"]
    metrics = [made[windows, "48"]["cells/lr0.01-r2/metrics.jsonl"] for windows in ("strided", "anywhere")]
    assert metrics[0] != metrics[1]
    results = [json.loads(made[w, "48"]["cells/lr0.01-r2/result.json"]) for w in ("strided", "anywhere")]
    assert [r["validation_windows"] for r in results] == [2, 2]
    assert [r["train_windows"] for r in results] == [14 * 2, 14 * 5]  # begin at 0, 48; and at 0, 10 ... 40


def test_a_batch_is_the_same_whatever_was_drawn_before_and_begins_at_steps():
    settings = Settings(data="waves.h5", context=48, batch_size=3, windows="anywhere", points=5, horizon=3)
    tokenizer = Tokenizer.from_pretrained(POCKET)
    tasks = [Task.prepare(settings, tokenizer) for _ in range(2)]
    batches = [tasks[0].train_batch(step) for step in range(4)]
    again = [tasks[1].train_batch(step) for step in (3, 2)]
    np.testing.assert_array_equal(batches[3].inputs, again[0].inputs)
    np.testing.assert_array_equal(batches[2].inputs, again[1].inputs)
    for batch in batches:
        assert (batch.start % 10 == 0).all() and len(set(batch.series)) == 3
