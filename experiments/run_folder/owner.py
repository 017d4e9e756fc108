"""Which process works in a run's folder: RUN/.lock keeps a second one out, RUN/.owner says who is inside, and at what.

Without torch, so that `status` is quick.
"""

import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock

from experiments.run_folder import files
from experiments.run_folder.folder import Record

NAME = ".owner"
_KINDS = {"process": int, "host": str, "started": str, "runs": list, "flops": int}
RECORDS = (
    *("config.toml", "protocol.toml", "plan.json", "study.json", "preprocessing.json", "results.csv", "results.md"),
    *("flops.csv", "accounting.csv", "accounting.json", "report.html", "report.md", "flops.html"),
)
"""What a run writes into its folder, besides manifest.json: where neither that nor a lock is, it is somebody else's."""
NAMELESS = 200  # tries for a lock whose holder has no name, of a twentieth of a second


@dataclass(frozen=True)
class Owner:
    """What `.owner` says. The file is written when a process comes, and when its work begins; it goes with it.

    runs: the folders of the runs that it works at, in their order. flops: how many those stood at when it began, and
    left: how many it had at most still to spend; -1 where that is what is predicted of the runs.
    """

    process: int
    host: str
    started: str
    runs: tuple[str, ...] = ()
    flops: int = 0
    left: int = -1

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    @property
    def alive(self) -> bool | None:
        """Whether the process lives; None for one of another machine, which cannot be asked from here."""
        if self.host != platform.node():
            return None
        return bool(self.started) and start_marker(self.process) == self.started

    def write(self, out: Path) -> None:
        files.write_json(out / NAME, asdict(self))


def owner_of(out: Path) -> Owner | None:
    """Who is in a folder, or was when it was killed; None for nobody. Raises a one-line ValueError for a damaged file.

    Only the file is read: to try the lock could refuse a run that comes in that moment."""
    record = Record(out / NAME)
    if not record.there:
        return None
    files.check(record.path, record.held, _KINDS, {"left": int})
    runs = {f"run {number}": run for number, run in enumerate(record.held["runs"], 1)}
    files.check(record.path, runs, dict.fromkeys(runs, str))
    return Owner(**record.held | {"runs": tuple(runs.values())})


class Claim:
    """A folder that this process holds."""

    def __init__(self, out: Path):
        self.out = out
        self.begins((), 0)

    def begins(self, runs: Sequence[str], flops: int, left: int = -1) -> None:
        """Say at which runs the work begins now, how many FLOPs they stand at, and how many are left (see `Owner`)."""
        me = os.getpid()
        Owner(me, platform.node(), start_marker(me), tuple(runs), flops, left).write(self.out)


@contextmanager
def claimed(out: Path, wait: float = 0.0) -> Iterator[Claim]:
    """Hold a run's folder for this process; a second one is refused, after `wait` seconds, by the name of the first."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file: expected a folder for the run")
    if not any((out / name).exists() for name in (".lock", "manifest.json")):
        for path in (out / name for name in RECORDS if (out / name).exists()):
            raise ValueError(f"{path}: is not of a run, which would write over it: expected another --out")
    lock = filelock.FileLock(out / ".lock")
    with files.writing(lock.lock_file):
        out.mkdir(parents=True, exist_ok=True)
        for more in range(NAMELESS, -1, -1):
            try:
                lock.acquire(timeout=wait)
                break
            except NotImplementedError:
                message = f"{out}: its file system has no locks (flock): expected one that keeps two apart"
                raise OSError(message) from None
            except filelock.Timeout:
                if (who := _who(out)) or not more:
                    who = who or "another process"
                    raise ValueError(f"{out}: {who} is at work in it: expected a folder of its own") from None
                wait = 0.05  # its name is written just after the lock is taken, and goes just before that is free
    try:
        yield Claim(out)
    finally:
        with suppress(OSError):
            (out / NAME).unlink()
        lock.release()


def _who(out: Path) -> str:
    """The name of the process that holds a folder, or nothing where it is not written."""
    with suppress(ValueError):
        if (owner := owner_of(out)) and owner.alive is not False:
            return str(owner)
    return ""


def start_marker(pid: int) -> str:
    """Return what tells a process from a later one of its number: "" if it is dead, "?" if none can tell."""
    if Path("/proc/self/stat").exists():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name can hold blanks
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return ""
        return "" if stat[0] in "ZX" else f"{boot} {stat[19]}"  # state; start, in ticks since boot
    try:
        ps = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True)
    except OSError:
        return "?"
    state, _, start = ps.stdout.strip().partition(" ")
    return "" if state.startswith("Z") else start.strip()
