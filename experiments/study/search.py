"""A search: the grid's cells by successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943, section 3).

All cells train up to the first rung, and the best part of them goes on to the next, each from its own checkpoint, so
that a run of the last rung is to the bit that of `train`. What a cell is judged by is a copy of its run at a rung,
validated; with warmup-stable-decay the copy decays first, so that it ends as a whole run of so many steps would, and
the run itself goes on with the rate as it was. Linear and cosine fall over the steps of the last rung.

RUN/cells/<name>/  rungs/<steps>/<name>/   a cell's run, and its copy at a rung: each a `RunFolder`
"""

import math
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.run_folder import files
from experiments.run_folder.errors import RunFailed
from experiments.run_folder.folder import RunFolder
from experiments.settings import schedule
from experiments.study.plan import Plan, Planned, Run
from experiments.training.cell import less, predicted

Flops = dict[str, int]


class Search:
    """The runs of a search and their prices.

    cells: of every cell its run up to the last rung. judged: by rung and cell, the run that the cell is judged by,
    which at the last rung is the cell's own. before: by rung and cell, FLOPs by stage of the cell's run up to the rung
    before. sizes: how many cells train to each rung.
    """

    def __init__(self, plan: Plan):
        settings = plan.settings
        self.rungs = settings.rungs
        self.untrained, *self.cells = plan.stage("grid")
        copies = [plan.of(_copy(one.run, rung) for one in self.cells) for rung in self.rungs[:-1]]
        self.judged = [*copies, self.cells]
        self.before: list[list[Flops]] = [[{}] * len(self.cells)]
        for rung in self.rungs[:-1]:
            self.before.append([predicted(one.task, one.run.cell, plan.config, rung) for one in self.cells])
        self.sizes = [len(self.cells)]
        for _ in self.rungs[1:]:  # 1e-9: a part such as 0.29 is not exact
            self.sizes.append(max(1, math.floor(self.sizes[-1] * settings.survivors + 1e-9)))

    def price(self, rung: int, cell: int) -> Flops:
        """FLOPs by stage of a cell from one rung, counted from 0, to the next, its copy there included."""
        return less(self.judged[rung][cell].training, self.before[rung][cell])

    def prices(self) -> list[Flops]:
        """At most how many FLOPs each rung takes, by stage: the dearest cells may be those that go on."""
        found = []
        for rung, size in enumerate(self.sizes):
            every = sorted((self.price(rung, cell) for cell in range(len(self.cells))), key=lambda p: sum(p.values()))
            found.append({stage: sum(price[stage] for price in every[-size:]) for stage in every[0]})
        return found

    def needed(self, out: Path, mine: Collection[int] | None = None) -> int:
        """At most how many FLOPs are still to be spent in a folder, on all cells or on some."""
        rung, left = self.standing(out)
        left = [cell for cell in left if mine is None or cell in mine]
        untrained = (mine is None or 0 in mine) and not self.untrained.within(out).finished
        found = [sum(self.untrained.training.values())] * untrained
        if rung < len(self.rungs):
            found += [self._left(out, rung, cell) for cell in left]
        for later in range(rung + 1, len(self.rungs)):
            found += sorted(sum(self.price(later, cell).values()) for cell in left)[-self.sizes[later] :]
        return sum(found)

    def total(self, out: Path) -> int:
        """At most how many FLOPs the search takes in all, less those of cells that failed."""
        return self.needed(out) + sum(sum(flops.values()) for _, _, flops in self.kept(out, ""))

    def kept(self, out: Path, name: str) -> Iterator[tuple[str, str, Flops]]:
        """What the files of a search stand for: FLOPs by stage, by run and cell of a ledger that names the run `name`.

        Not that of cells that failed, whose last step no file has.
        """
        yield name, self.untrained.run.cell.name, self.untrained.within(out).kept()
        for rung, steps in [*enumerate(self.rungs[:-1]), (-1, 0)]:
            for cell, one in enumerate(self.judged[rung]):
                folder, shared = one.within(out), self.before[rung + 1][cell] if steps else {}
                if folder.kept() and not folder.failure.exists():
                    yield f"{name}/rungs/{steps}" if steps else name, one.run.cell.name, less(folder.kept(), shared)

    def standing(self, out: Path) -> tuple[int, list[int]]:
        """The first rung that is not judged, or how many there are, and the cells that train to it."""
        left = list(range(len(self.cells)))
        for rung in range(len(self.rungs)):
            if any(self.loss(out, rung, cell) is None for cell in left):
                return rung, left
            left = self.survivors(out, rung, left)
        return len(self.rungs), left

    def survivors(self, out: Path, rung: int, cells: Sequence[int]) -> list[int]:
        """Those that go on after a rung, or the best one after the last; of equal losses the first cell's wins.

        Raises:
            RunFailed: every cell has failed.
        """
        losses = {cell: loss for cell in cells if (loss := self.loss(out, rung, cell)) not in (None, math.inf)}
        if not losses:
            raise RunFailed(f"{out}: every cell failed before step {self.rungs[rung]}: expected one to go on")
        return sorted(sorted(losses, key=losses.__getitem__)[: [*self.sizes, 1][rung + 1]])

    def loss(self, out: Path, rung: int, cell: int) -> float | None:
        """Of a cell at a rung: infinity where its run failed before, None where it is not there yet."""
        folder = self.judged[rung][cell].within(out)
        if folder.finished:
            return files.read_json(folder.result)["validation_loss"]
        failed = folder.failure.exists() or self.cells[cell].within(out).failure.exists()
        return math.inf if failed else None

    def reached(self, out: Path) -> list[int | None]:
        """By cell the last rung that it was judged at; None where it was not."""
        rungs = range(len(self.rungs) - 1, -1, -1)
        finished = [[one.within(out).finished for one in some] for some in self.judged]
        return [next((rung for rung in rungs if finished[rung][cell]), None) for cell in range(len(self.cells))]

    def runs(self, out: Path) -> list[Run]:
        """The untrained model, and of each cell the run that it was judged by last, or its own if none is yet."""
        rungs = self.reached(out)
        last = [self.cells[i] if rung is None else self.judged[rung][i] for i, rung in enumerate(rungs)]
        return [self.untrained.run, *(one.run for one in last)]

    def planned(self, out: Path) -> list[Planned]:
        """What `plan.json` has: the untrained model, and of each cell its run, or what it ended with: the copy after
        which it went no further, or which failed."""
        _, left = self.standing(out)
        found = [self.untrained]
        for cell, own in enumerate(self.cells):
            ways = [own, *(some[cell] for some in reversed(self.judged[:-1]))]
            ended = [one for one in ways if one.within(out).finished or one.within(out).failure.exists()]
            found.append(own if cell in left or not ended else ended[0])
        return found

    def copies(self, out: Path) -> list[Flops]:
        """FLOPs by stage of the copies at rungs that their cells went beyond, less what these share with the runs."""
        before = ((rung, cell) for cell, last in enumerate(self.reached(out)) for rung in range(last or 0))
        return [less(self.judged[rung][cell].training, self.before[rung + 1][cell]) for rung, cell in before]

    def record(self, out: Path, run: Run) -> dict[str, Any]:
        """The losses of a run's cell at the rungs, for the records: None where it has none."""
        cells = [one.run.cell for one in self.cells]
        found = {}
        for rung, steps in enumerate(self.rungs):
            loss = self.loss(out, rung, cells.index(run.cell)) if run.cell in cells else None
            found[f"loss_at_{steps}"] = None if loss == math.inf else loss
        return found

    def _left(self, out: Path, rung: int, cell: int) -> int:
        """FLOPs that a cell has yet to spend up to a rung that it trains to."""
        if self.loss(out, rung, cell) is not None:
            return 0
        one = self.judged[rung][cell]
        begun = one if one.within(out).path.is_dir() else self.cells[cell]
        files.recover_folder(begun.within(out).checkpoint)
        return sum(one.training.values()) - sum(begun.within(out).kept().values())


def _copy(run: Run, rung: int) -> Run:
    """The run that a cell is judged by at a rung before the last: trained so far, and decayed."""
    settings, folder = run.settings, f"rungs/{rung}/{run.cell.name}"
    steps, first = settings.steps, schedule.whole(settings.warmup, settings.steps)
    if settings.schedule != "warmup-stable-decay":  # the copy makes no step
        return replace(
            run, folder=folder, settings=settings.updated({"steps": rung, "schedule": "constant", "warmup": 0})
        )
    begins = steps - schedule.whole(settings.decay, steps)
    if not first <= rung <= begins:
        raise ValueError(
            f"rungs is {rung} before the last, where the rate of {run.cell.name} is not stable: "
            f"expected {first} to {begins}"
        )
    last = schedule.whole(settings.decay, rung)
    changes = {"steps": rung + last, "warmup": first, "decay": last}
    return replace(run, folder=folder, settings=settings.updated(changes))


def branch(trunk: RunFolder, folder: RunFolder) -> None:
    """Copy a paused run, at whose checkpoint the copy then begins; once."""
    files.recover_folder(folder.path)
    if not folder.path.is_dir():
        folder.path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_folder(folder.path) as new:
            shutil.copytree(trunk.path, new, dirs_exist_ok=True)
