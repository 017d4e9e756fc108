"""What ends a run with an exit code of its own; apart, so that the command line need not import the training."""

FAILURE = "failure.json"
"""In a run's folder: why it failed, and after which step. Gone once the run is started again."""

LONGEST_LINE = 480


class RunFailed(RuntimeError):
    """The run cannot go on: its loss or gradient is not finite."""


def one_line(text: str) -> str:
    """`text` as one line of printable characters, short enough to read: a file chooses parts of what is said of it.

    Of a long one the beginning, which names the file, and the end, which says what was expected, stay.
    """
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
    if len(line) <= LONGEST_LINE:
        return line
    return f"{line[: LONGEST_LINE - 205]} ... {line[-200:]}"
