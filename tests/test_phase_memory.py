"""Memory of a training step, a forward, a decoded token: predicted on the meta device, and what is alive on a CPU."""

import json
from pathlib import Path

import pytest
import torch

from experiments import run
from experiments.accounting import memory
from experiments.bench import resident
from lora import add_lora
from qwen_min import Qwen
from qwen_min.cache import KVCache

POCKET = str(Path(__file__).parents[1] / "weights" / "pocket")


@pytest.mark.parametrize("kv_heads", [1, 6])
@pytest.mark.parametrize(("rank", "targets"), [(0, ()), (4, ("q_proj", "v_proj")), (3, ("all-linear",))])
def test_a_training_step_holds_on_a_cpu_what_was_predicted_to_the_byte(make_config, rank, targets, kv_heads):
    config = make_config(num_key_value_heads=kv_heads)
    predicted = memory.predict("training step", config, 2, 9, rank, targets)
    model = Qwen(config)
    if rank:
        add_lora(model, rank, targets=targets)
    ids = torch.zeros(2, 9, dtype=torch.int64)
    with memory.Alive([*model.parameters(), ids]) as alive:
        total, count = model.loss(ids, ids)
        kept = alive.now
        (total / count).backward()
    trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert predicted["kept for the backward"] == kept > 0
    assert (predicted["gradients"], predicted["Adam"]) == (trained, 2 * trained)
    assert predicted["weights"] + predicted["LoRA"] == weights
    assert predicted["total"] == weights + 2 * trained + alive.most


@pytest.mark.parametrize("cached", [0, 20])
def test_a_forward_and_a_decoded_token_hold_on_a_cpu_what_was_predicted_to_the_byte(make_config, cached):
    config, phase = make_config(), memory.PHASES[2 if cached else 1]
    predicted = memory.predict(phase, config, 3, 9, cached=cached)
    model, new = Qwen(config), 1 if cached else 9
    cache = KVCache(config, 3, cached + 1) if cached else None
    if cache is not None:
        cache.advance(cached)
    ids = torch.zeros(3, new, dtype=torch.int64)
    there = [ids, *model.parameters(), *([cache.store] if cache else [])]
    with torch.no_grad(), memory.Alive(there) as alive:
        model(ids, cache)
    assert predicted["logits"] + predicted["at the peak"] == alive.most
    assert predicted["logits"] == 3 * new * config.vocab_size * 4
    heads = config.num_key_value_heads * config.head_dim
    assert predicted["KV cache"] == (2 * config.num_hidden_layers * 3 * (cached + 1) * heads * 4 if cached else 0)


def test_half_as_many_bytes_a_number_are_half_as_many_bytes(make_config):
    half = {"weight": torch.bfloat16, "activation": torch.bfloat16}
    wide, narrow = (memory.predict("decoded token", make_config(), 2, 1, cached=9, **kinds) for kinds in ({}, half))
    for part in ("weights", "KV cache", "logits"):
        assert wide[part] == 2 * narrow[part] > 0


@pytest.mark.parametrize("slope", [1, 3, 7])
def test_the_largest_batch_that_fits_is_that_of_trying_each(slope):
    def size(batch: int) -> int:
        return 10 + slope * batch + 5 * max(0, batch - 20)

    for most in range(8, 200, 3):
        assert memory.largest(size, most) == max(n for n in range(200) if n == 0 or size(n) <= most)


def test_the_command_shows_each_phase_and_the_largest_batch(capsys, monkeypatch):
    monkeypatch.setattr(resident, "measured", lambda phase, folder, holes, **job: 12_345 + holes)
    flags = ["flops", "--memory", "--model", POCKET, "--batch", "3", "--context", "8", "--rank", "2"]
    assert run.main([*flags, "--json", "--fit", "0.012", "--measure"]) == 0
    shown = json.loads(capsys.readouterr().out)
    config = memory.QwenConfig.from_file(Path(POCKET) / "config.json")
    for phase, fits in shown["largest_batch"].items():
        options = {"rank": 2, "targets": ["q_proj", "v_proj"], "cached": 8}
        measured = {"measured": 12_345, "with holes": 12_346}
        assert shown["bytes"][phase] == memory.predict(phase, config, 3, 8, **options) | measured
        sizes = [memory.predict(phase, config, n, 8, **options)["total"] for n in (fits, fits + 1)]
        assert sizes[0] <= 12 * 10**6 < sizes[1]
    assert run.main([*flags, "--fit", "0.012"]) == 0
    said = capsys.readouterr().out
    assert f"{shown['bytes']['forward']['total']:,}" in said and "most sequences at once in 0.012 GB" in said


@pytest.mark.parametrize("phase", memory.PHASES)
def test_a_measured_phase_runs(phase):
    """Its figure is this process's, which holds much else; that of a fresh one is for the real checkpoint."""
    job = {"phase": phase, "folder": POCKET, "batch": 2, "tokens": 9, "rank": 2, "targets": ["q_proj"], "cached": 9}
    assert resident.run(job | {"weight": "bfloat16", "activation": "float32"}) is not None
