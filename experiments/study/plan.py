"""What a study runs, and what it costs before it runs: the runs of every stage, each planned once.

Stages: the untrained baseline, a default run, the grid, a context sweep, a final run.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from experiments.accounting.ledger import STAGES as LEDGER_STAGES
from experiments.accounting.predict import predict
from experiments.forecasting import horizon
from experiments.forecasting.forecast import predicted as predicted_forecasts
from experiments.run_folder import files
from experiments.run_folder.cells import lowest
from experiments.run_folder.folder import RunFolder
from experiments.settings.over import variants
from experiments.settings.record import Settings
from experiments.task.model import shape_of
from experiments.task.task import Task
from experiments.training.cell import Cell, predicted
from qwen_min import QwenConfig, Tokenizer
from qwen_min.load import resolve

STAGES = ("baseline", "default", "grid", "context", "final")
CONTROLS = {"scratch": "same", "small": "small"}
"""Stages after them that only `--controls` runs: models from random weights, trained whole for no more FLOPs than the
final run; and what `Settings.scratch` is there."""
UNTRAINED = Cell(0.0, 0)
JUDGED = ("validation", "shown")


@dataclass(frozen=True)
class Run:
    """One folder of a study: a cell under settings of its own, and the parts that are forecast with it."""

    stage: str
    folder: str
    cell: Cell
    settings: Settings
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Planned:
    """A run with its task and its price, which are made once and handed down.

    task: under the run's own settings. training, forecasts: FLOPs by ledger stage, before anything runs.
    """

    run: Run
    task: Task
    training: dict[str, int]
    forecasts: dict[str, int]

    @property
    def flops(self) -> dict[str, int]:
        """Both, by ledger stage."""
        return {stage: self.training.get(stage, 0) + self.forecasts.get(stage, 0) for stage in LEDGER_STAGES}

    @property
    def parts(self) -> dict[str, list[int]]:
        """The systems of each part that are forecast with it."""
        return {part: self.task.forecast_systems(part) for part in self.run.parts}

    @property
    def row(self) -> dict[str, Any]:
        """What is planned, for the records."""
        run = self.run
        return {
            "stage": run.stage,
            "name": run.cell.name,
            "folder": run.folder,
            "lr": run.cell.lr,
            "rank": run.cell.rank,
            "context": run.settings.context,
            "steps": run.settings.steps if run.cell.rank else 0,
            "predicted": self.flops,
        }

    def within(self, out: Path) -> RunFolder:
        """Its folder in the study's."""
        return RunFolder(out / self.run.folder)

    def judged(self, out: Path) -> bool:
        """Whether a finished evaluation in its folder covers all that it forecasts."""
        return not self.run.parts or self.within(out).judged(self.parts)


class Plan:
    """The task of a study, the model's configuration, and its runs as they are planned; no weights are read."""

    def __init__(self, settings: Settings):
        folder = resolve(settings.model, settings.revision or None, settings.offline)
        self.config = QwenConfig.from_file(folder / "config.json")
        self.task = Task.prepare(settings, Tokenizer(folder / "tokenizer.json"))
        self.settings = settings
        self._planned: dict[Run, Planned] = {}

    def of(self, runs: Iterable[Run]) -> list[Planned]:
        """The runs with their prices.

        Raises:
            ValueError: the series are too short for the forecasts, or lack a system that is to be shown.
        """
        return [self._planned.get(run) or self._plan(run) for run in runs]

    def stage(self, stage: str, best: "Best | None" = None) -> list[Planned]:
        """Those of a stage: see `runs_of`; by default with the choice that costs most carried forward."""
        return self.of(runs_of(self.settings, stage, best or dearest(self.settings), self.task.symbols))

    def _plan(self, run: Run) -> Planned:
        task, config = self.task.under(run.settings), shape_of(run.settings, self.config)
        task.check_fits(config)
        forecasts = dict.fromkeys(LEDGER_STAGES, 0)
        if run.parts:
            systems = systems_of(task, run)
            try:
                task.check(systems)
            except ValueError as e:
                raise ValueError(f"{e}{'' if run.settings.protocol else ', or --no-forecast-cells'}") from None
            forecasts = predicted_forecasts(task, config, systems, **run.settings.trained(run.cell.rank))
        error = 0
        if run.cell.rank and run.settings.keep == "horizon":
            error = horizon.price(task, config, **run.settings.trained(run.cell.rank))
        self._planned[run] = Planned(run, task, predicted(task, run.cell, config, horizon=error), forecasts)
        return self._planned[run]


@dataclass(frozen=True)
class Best:
    """What is carried forward: the cell, and for the final run the context."""

    lr: float
    rank: int
    context: int | None
    overridden: bool


def cells_of(settings: Settings) -> dict[Cell, Settings]:
    """Every learning rate with every rank, rank by rank, and with every variant, less those that are left out; then the
    same with each further seed.

    Raises:
        ValueError: none is left, or `over` is wrong.
    """
    cells = {
        Cell(lr, rank, f"lr{lr:g}-r{rank}{end}" if end else ""): own
        for end, own in variants(settings)
        for rank in settings.ranks
        for lr in settings.learning_rates
    }
    left = {cell: own for cell, own in cells.items() if cell.name not in settings.skip}
    if not left:
        raise ValueError("skip leaves no cell of the grid: expected at least one")
    return left | {
        replace(cell, called=f"{cell.name}-seed{seed}"): own.updated({"seed": seed})
        for seed in range(settings.seed + 1, settings.seed + settings.seeds)
        for cell, own in left.items()
    }


def runs_of(settings: Settings, stage: str, best: Best | None = None, symbols: int = 0) -> list[Run]:
    """The runs of a stage, in order; `context` and those after it need to know what is carried forward.

    The controls take as many steps as the final run pays for, of a loss over so many `symbols`, see `update`.

    A run that would train what a cell of the grid trains is that cell: it is trained once, in the cell's folder.
    """
    if stage == "baseline":
        return [Run(stage, "untrained", UNTRAINED, settings, JUDGED)]
    judged = settings.forecast_cells and not settings.rungs  # a search goes by the loss alone
    alone = judged and not settings.protocol  # a protocol's study has a stage for its baseline
    some = JUDGED if alone else ("shown",) if judged else ()
    cells = {cell: Run("grid", f"cells/{cell.name}", cell, own, some) for cell, own in cells_of(settings).items()}
    if stage == "grid":
        return [Run("baseline", "untrained", UNTRAINED, settings, some if alone else ()), *cells.values()]

    def run(folder: str, lr: float, rank: int, called: str, parts: tuple[str, ...], **changes: int) -> Run:
        own, cell = settings.updated(changes), Cell(lr, rank)
        if own == settings and cell in cells:
            return Run(stage, cells[cell].folder, cell, own, parts)
        return Run(stage, folder, Cell(lr, rank, called), own, parts)

    if stage == "default":
        lr, rank = settings.default_rate, settings.default_rank
        return [run("default", lr, rank, "default", JUDGED, steps=settings.default_steps)]
    assert best is not None
    if stage == "context":
        return [
            run(f"contexts/{c}", best.lr, best.rank, f"context-{c}", some, context=c, steps=settings.context_steps)
            for c in settings.contexts
        ]
    changes = {"context": best.context or max(settings.contexts), "steps": settings.final_steps}
    final = run("final", best.lr, best.rank, "final", (*JUDGED, "test"), **changes)
    if stage == "final":
        return [final]
    own = final.settings.updated({"scratch": CONTROLS[stage]})
    steps = update(final.settings, best.rank, symbols) * final.settings.steps // update(own, best.rank, symbols)
    if not steps:
        raise ValueError(f"controls: a step of '{stage}' costs more than the final run: expected more final steps")
    return [Run(stage, stage, Cell(settings.control_lr, best.rank, stage), own.updated({"steps": steps}), final.parts)]


@cache
def update(settings: Settings, rank: int, symbols: int, convention: str = "exact") -> int:
    """FLOPs of a training step whose loss is over so many `symbols`, 0 for all tokens (see `Task.symbols`).

    `coursework`, unlike `exact`, charges gradients of frozen weights too.
    """
    how: dict[str, Any] = {"weights": bool(settings.digit_weights), "digits": bool(settings.number_loss)}
    how |= {"symbols": symbols, "convention": convention} | settings.trained(rank)
    return predict(shape_of(settings), settings.batch_size, settings.context, training=True, **how).training


def carried(settings: Settings, out: Path, stage: str) -> Best:
    """What goes forward to `stage` ("context", "final"): the lowest validation loss per real token, or as set.

    Of a grid over seeds the cell of the lowest mean; the stages after it train with the first seed alone.

    Raises:
        ValueError: a run that has to be compared is not there.
    """
    lr, rank, context = settings.best_lr, settings.best_rank, settings.best_context or None
    if not (lr and rank):
        cell = lowest(_results(out, runs_of(settings, "grid")[1:], "grid"))
        lr, rank = lr or cell["lr"], rank or cell["rank"]
    overridden = bool(settings.best_lr or settings.best_rank or context)
    if stage != "context" and not context:
        sweep = runs_of(settings, "context", Best(lr, rank, None, overridden))
        context = min(_results(out, sweep, "context"), key=lambda r: r["validation_loss"])["context"]
    return Best(lr, rank, context, overridden)


def _results(out: Path, runs: Sequence[Run], stage: str) -> list[dict[str, Any]]:
    folders = [RunFolder(out / run.folder) for run in runs]
    for folder in folders:
        if not folder.finished:
            raise ValueError(
                f"{folder.result}: not there: expected the stage '{stage}' to have run in this folder, or --best-lr, "
                "--best-rank and --best-context"
            )
    return [files.read_json(folder.result) for folder in folders]


def systems_of(task: Task, run: Run) -> list[int]:
    """All that a run forecasts, each once."""
    return list(dict.fromkeys(system for part in run.parts for system in task.forecast_systems(part)))


def dearest(settings: Settings) -> Best:
    """The choice that costs most, for a price before the grid has chosen."""
    rank, context = settings.best_rank or max(settings.ranks), settings.best_context or max(settings.contexts)
    return Best(settings.best_lr or settings.learning_rates[-1], rank, context, False)


def prices(plan: Plan, stages: Sequence[str]) -> tuple[list[dict[str, Any]], int | None]:
    """FLOPs of every stage before it runs, by kind, and how many steps of the final run fit beside the other stages.

    The most expensive rank and context stand for what the grid and the sweep will choose. A run that two stages share
    counts in the first. The steps are None where there is no final stage.
    """
    rows: list[dict[str, Any]] = []
    counted: set[str] = set()
    trained = 0  # FLOPs of the last run's steps and of its validations on the way
    for stage in stages:
        row: dict[str, Any] = {"stage": stage, "runs": 0, "steps": 0} | dict.fromkeys(LEDGER_STAGES, 0)
        for planned in plan.stage(stage):
            new = planned.run.folder not in counted
            counted.add(planned.run.folder)
            row["runs"] += new
            row["steps"] += planned.row["steps"] * new
            if stage == "final" and new:
                trained = sum(planned.training.values())
            for kind, flops in (planned.flops if new else planned.forecasts).items():
                row[kind] += flops
        rows.append(row | {"total": sum(row[kind] for kind in LEDGER_STAGES)})
    if not trained:
        return rows, None
    settings, others = plan.settings, sum(row["total"] for row in rows) - trained
    return rows, max(0, (settings.budget - others) * settings.final_steps // trained)
