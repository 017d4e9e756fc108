"""A grid in shards: each runs its share of the cells, on any machine that shares the folder; `merge` ends it.

RUN/shards/plan.json         into how many shards, what each may spend, whether they are merged
RUN/shards/<i>-of-<n>/ledger.sqlite

A shard has a ledger of its own: SQLite is not made for several machines that write one file over a network. Its budget,
the allowance, is set aside in the main ledger for all shards together before the first cell runs; `merge` puts what
they spent in the place of that.
"""

from collections.abc import Iterable, Sequence
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
from experiments.study.run import run_all, run_name, run_rungs, start_work, write_search
from experiments.study.search import Search
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

    def cells(self, search: Search) -> list[int]:
        """Its share of a search's cells, by number."""
        return list(range(self.number - 1, len(search.cells), self.of))

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
) -> int:
    """Run what is not finished of a shard's cells; of a search as far as it is known which of them go on.

    Returns the step of the rung that waits for other shards, or 0.

    Raises:
        BudgetExceeded: the whole grid does not fit what is left of the budget; nothing has been run.
        ValueError: the folder holds another run, other shards or merged ones, or a process at work on this shard; or
            the environment is another one than of the shard that began last (see `check_drift`) without `allow_drift`.
    """
    with group.together():
        group.check(settings)
        plan = Plan(settings)
        planned = plan.stage("grid")
        search = Search(plan) if settings.rungs else None
        if shard.of >= len(planned):
            raise ValueError(f"shard is {shard}: expected at most {len(planned) - 1} shards, one for each cell")
    name = run_name(out, ledger_path)
    with group.only(claimed, shard.folder(out)) as claim:
        allowance = group.tell(_allow, shard, plan.task, planned, search, out, ledger_path, name, allow_drift)
        at = search.planned if search else lambda _: planned
        group.tell(lambda: start_work(claim, out, {"grid": at(out)}, shard.part(planned)))
        with group.only(Ledger, shard.folder(out) / "ledger.sqlite", allowance) as ledger:
            if not search:
                run_all(shard.part(planned), out, ledger, name, progress, group)
                return 0
            done = run_rungs(search, claim, out, ledger, name, progress, group, shard.cells(search))
            return [*search.rungs, 0][done]


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
        search = Search(study) if settings.rungs else None
        if search and (done := search.standing(out)[0]) < len(search.rungs):
            raise ValueError(
                f"{out}: the search is before its rung {search.rungs[done]}: expected all {plan['shards']} shards to "
                "have run again since the last rung"
            )
        if search:
            runs = [search.untrained]
        if missing := [one.run.cell.name for one in runs if not one.within(out).finished or not one.judged(out)]:
            raise ValueError(
                f"{out}: {len(missing)} of {len(runs)} runs are not finished: {', '.join(missing)}: "
                f"expected all {plan['shards']} shards to have ended"
            )
        if not plan["merged"]:
            for shard in Shard(1, plan["shards"]).all:
                held.enter_context(claimed(shard.folder(out)))
            _charge(plan["shards"], runs, search, out, ledger_path, settings.budget)
            files.write_json(path, plan | {"merged": True})
        if search:
            write_search(search, out)
        write_records(study, out)


def _charge(
    shards: int, runs: Sequence[Planned], search: Search | None, out: Path, ledger_path: Path, budget: int
) -> None:
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
            for run, cell, flops in _kept(runs, search, out, name):
                theirs.settle_finished(run, cell, flops)
        if not ledger.take_in(name, SET_ASIDE, own):
            entered = {(row["run"], row["cell"]) for row in ledger.entries()}
            if not entered.issuperset((row["run"], row["cell"]) for theirs in own for row in theirs.entries()):
                raise ValueError(f"{ledger_path}: knows no shards of {name}: expected the ledger that they began with")


def _allow(
    shard: Shard,
    task: Task,
    planned: Sequence[Planned],
    search: Search | None,
    out: Path,
    ledger_path: Path,
    name: str,
    allow_drift: bool,
) -> int:
    """The budget of a shard: what is predicted of its cells, and what was wasted on them.

    The first shard to begin sets aside what all of them need; one that continues after a kill adds what that wasted.
    """
    with claimed(out / "shards", PATIENCE), claimed(out):
        begin(task, out)
        check_drift(task.settings, out, allow_drift)
        path, mine = out / "shards" / "plan.json", shard.number - 1
        plan = files.read_json(path) if path.is_file() else _plan(shard, planned, search, out)
        if plan["merged"]:
            raise ValueError(f"{path}: the shards are merged: expected grid without --shard")
        if plan["shards"] != shard.of:
            raise ValueError(f"{path}: it is dealt to {plan['shards']} shards: expected as many, not --shard {shard}")
        with Ledger(shard.folder(out) / "ledger.sqlite") as own:
            needed = own.totals()["spent"]
            needed += sum(_needs(shard, planned, search, out).values()) + _undebited(
                own, shard, planned, search, out, name
            )
        more = max(0, needed - plan["allowances"][mine])
        if more or not path.is_file():
            plan["allowances"][mine] += more
            plan["set_aside"]["training"] += more
            with Ledger(ledger_path, task.settings.budget) as ledger:
                ledger.set_aside(name, SET_ASIDE, plan["set_aside"])
            files.write_json(path, plan)
        return max(1, plan["allowances"][mine])


def _plan(shard: Shard, planned: Sequence[Planned], search: Search | None, out: Path) -> dict[str, Any]:
    """What `plan.json` holds: FLOPs that each shard may spend, and together by stage.

    Raises:
        ValueError: a run without shards has begun a cell; what it spent is in the main ledger.
    """
    for folder in (one.within(out) for one in planned):
        if folder.checkpoint.is_dir() and not folder.finished:
            raise ValueError(f"{folder.path}: was begun without shards: expected grid to end it, or delete it")
    needs = [_needs(each, planned, search, out) for each in shard.all]
    return {
        "shards": shard.of,
        "merged": False,
        "allowances": [sum(need.values()) for need in needs],
        "set_aside": {stage: sum(need[stage] for need in needs) for stage in STAGES},
    }


def _needs(shard: Shard, planned: Sequence[Planned], search: Search | None, out: Path) -> dict[str, int]:
    """FLOPs by stage that a shard has yet to spend; of a search at most, all in one stage: the dearest of its cells
    may be those that go on."""
    if search:
        return dict.fromkeys(STAGES, 0) | {"training": search.needed(out, shard.cells(search))}
    needs = [_to_do(one, out) for one in shard.part(planned)]
    return {stage: sum(need[stage] for need in needs) for stage in STAGES}


def _kept(runs: Sequence[Planned], search: Search | None, out: Path, name: str) -> Iterable[tuple[str, str, Any]]:
    """What the files of some runs stand for: FLOPs by stage, by run and cell of a ledger."""
    if search:
        return search.kept(out, name)
    return [(name, one.run.cell.name, one.within(out).kept()) for one in runs]


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


def _undebited(
    own: Ledger, shard: Shard, planned: Sequence[Planned], search: Search | None, out: Path, name: str
) -> int:
    """FLOPs that the runs' files stand for and the shard's ledger does not: a power cut may lose the last debits."""
    found, mine = 0, {one.run.cell.name: one.within(out) for one in shard.part(planned)}
    for run, cell, flops in _kept(shard.part(planned), search, out, name):
        row = own.latest(run, cell) if cell in mine else None
        if row is None and (cell not in mine or mine[cell].finished):  # by an earlier run, without shards
            continue
        found += max(0, sum(flops.values()) - (sum(row[stage] for stage in STAGES) if row else 0))
    return found
