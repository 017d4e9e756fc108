"""A training loss that knows numbers: digits weigh by their place, and probability near the true digit costs less."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_flops import Dispatched
from torch.utils.flop_counter import FlopCounterMode
from waves import damped_waves

from data.llmtime import Codec
from data.windows import IGNORED
from experiments.settings.record import POCKET, Settings
from experiments.task.task import Task
from experiments.training.step import training_step, validation_loss
from lora import add_logit_bias, add_lora
from qwen_min import FlopMeter, Qwen, Tokenizer, fast
from qwen_min.fast import loss as fast_loss
from qwen_min.layers import Linear
from qwen_min.loss import number_loss

V, DIGITS = 97, torch.tensor([13, 4, 57, 0, 96, 33, 21, 8, 70, 2])  # tokens, those of 0 to 9
SYMBOLS = torch.cat((DIGITS, torch.tensor([50, 51, 52])))
OPTIONS = {"digit_weights": (1.0, 0.5, 0.25), "number_loss": 0.3, "data": "waves.h5", "points": 5, "horizon": 3}


@pytest.fixture(autouse=True)
def restored():
    yield
    fast.on()


@pytest.mark.parametrize(
    ("codec", "text", "places"),
    [
        (Codec(2), "1.23,-10.45;", "0.12,-00.12;"),
        (Codec(3, shortest=True), "2.0,0.123;12.5,", "0.1,0.123;00.1,"),
        (Codec(2, point=False), "123,-045;1200,", "012,-012;0012,"),
        (Codec(2, separator=" "), "1 . 2 3,-4 . 5 6;", "0 . 1 2,-0 . 1 2;"),
        (Codec(1, point=False, separator=" "), "1 2,-3 4 5;", "0 1,-0 0 1;"),
        (Codec(0), "12,-3;", "00,-0;"),
    ],
)
def test_a_digit_has_a_place_before_the_point_or_a_decimals(codec, text, places):
    assert codec.places(text).tolist() == [int(c) if c.isdigit() else -1 for c in places]


def reference(logits, targets, vocabulary, digits, weights, factor) -> torch.Tensor:
    """Both losses by the equations, of all logits (B, T, V) at once."""
    logits, size = logits.double(), logits.shape[-1]
    over = torch.arange(size) if vocabulary is None else vocabulary
    outside = torch.full((size,), -torch.inf).double().index_fill(0, over, 0)
    each = F.cross_entropy((logits + outside).flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    total = (each * weights).sum()
    for digit, token in enumerate(digits):
        p = logits[targets == token][:, digits].softmax(-1)  # (n, 10)
        total = total + factor * sum(p[:, j].sum() * abs(j - digit) for j in range(10))
    return total


@pytest.mark.parametrize("at_once", [V, 10**9])
@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
@pytest.mark.parametrize("vocabulary", [None, SYMBOLS], ids=["full", "symbols"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "everything"])
def test_both_losses_and_gradients_are_as_the_equations(lora, vocabulary, plain, at_once, random_model, monkeypatch):
    monkeypatch.setitem(fast_loss.LOGITS_AT_ONCE, "cpu", at_once)
    monkeypatch.setattr(fast_loss, "LOGITS_KEPT", 5 * V)
    model = add_logit_bias(add_lora(random_model(), 3, seed=0) if lora else random_model())
    torch.nn.init.normal_(model.logit_bias)
    ids, weights = torch.randint(V, (3, 11)), torch.rand(3, 11)
    targets = SYMBOLS[torch.randint(len(SYMBOLS), (3, 11))]
    targets[0, 8:] = targets[1, 0] = IGNORED
    weights[2, :2] = 0
    expected = reference(model(ids), targets, vocabulary, DIGITS, weights, 0.7)
    trained = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected, trained)
    if plain:
        fast.off()
    total, count = model.loss(ids, targets, None, vocabulary, weights, DIGITS, 0.7)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    assert count == 33 - 4
    for got, gradient in zip(torch.autograd.grad(total, trained), wanted, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-4)  # sums over 29 tokens


def prepared(**options) -> tuple[Task, Qwen]:
    damped_waves(Path("waves.h5"), 8)
    settings = Settings(**{"context": 47, "batch_size": 3} | OPTIONS | options)
    model = add_lora(Qwen.from_pretrained(POCKET).requires_grad_(False), 2, seed=0)
    return Task.prepare(settings, Tokenizer.from_pretrained(POCKET)), model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"point": False, "separator": " ", "stride": 7},
        {"windows": "anywhere", "pad_side": "left"},
        {"vocabulary": "symbols", "trailing_zeros": False},
        {"count_padding": True},
    ],
    ids=str,
)
def test_a_step_takes_means_by_weight_and_over_digits_and_validation_stays_plain(options):
    """Windows of 47 tokens begin and end in the middle of numbers: digits keep the places they have in the text."""
    task, model = prepared(**options)
    batch, ten = task.train_batch(3), torch.tensor(task.tokenizer.encode("0123456789"))
    targets = torch.from_numpy(batch.targets_with_padding if task.settings.count_padding else batch.targets)
    weights = torch.ones(targets.shape).double().masked_fill(targets == IGNORED, 0)
    for row, (series, start) in enumerate(zip(batch.series, batch.start, strict=True)):
        real = np.flatnonzero(batch.targets[row] != IGNORED)
        places = task.codec.places(task.text(task.split.train[series]))[start + 1 :][: len(real)].tolist()
        weights[row, real] = torch.tensor([1.0 if n < 0 else (1.0, 0.5, 0.25)[min(n, 2)] for n in places]).double()
    with torch.no_grad():
        logits = model(torch.from_numpy(batch.inputs), padding=torch.from_numpy(batch.left_padding))
    vocabulary = None if batch.vocabulary is None else torch.from_numpy(batch.vocabulary)
    factor = 0.3 / torch.isin(targets, ten).sum()
    expected = reference(logits, targets, vocabulary, ten, weights / weights.sum(), factor)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    loss, _ = training_step(model, batch, range(3), optimizer, task.settings.count_padding, number_loss=0.3)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    without, _ = prepared(**options | {"digit_weights": (), "number_loss": 0.0})
    both = (validation_loss(model, some.validation_windows.at([0])) for some in (task, without))
    assert next(both) == next(both)


def test_both_are_charged_as_exact_what_runs_and_as_coursework_nothing(random_model):
    model, ids = add_lora(random_model(), 3, seed=0), torch.randint(V, (2, 9))
    both = {"weights": torch.rand(2, 9), "digits": DIGITS, "digit_factor": 0.3}
    charged = {}
    for convention in ("coursework", "exact", "matmul"):
        meters = [FlopMeter(convention) for _ in range(2)]
        for meter, options in zip(meters, ({}, both), strict=True):
            with meter:
                model.loss(ids, ids, **options)
        charged[convention] = [b - a for a, b in zip(*((m.total, m.backward) for m in meters), strict=True)]
    n, e, d = 18, model.config.hidden_size, 10
    product = n * d * (2 * e - 1)
    ahead = n + product + n * (10 * d + d + d + 2 * (d - 1))  # weights; softmax, times the distance, and both sums
    back = n * e + n * e * (2 * d - 1) + n * (3 * d + 2 * d - 1) + n * e
    assert charged == {"coursework": [0, 0], "exact": [ahead, back], "matmul": [2 * n * e * d] * 2}


def test_the_number_loss_is_charged_what_autograd_runs_op_by_op():
    hidden, head = torch.randn(2, 9, 20, requires_grad=True), Linear(20, V).requires_grad_(False)
    targets = DIGITS[torch.randint(10, (2, 9))]
    with FlopMeter("exact") as exact, FlopMeter("matmul") as matmul:
        total = number_loss(hidden, head, targets, DIGITS) + hidden.sum()  # another loss, whose gradient is added
    one = torch.ones_like(total)
    with Dispatched() as ran, FlopCounterMode(display=False) as counter:
        total.backward(one)
    assert exact.backward == ran.total and matmul.backward == counter.get_total_flops()
