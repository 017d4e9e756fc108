"""How far a run is: a bar on a terminal, plain lines elsewhere; always on stderr, so stdout stays the result's."""

import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10


class Report:
    """Called with a record after each step (see `train.run_cell`); shows loss, tokens/s and FLOPs so far.

    Args:
        batch_size: windows of a training step, for the rate.
        label: what stands before every line, "toy: the pocket model" or nothing.
    """

    def __init__(self, batch_size: int, label: str = ""):
        self.batch_size, self.label = batch_size, label
        self.cell, self.bar = "", None
        self.first, self.began, self.shown = 0, 0.0, 0.0
        self.loss, self.validation = float("nan"), float("nan")

    def __call__(self, record: dict[str, Any]) -> None:
        if record["cell"] != self.cell:
            self._begin(record)
        self.loss = record.get("loss", self.loss)
        self.validation = record.get("validation_loss", self.validation)
        rate = (
            (record["step"] - self.first)
            * self.batch_size
            * record["context"]
            / max(1e-9, time.monotonic() - self.began)
        )
        # format, not :g: a total is read as an order of magnitude here and stands exactly in result.json
        numbers = {
            "loss": f"{self.loss:.4f}",
            "val": f"{self.validation:.4f}",
            "tokens/s": f"{rate:,.0f}",
            "FLOPs": f"{record['training'] + record['validation']:.3e}",
        }
        if self.bar is not None:
            self.bar.set_postfix(numbers, refresh=False)
            self.bar.update(record["step"] - self.bar.n)
            self.bar.refresh()
        elif "validation_loss" in record or time.monotonic() - self.shown > SECONDS_BETWEEN_LINES:
            self.shown = time.monotonic()
            text = "  ".join(f"{name} {value}" for name, value in numbers.items())
            print(f"{self.cell}: step {record['step']}/{record['steps']}  {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _begin(self, record: dict[str, Any]) -> None:
        self.close()
        if self.label and not self.cell:
            print(f"[{self.label}; every figure is a toy's]", file=sys.stderr)
        self.cell, self.began, self.shown = record["cell"], time.monotonic(), 0.0
        self.first = record["step"]
        self.loss = self.validation = float("nan")
        if sys.stderr.isatty():
            self.bar = tqdm(total=record["steps"], desc=self.cell, unit="step", initial=record["step"])
