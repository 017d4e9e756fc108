"""Protocols: the three reports' ways as settings, the default's, and where a report's way is a trap."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from data import llmtime, lotka_volterra
from experiments import run
from experiments.run_folder.files import read_toml
from experiments.settings import protocols
from experiments.settings.record import POCKET, Settings
from experiments.task.task import Task
from qwen_min import Tokenizer

REPORTS = ("fung", "liu", "rai")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(POCKET)


@pytest.fixture(scope="module")
def tasks(tokenizer) -> dict[str, Task]:
    return {name: Task.prepare(protocols.load(name).settings, tokenizer) for name in protocols.names()}


def test_an_unknown_protocol_is_refused_in_one_line_that_names_those_there_are():
    with pytest.raises(ValueError, match=r"^protocol is 'gauss': expected one of best, default, fung, liu, rai$"):
        protocols.load("gauss")


def test_the_default_protocol_differs_from_plain_settings_in_sizes_alone():
    sizes = {"protocol", "steps", "default_steps", "context_steps", "final_steps"}
    sizes |= {"val_every", "val_series", "forecast_series"} | {"forecast_cells"}  # a study forecasts with others
    plain, default = (dataclasses.asdict(s) for s in (Settings(), protocols.load("default").settings))
    assert {name for name in plain if plain[name] != default[name]} <= sizes


@pytest.mark.parametrize("name", REPORTS)
def test_every_trap_that_a_protocol_keeps_has_a_footnote(name):
    settings = protocols.load(name).settings
    about = {note["about"] for note in read_toml(protocols.FOLDER / f"{name}.toml")["footnote"]}
    assert {"scores", "accounting"} <= about  # none compares with a naive forecast, none counts exactly
    assert settings.scaling != "series percentile" or "scaling" in about
    assert not settings.count_padding or "loss" in about
    assert settings.trailing_zeros or about & {"preprocessing", "forecasts"}
    assert not settings.temperature or about & {"sampling", "forecasts"}


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ([[1.1335121, 1.1031258], [0.55542254, 1.2579137]], "2.267,2.206;1.111,2.516;"),
        ([[0.8521567, 0.9479834], [0.6482769, 0.94272685]], "1.704,1.896;1.297,1.885;"),
    ],
)
def test_fungs_worked_examples_come_out(tasks, raw, text):
    task = tasks["fung"]
    starts = task.dataset.series[:, :2]
    (system,) = np.flatnonzero((np.abs(starts - np.array(raw)) < 1e-6).all((1, 2)))
    assert task.text(int(system), 2) == text


def test_lius_worked_example_comes_out_and_its_ids(tasks):
    task, text = tasks["liu"], "0.92,0.74;0.56,0.77;0.34,0.70;0.23,0.59;"
    rng = np.random.default_rng(task.settings.split_seed)
    assert task.text(int(rng.permutation(1000)[1]), 4) == text  # "the second sequence from the training set"
    ids = [15, 13, 24, 17, 11, 15, 13, 22, 19, 26, 15, 13, 20, 21, 11, 15, 13, 22, 22, 26]
    pocket = dict(zip("0123456789.,;", task.tokenizer.encode("0123456789.,;"), strict=True))
    qwen = dict(zip("0123456789.,;", [*range(15, 25), 13, 11, 26], strict=True))
    assert task.tokenizer.encode(text)[:20] == [pocket[c] for c in text[:20]]
    assert [qwen[c] for c in text[:20]] == ids


def test_rais_worked_example_comes_out(tasks):
    series = np.array([[2.9, 3.2, 3.8, 4.5, 5.1], [1.1, 0.9, 0.7, 0.6, 0.5]]).T
    alpha = llmtime.whole_series_percentile(series)
    assert round(alpha, 3) == 0.498
    text = tasks["rai"].codec.encode(series / alpha)
    assert text == "5.82,2.21;6.43,1.81;7.63,1.41;9.04,1.20;10.24,1.00;"


def test_fungs_four_systems_are_all_held_out(tasks):
    split = tasks["fung"].split
    assert {len(split.train), len(split.validation), len(split.test)} == {800, 100}
    assert {506, 20, 654, 906} <= set(split.validation) | set(split.test)


def test_liu_forecasts_from_seventy_per_cent_of_the_tokens_a_hundred_more(tasks):
    task = tasks["liu"]
    system = int(task.split.validation[0])
    assert len(task.tokens(system, 70)) == 0.7 * len(task.tokens(system)) == 700
    assert task.tokens_to_forecast == 100
    first = np.random.default_rng(task.settings.split_seed).permutation(1000)[700:710]
    assert task.forecast_systems("shown") == first.tolist()


def test_rais_windows_of_768_tokens_are_a_third_padding(tasks):
    """Trap 1: its lower loss at the longest context is that of padding; it reports 34.6 % of tokens."""
    task = tasks["rai"]
    windows = task.under(task.settings.updated({"context": 768})).validation_windows
    assert round(1 - windows.real_tokens / windows.targets.size, 3) == 0.346


def test_rais_scale_has_seen_the_horizon_and_the_honest_ones_have_not(tokenizer, tmp_path, monkeypatch):
    """Trap 3: changing what is to be forecast must not change what the model reads."""
    dataset = lotka_volterra.load()
    changed = dataset.series.copy()
    changed[:, 80:] *= 3
    other = dataclasses.replace(dataset, series=changed)

    def prompt(settings: Settings, data) -> list[int]:
        monkeypatch.setattr(lotka_volterra, "load", lambda path=None: data)
        return Task.prepare(settings, tokenizer).tokens(712, 50)

    rai = protocols.load("rai").settings
    assert prompt(rai, dataset) != prompt(rai, other)
    honest = rai.updated({"scaling": "context percentile"})
    assert prompt(honest, dataset) == prompt(honest, other)


def test_one_alpha_of_the_training_part_ignores_all_other_series(tokenizer, monkeypatch):
    dataset = lotka_volterra.load()
    changed = dataset.series.copy()
    changed[700:] *= 5
    monkeypatch.setattr(lotka_volterra, "load", lambda path=None: dataclasses.replace(dataset, series=changed))
    alphas = Task.prepare(Settings(), tokenizer).alphas
    assert set(alphas) == {float(dataset.series[:700].max()) / 9.99}


@pytest.mark.parametrize("name", ["default", *REPORTS])
def test_what_is_written_reads_back_within_half_a_unit(tasks, name):
    from experiments.task.preprocessing import preprocessing

    worked = preprocessing(tasks[name])
    trip = worked["round_trip"]
    assert trip["max_abs_error_scaled"] <= trip["half_unit_scaled"] * (1 + 1e-9)
    assert 0 < trip["mean_abs_error_raw"] < trip["max_abs_error_raw"]
    for example in worked["examples"]:
        assert "".join(example["pieces"]) == example["text"]
        assert np.allclose(np.array(example["scaled"]) * example["alpha"], example["raw"])


def test_a_run_of_a_protocol_that_is_no_reports_ends_with_its_records():
    """Bug: it trained to the end, and then was refused, as no report claims anything of it."""
    short = ["--steps", "1", "--context", "64", "--batch-size", "1", "--val-series", "1"]
    assert run.main(["train", "--protocol", "best", *short, "--out", "best"]) == 0
    assert Path("best/results.md").is_file() and not Path("best/accounting.csv").exists()
