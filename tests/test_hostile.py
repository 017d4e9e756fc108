"""Files that are damaged, hostile or altered: refused in one line that names them, with nothing written."""

import hashlib
import json
import random
import resource
import time
from collections import Counter
from pathlib import Path

import h5py
import hostile
import numpy as np
import pytest
import safetensors.torch
import torch
from hostile import FILES, Inputs
from huggingface_hub import constants
from waves import no_figures

from data import lotka_volterra
from experiments import run
from experiments.run_folder.errors import one_line
from experiments.settings import protocols
from qwen_min import Qwen, Tokenizer
from qwen_min.tensors import from_bytes, to_bytes

GENERATE = ["generate", "--prompt", "1.00", "--max-new-tokens", "1"]
VERB = {
    **dict.fromkeys(("weights", "index", "config", "tokenizer", "adapter_config", "adapter_weights"), GENERATE),
    **{"hdf5": ["data"], "toml": ["grid", "--dry-run"], "protocol": ["grid", "--dry-run", "--protocol", "hostile"]},
}
NAMED_INSTEAD = {
    "config": ["model.safetensors", "model: "],
    "weights": ["model: "],
    "index": ["sharded", "model-0000"],
    "toml": ["config.json", "waves.h5"],
    "protocol": ["config.json", "waves.h5"],
    "state_json": ["metrics.jsonl"],
    "adapter_weights": ["logit_bias.safetensors"],
    "result": ["/adapter/adapter_"],
}
"""What a line may name besides the file that was damaged: the one that it no longer fits."""

CPU_SECONDS, LONGEST_LINE, GROWTH = 5.0, 500, 300 * 2**10  # the last in KiB


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        yield hostile.make(tmp_path_factory.mktemp("inputs") / "in", patch)


def command(kind: str, inputs: Inputs, path: Path) -> list[str]:
    root = inputs.root
    if kind not in VERB:
        return inputs.train(path.relative_to(root).parts[0])
    flags = inputs.flags if kind == "protocol" else [*inputs.flags, *inputs.config]
    if kind == "index":
        flags += ["--model", str(root / "sharded")]
    if kind.startswith("adapter"):
        flags += ["--adapter", str(root / "adapter")]
    return [*VERB[kind], *flags]


def refused_or_harmless(kind: str, counts: range, inputs: Inputs, capfd, monkeypatch) -> None:
    """Damage one kind of input again and again, and read it by the command line."""
    root, seen, peak = inputs.root, Counter[str](), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.chdir(root.parent)
    monkeypatch.setattr(protocols, "FOLDER", root / "protocols")
    monkeypatch.setattr("experiments.training.speed.seconds", lambda *_: 1.0)
    before, ended = hostile.tree(root), (root / "finished" / hostile.CELL / "result.json").read_bytes()
    copy = root.parent / "seen"
    copy.mkdir(exist_ok=True)
    for seed in counts:
        draw = random.Random(f"{kind} {seed}")
        path, must_fail = hostile.damage(kind, draw, root)
        damaged, argv = hostile.tree(root), command(kind, inputs, path)
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
        capfd.readouterr()
        began = time.process_time()
        try:
            code, now = run.main(argv), hostile.tree(root)
        finally:
            results = root / path.relative_to(root).parts[0] / hostile.CELL / "result.json"
            ended_now = results.read_bytes() if results.is_file() else b""
            hostile.restore(root, before)
        seconds, said = time.process_time() - began, capfd.readouterr()
        where = f"{kind} {seed}: {path.name}: exit {code}: {said.err[-1500:]}"
        assert seconds < CPU_SECONDS, where
        if code == 0:
            assert not must_fail, f"{where} accepted"
            was = before.get(str(path.relative_to(root))) or b""
            assert hostile.harmless(path, was, copy / path.name), f"{where} accepted"
            if kind not in VERB:  # a run of a damaged folder that was accepted ends as the one that was not damaged
                assert ended_now == ended or kind == "result", where
        else:
            line = said.err
            assert code == 2 and said.out == "", where
            assert line.count("\n") == 1 and line.endswith("\n") and line[:-1].isprintable(), where
            assert len(line) < LONGEST_LINE and "expected" in line and "Traceback" not in line, where
            assert any(name in line for name in (path.name, *NAMED_INSTEAD.get(kind, ()))), where
            written = {name for name in now.keys() | damaged.keys() if now.get(name) != damaged.get(name)}
            assert not written, f"{where}: {written}"
        seen["refused" if code else "accepted"] += 1
    assert seen.total() == len(counts)
    assert seen["refused"] >= 0.6 * len(counts), seen
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < GROWTH
    with capfd.disabled():
        print(f" {kind} {dict(seen)}", end="", flush=True)


@pytest.mark.parametrize("count", [200, pytest.param(1400, marks=pytest.mark.endurance)])
@pytest.mark.parametrize("kind", FILES)
def test_so_many_malformed_inputs_are_refused_in_one_line(kind, count, inputs, capfd, monkeypatch):
    """Of each of 14 kinds a fourteenth, or one more."""
    counts = range(count // 14 + (list(FILES).index(kind) < count % 14))
    refused_or_harmless(kind, counts, inputs, capfd, monkeypatch)


FLIPPED = {
    **{"adapter": "adapter/adapter_model.safetensors", "model": "model/model.safetensors"},
    **{"checkpoint": f"stopped/{hostile.CELL}/checkpoint/state.safetensors", "data": "waves.h5", "rebuilt": "waves.h5"},
}


def flip_of(kind: str, draw: random.Random, inputs: Inputs) -> tuple[list[str], str]:
    """Alter one bit of a file that stays valid: the command that reads it, and what must be said of it."""
    root, out, path = inputs.root, draw.choice(("stopped", "finished")), inputs.root / FLIPPED[kind]
    if path.suffix == ".h5":
        with h5py.File(path, "r+") as file:
            times, series = file["time"][()], file["trajectories"][()]
            if kind == "rebuilt":
                file.attrs[lotka_volterra.WRITTEN_DIGEST] = np.bytes_(lotka_volterra._exact_digest(times, series))
        begin = path.read_bytes().index(series.tobytes()) + 4 * draw.randrange(series.size)
        end = begin + 2  # of the fraction: it stays a number
    else:  # where the tensors lie
        begin, end = 8 + int.from_bytes(path.read_bytes()[:8], "little"), path.stat().st_size
    data = bytearray(path.read_bytes())
    data[draw.randrange(begin, end)] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    if kind in ("model", "data"):
        return inputs.train(out), f"{root / out / 'manifest.json'}: {kind}_sha256 is "
    if kind == "rebuilt":
        return command("hdf5", inputs, path), f"{path}: sha256 of its values is "
    argv = command("adapter_weights" if kind == "adapter" else "state_tensors", inputs, path)
    return argv, f"{path}: sha256 of its tensors is "


def test_60_files_altered_by_one_bit_are_refused_by_their_digest(inputs, capfd, monkeypatch):
    root, done = inputs.root, 0
    monkeypatch.chdir(root.parent)
    before = hostile.tree(root)
    for kind, count in {"adapter": 16, "checkpoint": 14, "model": 10, "data": 10, "rebuilt": 10}.items():
        for seed in range(count):
            argv, said = flip_of(kind, random.Random(f"{kind} {seed}"), inputs)
            altered = hostile.tree(root)
            code, error, now = run.main(argv), capfd.readouterr().err, hostile.tree(root)
            hostile.restore(root, before)
            assert code == 2 and error.startswith(said) and "expected" in error and error.count("\n") == 1, error
            assert altered != before and now == altered, "something was written"
            done += 1
    assert done == 60


def test_a_tensor_that_is_named_twice_is_refused_where_the_library_takes_the_last(inputs, tmp_path):
    entry = b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    text = b"{" + entry + b"," + entry + b"}"
    data = len(text).to_bytes(8, "little") + text + bytes(8)
    assert safetensors.torch.load(data).keys() == {"a"}
    with pytest.raises(ValueError, match="x.safetensors: names 'a' twice: expected each tensor once"):
        from_bytes(data, "x.safetensors")
    (tmp_path / "model.safetensors").write_bytes(data)
    (tmp_path / "config.json").write_bytes((inputs.root / "model" / "config.json").read_bytes())
    with pytest.raises(ValueError, match="model.safetensors: names 'a' twice: expected each tensor once"):
        Qwen.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"continuing_subword_prefix": "#", "vocab": {"a": 0, "é": 1, "aé": 2}, "merges": ["a é"]},
        {"continuing_subword_prefix": "##", "vocab": {"a": 0, "aa": 1}, "merges": ["a a"]},
        {"vocab": {"a": 0}, "merges": ["a a"]},
    ],
    ids=["ends the process", "panics", "panics for want of the merged token"],
)
def test_a_tokenizer_that_the_library_would_panic_at_is_refused_before_it_reads_it(change, tmp_path, capfd):
    """Its Rust cuts a string in the middle of a character, unchecked: the whole process was aborted."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "BPE"} | change}))
    with pytest.raises(ValueError, match="tokenizer.json: .*: expected Qwen's, a BPE"):
        Tokenizer(path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "text", ["a\nb\x1b[2Jc", "x" * 10**6 + ": expected y", "\udcff\x00", "a.h5: bad\u2028; expected b"]
)
def test_a_line_of_any_text_is_printable_and_short_and_keeps_its_ends(text):
    line = one_line(text)
    assert line.isprintable() and len(line) < LONGEST_LINE and line[0] == ascii(text[0])[1] and line[-1] in text + "0"


def test_equal_tensors_are_equal_files_and_a_file_without_a_digest_is_taken_as_it_is():
    """The library writes two entries of metadata in any order: two runs gave different bytes."""
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, 2, dtype=torch.bfloat16)}
    data = to_bytes(tensors)
    assert data == to_bytes(dict(reversed(tensors.items()))) and b'{"format":"pt","sha256":"' in data[:60]
    for held in (from_bytes(data, "x"), from_bytes(safetensors.torch.save(tensors), "x"), safetensors.torch.load(data)):
        assert held.keys() == tensors.keys() and all(torch.equal(held[name], t) for name, t in tensors.items())


@pytest.fixture
def cached(inputs, tmp_path, monkeypatch) -> Path:
    """The hub's cache with the model as the hub's library keeps it; returns the folder of its one snapshot."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit, held = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub" / "models--owner--name"
    snapshot = held / "snapshots" / commit
    for folder in (snapshot, held / "blobs", held / "refs"):
        folder.mkdir(parents=True)
    (held / "refs" / "main").write_text(commit)
    for path in (inputs.root / "model").iterdir():
        data = path.read_bytes()
        large = path.suffix == ".safetensors"
        digest = hashlib.sha256(data) if large else hashlib.sha1(b"blob %d\0" % len(data) + data)
        (held / "blobs" / digest.hexdigest()).write_bytes(data)
        (snapshot / path.name).symlink_to(Path("../../blobs", digest.hexdigest()))
    return snapshot


def from_the_hub(inputs: Inputs) -> list[str]:
    argv = inputs.train("finished")
    return [*argv[: argv.index("--out")], "--model", "owner/name", "--offline", "--out", "run"]


def test_a_run_takes_a_cached_model_whose_files_are_what_their_names_say(cached, inputs, monkeypatch):
    no_figures(monkeypatch)
    assert run.main(from_the_hub(inputs)) == 0


def refusal(inputs: Inputs, capfd, name: str) -> str:
    assert run.main(from_the_hub(inputs)) == 2
    line = capfd.readouterr().err
    assert line.count("\n") == 1 and f"/{name}: " in line and "expected" in line, line
    assert "'hf download owner/name' fetches it" in line and not Path("run/manifest.json").exists()
    return line


CACHED = pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])


@CACHED
def test_a_cached_file_that_was_altered_is_refused_by_its_digest(name, cached, inputs, capfd):
    blob = (cached / name).resolve()
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if name == "model.safetensors" else data + b"\n")
    line = refusal(inputs, capfd, name)
    assert f"/{name}: its digest is " in line and blob.name in line and "expected it as it was fetched" in line


@CACHED
def test_a_half_download_is_no_file_and_the_line_says_what_fetches_it(name, cached, inputs, capfd):
    """The hub's library writes BLOB.incomplete, and makes the link once the blob is whole."""
    blob = (cached / name).resolve()
    blob.with_name(blob.name + ".1a2b.incomplete").write_bytes(blob.read_bytes()[:100])
    blob.unlink()
    refusal(inputs, capfd, name)  # a link to nothing
    (cached / name).unlink()
    refusal(inputs, capfd, name)
