"""The folder of one run: the one place that spells its files, and tells how far the run is."""

from collections.abc import Mapping, Sequence
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
        files.check(path, self.held, {})

    @property
    def flops(self) -> dict[str, int]:
        """By ledger stage; empty if there is no file."""
        if not self.there:
            return {}
        files.check(self.path, self.held, {"flops": dict})
        files.check(f"{self.path}: flops", self.held["flops"], dict.fromkeys(self.held["flops"], int))
        return self.held["flops"]


class RunFolder:
    """metrics.jsonl  clock.jsonl  gradients.jsonl  result.json  failure.json  adapter/  checkpoint/  evaluation/"""

    def __init__(self, path: Path):
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.clock = path / "clock.jsonl"
        self.gradients = path / "gradients.jsonl"
        self.result = path / "result.json"
        self.failure = path / FAILURE
        self.adapter = path / "adapter"
        self.checkpoint = path / "checkpoint"
        self.evaluation = path / "evaluation"

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
