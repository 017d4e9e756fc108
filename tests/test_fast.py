"""The plain model is whole without the wing for speed, and every fast way gives what the plain maths gives."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qwen_min import FlopMeter, fast, ops
from qwen_min.generate import decode, left_padded, prefill
from qwen_min.layers import Linear
from qwen_min.loss import IGNORED, linear_cross_entropy

ROOT = Path(__file__).parents[1]
ANGLES = torch.linspace(0, 3, 20).view(1, 5, 1, 4).repeat(1, 1, 1, 2)
FROZEN = torch.linspace(-1, 1, 48).view(6, 8).bfloat16()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[2], k.shape[2]).tril(3).bool() & (torch.arange(k.shape[2]) != 1)
    plainly = [t[:, :, : q.shape[2]] for t in (k, v)]
    return torch.cat([ops.attend(q, k, v, mask), ops.attend(q, *plainly, None)])


def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    head, targets = Linear(20, 301), (torch.arange(14) * 20).view(2, 7)
    del head.weight
    head.weight = weight  # with its gradient
    targets[1, 4:] = IGNORED
    return linear_cross_entropy(hidden, head, targets, bias)[0]


CASES = {
    "linear": (lambda x, w, b: ops.linear(x, w, b, 9), (2, 5, 8), (6, 8), (6,)),
    "linear, a frozen narrow weight": (lambda x: ops.linear(x, FROZEN, FROZEN[:, 0]), (2, 5, 8)),
    "plus": (lambda x, branch: ops.add_residual(x, 1 * branch), (2, 5, 8), (2, 5, 8)),
    "plus, low rank": (lambda y, *xab: ops.add_low_rank(1 * y, *xab, 0.7), (2, 5, 6), (2, 5, 8), (3, 8), (6, 3)),
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, 1e-3), (2, 5, 8), (8,)),
    "rotate": (lambda x: ops.rotate(x, ANGLES.cos(), ANGLES.sin()), (2, 5, 3, 8)),
    "attend": (attend, (2, 6, 5, 8), (2, 3, 9, 8), (2, 3, 9, 8)),
    "attend, one token": (lambda *qkv: ops.attend(*qkv, None), (2, 6, 1, 8), (2, 3, 9, 8), (2, 3, 9, 8)),
    "attend, tokens after a cache": (lambda *qkv: ops.attend(*qkv, None), (2, 6, 5, 8), (2, 3, 9, 8), (2, 3, 9, 8)),
    "swiglu": (ops.swiglu, (2, 5, 8), (2, 5, 8)),
    "cross_entropy": (loss, (2, 7, 20), (301, 20), (301,)),
}


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_fast_way_has_the_values_the_gradients_and_the_charges_of_the_plain_maths(case, trained, fast_again):
    op, *shapes = CASES[case]
    inputs, found = [torch.randn(shape) for shape in shapes], []
    for switch in (fast.off, fast.on):
        switch()
        leaves = [t.clone().requires_grad_(trained) for t in inputs]
        with FlopMeter("exact") as meter:
            out = op(*leaves)
        if trained:
            (out * torch.linspace(1, 2, out.numel()).view(out.shape)).sum().backward()
        found.append((out, [leaf.grad for leaf in leaves], list(meter.charges())))
    (plain, gradients, charges), (got, *others) = found
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(others[0], gradients, atol=1e-5, rtol=1e-5)
    assert others[1] == charges and got.dtype == plain.dtype


class Guesses:
    def __init__(self, tokens: list[int]):
        self.tokens, self.taken = tokens, 0

    def guess(self) -> list[tuple[int, int]]:
        return [(0, self.tokens[self.taken]), (0, 5), (1, random.randrange(97))] if self.taken % 2 else []

    def advance(self, token: int) -> None:
        self.taken += 1


def test_reading_prompts_and_making_tokens_by_fast_ways_gives_those_of_the_plain_loop(random_model, fast_again):
    model, (ids, padding) = random_model(), left_padded([[5, 6, 7], [9] * 8])
    found = []
    for switch in (fast.off, fast.on):
        switch()
        read = prefill(model, ids, 30, padding)
        with FlopMeter("exact") as meter:
            tokens = torch.stack(list(decode(model, read, 30)), 1)
        one = prefill(model, ids[1:], 40)
        draft = Guesses(tokens[1].tolist())
        drafted = torch.cat(list(decode(model, one, 30, draft=draft)))
        assert draft.taken == (30 if fast.enabled() else 0) and torch.equal(drafted, tokens[1])
        found.append((tokens.tolist(), read.hidden, list(meter.charges())))
    assert found[0][0] == found[1][0] and found[0][2] == found[1][2]
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=0)


def test_every_fast_way_is_compared_here():
    assert {case.partition(",")[0] for case in CASES} | {"read", "forward", "tree"} == set(fast.WAYS)


WORK = """
import sys
sys.modules["qwen_min.fast"] = None  # as if it were not installed
import torch
from safetensors.torch import save_file
from lora import add_lora
from qwen_min import FlopMeter, Qwen, ops

print(ops.FAST)
folder, out = sys.argv[1:]
ids = torch.arange(36).view(2, 18)
model = Qwen.from_pretrained(folder)
with FlopMeter() as meter, torch.no_grad():
    logits = model(ids)
tokens = model.generate(ids, 20)
add_lora(model, 3, seed=0)
for name, parameter in model.named_parameters():
    if name.endswith("lora_b"):
        torch.nn.init.constant_(parameter, 0.1)
total, count = model.loss(ids[:, :-1], ids[:, 1:], torch.tensor([0, 4]))
(total / count).backward()
gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
flops = torch.tensor([meter.total, meter.backward])
save_file({"logits": logits, "tokens": tokens, "total": total.detach(), "flops": flops} | gradients, out)
"""


def test_the_plain_model_loads_generates_trains_and_counts_without_the_wing(reference, tmp_path, monkeypatch):
    folder, theirs = reference()
    found = {}
    for kind in ("plain", "fast"):
        path = tmp_path / kind
        if kind == "plain":
            done = subprocess.run([sys.executable, "-c", WORK, folder, path], cwd=ROOT, capture_output=True, text=True)
            assert (done.stdout, done.stderr) == ("{}\n", "")  # none of the wing's ways is there
        else:
            monkeypatch.setattr(sys, "argv", ["", str(folder), path])
            exec(WORK.replace('sys.modules["qwen_min.fast"] = None', ""), {})
        found[kind] = load_file(path)
    torch.testing.assert_close(found["plain"], found["fast"], atol=1e-5, rtol=1e-5)
    assert len(found["plain"]) == 4 + 2 * 2 * 2 and all(t.abs().max() > 0 for t in found["plain"].values())
    with torch.no_grad():
        expected = theirs(torch.arange(36).view(2, 18)).logits
    torch.testing.assert_close(found["plain"]["logits"], expected, atol=1e-5, rtol=0)
