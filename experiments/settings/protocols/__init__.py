"""Protocols: how a report, or this project by default, goes about the whole task; a TOML file each.

NAME.toml has [settings], whose names are those of `Settings`; [[footnote]], what a reader has to know of
its ways; and for a report [claimed], the numbers it printed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.run_folder.files import read_toml
from experiments.settings.record import Settings

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Protocol:
    """A protocol file: its settings, and its text as it stands, which a run keeps a copy of."""

    name: str
    settings: Settings
    text: str


def names() -> list[str]:
    """The protocols there are."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> Protocol:
    """Read a protocol by name.

    Raises:
        ValueError: there is none of that name, or its file is no protocol; the message names both.
    """
    if name not in names():
        raise ValueError(f"protocol is {name!r}: expected one of {', '.join(names())}")
    path = FOLDER / f"{name}.toml"
    tables: dict[str, Any] = read_toml(path)
    try:
        given = tables.get("settings", {})
        if not isinstance(given, dict):
            raise ValueError(f"settings is {given!r:.200}: expected a table")
        settings = Settings().updated({"protocol": name} | given)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    return Protocol(name, settings, path.read_text(encoding="utf-8"))
