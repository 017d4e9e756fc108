"""A grid in shards: each runs its share of the cells, on any machine that shares the folder; `merge` ends it.

RUN/shards/plan.json         into how many shards, what each may spend, whether they are merged
RUN/shards/<i>-of-<n>/ledger.sqlite

A shard has a ledger of its own: SQLite is not made for several machines that write one file over a network. Its budget,
the allowance, is set aside in the main ledger for all shards together before the first cell runs; `merge` puts what
they spent in the place of that.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.accounting.ledger import STAGES, Ledger
from experiments.run_folder import files
from experiments.run_folder.owner import claimed
from experiments.settings.record import Settings
from experiments.study.manifest import begin, check_drift
from experiments.study.plan import Plan, Planned
from experiments.study.records import write_records
from experiments.study.run import run_all, run_name, start_work
from experiments.task.task import Task
from experiments.training.cell import Progress
from experiments.training.parallel import ALONE, Alone

SET_ASIDE = "shards"
"""What the main ledger calls the cell that stands for all shards until they are merged."""

PATIENCE = 60.0
"""Seconds that a shard waits while another one begins."""


@dataclass(frozen=True)
class Shard:
    """The `number`-th, from 1, of `of` shards."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def part(self, runs: Sequence[Any]) -> list[Any]:
        """Its share of the grid's runs, of which the untrained model goes with the first shard."""
        return [*runs[: self.number == 1], *runs[self.number :: self.of]]

    def folder(self, out: Path) -> Path:
        return out / "shards" / f"{self.number}-of-{self.of}"

    @property
    def all(self) -> list["Shard"]:
        return [Shard(number, self.of) for number in range(1, self.of + 1)]


def run_shard(
    settings: Settings,
    out: Path,
    ledger_path: Path,
    progress: Progress,
    shard: Shard,
    group: Alone = ALONE,
    allow_drift: bool = False,
) -> None:
    """Run what is not finished of a shard's cells.

    Raises:
        BudgetExceeded: the whole grid does not fit what is left of the budget; nothing has been run.
        ValueError: the folder holds another run, other shards or merged ones, or a process at work on this shard; or
            the environment is another one than of the shard that began last (see `check_drift`) without `allow_drift`.
    """
    with group.together():
        group.check(settings)
        if settings.rungs:
            raise ValueError(f"rungs is {list(settings.rungs)}: expected none with shards, of which each runs alone")
        plan = Plan(settings)
        planned = plan.stage("grid")
        if shard.of >= len(planned):
            raise ValueError(f"shard is {shard}: expected at most {len(planned) - 1} shards, one for each cell")
    name = run_name(out, ledger_path)
    with group.only(claimed, shard.folder(out)) as claim:
        allowance = group.tell(_allow, shard, plan.task, planned, out, ledger_path, name, allow_drift)
        group.tell(start_work, claim, out, {"grid": planned}, shard.part(planned))
        with group.only(Ledger, shard.folder(out) / "ledger.sqlite", allowance) as ledger:
            run_all(shard.part(planned), out, ledger, name, progress, group)


def merge(settings: Settings, out: Path, ledger_path: Path) -> None:
    """Write the records of a grid that shards have run, and charge the main ledger what they spent, once.

    Raises:
        ValueError: a cell is missing, a shard is at work, the folder has no shards, or the ledger is another one.
    """
    study, path = Plan(settings), out / "shards" / "plan.json"
    if not path.is_file():
        raise ValueError(f"{out}: has no shards: expected grid --shard I/N to have run in it, for I from 1 to N")
    with claimed(out), ExitStack() as held:
        begin(study.task, out)
        plan, runs = files.read_json(path), study.stage("grid")
        if missing := [one.run.cell.name for one in runs if not one.within(out).finished or not one.judged(out)]:
            raise ValueError(
                f"{out}: {len(missing)} of {len(runs)} runs are not finished: {', '.join(missing)}: "
                f"expected all {plan['shards']} shards to have ended"
            )
        if not plan["merged"]:
            for shard in Shard(1, plan["shards"]).all:
                held.enter_context(claimed(shard.folder(out)))
            _charge(plan["shards"], runs, out, ledger_path, settings.budget)
            files.write_json(path, plan | {"merged": True})
        write_records(study, out)


def _charge(shards: int, runs: Sequence[Planned], out: Path, ledger_path: Path, budget: int) -> None:
    """Put what the shards spent in the place of what the main ledger has set aside for them."""
    name = run_name(out, ledger_path)
    if not ledger_path.is_file():
        raise ValueError(f"{ledger_path}: no such ledger: expected the one that the shards began with")
    with ExitStack() as held:
        ledger, own = held.enter_context(Ledger(ledger_path, budget)), []
        for shard in Shard(1, shards).all:
            if (path := shard.folder(out) / "ledger.sqlite").is_file():
                own.append(held.enter_context(Ledger(path)))
        for theirs in own:  # what a process that was killed after its result had still to say
            for one in runs:
                theirs.settle_finished(name, one.run.cell.name, one.within(out).kept())
        if not ledger.take_in(name, SET_ASIDE, own):
            entered = {(row["run"], row["cell"]) for row in ledger.entries()}
            if not entered.issuperset((row["run"], row["cell"]) for theirs in own for row in theirs.entries()):
                raise ValueError(f"{ledger_path}: knows no shards of {name}: expected the ledger that they began with")


def _allow(
    shard: Shard, task: Task, planned: Sequence[Planned], out: Path, ledger_path: Path, name: str, allow_drift: bool
) -> int:
    """The budget of a shard: what is predicted of its cells, and what was wasted on them.

    The first shard to begin sets aside what all of them need; one that continues after a kill adds what that wasted.
    """
    with claimed(out / "shards", PATIENCE), claimed(out):
        begin(task, out)
        check_drift(task.settings, out, allow_drift)
        path, mine = out / "shards" / "plan.json", shard.number - 1
        plan = files.read_json(path) if path.is_file() else _plan(shard, planned, out)
        if plan["merged"]:
            raise ValueError(f"{path}: the shards are merged: expected grid without --shard")
        if plan["shards"] != shard.of:
            raise ValueError(f"{path}: it is dealt to {plan['shards']} shards: expected as many, not --shard {shard}")
        with Ledger(shard.folder(out) / "ledger.sqlite") as own:
            needed = own.totals()["spent"]
            for one in shard.part(planned):
                needed += sum(_to_do(one, out).values()) + _undebited(own, name, one, out)
        more = max(0, needed - plan["allowances"][mine])
        if more or not path.is_file():
            plan["allowances"][mine] += more
            plan["set_aside"]["training"] += more
            with Ledger(ledger_path, task.settings.budget) as ledger:
                ledger.set_aside(name, SET_ASIDE, plan["set_aside"])
            files.write_json(path, plan)
        return max(1, plan["allowances"][mine])


def _plan(shard: Shard, planned: Sequence[Planned], out: Path) -> dict[str, Any]:
    """What `plan.json` holds: FLOPs that each shard may spend, and together by stage.

    Raises:
        ValueError: a run without shards has begun a cell; what it spent is in the main ledger.
    """
    for folder in (one.within(out) for one in planned):
        if folder.checkpoint.is_dir() and not folder.finished:
            raise ValueError(f"{folder.path}: was begun without shards: expected grid to end it, or delete it")
    needs = [[_to_do(one, out) for one in each.part(planned)] for each in shard.all]
    return {
        "shards": shard.of,
        "merged": False,
        "allowances": [sum(sum(need.values()) for need in part) for part in needs],
        "set_aside": {stage: sum(need[stage] for part in needs for need in part) for stage in STAGES},
    }


def _to_do(one: Planned, out: Path) -> dict[str, int]:
    """FLOPs by stage that a run has yet to spend, after its last checkpoint."""
    left, folder = dict.fromkeys(STAGES, 0), one.within(out)
    files.recover_folder(folder.checkpoint)
    kept = folder.kept()
    for stage in STAGES:
        if not folder.finished:
            left[stage] += one.training.get(stage, 0) - kept.get(stage, 0)
        if not one.judged(out):
            left[stage] += one.forecasts.get(stage, 0)
    return left


def _undebited(own: Ledger, name: str, one: Planned, out: Path) -> int:
    """FLOPs that a run's files stand for and its ledger does not: a power cut may lose the last debits."""
    row, folder = own.latest(name, one.run.cell.name), one.within(out)
    if row is None and folder.finished:  # by an earlier run, without shards
        return 0
    return max(0, sum(folder.kept().values()) - (sum(row[stage] for stage in STAGES) if row else 0))
