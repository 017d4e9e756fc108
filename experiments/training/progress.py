"""How far a run is: a bar on a terminal, plain lines elsewhere; always on stderr, so stdout stays the result's."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.run_folder.status import duration, status

SECONDS_BETWEEN_LINES = 10


Counted = Callable[[int, int], None]  # takes how many steps are done, and of how many


def counting(progress: Callable[[dict[str, Any]], None], cell: str, doing: str) -> Counted:
    """What tells `progress` of a cell how far something else than its training is, such as "forecasts"."""
    return lambda done, of: progress({"cell": cell, "doing": doing, "step": done, "steps": of})


class Report:
    """Called with a record after each step (see `train.run_cell`); shows loss, tokens/s and FLOPs so far.

    A record of `counting` has none of these.

    Args:
        batch_size: windows of a training step, for the rate.
        label: what stands before every line, "toy: the pocket model" or nothing.
        out: the run's folder, whose status says how many runs are done and how much time is left.
    """

    def __init__(self, batch_size: int, label: str = "", out: Path | None = None):
        self.batch_size, self.label, self.out = batch_size, label, out
        self.in_all: dict[str, str] = {}
        self.asked = 0.0
        self.name, self.bar = "", None
        self.first, self.began, self.shown = 0, 0.0, 0.0
        self.loss: float | None = None
        self.validation: float | None = None

    def __call__(self, record: dict[str, Any]) -> None:
        name = " ".join(filter(None, (record["cell"], record.get("doing"))))
        if name != self.name:
            self._begin(name, record)
        self.loss = record.get("loss", self.loss)
        self.validation = record.get("validation_loss", self.validation)
        losses = {"loss": self.loss, "val": self.validation}
        numbers = {key: f"{value:.4f}" for key, value in losses.items() if value is not None}
        if "training" in record:
            if (steps := record["step"] - self.first) > 0:
                seconds = max(1e-9, time.monotonic() - self.began)
                numbers["tokens/s"] = f"{steps * self.batch_size * record['context'] / seconds:,.0f}"
            # format, not :g: a total is read as an order of magnitude here and stands exactly in result.json
            numbers["FLOPs"] = f"{record['training'] + record['validation']:.3e}"
        numbers |= self._in_all()
        if self.bar is not None:
            self.bar.set_postfix(numbers, refresh=False)
            self.bar.update(record["step"] - self.bar.n)
            if numbers or record["step"] == record["steps"]:  # tokens of a forecast come by the hundred in a second
                self.bar.refresh()
        elif "validation_loss" in record or time.monotonic() - self.shown > SECONDS_BETWEEN_LINES:
            self.shown = time.monotonic()
            text = "  ".join(f"{name} {value}" for name, value in numbers.items())
            print(f"{name}: step {record['step']}/{record['steps']}  {text}".rstrip(), file=sys.stderr, flush=True)

    def _in_all(self) -> dict[str, str]:
        """Runs done of all that were asked for, and the time left for them, looked up now and then."""
        if self.out and time.monotonic() - self.asked > SECONDS_BETWEEN_LINES:
            self.asked = time.monotonic()
            with suppress(ValueError):  # a damaged record is for the run to refuse
                found = status(self.out)
                self.in_all = {"runs done": f"{found.totals()['done']} of {len(found.runs)}"}
                if found.seconds_left is not None:
                    self.in_all["left in all"] = duration(found.seconds_left)
        return self.in_all

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _begin(self, name: str, record: dict[str, Any]) -> None:
        self.close()
        if self.label and not self.name:
            print(f"[{self.label}]", file=sys.stderr)
        self.name, self.began, self.first = name, time.monotonic(), record["step"]
        self.shown = self.began if "doing" in record else 0.0
        self.loss = self.validation = None
        if sys.stderr.isatty():
            unit = "it" if "doing" in record else "step"
            self.bar = tqdm(total=record["steps"], desc=name, unit=unit, initial=record["step"])
