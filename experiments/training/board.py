"""A run's curves and pictures for TensorBoard, in OUT/tensorboard: a view of its records, which stay what they are."""

import shutil
from collections.abc import Mapping
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.run_folder import files
from experiments.run_folder.folder import RunFolder
from experiments.training.progress import Report

FOLDER = "tensorboard"
TAGS = {
    "loss": {"loss": "loss/training", "gradient_norm": "gradient_norm", "training": "FLOPs/training"},
    "validation_loss": {
        "validation_loss": "loss/validation",
        "horizon_mse": "forecasts/horizon_mse",
        "validation": "FLOPs/validation",
    },
}
"""What is shown of a line of metrics.jsonl that has a loss, or a validation loss, and where."""


def check() -> None:
    """Raise ValueError where TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise ValueError("tensorboard is not installed: expected it, by pip install -e '.[tensorboard]'")


class Board:
    """Passes each record of a run's progress on, and adds it to the curves of its cell.

    A cell's file is begun anew from its metrics.jsonl whenever its turn comes, so that a step stands in it once,
    however often the run was stopped.
    """

    def __init__(self, shown: Report, out: Path):
        self.shown, self.out = shown, out
        self.folder: Path | None = None
        self.writer: Any = None

    def __call__(self, record: dict[str, Any]) -> None:
        self.shown(record)
        if (folder := record.get("folder")) is None:
            return
        if folder == self.folder:
            _add(self.writer, record)
        else:
            self._end()
            self.folder, self.writer = folder, _begun(self.out, RunFolder(folder))
        if "validation_loss" in record:  # the last line of a cell is one
            self.writer.flush()

    def close(self) -> None:
        self._end()
        self.shown.close()

    def _end(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.folder = self.writer = None


def finish(out: Path) -> None:
    """Add the cells that were finished before they could be shown, and the figures as pictures."""
    for metrics in sorted(out.rglob(RunFolder(out).metrics.name)):
        folder = RunFolder(metrics.parent)
        if folder.finished and not _place(out, folder).exists():
            _begun(out, folder).close()
    with closing(_writer(out / FOLDER / "figures")) as writer:
        for path in sorted((out / "figures").glob("*.png")):
            with Image.open(path) as picture:
                writer.add_image(f"figures/{path.stem}", np.asarray(picture.convert("RGB")), dataformats="HWC")


def _place(out: Path, folder: RunFolder) -> Path:
    return out / FOLDER / folder.path.relative_to(out)


def _begun(out: Path, folder: RunFolder) -> Any:
    """A writer of a cell's curves, which has written what its records hold."""
    writer = _writer(_place(out, folder))
    for line in files.read_jsonl(folder.metrics):
        _add(writer, line)
    return writer


def _writer(place: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    with files.writing(place):
        shutil.rmtree(place, ignore_errors=True)
        return SummaryWriter(place)


def _add(writer: Any, line: Mapping[str, Any]) -> None:
    for kind in TAGS.keys() & line.keys():
        for name in TAGS[kind].keys() & line.keys():
            writer.add_scalar(TAGS[kind][name], line[name], line["step"])
