"""Verbs that train cells: `grid`, `train`."""

import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from experiments.accounting.ledger import STAGES
from experiments.report.forecasts import draw_shown
from experiments.run_folder import table
from experiments.run_folder.cells import lowest
from experiments.settings.record import Settings
from experiments.study.grid import following, write_results
from experiments.study.plan import Plan
from experiments.study.run import run_stages
from experiments.study.search import Search
from experiments.study.shards import Shard, merge, run_shard
from experiments.training import board, speed
from experiments.verbs.common import RECORDS, gather, ledger_of, logs, print_json, watched, wrote

CELLS = ("results.md", *RECORDS, "figures/", "cells/*/adapter/")


def grid(args: Namespace) -> None:
    out = Path(getattr(args, "out", "runs/grid"))
    if hasattr(args, "merge") and not hasattr(args, "config") and (out / "config.toml").is_file():
        args.config = out / "config.toml"
    settings = gather(args)
    if results := _run(args, settings, out):
        best = lowest(results[1:])["cell"]
        if (out / "cells" / best / "evaluation").is_dir():
            draw_shown(out, f"cells/{best}", out / "figures" / "forecasts.png", settings.label)
        _logged(args, out)
        print((out / "results.md").read_text("utf-8"))
        wrote(out, *CELLS, *(["cells.csv"] if settings.seeds > 1 else []), ledger=ledger_of(args))


def train(args: Namespace) -> None:
    given, out = gather(args), Path(getattr(args, "out", "runs/train"))
    one = {"lr": given.learning_rates[-1:], "ranks": given.ranks[-1:]}
    alone = {"over": (), "rungs": (), "seeds": 1, "forecast_cells": getattr(args, "forecast_cells", False)}
    if results := _run(args, given.updated(one | alone), out):
        _logged(args, out)
    if results and hasattr(args, "json"):
        print_json(results[1] | {"untrained_validation_loss": results[0]["validation_loss"], "out": str(out)})
    elif results:
        r = results[1]
        print(
            f"{r['label'] + ': ' if r['label'] else ''}{r['cell']}: validation loss {r['validation_loss']:.4f} nats "
            f"per token after {r['steps']} steps (untrained {results[0]['validation_loss']:.4f}); "
            f"FLOPs {sum(r['flops'].values()):,}; adapter in {out / 'cells' / r['cell'] / 'adapter'}"
        )
        print("its {}: {}".format(*following(out, r["cell"])))
        wrote(out, *CELLS, ledger=ledger_of(args))


def _logged(args: Namespace, out: Path) -> None:
    if logs(args):
        board.finish(out)
        print(f"curves: tensorboard --logdir {shlex.quote(str(out / board.FOLDER))}", file=sys.stderr)


def _run(args: Namespace, settings: Settings, out: Path) -> list[dict[str, Any]]:
    """Run the cells, or a shard of them, or merge shards; the results where the grid is whole."""
    shard, ledger, allow_drift = Shard(*getattr(args, "shard", (1, 1))), ledger_of(args), hasattr(args, "allow_drift")
    if hasattr(args, "dry_run"):
        _price(settings, shard, hasattr(args, "json"))
        return []
    if hasattr(args, "merge"):
        merge(settings, out, ledger)
        return write_results(settings, out)
    with closing(watched(args, settings, out)) as progress:
        if hasattr(args, "shard"):
            waits = run_shard(settings, out, ledger, progress, shard, args.group, allow_drift)
            merge_it = f"grid --merge --out {shlex.quote(str(out))}"
            then = f"run each again: the rung at step {waits} waits for other shards" if waits else merge_it
            print(f"shard {shard} of the grid in {out}; when all have run: {then}")
            return []
        run_stages(settings, out, ledger, progress, ("grid",), args.group, allow_drift)
    return args.group.first(write_results, settings, out) or []


def _price(settings: Settings, shard: Shard, as_json: bool) -> None:
    """What each cell costs, and about how long all take."""
    plan = Plan(settings)
    if settings.rungs:
        return _price_search(settings, plan, as_json)
    cells = {one.run.cell.name: one.flops for one in shard.part(plan.stage("grid"))}
    kinds = {kind: sum(flops[kind] for flops in cells.values()) for kind in STAGES}
    total = sum(kinds.values())
    if as_json:
        taken = speed.seconds(settings, plan.config, kinds)
        print_json({"cells": cells, "total": total, "budget": settings.budget, "estimated_seconds": taken})
        return
    rows = [("cell", *STAGES), *((name, *(f"{n:,}" for n in flops.values())) for name, flops in cells.items())]
    _say(settings, plan, rows, kinds, settings.at_most)


def _price_search(settings: Settings, plan: Plan, as_json: bool) -> None:
    """What a search costs at most, rung by rung."""
    search = Search(plan)
    rungs = [
        {"steps": steps, "cells": cells} | flops
        for steps, cells, flops in zip(search.rungs, search.sizes, search.prices(), strict=True)
    ]
    rungs.insert(0, {"steps": 0, "cells": 1} | search.untrained.training)
    kinds = {kind: sum(row[kind] for row in rungs) for kind in ("training", "validation")}
    total = sum(kinds.values())
    if as_json:
        taken = speed.seconds(settings, plan.config, kinds)
        found = {"rungs": rungs, "cells": [one.run.cell.name for one in search.cells], "total": total}
        print_json(found | {"budget": settings.budget, "estimated_seconds": taken})
        return
    print(", ".join(one.run.cell.name for one in search.cells))
    columns = "steps", "cells", *kinds
    _say(
        settings,
        plan,
        [("rung", *columns[1:]), *([f"{row[c]:,}" for c in columns] for row in rungs)],
        kinds,
        "at most ",
    )


def _say(settings: Settings, plan: Plan, rows: Sequence[Sequence[str]], kinds: Mapping[str, int], most: str) -> None:
    """Print prices as a table, their sum by the budget, and about how long all takes."""
    print(*table.aligned(rows, left=1), sep="\n")
    total = sum(kinds.values())
    share = f"{total / settings.budget:.2%} of the budget of {settings.budget:.3g}"
    print(f"together {most}{total:,} FLOPs (coursework), {share}")
    print(speed.estimate(settings, plan.config, kinds))
