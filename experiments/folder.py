"""A run's folder: one process at a time, one set of settings, and a manifest of what it was made with."""

import os
import platform
import sys
import time
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import torch

from experiments import files, protocols
from experiments.settings import Settings
from experiments.task import Task
from qwen_min.load import resolve, weight_files

PACKAGES = ("torch", "safetensors", "tokenizers", "numpy", "h5py", "scipy", "huggingface-hub")

# A larger budget, the same files under another name, or another choice of what is carried forward (which every run
# that depends on it checks) make no other run.
FREE = ("budget", "offline", "model", "data", "best_lr", "best_rank", "best_context")


@contextmanager
def claimed(out: Path, wait: float = 0.0):
    """Hold a run's folder for this process; a second one is refused, after `wait` seconds, by the name of the first."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file: expected a folder for the run")
    out.mkdir(parents=True, exist_ok=True)
    owner = out / ".owner"
    lock = filelock.FileLock(out / ".lock")
    try:
        lock.acquire(timeout=wait)
    except NotImplementedError:
        raise OSError(f"{out}: its file system has no locks (flock): expected one that keeps two runs apart") from None
    except filelock.Timeout:
        who = owner.read_text().strip() if owner.is_file() else "another process"
        raise ValueError(f"{out}: {who} is at work in it: expected a folder of its own") from None
    try:
        owner.write_text(f"process {os.getpid()} on {platform.node()}\n")
        yield
    finally:
        lock.release()


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
    if path.is_file() and config.is_file():
        was, before = files.read_json(path), Settings.from_toml(config)
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
                    f"{path}: {name} differs from what is there now: expected the same files, or another --out"
                )
        return
    if settings.protocol:
        files.write_text(out / "protocol.toml", protocols.load(settings.protocol).text)
    files.write_text(config, settings.to_toml())
    files.write_json(path, now)


def manifest(task: Task) -> dict[str, Any]:
    """What the run was made with: versions, digests, device, threads."""
    settings = task.settings
    folder = resolve(settings.model, settings.revision or None, settings.offline)
    return {
        "label": settings.label,
        "model": settings.model,
        "model_folder": folder.name,
        "model_sha256": {path.name: files.file_digest(path) for path in weight_files(folder)},
        "config_sha256": files.file_digest(folder / "config.json"),
        "tokenizer_sha256": files.file_digest(folder / "tokenizer.json"),
        "data": str(task.dataset.path),
        "data_source": task.dataset.source,
        "data_sha256": task.dataset.digest,
        "alpha_rule": task.alpha_rule,
        "train_systems": len(task.split.train),
        "validation_systems": task.validation_systems.tolist(),
        "test_systems": task.split.test.tolist(),
        "device": settings.device,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "python": sys.version.split()[0],
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "begun": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
