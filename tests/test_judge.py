"""The judgement of forecasts: what a perfect, a naive and a half-parsed forecast score, table by table."""

import dataclasses

import numpy as np
import pytest

from experiments.forecasting import judge, naive
from experiments.forecasting.forecast import Forecasts
from experiments.settings.record import POCKET, Settings
from experiments.task.task import Task
from qwen_min import Tokenizer

LOSSES = {"validation_loss": 0.5, "validation_tokens": 10}


@pytest.fixture(scope="module")
def task() -> Task:
    return Task.prepare(Settings(), Tokenizer.from_pretrained(POCKET))


def forecasts(task: Task, systems: list[int], values=None, samples=None) -> Forecasts:
    """Forecasts of 20 points after 80; the truth unless `values` are given."""
    chosen = task.dataset.series[systems].astype(np.float64)
    truth = chosen[:, 80:]
    losses = [np.arange(200.0) + i for i in range(len(systems))]
    cut = np.linspace(0, 0.5, len(systems))
    guess = truth.copy() if values is None else values
    return Forecasts(systems, chosen[:, :80], truth, guess, samples, losses, cut, cut / 10, {"inference": 1})


def tables(task: Task, made: Forecasts, parts: dict[str, list[int]]) -> dict:
    plain = {part: without_law(task, systems) for part, systems in parts.items()}
    return judge.tables(task, made, plain, parts, LOSSES, {}, None)


def without_law(task: Task, systems: list[int]) -> naive.Forecasts:
    """The naive forecasts but the fit of the law, which takes a while and has a test of its own."""
    context = task.dataset.series[systems, :80].astype(np.float64)
    return {name: np.stack([rule(one, 20) for one in context]) for name, rule in naive.RULES.items()}


def row(rows: list[dict], **wanted) -> dict:
    (found,) = [r for r in rows if wanted.items() <= r.items()]
    return found


def test_the_seasonal_repeat_scores_what_the_reports_should_have_compared_with(task):
    """Trap 10: in raw units, over systems 850-999, 80 -> 20 points, MSE .0402 and MAE .0915."""
    systems = task.split.test.tolist()
    assert systems == list(range(850, 1000))
    scores = tables(task, forecasts(task, systems), {"test": systems, "shown": systems[:1]})["scores.csv"]
    seasonal = row(scores, part="test", unit="raw", forecaster="seasonal repeat", variable="all")
    assert (round(seasonal["mse"], 4), round(seasonal["mae"], 4)) == (0.0402, 0.0915)
    assert seasonal["series"] == 150 and seasonal["steps"] == 3000
    assert seasonal["mse_low"] < seasonal["mse"] < seasonal["mse_high"]


def test_the_verdict_of_each_part_compares_its_own_scores(task):
    systems = task.split.validation[:20].tolist()
    made = forecasts(task, systems)
    made.values[:] += 1
    found = tables(task, made, {"validation": systems, "shown": systems[:1]})
    about, rows = found["evaluation.json"], [r for r in found["scores.csv"] if r["unit"] == "raw"]
    for part, few in (("validation", ""), ("shown", "; one series tells little")):
        copies = [row(rows, part=part, forecaster=name, variable="all") for name in naive.RULES]
        best = min(copies, key=lambda r: r["mse"])
        assert best["forecaster"] == "context parroting"
        said = f"{1 / best['mse']:,.0f} times worse (MSE) than context parroting, the best of the copies{few}."
        assert about["verdict"][part].endswith(said)
    about["flops"]["validation"] = 0
    assert about["verdict"]["validation"] in judge.table(about, rows, "validation").splitlines()


def test_a_perfect_forecast_wins_every_series_and_the_reference_none(task):
    systems = [700, 701, 702]
    scores = tables(task, forecasts(task, systems), {"shown": systems})["scores.csv"]
    for variable in ("all", "prey", "predator"):
        model = row(scores, unit="raw", forecaster="model", variable=variable)
        assert (model["mse"], model["mae"], model["r2"], model["skill"], model["won"]) == (0, 0, 1, 1, 3)
        copy = row(scores, unit="raw", forecaster=model["reference"], variable=variable)
        assert (copy["skill"], copy["won"]) == (0, 0)


def test_skill_is_over_the_better_of_two_copies_and_the_anchors_are_those_of_each_series_own_context(task):
    systems = [700, 701, 702]
    truth = task.dataset.series[systems, 80:].astype(np.float64)
    made = forecasts(task, systems, truth + 0.1)
    made.context[0, :, 1] = 2.0  # no naive error to divide by
    found = tables(task, made, {"shown": systems})["scores.csv"]
    step = np.abs(np.diff(made.context, axis=1)).mean(1)  # (N, V)
    for unit, variable in ((u, v) for u in ("raw", "scaled") for v in ("all", "prey", "predator")):
        own = {r["forecaster"]: r for r in found if (r["unit"], r["variable"]) == (unit, variable)}
        best = min(("seasonal repeat", "context parroting"), key=lambda name: own[name]["mse"])
        assert {r["reference"] for r in own.values()} == {best}
        model, copy = own["model"], own[best]
        assert model["skill"] == 1 - model["mse"] / copy["mse"] and model["win_rate"] == model["won"] / 3
    model = row(found, unit="raw", forecaster="model", variable="all")
    assert model["mase"] == pytest.approx(np.mean(0.1 / step[step > 0])) and model["mase_undefined"] == 1
    assert model["wql"] == pytest.approx(0.1 * truth.size / truth.sum())
    scaled = row(found, unit="scaled", forecaster="model", variable="all")
    names = ("mase", "wql", "smape")
    assert [scaled[name] for name in names] == pytest.approx([model[name] for name in names])
    predator = row(found, unit="raw", forecaster="model", variable="predator")
    assert predator["mase"] == pytest.approx(np.mean(0.1 / step[1:, 1]))


def test_a_step_that_did_not_parse_is_scored_as_persistence_counted_and_moves_nothing(task):
    systems = [700, 705]
    made = forecasts(task, systems)
    made.values[1, 3] = np.nan
    found = tables(task, made, {"shown": systems})
    model = row(found["scores.csv"], unit="raw", forecaster="model", variable="all")
    truth = made.truth[1, 3]
    squared = (made.context[1, -1] - truth) ** 2
    assert model["unparsed_steps"] == 1 and model["mse"] == pytest.approx(squared.sum() / 80, rel=1e-12)
    assert found["evaluation.json"]["unparsed_steps"] == {"shown": 1}
    gaps = [r for r in found["forecasts.csv"] if not r["parsed"]]
    assert {(r["unique_id"], r["ds"], r["y_hat"]) for r in gaps} == {(705, float(task.dataset.time[83]), None)}
    assert all(r["y_hat"] == r["y"] for r in found["forecasts.csv"] if r["parsed"])


def test_scaled_errors_are_raw_ones_over_alpha(task):
    systems = [700, 701]
    values = task.dataset.series[systems, 80:].astype(np.float64) + 0.1
    scores = tables(task, forecasts(task, systems, values), {"shown": systems})["scores.csv"]
    raw, scaled = (row(scores, unit=u, forecaster="model", variable="prey") for u in ("raw", "scaled"))
    alpha = task.alphas[0]
    assert raw["mse"] == pytest.approx(0.01) and scaled["mse"] == pytest.approx(0.01 / alpha**2)
    assert scaled["mae"] == pytest.approx(0.1 / alpha) and scaled["skill"] == pytest.approx(raw["skill"])


def test_samples_that_bracket_the_truth_cover_it_and_their_quantiles_are_in_the_long_form(task):
    systems = [700, 701]
    truth = task.dataset.series[systems, 80:].astype(np.float64)
    offsets = np.linspace(-1, 1, 9)[None, :, None, None]
    made = forecasts(task, systems, truth, truth[:, None] + offsets)
    found = tables(task, made, {"shown": systems})
    model = row(found["scores.csv"], unit="raw", forecaster="model", variable="all")
    assert (model["coverage50"], model["coverage80"]) == (1, 1)
    assert (model["width50"], model["width80"]) == (pytest.approx(1.0), pytest.approx(1.6))
    spread = np.abs(offsets.ravel()[:, None] - offsets.ravel()).mean() / 2
    assert model["crps"] == pytest.approx(np.abs(offsets).mean() - spread)
    pairs = zip(np.arange(1, 10) / 10, np.linspace(-0.8, 0.8, 9), strict=True)
    pinball = [2 * max(q * -o, (q - 1) * -o) for q, o in pairs]
    assert model["wql"] == pytest.approx(np.mean(pinball) * truth.size / truth.sum())
    assert row(found["scores.csv"], unit="raw", forecaster="persistence", variable="all")["crps"] is None
    first = found["forecasts.csv"][0]
    assert [first[q] - first["y"] for q in ("q0.1", "q0.5", "q0.9")] == pytest.approx([-0.8, 0, 0.8])
    assert list(first)[:5] == ["unique_id", "ds", "variable", "y", "y_hat"] and list(first)[-1] == "parsed"


def test_the_token_losses_of_the_shown_systems_are_listed_by_step_and_average_to_the_horizons(task):
    systems = [700, 701]
    found = tables(task, forecasts(task, systems), {"shown": systems})
    tokens = found["tokens.csv"]
    assert [r["nats"] for r in tokens if r["unique_id"] == 700] == list(range(200))
    assert "".join(r["text"] for r in tokens if r["unique_id"] == 701) == task.text(701)[800:]
    assert [r["step"] for r in tokens[:200]] == [i // 10 for i in range(200)]
    mean = sum(r["nats"] for r in tokens) / len(tokens)
    assert found["evaluation.json"]["horizon_loss"]["shown"] == pytest.approx(mean)


def test_a_system_of_two_parts_is_listed_once_with_its_class_and_what_was_cut_off(task):
    systems = [700, 708]
    parts = {"validation": systems, "shown": [708]}
    found = tables(task, forecasts(task, systems), parts)["systems.csv"]
    model = row(found, unique_id=708, forecaster="model", variable="all")
    expected = {"class": "growing", "parts": "validation shown", "cut_mass": 0.5, "cut_mass_mean": 0.05}
    assert expected.items() <= model.items()
    assert row(found, unique_id=708, forecaster="persistence", variable="all")["cut_mass"] is None


@pytest.mark.parametrize(
    ("record", "trained"),
    [
        ("{own}", True),
        ("{'data_sha256': 'another'}", False),
        (None, "unknown"),
        ("{'no': 1}", "unknown"),
        ("{", "unknown"),
    ],
)
def test_what_an_adapter_was_trained_on_is_said_by_its_runs_record(task, tmp_path, record, trained):
    if record is not None:
        text = record.replace("{own}", f"{{'data_sha256': '{task.dataset.digest}'}}").replace("'", '"')
        (tmp_path / "result.json").write_text(text)
    assert judge.trained_on(task, tmp_path / "adapter") == trained
    assert judge.trained_on(task, None) is False


def test_tables_that_cannot_be_written_leave_the_earlier_ones(task, tmp_path):
    found = tables(task, forecasts(task, [700]), {"shown": [700]})
    judge.write(tmp_path / "evaluation", found)
    before = {p.name: p.read_bytes() for p in (tmp_path / "evaluation").iterdir()}
    bad = found | {"scores.csv": [found["scores.csv"][0] | {"mse": float("nan")}]}
    with pytest.raises(ValueError, match=r"scores\.csv: not written, mse is nan"):
        judge.write(tmp_path / "evaluation", bad)
    assert {p.name: p.read_bytes() for p in (tmp_path / "evaluation").iterdir()} == before


def test_naive_forecasts_are_kept_and_read_back_and_others_are_refused(task, tmp_path):
    short = dataclasses.replace(task, dataset=dataclasses.replace(task.dataset, names=("a", "b")))  # no law to fit
    path = tmp_path / "naive" / "shown.csv"
    made, again = (naive.kept(short, [700, 705], path) for _ in range(2))
    assert made.keys() == again.keys() == naive.RULES.keys()
    for name in made:
        np.testing.assert_array_equal(made[name], again[name])
    with pytest.raises(ValueError, match=r"shown\.csv: forecasts of other systems: expected"):
        naive.kept(short, [700, 706], path)
