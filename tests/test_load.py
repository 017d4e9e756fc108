"""Weights from safetensors files: strictly, mapped, and with one line that names whatever is wrong."""

import json
import os
import pickle
import struct
from pathlib import Path

import network_guard
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora import add_lora, merge
from lora.layer import lora_layers
from qwen_min import Qwen

IDS = torch.arange(24).view(2, 12)
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path, random_model) -> Path:
    model = random_model()
    tensors = {name: t.detach() for name, t in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    return tmp_path


def rewrite(folder: Path, change: dict[str, Tensor | None]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(path).items()} | change
    save_file({name: t for name, t in tensors.items() if t is not None}, path)


def convert(folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, {name: t.to(dtype) for name, t in load_file(folder / "model.safetensors").items()})


def configure(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def shard(folder: Path, parts: int = 3) -> dict[str, str]:
    path = folder / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    path.unlink()
    weight_map: dict[str, str] = {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        held = {name: t for i, (name, t) in enumerate(tensors.items()) if i % parts == part}
        save_file(held, folder / file)
        weight_map |= dict.fromkeys(held, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refusal(name_or_folder: str | Path, **options) -> str:
    """The one line that loading ends with."""
    with pytest.raises(ValueError) as error:
        Qwen.from_pretrained(name_or_folder, **options)
    message = str(error.value)
    assert "\n" not in message and message.isprintable() and "expected" in message and len(message) < 1000, message
    return message


def test_one_file_and_several_give_the_same_model(folder):
    one = Qwen.from_pretrained(folder)
    weight_map = shard(folder)
    several = Qwen.from_pretrained(folder)
    assert len(set(weight_map.values())) == 3
    assert not one.training and not several.training
    for (name, a), (_, b) in zip(one.state_dict().items(), several.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_tied_head_is_the_embedding_table_itself(folder):
    rewrite(folder, {"lm_head.weight": None})
    configure(folder, tie_word_embeddings=True)
    loaded = Qwen.from_pretrained(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, load_file(folder / "model.safetensors")["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None, UP: None}, f"model.safetensors: tensors missing {UP}, model.norm.weight"),
        ({UP: None}, "27 that config.json asks for"),
        ({"model.layers.0.self_attn.o_proj.bias": torch.zeros(48)}, "unexpected model.layers.0.self_attn.o_proj.bias"),
        ({UP: torch.zeros(80, 47)}, f"misshapen tensors {UP} [80, 47], not [80, 48]"),
        ({UP: torch.zeros(1, dtype=torch.int8)}, f"tensor {UP} is of type I8: expected one of F32, BF16, F16, F64"),
        # A damaged or hostile file chooses the names of its tensors: newlines, terminal codes, a megabyte.
        ({"a\nb\x1b[2J": torch.zeros(1), "c" * 10**6: torch.zeros(1)}, r"a\nb\x1b[2J', 'ccc"),
    ],
    ids=["missing", "their number", "a bias of another architecture", "misshapen", "int8", "names that break the line"],
)
def test_a_tensor_that_does_not_fit_is_named(change, message, folder):
    rewrite(folder, change)
    line = refusal(folder)
    assert message in line and line.startswith(str(folder))


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"num_key_value_heads": 6}, ("model.layers.0.self_attn.k_proj.weight [16, 48], not [48, 48]", "and 4 more")),
        ({"num_hidden_layers": 1}, ("unexpected model.layers.1.", "and 8 more")),
        ({"num_hidden_layers": 3}, ("missing model.layers.2.", "and 8 more")),
    ],
    ids=str,
)
def test_of_many_tensors_that_another_configuration_asks_for_four_are_named_and_the_rest_counted(fields, parts, folder):
    configure(folder, **fields)
    message = refusal(folder)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused_by_its_name(keep, folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(len(whole) * keep)])
    message = refusal(folder)
    assert message.startswith(f"{path}: cannot be read") and "expected a complete safetensors file" in message


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * 12


def entries(dtype: str, shape: str, *places: str) -> bytes:
    """A header's text: tensors of one type and shape, each with its place in the data."""
    tensor = '"{}":{{"dtype":"{}","shape":[{}],"data_offsets":[{}]}}'
    return ("{" + ",".join(tensor.format(i, dtype, shape, place) for i, place in enumerate(places)) + "}").encode()


HEADERS = {
    "header of 2^63": header(b"{}", length=2**63),
    "header of 4 GiB": header(b"{}", length=2**32),
    "no JSON": header(b"not json"),
    "no object": header(b"[]"),
    "a zip": b"PK\x03\x04" * 20,
    "offset beyond the end": header(entries("F32", "2", "0,99")),
    "negative shape": header(entries("F32", "-2", "0,8")),
    "shape and size differ": header(entries("F32", "3", "0,8")),
    "unknown type": header(entries("X9", "2", "0,8")),
    "overlap": header(entries("F32", "2", "0,8", "4,12")),
    "shape overflows": header(entries("F32", "4611686018427387904,4", "0,8")),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_a_damaged_header_is_refused_by_the_name_of_its_file(content, folder):
    (folder / "model.safetensors").write_bytes(content)
    assert refusal(folder).startswith(f"{folder / 'model.safetensors'}: cannot be read")


@pytest.mark.parametrize(
    "name",
    [
        *("../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".safetensors", "model.bin", ""),
        *("a\nb.safetensors", "-rf.bin", 7, None),
    ],
)
def test_an_index_can_only_name_plain_files_of_its_folder(name, folder):
    save_file({"model.norm.weight": torch.zeros(48)}, folder.parent / "secret.safetensors")
    weight_map = shard(folder)
    write_index(folder, weight_map | {"model.norm.weight": name})
    assert "model.safetensors.index.json: " in refusal(folder)


def test_a_missing_shard_is_named_with_the_index(folder):
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    missing = "model-00002-of-00003.safetensors: no such file: expected it, as model.safetensors.index.json"
    assert missing in refusal(folder)


def test_a_tensor_that_an_index_forgets_is_missed(folder):
    weight_map = shard(folder)
    write_index(folder, {n: file for n, file in weight_map.items() if file != "model-00001-of-00003.safetensors"})
    assert refusal(folder).startswith(f"{folder}: tensors missing ")
    write_index(folder, {})
    assert "names no file: expected at least one" in refusal(folder)


def test_a_tensor_in_two_shards_is_refused(folder):
    shard(folder)
    again = load_file(folder / "model-00001-of-00003.safetensors")
    other = load_file(folder / "model-00003-of-00003.safetensors")
    save_file({n: t.clone() for n, t in (again | other).items()}, folder / "model-00003-of-00003.safetensors")
    assert "stands in model-00001-of-00003.safetensors too: expected it once" in refusal(folder)
    (folder / "model-00003-of-00003.safetensors").unlink()
    (folder / "model-00003-of-00003.safetensors").symlink_to("model-00001-of-00003.safetensors")
    assert "stands in model-00001-of-00003.safetensors too: expected it once" in refusal(folder)


def test_what_the_shards_hold_counts_wherever_they_lie_and_wherever_the_index_looks_for_it(folder):
    """The hub's cache keeps a file elsewhere, with a link to it. Shards may be of several types."""
    rewrite(folder, {UP: load_file(folder / "model.safetensors")[UP].bfloat16()})
    whole, weight_map = Qwen.from_pretrained(folder, dtype=None, compute_dtype=torch.float32), shard(folder)
    second = folder / "model-00002-of-00003.safetensors"
    outside = second.rename(folder.with_name(f"{folder.name}-blob"))
    second.symlink_to(outside)
    write_index(folder, dict(zip(weight_map, reversed(weight_map.values()), strict=True)) | {"nowhere": second.name})
    parts = Qwen.from_pretrained(folder, dtype=None, compute_dtype=torch.float32)
    assert parts.get_parameter(UP).dtype == torch.bfloat16 and torch.equal(parts(IDS), whole(IDS))


def test_beside_an_index_a_single_file_is_read_as_transformers_does(folder):
    from transformers import AutoModelForCausalLM

    held = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    shard(folder)
    save_file(held | {"model.norm.weight": held["model.norm.weight"] + 1}, folder / "model.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    got = Qwen.from_pretrained(folder).state_dict()["model.norm.weight"]
    assert torch.equal(got, theirs["model.norm.weight"]) and torch.equal(got, held["model.norm.weight"] + 1)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "{}", "[" * 5000, "\xff", '{"weight_map": []}', '{"weight_map": {"a": []}}'),
        '{"weight_map": {"a": 1, "b": "c"}}',
    ],
)
def test_an_index_that_is_none_is_named(text, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    assert refusal(folder).startswith(f"{folder / 'model.safetensors.index.json'}: not an index")


class Trap:
    """Unpickling this would leave a file after."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.safetensors"])
def test_a_pickle_is_refused_and_never_read(name, folder):
    """Also when it calls itself safetensors."""
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(folder / "trapped")))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert refusal(folder).startswith(f"{folder / 'model.safetensors'}: ")
    assert not (folder / "trapped").exists()


def test_a_missing_config_is_named(folder):
    (folder / "config.json").unlink()
    assert refusal(folder).startswith(f"{folder / 'config.json'}: No such file")


@pytest.mark.parametrize(
    "name",
    [
        *("no-such-folder", "a/b/c", "/no/such/folder", "./none", "", "..", "../x", "a\0b", "Qwen/../../etc", "-x/y"),
        "https://example.com/a",
    ],
)
def test_an_unknown_folder_is_said_to_be_one(name, tmp_path):
    said = "no such folder: expected|No such file or directory: expected"
    with network_guard.refused(tmp_path / "attempts"), pytest.raises(ValueError, match=said) as error:
        Qwen.from_pretrained(name)
    assert "\n" not in str(error.value) and not (tmp_path / "attempts").read_text()


def test_bfloat16_stays_bfloat16_and_is_mapped(folder):
    convert(folder, torch.bfloat16)
    model = Qwen.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # They lie in memory as they do in the file, end to end: nothing was copied.
    starts = [p.data_ptr() for p in model.parameters()]
    ends = [p.data_ptr() + p.nbytes for p in model.parameters()]
    assert max(ends) - min(starts) == sum(p.nbytes for p in model.parameters())
    assert model(IDS).dtype == torch.bfloat16


def kept_and_widened(folder: Path) -> tuple[Qwen, Qwen]:
    """A model of bfloat16 weights that computes in float32, and one with the same weights in float32."""
    convert(folder, torch.bfloat16)
    return Qwen.from_pretrained(folder, torch.bfloat16, compute_dtype=torch.float32), Qwen.from_pretrained(folder)


def test_weights_kept_in_bfloat16_compute_in_float32_as_if_they_had_been_widened(folder):
    kept, wide = kept_and_widened(folder)
    assert kept.compute_dtype == torch.float32 and kept.get_parameter(UP).dtype == torch.bfloat16
    with torch.inference_mode():
        torch.testing.assert_close(kept(IDS), wide(IDS), atol=1e-5, rtol=0)  # the same numbers, summed in another order
        narrow = Qwen.from_pretrained(folder, dtype=torch.bfloat16)(IDS)
        assert (narrow.float() - wide(IDS)).abs().max() > 1e-3  # which narrow products do not give
    assert kept.generate(IDS.tolist(), max_new_tokens=8) == wide.generate(IDS.tolist(), max_new_tokens=8)


def test_gradients_through_kept_bfloat16_weights_are_those_of_widened_ones(folder):
    gradients = []
    for model in kept_and_widened(folder):
        add_lora(model, rank=3, seed=0)
        for _, layer in lora_layers(model):
            torch.nn.init.normal_(layer.lora_b, std=0.1, generator=torch.Generator().manual_seed(1))
        total, count = model.loss(IDS, IDS.roll(-1, 1))
        (total / count).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_a_weight_that_is_kept_narrow_has_a_gradient_of_its_type(way, folder):
    kept, wide = kept_and_widened(folder)
    for model in (kept, wide):
        model(IDS).sum().backward()
    for got, expected in zip(kept.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad.to(got.dtype), atol=1e-3, rtol=0.02)  # 8 bits of mantissa


@pytest.mark.parametrize(
    ("dtype", "kept"), [("bfloat16", torch.bfloat16), ("float64", torch.float64), ("auto", torch.float32)]
)
def test_a_type_can_be_given_by_its_name(dtype, kept, folder):
    model = Qwen.from_pretrained(folder, dtype, compute_dtype="float32")
    assert model.get_parameter(UP).dtype == kept and model.compute_dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bf16", "torch.bfloat16", "int8", torch.int8, 32, "cpu", ""])
def test_what_is_no_type_of_weights_is_refused_with_those_that_are(dtype, folder):
    for name in ("dtype", "compute_dtype"):
        message = f"{name} is {dtype!r}: expected one of auto, float32, bfloat16, float16, float64"
        assert refusal(folder, **{name: dtype}) == message


@pytest.mark.parametrize("stored", [torch.float16, torch.float64, torch.bfloat16])
def test_other_float_types_are_converted(stored, folder):
    before = load_file(folder / "model.safetensors")
    convert(folder, stored)
    for name, parameter in Qwen.from_pretrained(folder).named_parameters():
        assert torch.equal(parameter, before[name].to(stored).float()), name


def test_changing_the_weights_of_a_mapped_model_leaves_the_file_as_it_was(folder):
    before = (folder / "model.safetensors").read_bytes()
    model = add_lora(Qwen.from_pretrained(folder), rank=2, seed=0)
    for _, layer in lora_layers(model):
        torch.nn.init.ones_(layer.lora_b)
    name = "model.layers.0.self_attn.q_proj.weight"
    old = model.get_parameter(name).clone()
    assert not torch.equal(merge(model).get_parameter(name), old)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_tensor_is_moved_to_its_device_as_it_is_stored_and_converted_there(folder):
    """In one call torch converts a GPU's tensor on the host first, into a second copy."""

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op is torch.ops.aten._to_copy.default:
                copies.append((args[0].device.type, kwargs))
            return op(*args, **(kwargs or {}))

    copies: list = []
    convert(folder, torch.bfloat16)
    with Copies():
        model = Qwen.from_pretrained(folder, dtype=torch.float32, device="meta")
    parameters = len(list(model.parameters()))
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "meta")}
    moved = [k for device, k in copies if device == "cpu"]
    converted = [k for device, k in copies if device == "meta"]
    assert len(moved) == len(converted) == parameters
    assert all(k.get("dtype") in (None, torch.bfloat16) for k in moved)
