"""What several verbs do alike. Without torch, until settings are gathered."""

import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.verbs.arguments import LEDGER

if TYPE_CHECKING:
    from experiments.settings.record import Settings
    from experiments.training.board import Board
    from experiments.training.parallel import Mute
    from experiments.training.progress import Report

RECORDS = ("results.csv", "flops.csv")


def gather(args: Namespace) -> "Settings":
    """The settings of a command line: the protocol's, a named adapter's, those of --config, then the flags."""
    from experiments.settings import protocols
    from experiments.settings.record import FORECASTER, Settings

    given = vars(args)
    settings = protocols.load(given["protocol"]).settings if "protocol" in given else Settings()
    if adapter_of(args) == FORECASTER / "adapter":
        settings = Settings.from_toml(FORECASTER / "config.toml", settings)
    if "config" in given:
        settings = Settings.from_toml(given["config"], settings)
    names = Settings.__dataclass_fields__.keys() & given.keys()
    settings = settings.updated({name: given[name] for name in names})
    if "merge" not in given:  # which computes nothing
        settings.check_device()
    return settings.shorten(given["scale"]) if "scale" in given else settings


def adapter_of(args: Namespace) -> Path | None:
    """The folder of --adapter, which may be a name."""
    from experiments.settings.record import FORECASTER

    named = getattr(args, "adapter", None)
    return FORECASTER / "adapter" if named == "forecaster" else Path(named) if named else None


def ledger_of(args: Namespace) -> Path:
    """Where FLOPs are charged."""
    return Path(getattr(args, "ledger", LEDGER))


def watched(args: Namespace, settings: "Settings", out: Path) -> "Report | Board | Mute":
    """What shows how far a run is, with --log in TensorBoard too; of a group, on the first rank alone."""
    from experiments.training.board import Board, check
    from experiments.training.parallel import Mute
    from experiments.training.progress import Report

    if logs(args):
        check()
    report = args.group.first(Report, settings.batch_size, settings.label, out)
    return Mute() if report is None else Board(report, out) if logs(args) else report


def logs(args: Namespace) -> bool:
    if (log := getattr(args, "log", None)) not in (None, "tensorboard"):
        raise ValueError(f"log is {log!r:.60}: expected tensorboard")
    return log is not None


def wrote(out: Path, *names: str, ledger: Path | None = None) -> None:
    """Say what was written into a folder, of what may be, and where its FLOPs were charged."""
    there = ", ".join(name for name in names if (out / name).exists())
    print(f"written to {out}: {there}" + (f"; FLOPs charged to {ledger}" if ledger else ""))


def print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))
