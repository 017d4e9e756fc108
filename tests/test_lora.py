"""LoRA against PEFT, adapters in PEFT's format both ways, and everything of PEFT's that is refused."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora.layer
from experiments.accounting.predict import predict
from experiments.task.model import trained as what_was_trained
from lora import LoRALinear, add_logit_bias, add_lora, load_adapter, merge, save_adapter, unmerge
from qwen_min import FlopMeter, Qwen

# PEFT still asks transformers 5 by the old name of a property.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TOLERANCE = 1e-5
"""As in test_parity: float32 sums in another order."""

IDS = torch.arange(26).view(2, 13) * 3
KEY = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MATRICES = [f"model.layers.{i}.self_attn.{p}_proj.lora_{half}" for i in (0, 1) for p in "qv" for half in "ab"]
"""What LoRA adds to q and v, its targets by default, of `random_model()`."""


def trained(model: Qwen, seed: int = 1) -> Qwen:
    """B no longer zero, as after some training: else half of the gradients are zero and the update is nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def q_proj(model: Qwen) -> LoRALinear:
    return dict(lora.layer.lora_layers(model))["model.layers.0.self_attn.q_proj"]


def logits(model, ids: Tensor = IDS) -> Tensor:
    with torch.inference_mode():
        out = model(ids)
        return (out if isinstance(out, Tensor) else out.logits).clone()


def peft_of(theirs, **options):
    """Transformers' model with PEFT's adapter, B not zero."""
    from peft import LoraConfig, get_peft_model

    chosen: dict = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}
    wrapped = get_peft_model(theirs, LoraConfig(task_type="CAUSAL_LM", **(chosen | options))).eval()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return wrapped


@pytest.fixture
def adapter(tmp_path, random_model) -> Path:
    save_adapter(trained(add_lora(random_model(), 3, 7.0, dropout=0.25, seed=0)), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["up_proj"], ALL], ids=" ".join)
def test_outputs_loss_and_gradients_equal_those_of_peft(targets, reference, tmp_path):
    folder, theirs = reference()
    wrapped = peft_of(theirs, target_modules=targets)
    wrapped.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(Qwen.from_pretrained(folder), tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), logits(wrapped), atol=TOLERANCE, rtol=0)

    theirs_loss = wrapped(IDS, labels=IDS).loss
    theirs_loss.backward()
    total, count = ours.loss(IDS[:, :-1], IDS[:, 1:])
    (total / count).backward()
    torch.testing.assert_close((total / count).float(), theirs_loss, atol=1e-6, rtol=1e-6)

    expected = {name.replace(".default", ""): p.grad for name, p in wrapped.named_parameters() if p.requires_grad}
    got = {
        f"base_model.model.{name.replace('lora_a', 'lora_A.weight').replace('lora_b', 'lora_B.weight')}": p.grad
        for name, p in ours.named_parameters()
        if p.requires_grad
    }
    assert got.keys() == expected.keys() and len(got) == 2 * 2 * len(targets)
    for name, gradient in expected.items():
        # relative to the largest of its tensor: both orders of summation round at 6e-8 of that
        torch.testing.assert_close(got[name], gradient, atol=1e-5 * gradient.abs().max().item(), rtol=0)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["o_proj", "model.layers.1.mlp.up_proj"], ALL], ids=" ".join)
def test_an_adapter_of_ours_opens_in_peft_with_the_same_logits(targets, reference, tmp_path):
    """The base in float64, so that norms and rotation alone, float32 in both, are rounded: 9e-7 was the most seen."""
    from peft import PeftModel

    folder, theirs = reference()
    base = logits(theirs.double())
    ours = trained(add_lora(Qwen.from_pretrained(folder, torch.float64), 5, 2.5, targets, seed=3))
    save_adapter(ours, tmp_path / "adapter", base=str(folder))
    wrapped = PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert (logits(ours) - base).abs().max() > 0.1
    torch.testing.assert_close(logits(ours), logits(wrapped), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ALL, "r": 1},
        {"target_modules": ["model.layers.0.self_attn.k_proj"]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"lora_dropout": 0.25},
        {"use_rslora": True},
        {"target_modules": "all-linear"},
        {"target_modules": ["layers.1.mlp.up_proj", "v_proj"], "lora_alpha": 2.5},
        {"target_modules": r".*self_attn\.(q|v)_proj"},
        {"target_modules": r"model\.layers\.1\..*_proj", "rank_pattern": {"q_proj": 5}},
        {"rank_pattern": {"q_proj": 5, "layers.0.*v_proj": 2}, "alpha_pattern": {r"\d.self_attn.v_proj": 11}},
        {"rank_pattern": {"^model.layers.1.self_attn.q_proj": 5, "v_proj": 1}, "use_rslora": True},
    ],
    ids=str,
)
def test_an_adapter_of_peft_opens_here_with_the_same_logits(options, reference, tmp_path):
    from peft import PeftModel

    folder, theirs = reference()
    base = logits(theirs.double())
    wrapped = peft_of(theirs, **options)
    wrapped.save_pretrained(tmp_path / "adapter")
    ours, expected = load_adapter(Qwen.from_pretrained(folder, torch.float64), tmp_path / "adapter"), logits(wrapped)
    assert (logits(ours) - base).abs().max() > 0.05
    torch.testing.assert_close(logits(ours), expected, atol=TOLERANCE, rtol=0)
    save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(wrapped.unload(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again), expected, atol=TOLERANCE, rtol=0)
    with FlopMeter() as meter:
        logits(ours)
    assert predict(ours.config, *IDS.shape, **what_was_trained(ours)).total == meter.total


def test_an_adapter_saved_and_loaded_gives_the_same_logits_to_the_bit(adapter, random_model):
    model = trained(add_lora(random_model(), 3, 7.0, dropout=0.25, seed=0))
    loaded = load_adapter(random_model(), adapter)
    assert torch.equal(logits(loaded), logits(model))
    layer = q_proj(loaded)
    assert (layer.rank, layer.alpha, layer.scale, layer.dropout) == (3, 7.0, 7.0 / 3, 0.25)


@pytest.mark.parametrize("targets", ["all-linear", "up_proj"])
def test_all_linear_layers_or_one_name_can_be_given_as_text(targets, random_model):
    names = ALL if targets == "all-linear" else [targets]
    got, expected = (add_lora(random_model(), 3, targets=given, seed=0).state_dict() for given in (targets, names))
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)


def test_an_adapter_kept_in_bfloat16_is_widened(adapter, random_model):
    path = adapter / "adapter_model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(path).items()}, path)
    expected = trained(add_lora(random_model(), 3, 7.0, dropout=0.25, seed=0))
    for layer in dict(lora.layer.lora_layers(expected)).values():
        for half in (layer.lora_a, layer.lora_b):
            half.data = half.data.bfloat16().float()
    assert torch.equal(logits(load_adapter(random_model(), adapter)), logits(expected))


def test_the_saved_files_have_the_keys_and_fields_of_peft(adapter):
    assert set(load_file(adapter / "adapter_model.safetensors")) == {
        KEY.format(i, proj, half) for i in range(2) for proj in ("q_proj", "v_proj") for half in "AB"
    }
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"] and config["r"] == 3 and config["lora_alpha"] == 7.0
    assert sorted(p.name for p in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_new_adapter_changes_nothing_until_it_is_trained(random_model):
    before = logits(random_model())
    assert torch.equal(logits(add_lora(random_model(), 4, seed=0)), before)


def test_only_the_lora_matrices_require_a_gradient(random_model):
    base = random_model()
    weights = list(base.parameters())
    model = add_lora(base, 4, seed=0)
    assert {id(weight) for weight in weights} < {id(p) for p in model.parameters()}  # shared, not copied
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == set(MATRICES)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(2):
        total, count = model.loss(IDS, IDS)
        (total / count).backward()
        optimiser.step()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == names


def test_the_scale_is_alpha_over_r_and_one_by_default(random_model):
    scales = [q_proj(add_lora(random_model(), 4, alpha)).scale for alpha in (None, 2, 8.0)]
    assert scales == [1, 0.5, 2]


def test_a_starts_as_peft_draws_it_and_b_at_zero(reference, random_model):
    """Kaiming-uniform with a = sqrt(5): uniform within 1/sqrt(in)."""
    layer = q_proj(add_lora(random_model(), 8, seed=0))
    bound = 48**-0.5
    assert layer.lora_a.abs().max() <= bound and abs(layer.lora_a.std() - bound / 3**0.5) < 0.01
    assert not layer.lora_b.any()
    theirs = peft_of(reference()[1], r=8).base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert theirs.abs().max() <= bound and abs(theirs.std() - layer.lora_a.std()) < 0.01


def test_a_seed_repeats_the_draw_and_leaves_the_global_generator_alone(random_model):
    models = [random_model() for _ in range(3)]
    state = torch.get_rng_state()
    one, same, other = (add_lora(m, 4, seed=s).state_dict() for m, s in zip(models, (5, 5, 6), strict=True))
    assert all(torch.equal(one[name], same[name]) for name in one)
    first, second = (f"model.layers.{i}.self_attn.q_proj.lora_a" for i in (0, 1))
    assert not torch.equal(one[first], other[first]) and not torch.equal(one[first], one[second])
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_active_in_training_alone_and_repeats_with_the_seed(random_model):
    model = trained(add_lora(random_model(), 4, dropout=0.5, seed=0))
    still = trained(add_lora(random_model(), 4, seed=0))
    assert torch.equal(logits(model), logits(still))
    model.train()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(logits(model))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert torch.equal(logits(still.train()), logits(still.eval()))


def test_dropout_keeps_the_mean_of_the_input_of_a(random_model):
    layer, x = q_proj(trained(add_lora(random_model().train(), 4, dropout=0.5, seed=0))), torch.randn(48)
    assert layer.training  # as the model was
    with torch.inference_mode():
        mean = layer(x.expand(20000, 48)).mean(0)
        # 20,000 draws of a sum of spread ~1: the standard error is .007, and this is five of them
        torch.testing.assert_close(mean, layer.eval()(x), atol=0.04, rtol=0)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ALL], ids=" ".join)
def test_merge_gives_the_same_outputs_and_unmerge_the_weights_back(targets, random_model):
    model = trained(add_lora(random_model(), 4, 6.0, targets, seed=0))
    apart, before = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    assert merge(model) is model
    torch.testing.assert_close(logits(model), apart, atol=TOLERANCE, rtol=0)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(model.get_parameter(name), before[name])
    unmerge(model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], atol=1e-6, rtol=0)
    torch.testing.assert_close(logits(model), apart, atol=TOLERANCE, rtol=0)


def test_merging_twice_or_nothing_is_an_error(random_model):
    model = random_model()
    for fold, what in ((merge, "merge"), (unmerge, "unmerge")):
        with pytest.raises(ValueError, match=f"nothing to {what}: expected a model with LoRA"):
            fold(model)
    merge(add_lora(model, 2))
    with pytest.raises(ValueError, match="nothing to merge: .* not merged"):
        merge(model)
    unmerge(model)
    with pytest.raises(ValueError, match="nothing to unmerge"):
        unmerge(model)


def test_the_weights_of_a_wider_type_come_back_to_that_type(random_model):
    model = trained(add_lora(random_model().double(), 4, seed=0))
    before = q_proj(model).weight.clone()
    unmerge(merge(model))
    assert (q_proj(model).weight - before).abs().max() < 1e-15  # by float32 it was 3e-8


def test_a_merged_model_has_the_state_and_the_cost_of_a_base_model_and_takes_no_other_state(random_model):
    """Else the update would be added twice, or taken out of weights that it was never in."""
    model = merge(trained(add_lora(random_model(), 4, seed=0)))
    state, base = model.state_dict(), random_model(seed=1)
    base.load_state_dict(state)
    with FlopMeter() as of_base:
        expected = logits(base)
    with FlopMeter() as of_merged:
        assert torch.equal(logits(model), expected)
    assert of_merged.by_module() == of_base.by_module()
    with pytest.raises(RuntimeError, match="Missing key.*lora_a"):
        add_lora(random_model(), 4).load_state_dict(state)
    with pytest.raises(ValueError, match="q_proj is merged: expected unmerge before other weights are loaded"):
        model.load_state_dict(state, strict=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("fold", [merge, lambda model: model])
def test_a_copy_of_a_model_with_lora_is_a_model_of_its_own(fold, copied, random_model):
    model = fold(trained(add_lora(random_model(tie_word_embeddings=True), 4, seed=0)))
    other, before = copied(model), logits(model)
    assert torch.equal(logits(other), before) and other.lm_head.weight is other.model.embed_tokens.weight
    torch.nn.init.zeros_(q_proj(other).weight)
    assert torch.equal(logits(model), before) and not torch.equal(logits(other), before)


def test_a_merged_adapter_is_not_saved(random_model, tmp_path):
    with pytest.raises(ValueError, match="merged into the weights: expected unmerge first"):
        save_adapter(merge(add_lora(random_model(), 2)), tmp_path / "adapter")
    with pytest.raises(ValueError, match="the model has no LoRA: expected"):
        save_adapter(random_model(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_base_checkpoint_loads_with_exactly_the_lora_matrices_missing(random_model):
    model = add_lora(random_model(seed=5), 4)
    result = model.load_state_dict(random_model(seed=6).state_dict(), strict=False)
    assert result.unexpected_keys == [] and result.missing_keys == MATRICES
    assert torch.equal(logits(model), logits(random_model(seed=6)))


def test_generation_with_an_adapter_equals_argmax_over_full_passes(random_model):
    model = trained(add_lora(random_model(), 4, seed=0))
    expected = IDS
    for _ in range(6):
        expected = torch.cat([expected, logits(model, expected)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert model.generate(IDS.tolist(), max_new_tokens=6) == expected.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["q_projection"]}, "target 'q_projection' matches no linear layer: expected one of down_proj, "),
        ({"targets": ["q_proj", "lm_head"]}, "target 'lm_head' matches no linear layer"),
        ({"targets": ["input_layernorm"]}, "target 'input_layernorm' matches no linear layer"),
        ({"targets": ["proj"]}, "target 'proj' matches no linear layer"),
        ({"targets": []}, "target '' matches no linear layer"),
        ({"rank": 0}, "rank is 0: expected a whole number of at least 1"),
        ({"rank": 2.0}, "rank is 2.0: expected a whole number"),
        ({"alpha": 0}, "alpha is 0: expected a positive number"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0: expected at least 0, less than 1"),
    ],
    ids=str,
)
def test_a_bad_argument_is_refused_and_the_model_left_as_it_was(options, message, random_model):
    model = random_model()
    with pytest.raises(ValueError, match=message):
        add_lora(model, **options)
    assert all(p.requires_grad for p in model.parameters()) and not list(lora.layer.lora_layers(model))


def test_lora_is_not_added_twice(random_model, adapter):
    model = add_lora(random_model(), 2)
    with pytest.raises(ValueError, match="has LoRA already: expected one without"):
        add_lora(model, 2)
    with pytest.raises(ValueError, match="adapter_config.json: the model has LoRA already"):
        load_adapter(model, adapter)


def refused(model: Qwen, folder: Path) -> str:
    """The one line that loading ends with; the model must be as it was, without LoRA and trainable."""
    before = logits(model)
    with pytest.raises(ValueError) as error:
        load_adapter(model, folder)
    message = str(error.value)
    assert message.startswith(str(folder)) and "\n" not in message and message.isprintable() and "expected" in message
    assert torch.equal(logits(model), before) and not list(lora.layer.lora_layers(model))
    assert model.logit_bias is None and all(p.requires_grad for p in model.parameters())
    return message


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [1]},
        {"exclude_modules": ["v_proj"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"trainable_token_indices": [1, 2]},
        {"use_qalora": True, "qalora_group_size": 16},
        {"target_parameters": ["self_attn.q_proj.weight"], "target_modules": []},
        {"alora_invocation_tokens": [5]},
    ],
    ids=str,
)
def test_what_peft_itself_saves_with_such_a_field_is_refused(options, reference, tmp_path):
    folder, theirs = reference()
    peft_of(theirs, **options).save_pretrained(tmp_path / "adapter")
    field = next(iter(options))
    assert f"adapter_config.json: {field} is" in refused(Qwen.from_pretrained(folder), tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_of_peft_for_the_table_or_the_head_is_refused_by_its_target(target, reference, tmp_path):
    folder, theirs = reference()
    peft_of(theirs, target_modules=["q_proj", target]).save_pretrained(tmp_path / "adapter")
    assert f"target '{target}' matches no" in refused(Qwen.from_pretrained(folder), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"layers_to_transform": 1}, "layers_to_transform is 1"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is [[0, 2]]"),
        ({"megatron_config": {"a": 1}}, "megatron_config is {'a': 1}"),
        ({"velora_config": {"a": 1}}, "velora_config is {'a': 1}"),
        ({"a_field_of_the_future": True}, "a_field_of_the_future is True"),
        ({"r": None}, "r is None: expected a number"),
        ({"r": "3"}, "r is '3': expected a number"),
        ({"r": True}, "r is True"),
        ({"r": 0}, "rank is 0"),
        ({"r": 4}, "is [3, 48], not [4, 48]"),
        ({"r": 10**12}, "is [3, 48], not [1000000000000, 48]"),
        ({"lora_alpha": "7"}, "lora_alpha is '7'"),
        ({"lora_alpha": float("inf")}, "alpha is inf"),
        ({"lora_dropout": 2}, "dropout is 2"),
        ({"target_modules": "all-linear"}, "missing base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"),
        ({"target_modules": "q_proj"}, "target_modules is 'q_proj', which matches no linear layer: expected a regular"),
        ({"target_modules": "(q"}, "a pattern is no regular expression (missing ), unterminated"),
        ({"rank_pattern": {"a{9999999999}": 1}}, "a pattern is no regular expression (the repetition number is too"),
        ({"rank_pattern": {"q_proj": "4"}}, "r is '4': expected a number"),
        ({"rank_pattern": {"q_proj": 0}}, "rank is 0: expected"),
        ({"rank_pattern": {"q_proj": 4}}, "layers.0.self_attn.q_proj.lora_A.weight is [3, 48], not [4, 48]"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is ['q_proj']: expected an object of numbers"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha is -1: expected a positive number"),
        ({"target_modules": []}, "target_modules is []"),
        ({"target_modules": [1]}, "target_modules is [1]"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": ["nothing"]}, "target 'nothing' matches no"),
        ({"target_modules": ["q_proj"]}, "unexpected base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "missing base_model.model.model.layers.0.self_attn.o_p"),
    ],
    ids=str,
)
def test_a_field_that_does_not_fit_or_changes_the_maths_is_refused_by_name(change, message, adapter, random_model):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert message in refused(random_model(), adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({KEY.format(0, "q_proj", "A"): None}, f"missing {KEY.format(0, 'q_proj', 'A')}"),
        ({"base_model.model.lm_head.weight": torch.zeros(97, 48)}, "unexpected base_model.model.lm_head.weight"),
        ({KEY.format(1, "v_proj", "B"): torch.zeros(48, 3)}, f"{KEY.format(1, 'v_proj', 'B')} is [48, 3], not [16, 3]"),
        ({KEY.format(0, "q_proj", "A"): torch.zeros(3, 48, dtype=torch.int8)}, "is of type torch.int8"),
        ({KEY.format(1, "q_proj", "B"): torch.full((48, 3), torch.nan)}, "lora_B.weight holds NaN or infinity"),
        ({"a\nb\x1b": torch.zeros(1)}, r"unexpected 'a\nb\x1b'"),
        ({KEY.format(i, p, h): None for i in (0, 1) for p in ("q_proj", "v_proj") for h in "AB"}, "and 5 more"),
    ],
    ids=["missing", "extra", "misshapen", "int8", "NaN", "unprintable", "empty"],
)
def test_a_missing_extra_or_misshapen_key_is_refused_by_name(change, message, adapter, random_model):
    path = adapter / "adapter_model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(path).items()} | change
    save_file({name: t for name, t in tensors.items() if t is not None}, path)
    assert message in refused(random_model(), adapter)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe", b"[" * 5000])
def test_a_missing_or_damaged_file_is_named(file, content, adapter, random_model):
    if content is None:
        (adapter / file).unlink()
    else:
        (adapter / file).write_bytes(content)
    assert file in refused(random_model(), adapter)


def test_the_logit_bias_is_a_separate_tensor_saved_and_loaded_apart(tmp_path, random_model, reference):
    from peft import PeftModel

    model = add_logit_bias(trained(add_lora(random_model(), 3, seed=0)))
    before = logits(model)
    bias = torch.nn.init.normal_(model.get_parameter("logit_bias"))
    save_adapter(model, tmp_path / "adapter")
    assert set(load_file(tmp_path / "adapter" / "logit_bias.safetensors")) == {"logit_bias"}
    loaded = load_adapter(random_model(), tmp_path / "adapter")
    assert loaded.logit_bias is not None and loaded.logit_bias.requires_grad and torch.equal(loaded.logit_bias, bias)
    torch.testing.assert_close(logits(loaded), before + bias.detach(), atol=1e-6, rtol=0)
    # PEFT reads the rest of the folder
    PeftModel.from_pretrained(reference()[1], tmp_path / "adapter")
    # and saving a model that has none leaves no stale one after
    save_adapter(trained(add_lora(random_model(), 3, seed=0)), tmp_path / "adapter")
    assert load_adapter(random_model(), tmp_path / "adapter").logit_bias is None


def test_the_logit_bias_learns_whether_it_came_before_the_lora_layers_or_after(random_model):
    """`add_lora` freezes the base model; it once froze a logit bias that was there before it."""
    for model in (add_logit_bias(add_lora(random_model(), 3)), add_lora(add_logit_bias(random_model()), 3)):
        total, _ = model.loss(IDS, IDS)
        total.backward()
        gradient = model.get_parameter("logit_bias").grad
        assert gradient is not None and gradient.abs().max() > 0
        assert sum(p.requires_grad for p in model.parameters()) == 9


@pytest.mark.parametrize("shape", [(), (1,), (96,), (97, 1)], ids=str)
def test_a_logit_bias_of_another_shape_is_refused_before_it_is_broadcast(shape, random_model):
    with pytest.raises(ValueError, match=r"the logit bias is \[.*\]: expected \[97\]"):
        add_logit_bias(random_model(), torch.zeros(shape))


@pytest.mark.parametrize(
    "held",
    [
        {"logit_bias": torch.zeros(96)},
        {"other": torch.zeros(97)},
        {},
        {"logit_bias": torch.zeros(97), "more": torch.zeros(1)},
    ],
    ids=str,
)
def test_a_logit_bias_that_does_not_fit_is_refused(held, adapter, random_model):
    save_file(held, adapter / "logit_bias.safetensors")
    assert "logit_bias.safetensors: " in refused(random_model(), adapter)


def test_lora_matrices_are_float32_over_a_bfloat16_base_and_the_output_stays_bfloat16(random_model):
    model = trained(add_lora(random_model().bfloat16(), 3, seed=0))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    total, count = model.loss(IDS, IDS)
    (total / count).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
