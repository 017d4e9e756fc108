"""The lines that one would type next, as the program that proposes them was started itself."""

import shlex
import sys
from pathlib import Path

MODULE = "python -m experiments.run"


def program() -> str:
    """What runs a verb here: the installed program where that was typed, else the module."""
    return "qwen-min" if Path(sys.argv[0]).stem == "qwen-min" else MODULE


def command(*words: object) -> str:
    """A line for the shell."""
    return f"{program()} {shlex.join(map(str, words))}"
