"""Seconds of each op in a real forward, beside those that FLOPs and bytes predict: who gets which, never how many."""

import json
from pathlib import Path

import pytest
import torch

from experiments import run
from experiments.accounting import clock
from experiments.accounting.predict import predict
from lora import add_lora
from qwen_min import Qwen, ops

POCKET = str(Path(__file__).parents[1] / "weights" / "pocket")
ATTENTION = ("scores", "scale", "softmax", "values")


@pytest.mark.parametrize("cached", [0, 5])
@pytest.mark.parametrize("slow", ["swiglu", "attend", "rms_norm", "linear"])
def test_the_seconds_of_an_op_are_those_from_its_charge_to_the_next(make_config, monkeypatch, slow, cached):
    """The clock stands still but in one op, where it moves by a second."""
    wall, real = [0.0], ops.FAST[slow]
    monkeypatch.setattr(clock, "now", lambda: (wall[0], 3 * wall[0]))

    def slowed(*args):
        wall[0] += 1
        return real(*args)

    monkeypatch.setitem(ops.FAST, slow, slowed)
    model = Qwen(make_config())
    add_lora(model, 2, targets=["v_proj"])
    took = {place: n for place, n in clock.clocked(model, torch.zeros(2, 3, dtype=torch.int64), cached).items() if n}
    names = {"swiglu": "silu", "attend": "scores", "rms_norm": "norm"}
    places = {name for name, module in model.named_modules() if type(module).__name__ in PLACES[slow]}
    assert took == {(place, names.get(slow, slow)): 1 for place in places}


PLACES = {"swiglu": {"SwiGLU"}, "attend": {"Attention"}, "rms_norm": {"RMSNorm"}, "linear": {"Linear", "LoRALinear"}}


def test_every_second_stands_beside_its_prediction(make_config):
    config = make_config()
    seconds = clock.clocked(Qwen(config), torch.zeros(2, 3, dtype=torch.int64))
    meter = predict(config, 2, 3, convention="exact")
    tree, infinite = meter.tree(), float("inf")
    for rate, bandwidth, whole in ((1, infinite, meter.total), (infinite, 1, tree.forward.read + tree.forward.written)):
        rows = clock.beside(tree, seconds, rate, bandwidth)
        assert sum(row["predicted"] for row in rows) == whole
        assert {row["memory_bound"] for row in rows if row["predicted"]} == {float(bandwidth == 1)}
        assert sum(row["measured"] for row in rows) == pytest.approx(sum(seconds.values()))
        assert {row["places"] for row in rows if ".layers." in row["op"]} == {config.num_hidden_layers}
    scores = sum(n for name, n in meter.by_component().items() if name in ATTENTION)
    row = next(r for r in clock.beside(tree, seconds, 1, infinite) if r["op"] == "model.layers.*.self_attn scores")
    assert row["predicted"] == scores and row["measured"] > 0
    assert clock.table(rows)[-1].split()[0] == "all"


def test_the_command_prints_them_and_the_page_has_them(capsys, tmp_path):
    flags = ["flops", "--model", POCKET, "--batch", "2", "--context", "9", "--rank", "2", "--measure"]
    assert run.main([*flags, "--json", "--html", str(tmp_path / "page.html")]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["machine"]["flops_per_second"] > 0 and all(row["measured"] > 0 for row in shown["seconds"])
    assert '"model.layers.0.self_attn.q_proj lora":' in (tmp_path / "page.html").read_text()
    assert run.main([*flags, "--cache", "5"]) == 0
    assert "model.layers.*.mlp.up_proj linear" in capsys.readouterr().out
