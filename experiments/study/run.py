"""Running a study: what is not finished of some stages, in order, each run trained and judged; all in one folder.

RUN/config.toml  protocol.toml  manifest.json  plan.json, and what `records.py` writes
RUN/untrained/  default/  cells/<name>/  contexts/<context>/  final/  scratch/  small/   each a `RunFolder`
RUN/rungs/<steps>/<name>/   of a search, see `search.py`
RUN/naive/<part>.csv   forecasts that need no model

The page (`report`) is made from these files alone.
"""

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from experiments.accounting.ledger import STAGES as LEDGER_STAGES
from experiments.accounting.ledger import BudgetExceeded, Ledger
from experiments.forecasting import horizon, judge, naive
from experiments.forecasting.evaluate import evaluate
from experiments.run_folder import files
from experiments.run_folder.errors import RunFailed
from experiments.run_folder.folder import RunFolder
from experiments.run_folder.owner import Claim, claimed
from experiments.run_folder.status import PLAN, stages_of
from experiments.settings.record import Settings
from experiments.study.manifest import begin, check_drift, undivided
from experiments.study.plan import CONTROLS, STAGES, Best, Plan, Planned, carried, systems_of
from experiments.study.records import write_records
from experiments.study.search import Search, branch
from experiments.task.model import trained_model
from experiments.training.cell import Progress, run_cell
from experiments.training.parallel import ALONE, Alone
from experiments.training.progress import counting


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
            environment is another one (see `check_drift`) without `allow_drift`; or a study has rungs.
        RunFailed: a loss or a gradient is not finite; with rungs, in every cell.
    """
    with group.together():
        group.check(settings)
        plan = Plan(settings)
        for field in ("rungs", "over"):
            if (given := getattr(settings, field)) and (settings.protocol or stages != ("grid",)):
                raise ValueError(f"{field} is {list(given)}: expected none in a study, whose grid is whole")
        search = Search(plan) if settings.rungs else None
        if settings.protocol:
            plan.task.check(plan.task.forecast_systems("shown"))
        planned = {stage: plan.stage(stage) for stage in stages}  # refuses what cannot run before it is begun
        runs = [one for some in planned.values() for one in some]
    with group.only(claimed, out) as claim, group.only(Ledger, ledger_path, settings.budget) as ledger:
        group.tell(undivided, out)
        group.tell(begin, plan.task, out)
        name = run_name(out, ledger_path)
        needs = partial(search.needed, out) if search else partial(_needed, ledger, name, out, runs)
        group.tell(_require_room, ledger, name, needs)
        group.tell(check_drift, settings, out, allow_drift)
        group.tell(files.remove_leftovers, out)
        group.tell(start_work, claim, out, planned, runs)
        for stage in stages:
            if stage in ("context", "final", *CONTROLS):  # it is known now what is carried forward
                best = Best(**group.tell(lambda stage=stage: vars(carried(settings, out, stage))))
                planned[stage] = plan.stage(stage, best)
                group.tell(write_plan, out, {stage: planned[stage]})
            if search:
                run_rungs(search, claim, out, ledger, name, progress, group)
            else:
                run_all(planned[stage], out, ledger, name, progress, group)
            group.tell(write_records, plan, out)


def start_work(claim: Claim, out: Path, planned: Mapping[str, Sequence[Planned]], mine: Sequence[Planned]) -> None:
    """Say in the folder what is asked for, by stage, and that this process works at its own part from now on."""
    write_plan(out, planned)
    folders = {one.run.folder: one.within(out) for one in mine}
    claim.begins(list(folders), sum(folder.spent() for folder in folders.values()))


def write_plan(out: Path, planned: Mapping[str, Sequence[Planned]], flops: int | None = None) -> None:
    """Put the runs of some stages into `plan.json`, in the place of what it says of them.

    Of a search, whose runs do not all go on to their ends, with the `flops` that all takes at most.

    Raises:
        ValueError: the file is there and damaged.
    """
    path = out / PLAN
    held = stages_of(path) if path.is_file() else {}
    most = {} if flops is None else {"flops": flops}
    now = held | {
        stage: {"stage": stage, "runs": [one.row | {"parts": list(one.run.parts)} for one in some]} | most
        for stage, some in planned.items()
    }
    if now != held:
        files.write_json(path, {"stages": [now[stage] for stage in (*STAGES, *CONTROLS) if stage in now]})


def write_search(search: Search, out: Path) -> None:
    """Put a search as it stands into `plan.json`."""
    write_plan(out, {"grid": search.planned(out)}, search.total(out))


def run_name(out: Path, ledger_path: Path) -> str:
    """What a ledger calls the run of a folder."""
    return os.path.relpath(out.resolve(), ledger_path.resolve().parent)


def run_all(
    planned: Sequence[Planned], out: Path, ledger: Ledger, name: str, progress: Progress, group: Alone = ALONE
) -> None:
    """Train and judge what is not finished of some runs, in their order."""
    for one in planned:
        of = one.task, one.run.cell, one.training, one.within(out)
        run_cell(*of, ledger, name, progress, horizon.error, group)
        if one.run.parts:
            group.tell(_judge, one, out, ledger, name, progress)


def run_rungs(
    search: Search,
    claim: Claim,
    out: Path,
    ledger: Ledger,
    name: str,
    progress: Progress,
    group: Alone = ALONE,
    mine: Collection[int] | None = None,
) -> int:
    """Train and judge what is not finished of a search, rung by rung; a cell that fails is out.

    Of some cells alone until others, which somebody else trains, are needed to know which go on: returns how many rungs
    are done.
    """
    left = list(range(len(search.cells)))

    def begins(folders: Sequence[str]) -> None:
        claim.begins(folders, sum(RunFolder(out / folder).spent() for folder in folders), search.needed(out, mine))

    group.tell(write_search, search, out)
    if mine is None or 0 in mine:
        group.tell(begins, [search.untrained.run.folder])
        run_all([search.untrained], out, ledger, name, progress, group)
    for rung in range(len(search.rungs)):
        own = [cell for cell in left if mine is None or cell in mine]
        for place, cell in enumerate(own):
            group.tell(begins, [search.cells[other].run.folder for other in own[place:]])
            with suppress(RunFailed):
                _run_to(search, rung, cell, out, ledger, name, progress, group)
        if group.tell(lambda rung=rung: search.standing(out)[0]) <= rung:
            return rung
        left = group.tell(search.survivors, out, rung, left)
        group.tell(write_search, search, out)
    return len(search.rungs)


def _run_to(
    search: Search, rung: int, cell: int, out: Path, ledger: Ledger, name: str, progress: Progress, group: Alone
) -> None:
    """Train a cell to a rung, and judge it there."""
    one, own, until = search.judged[rung][cell], search.cells[cell], search.rungs[rung]
    if group.tell(lambda: search.loss(out, rung, cell) == math.inf):
        return
    if one is own:
        return run_all([own], out, ledger, name, progress, group)
    folder, shared = own.within(out), search.before[rung + 1][cell]
    if not group.tell(one.within(out).path.is_dir):
        run_cell(own.task, own.run.cell, shared, folder, ledger, name, progress, horizon.error, group, until=until)
        group.tell(branch, folder, one.within(out))
    name = f"{name}/rungs/{until}"
    of = one.task, one.run.cell, one.training, one.within(out)
    run_cell(*of, ledger, name, progress, horizon.error, group, prefix=shared)


def _require_room(ledger: Ledger, name: str, needs: Callable[[], int]) -> None:
    """Refuse runs that would pass the budget before any of them has run."""
    needed, left = needs(), ledger.totals()["left"]
    if needed > max(0, left):  # where nothing is left to do, a budget that was lowered since is no reason
        raise BudgetExceeded(ledger.path, name, needed, left, ledger.budget)


def _needed(ledger: Ledger, name: str, out: Path, planned: Sequence[Planned]) -> int:
    """FLOPs that are still to be spent on some runs."""
    needed = 0
    counted: set[str] = set()
    for one in planned:
        if not one.within(out).finished and one.run.folder not in counted:
            before = ledger.latest(name, one.run.cell.name)
            spent = sum(before[s] for s in LEDGER_STAGES) if before and before["state"] != "settled" else 0
            needed += max(0, sum(one.training.values()) - spent)
        counted.add(one.run.folder)
        if not one.judged(out):
            needed += sum(one.forecasts.values())
    return needed


def _judge(one: Planned, out: Path, ledger: Ledger, name: str, progress: Progress) -> None:
    """Forecast and score with a finished run, unless that is done."""
    task, run, folder, cell = one.task, one.run, one.within(out), f"{one.run.cell.name} forecasts"
    files.recover_folder(folder.evaluation)
    if one.judged(out):
        ledger.settle_finished(name, cell, folder.evaluated.flops)
        return
    adapter, far = folder.adapter if run.cell.rank else None, partial(counting, progress, run.cell.name)
    model = trained_model(task.settings, adapter)
    made, _, entry = evaluate(task, model, systems_of(task, run), one.forecasts, ledger, name, cell, progress=far)
    plain = {
        part: naive.kept(task, systems, out / "naive" / f"{part}.csv", far(f"law fits, {part}"))
        for part, systems in one.parts.items()
    }
    result = files.read_json(folder.result)
    judge.write(folder.evaluation, judge.tables(task, made, plain, one.parts, result, one.forecasts, adapter))
    ledger.settle(entry)
