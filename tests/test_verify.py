"""`verify`: our model beside transformers, activation by activation; what is planted is seen first where it is."""

import json
from pathlib import Path

import pytest
import torch
from waves import refused

from experiments import run
from experiments.parity import peer, verify
from experiments.parity.defects import DEFECTS
from lora import add_lora, save_adapter
from lora.layer import lora_layers
from qwen_min import Qwen

# PEFT still asks transformers 5 by the old name of a property.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
POCKET = Path(__file__).parents[1] / "weights" / "pocket"
SEEN_FIRST = {
    "swapped-norms": "layers.0.input_norm",
    "no-q-bias": "layers.0.q",
    "no-k-bias": "layers.0.k",
    "no-v-bias": "layers.0.v",
    "interleaved-rotation": "layers.0.q_rotated",
    "backward-queries": "layers.0.q_rotated",
    "wrong-theta": "layers.0.q_rotated",
    "wrong-scale": "layers.0.attention",
    "no-mask": "layers.0.attention",
    "wrong-groups": "layers.0.attention",
    "missing-heads": "layers.0.attention",
    "averaged-heads": "layers.0.attention",
    "swapped-gate-and-up": "layers.0.mlp",
    "no-final-norm": "norm",
    "wrong-head": "logits",
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_first_seen_where_it_is(defect):
    broken = verify.verify(POCKET, verify.Options(defect=defect, generate=0))
    assert broken.first is not None and broken.first.name == SEEN_FIRST[defect] and not broken.passed
    assert broken.first.relative > 0.001
    before = broken.rows[: broken.rows.index(broken.first)]
    assert all(row.relative < 1e-5 for row in before)


def test_the_pocket_model_passes_with_gradients_float64_and_an_adapter_both_ways(tmp_path, capsys):
    model = add_lora(Qwen.from_pretrained(POCKET), 3, 7.0, ["q_proj", "down_proj"], seed=0)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_b, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    argv = ["verify", "--gradients", "--float64", "--generate", "5", "--adapter", str(tmp_path / "adapter")]
    assert run.main(argv) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert last == "PASS" and table[2].split()[-6:] == ["ours", "to", "float64", "peer", "to", "float64"]
    rows = [line.split() for line in table[3 : table.index("", 3)]]
    assert len(rows) == 3 + 12 * model.config.num_hidden_layers
    assert all(float(figure) < 1e-4 for row in rows for figure in row[-3:])
    assert [line.partition(": ")[0] for line in table[-7:]] == [
        "PASS  activations",
        "PASS  40 token ids equal",
        "PASS  chat template equal",
        "PASS  5 greedy tokens equal",
        "PASS  gradients",
        "PASS  PEFT's adapter read here",
        "PASS  our adapter read by PEFT",
    ]


def test_an_adapter_that_we_write_wrongly_is_found_by_peft(tmp_path, monkeypatch):
    def wrong(model: Qwen, folder: Path) -> None:
        save_adapter(model, folder)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 1.0}))

    model = add_lora(Qwen.from_pretrained(POCKET), 3, 7.0, seed=0)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_b, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    monkeypatch.setattr(verify, "save_adapter", wrong)
    report = verify.verify(POCKET, verify.Options(adapter=tmp_path / "adapter", generate=0))
    assert [check.passed for check in report.checks] == [True] * 4 + [False]
    assert report.checks[-1].text.startswith("our adapter read by PEFT: logits: beyond 0.0001 first at logits")


def test_the_reference_is_float64_in_norms_angles_and_softmax():
    """Where transformers itself computes in float32, whatever the type of its weights."""
    with peer._InFloat64():
        assert torch.ones(1).float().dtype == torch.ones(1).to(torch.float32).dtype == torch.float64
    ids = torch.arange(40)[None] * 5
    of = peer.Peer(POCKET).exact_trace(ids)
    assert {tensor.dtype for tensor in of.values()} == {torch.float64}
    model = Qwen.from_pretrained(POCKET, torch.float64)
    c, x, block = model.config, of["embedding"], model.model.layers[0]
    h, kv, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    normed = x / (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * block.input_layernorm.weight
    angles = torch.arange(40)[:, None] * c.rope_theta ** (-torch.arange(d // 2, dtype=torch.float64) / (d // 2))
    turn = torch.polar(torch.ones_like(angles), angles)  # a pair (i, i + D/2) as a complex number
    turned = torch.complex(*of["layers.0.q"].chunk(2, -1)) * turn
    q, k, v = (of[f"layers.0.{name}"] for name in ("q_rotated", "k_rotated", "v"))
    scores = q @ k.repeat_interleave(h // kv, 1).mT / d**0.5
    weights = scores.masked_fill(torch.ones(40, 40).triu(1).bool(), float("-inf")).softmax(-1)
    for got, expected in (
        (of["layers.0.input_norm"], normed),
        (of["layers.0.q_rotated"], torch.cat((turned.real, turned.imag), -1)),
        (of["layers.0.attention"], weights @ v.repeat_interleave(h // kv, 1)),
    ):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_a_difference_is_shown_in_its_row_and_ends_with_fail_and_exit_code_1(capsys):
    assert run.main(["verify", "--gradients", "--break", "wrong-scale"]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    (marked,) = (line for line in lines if line.endswith("<- first beyond the tolerance"))
    assert last == "FAIL" and marked.startswith("layers.0.attention ")
    assert "FAIL  activations: beyond 0.0001 first at layers.0.attention" in "\n".join(lines)
    assert "FAIL  20 greedy tokens differ from place " in "\n".join(lines)
    assert "FAIL  gradients: beyond 0.001 first at model.embed_tokens.weight" in "\n".join(lines)


@pytest.mark.parametrize("ours", [{}, {"a": torch.tensor([1.0, torch.nan])}, {"a": torch.ones(2), "b": torch.ones(1)}])
def test_a_tensor_that_one_side_lacks_or_that_holds_nan_is_a_difference(ours):
    rows = verify._rows(ours, {"a": torch.ones(2)})
    assert not verify._judged("gradients", rows, 1e-4)[1].passed


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ([1, 2], [1, 2], " equal"),
        ([1, 2], [1, 3], " differ from place 1 on: ours [2], the peer's [3]"),
        ("ab", "abc", " differ from place 2 on: ours '', the peer's 'c'"),
    ],
)
def test_sequences_differ_from_a_place_on(ours, theirs, said):
    assert verify._unlike(ours, theirs) == said


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--against", "jax"], "--against is 'jax': expected transformers"),
        (["--break", "luck"], "--break is 'luck': expected one of swapped-norms, "),
        (["--tolerance", "0"], "--tolerance is 0.0: expected more than 0, less than 1"),
        (["--generate", "-1"], "--generate is -1: expected 0 or more"),
        (["--generate", "2048"], "2088 tokens are too long: expected at most max_position_embeddings"),
        (["--prompt", "1"], "--prompt is '1': expected text of at least two tokens"),
        (["--adapter", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_exit_code_2(flags, line, capsys):
    assert refused(capsys, "verify", *flags).startswith(line)


def test_peers_that_are_not_installed_are_named(monkeypatch, capsys):
    monkeypatch.setattr(verify, "find_spec", lambda name: None)
    expected = "verify needs transformers and peft, not installed here: expected pip install '.[test]'\n"
    assert refused(capsys, "verify", "--adapter", "a") == expected
