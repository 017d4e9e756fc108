"""Small valid inputs of every kind that a run reads, and seeded ways to damage them."""

import copy
import json
import os
import random
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from waves import damped_waves

from experiments import plots, run
from experiments.settings.record import Settings
from experiments.training import cell as train
from lora import add_lora, save_adapter
from qwen_min import Qwen, QwenConfig

ROOT = Path(__file__).parents[1]
Way = Callable[[random.Random, Path], bool]
"""Damages a file, by a seeded choice; returns whether that must be refused."""
MUST_FAIL, MAY_HOLD = True, False
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
NASTY: tuple[Any, ...] = (None, "x", [], {}, [[]], -1, 1.5, "NaN", 2**62, {"a": {"b": [None]}}, "\x1b[2J\n", "y" * 3000)
"""Values that no required field of any of these files may have."""

SETTINGS = Settings(
    steps=4, val_every=4, checkpoint_every=2, context=32, val_series=1, points=5, horizon=3, lr=(1e-3,), ranks=(2,)
)


@dataclass(frozen=True)
class Inputs:
    """A folder with one of each: model/, sharded/, adapter/, waves.h5, config.toml, and runs that stopped and ended."""

    root: Path

    @property
    def flags(self) -> list[str]:
        return ["--model", str(self.root / "model"), "--data", str(self.root / "waves.h5")]

    @property
    def config(self) -> list[str]:
        return ["--config", str(self.root / "config.toml")]

    def train(self, out: str) -> list[str]:
        return ["train", *self.flags, *self.config, "--lr", "1e-3", "--rank", "2", "--out", str(self.root / out)]


def make(root: Path, monkeypatch) -> Inputs:
    """Write every input into an empty folder."""
    (root / "model").mkdir(parents=True)
    tokenizer = json.loads((ROOT / "weights" / "pocket" / "tokenizer.json").read_text())
    tokens = tokenizer["model"]["vocab"]
    largest = max([*tokens.values(), *(t["id"] for t in tokenizer["added_tokens"])])
    tokens["ab"], tokenizer["model"]["merges"] = largest + 1, [["a", "b"]]  # Qwen's has merges, the pocket model's none
    (root / "model" / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))
    shape: dict[str, Any] = TINY | {"vocab_size": largest + 2, "num_key_value_heads": 1, "rope_theta": 1e4}
    shape |= {"rms_norm_eps": 1e-6, "max_position_embeddings": 256, "tie_word_embeddings": True}
    config = QwenConfig(**shape)
    model = Qwen(config)
    tensors = {name: t.detach() for name, t in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, root / "model" / "model.safetensors")
    (root / "model" / "config.json").write_text(json.dumps(config.to_dict(), indent=2))
    shutil.copytree(root / "model", root / "sharded")
    (root / "sharded" / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, root / "sharded" / file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (root / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    save_adapter(add_lora(model, rank=2, seed=0), root / "adapter")
    damped_waves(root / "waves.h5", 8)
    (root / "config.toml").write_text(SETTINGS.to_toml())
    inputs = Inputs(root)
    for name in ("loss_curves", "heat_map"):  # would take longer than the training
        monkeypatch.setattr(plots, name, lambda *_, **__: None)
    assert run.main(inputs.train("finished")) == 0
    _stop_after(3, monkeypatch, lambda: run.main(inputs.train("stopped")))
    return inputs


def _stop_after(step: int, monkeypatch, work: Callable[[], int]) -> None:
    """Interrupt a run hard in the step after this one."""
    true, steps = train.training_step, []

    def stopping(*arguments):
        if len(steps) == step:
            raise KeyboardInterrupt
        steps.append(1)
        return true(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "training_step", stopping)
        assert work() == 130


def bytewise(draw: random.Random, data: bytes) -> bytes:
    """`data` with up to four stretches cut, inserted, flipped, repeated or zeroed; never as it was."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at, length = draw.randrange(len(changed) + 1), draw.choice((1, 1, 2, 8, 64))
        kind = draw.choice("cut insert flip repeat zero".split())
        piece = changed[at : at + length]
        if kind == "cut":
            del changed[at : at + length]
        elif kind == "insert":
            changed[at:at] = (
                draw.randbytes(length) if draw.random() < 0.5 else draw.choice((b"{", b'"', b",", b"9", b" "))
            )
        elif kind == "flip" and piece:
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == "repeat":
            changed[at:at] = piece
        else:
            changed[at : at + length] = bytes(len(piece))
    return bytes(changed) if changed != data else data[: len(data) // 2]


def whole(draw: random.Random, path: Path) -> bool:
    """Put what is nothing of the kind in the place of a file."""
    data = path.read_bytes()
    kind = draw.choice(("empty", "folder", "cut", "cut", "deep", "noise", "UTF-16", "list", "number"))
    if kind == "folder":
        path.unlink()
        path.mkdir()
        return MUST_FAIL
    texts = {"empty": b"", "deep": b"[" * 200_000, "UTF-16": b"\xff\xfe" + data, "list": b"[]", "number": b"1e999"}
    texts |= {"noise": draw.randbytes(300), "cut": data[: draw.randrange(len(data) - 8)]}
    path.write_bytes(texts[kind])
    return MAY_HOLD if path.suffix == ".toml" and kind in ("empty", "cut") else MUST_FAIL  # the rest is the default


def json_field(draw: random.Random, path: Path, fields: list[list[Any]], values: tuple[Any, ...] = NASTY) -> bool:
    """Take one of the required fields out of a JSON file, or give it a value that it cannot have."""
    held = json.loads(path.read_text())
    *above, name = draw.choice(fields)
    inner = held
    for key in above:
        inner = inner[key]
    if draw.random() < 0.25:
        del inner[name]
    else:
        inner[name] = draw.choice([value for value in values if value != inner[name]])
    path.write_text(json.dumps(held, indent=1))
    return MUST_FAIL


def edits(change: Callable[[random.Random, Any], object]) -> Way:
    """The way to damage a JSON file in which `change` alters what it holds."""

    def way(draw: random.Random, path: Path) -> bool:
        held = json.loads(path.read_text())
        change(draw, held)
        path.write_text(json.dumps(held))
        return MUST_FAIL

    return way


def asks_for(*others: dict[str, Any]) -> Way:
    """The way in which a JSON object asks for one of these."""
    return edits(lambda draw, held: held.update(draw.choice(others)))


def put_line(path: Path, line: str, first: bool = False, twice: bool = False) -> bool:
    """Put a line into a TOML file, in the place of what it has of that name unless `twice`."""
    name = line.partition(" =")[0]
    kept = [old for old in path.read_text().splitlines() if twice or not old.startswith(name + " =")]
    path.write_text("\n".join([line, *kept, ""] if first else [*kept, line, ""]))
    return MUST_FAIL


def safetensors(draw: random.Random, path: Path) -> bool:
    """Damage the header of a safetensors file, or what it stands for."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, values = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__" and header[name]["shape"]]  # a scalar may be as it was
    name, other = draw.sample(names, 2)
    entry = copy.deepcopy(header[name])
    begin, end = entry["data_offsets"]
    kind = draw.choice("length overlap beyond reversed type shape negative twice gone renamed more nonsense".split())
    claimed = None
    if kind == "length":
        claimed = draw.choice((2**63, 2**32, 10**8 + 1, len(data), length + 8, length - 8, 0, 2**64 - 1))
    elif kind == "overlap":
        entry["data_offsets"] = header[other]["data_offsets"]
    elif kind == "beyond":
        entry["data_offsets"] = [begin + len(values), end + len(values)]
    elif kind == "reversed":
        entry["data_offsets"] = [end, begin]
    elif kind == "type":
        entry["dtype"] = draw.choice(("I8", "U8", "F64", "X9", "I64", "BOOL", "", None, 7))
    elif kind == "shape":
        entry["shape"] = draw.choice(([2**62, 4], [end - begin], [], [0], "x", None, [2**63]))
    elif kind == "negative":
        entry["shape"] = [-1, -((end - begin) // 4)]
    elif kind == "nonsense":
        entry = draw.choice((None, [], {}, "x", {"dtype": "F32"}))
    header[name] = entry
    if kind == "gone":
        del header[name]
    elif kind == "renamed":
        header[draw.choice(("x\x1b[2J\n", "y" * 5000, name + " ", "__proto__"))] = header.pop(name)
    elif kind == "more":
        header["more"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(values), len(values) + 4]}
        values += bytes(4)
    text = json.dumps(header)
    if kind == "twice":
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
    raw = text.encode()
    path.write_bytes((len(raw) if claimed is None else claimed).to_bytes(8, "little") + raw + values)
    return MUST_FAIL


# Each of the following damages one of the inputs, by a seeded choice; returns whether that must be refused.


def weights(draw: random.Random, root: Path) -> tuple[Path, bool]:
    path = root / "model" / "model.safetensors"
    return path, _one_of(draw, path, whole, safetensors, safetensors)


def index(draw: random.Random, root: Path) -> tuple[Path, bool]:
    path = root / "sharded" / "model.safetensors.index.json"
    shards = sorted(root.glob("sharded/*.safetensors"))

    @edits
    def hostile_name(draw: random.Random, held: Any) -> None:
        paths = "../model/model.safetensors", "/etc/passwd", str(root / "model/model.safetensors"), "..", "config.json"
        others = "", 7, None, [], "a\n.safetensors", "absent.safetensors", "x" * 2000 + ".safetensors"
        held["weight_map"][draw.choice(sorted(held["weight_map"]))] = draw.choice((*paths, *others))

    def missing_shard(draw: random.Random, path: Path) -> bool:
        draw.choice(shards).unlink()
        return MUST_FAIL

    @edits
    def forgotten(draw: random.Random, held: Any) -> None:
        file = draw.choice(shards).name
        held["weight_map"] = {name: f for name, f in held["weight_map"].items() if f != file}

    def both(draw: random.Random, path: Path) -> bool:
        a, b = (load_file(shard) for shard in shards)
        save_file({n: t.clone() for n, t in (a | {next(iter(b)): next(iter(b.values()))}).items()}, shards[0])
        return MUST_FAIL

    def shard(draw: random.Random, path: Path) -> bool:
        return safetensors(draw, draw.choice(shards))

    def no_map(draw: random.Random, path: Path) -> bool:
        values = tuple(value for value in NASTY if value != {"a": {"b": [None]}})
        return json_field(draw, path, [["weight_map"]], values)

    return path, _one_of(draw, path, whole, hostile_name, missing_shard, forgotten, both, shard, no_map)


def hdf5(draw: random.Random, root: Path) -> tuple[Path, bool]:
    path = root / "waves.h5"

    def datasets(draw: random.Random, path: Path) -> bool:
        good = np.ones((20, 8, 2), np.float32)
        bad = good.copy()
        bad[draw.randrange(20), draw.randrange(8), draw.randrange(2)] = draw.choice((np.nan, np.inf, -np.inf))
        path.unlink()
        with h5py.File(path, "w") as file:
            kind = draw.choice("none rank type values time group huge link raw text void empty few".split())
            if kind == "rank":
                file["trajectories"] = draw.choice(
                    (np.ones(20), np.ones((20, 8)), np.ones((2, 2, 2, 2)), np.float32(1))
                )
            elif kind == "type":
                file["trajectories"] = good.astype(draw.choice(("c8", "S3", "?", [("a", "f4")])))
            elif kind == "values":
                file["trajectories"] = bad
            elif kind == "time":
                file["trajectories"] = good
                file["time"] = draw.choice(
                    ([1.0], np.zeros(8), np.full(8, np.nan), np.arange(8.0)[::-1], np.ones((8, 1)))
                )
            elif kind == "group":
                file.create_group("trajectories/trajectories")
            elif kind == "huge":
                file.create_dataset(
                    "trajectories", draw.choice(((10**6, 10**5, 2), (10**4, 10**4, 2))), "f4", chunks=(10, 10, 2)
                )
            elif kind == "link":
                file["trajectories"] = h5py.ExternalLink(str(root / "other.h5"), "/trajectories")
            elif kind == "raw":
                file.create_dataset("trajectories", (20, 8, 2), "f4", external=[("/etc/passwd", 0, 1280)])
            elif kind == "text":
                file.create_dataset("trajectories", (20, 8, 2), h5py.string_dtype())
            elif kind == "void":
                file["trajectories"] = h5py.Empty("f4")
            elif kind == "empty":
                file["trajectories"] = np.ones(draw.choice(((0, 8, 2), (20, 0, 2), (20, 8, 0))))
            elif kind == "few":
                file["trajectories"] = good[:2]
        return MUST_FAIL

    def text(draw: random.Random, path: Path) -> bool:
        path.write_text("prey,predator\n1.0,2.0\n")
        return MUST_FAIL

    def zipped(draw: random.Random, path: Path) -> bool:
        with h5py.File(path, "r") as file:
            series = file["trajectories"][()]
        path.unlink()
        with h5py.File(path, "w") as file:
            file.create_dataset("trajectories", data=series, chunks=(5, 8, 2), compression="gzip", fletcher32=True)
        path.write_bytes(bytewise(draw, path.read_bytes()))
        return MAY_HOLD

    return path, _one_of(draw, path, whole, datasets, datasets, text, zipped)


REQUIRED = [[name] for name in QwenConfig.__dataclass_fields__ if name not in ("rope_theta", "tie_word_embeddings")]


def config(draw: random.Random, root: Path) -> tuple[Path, bool]:
    path = root / "model" / "config.json"

    @edits
    def size(draw: random.Random, held: Any) -> None:
        name = draw.choice("vocab_size hidden_size intermediate_size num_hidden_layers".split())
        held[name] = draw.choice((10**400, 10**12, 2**24, 1023, 10**9, 1e400, float("nan"), held[name] + 1))

    @edits
    def rotation(draw: random.Random, held: Any) -> None:
        wrong = {"rope_type": "yarn"}, [1], "x", {"rope_type": "default"}
        thetas = {"rope_theta": -1}, {"rope_theta": 10**400}, {"rope_theta": None}
        held["rope_parameters"] = draw.choice((*wrong, *thetas))
        held.pop("rope_theta", None)

    def field(draw: random.Random, path: Path) -> bool:
        values = tuple(value for value in NASTY if value not in (1.5, 2**62)) + (True, 0, -(10**30), "1e6")
        return json_field(draw, path, [*REQUIRED, ["model_type"]], values)

    others = {"hidden_act": "gelu"}, {"use_sliding_window": True}, {"quantization_config": {"x": 1}}, {"head_dim": 3}
    asks = asks_for(*others, {"attention_dropout": 0.5}, {"layer_types": ["full_attention", {}]})
    return path, _one_of(draw, path, whole, field, size, rotation, asks)


def tokenizer(draw: random.Random, root: Path) -> tuple[Path, bool]:
    path = root / "model" / "tokenizer.json"

    merges = [["a", "a"]], ["a a"], ["aa"], [["a", "b", "c"]], [[1, 2]], 7, [None], ["a  b"], [["a", "é"]]
    vocabularies = [], None, {"a": "x"}, {"a": -1}, {"a": 1.5}, {}, {"a": 2**40}

    @edits
    def change(draw: random.Random, held: Any) -> None:
        model = held["model"]
        kind = draw.choice(("no model", "kind", "merge", "merge", "prefix", "vocab", "id", "special", "added"))
        if kind == "no model":
            del held["model"]
        elif kind == "kind":
            model["type"] = draw.choice(("WordLevel", "WordPiece", "Unigram", "x", 7, ["BPE"]))
        elif kind == "merge":  # of which some made the library's Rust panic
            model["merges"] = draw.choice(merges)
        elif kind == "prefix":  # and one ended the process
            name = draw.choice("continuing_subword_prefix end_of_word_suffix".split())
            model |= {name: draw.choice(("##", "#", "éé", 7)), "merges": [["a", "é"]]}
            model["vocab"] |= {"é": 300, "aé": 301}
        elif kind == "vocab":
            model["vocab"] = draw.choice(vocabularies)
        elif kind == "id":
            model["vocab"][draw.choice("1 new".split())] = draw.choice((10**6, 2**31))
        elif kind == "special":
            held["added_tokens"] = draw.choice((held["added_tokens"][:1], held["added_tokens"][1:], [], None))
        else:
            held["added_tokens"] = draw.choice(({}, [7], [{"content": "x"}], "x"))

    @edits
    def official(draw: random.Random, held: Any) -> None:
        """The tokenizer of a larger model."""
        held["model"]["vocab"] |= {f"t{i}": i for i in range(300, 1000)}

    return path, _one_of(draw, path, whole, change, change, change, official)


def bad_setting(draw: random.Random) -> str:
    """A line of TOML that no settings may have."""
    wrong = (
        "[[1]]",
        "1979-05-27T07:32:00Z",
        "{ a = 1 }",
        "0x" + "f" * 5000,
        "1" * 400,
        "nan",
        "-inf",
        "-7",
        '"x\\u001b"',
    )
    name = draw.choice([*Settings.__dataclass_fields__])
    if isinstance(Settings.__dataclass_fields__[name].default, str):
        return f"{name} = {draw.choice(wrong[:-1])}"
    return f"{name} = {draw.choice(wrong)}"


def toml(draw: random.Random, root: Path) -> tuple[Path, bool]:
    path = root / "config.toml"
    lines = "steps = 5", "nothing = 1", '"\\u001b" = 1', "[settings]\nsteps = 3", "steps", "= 3", "x = " + "[" * 5000
    large = "context = 300", "context = 1048576", "ranks = [99999999]", "num_samples = 99999999999"

    def setting(draw: random.Random, path: Path) -> bool:
        return put_line(path, bad_setting(draw), first=True)

    def structure(draw: random.Random, path: Path) -> bool:
        line = draw.choice((*lines, *large))
        return put_line(path, line, twice=line == "steps = 5")

    return path, _one_of(draw, path, whole, setting, setting, structure)


def protocol(draw: random.Random, root: Path) -> tuple[Path, bool]:
    path = root / "protocols" / "hostile.toml"
    path.parent.mkdir()
    path.write_text("[settings]\ncontext = 64\nval_series = 1\npoints = 5\nhorizon = 3\nlr = [1e-3]\n")

    def setting(draw: random.Random, path: Path) -> bool:
        return put_line(path, bad_setting(draw))

    def no_table(draw: random.Random, path: Path) -> bool:
        path.write_text(
            draw.choice(("settings = 3\n", "settings = []\n", "[[settings]]\ncontext = 3\n", "settings = 'x'\n"))
        )
        return MUST_FAIL

    def not_text(draw: random.Random, path: Path) -> bool:
        path.write_bytes(draw.choice((b"\xff\xfe", b"[", b"[settings", b"settings = {", b"a = " + b"[" * 9000)))
        return MUST_FAIL

    return path, _one_of(draw, path, setting, setting, no_table, not_text)


def adapter_config(draw: random.Random, root: Path) -> tuple[Path, bool]:
    path = root / "adapter" / "adapter_config.json"

    def field(draw: random.Random, path: Path) -> bool:
        return json_field(draw, path, [["r"], ["target_modules"]], (*NASTY, True, 10**12, 10**400, ["q_proj"], [7], 3))

    @edits
    def alpha(draw: random.Random, held: Any) -> None:
        wrong = "x", [], {}, -1, 10**400, float("inf"), float("nan"), True
        held[draw.choice("lora_alpha lora_dropout".split())] = draw.choice(wrong)

    others = {"use_dora": True}, {"rank_pattern": {"x": 1}}, {"bias": "all"}, {"peft_type": "IA3"}
    asks = asks_for(
        *others, {"x\x1b\n" + "y" * 3000: 1}, {"modules_to_save": ["lm_head"]}, {"fan_in_fan_out": "z" * 9000}
    )
    return path, _one_of(draw, path, whole, field, field, alpha, asks)


def adapter_weights(draw: random.Random, root: Path) -> tuple[Path, bool]:
    path = root / "adapter" / "adapter_model.safetensors"
    if draw.random() < 0.2:
        bias = root / "adapter" / "logit_bias.safetensors"
        tensor = draw.choice((torch.zeros(3), torch.zeros(3, 3), torch.zeros(0), torch.zeros(3, dtype=torch.int8)))
        save_file({draw.choice("logit_bias x".split()): tensor}, bias)
        return bias, MUST_FAIL
    return path, _one_of(draw, path, whole, safetensors, safetensors)


def state_tensors(draw: random.Random, root: Path) -> tuple[Path, bool]:
    path = root / "stopped" / CELL / "checkpoint" / "state.safetensors"
    return path, _one_of(draw, path, whole, safetensors, safetensors)


def state_json(draw: random.Random, root: Path) -> tuple[Path, bool]:
    path = root / "stopped" / CELL / "checkpoint" / "state.json"

    def field(draw: random.Random, path: Path) -> bool:
        fields: list[list[Any]] = [[name] for name in ("step", "flops", "validated_at")]
        fields += [["flops", "training"], ["flops", "validation"]]
        values = tuple(v for v in NASTY if v != -1) + (True, 0, 1, 3, 5, 10**30, 7.0, -2)
        return json_field(draw, path, [draw.choice(fields)], tuple(value for value in values if value != 2))

    return path, _one_of(draw, path, whole, field, field)


def metrics(draw: random.Random, root: Path) -> tuple[Path, bool]:
    run_, name = draw.choice("stopped finished".split()), "metrics.jsonl"
    path = root / run_ / CELL / name

    def lines(draw: random.Random, path: Path) -> bool:
        held = path.read_text().splitlines()
        at = draw.randrange(2)  # within the checkpoint
        kind = draw.choice("twice gone swapped field field list blank loss".split())
        if kind == "twice":
            held.insert(at, held[at])
        elif kind == "gone":
            del held[at]
        elif kind == "swapped":
            held[0], held[1] = held[1], held[0]
        elif kind == "list":
            held[at] = "[]"
        elif kind == "blank":
            held.insert(at, "")
        else:
            line = json.loads(held[at])
            names = ("loss",) if kind == "loss" else ("step", "loss", "training", "validation", "gradient_norm")
            line[draw.choice(names)] = draw.choice(("x", None, [], 1e308, {}, 12345.5, 2**70))
            held[at] = json.dumps(line)
        path.write_text("\n".join([*held, ""]))
        return MUST_FAIL

    return path, _one_of(draw, path, _whole_lines, lines, lines)


def _whole_lines(draw: random.Random, path: Path) -> bool:
    """As `whole`; but a file that was cut, or ends in the middle of a line, has lost lines that may be made again."""
    whole(draw, path)
    return path.is_dir() or path.stat().st_size == 0


def manifest(draw: random.Random, root: Path) -> tuple[Path, bool]:
    folder = root / draw.choice("stopped finished".split())
    if draw.random() < 0.4:
        path = folder / "config.toml"

        def setting(draw: random.Random, path: Path) -> bool:
            return put_line(path, bad_setting(draw), first=True)

        return path, _one_of(draw, path, whole, setting, setting)
    path = folder / "manifest.json"

    def field(draw: random.Random, path: Path) -> bool:
        names = ("model_sha256", "config_sha256", "tokenizer_sha256", "data_sha256", "environment")
        return json_field(draw, path, [[name] for name in names], (*NASTY, {"model.safetensors": "0" * 64}))

    return path, _one_of(draw, path, whole, field, field)


def result(draw: random.Random, root: Path) -> tuple[Path, bool]:
    path = root / "finished" / CELL / "result.json"

    def field(draw: random.Random, path: Path) -> bool:
        names: list[list[Any]] = [["flops", "training"], ["flops", "validation"], ["predicted_flops"]]
        names += [[name] for name in json.loads(path.read_text()) if name not in OPTIONAL]
        values = tuple(v for v in NASTY if v not in ("x", "NaN", "\x1b[2J\n", "y" * 3000, 1.5, 2**62)) + (True, [1])
        chosen = draw.choice(names)
        return json_field(draw, path, [chosen], tuple(v for v in values if v != -1))

    @edits
    def number(draw: random.Random, held: Any) -> None:
        name = draw.choice("validation_loss best_validation_loss best_step first_loss last_losses_mean steps".split())
        held[name] *= 2

    return path, _one_of(draw, path, whole, field, field, number)


OPTIONAL = ("validation_loss_with_padding", "metrics_sha256")
CELL = Path("cells") / "lr0.001-r2"
KINDS = (
    *(weights, index, hdf5, config, tokenizer, toml, protocol, adapter_config, adapter_weights),
    *(state_tensors, state_json, metrics, manifest, result),
)


def _one_of(draw: random.Random, path: Path, *ways: Way) -> bool:
    """Damage a file in one of the ways, or (two times in five) in its bytes."""
    if draw.random() < 0.4:
        path.write_bytes(bytewise(draw, path.read_bytes()))
        return MAY_HOLD
    return draw.choice(ways)(draw, path)


def harmless(path: Path, before: bytes, seen: Path) -> bool:
    """Whether a file whose damaged bytes were accepted says what it said, as far as this kind of file can tell.

    `before`: what it held. `seen`: a copy of what was read. Weights, data, configurations and protocols that are valid
    may say something else: nothing recorded what they were.
    """
    now = seen.read_bytes()
    if path.suffix == ".toml":
        tomllib.loads(now.decode())
        return True
    if path.suffix == ".h5":
        with h5py.File(seen, "r") as file:
            values = file["trajectories"][()]
        return values.ndim == 3 and bool(np.isfinite(values).all()) and bool((values >= 0).all())
    if path.suffix == ".safetensors":
        a, b = load_file(seen), _loaded(before, seen)
        same = a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)
        return same and (path.name.startswith("model") or all(torch.equal(a[name], b[name]) for name in a))
    if path.suffix == ".json":
        return isinstance(json.loads(now), dict)
    return True


def _loaded(data: bytes, beside: Path) -> dict[str, torch.Tensor]:
    path = beside.with_name("before.safetensors")
    path.write_bytes(data)
    return load_file(path)


def tree(root: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes; None for a folder."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
        if path.name not in (".lock", ".owner")
    }


def restore(root: Path, wanted: dict[str, bytes | None]) -> None:
    """Put a folder back to what `tree` found."""
    for name, content in tree(root).items():
        path = root / name
        if name not in wanted or (path.exists() and (content is None) != (wanted[name] is None)):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.exists():
                os.unlink(path)
    for name, content in wanted.items():
        path = root / name
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        elif not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
