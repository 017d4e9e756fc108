"""What tests that run a verb share: damped waves of predator and prey, a tiny model, and what a run left."""

import os
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from experiments import plots, run
from experiments.accounting.ledger import Ledger
from experiments.parity import defects
from experiments.run_folder import files
from experiments.settings.record import POCKET
from experiments.training import cell
from qwen_min import Qwen, QwenConfig

CLOCK = "clock.jsonl"
"""Of what a run leaves the one record that is no part of "the same bytes": how many seconds its work took."""
FIGURES = ("loss_curves", "heat_map", "search")
INPUTS = ["--data", "waves.h5", "--model", "model"]
"""The flags for what `inputs` writes into the current folder."""


def damped_waves(path: Path, points: int, variables: int = 2) -> Path:
    """Write twenty damped waves about 2, two units of time a point or a little more, to an HDF5 file; return its path.

    The bytes are the same whenever it is written: a run records their digest.
    """
    times, draw = np.linspace(0, 2 * points, points), np.random.RandomState(0)
    phases = draw.uniform(0, 6, (20, 1, variables))
    series = 2 + np.exp(-times / 60)[:, None] * np.sin(times[:, None] / 3 + phases)
    with h5py.File(path, "w") as file:
        file.create_dataset("trajectories", data=series.astype(np.float32), track_times=False)
        file.create_dataset("time", data=times, track_times=False)
    return path


def tiny_model(folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """Write two narrow layers of random weights, with the pocket model's tokenizer, to a folder; return it.

    What a run does with a model takes a fraction of the pocket model's time."""
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6}
    pocket = QwenConfig.from_file(POCKET / "config.json")
    model = Qwen(replace(pocket, **sizes, tie_word_embeddings=False))
    defects.randomise(model, seed)
    shutil.copytree(POCKET, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    save_file({name: t.to(dtype) for name, t in model.state_dict().items()}, folder / "model.safetensors")
    files.write_json(folder / "config.json", files.read_json(POCKET / "config.json") | asdict(model.config))
    return folder


def inputs(points: int, folder: Path = Path(), variables: int = 2) -> Path:  # noqa: B008 (not changed)
    """Write damped waves, waves.h5, and a tiny model, model/, to a folder; return it."""
    tiny_model(folder / "model")
    return damped_waves(folder / "waves.h5", points, variables).parent


def dot(path: Path) -> None:
    """Write a picture of one dot, as `plots.base.save` writes one: an SVG with a PNG beside it, or a PNG."""
    Image.new("L", (1, 1)).save(path.with_suffix(".png"))
    if path.suffix == ".svg":
        path.write_text('<svg viewBox="0 0 1 1"></svg>')


def no_figures(patch) -> None:
    """Leave out the grid's figures, which would take longer than its training; those of its page are a dot."""
    for name in FIGURES:
        patch.setattr(plots, name, lambda *_, path=None, **__: path and dot(path))


def contents(out: Path | str, *without: str) -> dict[str, bytes]:
    """Every file of a run but what says when, how often and by whom it was started, and what is `without` too."""
    names = (".owner", ".lock", "manifest.json", CLOCK, *without)
    found = {p.relative_to(out): p for p in sorted(Path(out).rglob("*")) if p.is_file() and p.name not in names}
    return {str(name): path.read_bytes() for name, path in found.items() if name.parts[0] != "shards"}


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the run's own is done after it."""


def stopped_after_each_step(monkeypatch, argv: list[str]) -> int:
    """Run a command until it has ended, stopped by Ctrl-C after each of its steps; returns how often it was stopped."""
    true = cell._State.train

    def train(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return true(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cell._State, "train", train)
        codes = [run.main(argv)]
        while codes[-1] == 130 and len(codes) < 40:
            codes.append(run.main(argv))
    assert codes[-1] == 0
    return len(codes) - 1


def entries(ledger: Path | str = "ledger.sqlite") -> list[dict]:
    """The ledger's, without their numbers."""
    with Ledger(ledger) as held:
        return [{key: value for key, value in row.items() if key != "id"} for row in held.entries()]


def refused(capsys, *argv: str) -> str:
    """Run a command that must be refused; returns its one line of error, with nothing written in the current folder."""
    before, rule = stamps(), "expected"
    capsys.readouterr()
    try:
        code = run.main([*argv])
    except SystemExit as e:  # of argparse, whose lines have a form of their own
        code, rule = e.code, ""
    printed = capsys.readouterr()
    assert code == 2 and printed.out == "" and printed.err.count("\n") == 1 and rule in printed.err, printed
    assert stamps() == before, "something was written"
    return printed.err


def stamps() -> dict[Path, int]:
    """When each file in the current folder was last written."""
    return {p: p.lstat().st_mtime_ns for p in Path().rglob("*") if not p.is_dir() and p.name != ".lock"}
