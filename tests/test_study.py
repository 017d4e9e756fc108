"""A whole study in little, on the pocket model and a small data set: stages, what is carried forward, records, page."""

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from waves import damped_waves

from experiments import report, run
from experiments.accounting.ledger import Ledger
from experiments.report.document import Figure

SMALL = [
    *("--lr", "1e-3", "1e-2", "--ranks", "2", "4", "--steps", "3", "--val-every", "2", "--batch-size", "2"),
    *("--context", "64", "--val-series", "2", "--points", "16", "--horizon", "4", "--forecast-series", "3"),
]
SIZES = "default_steps = 2\ncontexts = [32, 64]\ncontext_steps = 3\nfinal_steps = 4\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with twenty damped waves of 24 points and a TOML file of small stages."""
    folder = tmp_path_factory.mktemp("study")
    damped_waves(folder / "waves.h5", 24)
    (folder / "small.toml").write_text(SIZES)
    return folder


def study(place: Path, verb: str, out: str, *more: str) -> int:
    files = ["--data", str(place / "waves.h5"), "--config", str(place / "small.toml")]
    where = ["--out", str(place / out), "--ledger", str(place / f"{out}.sqlite")]
    return run.main([verb, *files, *SMALL, *where, *more])


@pytest.fixture(scope="module")
def finished(place) -> Path:
    assert study(place, "study", "whole") == 0
    return place / "whole"


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_every_stage_leaves_its_records_and_a_page(finished):
    runs = [
        "untrained",
        "default",
        "contexts/32",
        "final",
        *(f"cells/lr{lr}-r{r}" for r in (2, 4) for lr in (0.001, 0.01)),
    ]
    for name in runs:
        result = json.loads((finished / name / "result.json").read_text())
        assert result["flops"] == result["predicted_flops"], name
    assert {row["folder"] for row in rows(finished / "results.csv")} == set(runs)
    judged = [p.parent.parent.name for p in finished.rglob("evaluation/evaluation.json")]
    assert sorted(judged) == ["default", "final", "untrained"]
    for name in ("report.html", "report.md", "preprocessing.json", "flops.csv", "naive/test.csv", "protocol.toml"):
        assert (finished / name).is_file(), name


def test_the_best_cell_is_carried_forward_by_the_lowest_validation_loss(finished):
    cells = [json.loads(p.read_text()) for p in finished.glob("cells/*/result.json")]
    best = min(cells, key=lambda r: r["validation_loss"])
    named = json.loads((finished / "study.json").read_text())["best"]
    assert (named["lr"], named["rank"], named["overridden"]) == (best["lr"], best["rank"], False)
    sweep = {c: json.loads((finished / f).read_text()) for c, f in _sweep(finished).items()}
    assert all((r["lr"], r["rank"]) == (best["lr"], best["rank"]) for r in sweep.values())
    final = json.loads((finished / "final" / "result.json").read_text())
    lowest = min(sweep, key=lambda c: sweep[c]["validation_loss"])
    assert (final["lr"], final["rank"], final["context"], final["steps"]) == (best["lr"], best["rank"], lowest, 4)


def _sweep(finished: Path) -> dict[int, str]:
    stages = json.loads((finished / "study.json").read_text())["stages"]
    return {s["context"]: f"{s['folder']}/result.json" for s in stages if s["stage"] == "context"}


def test_a_context_that_the_grid_has_trained_is_not_trained_again(finished):
    best = json.loads((finished / "study.json").read_text())["best"]["cell"]
    assert _sweep(finished)[64] == f"cells/{best}/result.json"
    assert not (finished / "contexts" / "64").exists()


def test_flops_add_up_over_stages_runs_and_the_ledger(finished):
    table = rows(finished / "flops.csv")
    amount = {(row["stage"], row["part"]): int(row["flops"]) for row in table}
    stages = dict.fromkeys(stage for stage, _ in amount if stage != "all")
    assert list(stages) == ["baseline", "default", "grid", "context", "final"]
    for part in ("training", "validation", "inference", "total"):
        assert amount["all", part] == sum(amount[stage, part] for stage in stages)
    with Ledger(finished.parent / "whole.sqlite") as ledger:
        totals = ledger.totals()
        assert all(entry["state"] == "settled" for entry in ledger.entries())
    assert {part: amount["all", part] for part in ("training", "validation", "inference")} == {
        part: totals[part] for part in ("training", "validation", "inference")
    }
    assert totals["wasted"] == 0


def test_a_finished_study_started_again_runs_nothing_and_writes_the_same_page(finished, place):
    def contents() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in sorted(finished.rglob("*")) if p.is_file() and p.suffix != ".png"}

    before = contents()
    assert study(place, "study", "whole") == 0
    assert contents() == before


@pytest.fixture
def no_page(monkeypatch):
    """The page is made once, by the study of `finished`: its figures take most of the time."""
    monkeypatch.setattr("experiments.report.build", lambda run, progress: run / "report.html")


def test_stages_one_by_one_end_in_the_same_records_as_the_study(finished, place, no_page):
    for verb in ("baseline", "default", "grid", "context", "final"):
        assert study(place, verb, "parts", "--protocol", "default") == 0, verb
    for name in ("results.csv", "flops.csv", "study.json", "final/evaluation/forecasts.csv", "final/metrics.jsonl"):
        assert (place / "parts" / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_stage_before_its_turn_is_refused_by_what_it_waits_for(place, capsys):
    assert study(place, "context", "early") == 2
    assert "expected the stage 'grid' to have run" in capsys.readouterr().err
    assert not (place / "early" / "contexts").exists()


def test_what_is_carried_forward_can_be_set_by_hand(place, no_page):
    told = ("--best-lr", "0.001", "--best-rank", "2", "--best-context", "32")
    assert study(place, "final", "told", *told) == 0
    final = json.loads((place / "told" / "final" / "result.json").read_text())
    assert (final["lr"], final["rank"], final["context"]) == (0.001, 2, 32)
    assert json.loads((place / "told" / "study.json").read_text())["best"]["overridden"]


def test_another_choice_than_the_finished_run_was_made_with_is_refused(finished, place, capsys):
    assert study(place, "final", "whole", "--best-rank", "2", "--best-lr", "0.001", "--best-context", "32") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "result.json" in error and "expected the run that was asked for" in error


def test_a_dry_run_prices_every_stage_exactly_and_runs_nothing(finished, place, capsys):
    assert study(place, "study", "dry", "--dry-run", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert not (place / "dry").exists() and printed["fits"]
    spent = {(row["stage"], row["part"]): int(row["flops"]) for row in rows(finished / "flops.csv")}
    priced = {stage["stage"]: stage for stage in printed["stages"]}
    for stage in ("baseline", "default", "grid"):  # of the others the dearest choice is priced
        assert priced[stage]["training"] == spent[stage, "training"]
        assert priced[stage]["validation"] == spent[stage, "validation"]
        assert priced[stage]["inference"] == spent[stage, "inference"]


def test_a_study_that_does_not_fit_says_how_many_steps_would(place, capsys):
    assert study(place, "study", "dry", "--dry-run", "--json") == 0
    whole = json.loads(capsys.readouterr().out)
    step = whole["stages"][-1]["training"] // 4
    assert whole["stages"][-1]["stage"] == "final"
    assert study(place, "study", "dry", "--dry-run", "--json", "--budget", str(whole["total"] - step)) == 0
    less = json.loads(capsys.readouterr().out)
    assert (less["fits"], less["final_steps_that_fit"]) == (False, 3)
    assert study(place, "study", "poor", "--budget", str(whole["total"] - step)) == 3
    assert not list((place / "poor").rglob("result.json"))


@pytest.fixture
def no_figures(monkeypatch):
    """A page with every figure's name, none drawn: `finished` and the tests of the page draw each kind."""
    png, names = io.BytesIO(), lambda made: [block.name for block in report.blocks(made) if isinstance(block, Figure)]
    Image.new("RGB", (1, 1)).save(png, "png")
    monkeypatch.setattr(report, "drawn", lambda made, progress: dict.fromkeys(names(made), png.getvalue()))


@pytest.mark.parametrize("name", ["fung", "liu", "rai"])
def test_the_study_of_every_report_runs_and_shows_its_claims(place, name, no_figures, capsys):
    small = ["--scale", "0.001", "--protocol", name, "--context", "64", "--ranks", "2"]
    short = "contexts = [32, 64]\nfinal_steps = 4000\ndefault_steps = 2\nshown = [18, 19]\nshown_series = 0\n"
    short += "skip = []\ncontext_steps = 2\nsteps = 2\npoints = 16\nhorizon = 4\n"
    (place / f"{name}.toml").write_text(short)
    files = ["--data", str(place / "waves.h5"), "--config", str(place / f"{name}.toml")]
    out = ["--out", str(place / name), "--ledger", str(place / f"{name}.sqlite")]
    assert run.main(["study", *files, *small, *out, "--lr", "1e-3", "--val-series", "2", "--forecast-series", "2"]) == 0
    assert rows(place / name / "accounting.csv")
    for path in (place / name).rglob("result.json"):
        result = json.loads(path.read_text())
        assert result["flops"] == result["predicted_flops"], path
    page = (place / name / "report.html").read_text()
    assert 'class="footnote' in page or "footnote" in page
    final = json.loads((place / name / "final" / "evaluation" / "evaluation.json").read_text())
    assert final["parts"]["shown"] == [18, 19] and not final["constrained"]
    # Liu's report draws the forecasts of its best cell too, and judges every cell.
    assert (place / name / "figures" / "forecasts-grid.png").is_file() == (name == "liu")
    best = json.loads((place / name / "manifest.json").read_text())["best"]
    assert (best["lr"], best["rank"], best["rule"]) == (0.001, 2, "lowest validation loss per real token")


def test_samples_give_quantiles_and_their_median_is_the_forecast(place, capsys):
    flags = ("--num-samples", "4", "--part", "test")
    out = ["--out", str(place / "sampled"), "--json", "--ledger", str(place / "sampled.sqlite")]
    data = ["--data", str(place / "waves.h5"), "--points", "16", "--horizon", "4", "--forecast-series", "2"]
    assert run.main(["evaluate", *data, *flags, *out, "--val-series", "1", "--context", "64"]) == 0
    printed = json.loads(capsys.readouterr().out)
    model = next(row for row in printed["scores"] if (row["forecaster"], row["variable"]) == ("model", "all"))
    assert 0 <= model["coverage50"] <= model["coverage80"] <= 1 and model["crps"] > 0
    for row in rows(place / "sampled" / "evaluation" / "forecasts.csv"):
        levels = [float(row[f"q{q}"]) for q in ("0.1", "0.25", "0.5", "0.75", "0.9")]
        assert levels == sorted(levels) and row["y_hat"] == row["q0.5"] and row["parsed"] == "1"
