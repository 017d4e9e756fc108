"""A whole report in stages: baseline, default run, grid, context sweep, final run, each judged; all in one folder.

RUN/config.toml  protocol.toml  manifest.json  plan.json  study.json  preprocessing.json  results.csv  flops.csv
RUN/accounting.csv  accounting.json
RUN/untrained/  default/  cells/<name>/  contexts/<context>/  final/   each with
    metrics.jsonl  gradients.jsonl  result.json  adapter/  checkpoint/  evaluation/ (see `judge.py`)
RUN/naive/<part>.csv   forecasts that need no model

The page (`report`) is made from these files alone.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import evaluate, files, judge, naive
from experiments.budget import STAGES as LEDGER_STAGES
from experiments.budget import BudgetExceeded, Ledger
from experiments.folder import begin, check_drift, undivided
from experiments.owner import Claim, claimed
from experiments.parallel import ALONE, Alone
from experiments.preprocessing import preprocessing
from experiments.settings import Settings
from experiments.status import PLAN, spent, stages_of
from experiments.task import Task
from experiments.train import Cell, Progress, predicted, run_cell
from qwen_min import QwenConfig, Tokenizer
from qwen_min.flops import PRIMITIVES
from qwen_min.load import resolve

STAGES = ("baseline", "default", "grid", "context", "final")
UNTRAINED = Cell(0.0, 0)
JUDGED = ("validation", "shown")
Price = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Run:
    """One folder of a study: a cell under settings of its own, and the parts that are forecast with it."""

    stage: str
    folder: str
    cell: Cell
    settings: Settings
    parts: tuple[str, ...] = ()


Priced = Sequence[tuple[Run, Price]]


@dataclass(frozen=True)
class Best:
    """What is carried forward: the cell, and for the final run the context."""

    lr: float
    rank: int
    context: int | None
    overridden: bool


def cells_of(settings: Settings) -> list[Cell]:
    """Every learning rate with every rank, rank by rank, less those that are left out.

    Raises:
        ValueError: none is left.
    """
    cells = [Cell(lr, rank) for rank in settings.ranks for lr in settings.learning_rates]
    if left := [cell for cell in cells if cell.name not in settings.skip]:
        return left
    raise ValueError("skip leaves no cell of the grid: expected at least one")


def runs_of(settings: Settings, stage: str, best: Best | None = None) -> list[Run]:
    """The runs of a stage, in order; `context` and `final` need to know what is carried forward.

    A run that would train what a cell of the grid trains is that cell: it is trained once, in the cell's folder.
    """
    if stage == "baseline":
        return [Run(stage, "untrained", UNTRAINED, settings, JUDGED)]
    some = ("shown",) if settings.forecast_cells else ()
    cells = {cell: Run("grid", f"cells/{cell.name}", cell, settings, some) for cell in cells_of(settings)}
    if stage == "grid":
        return [Run("baseline", "untrained", UNTRAINED, settings), *cells.values()]

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
    return [run("final", best.lr, best.rank, "final", (*JUDGED, "test"), **changes)]


def carried(settings: Settings, out: Path, stage: str) -> Best:
    """What goes forward to `stage` ("context", "final"): the lowest validation loss per real token, or what is told.

    Raises:
        ValueError: a run that has to be compared is not there.
    """
    lr, rank, context = settings.best_lr, settings.best_rank, settings.best_context or None
    if not (lr and rank):
        cell = min(_results(out, runs_of(settings, "grid")[1:], "grid"), key=lambda r: r["validation_loss"])
        lr, rank = lr or cell["lr"], rank or cell["rank"]
    overridden = bool(settings.best_lr or settings.best_rank or context)
    if stage == "final" and not context:
        sweep = runs_of(settings, "context", Best(lr, rank, None, overridden))
        context = min(_results(out, sweep, "context"), key=lambda r: r["validation_loss"])["context"]
    return Best(lr, rank, context, overridden)


def _results(out: Path, runs: Sequence[Run], stage: str) -> list[dict[str, Any]]:
    paths = [out / run.folder / "result.json" for run in runs]
    for path in paths:
        if not path.is_file():
            raise ValueError(
                f"{path}: not there: expected the stage '{stage}' to have run in this folder, or --best-lr, "
                "--best-rank and --best-context"
            )
    return [files.read_json(path) for path in paths]


def prepare(settings: Settings) -> tuple[Task, QwenConfig]:
    """The task and the model's configuration; no weights are read."""
    folder = resolve(settings.model, settings.revision or None, settings.offline)
    config = QwenConfig.from_file(folder / "config.json")
    return Task.prepare(settings, Tokenizer(folder / "tokenizer.json")), config


def price(task: Task, config: QwenConfig, run: Run) -> Price:
    """FLOPs of a run before it runs, by ledger stage: of its `training` and of its `forecasts`.

    Raises:
        ValueError: the series are too short for the forecasts, or lack a system that is to be shown.
    """
    own = task.under(run.settings)
    own.check_fits(config)
    training = predicted(run.settings, run.cell, config, len(own.validation_windows))
    forecasts = dict.fromkeys(LEDGER_STAGES, 0)
    if run.parts:
        bias = bool(run.cell.rank and run.settings.logit_bias)
        own.check(_systems(own, run))
        forecasts = evaluate.predicted(own, config, _systems(own, run), run.cell.rank, bias)
    return {"training": training, "forecasts": forecasts}


def dearest(settings: Settings) -> Best:
    """The choice that costs most, for a price before the grid has chosen."""
    rank, context = settings.best_rank or max(settings.ranks), settings.best_context or max(settings.contexts)
    return Best(settings.best_lr or settings.learning_rates[-1], rank, context, False)


def prices(settings: Settings, stages: Sequence[str]) -> tuple[list[dict[str, Any]], int | None]:
    """FLOPs of every stage before it runs, by kind, and how many steps of the final run fit beside the other stages.

    The most expensive rank and context stand for what the grid and the sweep will choose. A run that two stages share
    counts in the first. The steps are None where there is no final stage.
    """
    task, config = prepare(settings)
    rows: list[dict[str, Any]] = []
    counted: set[str] = set()
    trained = 0  # FLOPs of the last run's steps and of its validations on the way
    for stage in stages:
        row: dict[str, Any] = {"stage": stage, "runs": 0, "steps": 0} | dict.fromkeys(LEDGER_STAGES, 0)
        for run in runs_of(settings, stage, dearest(settings)):
            priced = price(task, config, run)
            if run.folder in counted:
                priced["training"] = {}
            else:
                row["runs"] += 1
                row["steps"] += run.settings.steps if run.cell.rank else 0
            counted.add(run.folder)
            trained = sum(priced["training"].values())
            for kind, flops in _together(priced).items():
                row[kind] += flops
        rows.append(row | {"total": sum(row[kind] for kind in LEDGER_STAGES)})
    if not trained or stages[-1] != "final":
        return rows, None
    others = sum(row["total"] for row in rows) - trained
    return rows, max(0, (settings.budget - others) * settings.final_steps // trained)


def run_stages(
    settings: Settings,
    out: Path,
    ledger_path: Path,
    progress: Progress,
    stages: Sequence[str],
    group: Alone = ALONE,
    allow_drift: bool = False,
) -> None:
    """Run what is not finished of some stages, in their order, and write the records after each.

    Raises:
        BudgetExceeded: all that is still to do does not fit what is left; nothing has been run.
        ValueError: the folder holds a run of other settings, model or data, or another process works in it; or the
            environment is another one (see `check_drift`) without `allow_drift`.
    """
    with group.together():
        group.check(settings)
        task, config = prepare(settings)
        if settings.protocol:
            task.check(task.forecast_systems("shown"))
        planned = {  # refuses what cannot run before it is begun
            stage: [(run, price(task, config, run)) for run in runs_of(settings, stage, dearest(settings))]
            for stage in stages
        }
        priced = [one for runs in planned.values() for one in runs]
    with group.only(claimed, out) as claim, group.only(Ledger, ledger_path, settings.budget) as ledger:
        group.tell(undivided, out)
        group.tell(begin, task, out)
        name = run_name(out, ledger_path)
        group.tell(_require_room, ledger, name, out, task, priced)
        group.tell(check_drift, settings, out, allow_drift)
        group.tell(files.remove_leftovers, out)
        group.tell(start_work, claim, out, planned, priced)
        for stage in stages:
            best = None
            if stage in ("context", "final"):
                best = Best(**group.tell(lambda stage=stage: vars(carried(settings, out, stage))))
            priced = [(run, price(task, config, run)) for run in runs_of(settings, stage, best)]
            group.tell(write_plan, out, {stage: priced})
            run_all(task, priced, out, ledger, name, progress, group)
            group.tell(write_records, task, config, out)


def start_work(claim: Claim, out: Path, planned: Mapping[str, Priced], mine: Priced) -> None:
    """Say in the folder what is asked for, by stage, and that this process works at its own part from now on."""
    write_plan(out, planned)
    folders = list(dict.fromkeys(run.folder for run, _ in mine))
    claim.begins(folders, sum(spent(out / folder) for folder in folders))


def write_plan(out: Path, planned: Mapping[str, Priced]) -> None:
    """Put the runs of some stages into `plan.json`, in the place of what it says of them.

    Raises:
        ValueError: the file is there and damaged.
    """
    path = out / PLAN
    held = stages_of(path) if path.is_file() else {}
    rows = {}
    for stage, priced in planned.items():
        rows[stage] = [_row(run, flops) | {"parts": list(run.parts)} for run, flops in priced]
    if any(held.get(stage) != runs for stage, runs in rows.items()):
        now = held | rows
        files.write_json(path, {"stages": [{"stage": stage, "runs": now[stage]} for stage in STAGES if stage in now]})


def _row(run: Run, priced: Price) -> dict[str, Any]:
    """What is planned of a run."""
    return {
        "stage": run.stage,
        "name": run.cell.name,
        "folder": run.folder,
        "lr": run.cell.lr,
        "rank": run.cell.rank,
        "context": run.settings.context,
        "steps": run.settings.steps if run.cell.rank else 0,
        "predicted": _together(priced),
    }


def run_name(out: Path, ledger_path: Path) -> str:
    """What a ledger calls the run of a folder."""
    return os.path.relpath(out.resolve(), ledger_path.resolve().parent)


def run_all(
    task: Task, priced: Priced, out: Path, ledger: Ledger, name: str, progress: Progress, group: Alone = ALONE
) -> None:
    """Train and judge what is not finished of some runs, in their order."""
    for run, flops in priced:
        own = task.under(run.settings)
        run_cell(own, run.cell, flops["training"], out / run.folder, ledger, name, progress, group)
        if run.parts:
            group.tell(_judge, own, run, flops["forecasts"], out, ledger, name)


def _require_room(ledger: Ledger, name: str, out: Path, task: Task, priced: Priced) -> None:
    """Refuse runs that would pass the budget before any of them has run."""
    needed = 0
    counted: set[str] = set()
    for run, flops in priced:
        finished = (out / run.folder / "result.json").is_file()
        if not finished and run.folder not in counted:
            before = ledger.latest(name, run.cell.name)
            spent = sum(before[s] for s in LEDGER_STAGES) if before and before["state"] != "settled" else 0
            needed += max(0, sum(flops["training"].values()) - spent)
        counted.add(run.folder)
        if not judged(task.under(run.settings), run, out):
            needed += sum(flops["forecasts"].values())
    left = ledger.totals()["left"]
    if needed > max(0, left):  # where nothing is left to do, a budget that was lowered since is no reason
        raise BudgetExceeded(ledger.path, name, needed, left, ledger.budget)


def _systems(task: Task, run: Run) -> list[int]:
    """All that a run forecasts, each once."""
    return list(dict.fromkeys(system for part in run.parts for system in task.forecast_systems(part)))


def judged(task: Task, run: Run, out: Path) -> bool:
    """Whether a finished evaluation in the run's folder covers all that it forecasts."""
    path = out / run.folder / "evaluation" / "evaluation.json"
    if not path.is_file():
        return not run.parts
    parts = files.read_json(path)["parts"]
    return all(parts.get(part) == task.forecast_systems(part) for part in run.parts)


def _judge(task: Task, run: Run, expected: dict[str, int], out: Path, ledger: Ledger, name: str) -> None:
    """Forecast and score with a finished run, unless that is done."""
    folder, entry_name = out / run.folder / "evaluation", f"{run.cell.name} forecasts"
    files.recover_folder(folder)
    if judged(task, run, out):
        ledger.settle_finished(name, entry_name, files.read_json(folder / "evaluation.json")["flops"])
        return
    result = files.read_json(out / run.folder / "result.json")
    adapter = out / run.folder / "adapter" if run.cell.rank else None
    parts = {part: task.forecast_systems(part) for part in run.parts}
    entry = ledger.reserve(name, entry_name, expected)
    made = evaluate.forecast(task, evaluate.trained_model(task.settings, adapter), _systems(task, run))
    for stage, flops in made.flops.items():
        ledger.spend(entry, stage, flops)
    plain = {part: naive.kept(task, systems, out / "naive" / f"{part}.csv") for part, systems in parts.items()}
    judge.write(folder, judge.tables(task, made, plain, parts, result, expected, adapter))
    ledger.settle(entry)


def all_runs(settings: Settings, out: Path) -> list[Run]:
    """The runs of every stage, as far as it is known what is carried forward; each folder once, in its first stage."""
    runs = [run for stage in ("baseline", "default", "grid") for run in runs_of(settings, stage)]
    for stage in ("context", "final"):
        try:
            runs += runs_of(settings, stage, carried(settings, out, stage))
        except ValueError:  # the stage before it has not run
            break
    return runs


def write_records(task: Task, config: QwenConfig, out: Path) -> None:
    """The records of the study as a whole, from the folders of its runs."""
    settings = task.settings
    runs = all_runs(settings, out)
    if not (out / "preprocessing.json").is_file():
        files.write_json(out / "preprocessing.json", preprocessing(task))
    if settings.protocol:  # else it is a grid alone
        study = _study(task, config, runs, out)
        files.write_json(out / "study.json", study)
        if study["best"]:
            files.write_json(out / "manifest.json", files.read_json(out / "manifest.json") | {"best": study["best"]})
    finished: dict[str, Run] = {}
    for run in runs:
        if (out / run.folder / "result.json").is_file():
            finished.setdefault(run.folder, run)
    results = {folder: files.read_json(out / folder / "result.json") for folder in finished}
    files.write_csv(
        out / "results.csv",
        [
            {"stage": run.stage, "name": run.cell.name, "folder": folder}
            | {key: value for key, value in results[folder].items() if not isinstance(value, dict)}
            | {f"{part}_flops": flops for part, flops in results[folder]["flops"].items()}
            for folder, run in finished.items()
        ],
    )
    files.write_csv(out / "flops.csv", _flops(settings, finished, results, out))
    if settings.protocol not in ("", "default") and not (out / "accounting.csv").is_file():
        _write_accounting(settings.protocol, out)


def _write_accounting(protocol: str, out: Path) -> None:
    """What the report says that it spent beside what its formulas give and what its plan costs exactly."""
    from experiments import accounting_of_reports

    rows: list[dict[str, Any]] = [
        {"stage": s.stage, "part": s.part, "label": s.label, "claimed": s.claimed, "reproduced": s.reproduced}
        | {"exact": s.exact, "share_of_exact": s.claimed / s.exact if s.claimed and s.exact else None, "note": s.note}
        for s in accounting_of_reports.stages(protocol)
    ]
    files.write_csv(out / "accounting.csv", rows)
    files.write_json(out / "accounting.json", accounting_of_reports.about(protocol))


def _study(task: Task, config: QwenConfig, runs: Sequence[Run], out: Path) -> dict[str, Any]:
    settings = task.settings
    best = None
    for stage in ("context", "final"):
        try:
            best = carried(settings, out, stage)
        except ValueError:
            break
    return {
        "protocol": settings.protocol,
        "label": settings.label,
        "shortened": settings.shortened,
        "budget": settings.budget,
        "sampling": settings.judged,
        "prices": PRIMITIVES,
        "stages": [_row(run, price(task, config, run)) for run in dict.fromkeys(runs)],
        "best": best
        and {
            "rule": "lowest validation loss per real token",
            "cell": Cell(best.lr, best.rank).name,
            "lr": best.lr,
            "rank": best.rank,
            "context": best.context,
            "overridden": best.overridden,
        },
    }


def _together(priced: Price) -> dict[str, int]:
    return {stage: sum(part.get(stage, 0) for part in priced.values()) for stage in LEDGER_STAGES}


def _flops(settings: Settings, finished: dict[str, Run], results, out: Path) -> list[dict[str, Any]]:
    """What each stage cost, by kind, beside its prediction; every folder counts in the first stage that it is of."""
    amounts: dict[str, dict[str, list[int]]] = {}
    for folder, run in finished.items():
        spent, expected = [results[folder]["flops"]], [results[folder]["predicted_flops"]]
        path = out / folder / "evaluation" / "evaluation.json"
        if path.is_file():
            evaluation = files.read_json(path)
            spent.append(evaluation["flops"])
            expected.append(evaluation["predicted_flops"])
        of_stage = amounts.setdefault(run.stage, {kind: [0, 0] for kind in (*LEDGER_STAGES, "total")})
        for i, parts in enumerate((spent, expected)):
            for kind in LEDGER_STAGES:
                flops = sum(part.get(kind, 0) for part in parts)
                of_stage[kind][i] += flops
                of_stage["total"][i] += flops
    amounts["all"] = {
        kind: [sum(of_stage[kind][i] for of_stage in amounts.values()) for i in (0, 1)]
        for kind in (*LEDGER_STAGES, "total")
    }
    return [
        {
            "stage": stage,
            "part": kind,
            "flops": flops,
            "predicted": expected,
            "share_of_budget": flops / settings.budget,
        }
        for stage, of_stage in amounts.items()
        for kind, (flops, expected) in of_stage.items()
    ]
