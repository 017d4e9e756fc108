"""The verbs of the book: `docs` builds it, `exercise` checks an answer."""

import os
import subprocess
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

from experiments.run_folder.errors import RunFailed

ROOT = Path(__file__).parents[2]
NEEDED = ("sphinx", "myst_nb")


def docs(args: Namespace) -> None:
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(f"{' and '.join(missing)} not installed: expected them, by pip install -e '.[docs]'")
    from experiments.run_folder.files import write_text

    source, out = ROOT / "docs", Path(getattr(args, "out", ROOT / "build" / "docs"))
    if not (source / "conf.py").is_file():
        raise ValueError(f"{source}: no conf.py: expected a checkout, as a plain install has no book")
    write_text(source / "tour.ipynb", notebook((source / "tour.md").read_text(encoding="utf-8")))
    # All anew, as what a page shows can change where the page does not.
    command = [sys.executable, "-m", "sphinx", "-q", "-E", "-a", "-W", "--keep-going", "-j", str(os.cpu_count() or 1)]
    if subprocess.run([*command, str(source), str(out)]).returncode:
        raise RunFailed("the book has an error, said above: expected none")
    print(out / "index.html")


def notebook(text: str) -> str:
    """A notebook in Markdown as Jupyter's file, without outputs; read as the book's build reads it."""
    import nbformat
    from myst_nb.core.read import read_myst_markdown_notebook

    made = read_myst_markdown_notebook(text)
    del made.metadata["file_format"]
    for number, cell in enumerate(made.cells):
        cell.id = str(number)  # not a random one
    return nbformat.writes(made) + "\n"


def exercise(args: Namespace) -> int:
    """1 where an answer is wrong, else 0."""
    from experiments.book.checks import read
    from experiments.book.exercises import EXERCISES

    if not hasattr(args, "number"):
        for number, one in EXERCISES.items():
            print(f"{number:6}{one.question.partition('. ')[0]}")
        return 0
    if args.number not in EXERCISES:
        raise ValueError(f"there is no exercise {args.number!r:.20}: expected one of {', '.join(EXERCISES)}")
    one = EXERCISES[args.number]
    if hasattr(args, "solution"):
        print(one.solution)
    elif not hasattr(args, "answer"):
        print(f"{one.question}\n\nAnswer with Python: an expression, or a file.py that sets `answer`.")
    elif wrong := one.check(read(args.answer)):
        print(f"{args.number} not yet: {wrong}\nhint: {one.hint}")
        return 1
    else:
        print(f"{args.number} right")
    return 0
