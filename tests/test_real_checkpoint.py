"""The official weights (a folder named by QWEN_MIN_CHECKPOINT) against transformers, in float32 on the CPU.

transformers runs first and is dropped before ours is loaded, so that one copy of the weights is held at a time.
"""

import gc
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.accounting.predict import predict
from experiments.task.task import Task
from lora import add_lora
from qwen_min import FlopMeter, Qwen, QwenConfig, Tokenizer, fast
from qwen_min.loss import IGNORED

NEW = 64
TEXT = "The populations of hares and lynxes were: 1.00,0.52;1.13,0.47;1.31,0.44;1.56,0.45;1.87,0.52;"
PROMPT = "Predators and their prey rise and fall together because"


@pytest.fixture(scope="module")
def tokenizer(real_checkpoint) -> Tokenizer:
    return Tokenizer.from_pretrained(real_checkpoint)


@pytest.fixture(scope="module")
def theirs(real_checkpoint, tokenizer) -> SimpleNamespace:
    """What transformers computes: logits of a text, greedy tokens after a prompt."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(real_checkpoint, dtype=torch.float32).eval()
    for name in ("temperature", "top_p", "top_k", "eos_token_id"):
        setattr(model.generation_config, name, None)
    text, prompt = (torch.tensor([tokenizer.encode(t)]) for t in (TEXT, PROMPT))
    with torch.inference_mode():
        logits = model(text).logits.clone()
        tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW)
    assert tokens.shape == (1, prompt.shape[1] + NEW)
    result = SimpleNamespace(text=text, prompt=prompt, logits=logits, tokens=tokens.clone())
    del model
    gc.collect()
    return result


@pytest.fixture(scope="module")
def ours(theirs, real_checkpoint) -> Qwen:
    return Qwen.from_pretrained(real_checkpoint)


def test_a_series_has_a_token_for_each_symbol_where_the_tokenizer_would_join_a_separator_and_a_minus(tokenizer):
    text = "1.00,-2.50;-3.00,0.75;"
    assert len(tokenizer.encode(text)) == len(text) - 2
    tokens = Task.encode(SimpleNamespace(tokenizer=tokenizer), text)
    assert [tokenizer.decode([token]) for token in tokens] == list(text)


def test_it_is_the_half_billion_model(ours):
    assert ours.config == QwenConfig.named("Qwen2.5-0.5B")
    assert sum(p.numel() for p in ours.parameters()) == 494_032_768


def test_logits_equal_those_of_transformers(way, ours, theirs):
    """To 1e-3 of values up to 30, after 24 layers in float32."""
    with torch.inference_mode():
        logits = ours(theirs.text)
    torch.testing.assert_close(logits, theirs.logits, atol=1e-3, rtol=0)
    assert theirs.logits.abs().max() > 10


def test_64_greedy_tokens_equal_those_of_transformers(way, ours, theirs):
    assert torch.equal(ours.generate(theirs.prompt, max_new_tokens=NEW, stop=()), theirs.tokens)


def test_the_loss_equals_float64_cross_entropy_on_the_logits_of_transformers(ours, theirs):
    targets = theirs.text.roll(-1, 1)
    targets[0, -1] = targets[0, 3] = IGNORED
    with torch.no_grad():
        total, count = ours.loss(theirs.text, targets)
    expected = F.cross_entropy(theirs.logits[0].double(), targets[0], ignore_index=IGNORED)
    assert count == theirs.text.shape[1] - 2
    torch.testing.assert_close(total / count, expected, atol=1e-5, rtol=0)
    assert 0.1 < expected < 10


def test_weights_kept_in_bfloat16_give_the_same_logits(ours, theirs, real_checkpoint):
    """The file holds bfloat16, so widening it at load or in each product is the same."""
    kept = Qwen.from_pretrained(real_checkpoint, dtype=torch.bfloat16, compute_dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(kept(theirs.text), theirs.logits, atol=1e-3, rtol=0)


def test_steps_of_lora_lower_the_loss_at_the_predicted_cost_and_plain_ones_agree(real_checkpoint, theirs, fast_again):
    model = add_lora(Qwen.from_pretrained(real_checkpoint), 8, seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(trained, lr=1e-3)
    ids, losses = theirs.text[:, :33], []
    predicted = list(predict(model.config, 1, 32, rank=8, training=True).charges())

    def gradients() -> list[Tensor]:
        optimiser.zero_grad()
        with FlopMeter() as meter:
            total, count = model.loss(ids[:, :-1], ids[:, 1:])
        (total / count).backward()
        losses.append(total.item() / count)
        assert list(meter.charges()) == predicted
        return [p.grad.clone() for p in trained if p.grad is not None]

    for _ in range(3):
        gradients()
        optimiser.step()
    fused = gradients()
    fast.off()
    for got, expected in zip(fused, gradients(), strict=True):
        # relative to the largest of its tensor, as in test_lora
        torch.testing.assert_close(got, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
    assert losses[0] > losses[1] > losses[2] > losses[3] and len(fused) == len(trained)
