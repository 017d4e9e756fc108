"""Refuses every use of the network, and keeps a record of it, below Python's own socket module.

The events come from the interpreter's C code (`sys.addaudithook`), so no library written in Python can go around them.
Sockets within the machine (AF_UNIX) are let through. A process that finds REFUSE_NETWORK in its environment, as
`sitecustomize`, refuses from its first line on: see `in_children`.
"""

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_record: Path | None = None
_hooked = False


def _refuse(event: str, arguments: tuple) -> None:
    if _record is None or not event.startswith("socket.") or event == "socket.gethostname":
        return
    family = arguments[1] if event == "socket.__new__" else getattr(arguments[0], "family", None)
    if family == socket.AF_UNIX:
        return
    with open(_record, "a") as file:
        file.write(f"{event} {arguments[1:] if event != 'socket.getaddrinfo' else arguments[:2]}\n")
    raise OSError(errno.ENETUNREACH, "Network is unreachable")


def refuse(record: Path | None) -> None:
    """Refuse from now on, and write a line for each attempt into `record`; None lets all through again."""
    global _record, _hooked
    _record = record
    if not _hooked:
        sys.addaudithook(_refuse)  # for good: an audit hook cannot be taken off
        _hooked = True


@contextmanager
def refused(record: Path) -> Iterator[None]:
    record.touch()
    refuse(record)
    try:
        yield
    finally:
        refuse(None)


def in_children(folder: Path, record: Path) -> dict[str, str]:
    """The environment in which every Python process refuses too; `folder` is made for what it imports at its start."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(Path(__file__).read_text())
    return {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), "REFUSE_NETWORK": str(record)}


if "REFUSE_NETWORK" in os.environ and __name__ == "sitecustomize":
    refuse(Path(os.environ["REFUSE_NETWORK"]))
