"""Verbs of a whole study: `study`, its stages one by one, `report`."""

import math
from argparse import Namespace
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from experiments import report as page
from experiments.accounting.ledger import STAGES as LEDGER_STAGES
from experiments.run_folder.command import command
from experiments.settings.record import Settings
from experiments.study.plan import CONTROLS, STAGES, Plan, prices
from experiments.study.run import run_stages
from experiments.training import board, speed
from experiments.training.progress import Report, counting
from experiments.verbs.common import RECORDS, gather, ledger_of, logs, print_json, watched, wrote

PAGE = ("report.html", "report.md", "flops.html", "figures/", "tables/")


def study(args: Namespace) -> None:
    _run(args, (*STAGES, *(CONTROLS if hasattr(args, "controls") else ())))


def stage(args: Namespace) -> None:
    _run(args, (args.verb,))


def report(args: Namespace) -> None:
    out, others = Path(args.run), [Path(other).expanduser() for other in getattr(args, "compare", ())]
    for run in (out, *others):
        if not (run / "config.toml").is_file():
            raise ValueError(f"{run}: has no config.toml: expected the folder of a study or a grid")
    if others:
        print(page.build_comparison(out, others))
        wrote(out, "compare.html", "compare.md", "tables/")
        return
    with closing(Report(1)) as progress:
        print(page.build(out, counting(progress, "page", "figures")))
    wrote(out, *PAGE)


def _run(args: Namespace, stages: Sequence[str]) -> None:
    """Run stages of a study in its folder; its page is made after the last."""
    if not hasattr(args, "protocol"):
        args.protocol = "default"  # under what a --config says
    settings = gather(args)
    if hasattr(args, "dry_run"):
        _price(settings, stages, hasattr(args, "json"))
        return
    out, ledger = Path(getattr(args, "out", f"runs/study-{settings.protocol}")), ledger_of(args)
    whole = len(stages) > 1
    with closing(watched(args, settings, out)) as progress:
        run_stages(settings, out, ledger, progress, stages, args.group, hasattr(args, "allow_drift"))
        if whole and not args.group.rank:
            page.build(out, counting(progress, "page", "figures"))
    if logs(args) and not args.group.rank:
        board.finish(out)
    print(out / "report.html" if whole else f"its page: {command('report', out)}")
    wrote(out, *(PAGE if whole else ()), *RECORDS, "study.json", ledger=ledger)


def _price(settings: Settings, stages: Sequence[str], as_json: bool) -> None:
    """What every stage costs, whether all fits the budget, and if not how long a final run would."""
    plan = Plan(settings)
    rows, left = prices(plan, stages)
    total = sum(row["total"] for row in rows)
    fits = total <= settings.budget
    if as_json:
        found = {"stages": rows, "total": total, "budget": settings.budget, "fits": fits}
        print_json(found | {"final_steps_that_fit": left})
        return
    print(f"{'stage':10} {'runs':>4} {'steps':>7} {'training':>24} {'validation':>22} {'inference':>22}")
    for row in rows:
        amounts = f"{row['training']:24,} {row['validation']:22,} {row['inference']:22,}"
        print(f"{row['stage']:10} {row['runs']:4} {row['steps']:7,} {amounts}")
    print(
        f"together {settings.at_most}{total:,} FLOPs (coursework), {total / settings.budget:.2%} of the budget of "
        f"{settings.budget:.3g}, if the largest rank and context are carried forward: "
        + ("it fits" if fits else "IT DOES NOT FIT")
    )
    if left is not None:
        print(f"final run: {settings.final_steps:,} steps planned, {left:,} would fit beside the other stages")
    if not fits:
        print(f"all stages shortened: --scale {math.floor(100 * settings.budget / total) / 100:g} would about fit")
    print(speed.estimate(settings, plan.config, {kind: sum(row[kind] for row in rows) for kind in LEDGER_STAGES}))
