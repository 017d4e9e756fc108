"""A model with its adapter merged, as a folder that Hugging Face's libraries open."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import run
from experiments.settings.record import POCKET
from lora import add_logit_bias, add_lora, save_adapter
from lora.layer import lora_layers
from qwen_min import Qwen

IDS = torch.arange(40)[None] * 5


@pytest.fixture
def adapted() -> Qwen:
    model = add_lora(Qwen.from_pretrained(POCKET), 3, 7.0, "all-linear", seed=0)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_b, std=0.1)
    save_adapter(model, "adapter")
    return model


@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-4), ("bfloat16", 0.2)])
@torch.no_grad()
def test_transformers_computes_with_the_folder_what_the_adapter_gives_here(dtype, within, adapted):
    """Rounded to bfloat16, weights are off by a 256th of the adapter's; of what is stored both give the same logits."""
    assert run.main(["export", "--adapter", "adapter", "--dtype", dtype, "--out", "merged"]) == 0
    theirs = AutoModelForCausalLM.from_pretrained("merged", dtype="auto")
    assert theirs.dtype == getattr(torch, dtype) and theirs.generation_config.eos_token_id == 258
    logits, stored = adapted(IDS), theirs.float()(IDS).logits
    torch.testing.assert_close(stored, logits, atol=within, rtol=0)
    torch.testing.assert_close(Qwen.from_pretrained("merged")(IDS), stored, atol=1e-4, rtol=0)
    assert (logits - Qwen.from_pretrained(POCKET)(IDS)).abs().max() > 1
    ours, merged = (AutoTokenizer.from_pretrained(folder) for folder in (POCKET, "merged"))
    assert merged.encode("1.20;") == ours.encode("1.20;")


def test_the_base_alone_is_exported_bit_by_bit(tmp_path):
    assert run.main(["export", "--out", str(tmp_path / "base")]) == 0
    ours, again = (Qwen.from_pretrained(folder, None).state_dict() for folder in (POCKET, tmp_path / "base"))
    assert ours.keys() == again.keys() and all(torch.equal(ours[name], again[name]) for name in ours)


def test_what_the_format_has_no_place_for_is_refused_and_nothing_is_written(adapted, capsys):
    with pytest.raises(ValueError, match=r"^the model has model\.layers\.0\.self_attn\.q_proj\.lora_a, which is no"):
        adapted.save_pretrained("merged")
    save_adapter(add_logit_bias(adapted), "biased")
    assert run.main(["export", "--adapter", "biased", "--out", "merged"]) == 2
    assert capsys.readouterr().err.startswith("the model has logit_bias, which is no weight of Qwen2: expected")
    Path("mine").mkdir()
    Path("mine/thesis.txt").touch()
    assert run.main(["export", "--out", "mine"]) == 2
    assert not Path("merged").exists() and Path("mine/thesis.txt").exists()
