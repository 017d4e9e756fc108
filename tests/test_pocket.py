"""The pocket checkpoint: the committed folder, its tokenizer, its data, and the command that makes it."""

import os
import re
import signal
import unicodedata
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.llmtime import Codec
from experiments.run import main
from experiments.settings.record import POCKET
from experiments.training import pocket
from qwen_min import Qwen, Tokenizer
from qwen_min.load import read_tensors


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(POCKET)


@pytest.fixture(scope="module")
def model():
    return Qwen.from_pretrained(POCKET)


@pytest.fixture
def tiny(monkeypatch):
    """Shrink the model, the windows and the held-out set, so that a training takes a second."""
    small = replace(pocket.CONFIG, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    changed = {"CONFIG": small, "SHORT": 64, "CONTEXT": 96, "TOKENS": 384, "HELD_OUT": 16, "WARM_UP": 5}
    changed |= {"CHECKPOINT_EVERY": 15}
    for name, value in changed.items():
        monkeypatch.setattr(pocket, name, value)


def test_the_committed_model_is_small_grouped_query_and_tied(model):
    config = model.config
    assert 2.3e6 < sum(p.numel() for p in model.parameters()) < 2.5e6
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.tie_word_embeddings and config.max_position_embeddings >= 1000
    assert sum(file.stat().st_size for file in POCKET.rglob("*")) < 12e6


def test_the_committed_folder_is_what_the_command_writes(tmp_path):
    pocket._save(Qwen(pocket.CONFIG), pocket.byte_tokenizer(), tmp_path)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (POCKET / name).read_text() == (tmp_path / name).read_text()
    assert {file.name for file in POCKET.iterdir()} == {file.name for file in tmp_path.iterdir()} | {"README.md"}
    readme = (POCKET / "README.md").read_text()
    assert f"pretrain-pocket --steps {pocket.STEPS} --seed 0" in readme and "A toy" in readme


def test_logits_equal_those_of_transformers(model):
    """5e-4: logits are up to 24 in size, and ours and theirs in float32 each differ from float64 by 1e-4."""
    from transformers import AutoModelForCausalLM

    theirs, report = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    ids = torch.randint(model.config.vocab_size, (2, 300))
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=5e-4, rtol=0)


def test_greedy_forecasts_keep_the_format_and_the_range(model, tokenizer):
    """Twenty steps after 80, positions 800 to 1000. How good they are is not tested: the toy's forecasts of a sine are
    no better than its last value."""
    t = np.arange(80)[:, None]
    values = 2.5 + 1.8 * np.sin(2 * np.pi * t / 23 + [[0.3, 1.7]])
    text = tokenizer.decode(model.generate([tokenizer.encode(Codec().encode(values))], 200)[0])
    decoded = Codec().decode(text, variables=2)
    assert decoded.rejected == 0 and len(decoded.values) == 100
    future = decoded.values[80:]
    assert future.min() > 0.2 and future.max() < 4.8 and len(np.unique(future, axis=0)) > 2


def test_the_readme_tells_the_held_out_loss_of_the_committed_weights(model):
    """A thousandth: other threads sum in another order."""
    readme = (POCKET / "README.md").read_text()
    (stated,) = re.findall(r"Held-out loss: ([0-9.]+) nats", readme)
    seed = int(re.findall(r"--seed (\d+)", readme)[-1])
    assert pocket.held_out_loss(model, pocket.byte_tokenizer(), seed) == pytest.approx(float(stated), abs=1e-3)


def test_committed_ids_of_single_bytes_are_gpt2s_order(tokenizer):
    """The order of Radford et al.'s `encoder.py`, which Qwen keeps, as transformers has it."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    for number, letter in enumerate(bytes_to_unicode().values()):
        assert tokenizer.token_id(letter) == number
    assert tokenizer.encode("0123456789") == list(range(15, 25))
    assert tokenizer.encode(",.;- ") == [11, 13, 26, 12, 220]
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>") == [256, 257, 258]
    assert len(tokenizer) == 259 == pocket.CONFIG.vocab_size


def test_ids_of_single_bytes_are_those_of_the_official_tokenizer(real_checkpoint, tokenizer):
    official = Tokenizer.from_pretrained(real_checkpoint)
    for letter in map(chr, range(128)):
        assert tokenizer.encode(letter) == official.encode(letter)
    series = Codec().encode(pocket.draw_series(np.random.RandomState(0)))
    assert tokenizer.encode(series) == official.encode(series)


@given(st.text().filter(lambda text: "<|" not in text))  # hypothesis takes up special tokens from our sources
def test_any_text_comes_back_from_its_bytes_in_normal_form_c(text):
    ids = Tokenizer.from_pretrained(POCKET)
    assert ids.decode(ids.encode(text)) == unicodedata.normalize("NFC", text)
    assert len(ids.encode(text)) == len(unicodedata.normalize("NFC", text).encode())


def test_transformers_reads_the_tokenizer_with_its_special_tokens_and_chat_format(tokenizer):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(POCKET)
    assert (theirs.pad_token_id, theirs.eos_token_id) == (256, 258)
    assert theirs("1.23,0.45;é 猫<|im_end|>")["input_ids"] == tokenizer.encode("1.23,0.45;é 猫<|im_end|>")
    messages = [("system", "Be brief."), ("user", "1.23;")]
    roles = [{"role": role, "content": text} for role, text in messages]
    chat = theirs.apply_chat_template(roles, tokenize=False, add_generation_prompt=True)
    assert chat == Tokenizer.chat(messages)


def test_synthetic_series_are_finite_in_range_varied_and_of_the_seed():
    series = np.stack([pocket.draw_series(np.random.RandomState(seed)) for seed in range(400)])
    assert series.shape == (400, 126, 2) and np.isfinite(series).all()
    assert series.min() >= 0 and series.max() <= 14.99
    tops = series.max((1, 2))
    assert (tops < 1).sum() > 20 and (tops > 5).sum() > 20
    assert (np.ptp(series, 1) == 0).any() and len(np.unique(series[:, 0, 0])) > 300
    np.testing.assert_array_equal(series[7], pocket.draw_series(np.random.RandomState(7)))


def test_windows_are_text_of_series_from_anywhere():
    ids = pocket.draw_tokens(np.random.RandomState(0), pocket.byte_tokenizer(), 40, 512)
    assert ids.shape == (40, 513)
    separators, points = (ids == 26).int(), (ids == 13).any(1)
    assert separators.sum(1).min() >= 39  # a step is 8, 10 or 12 tokens, 2 more above 9.99
    assert 0 < points.sum() < 40  # some have no point
    assert len(set(separators.argmax(1).tolist())) >= 8  # and a window begins anywhere in a step


def test_training_is_of_the_seed_lowers_the_loss_and_writes_a_folder_that_loads(tiny, tmp_path):
    lines = []
    weights = {}
    before = torch.get_rng_state()
    for name, steps, seed in (("start", 1, 0), ("a", 40, 0), ("b", 40, 0), ("c", 40, 1)):
        pocket.pretrain(tmp_path / name, steps=steps, seed=seed, progress=lines.append)
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(steps)  # what the caller drew before must not matter
        before = torch.get_rng_state()
    assert weights["a"] == weights["b"] != weights["c"]
    bytes_of = pocket.byte_tokenizer()
    start, end = (pocket.held_out_loss(Qwen.from_pretrained(tmp_path / n), bytes_of, 0) for n in ("start", "a"))
    assert end < start - 1
    readme = (tmp_path / "a" / "README.md").read_text()
    assert f"Held-out loss: {end:.4f}" in readme and "--steps 40 --seed 0" in readme
    assert "40 steps, 15,360 tokens" in readme
    assert all("toy" in line for line in lines) and sorted(p.name for p in tmp_path.iterdir()) == sorted(weights)


def test_a_training_that_was_stopped_or_killed_ends_in_the_bytes_of_one_that_was_not(tiny, tmp_path, monkeypatch):
    pocket.pretrain(tmp_path / "whole", steps=40, progress=lambda _: None)
    true, made = pocket.draw_tokens, []

    def stopping(*arguments):
        made.append(1)
        if len(made) == 10:
            os.kill(os.getpid(), signal.SIGINT)  # ends step 10, and leaves its checkpoint
        elif len(made) == 28:  # after the checkpoint of step 15 + 10
            raise MemoryError
        return true(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pocket, "draw_tokens", stopping)
        for failure, kept in ((KeyboardInterrupt, 10), (MemoryError, 15)):
            with pytest.raises(failure):
                pocket.pretrain(tmp_path / "out", steps=40, progress=lambda _: None)
            assert torch.load(tmp_path / "out.checkpoint", weights_only=True)["spent"]["step"] == kept
    with pytest.raises(ValueError, match="out.checkpoint: it has .*'steps': 40.*, not .*'steps': 41.*; delete it$"):
        pocket.pretrain(tmp_path / "out", steps=41, progress=lambda _: None)
    pocket.pretrain(tmp_path / "out", steps=40, progress=lambda _: None)
    assert len({(tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "out")}) == 1
    (tmp_path / "out.checkpoint").write_bytes(b"PK\3\4")
    with pytest.raises(ValueError, match="out.checkpoint: .*: expected a checkpoint of this training; delete it$"):
        pocket.pretrain(tmp_path / "out", steps=40, progress=lambda _: None)


def test_a_training_goes_on_from_the_weights_of_a_folder_and_says_what_made_those(tiny, tmp_path):
    first, out = tmp_path / "first", tmp_path / "out"
    train = partial(pocket.pretrain, progress=lambda _: None)
    train(first, steps=40)
    train(tmp_path / "new", steps=20, seed=1)
    train(out, steps=20, seed=1, start=first)
    again = (out / "model.safetensors").read_bytes()
    new, old, after = (
        pocket.held_out_loss(Qwen.from_pretrained(tmp_path / name), pocket.byte_tokenizer(), 0)
        for name in ("new", "first", "out")
    )
    assert after < old < new
    lines = (out / "README.md").read_text().splitlines()
    commands = [line.split("pretrain-pocket ")[1] for line in lines if "pretrain-pocket" in line]
    assert commands == ["--steps 40 --seed 0", f"--start {first} --steps 20 --seed 1"]
    assert [line.split()[2] for line in lines if line.startswith("- Training: ")] == ["40", "20"]
    train(first, steps=20, seed=1, start=first)  # in the place of what it began with
    assert (first / "model.safetensors").read_bytes() == again
    with pytest.raises(ValueError, match="pocket: a model of another shape: expected one that pretrain-pocket wrote$"):
        train(out, steps=1, start=POCKET)
    (first / "README.md").unlink()
    with pytest.raises(ValueError, match="README.md: .*: expected that of a folder that pretrain-pocket wrote$"):
        train(out, steps=1, start=first)


def test_written_weights_are_bfloat16_and_hold_the_tied_head_once(tiny, tmp_path):
    pocket.pretrain(tmp_path / "out", steps=1, progress=lambda _: None)
    expected = Qwen(pocket.CONFIG).state_dict()
    del expected["lm_head.weight"]
    tensors = read_tensors(tmp_path / "out", expected, torch.float32, "cpu")
    assert all(torch.equal(t, t.bfloat16().float()) for t in tensors.values())


def test_a_loss_that_is_not_finite_stops_in_one_line_and_leaves_the_old_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(pocket, "LEARNING_RATE", 1e30)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").touch()
    said = r"^pretrain-pocket: the loss of step \d+ is (nan|inf): expected a finite number$"
    with pytest.raises(ValueError, match=said):
        pocket.pretrain(tmp_path / "out", steps=20, progress=lambda _: None)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "README.md"]


def test_a_folder_of_other_files_is_not_replaced(tiny, tmp_path):
    """Bug: `pretrain-pocket --out documents` deleted the documents."""
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds 'thesis.tex', which would be lost: expected a folder of its own"):
        pocket.pretrain(tmp_path, steps=1)
    with pytest.raises(ValueError, match="thesis.tex: is a file: expected a folder"):
        pocket.pretrain(tmp_path / "thesis.tex", steps=1)
    assert [p.name for p in tmp_path.rglob("*")] == ["thesis.tex"]


@pytest.mark.parametrize(("steps", "seed"), [(0, 0), (1, -1), (1, 2**32)])
def test_steps_and_seed_out_of_range_are_refused(steps, seed, tmp_path):
    with pytest.raises(ValueError, match=f"steps is {steps}, seed {seed}: expected"):
        pocket.pretrain(tmp_path / "out", steps=steps, seed=seed)


def test_the_command_leaves_the_process_its_smallest_numbers(tmp_path, capsys):
    """Bug: later sums of the process took numbers below 2.2e-308 for 0."""
    smallest = np.finfo(np.float64).tiny
    assert main(["pretrain-pocket", "--steps", "0", "--out", str(tmp_path / "out")]) == 2
    assert smallest / 2 > 0
