"""`model.trace(ids)`: every activation by name, with the shape its letters say, and no hook left after."""

import pytest
import torch
from torch import Tensor

from qwen_min import ops
from qwen_min.cache import KVCache
from qwen_min.view import causal

IDS = torch.arange(14).view(2, 7) * 5
OF_A_LAYER = {
    **{"input_norm": "B T E", "q": "B H T D", "k": "B K T D", "v": "B K T D"},
    **{"q_rotated": "B H T D", "k_rotated": "B K S D", "attention": "B H T D", "o_proj": "B T E"},
    **{"attention_residual": "B T E", "post_attention_norm": "B T E", "mlp": "B T E", "mlp_residual": "B T E"},
}


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("cached", [0, 3])
def test_names_and_letters_are_those_of_every_part_and_the_sizes_are_those_of_the_letters(cached, way, random_model):
    model = random_model(num_hidden_layers=2)
    cache = KVCache(model.config, 2, 10)
    cache.advance(cached)
    found = model.trace(IDS, cache)
    layers = {f"layers.{i}.{name}": letters for i in (0, 1) for name, letters in OF_A_LAYER.items()}
    expected = {"embedding": "B T E"} | layers | {"norm": "B T E", "logits": "B T V"}
    assert [(a.name, a.shape) for a in found] == list(expected.items())
    sizes = {"B": 2, "T": 7, "S": 7 + cached, "E": 48, "H": 6, "K": 2, "D": 8, "V": 97}
    for a in found:
        assert list(a.tensor.shape) == [sizes[letter] for letter in a.shape.split()], a.name


def test_the_activations_fulfil_the_equations_and_are_those_of_an_ordinary_forward(way, random_model):
    """Of the fast ways some write their sum over one of its parts, which a trace must have kept before."""
    model = random_model()
    with torch.no_grad():
        logits, view = model(IDS), causal(model.config, 0, 7, None, IDS.device)
    of: dict[str, Tensor] = {a.name: a.tensor for a in model.trace(IDS)}
    pairs = [(of["logits"], logits)]
    before = of["embedding"]
    for at in ("layers.0.", "layers.1."):
        q, k, v = (of[at + name] for name in ("q_rotated", "k_rotated", "v"))
        for rotated, plain in ((q, of[at + "q"]), (k, of[at + "k"])):
            pairs.append((rotated.transpose(1, 2), ops.rotate(plain.transpose(1, 2), view.cos, view.sin)))
        pairs += [
            (of[at + "attention"], ops.attend(q, k, v, view.mask)),
            (of[at + "attention_residual"], before + of[at + "o_proj"]),
            (of[at + "mlp_residual"], of[at + "attention_residual"] + of[at + "mlp"]),
        ]
        before = of[at + "mlp_residual"]
    with torch.no_grad():
        pairs += [(of["norm"], model.model.norm(before)), (of["logits"], model.lm_head(of["norm"]))]
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_nothing_is_left_on_the_model_after_a_trace_or_an_error(random_model):
    model, attend = random_model(), ops.attend
    model.trace(IDS)
    with pytest.raises(ValueError, match="outside of the vocabulary"):
        model.trace(IDS + 97)
    assert hooks(model) == 0 and ops.attend is attend


def test_a_compiled_model_is_refused(random_model):
    model = random_model()
    model.model.layers[0].forward = model.model.layers[0].forward  # as `compile` leaves it
    with pytest.raises(ValueError, match="the model is compiled: expected one that is not"):
        model.trace(IDS)
