"""`explain`: the lines of the real files, real shapes, and prices whose numbers give the integer that is charged."""

import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
from waves import refused

from experiments import run
from experiments.accounting import explain, flops_table
from experiments.accounting.predict import on_meta, predict
from qwen_min import QwenConfig
from qwen_min.flops import CONVENTIONS

ROOT = Path(__file__).parents[1]
CONFIG = replace(QwenConfig.named("Qwen2.5-0.5B"), num_hidden_layers=3)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(("rank", "cached"), [(0, 0), (8, 0), (8, 5)])
def test_the_numbers_of_every_formula_give_its_integer_and_all_calls_the_prediction(convention, rank, cached):
    model, ids, cache = on_meta(CONFIG, 2, 7, rank, cached=cached)
    calls = explain.calls(model, ids, cache)
    predicted = predict(CONFIG, 2, 7, rank=rank, cached=cached, convention=convention).total
    assert sum(call.cost(convention) for call in calls) == predicted
    page = explain.explain("Qwen", model, calls, convention)
    assert f"\n{predicted:,} of the forward's {predicted:,} FLOPs, 100.00%, in the convention {convention}:\n" in page
    total, times = 0, 1
    for line in page.splitlines():
        if found := re.search(r"^\w+ in .*?(?:, (\d+) times)?$", line):
            times = int(found[1] or 1)
        elif found := re.search(r"^    \w+: .* = (.*) = ([\d,]+)$", line):
            assert eval(found[1].replace("·", "*")) == int(found[2].replace(",", "")), line
            total += times * int(found[2].replace(",", ""))
    assert total == predicted


@pytest.mark.parametrize(
    "layer", ["model.layers.1", "model.layers.0.mlp", "model.layers.0.self_attn.k_proj", "lm_head"]
)
def test_a_layer_has_the_flops_that_the_table_of_layers_has(layer):
    model, ids, _ = on_meta(CONFIG, 2, 7, 8)
    listed = flops_table.per_layer(predict(CONFIG, 2, 7, rank=8))[layer]["forward"]
    page = explain.explain(layer.removeprefix("model."), model, explain.calls(model, ids), "coursework")
    assert f"\n{listed:,} of the forward's " in page


def test_a_layer_is_shown_with_its_source_its_shapes_and_the_worked_number_of_the_documents(capsys):
    assert run.main(["explain", "self_attn.q_proj"]) == 0
    page = capsys.readouterr().out
    (number,) = re.findall(r"^qwen_min/layers\.py:(\d+)$", page, re.MULTILINE)
    source = (ROOT / "qwen_min" / "layers.py").read_text().splitlines()
    assert source[int(number) - 1] == "class Linear(Metered):" and "        return ops.linear(x, self.weight" in page
    assert page.endswith(
        """
linear in model.layers.N.self_attn.q_proj, 24 times
    x (4, 512, 896), weight (896, 896), bias (896,) -> (4, 512, 896)
    q: N·O·(2·I-1) = 2048·896·(2·896-1) = 3,286,499,328
    q: N·O = 2048·896 = 1,835,008
"""
    )


@pytest.mark.parametrize("op", explain.OPS)
def test_an_op_is_shown_with_its_prices_and_its_lines(op, capsys):
    assert run.main(["explain", op, "--model", "Qwen2.5-7B", "--rank", "2"]) == 0
    page = capsys.readouterr().out
    assert inspect.getsource(explain.OPS[op]).rstrip() in page
    prices = [name for name in explain.PRICES if re.search(rf"charge\({name},", page)]
    assert prices and all(f"\n{name} = Price(" in page for name in prices)
    assert (f"\n{op} in " in page) == (op != "add_logit_bias")  # which no model has by itself


def test_without_a_name_all_ops_and_layers_are_listed_and_another_name_is_refused(capsys):
    assert run.main(["explain"]) == 0
    listed = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert listed == [*explain.OPS, "Qwen", "Decoder", "Embedding", "Block", "RMSNorm", "Attention", "Linear", "SwiGLU"]
    for argv, line in (
        (["explain", "attention"], "'attention' is no op or layer: expected one of embedding, "),
        (["explain", "attend", "--convention", "paper"], "--convention is 'paper': expected one of coursework, "),
        (["explain", "attend", "--batch", "0"], "--batch is 0: expected at least 1"),
    ):
        assert refused(capsys, *argv).startswith(line)
