"""The memory that a phase of `accounting.memory` takes, in a fresh process: the most resident, less libraries.

What is taken away is the most that interpreter, libraries and kernels had resident after the same phase of a small
model, before the weights are read.
"""

import json
import os
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

MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""With it glibc maps every larger block alone and gives it back at once, so that what is resident is what is alive. By
its own rules it keeps what was freed, in holes that often fit nothing else."""


def measured(phase: str, folder: str, *, holes: bool = False, **job: Any) -> int:
    """Bytes of a phase with the weights of `folder`, `job` as in `accounting.memory.predict`, types by their names.

    With `holes` what the allocator keeps between them counts too (see `MAPPED`). A training step runs as many sequences
    at once as `at_once` says. ValueError with what the process said if it fails.
    """
    asked = json.dumps(job | {"phase": phase, "folder": str(Path(folder).resolve())})
    command = [sys.executable, "-m", "experiments.bench.resident", asked]
    environment, root = os.environ | ({} if holes else MAPPED), Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise ValueError(f"{phase} could not be measured ({said[:300]}): expected weights that fit in memory")
    return int(done.stdout)


def run(job: dict[str, Any]) -> int:
    """Do a job in this process, after the same with a small model, which loads what the libraries load late."""
    kind, compute = (getattr(torch, job[name]) for name in ("weight", "activation"))
    small = Qwen(QwenConfig(1024, 64, 64, 1, 2, 1, 1e4, 1e-6, 128, True))  # its head is a product for oneDNN
    _do(small.to(kind), job | {"batch": 1, "tokens": 64, "cached": 64})
    del small
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
        for some in (ids[:1], ids):  # the first step makes Adam's moments
            optimizer.zero_grad()
            for rows in some.split(at_once(model.config, *ids.shape)):
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
