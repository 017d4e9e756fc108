"""The command line: `python -m experiments.run VERB`.

Exit codes: 0 done; 1 `verify` found a difference, or `exercise` a wrong answer; 2 bad input (one line on stderr); 3
over the budget; 4 the run or the machine failed: a loss that is not finite, no memory, a disk that is full or cannot be
written; 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from experiments.training import parallel
from experiments.training.signals import terminable
from experiments.verbs.arguments import PATHS, parser
from experiments.verbs.terminal import check_text, open_streams, say


def main(argv: Sequence[str] | None = None) -> int:
    open_streams()
    try:
        first = not parallel.rank()  # of the processes that torchrun started: it speaks for all
    except ValueError as e:
        say(str(e))
        return 2
    if not first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    args = parser().parse_args(argv)
    for name in PATHS & vars(args).keys():  # a shell expands the ~ of "--out ~/x", not that of "--out=~/x"
        setattr(args, name, os.path.expanduser(getattr(args, name)))
    # Threads that wait should sleep: spinning, which is OpenMP's default, two busy processes on two cores made each
    # other ten times slower (889 for 10,380 tokens/s, pocket model). Read when torch is imported, below. In small
    # letters: OpenMP reads it by the locale, and where Turkish is spoken I is no capital i.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Imported after the parser: --help and a mistyped flag need no torch.
    from experiments.accounting.ledger import BudgetExceeded
    from experiments.run_folder import files
    from experiments.run_folder.errors import RunFailed, one_line

    trains = args.verb in parallel.VERBS and not ({"dry_run", "merge"} & vars(args).keys())
    try:
        check_text(sys.argv[1:] if argv is None else argv, args)
        with terminable(), _ways(args), parallel.joined(args.verb, trains) as args.group, args.group.together():
            code = _run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as e:
        if first:
            say(str(e) or "interrupted; the same command continues where it stopped")
        return 130
    except BrokenPipeError:  # the reader of stdout has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, RunFailed) as e:
        if getattr(args, "debug", False):
            raise
        named = files.unwritable(e.filename or "a file", e) if isinstance(e, OSError) and e.errno else e
        if first:
            say(one_line(str(named)))
        return 3 if isinstance(e, BudgetExceeded) else 4 if isinstance(named, (RunFailed, OSError)) else 2
    except (RuntimeError, MemoryError) as e:
        lost, full = parallel.lost(e), _out_of_memory(e)
        if getattr(args, "debug", False) or not (lost or full):
            raise
        if lost and first:
            say("another process of the group has ended: expected all to run to the end")
        elif full:  # on one rank, perhaps: the others see that it has ended
            said = " ".join(str(e).split())[:200] or "none is left"
            say(f"{args.verb}: not enough memory ({said}): expected {_SMALLER}")
        return 4


_SMALLER = "smaller --batch-size, --context, --rank or --forecast-series, --dtype bfloat16, or a machine with more"


def _out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: Python's or numpy's error, torch's own, or what its allocator on the CPU says."""
    by_type = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return by_type or any(said in str(error) for said in ("not enough memory", "can't allocate memory"))


@contextmanager
def _ways(args) -> Iterator[None]:
    """With --plain no fast way answers (see `qwen_min.fast`)."""
    if not hasattr(args, "plain"):
        yield
        return
    from qwen_min import fast

    fast.off()
    try:
        yield
    finally:
        fast.on()


VERBS = {
    **{"study": "study.study", "report": "study.report"},
    **dict.fromkeys(("baseline", "default", "context", "final"), "study.stage"),
    **{"grid": "grid.grid", "train": "grid.train"},
    **{"evaluate": "evaluate.evaluate", "forecast": "evaluate.forecast"},
    "backtest": "evaluate.backtest",
    **{"data": "inspect.data", "doctor": "inspect.doctor"},
    **{"flops": "flops.flops", "explain": "flops.explain"},
    **{"verify": "verify.verify", "docs": "book.docs", "exercise": "book.exercise"},
    **{"status": "records.status", "budget": "records.budget"},
    **{
        "generate": "model.generate",
        "export": "model.export",
        "bench": "model.bench",
        "pretrain-pocket": "model.pretrain_pocket",
    },
}
"""Where in `experiments.verbs` each verb's function is; its file is imported when it is asked for."""


def _run(args: argparse.Namespace) -> int:
    file, _, function = VERBS[args.verb].partition(".")
    return getattr(import_module(f"experiments.verbs.{file}"), function)(args) or 0


if __name__ == "__main__":
    sys.exit(main())
