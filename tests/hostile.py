"""Small valid inputs of every kind that a run reads, and seeded ways to damage them."""

import json
import os
import random
import shutil
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from waves import damped_waves, no_figures

from experiments import run
from experiments.settings.record import Settings
from experiments.training import cell as train
from lora import add_lora, save_adapter
from qwen_min import Qwen, QwenConfig

ROOT = Path(__file__).parents[1]
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
NASTY: tuple[Any, ...] = (None, "x", [], {}, [[]], -1, 1.5, "NaN", 2**62, {"a": {"b": [None]}}, "\x1b[2J\n", "y" * 3000)
"""Values that no required field of any of these files may have."""

SETTINGS = Settings(
    steps=4, val_every=4, checkpoint_every=2, context=32, val_series=1, points=5, horizon=3, lr=(1e-3,), ranks=(2,)
)


@dataclass(frozen=True)
class Inputs:
    """A folder with one of each: model/, sharded/, adapter/, waves.h5, config.toml, protocols/, and two runs, one that
    stopped and one that ended."""

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
    (root / "protocols").mkdir()
    sizes = "context = 64\nval_series = 1\npoints = 5\nhorizon = 3\nlr = [1e-3]\n"
    (root / "protocols" / "hostile.toml").write_text(f"[settings]\n{sizes}")
    inputs = Inputs(root)
    no_figures(monkeypatch)
    assert run.main(inputs.train("finished")) == 0
    _stop_after(3, monkeypatch, lambda: run.main(inputs.train("stopped")))
    return inputs


def _stop_after(step: int, monkeypatch, work: Callable[[], int]) -> None:
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
            few = draw.choice((b"{", b'"', b",", b"9", b" "))
            changed[at:at] = draw.randbytes(length) if draw.random() < 0.5 else few
        elif kind == "flip" and piece:
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == "repeat":
            changed[at:at] = piece
        else:
            changed[at : at + length] = bytes(len(piece))
    return bytes(changed) if changed != data else data[: len(data) // 2]


MAY_HOLD = "may hold"
Way = Callable[[random.Random, Path], Any]
"""How a file is damaged, by a seeded choice: returns `MAY_HOLD` unless it must be refused then."""


def whole(draw: random.Random, path: Path) -> Any:
    """Put what is nothing of the kind in the place of a file."""
    data = path.read_bytes()
    kind = draw.choice(("empty", "folder", "cut", "cut", "deep", "noise", "UTF-16", "list", "number"))
    if kind == "folder":
        path.unlink()
        path.mkdir()
        return None
    texts = {"empty": b"", "deep": b"[" * 200_000, "UTF-16": b"\xff\xfe" + data, "list": b"[]", "number": b"1e999"}
    texts |= {"noise": draw.randbytes(300), "cut": data[: draw.randrange(len(data) - 8)]}
    path.write_bytes(texts[kind])
    if path.suffix == ".toml" and kind in ("empty", "cut"):  # the rest is the default
        return MAY_HOLD
    # A list of lines that was cut, or ends in the middle of a line, has lost lines that may be made again.
    return MAY_HOLD if path.suffix == ".jsonl" and texts[kind] else None


def becomes(*contents: bytes) -> Way:
    return lambda draw, path: path.write_bytes(draw.choice(contents)) and None


@contextmanager
def json_of(path: Path) -> Iterator[Any]:
    """What a JSON file holds, to be changed and written back."""
    held = json.loads(path.read_text())
    yield held
    path.write_text(json.dumps(held, indent=1, ensure_ascii=False))


GONE = object()


def puts(fields: dict[str, Sequence[Any]]) -> Way:
    """Put one of its bad values into a field of a JSON file; one that can be called makes it of the good value."""

    def way(draw: random.Random, path: Path) -> None:
        field = draw.choice(list(fields))
        *above, name = field.split(".")
        with json_of(path) as held:
            for key in above:
                held = held[key]
            value = draw.choice([value for value in fields[field] if value != held.get(name, GONE)])
            if value is GONE:
                del held[name]
            else:
                held[name] = value(held[name]) if callable(value) else value

    return way


def required(names: Sequence[str], but: Sequence[Any] = (), also: Sequence[Any] = ()) -> Way:
    """Take one of the required fields out of a JSON file, or give it a value that it cannot have."""
    values = [value for value in (*NASTY, *also) if value not in but]
    return puts(dict.fromkeys(names, [*values, *[GONE] * (len(values) // 3)]))


def puts_line(path: Path, line: str) -> None:
    """Put a line into a TOML file, in the place of what it says of the same setting."""
    name = line.partition(" =")[0]
    kept = [old for old in path.read_text().splitlines() if not old.startswith(f"{name} =")]
    path.write_text("\n".join([*kept, line, ""]))


def setting(draw: random.Random, path: Path) -> None:
    wrong = ["[[1]]", "1979-05-27T07:32:00Z", "{ a = 1 }", "0x" + "f" * 5000, "1" * 400, "nan", "-inf", "-7"]
    name = draw.choice([*Settings.__dataclass_fields__])
    if not isinstance(Settings.__dataclass_fields__[name].default, str):
        wrong.append('"x\\u001b"')
    puts_line(path, f"{name} = {draw.choice(wrong)}")


def structure(draw: random.Random, path: Path) -> None:
    lines = ["steps = 5\nsteps = 5", "nothing = 1", '"\\u001b" = 1', "[settings]\nsteps = 3", "steps", "= 3"]
    lines += ["x = " + "[" * 5000, "context = 300", "context = 1048576", "ranks = [99999999]"]
    puts_line(path, draw.choice([*lines, "num_samples = 99999999999"]))


def safetensors(draw: random.Random, path: Path) -> None:
    """Damage the header of a safetensors file, or what it stands for."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, values = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__" and header[name]["shape"]]  # a scalar may be as it was
    name, other = draw.sample(names, 2)
    begin, end = header[name]["data_offsets"]
    entries: dict[str, dict[str, Any]] = {
        "overlap": {"data_offsets": header[other]["data_offsets"]},
        "beyond": {"data_offsets": [begin + len(values), end + len(values)]},
        "reversed": {"data_offsets": [end, begin]},
        "type": {"dtype": draw.choice(("I8", "U8", "F64", "X9", "I64", "BOOL", "", None, 7))},
        "shape": {"shape": draw.choice(([2**62, 4], [end - begin], [], [0], "x", None, [2**63]))},
        "negative": {"shape": [-1, -((end - begin) // 4)]},
    }
    kind = draw.choice([*entries, *"length twice gone renamed more nonsense".split()])
    header[name] |= entries.get(kind, {})
    if kind == "nonsense":
        header[name] = draw.choice((None, [], {}, "x", {"dtype": "F32"}))
    elif kind == "gone":
        del header[name]
    elif kind == "renamed":
        header[draw.choice(("x\x1b[2J\n", "y" * 5000, name + " ", "__proto__"))] = header.pop(name)
    elif kind == "more":
        header["more"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(values), len(values) + 4]}
        values += bytes(4)
    text = json.dumps(header)
    if kind == "twice":
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
    claimed = len(raw := text.encode())
    if kind == "length":
        claimed = draw.choice((2**63, 2**32, 10**8 + 1, len(data), length + 8, length - 8, 0, 2**64 - 1))
    path.write_bytes(claimed.to_bytes(8, "little") + raw + values)


def hostile_name(draw: random.Random, path: Path) -> None:
    names = ["../model/model.safetensors", "/etc/passwd", str(path.parents[1] / "model/model.safetensors"), "..", ""]
    names += ["a\n.safetensors", "absent.safetensors", "x" * 2000 + ".safetensors", "config.json"]
    with json_of(path) as held:
        held["weight_map"][draw.choice(sorted(held["weight_map"]))] = draw.choice([*names, 7, None, []])


def shards(draw: random.Random, path: Path) -> None:
    first, second = draw.sample(sorted(path.parent.glob("*.safetensors")), 2)
    kind = draw.choice("missing forgotten both damaged".split())
    if kind == "missing":
        first.unlink()
    elif kind == "damaged":
        safetensors(draw, first)
    elif kind == "forgotten":
        with json_of(path) as held:
            held["weight_map"] = {name: file for name, file in held["weight_map"].items() if file != first.name}
    else:
        a, b = load_file(first), load_file(second)
        save_file({n: t.clone() for n, t in (a | {next(iter(b)): next(iter(b.values()))}).items()}, first)


def datasets(draw: random.Random, path: Path) -> None:
    good = np.ones((20, 8, 2), np.float32)
    bad = good.copy()
    bad[draw.randrange(20), draw.randrange(8), draw.randrange(2)] = draw.choice((np.nan, np.inf, -np.inf))
    shape = draw.choice(((10**6, 10**5, 2), (10**4, 10**4, 2)))
    times = [1.0], np.zeros(8), np.full(8, np.nan), np.arange(8.0)[::-1], np.ones((8, 1))
    series = {
        "rank": draw.choice((np.ones(20), np.ones((20, 8)), np.ones((2, 2, 2, 2)), np.float32(1))),
        "type": good.astype(draw.choice(("c8", "S3", "?", [("a", "f4")]))),
        "values": bad,
        "time": good,
        "link": h5py.ExternalLink(str(path.parent / "other.h5"), "/trajectories"),
        "void": h5py.Empty("f4"),
        "empty": np.ones(draw.choice(((0, 8, 2), (20, 0, 2), (20, 8, 0)))),
        "few": good[:2],
    }
    made: dict[str, dict[str, Any]] = {
        "huge": {"shape": shape, "dtype": "f4", "chunks": (10, 10, 2)},
        "raw": {"shape": (20, 8, 2), "dtype": "f4", "external": [("/etc/passwd", 0, 1280)]},
        "text": {"shape": (20, 8, 2), "dtype": h5py.string_dtype()},
    }
    kind = draw.choice([*series, *made, "none", "group"])
    path.unlink()
    with h5py.File(path, "w") as file:
        if kind in series:
            file["trajectories"] = series[kind]
        if kind in made:
            file.create_dataset("trajectories", **made[kind])
        if kind == "time":
            file["time"] = draw.choice(times)
        if kind == "group":
            file.create_group("trajectories/trajectories")


def zipped(draw: random.Random, path: Path) -> Any:
    with h5py.File(path, "r") as file:
        series = file["trajectories"][()]
    path.unlink()
    with h5py.File(path, "w") as file:
        file.create_dataset("trajectories", data=series, chunks=(5, 8, 2), compression="gzip", fletcher32=True)
    path.write_bytes(bytewise(draw, path.read_bytes()))
    return MAY_HOLD


def rope(draw: random.Random, path: Path) -> None:
    thetas = [{"rope_theta": theta} for theta in (-1, 10**400, None)]
    with json_of(path) as held:
        held["rope_parameters"] = draw.choice([{"rope_type": "yarn"}, [1], "x", {"rope_type": "default"}, *thetas])
        held.pop("rope_theta", None)


def prefix(draw: random.Random, path: Path) -> None:
    """One of these ended the process."""
    with json_of(path) as held:
        name = draw.choice("continuing_subword_prefix end_of_word_suffix".split())
        held["model"] |= {name: draw.choice(("##", "#", "éé", 7)), "merges": [["a", "é"]]}
        held["model"]["vocab"] |= {"é": 300, "aé": 301}


def of_a_larger_model(draw: random.Random, path: Path) -> None:
    with json_of(path) as held:
        held["model"]["vocab"] |= {f"t{i}": i for i in range(300, 1000)}


def logit_bias(draw: random.Random, path: Path) -> None:
    tensor = draw.choice((torch.zeros(3), torch.zeros(3, 3), torch.zeros(0), torch.zeros(3, dtype=torch.int8)))
    save_file({draw.choice("logit_bias x".split()): tensor}, path.with_name("logit_bias.safetensors"))


def metric_lines(draw: random.Random, path: Path) -> None:
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


SIZES = (10**400, 10**12, 2**24, 1023, 10**9, 1e400, float("nan"), lambda size: size + 1)
OF_CONFIG = [name for name in QwenConfig.__dataclass_fields__ if name not in ("rope_theta", "tie_word_embeddings")]
CONFIG: dict[str, Sequence[Any]] = {
    **dict.fromkeys("vocab_size hidden_size intermediate_size num_hidden_layers".split(), SIZES),
    "hidden_act": ["gelu"],
    "use_sliding_window": [True],
    "quantization_config": [{"x": 1}],
    "attention_dropout": [0.5],
    "layer_types": [["full_attention", {}]],
    "head_dim": [3],
}
MERGES = [["a", "a"]], ["a a"], ["aa"], [["a", "b", "c"]], [[1, 2]], 7, [None], ["a  b"], [["a", "é"]]
TOKENIZER: dict[str, Sequence[Any]] = {
    "model": [GONE],
    "model.type": ("WordLevel", "WordPiece", "Unigram", "x", 7, ["BPE"]),
    "model.merges": MERGES,  # of which some made the library's Rust panic
    "model.vocab": ([], None, {"a": "x"}, {"a": -1}, {"a": 1.5}, {}, {"a": 2**40}),
    **dict.fromkeys(("model.vocab.1", "model.vocab.new"), (10**6, 2**31)),
    "added_tokens": (lambda a: a[:1], lambda a: a[1:], [], None, {}, [7], [{"content": "x"}], "x"),
}
ADAPTER: dict[str, Sequence[Any]] = {
    **dict.fromkeys(("lora_alpha", "lora_dropout"), ("x", [], {}, -1, 10**400, float("inf"), float("nan"), True)),
    "use_dora": [True],
    "rank_pattern": [{"x": 1}],
    "x\x1b\n" + "y" * 3000: [1],
    "bias": ["all"],
    "peft_type": ["IA3"],
    "modules_to_save": [["lm_head"]],
    "fan_in_fan_out": ["z" * 9000],
}
PROTOCOLS = b"settings = 3\n", b"settings = []\n", b"[[settings]]\ncontext = 3\n", b"settings = 'x'\n"
NO_TOML = b"\xff\xfe", b"[", b"[settings", b"settings = {", b"a = " + b"[" * 9000
CELL = "cells/lr0.001-r2"
OF_MANIFEST = "model_sha256 config_sha256 tokenizer_sha256 data_sha256 environment".split()
OF_STATE = "step flops.training flops.validation flops validated_at".split()
OF_RESULT = "flops.training flops.validation predicted_flops cell lr rank steps context label validation_loss".split()
OF_RESULT += "best_validation_loss best_step first_loss last_losses_mean flops convention trainable_parameters".split()
OF_RESULT += "train_windows validation_windows validation_tokens data_sha256".split()
NUMBERS = "validation_loss best_validation_loss best_step first_loss last_losses_mean steps".split()
WORDS = [value for value in NASTY if isinstance(value, (str, int, float))]
WAYS: dict[str, Sequence[Way]] = {
    "weights": (whole, safetensors, safetensors),
    "index": (whole, hostile_name, *[shards] * 4, required(["weight_map"], but=[{"a": {"b": [None]}}])),
    "hdf5": (whole, datasets, datasets, becomes(b"prey,predator\n1.0,2.0\n"), zipped),
    "config": (
        *(whole, puts(CONFIG), puts(CONFIG), rope),
        required([*OF_CONFIG, "model_type"], but=(1.5, 2**62), also=(True, 0, -(10**30), "1e6")),
    ),
    "tokenizer": (whole, *[puts(TOKENIZER)] * 3, prefix, of_a_larger_model),
    "toml": (whole, setting, setting, structure),
    "protocol": (setting, setting, becomes(*PROTOCOLS), becomes(*NO_TOML)),
    "adapter_config": (
        *(whole, puts(ADAPTER), puts(ADAPTER)),
        required(["r", "target_modules"], also=(True, 10**12, 10**400, ["q_proj"], [7], 3)),
    ),
    "adapter_weights": (whole, safetensors, safetensors, logit_bias),
    "state_tensors": (whole, safetensors, safetensors),
    "state_json": (whole, required(OF_STATE, but=(-1, 2), also=(True, 0, 1, 3, 5, 10**30, 7.0, -2))),
    "metrics": (whole, metric_lines, metric_lines),
    "manifest": (whole, required(OF_MANIFEST, also=[{"model.safetensors": "0" * 64}])),
    "result": (
        *(whole, puts(dict.fromkeys(NUMBERS, [lambda number: number * 2]) | {"adapter_sha256": ([], "x", 7)})),
        *[required(OF_RESULT, but=WORDS, also=(True, [1]))] * 2,
    ),
}
"""How each kind of file is damaged, besides (two times in five) in its bytes."""
FILES = {
    "weights": ["model/model.safetensors"],
    "index": ["sharded/model.safetensors.index.json"],
    "hdf5": ["waves.h5"],
    "config": ["model/config.json"],
    "tokenizer": ["model/tokenizer.json"],
    "toml": ["config.toml"],
    "protocol": ["protocols/hostile.toml"],
    "adapter_config": ["adapter/adapter_config.json"],
    "adapter_weights": ["adapter/adapter_model.safetensors"],
    "state_tensors": [f"stopped/{CELL}/checkpoint/state.safetensors"],
    "state_json": [f"stopped/{CELL}/checkpoint/state.json"],
    "metrics": [f"{out}/{CELL}/metrics.jsonl" for out in ("stopped", "finished")],
    "manifest": [f"{out}/{name}" for out in ("stopped", "finished") for name in ("config.toml", "manifest.json")],
    "result": [f"finished/{CELL}/result.json"],
}


def damage(kind: str, draw: random.Random, root: Path) -> tuple[Path, bool]:
    """Damage an input of a kind, by a seeded choice; returns which file, and whether that must be refused."""
    path = root / draw.choice(FILES[kind])
    if draw.random() < 0.4:
        path.write_bytes(bytewise(draw, path.read_bytes()))
        return path, False
    way = draw.choice(WAYS["toml" if path.name == "config.toml" else kind])
    return path, way(draw, path) != MAY_HOLD


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
        return values.ndim == 3 and bool(np.isfinite(values).all())
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
