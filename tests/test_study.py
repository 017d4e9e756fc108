"""A whole study in little, on the pocket model and a small data set: stages, what is carried forward, records, page."""

import json
from pathlib import Path

import pytest
from waves import contents, dot, inputs

from experiments import plots, run
from experiments.accounting.ledger import Ledger
from experiments.run_folder.files import read_csv, read_json

SMALL = [
    *("--lr", "1e-3", "1e-2", "--ranks", "2", "4", "--steps", "3", "--val-every", "2", "--batch-size", "2"),
    *("--context", "64", "--val-series", "2", "--points", "16", "--horizon", "4", "--forecast-series", "3"),
]
SIZES = "default_steps = 2\ncontexts = [32, 64]\ncontext_steps = 3\nfinal_steps = 4\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    inputs(24, folder)
    (folder / "small.toml").write_text(SIZES + f'model = "{folder / "model"}"\n')
    return folder


def study(place: Path, verb: str, out: str, *more: str) -> int:
    files = ["--data", str(place / "waves.h5"), "--config", str(place / "small.toml")]
    where = ["--out", str(place / out), "--ledger", str(place / f"{out}.sqlite")]
    return run.main([verb, *files, *SMALL, *where, *more])


@pytest.fixture(scope="module")
def finished(place) -> Path:
    with pytest.MonkeyPatch.context() as patch:  # pictures of few dots, which take less time
        patch.setattr(plots.base, "_DPI", 30)
        patch.setattr(plots.base, "_DPI_OF_TALL", 30)
        assert study(place, "study", "whole") == 0
    return place / "whole"


def rows(path: Path) -> list[dict]:
    return read_csv(path)[1]


def dry(place: Path, capsys, *more: str) -> dict:
    assert study(place, "study", "dry", "--dry-run", "--json", *more) == 0
    assert not (place / "dry").exists()
    return json.loads(capsys.readouterr().out)


def test_every_stage_leaves_its_records_and_a_page(finished):
    runs = ["untrained", "default", "contexts/32", "final"]
    runs += [f"cells/lr{lr}-r{r}" for r in (2, 4) for lr in (0.001, 0.01)]
    for name in runs:
        result = read_json(finished / name / "result.json")
        assert result["flops"] == result["predicted_flops"], name
    assert {row["folder"] for row in rows(finished / "results.csv")} == set(runs)
    judged = [p.parent.parent.name for p in finished.rglob("evaluation/evaluation.json")]
    assert sorted(judged) == ["default", "final", "untrained"]
    for name in ("report.html", "report.md", "preprocessing.json", "flops.csv", "naive/test.csv", "protocol.toml"):
        assert (finished / name).is_file(), name


def test_the_best_cell_is_carried_forward_by_the_lowest_validation_loss(finished):
    cells = [read_json(p) for p in finished.glob("cells/*/result.json")]
    best = min(cells, key=lambda r: r["validation_loss"])
    named = read_json(finished / "study.json")["best"]
    assert (named["lr"], named["rank"], named["overridden"]) == (best["lr"], best["rank"], False)
    stages = read_json(finished / "study.json")["stages"]
    folders = {s["context"]: s["folder"] for s in stages if s["stage"] == "context"}
    # A context that the grid has trained is not trained again.
    assert folders == {32: "contexts/32", 64: f"cells/{best['cell']}"} and not (finished / "contexts/64").exists()
    sweep = {c: read_json(finished / folder / "result.json") for c, folder in folders.items()}
    assert all((r["lr"], r["rank"]) == (best["lr"], best["rank"]) for r in sweep.values())
    final = read_json(finished / "final" / "result.json")
    lowest = min(sweep, key=lambda c: sweep[c]["validation_loss"])
    assert (final["lr"], final["rank"], final["context"], final["steps"]) == (best["lr"], best["rank"], lowest, 4)


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
    spent = {part: amount["all", part] for part in ("training", "validation", "inference")} | {"wasted": 0}
    assert spent.items() <= totals.items()


@pytest.fixture
def no_page(monkeypatch):
    """The page is made once, by the study of `finished`: its figures take most of the time."""
    monkeypatch.setattr("experiments.report.build", lambda run, progress: run / "report.html")


def test_a_finished_study_started_again_runs_nothing_and_changes_nothing(finished, place, no_page):
    before = contents(finished)
    assert study(place, "study", "whole") == 0
    assert contents(finished) == before


def test_stages_one_by_one_end_in_the_same_records_as_the_study(finished, place, no_page):
    for verb in ("baseline", "default", "grid", "context", "final"):
        assert study(place, verb, "parts", "--protocol", "default") == 0, verb
    for name in ("results.csv", "flops.csv", "study.json", "final/evaluation/forecasts.csv", "final/metrics.jsonl"):
        assert (place / "parts" / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_stage_before_its_turn_is_refused_by_what_it_waits_for(place, capsys):
    assert study(place, "context", "early") == 2
    assert "expected the stage 'grid' to have run" in capsys.readouterr().err
    assert not (place / "early" / "contexts").exists()


GIVEN = ("--best-lr", "0.001", "--best-rank", "2", "--best-context", "32")


def test_what_is_carried_forward_can_be_set_by_hand(place, no_page):
    assert study(place, "final", "given", *GIVEN, "--points", "4", "--horizon", "1", "--forecast-series", "1") == 0
    final = read_json(place / "given" / "final" / "result.json")
    assert (final["lr"], final["rank"], final["context"]) == (0.001, 2, 32)
    assert read_json(place / "given" / "study.json")["best"]["overridden"]


def test_another_choice_than_the_finished_run_was_made_with_is_refused(finished, place, capsys):
    assert study(place, "final", "whole", *GIVEN) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "result.json" in error and "expected the run that was asked for" in error


def test_a_dry_run_prices_every_stage_exactly_and_runs_nothing(finished, place, capsys):
    printed = dry(place, capsys)
    assert printed["fits"]
    spent = {(row["stage"], row["part"]): int(row["flops"]) for row in rows(finished / "flops.csv")}
    priced = {stage["stage"]: stage for stage in printed["stages"]}
    for stage in ("baseline", "default", "grid"):  # of the others the dearest choice is priced
        for part in ("training", "validation", "inference"):
            assert priced[stage][part] == spent[stage, part]


def test_a_study_that_does_not_fit_says_how_many_steps_would(place, capsys):
    whole = dry(place, capsys)
    step = whole["stages"][-1]["training"] // 4
    assert whole["stages"][-1]["stage"] == "final"
    less = dry(place, capsys, "--budget", str(whole["total"] - step))
    assert (less["fits"], less["final_steps_that_fit"]) == (False, 3)
    assert study(place, "study", "poor", "--budget", str(whole["total"] - step)) == 3
    assert not list((place / "poor").rglob("result.json"))


@pytest.mark.parametrize("name", ["fung", "liu", "rai"])
def test_the_study_of_every_report_runs_and_shows_its_claims(place, name, monkeypatch):
    """With empty pictures: those of a study are drawn by the test of every stage."""
    monkeypatch.setattr(plots.base, "save", lambda figure, path, *_: dot(path))
    small = ["--scale", "0.001", "--protocol", name, "--context", "64", "--ranks", "2"]
    short = "contexts = [32, 64]\nfinal_steps = 4000\ndefault_steps = 2\nshown = [18, 19]\nshown_series = 0\n"
    short += f"skip = []\ncontext_steps = 2\nsteps = 2\npoints = 16\nhorizon = 4\nmodel = '{place / 'model'}'\n"
    (place / f"{name}.toml").write_text(short)
    files = ["--data", str(place / "waves.h5"), "--config", str(place / f"{name}.toml")]
    out = ["--out", str(place / name), "--ledger", str(place / f"{name}.sqlite")]
    assert run.main(["study", *files, *small, *out, "--lr", "1e-3", "--val-series", "2", "--forecast-series", "2"]) == 0
    assert rows(place / name / "accounting.csv")
    for path in (place / name).rglob("result.json"):
        result = read_json(path)
        assert result["flops"] == result["predicted_flops"], path
    assert "footnote" in (place / name / "report.html").read_text()
    final = read_json(place / name / "final" / "evaluation" / "evaluation.json")
    assert final["parts"]["shown"] == [18, 19] and not final["constrained"]
    # Liu's report draws the forecasts of its best cell too, and judges every cell.
    assert (place / name / "figures" / "forecasts-grid.png").is_file() == (name == "liu")
    best = read_json(place / name / "manifest.json")["best"]
    assert (best["lr"], best["rank"], best["rule"]) == (0.001, 2, "lowest validation loss per real token")


def test_samples_give_quantiles_and_their_median_is_the_forecast(place, capsys):
    flags = ("--num-samples", "4", "--part", "test")
    out = ["--out", str(place / "sampled"), "--json", "--ledger", str(place / "sampled.sqlite")]
    data = ["--data", str(place / "waves.h5"), "--points", "16", "--horizon", "4", "--forecast-series", "2"]
    data += ["--model", str(place / "model")]
    assert run.main(["evaluate", *data, *flags, *out, "--val-series", "1", "--context", "64"]) == 0
    printed = json.loads(capsys.readouterr().out)
    model = next(row for row in printed["scores"] if (row["forecaster"], row["variable"]) == ("model", "all"))
    assert 0 <= model["coverage50"] <= model["coverage80"] <= 1 and model["crps"] > 0
    for row in rows(place / "sampled" / "evaluation" / "forecasts.csv"):
        levels = [float(row[f"q{q}"]) for q in ("0.1", "0.25", "0.5", "0.75", "0.9")]
        assert levels == sorted(levels) and row["y_hat"] == row["q0.5"] and row["parsed"] == "1"
