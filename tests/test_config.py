"""config.json of both generations read, and everything that is not implemented refused by its name."""

import dataclasses
import json

import pytest
import torch

from qwen_min import Qwen, QwenConfig

# What transformers 4 wrote for the 0.5B release.
RELEASED = json.loads("""{
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936
}""")
# Parameters of the releases; a tied head is counted once.
PARAMETERS = {
    "0.5B": 494_032_768,
    "1.5B": 1_543_714_304,
    "3B": 3_085_938_688,
    "7B": 7_615_616_512,
    "14B": 14_770_033_664,
    "32B": 32_763_876_352,
    "72B": 72_706_203_648,
}


def without(*names: str) -> dict:
    return {name: value for name, value in RELEASED.items() if name not in names}


def refusal(fields: dict) -> str:
    with pytest.raises(ValueError) as error:
        QwenConfig.from_dict(fields)
    message = str(error.value)
    assert "expected" in message and "\n" not in message
    return message


def test_a_released_config_is_the_named_size():
    assert QwenConfig.from_dict(RELEASED) == QwenConfig.named("Qwen2.5-0.5B")


def test_both_generations_of_config_json_say_the_same():
    five = without("rope_theta", "torch_dtype") | {
        "dtype": "bfloat16",
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "layer_types": ["full_attention"] * 24,
    }
    assert QwenConfig.from_dict(five) == QwenConfig.from_dict(RELEASED)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_what_transformers_writes_is_read_as_it_meant_it(theta, tied, tmp_path, make_config):
    from transformers import Qwen2Config

    ours = make_config(rope_theta=theta, tie_word_embeddings=tied)
    fields = {name: value for name, value in dataclasses.asdict(ours).items() if name != "rope_theta"}
    Qwen2Config(**fields, rope_parameters={"rope_theta": theta, "rope_type": "default"}).save_pretrained(tmp_path)
    assert QwenConfig.from_file(tmp_path / "config.json") == ours


def test_what_is_written_is_read_by_transformers_and_by_us(tmp_path, make_config):
    from transformers import AutoConfig

    ours = make_config(rope_theta=12345.0, tie_word_embeddings=True)
    (tmp_path / "config.json").write_text(json.dumps(ours.to_dict()))
    assert QwenConfig.from_file(tmp_path / "config.json") == ours
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_theta"] == 12345.0
    for name, value in dataclasses.asdict(ours).items():
        assert name == "rope_theta" or getattr(theirs, name) == value


def test_the_rope_theta_of_math_models_is_kept():
    """Qwen2.5-Math has 1e4 where the others have 1e6."""
    assert QwenConfig.from_dict(RELEASED | {"rope_theta": 10000.0}).rope_theta == 1e4
    assert QwenConfig.from_dict(RELEASED | {"rope_theta": 10000}).rope_theta == 1e4


REFUSED = [
    ({"model_type": "qwen3"}, "model_type is 'qwen3': expected 'qwen2'"),
    ({"model_type": None}, "model_type is None"),
    ({"use_sliding_window": True}, "use_sliding_window is True: expected false"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
    ({"layer_types": 3}, "layer_types is 3"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type is 'yarn': expected 'default'"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling.rope_type is 'linear'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters.rope_type is 'yarn'"),
    ({"rope_parameters": "default"}, "rope_parameters is 'default': expected an object"),
    ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_parameters is {'full_attention': {"),
    ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta is given as 1000000.0 and 10000.0: expected one number"),
    ({"rope_scaling": {"rope_theta": 1e4}}, "rope_theta is given as 1000000.0 and 10000.0"),
    ({"is_causal": False}, "is_causal is False: expected true"),
    ({"rope_theta": None}, "rope_theta is missing"),
    ({"rope_theta": "1e6"}, "rope_theta is '1e6': expected a positive number"),
    ({"rope_theta": True}, "rope_theta is True"),
    ({"rope_theta": float("nan")}, "rope_theta is nan"),
    ({"rope_theta": float("inf")}, "rope_theta is inf"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu': expected \"silu\""),
    ({"quantization_config": {"bits": 4}}, "quantization_config is"),
    ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    ({"head_dim": 128}, "head_dim is 128: expected hidden_size / num_attention_heads, which is 64"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes': expected true or false"),
    ({"vocab_size": 0}, "vocab_size is 0: expected a positive whole number"),
    ({"vocab_size": 151936.0}, "vocab_size is 151936.0"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000: expected a positive whole number, at most"),
    ({"vocab_size": 2**31 - 1, "hidden_size": 14 * 2**27}, "vocab_size is 2147483647: expected a positive"),
    ({"hidden_size": -896}, "hidden_size is -896"),
    ({"hidden_size": 897}, "hidden_size is 897: expected an even head size"),
    ({"num_attention_heads": 13}, "hidden_size is 896: expected an even head size for each of the 13 heads"),
    ({"num_attention_heads": 896}, "hidden_size is 896: expected an even head size"),
    ({"num_key_value_heads": 4}, "num_key_value_heads is 4: expected a divisor of num_attention_heads, which is 14"),
    ({"num_key_value_heads": None}, "num_key_value_heads is None"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0: expected a positive number"),
    ({"intermediate_size": [4864]}, "intermediate_size is [4864]"),
    ({"max_position_embeddings": 2**40}, "max_position_embeddings is 1099511627776"),
]


@pytest.mark.parametrize(("change", "expected"), REFUSED, ids=str)
def test_a_field_that_cannot_be_used_is_refused_by_name(change, expected):
    assert refusal(RELEASED | change).startswith(expected)


SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()


@pytest.mark.parametrize("name", [*SIZES, "rms_norm_eps", "max_position_embeddings", "rope_theta", "model_type"])
def test_no_default_is_assumed_for_a_missing_field(name):
    assert name in refusal(without(name))


def test_a_missing_tied_head_is_the_default_of_hugging_face():
    """It leaves out of config.json what equals its default, which for Qwen2 is an untied head."""
    from transformers import Qwen2Config

    assert QwenConfig.from_dict(without("tie_word_embeddings")).tie_word_embeddings is False
    assert Qwen2Config().tie_word_embeddings is False


def test_all_missing_fields_are_named_at_once():
    message = refusal({"model_type": "qwen2"})
    assert all(name in message for name in ("vocab_size", "hidden_size", "rms_norm_eps"))


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '"qwen2"', "[" * 5000, '{"a": \xe9}', "\x00"])
def test_a_file_that_is_no_config_is_named_in_one_line(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError) as error:
        QwenConfig.from_file(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_a_missing_file_and_a_bad_field_name_the_file(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ValueError, match="config.json: No such file or directory: expected a model's config.json"):
        QwenConfig.from_file(path)
    path.write_text(json.dumps(RELEASED | {"model_type": "llama"}))
    with pytest.raises(ValueError, match="config.json: model_type is 'llama': expected 'qwen2'"):
        QwenConfig.from_file(path)


@pytest.mark.parametrize("size", PARAMETERS)
def test_a_named_size_has_the_parameters_of_its_release(size):
    with torch.device("meta"):
        model = Qwen(QwenConfig.named(f"Qwen2.5-{size}"))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[size]


@pytest.mark.parametrize("size", ["0.5B", "7B"])
def test_parameter_names_and_shapes_are_those_of_transformers(size):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = QwenConfig.named(f"Qwen2.5-{size}")
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name != "rope_theta"}
    with torch.device("meta"):
        ours, theirs = Qwen(config), Qwen2ForCausalLM(Qwen2Config(**fields))
    assert sum(p.numel() for p in theirs.parameters()) == PARAMETERS[size]
    shapes, expected = ({name: p.shape for name, p in model.named_parameters()} for model in (ours, theirs))
    assert shapes == expected


def test_a_size_is_known_under_each_of_its_names():
    plain, hub, instruct = map(QwenConfig.named, ("Qwen2.5-7B", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"))
    assert plain == hub == instruct


@pytest.mark.parametrize("name", ["Qwen2.5-8B", "7B", "Qwen3-7B", "", "Qwen2.5-"])
def test_an_unknown_size_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match="is not a known size: expected one of Qwen2.5-0.5B, .*Qwen2.5-72B"):
        QwenConfig.named(name)


def test_a_config_cannot_be_changed(make_config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_config().hidden_size = 3
