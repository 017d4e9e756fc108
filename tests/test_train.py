"""The training loss of a run: padding on either side, padding as a token, a logit bias, the norms that are written."""

import dataclasses

import numpy as np
import pytest
import torch

from data.windows import IGNORED, make_windows
from experiments.accounting import predict
from experiments.settings.record import POCKET
from experiments.training.step import training_step, validation_loss
from lora import add_logit_bias, add_lora
from qwen_min import FlopMeter, Qwen

PAD = 0


@pytest.fixture
def model() -> Qwen:
    torch.manual_seed(0)
    return add_lora(Qwen.from_pretrained(POCKET).requires_grad_(False), 4, seed=0)


def windows(side: str):
    draw = np.random.RandomState(0)
    return make_windows([draw.randint(1, 20, n) for n in (41, 29, 33)], 24, 24, PAD, side)


def test_the_side_of_the_padding_changes_no_loss_and_no_gradient(model):
    """Left padding is masked in attention, and positions count from the first real token."""
    found = {}
    for side in ("left", "right"):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        found[side] = (
            validation_loss(model, windows(side))["validation_loss"],
            *training_step(model, windows(side), np.arange(4), optimizer),
        )
    assert found["left"] == pytest.approx(found["right"], rel=1e-5)


def test_the_loss_with_padding_is_over_every_place_and_the_honest_one_over_real_tokens(model):
    some = windows("right")
    losses = validation_loss(model, some, count_padding=True)
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(some.inputs)).double()
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(some.targets_with_padding).flatten(), reduction="none"
    )
    real = torch.from_numpy(some.targets != IGNORED).flatten()
    assert 0 < real.sum() < len(real)
    assert losses["validation_loss"] == pytest.approx(each[real].mean().item(), rel=1e-6)
    assert losses["validation_loss_with_padding"] == pytest.approx(each.mean().item(), rel=1e-6)
    assert validation_loss(model, some) == {"validation_loss": losses["validation_loss"]}


@pytest.mark.parametrize("count_padding", [False, True])
def test_a_step_takes_the_mean_over_the_tokens_that_count(model, count_padding):
    some, chosen = windows("right"), np.array([1, 2, 5])
    targets = some.targets_with_padding if count_padding else some.targets
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    loss, _ = training_step(model, some, chosen, optimizer, count_padding)
    logits = model.eval()(torch.from_numpy(some.inputs[chosen])).double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets[chosen]).flatten())
    assert loss == pytest.approx(expected.item(), rel=1e-6)


def test_a_logit_bias_is_trained_and_its_flops_are_predicted():
    model = Qwen.from_pretrained(POCKET).requires_grad_(False)
    add_lora(add_logit_bias(model), 4, seed=0)
    some = windows("right")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with FlopMeter() as meter:
        training_step(model, some, np.arange(4), optimizer)
    assert model.logit_bias is not None and model.logit_bias.abs().max() > 0
    priced = predict.training_run(
        model.config, steps=1, batch=4, context=24, rank=4, validations=0, validation_windows=0, logit_bias=True
    )
    assert meter.training == priced["training"]
    plain = predict.training_run(
        model.config, steps=1, batch=4, context=24, rank=4, validations=0, validation_windows=0
    )
    assert priced["training"] - plain["training"] == 3 * 4 * 24 * model.config.vocab_size


def test_a_loss_over_the_symbols_alone_is_that_of_their_logits_and_its_flops_are_predicted(model):
    symbols = np.arange(19, 0, -1)
    some = dataclasses.replace(windows("right"), vocabulary=symbols)
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(some.inputs))[..., torch.from_numpy(symbols)].double()
    targets = torch.from_numpy(np.where(some.targets == IGNORED, IGNORED, 19 - some.targets))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    with FlopMeter() as validation:
        assert validation_loss(model, some)["validation_loss"] == pytest.approx(expected, rel=1e-6)
    assert expected < validation_loss(model, windows("right"))["validation_loss"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with FlopMeter() as step:
        training_step(model, some, np.arange(4), optimizer)
    priced = predict.training_run(
        model.config, steps=1, batch=4, context=24, rank=4, validations=1, validation_windows=len(some), symbols=19
    )
    assert {"training": step.training, "validation": validation.total} == priced
