"""The streams and the text of a command line, as odd as they may be. Without torch."""

import io
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress

from experiments.verbs.arguments import PATHS


def open_streams() -> None:
    """Put /dev/null in the place of a standard stream that is closed, and print what it lacks a letter for escaped.

    A file that is opened next would take the number of a closed one, and get what libraries print.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def say(line: str) -> None:
    """Print to stderr, which may be as full as what the line is about: the exit code says the same."""
    with suppress(OSError):
        print(line, file=sys.stderr)


def check_text(argv: Sequence[str], args: Namespace) -> None:
    """Raise ValueError for an argument that could not be written into a run's records, or is no path."""
    for text in argv:
        if any(0xD800 <= ord(c) < 0xE000 for c in text):  # what Python makes of a byte that it cannot decode
            raise ValueError(f"{text!a} on the command line: expected text in {sys.getfilesystemencoding()}")
    for name in PATHS:  # "" is the current folder
        if vars(args).get(name) == "":
            raise ValueError(f"{name} is empty: expected a path")
