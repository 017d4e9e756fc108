"""A run's folder: one set of settings, and a manifest of what it was made with."""

import hashlib
import platform
import re
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from experiments.run_folder import files
from experiments.settings import protocols
from experiments.settings.record import Settings
from experiments.task.task import Task
from experiments.training import parallel
from qwen_min import QwenConfig, fast
from qwen_min.config import how_to_fetch
from qwen_min.fast import product
from qwen_min.load import resolve, weight_files

PACKAGES = ("torch", "safetensors", "tokenizers", "numpy", "h5py", "scipy", "huggingface-hub")

# A larger budget, the same files under another name, or another choice of what is carried forward (which every run
# that depends on it checks) make no other run. The last four are of the environment, which `check_drift` looks at.
FREE = (
    *("budget", "offline", "model", "data", "best_lr", "best_rank", "best_context"),
    *("device", "dtype", "compute_dtype", "compile"),
)


def undivided(out: Path) -> None:
    """Raise ValueError if the folder's grid is dealt to shards that are not merged: a whole run would do their work."""
    plan = out / "shards" / "plan.json"
    if plan.is_file() and not (held := files.read_json(plan))["merged"]:
        raise ValueError(
            f"{plan}: the grid is dealt to {held['shards']} shards: expected grid with --shard, and --merge at the end"
        )


def begin(task: Task, out: Path) -> None:
    """Write what the run is made with and by which rules, or check that an earlier start wrote the same.

    Raises:
        ValueError: the folder holds a run of other settings, model or data.
    """
    now, settings = manifest(task), task.settings
    path, config = out / "manifest.json", out / "config.toml"
    if path.exists():  # written last
        was, before = files.read_json(path), Settings.from_toml(config)
        if not isinstance(was, dict):
            raise ValueError(f"{path}: is a {type(was).__name__}: expected a manifest as a run writes it")
        for name in Settings.__dataclass_fields__:
            old, new = getattr(before, name), getattr(settings, name)
            if old != new and name not in FREE:
                raise ValueError(
                    f"{config}: {name} is {old!r}, now {new!r}: expected the settings the run began with, "
                    "or another --out"
                )
        for name in ("model_sha256", "config_sha256", "tokenizer_sha256", "data_sha256"):
            if was.get(name) != now[name]:
                raise ValueError(
                    f"{path}: {name} is {_differing(was.get(name), now[name])}: expected the same files, or another "
                    "--out"
                )
        return
    if settings.protocol:
        files.write_text(out / "protocol.toml", protocols.load(settings.protocol).text)
    files.write_text(config, settings.to_toml())
    files.write_json(path, now)


def check_drift(settings: Settings, out: Path, allowed: bool) -> None:
    """Look whether the work in a folder continues in the environment in which it stopped; else add it to the manifest.

    There `environment` is that of the beginning, and `drift` lists every change since: what, was, now, begun.

    Raises:
        ValueError: the environment is another one, and that is not `allowed`.
    """
    path, now = out / "manifest.json", environment(settings)
    written = files.read_json(path)
    try:
        drift = list(written.get("drift", []))
        was = written.get("environment", {}) | {change["what"]: change["now"] for change in drift}
    except (AttributeError, TypeError, KeyError):
        raise ValueError(f"{path}: has no environment and drift: expected a manifest as a run writes it") from None
    changed = [name for name in now | was if was.get(name) != now.get(name)]
    if changed and not allowed:
        said = ", ".join(f"{name} was {was.get(name, 'not recorded')!s:.70}, is {now.get(name)}" for name in changed)
        raise ValueError(
            f"{path}: {said}: expected the same, or --allow-drift, which continues with bits that may differ"
        )
    if changed:
        drift += [{"what": name, "was": was.get(name), "now": now.get(name), "begun": _time()} for name in changed]
        files.write_json(path, written | {"drift": drift})


def _differing(was: Any, now: Any) -> str:
    """The first digest that was recorded and is another now, of one file or of several by name."""
    if not isinstance(was, dict) or not isinstance(now, dict):
        return f"{was!r:.70}, now {now!r:.70}"
    name = next(name for name in sorted({*was, *now}) if was.get(name) != now.get(name))
    return f"{was.get(name)!r:.70} of {name!r:.80}, now {now.get(name)!r:.70}"


def model_digest(path: Path) -> str:
    """SHA-256 of a model's file; in the hub's cache, where a blob's name is its digest, it must be that one.

    The hub takes git's digest for a small file (40 digits) and SHA-256 for a large one.

    Raises:
        ValueError: the file was altered since it was fetched, or cannot be read.
    """
    digest, name = files.file_digest(path), path.resolve().name if path.is_symlink() else ""
    if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", name):
        return digest
    of_git = b"blob %d\0" % path.stat().st_size + path.read_bytes()
    if (found := digest if len(name) == 64 else hashlib.sha1(of_git).hexdigest()) != name:
        raise ValueError(
            f"{path}: its digest is {found}, the hub's {name}: expected it as it was fetched; delete it and its blob"
            f"{how_to_fetch(path, again=True)}"
        )
    return digest


def environment(settings: Settings) -> dict[str, Any]:
    """What the bits of a run depend on besides its settings and files."""
    on_cpu = settings.device == "cpu"
    return {
        "torch": torch.__version__,
        "device": "cpu" if on_cpu else torch.cuda.get_device_name(settings.device),
        "dtype": settings.dtype,
        "compute_dtype": str(settings.computed_in).removeprefix("torch."),
        "compiled": settings.compile,
        "threads": torch.get_num_threads(),  # of each process
        "processes": parallel.world(),
        "machine": platform.machine(),
        "processor": processor(),
        "bfloat16_kernel": on_cpu and fast.enabled() and product.available(),
    } | ({} if fast.enabled() else {"plain": True})


def processor() -> str:
    """The model of the CPU; a product may run other instructions on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def _time() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def manifest(task: Task) -> dict[str, Any]:
    """What the run was made with: versions, digests, the environment."""
    settings = task.settings
    folder = resolve(settings.model, settings.revision or None, settings.offline)
    return {
        "label": settings.label,
        "model": settings.model,
        "model_folder": folder.name,
        "model_sha256": {path.name: model_digest(path) for path in weight_files(folder)},
        "model_config": QwenConfig.from_file(folder / "config.json").to_dict(),
        "config_sha256": model_digest(folder / "config.json"),
        "tokenizer_sha256": model_digest(folder / "tokenizer.json"),
        "data": str(task.dataset.path),
        "data_source": task.dataset.source,
        "data_sha256": task.dataset.digest,
        "alpha_rule": task.alpha_rule,
        "train_systems": len(task.split.train),
        "validation_systems": task.validation_systems.tolist(),
        "test_systems": task.split.test.tolist(),
        "environment": environment(settings),
        "python": sys.version.split()[0],
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "begun": _time(),
    }
