"""The records of a study as a whole, from the folders of its runs.

RUN/study.json  preprocessing.json  results.csv  flops.csv  accounting.csv  accounting.json
RUN/cells.csv, of a grid over several seeds
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.accounting import three_reports
from experiments.accounting.ledger import STAGES as LEDGER_STAGES
from experiments.run_folder import files
from experiments.run_folder.cells import by_cell, losses, spread
from experiments.run_folder.folder import RunFolder
from experiments.settings.record import Settings
from experiments.study.plan import CONTROLS, Best, Plan, Run, carried, runs_of
from experiments.study.search import Search
from experiments.task.preprocessing import preprocessing
from experiments.training.cell import Cell
from qwen_min.prices import PRIMITIVES

RULE = "lowest validation loss per real token"


def all_runs(plan: Plan, out: Path) -> tuple[list[Run], Best | None]:
    """The runs of every stage, as far as it is known what is carried forward, and that.

    Without a protocol they are the grid's."""
    settings = plan.settings
    if not settings.protocol:
        return runs_of(settings, "grid"), None
    runs, best = [run for stage in ("baseline", "default", "grid") for run in runs_of(settings, stage)], None
    for stage in ("context", "final", *(stage for stage in CONTROLS if (out / stage).is_dir())):
        try:
            best = carried(settings, out, stage)
        except ValueError:  # the stage before it has not run
            break
        runs += runs_of(settings, stage, best, plan.task.symbols)
    return runs, best


def write_records(plan: Plan, out: Path) -> None:
    """Write all of them."""
    settings = plan.settings
    runs, best = all_runs(plan, out)
    search = Search(plan) if settings.rungs else None
    if search:
        runs = search.runs(out)
    if not (out / "preprocessing.json").is_file():
        files.write_json(out / "preprocessing.json", preprocessing(plan.task))
    if settings.protocol:  # else it is a grid alone
        study = _study(plan, runs, best)
        files.write_json(out / "study.json", study)
        if study["best"]:
            files.write_json(out / "manifest.json", files.read_json(out / "manifest.json") | {"best": study["best"]})
    finished: dict[str, Run] = {}
    for run in runs:  # each folder once, in its first stage
        if RunFolder(out / run.folder).finished:
            finished.setdefault(run.folder, run)
    results = {folder: files.read_json(RunFolder(out / folder).result) for folder in finished}
    files.write_csv(
        out / "results.csv",
        [
            {"stage": run.stage, "name": run.cell.name, "folder": folder}
            | {key: value for key, value in results[folder].items() if not isinstance(value, dict)}
            | {f"{part}_flops": flops for part, flops in results[folder]["flops"].items()}
            | (search.record(out, run) if search else {})
            | ({"seed": run.settings.seed} if settings.seeds > 1 else {})
            for folder, run in finished.items()
        ],
    )
    cells = [result for folder, result in results.items() if folder.startswith("cells/")]
    if settings.seeds > 1 and cells:
        files.write_csv(out / "cells.csv", _cells(cells))
    files.write_csv(out / "flops.csv", _flops(settings, finished, results, out, search.copies(out) if search else []))
    if settings.protocol in three_reports.DRAFTS and not (out / "accounting.csv").is_file():
        _write_accounting(settings.protocol, out)


def _cells(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The validation loss of each cell of a grid over its seeds."""
    rows = []
    for name, some in by_cell(results).items():
        mean, low, high = spread(losses(some))
        row = {"cell": name, "lr": some[0]["lr"], "rank": some[0]["rank"], "seeds": len(some)}
        rows.append(row | {"validation_loss": mean, "lowest": low, "highest": high})
    return rows


def _write_accounting(protocol: str, out: Path) -> None:
    """What the report says that it spent beside what its formulas give and what its plan costs exactly."""
    rows: list[dict[str, Any]] = [
        {"stage": s.stage, "part": s.part, "label": s.label, "claimed": s.claimed, "reproduced": s.reproduced}
        | {"exact": s.exact, "share_of_exact": s.claimed / s.exact if s.claimed and s.exact else None, "note": s.note}
        for s in three_reports.stages(protocol)
    ]
    files.write_csv(out / "accounting.csv", rows)
    files.write_json(out / "accounting.json", three_reports.about(protocol))


def _study(plan: Plan, runs: list[Run], best: Best | None) -> dict[str, Any]:
    settings = plan.settings
    of_seeds = f", the mean of {settings.seeds} seeds" if settings.seeds > 1 else ""
    return {
        "protocol": settings.protocol,
        "label": settings.label,
        "shortened": settings.shortened,
        "budget": settings.budget,
        "sampling": settings.judged,
        "prices": PRIMITIVES,
        "stages": [one.row for one in plan.of(dict.fromkeys(runs))],
        "best": best and asdict(best) | {"rule": RULE + of_seeds, "cell": Cell(best.lr, best.rank).name},
    }


def _flops(
    settings: Settings, finished: Mapping[str, Run], results, out: Path, copies: Sequence[dict[str, int]]
) -> list[dict[str, Any]]:
    """What each stage cost, by kind, beside its prediction; every folder counts in the first stage that it is of.

    `copies`: what a search spent on judging cells on their way, in the grid."""
    rows = []
    for stage in (*dict.fromkeys(run.stage for run in finished.values()), "all"):
        folders = [folder for folder, run in finished.items() if stage in (run.stage, "all")]
        records = [results[folder] for folder in folders]
        records += [found.held for folder in folders if (found := RunFolder(out / folder).evaluated).flops]
        if stage in ("grid", "all"):
            records += [{"flops": copy, "predicted_flops": copy} for copy in copies]
        for kind in (*LEDGER_STAGES, "total"):
            stages = LEDGER_STAGES if kind == "total" else (kind,)
            row: dict[str, Any] = {"stage": stage, "part": kind}
            for name, amounts in (("flops", "flops"), ("predicted", "predicted_flops")):
                row[name] = sum(record[amounts].get(one, 0) for record in records for one in stages)
            rows.append(row | {"share_of_budget": row["flops"] / settings.budget})
    return rows
