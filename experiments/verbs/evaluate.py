"""Verbs that forecast: `evaluate`, `forecast`."""

from argparse import Namespace
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import frames
from experiments import plots
from experiments.accounting.ledger import Ledger
from experiments.forecasting import density, future, judge, naive, scores
from experiments.forecasting.density import Density
from experiments.forecasting.evaluate import evaluate as charged
from experiments.forecasting.evaluate import priced, settled
from experiments.forecasting.forecast import Forecasts, check_draft
from experiments.forecasting.scores import QUANTILES
from experiments.run_folder import files
from experiments.settings.record import Settings
from experiments.task.model import prepare, trained
from experiments.task.task import Task
from experiments.training.progress import Report, counting
from experiments.verbs.common import adapter_of, gather, ledger_of, print_json, wrote


def evaluate(args: Namespace) -> None:
    settings, adapter = gather(args), adapter_of(args)
    out = Path(args.out) if hasattr(args, "out") else None
    if out:
        files.check_own(out / "evaluation", judge.TABLES)
    if args.part not in ("validation", "test"):
        raise ValueError(f"--part is {args.part!r}: expected validation or test")
    task, model = prepare(settings, adapter)
    parts = {part: task.forecast_systems(part) for part in (args.part, "shown")}
    systems = list(dict.fromkeys([*parts[args.part], *parts["shown"]]))
    task.check(systems)
    asked = ledger_of(args), f"evaluate {adapter or settings.model}", "evaluate"
    made, losses, expected = settled(task, model, systems, *asked, doing="evaluate", validate=True)
    with closing(Report(1)) as report:
        far = partial(counting, report, "evaluate")
        plain = {part: naive.forecasts(task, chosen, far(f"law fits, {part}")) for part, chosen in parts.items()}
    result = losses | {"validation_tokens": task.validation_windows.real_tokens}
    tables = judge.tables(task, made, plain, parts, result, expected, adapter)
    evaluation = tables["evaluation.json"]
    rated = [row for row in tables["scores.csv"] if (row["part"], row["unit"]) == (args.part, "raw")]
    if out:
        judge.write(out / "evaluation", tables)
        _draw(task, made.at(0, len(task.origins)).of(parts["shown"]), out / "figures" / "forecasts.png")
    if hasattr(args, "json"):
        print_json(evaluation | {"scores": rated} | ({"out": str(out)} if out else {}))
        return
    print(judge.table(evaluation, rated, args.part))
    if out:
        wrote(out, "evaluation/", "figures/forecasts.png", ledger=ledger_of(args))


def forecast(args: Namespace) -> None:
    settings, adapter = replace(gather(args), origins=1), adapter_of(args)
    if not settings.data and not {"system", "series", "all"} & vars(args).keys():
        raise ValueError(
            "forecast has no data: expected --data FILE; or --system N, of the data set rebuilt by its law"
        )
    if not hasattr(args, "system") or frames.reads(Path(settings.data)):
        return _ahead(args, settings, adapter)
    path = Path(getattr(args, "out", f"forecast-{args.system}.png"))
    files.check_file(path)
    task, model = prepare(settings, adapter, needs_split=False)
    check_draft(task, args.draft)
    task.check([args.system], scored=False)
    expected, dense = priced(task, model, [args.system], draft=args.draft), hasattr(args, "density")
    if dense and not settings.constrained:
        raise ValueError("density with free text: expected constrained")
    most = {"inference": density.priced(task, model.config, args.system, **trained(model)) if dense else 0}
    with closing(Report(1)) as report, Ledger(ledger_of(args), settings.budget) as ledger:
        run, cell = f"forecast {adapter or settings.model}", f"system {args.system}"
        far, draft = partial(counting, report, "forecast"), args.draft
        reserved = ledger.reserve(run, f"{cell} density", most) if dense else 0
        made, _, entry = charged(task, model, [args.system], expected, ledger, run, cell, draft=draft, progress=far)
        ledger.settle(entry)
        flops, found = sum(made.flops.values()), list[Density]()
        if dense:
            found, took = density.densities(task, model, args.system, _written(task, made, made.values))
            ledger.spend(reserved, "inference", took)
            ledger.settle(reserved)
            flops += took
    _draw(task, made, path, found)
    if found:
        files.write_json(path.with_suffix(".density.json"), _densities(task, made, found))
    plain = naive.forecasts(task, [args.system])
    values, unparsed = scores.filled(made.values, plain["persistence"])
    print(
        f"{settings.label + ': ' if settings.label else ''}system {args.system} ({task.shape_of(args.system)}), "
        f"{settings.points} points -> {settings.horizon}, raw units, {settings.judged}; "
        f"{unparsed.sum()} steps did not parse; {task.alpha_rule}"
    )
    known = settings.horizon - int(np.isnan(made.truth[0, :, 0]).sum())
    if known < settings.horizon:
        scored = f"the errors are of the {known} steps that it holds" if known else "there is no truth, so no error"
        print(f"the data ends after {len(task.dataset.time)} points: {scored}")
        print(" ".join(f"{name:>10}" for name in ("time", *task.dataset.names)))
        for time, row in zip(task.time[settings.points :], made.values[0], strict=True):
            print(" ".join(f"{value:10.5g}" for value in (time, *row)))
    if known:
        mse = {}
        for name, guess in {"model": values, **plain}.items():
            errors = scores.errors(made.truth[:, :known], guess[:, :known])
            mse[name] = errors["mse"]
            print(f"{name:16} MSE {errors['mse']:.4f}  MAE {errors['mae']:.4f}")
        print(scores.verdict(mse, series=1))
    beside = f" and {path.with_suffix('.density.json')}" if found else ""
    print(f"written: {path}{beside}; {flops:,} FLOPs (coursework) charged to {ledger_of(args)}")


MOST_DRAWN = 12  # series of a figure


def _ahead(args: Namespace, settings: Settings, adapter: Path | None) -> None:
    """The future of series, after the last point of each, as a CSV and a figure."""
    path = Path(getattr(args, "out", f"forecast-{args.system}.png" if hasattr(args, "system") else "forecast.png"))
    table = path.with_suffix(".csv")
    _check_free(settings, path, table)
    if hasattr(args, "density"):
        raise ValueError("density of a forecast beyond the data: expected --system, of HDF5")
    task, model = prepare(settings, adapter, needs_split=False, ahead=True)
    systems = _chosen(args, task)
    check_draft(task, args.draft)
    task.check(systems, scored=False)
    asked = ledger_of(args), f"forecast {adapter or settings.model}", "ahead"
    made, *_ = settled(task, model, systems, *asked, draft=args.draft)
    files.write_csv(table, rows := future.rows(task, made))
    _draw(task, made.of(systems[:MOST_DRAWN]), path)
    every = len(task.dataset.series)
    print(
        f"{settings.label + ': ' if settings.label else ''}{len(systems)} of {every} series of {task.dataset.path} "
        f"({task.dataset.source}), up to {settings.points} points -> {settings.horizon}, {settings.judged}; "
        f"{np.isnan(made.values).any(-1).sum()} steps did not parse; {task.alpha_rule}"
    )
    shown = rows[: settings.horizon * len(task.dataset.names)]
    names = [name for name in shown[0] if shown[0][name] is not None]
    print(" ".join(f"{name[:20]:>20}" for name in names))
    for row in shown:
        cells = (f"{cell:.6g}" if isinstance(cell, float) else str(cell)[:20] for cell in map(row.get, names))
        print(" ".join(f"{cell:>20}" for cell in cells))
    if len(rows) > len(shown):
        print(f"... and {len(rows) - len(shown)} rows more")
    some = f" (of {MOST_DRAWN} series)" * (len(systems) > MOST_DRAWN)
    some += "; --all forecasts every series" * (len(systems) < every and not hasattr(args, "series"))
    flops = f"{sum(made.flops.values()):,} FLOPs (coursework) charged to {ledger_of(args)}"
    print(f"written: {table}, {path}{some}; {flops}")


def backtest(args: Namespace) -> None:
    """Forecasts after several cut-offs of every series, counted back from its end, beside copies, scored."""
    settings, adapter = gather(args), adapter_of(args)
    out = Path(getattr(args, "out", "backtest"))
    _check_free(settings, *(out / name for name in ("backtest.csv", "scores.csv", "forecasts.png")))
    task, model = prepare(settings, adapter, needs_split=False)
    systems = _chosen(args, task) if hasattr(args, "series") else list(range(len(task.dataset.series)))
    task.check(systems)
    asked = ledger_of(args), f"backtest {adapter or settings.model}", "backtest"
    made, *_ = settled(task, model, systems, *asked, doing="backtest")
    with closing(Report(1)) as report:
        plain = naive.forecasts(task, systems, counting(report, "backtest", "law fits"))
    rows, text = judge.backtest(task, made, plain)
    files.write_csv(out / "backtest.csv", future.windows(task, made, plain, (50, 80)))
    files.write_csv(out / "scores.csv", rows)
    _draw(task, made.at(settings.origins - 1, settings.origins).of(systems[:MOST_DRAWN]), out / "forecasts.png")
    print(
        f"{settings.label + ': ' if settings.label else ''}{len(systems)} series of {task.dataset.path} "
        f"({task.dataset.source}), {settings.origins} origins, up to {settings.points} points -> {settings.horizon}, "
        f"raw units, {settings.judged}; {np.isnan(made.values).any(-1).sum()} steps did not parse; {task.alpha_rule}\n"
    )
    print(text)
    print(f"FLOPs (coursework): {sum(made.flops.values()):,}")
    wrote(out, "backtest.csv", "scores.csv", "forecasts.png", ledger=ledger_of(args))


def _check_free(settings: Settings, *paths: Path) -> None:
    """Raise ValueError for a place that cannot be written to, or is the data's."""
    for path in paths:
        files.check_file(path)
        if settings.data and path.resolve() == Path(settings.data).resolve():
            raise ValueError(f"{path}: is the data, and would be written over: expected another --out")


def _chosen(args: Namespace, task: Task) -> list[int]:
    """The series that were asked for, by number."""
    if hasattr(args, "all"):
        return list(range(len(task.dataset.series)))
    if not hasattr(args, "series"):
        return [getattr(args, "system", 0)]
    known = {task.called(i): i for i in range(len(task.dataset.series))}
    if missing := [name for name in args.series if name not in known]:
        some = ", ".join(f"{name!r:.60}" for name in [*known][:5])
        raise ValueError(f"{task.dataset.path}: has no series {missing[0]!r:.60}: expected such as {some}")
    return list(dict.fromkeys(known[name] for name in args.series))


def _written(task: Task, made: Forecasts, values: NDArray[np.float64]) -> str:
    """The text of the first step of values (1, h, V) of the one system that was forecast."""
    return task.codec.encode(values[0, :1] / task.alphas[made.systems[0]])


def _densities(task: Task, made: Forecasts, found: Sequence[Density]) -> dict[str, Any]:
    """The density of each variable in the first step of a forecast, scored where the truth, as written, is known."""
    system, first = made.systems[0], task.settings.points
    truth: list[float | None] = [None] * len(found)
    if not np.isnan(made.truth[0, 0]).any():
        numbers = _written(task, made, made.truth).rstrip(";").split(",")
        truth = [task.codec.value(number) * float(task.alphas[system]) for number in numbers]
    every = {name: one.record(y) for name, one, y in zip(task.dataset.names, found, truth, strict=True)}
    return {"system": system, "time": float(task.time[first])} | every


def _draw(task: Task, made: Forecasts, path: Path, found: Sequence[Density] = ()) -> None:
    """Every forecast in one figure, with bands where several were drawn, and of one system its densities."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings, bands = task.settings, made.quantiles
    systems = [
        {
            "title": f"{'' if task.dataset.frame else 'system '}{task.called(system)} ({task.shape_of(system)})",
            "time": task.time,
            "context": made.context[i],
            "truth": made.truth[i],
            "forecast": made.values[i],
            "quantiles": None if bands is None else dict(zip(QUANTILES, bands[:, i], strict=True)),
        }
        for i, system in enumerate(made.systems)
    ]
    if len(systems) > 1:
        plots.forecast_grid(systems, task.dataset.names, path, f"Forecasts, {settings.judged}", settings.label)
    else:
        densities = [(one.values, one.probabilities) for one in found]
        names = task.dataset.names
        plots.forecast(**systems[0], names=names, path=path, label=settings.label, densities=densities)
