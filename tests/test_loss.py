"""The chunked loss against float64 cross-entropy over all logits: value, gradients, and memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lora import add_lora
from qwen_min import FlopMeter
from qwen_min.fast import loss
from qwen_min.layers import Linear
from qwen_min.loss import IGNORED, linear_cross_entropy, token_cross_entropy

B, T, E, V = 3, 14, 20, 301
CHUNKS = [V, 2 * V + 5, 7 * V, 41 * V, 42 * V, 10**9]
"""Logits at once: one token, two, seven (which divides 42), all but one, all, and more than all."""


@pytest.fixture
def parts() -> tuple[Tensor, Linear, Tensor, Tensor]:
    """Hidden states, head, targets with padding at the end of two rows and one hole, and a bias."""
    head = Linear(E, V)
    torch.nn.init.normal_(head.weight, std=0.7)
    targets = torch.randint(V, (B, T))
    targets[0, 9:] = targets[1, 13:] = targets[2, 4] = IGNORED
    return (torch.randn(B, T, E, requires_grad=True), head, targets, torch.randn(V).requires_grad_())


def in_float64(hidden: Tensor, head: Linear, targets: Tensor, bias: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Value of the sum, and its gradients in hidden, head and bias, over all logits at once."""
    leaves = [t.detach().double().requires_grad_() for t in (hidden, head.weight, bias) if t is not None]
    logits = leaves[0] @ leaves[1].T + (leaves[2] if bias is not None else 0)
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    total.backward()
    return total.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("at_once", CHUNKS)
def test_value_and_gradients_equal_float64_cross_entropy_over_all_logits(at_once, biased, parts, monkeypatch):
    monkeypatch.setitem(loss.LOGITS_AT_ONCE, "cpu", at_once)
    monkeypatch.setattr(loss, "LOGITS_KEPT", at_once)
    hidden, head, targets, bias = parts
    wanted = [hidden, head.weight] + [bias] * biased
    total, count = linear_cross_entropy(hidden, head, targets, bias if biased else None)
    (total / count).backward()
    expected, gradients = in_float64(hidden, head, targets, bias if biased else None)
    assert count == 42 - 7 and total.dtype == torch.float64
    torch.testing.assert_close(total / count, expected / count, atol=1e-6, rtol=0)  # float32 logits round at 6e-8
    for parameter, gradient in zip(wanted, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, (gradient / count).float(), atol=1e-5, rtol=0)
        assert gradient.abs().max() / count > 1e-3


@pytest.mark.parametrize("biased", [False, True])
def test_a_restricted_vocabulary_is_the_cross_entropy_over_its_logits_alone(biased, parts):
    hidden, head, targets, bias = parts
    tokens = torch.tensor([300, 4, 17, 0, 255])
    targets = tokens[targets % 5].where(targets != IGNORED, IGNORED)
    wanted = [hidden, head.weight] + [bias] * biased
    total, count = linear_cross_entropy(hidden, head, targets, bias if biased else None, tokens)
    total.backward()
    leaves = [t.detach().double().requires_grad_() for t in (hidden, head.weight, bias)]
    logits = leaves[0] @ leaves[1].T + (leaves[2] if biased else 0)
    apart = torch.full((V,), float("-inf"), dtype=torch.float64).index_fill(0, tokens, 0)
    expected = F.cross_entropy((logits + apart).flatten(0, 1), targets.flatten(), reduction="sum")
    expected.backward()
    assert count == 42 - 7
    torch.testing.assert_close(total, expected.detach(), rtol=1e-6, atol=0)
    for parameter, leaf in zip(wanted, leaves, strict=False):
        torch.testing.assert_close(parameter.grad, leaf.grad.float(), atol=1e-4, rtol=0)
    each = token_cross_entropy(hidden, head, targets, bias if biased else None, tokens)
    torch.testing.assert_close(each.sum(), total.detach())


def test_a_restricted_vocabulary_is_charged_as_a_head_of_its_size(parts):
    hidden, head, targets, _ = parts
    tokens = torch.arange(V - 13, V)
    with FlopMeter("matmul") as meter:
        linear_cross_entropy(hidden, head.requires_grad_(False), targets % 13 + V - 13, None, tokens)
    assert meter.total == 2 * 42 * E * 13 and meter.backward == meter.total


def test_a_target_outside_of_a_restricted_vocabulary_is_refused(parts):
    hidden, head, targets, _ = parts
    targets = (targets % 3).where(targets != IGNORED, IGNORED)
    targets[1, 1] = 7
    with pytest.raises(ValueError, match="target 7 is not in the vocabulary asked for: expected one of its 3"):
        linear_cross_entropy(hidden, head, targets, None, torch.arange(3))


@pytest.mark.parametrize("tokens", [[], [0, 1, 1], [-1, 0], [0, V]], ids=str)
def test_a_restricted_vocabulary_is_a_set_of_tokens(tokens, parts):
    """A token named twice would count twice in the softmax, and -1 would be the last one."""
    with pytest.raises(ValueError, match="vocabulary asked for is no set of tokens: expected some of 0 to 300, each"):
        linear_cross_entropy(parts[0], parts[1], torch.full((B, T), IGNORED), None, torch.tensor(tokens).long())


@pytest.mark.parametrize("scale", [1e4, 1e30])
@pytest.mark.parametrize("forbidden", [0, 50])
def test_huge_logits_and_a_block_that_a_bias_forbids_give_the_loss_of_float64(scale, forbidden, parts, monkeypatch):
    """The first block's highest logit was -inf then, and its distance to itself NaN."""
    monkeypatch.setitem(loss.LOGITS_AT_ONCE, "cpu", 42 * 20)
    hidden, head, targets, bias = parts
    with torch.no_grad():
        head.weight.mul_(scale)
        bias[:forbidden] = -math.inf
    targets = targets.where(targets == IGNORED, targets.clamp(min=forbidden))
    total, _ = linear_cross_entropy(hidden, head, targets, bias)
    torch.testing.assert_close(total, in_float64(hidden, head, targets, bias)[0], rtol=1e-6, atol=0)
    total.backward()
    assert hidden.grad.isfinite().all()


def test_torchs_checkpointing_recomputes_the_same_gradients(random_model):
    """It forbids a backward to read what it saved twice."""
    ids, gradients = torch.arange(24).view(2, 12), []
    for run in (lambda model: model(ids), lambda model: checkpoint(model, ids, use_reentrant=False)):
        model = add_lora(random_model(), 3, seed=0)
        run(model).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("which", range(3))
def test_one_gradient_alone_is_what_it_is_among_all(which, parts):
    hidden, head, targets, bias = parts
    leaves = [hidden, head.weight, bias]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == which)
    total, _ = linear_cross_entropy(hidden, head, targets, bias)
    total.backward()
    assert [leaf.grad is not None for leaf in leaves] == [i == which for i in range(3)]
    expected = in_float64(hidden, head, targets, bias)[1][which].float()
    torch.testing.assert_close(leaves[which].grad, expected, atol=1e-4, rtol=0)  # sums: 35 times the mean's 1e-5


def test_padding_costs_nothing_whatever_it_holds(parts):
    hidden, head, targets, bias = parts
    total, _ = linear_cross_entropy(hidden, head, targets, bias)
    total.backward()
    assert hidden.grad is not None and not hidden.grad[targets == IGNORED].any()
    other = torch.where((targets == IGNORED)[..., None], torch.randn_like(hidden), hidden)
    assert torch.equal(linear_cross_entropy(other, head, targets, bias)[0], total)


def test_a_batch_of_padding_alone_is_a_sum_of_zero_over_no_tokens(parts):
    hidden, head, targets, _ = parts
    total, count = linear_cross_entropy(hidden, head, torch.full_like(targets, IGNORED))
    total.backward()
    assert (total.item(), count) == (0.0, 0) and hidden.grad is not None and not hidden.grad.any()


def test_without_gradients_nothing_is_made_for_a_backward(parts):
    hidden, head, targets, bias = parts
    with torch.no_grad():
        total, _ = linear_cross_entropy(hidden, head, targets, bias)
    assert not total.requires_grad
    assert torch.equal(total, linear_cross_entropy(hidden, head, targets, bias)[0].detach())


class LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("at_once", [V, 5 * V, 16 * V])
def test_never_more_logits_exist_than_were_asked_for(at_once, parts, monkeypatch):
    """E and so the head's (V, E) gradient are small here: the largest tensor would be the (N, V) logits."""
    monkeypatch.setitem(loss.LOGITS_AT_ONCE, "cpu", at_once)
    hidden, head, targets, bias = parts
    with LargestTensor() as forward:
        total, _ = linear_cross_entropy(hidden, head, targets, bias)
    with LargestTensor() as backward:
        total.backward()
    assert max(forward.elements, backward.elements) <= max(at_once, V * E) < B * T * V
    with LargestTensor() as whole:
        (hidden @ head.weight.T).sum()
    assert whole.elements == B * T * V  # the recorder would have seen them


def test_a_tied_head_receives_the_gradients_of_both_its_uses(random_model):
    model = random_model(tie_word_embeddings=True)
    ids = torch.randint(97, (2, 9))
    total, _ = model.loss(ids, ids)
    total.backward()
    got = model.lm_head.weight.grad.clone()
    model.zero_grad()
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten(), reduction="sum").backward()
    torch.testing.assert_close(got, model.lm_head.weight.grad, atol=1e-4, rtol=1e-5)  # sums over 18 tokens


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 3, 1, 0]], ids=str)
@pytest.mark.parametrize("rows", [4, 2, 1])
@pytest.mark.parametrize("more", [0, 6])
def test_12_combinations_of_padding_groups_and_order_give_one_loss(more, rows, order, random_model, monkeypatch):
    """The mean and each gradient to 1e-6 of their size, measured as a vector.

    The weights are float64: what is float32 even then (norms, rotation, a block's softmax) rounds a gradient at 1e-7.
    All in float32 the other order of the sums alone is 7e-7, and 1.1e-6 on a processor without fused multiply-add."""
    model = add_lora(random_model(), 3, seed=0).double()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(97, (4, 21))
    targets = ids.roll(-1, 1)
    for row, length in enumerate((21, 12, 5, 17)):
        targets[row, length - 1 :] = IGNORED

    def run(ids: Tensor, targets: Tensor, rows: int) -> list[Tensor]:
        """The mean over all rows, a group of them at a time, and its gradients."""
        model.zero_grad()
        number, value = int((targets != IGNORED).sum()), torch.zeros((), dtype=torch.float64)
        for part in zip(ids.split(rows), targets.split(rows), strict=True):
            total, _ = model.loss(*part)
            (total / number).backward()
            value += total.detach() / number
        return [value, *(p.grad.double() for p in model.parameters() if p.grad is not None)]

    expected = run(ids, targets, 4)
    assert len(expected) == 1 + 8 and all(tensor.norm() > 1e-3 for tensor in expected)
    padded = F.pad(ids, (0, more), value=9)[order], F.pad(targets, (0, more), value=IGNORED)[order]
    for at_once in (97, 1000, 10**9):
        monkeypatch.setitem(loss.LOGITS_AT_ONCE, "cpu", at_once)
        for got, wanted in zip(run(*padded, rows), expected, strict=True):
            assert (got - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("bad", [-1, V, -101, 10**9])
def test_a_target_that_is_no_token_is_refused(bad, parts):
    """A negative one was once counted as token 0."""
    hidden, head, targets, _ = parts
    targets[1, 2] = bad
    with pytest.raises(ValueError, match="a target is outside of the vocabulary: expected 0 to 300, or -100"):
        linear_cross_entropy(hidden, head, targets)


def test_targets_of_another_shape_are_refused(parts):
    hidden, head, targets, _ = parts
    with pytest.raises(ValueError, match=r"targets are \[3, 13\]: expected \[3, 14\], one for each token"):
        linear_cross_entropy(hidden, head, targets[:, 1:])
