"""Verbs that read records, without torch: `status`, `budget`."""

from argparse import Namespace
from pathlib import Path

from experiments.accounting.ledger import BUDGET, Ledger, bar, table
from experiments.run_folder.status import status as status_of
from experiments.run_folder.status import text
from experiments.verbs.common import ledger_of, print_json


def status(args: Namespace) -> None:
    found = status_of(Path(args.run))
    if hasattr(args, "json"):
        print_json(found.as_json())
    else:
        print(text(found))


def budget(args: Namespace) -> None:
    path = ledger_of(args)
    if not path.is_file():
        raise ValueError(f"{path}: no such ledger: expected a folder in which 'grid', 'train' or 'evaluate' ran")
    with Ledger(path, getattr(args, "budget", BUDGET)) as ledger:
        if hasattr(args, "json"):
            print_json(ledger.as_json())
        else:
            print(table(ledger), bar(ledger), sep="\n\n")
