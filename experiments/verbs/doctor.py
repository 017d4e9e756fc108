"""The `doctor` verb: what is installed, cached and reachable, and what to do about what is not."""

import re
import socket
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from data import lotka_volterra
from experiments.run_folder import files
from experiments.settings.record import Settings
from qwen_min import QwenConfig, Tokenizer
from qwen_min.fast import product
from qwen_min.load import resolve, weight_files

HUB = ("huggingface.co", 443)


def lines(settings: Settings) -> Iterator[str]:
    """One finding a line, "ok" or "--" first; a remedy follows what is not well."""
    yield f"ok  python {sys.version.split()[0]}, {torch.get_num_threads()} threads"
    yield from _packages("qwen_min")
    no_gpu = "--  no CUDA device: everything runs on the CPU; --device cpu is the default"
    yield f"ok  {torch.cuda.get_device_name()}" if torch.cuda.is_available() else no_gpu
    no_kernel = "--  no kernel for bfloat16 weights: generation is slower; a C++ compiler (c++) and a cache folder in "
    no_kernel += "a home in which nobody else may write would make it"
    yield "ok  the kernel for bfloat16 weights is compiled" if product.available() else no_kernel
    yield from _model(settings)
    yield from _data(settings)
    ledger = Path("ledger.sqlite")
    yield f"ok  ledger {ledger}: see 'budget'" if ledger.is_file() else f"--  no {ledger} yet: the first run makes it"
    if settings.offline:
        yield "--  the hub: not asked, offline"
        return
    try:
        socket.create_connection(HUB, timeout=3).close()
        yield f"ok  the hub ({HUB[0]}) is reachable"
    except OSError as e:
        yield (
            f"--  the hub ({HUB[0]}) is not reachable ({e.__class__.__name__}): models must be folders or cached; "
            "everything else works without it"
        )


def _packages(name: str, and_needed: bool = True) -> Iterator[str]:
    """A package, and those that it declares as needed."""
    try:
        yield f"ok  {name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        yield f"--  {name} is not installed: pip install -e ."
        return
    for needed in (metadata.requires(name) or ()) if and_needed else ():
        if "extra ==" not in needed:
            yield from _packages(re.split("[^A-Za-z0-9_-]", needed)[0], and_needed=False)


def _model(settings: Settings) -> Iterator[str]:
    try:
        folder = resolve(settings.model, settings.revision or None, offline=True)
        config = QwenConfig.from_file(folder / "config.json")
        Tokenizer(folder / "tokenizer.json")
        yield (
            f"ok  model {settings.model}: {config.num_hidden_layers} layers of {config.hidden_size}, "
            f"vocabulary {config.vocab_size}"
        )
        for path in weight_files(folder):
            yield f"ok  {path.name} sha256 {files.file_digest(path)}"
    except ValueError as e:
        # Looked for offline above, whether or not that was asked for: this verb fetches nothing.
        asked = "offline was asked for: expected the network or a cached copy;"
        yield f"--  model {str(e).replace(asked, 'doctor fetches nothing:')}"


def _data(settings: Settings) -> Iterator[str]:
    if not settings.data and not lotka_volterra.CACHE.is_file():
        yield "--  data set not rebuilt yet: 'data' or any run does it, in seconds"
        return
    try:
        dataset = lotka_volterra.load(Path(settings.data) if settings.data else None)
        yield f"ok  data {dataset.path} ({dataset.source}) sha256 {dataset.digest}"
    except (ValueError, OSError) as e:
        yield f"--  data {e}"
