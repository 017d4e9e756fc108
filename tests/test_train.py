"""The training loss of a run: padding on either side, padding as a token, a logit bias, the norms that are written."""

import dataclasses

import numpy as np
import pytest
import torch

from data.windows import IGNORED, Windows, make_windows
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


def windows(side: str) -> Windows:
    draw = np.random.RandomState(0)
    return make_windows([draw.randint(1, 20, n) for n in (41, 29, 33)], 24, 24, PAD, side)


def step(model: Qwen, some: Windows, chosen=range(4), count_padding: bool = False) -> tuple[float, float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    return training_step(model, some, chosen, optimizer, count_padding)


def losses_of(model: Qwen, inputs: np.ndarray, targets: np.ndarray, vocabulary=slice(None)) -> torch.Tensor:
    """Cross-entropy of each place by torch's own function, in float64; 0 where a target is ignored."""
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(inputs))[..., vocabulary].double()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(targets).flatten(), ignore_index=IGNORED, reduction="none"
    )


def test_the_side_of_the_padding_changes_no_loss_and_no_gradient(model):
    """Left padding is masked in attention, and positions count from the first real token."""
    left, right = (
        (validation_loss(model, windows(side))["validation_loss"], *step(model, windows(side)))
        for side in ("left", "right")
    )
    assert left == pytest.approx(right, rel=1e-5)


def test_the_loss_with_padding_is_over_every_place_and_the_honest_one_over_real_tokens(model):
    some = windows("right")
    losses = validation_loss(model, some, count_padding=True)
    each = losses_of(model, some.inputs, some.targets_with_padding)
    real = torch.from_numpy(some.targets != IGNORED).flatten()
    assert 0 < real.sum() < len(real)
    expected = {"validation_loss": each[real].mean(), "validation_loss_with_padding": each.mean()}
    assert losses == pytest.approx({name: loss.item() for name, loss in expected.items()}, rel=1e-6)
    assert validation_loss(model, some) == {"validation_loss": losses["validation_loss"]}


@pytest.mark.parametrize("count_padding", [False, True])
def test_a_step_takes_the_mean_over_the_tokens_that_count(model, count_padding):
    some, chosen = windows("right"), np.array([1, 2, 5])
    targets = (some.targets_with_padding if count_padding else some.targets)[chosen]
    expected = losses_of(model, some.inputs[chosen], targets).sum() / (targets != IGNORED).sum()
    assert step(model, some, chosen, count_padding)[0] == pytest.approx(expected.item(), rel=1e-6)


def test_a_logit_bias_is_trained_and_its_flops_are_predicted():
    model = add_lora(add_logit_bias(Qwen.from_pretrained(POCKET).requires_grad_(False)), 4, seed=0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with FlopMeter() as meter:
        training_step(model, windows("right"), np.arange(4), optimizer)
    assert model.logit_bias is not None and model.logit_bias.abs().max() > 0
    shape = {"steps": 1, "batch": 4, "context": 24, "rank": 4, "validations": 0, "validation_windows": 0}
    priced, plain = (predict.training_run(model.config, **shape, logit_bias=bias) for bias in (True, False))
    assert meter.training == priced["training"]
    assert priced["training"] - plain["training"] == 3 * 4 * 24 * model.config.vocab_size


def test_a_loss_over_the_symbols_alone_is_that_of_their_logits_and_its_flops_are_predicted(model):
    symbols = np.arange(19, 0, -1)
    some = dataclasses.replace(windows("right"), vocabulary=symbols)
    targets = np.where(some.targets == IGNORED, IGNORED, 19 - some.targets)
    expected = losses_of(model, some.inputs, targets, torch.from_numpy(symbols)).sum() / some.real_tokens
    with FlopMeter() as validation:
        assert validation_loss(model, some)["validation_loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert expected < validation_loss(model, windows("right"))["validation_loss"]
    with FlopMeter() as training:
        step(model, some)
    priced = predict.training_run(
        model.config, steps=1, batch=4, context=24, rank=4, validations=1, validation_windows=len(some), symbols=19
    )
    assert {"training": training.training, "validation": validation.total} == priced
