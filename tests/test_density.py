"""The density of the next step: products of plain forwards, quantiles of samples, the CRPS of an integral."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from waves import damped_waves, refused

from experiments import run
from experiments.forecasting.density import Density, densities, priced
from experiments.forecasting.forecast import forecast
from experiments.settings.record import Settings
from experiments.task.constrain import symbol_tokens
from experiments.task.model import prepare
from qwen_min import FlopMeter

SETTINGS = Settings(data="waves.h5", points=12, horizon=1)
ALONE = Density(np.array([0.0, 1.0, 3.0]), np.array([0.2, 0.5, 0.3]), 0.0)


@pytest.fixture(autouse=True)
def elsewhere():
    damped_waves(Path("waves.h5"), 30)


@pytest.mark.parametrize(
    "text", [{}, {"point": False}, {"point": False, "separator": " "}], ids=["default", "no point", "spaces"]
)
def test_probabilities_are_products_of_plain_forwards_sum_to_1_and_cost_what_was_predicted(text):
    """Bug: without a point a density was refused by a traceback."""
    task, model = prepare(replace(SETTINGS, **text), None)
    task.alphas[:] = 1.0
    expected = priced(task, model.config, 3)
    with FlopMeter() as meter:
        made, flops = densities(task, model, 3, task.codec.encode([[2.5, 1.25]]), below=0.0)
    assert flops == meter.total == expected
    ids = symbol_tokens(task.tokenizer, task.grammar.symbols)
    for variable, (density, before) in enumerate(zip(made, ("", task.codec.encode([[2.5]])[:-1] + ","), strict=True)):
        np.testing.assert_array_equal(np.round(density.values * 100), np.arange(1000))
        assert density.probabilities.sum() == pytest.approx(1, abs=1e-12) and density.pruned == 0
        for value in (0.0, 1.37, float(density.values[density.probabilities.argmax()]), 9.99):
            number, state = task.codec.encode([[value]])[:-1] + ",;"[variable], task.grammar.step_ends
            text, nats = before + number, 0.0
            whole = task.tokens(3, 12) + task.encode(text)
            with torch.inference_mode():
                logits = model(torch.tensor([whole]))[0, :, ids].double()
            for place, symbol in enumerate(map(task.grammar.symbols.index, text)):
                allowed = torch.from_numpy(task.grammar.follows[state])
                row = logits[len(task.tokens(3, 12)) - 1 + place].masked_fill(~allowed, -torch.inf)
                nats -= float(row.log_softmax(-1)[symbol]) * (place >= len(before))
                state = task.grammar.next[state, symbol]
            assert density.probabilities[round(value * 100)] == pytest.approx(np.exp(-nats), rel=1e-4)


def test_what_is_left_out_is_a_bound_and_saves_flops():
    task, model = prepare(SETTINGS, None)
    (whole, _), most = densities(task, model, 3, "2.50,1.25;", below=0.0)
    (some, _), flops = densities(task, model, 3, "2.50,1.25;", below=1e-2)
    assert flops < most and len(some.values) < len(whole.values) and 0 < some.pruned < 1
    assert some.probabilities.sum() + some.pruned == pytest.approx(1, abs=1e-12)
    for value in whole.values[::50]:
        cdf = [
            one.cdf[np.searchsorted(one.values, value, "right") - 1] if value >= one.values[0] else 0
            for one in (whole, some)
        ]
        assert abs(cdf[0] - cdf[1]) <= some.pruned


def test_quantiles_are_those_of_many_samples():
    task, model = prepare(replace(SETTINGS, num_samples=2000), None)
    samples = forecast(task, model, [3]).samples[0, :, 0, 0]
    (density, _), _ = densities(task, model, 3, "2.50,1.25;")
    for level in (0.1, 0.25, 0.5, 0.75, 0.9):
        low, high = (density.quantile(level + off) for off in (-0.04, 0.04))  # 0.04: 3.6 standard errors of 2,000 draws
        assert low <= np.quantile(samples, level) <= high


def test_crps_pit_and_quantiles_worked_out_another_way():
    assert [ALONE.quantile(level) for level in (0.1, 0.2, 0.5, 0.7, 0.9, 1.0)] == [0, 0, 1, 1, 3, 3]
    assert [ALONE.pit(y) for y in (-1, 0, 0.5, 1, 3, 4)] == pytest.approx([0, 0.1, 0.2, 0.45, 0.85, 1])
    at = np.linspace(-5, 8, 1_300_001)
    f = np.array([0, *ALONE.cdf])[np.searchsorted(ALONE.values, at, "right")]
    for truth in (-2.0, 0.0, 0.7, 2.0, 4.5):
        assert ALONE.crps(truth) == pytest.approx(np.sum((f - (at >= truth)) ** 2) * 1e-5, abs=1e-4)


def test_forecast_writes_draws_and_charges_a_density(capsys):
    asked = ["forecast", "--data", "waves.h5", "--points", "12", "--horizon", "2", "--system", "3", "--density"]
    with FlopMeter() as meter:
        assert run.main([*asked, "--out", "f.png"]) == 0
    said = capsys.readouterr().out
    assert "f.density.json" in said and f"{meter.total:,} FLOPs" in said
    found = json.loads(Path("f.density.json").read_text())
    assert found.keys() == {"system", "time", "prey", "predator"}
    for name in ("prey", "predator"):
        one = found[name]
        assert sum(one["probabilities"]) + one["pruned"] == pytest.approx(1)
        assert one["crps"] > 0 and 0 <= one["pit"] <= 1
    assert run.main(["budget", "--json"]) == 0
    totals = json.loads(capsys.readouterr().out)["totals"]
    assert (totals["spent"], totals["reserved"], totals["wasted"]) == (meter.total, 0, 0)
    assert "density with free text: expected constrained" in refused(capsys, *asked, "--no-constrained")
    assert "a tree of over 2000 symbols: expected fewer digits" in refused(capsys, *asked, "--decimals", "4")
