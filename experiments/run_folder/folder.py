"""The folder of one run: the one place that spells its files, and tells how far the run is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.run_folder import files
from experiments.run_folder.errors import FAILURE


class Record:
    """A JSON object in a file that may not be there. Raises ValueError with one line where it is something else."""

    def __init__(self, path: Path):
        self.path = path
        try:
            value = files.read_json(path)
        except ValueError:
            if path.exists():
                raise
            value = None  # asked for before it is opened, it could have gone meanwhile
        self.there, self.held = value is not None, {} if value is None else value
        if not isinstance(self.held, dict):
            raise ValueError(f"{path}: is a {type(value).__name__}: expected an object")

    @property
    def flops(self) -> dict[str, int]:
        """By ledger stage; empty if there is no file."""
        amounts = self.held.get("flops", None if self.there else {})
        if not isinstance(amounts, dict) or not all(type(n) is int for n in amounts.values()):
            raise ValueError(f"{self.path}: flops is {amounts!r}: expected whole numbers by stage")
        return amounts


@dataclass(frozen=True)
class RunFolder:
    """metrics.jsonl  gradients.jsonl  result.json  failure.json  adapter/  checkpoint/  evaluation/"""

    path: Path

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def gradients(self) -> Path:
        return self.path / "gradients.jsonl"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def failure(self) -> Path:
        return self.path / FAILURE

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def finished(self) -> bool:
        """Whether its training has ended."""
        return self.result.is_file()

    @property
    def evaluated(self) -> Record:
        return Record(self.evaluation / "evaluation.json")

    def judged(self, parts: Mapping[str, Sequence[int]]) -> bool:
        """Whether its evaluation covers these systems of each part."""
        held: Any = self.evaluated.held.get("parts", {})
        return all(held.get(part) == list(systems) for part, systems in parts.items())

    def kept(self) -> dict[str, int]:
        """FLOPs by ledger stage that its training continues from: those of its result or of its last checkpoint."""
        records = (Record(path) for path in (self.result, self.checkpoint / "state.json"))
        return next((record.flops for record in records if record.there), {})

    def spent(self) -> int:
        """All of them, and those of its forecasts."""
        return sum(self.kept().values()) + sum(self.evaluated.flops.values())
