"""The memory that a phase of `accounting.memory` takes, in a fresh process: the most resident, less libraries."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from experiments.accounting.memory import PHASES, at_once
from experiments.bench.sides import peak_bytes
from lora import add_lora
from qwen_min import Qwen, QwenConfig
from qwen_min.cache import KVCache

STEPS = 2


def measured(phase: str, folder: str, **job: Any) -> int:
    """Bytes of a phase with the weights of `folder`, `job` as in `accounting.memory.predict`, types by their names.

    A training step runs as many sequences at once as `at_once` says. ValueError with what the process said if it fails.
    """
    command = [
        sys.executable,
        "-m",
        "experiments.bench.resident",
        json.dumps(job | {"phase": phase, "folder": str(Path(folder).resolve())}),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise ValueError(f"{phase} could not be measured ({said[:300]}): expected weights that fit in memory")
    return int(done.stdout)


def run(job: dict[str, Any]) -> int:
    """Do a job in this process, after the same with a model of no size, which loads what the libraries load late."""
    kind, compute = (getattr(torch, job[name]) for name in ("weight", "activation"))
    _do(Qwen(QwenConfig(64, 16, 16, 1, 2, 1, 1e4, 1e-6, 64, True)), job | {"batch": 1, "tokens": 8, "cached": 8})
    _forget()
    base = peak_bytes()
    model = Qwen.from_pretrained(Path(job["folder"]), kind, offline=True, compute_dtype=compute)
    _forget()
    _do(model, job)
    return peak_bytes() - base


def _forget() -> None:
    """Begin anew with the most resident: what reading the files took is not counted. Linux alone can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _do(model: Qwen, job: dict[str, Any]) -> None:
    if job["rank"]:
        add_lora(model, job["rank"], targets=job["targets"])
    ids = torch.zeros(job["batch"], 1 if job["phase"] == PHASES[2] else job["tokens"], dtype=torch.int64)
    if job["phase"] == PHASES[0]:
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        for _ in range(STEPS):
            optimizer.zero_grad()
            for rows in ids.split(at_once(model.config, *ids.shape)):
                total, count = model.loss(rows, rows)
                (total / count).backward()
            optimizer.step()
        return
    cache = None
    if job["phase"] == PHASES[2]:
        cache = KVCache(model.config, len(ids), job["cached"] + 1, model.compute_dtype)
        cache.store.zero_()
        cache.advance(job["cached"])
    with torch.no_grad():
        model(ids, cache)


if __name__ == "__main__":
    print(run(json.loads(sys.argv[1])))
