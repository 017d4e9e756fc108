"""What a run's folder holds: its runs by stage, what each was evaluated to, and where all of that is recorded."""

import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.report.evaluation import MODEL, Evaluation
from experiments.report.records import Fields, Records, Row
from experiments.run_folder.cells import by_cell, losses, lowest
from experiments.run_folder.command import program

CONTROLS = {"scratch": "same model from random weights", "small": "small model from random weights"}
STAGES = ("baseline", "default", "grid", "context", "final", *CONTROLS)
TITLES = {"baseline": "untrained model", "default": "default run", "final": "final run"} | CONTROLS
"""The runs that are evaluated in full, by stage."""
PARTS = ("training", "validation", "inference")


@dataclass(frozen=True)
class Run:
    """A finished run as a run of a stage: its row of results.csv."""

    stage: str
    row: Row

    @property
    def title(self) -> str:
        return TITLES.get(self.stage, self.row["name"] if self.stage == "grid" else f"context {self.row['context']}")

    @property
    def folder(self) -> str:
        return self.row["folder"]


class Study:
    """A run's folder: of a study, or of a grid alone."""

    def __init__(self, root: Path):
        self.root = root
        self.records = records = Records(root)
        self.settings = records.toml("config.toml")
        self.manifest = records.json("manifest.json")
        self.protocol = records.toml("protocol.toml") if records.has("protocol.toml") else {}
        self.plan = records.json("study.json") if records.has("study.json") else None
        self.label = self.manifest.text("label") if "label" in self.manifest.values else ""
        self.runs = self._runs()
        self._evaluations: dict[str, Evaluation | None] = {}

    @property
    def title(self) -> str:
        return str(self.protocol.get("title", "A grid of learning rates and ranks"))

    @property
    def budget(self) -> int:
        return (self.plan or Fields(str(self.root / "config.toml"), self.settings)).count("budget")

    @property
    def rungs(self) -> list[int]:
        """Of a search: the steps after which cells were left out."""
        return (
            Fields(str(self.root / "config.toml"), self.settings).counts("rungs") if self.settings.get("rungs") else []
        )

    @property
    def claimed(self) -> dict[str, Any]:
        """What the report printed, from protocol.toml."""
        found = self.protocol.get("claimed", {})
        if not isinstance(found, dict):
            raise ValueError(f"{self.root / 'protocol.toml'}: claimed is no table: expected [claimed.grid] and others")
        return found

    @property
    def commands(self) -> dict[str, str]:
        """The command of each stage, as the manifest has it or from the folder's own settings, and of this page."""
        start, run = program(), shlex.quote(str(self.root))
        verbs = {stage: stage if self.settings.get("protocol") else "grid" for stage in (*STAGES, "study")}
        verbs |= dict.fromkeys(CONTROLS, "study --controls")
        found = {stage: f"{start} {verb} --config {run}/config.toml --out {run}" for stage, verb in verbs.items()}
        if "commands" in self.manifest.values:
            found |= {name: str(line) for name, line in self.manifest.fields("commands").values.items()}
        return found | {"report": f"{start} report {run}"}

    def of(self, stage: str) -> list[Run]:
        return [run for run in self.runs if run.stage == stage]

    def each(self, *stages: str) -> list[Run]:
        """The runs of some stages, one that two of them share once."""
        found: dict[str, Run] = {}
        for run in (run for stage in stages for run in self.of(stage)):
            found.setdefault(run.folder, run)
        return list(found.values())

    def main(self) -> list[tuple[Run, Evaluation]]:
        """The runs that are judged in full: untrained, default, final; the best cell where no other trained run is."""
        runs = [run for stage in TITLES for run in self.of(stage)]
        judged = [(run, found) for run in runs if (found := self.evaluation(run))]
        if self.best and all(run.stage == "baseline" for run, _ in judged) and (found := self.evaluation(self.best)):
            judged.append((self.best, found))
        return judged

    @property
    def answer(self) -> tuple[Run, Evaluation] | None:
        """The run that the page is about: of those that are judged in full the final one, or what comes nearest."""
        judged = {run.stage: (run, found) for run, found in self.main()}
        return next((judged[stage] for stage in ("final", "default", "grid", "baseline") if stage in judged), None)

    def untrained_beside(self, evaluation: Evaluation, part: str) -> Evaluation | None:
        """The untrained model's evaluation, where it forecast the same series of a part, and is of another model."""
        for run, untrained in self.main():
            if run.stage == "baseline" and untrained is not evaluation and part in untrained.parts:
                same = untrained.about.counts(f"parts.{part}") == evaluation.about.counts(f"parts.{part}")
                return untrained if same else None
        return None

    def untrained_mse(self, evaluation: Evaluation, part: str) -> float | None:
        """The untrained model's MSE on the series of a part, as far as there is one beside."""
        untrained = self.untrained_beside(evaluation, part)
        return untrained.mse(part).get(MODEL) if untrained else None

    @property
    def best(self) -> Run | None:
        """The cell that the study took on, or the one of the lowest validation loss."""
        cells = self.of("grid")
        if self.plan and self.plan.values.get("best"):
            return next((run for run in cells if run.row["name"] == self.plan.text("best.cell")), None)
        ended = [run for run in cells if run.folder.startswith("cells/")]  # a search has others, left out on the way
        row = lowest([run.row for run in ended or cells]) if cells else None
        return next((run for run in cells if run.row is row), None)

    def losses(self, run: Run) -> list[float]:
        """The validation loss of a run, or of a cell of the grid one for each seed."""
        every = by_cell(one.row for one in self.of("grid")) if run.stage == "grid" else {}
        return losses(every.get(run.row["name"], [run.row]))

    @property
    def seeds(self) -> int:
        """How many seeds each cell of the grid was trained with."""
        return max((len(some) for some in by_cell(run.row for run in self.of("grid")).values()), default=1)

    @property
    def alone(self) -> Run | None:
        """The one run that was trained here, as by `train`: no grid, and no stage of a study."""
        trained = {run.folder: run for run in self.runs if run.row["rank"]}
        first = next(iter(trained.values()), None)
        if not first or len(trained) > 1 or not first.folder.startswith("cells/"):
            return None
        judged = self.plan and self.untrained and self.evaluation(self.untrained)  # by a study's first stage
        return None if judged else first

    @property
    def best_cell(self) -> tuple[Run, Evaluation] | None:
        """The grid's best cell where its forecasts are judged too, and it is none of `main`."""
        if not self.best or self.best.folder in {run.folder for run, _ in self.main()}:
            return None
        found = self.evaluation(self.best)
        return (self.best, found) if found else None

    @property
    def untrained(self) -> Run | None:
        return next(iter(self.of("baseline")), None)

    def evaluation(self, run: Run) -> Evaluation | None:
        if run.folder not in self._evaluations:
            there = self.records.has(f"{run.folder}/evaluation/evaluation.json")
            self._evaluations[run.folder] = Evaluation(self.records, run.folder) if there else None
        return self._evaluations[run.folder]

    @cached_property
    def flops(self) -> list[Row]:
        """The rows of flops.csv; for a grid alone, the same from results.csv, without a prediction."""
        if self.records.has("flops.csv"):
            counts = {"flops": "count", "predicted": "count or nothing", "share_of_budget": "number"}
            return self.records.csv("flops.csv", stage="text", part="text", **counts)
        found: list[Row] = []
        for stage in [stage for stage in STAGES if self.of(stage)]:
            for part in ("training", "validation"):
                flops = sum(run.row[f"{part}_flops"] for run in self.of(stage) if run.row["stage"] == stage)
                found.append({"stage": stage, "part": part, "flops": flops, "predicted": None})
        total = {part: sum(r["flops"] for r in found if r["part"] == part) for part in ("training", "validation")}
        total["total"] = sum(total.values())
        found += [{"stage": "all", "part": part, "flops": n, "predicted": None} for part, n in total.items()]
        return [row | {"share_of_budget": row["flops"] / self.budget} for row in found]

    @property
    def flops_file(self) -> str:
        return "flops.csv" if self.records.has("flops.csv") else "results.csv"

    def _runs(self) -> list[Run]:
        if self.plan and not self.records.has("results.csv"):
            return []  # nothing has run yet
        columns = {"lr": "number", "rank": "count", "steps": "count", "training_flops": "count"}
        columns |= {"validation_flops": "count", "validation_loss": "number", "best_validation_loss": "number"}
        columns |= {"best_step": "count", "last_losses_mean": "number or nothing", "context": "count or nothing?"}
        columns |= {"validation_loss_with_padding": "number or nothing?"}
        columns |= dict.fromkeys(("name", "cell", "stage", "folder"), "text?")
        columns |= {f"loss_at_{rung}": "number or nothing?" for rung in self.rungs}
        rows = {}
        for row in self.records.csv("results.csv", **columns):
            name = row["name"] or row["cell"]
            row["stage"] = row["stage"] or ("grid" if row["rank"] else "baseline")
            if not name or row["stage"] not in STAGES:
                raise ValueError(
                    f"{self.root / 'results.csv'}: a run named {name!r} of stage {row['stage']!r}: "
                    f"expected a name, and a stage of {', '.join(STAGES)}"
                )
            row["name"], row["folder"] = name, row["folder"] or (f"cells/{name}" if row["rank"] else name)
            row["context"] = row["context"] or self.settings.get("context")
            rows[row["folder"]] = row
        stages = [(row["stage"], folder) for folder, row in rows.items()]
        if self.plan:  # a run that two stages share has one row, and is of both
            stages = [(one.text("stage"), one.text("folder")) for one in self.plan.objects("stages")]
            if unknown := next((stage for stage, _ in stages if stage not in STAGES), None):
                raise ValueError(
                    f"{self.root / 'study.json'}: a stage is {unknown!r:.60}: expected one of {', '.join(STAGES)}"
                )
        return [Run(stage, rows[folder]) for stage, folder in dict.fromkeys(stages) if folder in rows]
