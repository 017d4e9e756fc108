"""Data of one's own: negative numbers, any number of variables, few series, and a future that no file holds yet."""

import json
import re
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from experiments import run
from experiments.forecasting import forecast as evaluate
from experiments.settings.record import POCKET, Settings
from experiments.task.constrain import Constrained
from experiments.task.model import prepare
from experiments.task.preprocessing import preprocessing
from experiments.task.task import Task
from qwen_min import FlopMeter, Tokenizer

SIZES = {"points": 20, "horizon": 4}
FLAGS = ["--points", "20", "--horizon", "4"]


def waves(series: int = 20, points: int = 24, variables: int = 2, above: float = 2.0) -> np.ndarray:
    phase = np.random.default_rng(0).uniform(0, 6, (series, 1, variables))
    return above + np.sin(np.arange(points)[:, None] / 3 + phase)


def hdf5(values: np.ndarray, name: str = "d.h5") -> str:
    with h5py.File(name, "w") as file:
        file["trajectories"] = values.astype(np.float32)
    return name


def forecast(data: str, system: int = 0, **settings) -> tuple[Task, evaluate.Forecasts]:
    task, model = prepare(Settings(data=data, **(SIZES | settings)), None, needs_split=False)
    expected = evaluate.predicted(task, model.config, [system])
    with FlopMeter() as meter:
        made = evaluate.forecast(task, model, [system])
    assert meter.total == sum(made.flops.values()) and made.flops["validation"] == expected["validation"]
    return task, made


# A future that is not there


@pytest.mark.parametrize("known", [0, 3])
def test_the_future_beyond_the_file_is_forecast_the_same_and_what_is_there_is_scored(known, capsys):
    whole = waves()
    _, expected = forecast(hdf5(whole), alpha=0.3)
    task, made = forecast(hdf5(whole[:, : 20 + known], "cut.h5"), alpha=0.3)
    np.testing.assert_array_equal(made.values, expected.values)
    np.testing.assert_array_equal(made.truth[0, :known], expected.truth[0, :known])
    assert np.isnan(made.truth[0, known:]).all()
    assert len(made.losses[0]) == len(task.tokens(0)) - len(task.tokens(0, 20))
    np.testing.assert_allclose(made.losses[0], expected.losses[0][: len(made.losses[0])], rtol=1e-4, atol=1e-6)
    assert run.main(["forecast", "--data", "cut.h5", "--system", "0", "--alpha", "0.3", *FLAGS]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = "the errors are of the 3 steps that it holds" if known else "there is no truth, so no error"
    assert lines[1] == f"the data ends after {20 + known} points: {said}"
    printed = np.array([line.split() for line in lines[3:7]], float)
    np.testing.assert_array_equal(printed[:, 0], [20, 21, 22, 23])
    np.testing.assert_allclose(printed[:, 1:], made.values[0], rtol=1e-4)
    mse = [line.split()[2] for line in lines if line.startswith("model ")]
    assert mse == ([f"{np.mean((made.values - made.truth)[0, :known] ** 2):.4f}"] if known else [])
    assert any("best of the copies" in line for line in lines) == bool(known)
    assert Path("forecast-0.png").read_bytes().startswith(b"\x89PNG")


def test_time_goes_on_in_its_last_step_and_the_law_is_fitted_as_far(capsys):
    with h5py.File(hdf5(waves(points=20)), "a") as file:
        file["time"] = np.arange(20) ** 2 / 10
    assert run.main(["forecast", "--data", "d.h5", "--system", "3", *FLAGS]) == 0
    times = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()[3:7]]
    assert times == pytest.approx([36.1 + 3.7 * step for step in (1, 2, 3, 4)])


def test_a_forecast_that_is_scored_needs_its_horizon_and_any_needs_what_it_sees(capsys):
    data = hdf5(waves(points=21))
    assert run.main(["evaluate", "--data", data, *FLAGS]) == 2
    assert "has 21 points: expected at least the 20 that a forecast sees and the 4 that it" in capsys.readouterr().err
    assert run.main(["forecast", "--data", data, "--system", "0", "--points", "22", "--horizon", "4"]) == 2
    assert capsys.readouterr().err == "d.h5: has 21 points: expected at least the 22 that a forecast sees\n"
    assert run.main(["forecast", "--data", data, "--system", "0", "--points", "3", "--horizon", "4"]) == 0


# Few series


@pytest.mark.parametrize("series", [1, 5])
def test_few_series_are_forecast_by_a_scale_of_their_own_that_has_not_seen_the_horizon(series, capsys):
    values = waves(series) * np.linspace(1, 3, 24)[:, None]
    task, made = forecast(hdf5(values))
    values[:, 20:] *= 7
    other, again = forecast(hdf5(values, "other.h5"))
    np.testing.assert_array_equal(made.values, again.values)
    assert task.widest == other.widest == 2
    assert task.alphas[0] == max(np.percentile(values[0, :20].astype(np.float32).astype(float), 95, axis=0)) / 10
    assert run.main(["forecast", "--data", "d.h5", "--system", "0", *FLAGS]) == 0
    assert "95th percentiles / 10, from its first 20 points (too few series to split)" in capsys.readouterr().out
    assert run.main(["forecast", "--data", "d.h5", "--system", "0", "--alpha", "0.5", *FLAGS]) == 0
    assert "alpha = 0.5 for all series, as given" in capsys.readouterr().out
    for verb in ("evaluate", "train", "data"):
        assert run.main([verb, "--data", "d.h5"]) == 2
        assert f"split: {series} systems give parts of" in capsys.readouterr().err


# Negative numbers, any number of variables


@pytest.mark.parametrize("above", [0.0, -3.0])
def test_negative_numbers_are_trained_on_forecast_and_scored(above, capsys):
    data = hdf5(waves(above=above))
    task, model = prepare(Settings(data=data, **SIZES), None)
    assert (task.widest, task.tokens_to_forecast) == (1, 4 * len("-9.99,-9.99;"))
    constraint = Constrained.for_tokenizer(task.tokenizer, task.grammar, vocabulary=259, rows=1, steps=1)
    assert constraint.allowed()[0, task.encode("-")].all()
    small = ["--val-series", "2", "--context", "32"]
    short = ["--points", "10", "--horizon", "3"]
    train = ["train", "--data", data, "--steps", "1", "--vocabulary", "symbols", "--out", "t", "--json", *small]
    assert run.main(train) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["flops"] == result["predicted_flops"]
    adapter = ["--adapter", f"t/cells/{result['cell']}/adapter"]
    assert run.main(["evaluate", "--data", data, "--json", "--forecast-series", "1", *adapter, *small, *short]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["unparsed_steps"]["validation"] == 0
    assert report["flops"]["validation"] == report["predicted_flops"]["validation"]
    assert report["flops"]["inference"] <= report["predicted_flops"]["inference"]  # which every number has a minus in
    assert {row["variable"] for row in report["scores"]} == {"all", "x0", "x1"}
    assert "law fit" not in {row["forecaster"] for row in report["scores"]}
    printed = []
    for draft in ("0", "12"):
        assert run.main(["forecast", "--data", data, "--system", "17", "--draft", draft, *short]) == 0
        printed.append(capsys.readouterr().out.splitlines()[:-1])
    assert printed[0] == printed[1]


class Joining(Tokenizer):
    """Joins ",", ";" and a minus, a space and a point, as Qwen's own does (4999, 54433 and 659)."""

    def encode(self, text: str) -> list[int]:
        return [token for piece in re.findall("[,;]-| [.]|.", text) for token in self._piece(piece)]

    def _piece(self, piece: str) -> list[int]:
        return [250 + ",; ".index(piece[0])] if len(piece) == 2 else super().encode(piece)


def test_each_symbol_is_a_token_of_its_own_whatever_the_tokenizer_would_join():
    plain = Tokenizer.from_pretrained(POCKET)
    task = Task.prepare(Settings(data=hdf5(waves(above=0.0)), separator=" "), plain)
    joining = replace(task, tokenizer=Joining(plain.path), _tokens={})
    text = task.text(0)
    assert all(joined in text for joined in (",-", ";-", " ."))
    assert len(joining.tokenizer.encode(text)) < len(text) == len(joining.tokens(0))
    assert joining.tokens(0) == task.tokens(0) == plain.encode(text)
    assert [one["ids"] for one in preprocessing(joining)["examples"]] == [
        plain.encode(one["text"]) for one in preprocessing(task)["examples"]
    ]


@pytest.mark.parametrize("variables", [1, 8])
def test_a_file_may_hold_any_number_of_variables(variables, capsys):
    data = hdf5(waves(variables=variables))
    small = ["--val-series", "1", "--forecast-series", "1", "--points", "8", "--horizon", "2"]
    assert run.main(["evaluate", "--data", data, "--json", "--out", "e", *small]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert {row["variable"] for row in scores} == {"all", *(f"x{v}" for v in range(variables))}
    assert run.main(["forecast", "--data", data, "--system", "0", "--points", "8", "--horizon", "2"]) == 0


def test_a_prompt_that_the_model_has_no_place_for_is_refused_by_what_makes_it_long(capsys):
    data = hdf5(waves(points=100, variables=8))
    assert run.main(["forecast", "--data", data, "--system", "0"]) == 2
    assert capsys.readouterr().err == (
        "points is 80, horizon 20: 3999 tokens with 8 variables: expected at most 2048, the model's "
        "max_position_embeddings\n"
    )
    assert not Path("ledger.sqlite").exists()
