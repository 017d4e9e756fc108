"""Bytes that the ops are charged, against the sizes of the tensors that they take and give, forward and backward."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora import add_logit_bias, add_lora
from qwen_min import FlopMeter, Qwen, fast, ops
from qwen_min.costs import Node

COMPOSED = {"linear": ("linear", "bias"), "add_low_rank": ("lora", "lora_out")}
COMPOSED["attend"] = ("scores", "scale", "softmax", "values")
"""Functions of several steps: torch's own calls are counted in them."""
WHOLE = {"rms_norm": ("norm",), "rotate": ("rotation",), "swiglu": ("silu",), "add_residual": ("residual",)}
WHOLE["add_logit_bias"] = ("logit_bias",)
"""Functions that are one step: their own arguments and results are counted."""
STEPS = {"mm", "bmm", "addmm", "_softmax", "_softmax_backward_data", "mul", "add", "sum"}


def size(*values) -> int:
    """Bytes of the tensors of numbers among some values."""
    tensors = [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dim()]
    return sum(t.numel() * t.element_size() for t in tensors)


class Moved(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.moved = Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.name().split("::")[1].split(".")[0].rstrip("_") in STEPS:
            self.moved += Counter(read=size(*args), written=size(out))
        return out


def charged(tree: Node, phase: str, *names: str) -> Counter[str]:
    costs = [getattr(node, phase) for _, node in tree.walk() if node.charge and (not names or node.name in names)]
    return Counter(read=sum(c.read for c in costs), written=sum(c.written for c in costs))


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_a_forward_reads_and_writes_the_tensors_of_its_ops(kv_heads, random_model, monkeypatch, fast_again):
    fast.off()
    moved: dict[str, Counter[str]] = {name: Counter() for name in COMPOSED | WHOLE}

    def counted(name, function, *args):
        with Moved() as inside:
            out = function(*args)
        moved[name] += inside.moved if name in COMPOSED else Counter(read=size(*args), written=size(out))
        return out

    model = add_logit_bias(add_lora(random_model(num_key_value_heads=kv_heads), 3, 6.0))
    for name in COMPOSED | WHOLE:
        monkeypatch.setattr(ops, name, partial(counted, name, getattr(ops, name)))
    with FlopMeter() as meter, torch.no_grad():
        model(torch.zeros(2, 9, dtype=torch.int64))
    tree = meter.tree()
    assert moved == {name: charged(tree, "forward", *names) for name, names in (COMPOSED | WHOLE).items()}
    hidden = 2 * 9 * model.config.hidden_size * 4
    assert charged(tree, "forward", "embedding") == Counter(read=hidden, written=hidden)
    assert charged(tree, "forward", "angles") == Counter(written=2 * 9 * model.config.head_dim * 4)


def random(*shape: int, gradient: bool = True) -> torch.Tensor:
    return torch.randn(shape, requires_grad=gradient)


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (0, 1)])
@pytest.mark.parametrize("name", COMPOSED)
def test_the_backward_of_products_moves_what_autograds_own_products_move(name, frozen, fast_again):
    fast.off()
    shapes = {
        "linear": [(2, 3, 5), (7, 5), (7,)],
        "add_low_rank": [(2, 3, 5), (4, 5), (7, 4)],
        "attend": [(2, 6, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4)],
    }[name]
    inputs = [random(*shape, gradient=i not in frozen) for i, shape in enumerate(shapes)]
    extra = {"linear": (), "add_low_rank": (2.0,), "attend": (None,)}[name]
    first = (random(2, 3, 7, gradient=False),) if name == "add_low_rank" else ()
    with FlopMeter() as meter:
        out = getattr(ops, name)(*first, *inputs, *extra)
    with Moved() as ran:
        out.backward(torch.randn_like(out))
    expected = charged(meter.tree(), "backward")
    if name == "add_low_rank" and 0 not in frozen:  # where the gradients of W x and B A x meet, which is not here
        expected -= Counter(read=2 * size(inputs[0]), written=size(inputs[0]))
    assert expected == ran.moved


def backward(function, *inputs) -> Counter[str]:
    """The bytes that its backward is charged, all `inputs` that want a gradient getting one."""
    with FlopMeter() as meter:
        function(*inputs)
    return charged(meter.tree(), "backward")


def test_the_other_backwards_read_the_gradient_and_what_it_needs_and_write_each_gradient_that_is_wanted():
    """By the tensors' sizes: x, y one activation each; w a norm's weight."""
    x, y, w = random(2, 3, 8), random(2, 3, 8), random(8)
    fixed_x, fixed_w = x.detach(), w.detach()
    norm = partial(ops.rms_norm, eps=1e-6)
    assert backward(norm, x, w) == Counter(read=size(x, x, w), written=size(x, w))
    assert backward(norm, x, fixed_w) == Counter(read=size(x, x, w), written=size(x))
    assert backward(norm, fixed_x, w) == Counter(read=size(x, x), written=size(w))
    assert backward(norm, fixed_x, fixed_w) == Counter()
    assert backward(ops.swiglu, x, y) == Counter(read=size(x, x, y), written=size(x, y))
    assert backward(ops.swiglu, fixed_x, y) == Counter(read=size(x, x), written=size(y))
    assert backward(ops.add_residual, x, fixed_x.clone()) == Counter(read=size(x, x), written=size(x))
    cos, sin = ops.rotation_angles(torch.arange(3)[None], 2, 1e4)
    assert backward(ops.rotate, random(2, 3, 4, 2), cos, sin) == Counter(
        read=size(random(2, 3, 4, 2), cos, sin), written=size(random(2, 3, 4, 2))
    )
    assert backward(lambda x: ops.shared(x, 3), x) == Counter(read=3 * size(x), written=size(x))
    assert backward(ops.add_logit_bias, fixed_x, w) == Counter(read=size(x), written=size(w))
    table, ids = random(11, 8), torch.zeros(2, 3, dtype=torch.int64)
    assert backward(ops.embedding, ids, table) == Counter(read=size(x), written=size(x))


def test_the_loss_reads_the_logits_and_its_backward_writes_their_gradient(random_model):
    model, ids = random_model().requires_grad_(False), torch.zeros(2, 9, dtype=torch.int64)
    hidden = random(2, 9, model.config.hidden_size)
    from qwen_min.loss import linear_cross_entropy

    with FlopMeter() as meter:
        linear_cross_entropy(hidden, model.lm_head, ids)
    logits = 2 * 9 * model.config.vocab_size * 4
    assert charged(meter.tree(), "forward", "loss") == Counter(read=logits, written=2 * 9 * 8)
    both = logits + size(hidden)
    assert charged(meter.tree(), "backward", "loss") == Counter(read=both, written=both)


def test_narrower_weights_are_read_as_such_and_all_else_as_before(make_config):
    """Every weight once, of the embedding one row a token."""
    with torch.device("meta"), torch.no_grad(), FlopMeter() as meter:
        model = add_lora(Qwen(make_config()), 3)
        model(torch.empty(2, 9, dtype=torch.int64))
    wide, narrow = (meter.tree(weight=n).forward for n in (4, 2))
    base = {n: p for n, p in model.named_parameters() if "lora" not in n and "embed" not in n}
    base.setdefault("lm_head.weight", model.lm_head.weight)
    read = sum(p.numel() for p in base.values()) + 2 * 9 * model.config.hidden_size
    assert (wide.read - narrow.read, wide.written) == (2 * read, narrow.written)
    halves = meter.tree(activation=2, weight=2).forward
    angles = 2 * 9 * model.config.head_dim * 4  # cosines and sines are float32
    assert (2 * halves.read, 2 * halves.written) == (wide.read, wide.written + angles)
