"""A grid over seeds: each cell is the mean of its runs, and what differs by less than their noise is not known."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from waves import INPUTS, contents, inputs, no_figures, refused

from experiments import run
from experiments.run_folder import files
from experiments.run_folder.cells import noise

SMALL = [*INPUTS, "--context", "96", "--batch-size", "2", "--val-series", "1", "--steps", "3"]
SMALL += ["--no-forecast-cells", "--lr", "1e-2", "0.5", "--ranks", "2"]
GRID = ["grid", *SMALL, "--seed", "5", "--seeds", "2", "--out", "g"]
FIRST, LATER = ["lr0.01-r2", "lr0.5-r2"], ["lr0.01-r2-seed6", "lr0.5-r2-seed6"]


@pytest.fixture(autouse=True)
def here(monkeypatch) -> None:
    inputs(8)
    no_figures(monkeypatch)


def loss(out: str, cell: str) -> float:
    return files.read_json(f"{out}/cells/{cell}/result.json")["validation_loss"]


def test_each_cell_is_trained_with_each_seed_as_a_grid_of_that_seed_would_priced_judged_and_shown_by_its_mean(capsys):
    assert run.main([*GRID, "--dry-run"]) == 0
    priced = capsys.readouterr().out
    assert run.main(GRID) == 0
    printed = capsys.readouterr().out
    for seed, cells in (("5", FIRST), ("6", LATER)):
        assert run.main(["grid", *SMALL, "--seed", seed, "--out", seed]) == 0
        for own, cell in zip(FIRST, cells, strict=True):
            whole, found = contents(f"{seed}/cells/{own}"), contents(f"g/cells/{cell}")
            assert [name for name in whole if whole[name] != found[name]] == [
                *(["checkpoint/state.json", "result.json"] if cell != own else [])  # which name the run
            ]
    _, table = files.read_csv("g/results.csv")
    assert [(row["cell"], row["seed"]) for row in table] == [
        *(("untrained", "5"), (FIRST[0], "5"), (FIRST[1], "5"), (LATER[0], "6"), (LATER[1], "6"))
    ]
    total = next(r["flops"] for r in files.read_csv("g/flops.csv")[1] if (r["stage"], r["part"]) == ("all", "total"))
    assert f"together {int(total):,} FLOPs" in priced
    means = {cell: (loss("g", cell) + loss("g", f"{cell}-seed6")) / 2 for cell in FIRST}
    best = min(means, key=means.__getitem__)
    _, rows = files.read_csv("g/cells.csv")
    assert {row["cell"]: float(row["validation_loss"]) for row in rows} == pytest.approx(means, rel=1e-15)
    ends = sorted((loss("g", best), loss("g", f"{best}-seed6")))
    said = f"Best: `{best}`, {means[best]:.4f} ({ends[0]:.4f} to {ends[1]:.4f}). Means of 2 seeds"
    assert said in printed and f"**{means[best]:.4f} ({ends[0]:.4f} to {ends[1]:.4f})**" in printed
    before = contents("g")
    shutil.rmtree("g")
    Path("ledger.sqlite").unlink()
    for shard in ("1/2", "2/2"):
        assert run.main([*GRID, "--shard", shard]) == 0
    assert run.main(["grid", "--merge", "--out", "g"]) == 0
    assert contents("g") == before


def test_the_best_cell_of_the_page_is_that_of_the_lowest_mean_though_another_has_the_lowest_run(tmp_path):
    from experiments import report

    assert run.main(GRID) == 0
    out = Path("g")
    _, table = files.read_csv(out / "results.csv")
    of = dict(zip([*FIRST, *LATER], [0.375, 0.25, 0.375, 0.75], strict=True))
    table = [row | {"validation_loss": str(of.get(row["cell"], 0.9))} for row in table]
    files.write_csv(out / "results.csv", table)
    report.build(out)
    text = (out / "report.md").read_text()
    assert "Best cell**: lr0.01-r2: validation loss 0.3750 (mean of 2 seeds, 0.3750 to 0.3750)" in text
    assert "the mean of 2 seeds (the lowest to the highest)" in text and "0.5000 (0.2500 to 0.7500)" in text
    assert (out / "tables/grid.csv").read_text().splitlines()[1:] == [
        "0.01,0.375,0.375,0.375", "0.5,0.5,0.25,0.75"
    ]  # fmt: skip


def test_a_grid_over_another_setting_has_the_mean_and_the_spread_of_each_cell_in_its_table_and_figures(monkeypatch):
    """Bug: each seed was a row and a line of its own."""
    from experiments import plots, report
    from experiments.plots import training

    monkeypatch.setattr(plots, "search", training.search)
    over = ["--lr", "1e-2", "--steps", "2", "--val-every", "1", "--over", "schedule=constant|cosine"]
    assert run.main([*GRID, *over]) == 0
    cells = [f"{FIRST[0]}-schedule={schedule}" for schedule in ("constant", "cosine")]
    found = {cell: [loss("g", cell), loss("g", f"{cell}-seed6")] for cell in cells}
    best = min(found, key=lambda cell: sum(found[cell]))
    lines = Path("g/results.md").read_text().splitlines()
    for cell, losses in found.items():
        (line,) = [line for line in lines if line.startswith(f"| `{cell}`")]
        shown = f"{sum(losses) / 2:.4f} ({min(losses):.4f} to {max(losses):.4f})"
        assert line.split("|")[2].strip() == (f"**{shown}**" if cell == best else shown)
    assert sum(line.startswith("| `") for line in lines) == 2
    html = report.build(Path("g")).read_text()
    _, table = files.read_csv("g/tables/cells.csv")
    assert [[float(row[name]) for name in list(row)[1:4]] for row in table] == [
        pytest.approx([sum(losses) / 2, min(losses), max(losses)], rel=1e-12) for losses in found.values()
    ]
    figure = re.search('id="figure-search".*?<metadata>(.*?)</metadata>', html, re.DOTALL)
    drawn = {one["name"]: one["points"] for one in json.loads(figure[1])["series"] if one["points"]}
    assert {cell: drawn[cell][-1][3] for cell in cells} == pytest.approx(
        {c: sum(found[c]) / 2 for c in cells}, rel=1e-12
    )


def test_the_noise_of_two_cells_is_the_half_width_of_the_paired_t_interval_of_their_difference():
    cells = np.random.RandomState(0).normal(size=(2, 5))
    ends = stats.ttest_rel(*cells).confidence_interval(0.95)
    assert noise(cells.tolist()) == pytest.approx((ends.high - ends.low) / 2, rel=1e-12)
    assert noise([[1.0, 2.0]]) is None and noise([[1.0], [2.0]]) is None and noise([]) is None
    assert noise([[1.0, 2.0], [1.0]]) is None


def test_seeds_do_not_go_with_rungs_and_are_counted_from_one(capsys):
    assert "seeds is 2: expected 1 with rungs" in refused(capsys, *GRID, "--steps", "4", "--rungs", "2,4")
    assert "seeds is 0: expected 1 to 1000" in refused(capsys, *GRID, "--seeds", "0")
    assert "seed is 4294967296: expected 0 to 2^32 - 1" in refused(capsys, *GRID, "--seed", str(2**32 - 1))
