"""What tests that run a verb share: damped waves of predator and prey, and what a run left."""

from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from experiments import plots, run

CLOCK = "clock.jsonl"
"""Of what a run leaves the one record that is no part of "the same bytes": how many seconds its work took."""
FIGURES = ("loss_curves", "heat_map", "search")


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


def refused(capsys, *argv: str) -> str:
    """Run a command that must be refused; returns its one line of error, with nothing written in the current folder."""
    before = stamps()
    capsys.readouterr()
    assert run.main([*argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "expected" in printed.err, printed
    assert stamps() == before, "something was written"
    return printed.err


def stamps() -> dict[Path, int]:
    """When each file in the current folder was last written."""
    return {p: p.lstat().st_mtime_ns for p in Path().rglob("*") if not p.is_dir() and p.name != ".lock"}
