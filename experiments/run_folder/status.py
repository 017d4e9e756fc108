"""What is running, done, failed, how far, and the time left: from the files of a run's folder, while it runs.

RUN/plan.json (see `study.py`) says what was asked for; metrics.jsonl, result.json and evaluation.json of each run, how
far it is; failure.json, why it failed; .owner, which process works at it. Nothing is written and no lock is tried.
FLOPs are those that the records stand for; what kills wasted is in the ledger (`budget`). Without torch.
"""

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.run_folder import files
from experiments.run_folder.folder import Record, RunFolder
from experiments.run_folder.owner import NAME, Owner, owner_of
from experiments.run_folder.table import aligned

PLAN = "plan.json"
_SECONDS_IN = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}


@dataclass(frozen=True)
class Row:
    """A run: `step` of `steps`, its last losses in nats per token, FLOPs of those predicted, and why it failed.

    state: done; running; failed; paused, judged at a rung of a search and waiting for other cells; interrupted, which
    the same command takes up; or waiting, not begun.
    """

    name: str
    stage: str
    folder: str
    state: str
    step: int
    steps: int
    loss: float | None
    validation_loss: float | None
    flops: int
    predicted_flops: int
    error: str | None


@dataclass(frozen=True)
class Status:
    """A folder as a whole: its runs in their order, the processes at work, and the seconds they still need, or None.

    seconds_left: what a process has to do, at the FLOP/s that it had from its beginning to its last record, in which
    loading, validation and forecasts count; of several processes the longest. None, unknown, where none is at work or
    none has written a record yet. Runs that no process has taken on are not in it.
    copies, most: of a search the FLOPs of copies that cells were judged by at a rung and went beyond, less what they
    share with the cell's run, and the most that all can take, as the runs do not all go on to their ends.
    """

    folder: str
    runs: list[Row]
    at_work: list[str]
    seconds_left: float | None
    copies: int = 0
    most: int = 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | self.totals()

    def totals(self) -> dict[str, int]:
        """Runs done, and FLOPs spent of those predicted."""
        flops = sum(row.flops for row in self.runs) + self.copies
        return {
            "done": sum(row.state == "done" for row in self.runs),
            "flops": flops,
            "predicted_flops": max(flops, self.most or sum(row.predicted_flops for row in self.runs)),
        }


def status(out: Path) -> Status:
    """The state of a folder in which `study`, a stage of it, `grid`, its shards or `train` began.

    Raises:
        ValueError: nothing has begun in it, or a record is damaged.
    """
    planned, most = _planned(out)
    claims = [out, *sorted(path.parent for path in (out / "shards").glob(f"*-of-*/{NAME}"))]
    held = {claim: owner for claim in claims if (owner := owner_of(claim)) and owner.alive is not False}
    runs = {run["folder"]: _Records(out, run) for run in planned}
    current, times = set(), []
    for claim, owner in held.items():
        mine = [runs[folder] for folder in owner.runs if folder in runs]
        current.update([run.folder for run in mine if not run.done][:1])
        times.append(_seconds_left(owner, _written(claim / NAME), mine))
    known = [seconds for seconds in times if seconds is not None]
    return Status(
        str(out),
        [run.row(run.folder in current) for run in runs.values()],
        [f"{owner}{'' if owner.alive else ', unverified (another host)'}" for owner in held.values()],
        max(known) if known and len(known) == len(times) else None,
        sum(run.beyond(copy) for run in runs.values() for copy in out.glob(f"rungs/*/{run.run['name']}"))
        if most
        else 0,
        most,
    )


def text(found: Status) -> str:
    """A line for each run, and one for the whole."""
    lines = [("run", "state", "steps", "loss", "validation", "FLOPs", "of")]
    for row in found.runs:
        loss, validation = ("-" if n is None else f"{n:.4f}" for n in (row.loss, row.validation_loss))
        amounts = f"{row.flops:.3e}", f"{row.predicted_flops:.3e}"
        lines.append((row.name, row.state, f"{row.step}/{row.steps}", loss, validation, *amounts))
    errors = [f"{row.name} failed: {row.error}" for row in found.runs if row.error]
    total = found.totals()
    share = total["flops"] / max(1, total["predicted_flops"])
    left = "unknown" if found.seconds_left is None else f"about {duration(found.seconds_left)}"
    done = total["done"] == len(found.runs)
    whole = (
        f"{found.folder}: {total['done']} of {len(found.runs)} runs done, {total['flops']:.3e} of "
        f"{'at most ' * (found.most > total['flops'])}{total['predicted_flops']:.3e} FLOPs ({share:.1%}); "
        + ("at work: " + "; ".join(found.at_work) if found.at_work else "no process at work")
        + ("" if done else f"; time left: {left}")
    )
    return "\n".join([*aligned(lines, left=2), "", *errors, whole])


def duration(seconds: float, smallest: str = "seconds") -> str:
    """A length of time in the largest unit that it is more than two of, or in `smallest`: "3 hours", "90 minutes"."""
    unit = next(unit for unit, size in _SECONDS_IN.items() if unit == smallest or seconds > 2 * size)
    return f"{seconds / _SECONDS_IN[unit]:.0f} {unit}"


class _Records:
    """What the files of one run say."""

    def __init__(self, out: Path, run: dict[str, Any]):
        folder = RunFolder(out / run["folder"])
        self.run, self.folder, self.path, self.metrics = run, run["folder"], folder.path, folder.metrics
        evaluation, self.failure = folder.evaluated, Record(folder.failure)
        self.lines = files.read_jsonl(self.metrics) if self.metrics.is_file() else []
        judged = evaluation.held.get("parts", {})
        self.done = folder.finished and all(part in judged for part in run["parts"])
        self.flops = self._trained()
        self.flops += sum(evaluation.flops.values())
        self.predicted = sum(run["predicted"].values())
        self.left = 0 if self.done else max(0, self.predicted - self.flops)
        self.paused = RunFolder(out / "rungs" / str(self._last("step", int)) / run["name"]).finished
        self.written = max(_written(self.metrics), _written(evaluation.path))

    def row(self, current: bool) -> Row:
        holds = {"done": self.done, "running": current, "failed": self.failure.there}
        holds |= {"paused": self.paused, "interrupted": self.written > 0}
        state = next((name for name, held in holds.items() if held), "waiting")
        return Row(
            **{name: self.run[name] for name in ("name", "stage", "folder", "steps")},
            state=state,
            step=self._last("step", int) or 0,
            loss=self._last("loss", float),
            validation_loss=self._last("validation_loss", float),
            flops=self.flops,
            predicted_flops=self.predicted,
            error=str(self.failure.held.get("error")) if state == "failed" else None,
        )

    def beyond(self, copy: Path) -> int:
        """FLOPs of a copy at a rung, RUNG/NAME, less what it shares with this run; none where it is this run."""
        return 0 if copy == self.path else sum(RunFolder(copy).kept().values()) - self._trained(int(copy.parent.name))

    def _trained(self, step: int | None = None) -> int:
        """FLOPs of training and validation, of all that is recorded or up to a step."""
        return sum(self._last(kind, int, step) or 0 for kind in ("training", "validation"))

    def _last(self, name: str, kind: type, step: int | None = None) -> Any:
        """The last number of a name in the metrics, or the last up to a step; None if there is none."""
        for line in reversed(self.lines):
            if name in line and (step is None or line["step"] <= step):
                if type(line[name]) is kind:
                    return line[name]
                raise ValueError(f"{self.metrics}: {name} is {line[name]!r}: expected a number")
        return None


def stages_of(path: Path) -> dict[str, dict[str, Any]]:
    """The stages in a `plan.json`, by name, each with its runs. Raises ValueError, one line, where it is not whole."""
    kinds = {"name": str, "stage": str, "folder": str, "steps": int, "parts": list, "predicted": dict}
    try:
        stages = {stage["stage"]: stage for stage in Record(path).held["stages"]}
        for stage in stages.values():
            files.check(path, stage, {"stage": str, "runs": list}, {"flops": int})
        for run in (run for stage in stages.values() for run in stage["runs"]):
            files.check(path, run, kinds)
            files.check(path, run["predicted"], dict.fromkeys(run["predicted"], int))
    except (KeyError, TypeError):
        raise ValueError(f"{path}: is not as a run writes it: expected stages, each with its runs") from None
    return stages


def _planned(out: Path) -> tuple[list[dict[str, Any]], int]:
    """What was asked for, and the most FLOPs of a search; a folder that several stages share counts once, with most
    that is forecast."""
    path = out / PLAN
    if not path.is_file():
        raise ValueError(f"{out}: has no {PLAN}: expected the folder of a run that has begun")
    runs: dict[str, dict[str, Any]] = {}
    stages = stages_of(path).values()
    for run in (run for stage in stages for run in stage["runs"]):
        first = runs.setdefault(run["folder"], run)
        if len(run["parts"]) > len(first["parts"]):
            runs[run["folder"]] = run | {"stage": first["stage"]}
    return list(runs.values()), sum(stage.get("flops", 0) for stage in stages)


def _seconds_left(owner: Owner, began: float, mine: list[_Records]) -> float | None:
    seconds = max((run.written for run in mine), default=0.0) - began
    flops = sum(run.flops for run in mine) - owner.flops
    left = sum(run.left for run in mine) if owner.left < 0 else max(0, owner.left - flops)
    return left * seconds / flops if seconds > 0 and flops > 0 else None


def _written(path: Path) -> float:
    """When a file was last written, in seconds since 1970; 0 if it is not there."""
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0
