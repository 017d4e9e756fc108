"""The command line: `python -m experiments.run VERB`.

Exit codes: 0 done; 2 bad input (one line on stderr); 3 over the budget; 4 the run or the machine failed: a loss that is
not finite, no memory, a disk that is full or cannot be written; 130 interrupted.
"""

import argparse
import io
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from experiments import parallel
from experiments.arguments import LEDGER, parser


def _gather(args: argparse.Namespace):
    """The `Settings` of a command line."""
    from experiments import protocols
    from experiments.settings import Settings

    given = vars(args)
    settings = protocols.load(given["protocol"]).settings if "protocol" in given else Settings()
    if "config" in given:
        settings = Settings.from_toml(given["config"], settings)
    names = Settings.__dataclass_fields__.keys() & given.keys()
    settings = settings.updated({name: given[name] for name in names})
    if "merge" not in given:  # which computes nothing
        settings.check_device()
    return settings.shorten(given["scale"]) if "scale" in given else settings


def main(argv: Sequence[str] | None = None) -> int:
    _open_streams()
    try:
        first = not parallel.rank()  # of the processes that torchrun started: it speaks for all
    except ValueError as e:
        _say(str(e))
        return 2
    if not first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    args = parser().parse_args(argv)
    # Threads that wait should sleep: spinning, which is OpenMP's default, two busy processes on two cores made each
    # other ten times slower (889 for 10,380 tokens/s, pocket model). Read when torch is imported, below. In small
    # letters: OpenMP reads it by the locale, and where Turkish is spoken I is no capital i.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Imported behind the parser: --help and a mistyped flag need no torch.
    from experiments import files
    from experiments.budget import BudgetExceeded
    from experiments.errors import RunFailed, one_line

    trains = args.verb in parallel.VERBS and not ({"dry_run", "merge"} & vars(args).keys())
    try:
        _check_text(sys.argv[1:] if argv is None else argv, args)
        with _terminable(), parallel.joined(args.verb, trains) as args.group, args.group.together():
            _VERBS[args.verb](args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt as e:
        if first:
            _say(str(e) or "interrupted; the same command goes on where it stopped")
        return 130
    except BrokenPipeError:  # the reader of stdout has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, RunFailed) as e:
        if getattr(args, "debug", False):
            raise
        named = files.unwritable(e.filename or "a file", e) if isinstance(e, OSError) and e.errno else e
        if first:
            _say(one_line(str(named)))
        return 3 if isinstance(e, BudgetExceeded) else 4 if isinstance(named, (RunFailed, OSError)) else 2
    except (RuntimeError, MemoryError) as e:
        lost, full = parallel.lost(e), _out_of_memory(e)
        if getattr(args, "debug", False) or not (lost or full):
            raise
        if lost and first:
            _say("another process of the group has ended: expected all to run to the end")
        elif full:  # on one rank, perhaps: the others see that it has ended
            said = " ".join(str(e).split())[:200] or "none is left"
            _say(f"{args.verb}: not enough memory ({said}): expected {_SMALLER}")
        return 4


def _open_streams() -> None:
    """Put /dev/null in the place of a standard stream that is closed, and print what it lacks a letter for escaped.

    A file that is opened next would take the number of a closed one, and get what libraries print.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _say(line: str) -> None:
    """Print to stderr, which may be as full as what the line is about: the exit code says the same."""
    with suppress(OSError):
        print(line, file=sys.stderr)


def _check_text(argv: Sequence[str], args: argparse.Namespace) -> None:
    """Raise ValueError for an argument that could not be written into a run's records, or is no path."""
    for text in argv:
        if any(0xD800 <= ord(c) < 0xE000 for c in text):  # what Python makes of a byte that it cannot decode
            raise ValueError(f"{text!a} on the command line: expected text in {sys.getfilesystemencoding()}")
    for name in ("out", "adapter", "ledger", "config", "data", "model", "run"):  # "" is the folder that one stands in
        if vars(args).get(name) == "":
            raise ValueError(f"{name} is empty: expected a path")


_SMALLER = "smaller --batch-size, --context, --rank or --forecast-series, --dtype bfloat16, or a machine with more"


def _out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: Python's or numpy's error, torch's own, or what its allocator on the CPU says."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "not enough memory" in text
        or "can't allocate memory" in text
    )


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end what runs as Ctrl-C does; where a cell trains, both wait for its step (see `train.stoppable`)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number, frame) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _study(args) -> None:
    from experiments.study import STAGES

    _stages(args, STAGES)


def _stage(args) -> None:
    _stages(args, (args.verb,))


def _stages(args, stages: Sequence[str]) -> None:
    """Run stages of a study in its folder; its page is made behind the last."""
    from experiments import report
    from experiments.progress import Report
    from experiments.study import run_stages

    if not hasattr(args, "protocol"):
        args.protocol = "default"  # under what a --config says
    settings = _gather(args)
    if getattr(args, "dry_run", False):
        _price(settings, stages, getattr(args, "json", False))
        return
    out = Path(getattr(args, "out", f"runs/study-{settings.protocol}"))
    progress = args.group.first(Report, settings.batch_size, settings.label) or parallel.Mute()
    try:
        ledger = Path(getattr(args, "ledger", LEDGER))
        run_stages(settings, out, ledger, progress, stages, args.group, getattr(args, "allow_drift", False))
    finally:
        progress.close()
    if args.group.rank:
        return
    again = f"{out}; its page: python -m experiments.run report {shlex.quote(str(out))}"
    print(report.build(out) if stages[-1] == "final" else again)


def _price(settings, stages: Sequence[str], as_json: bool) -> None:
    """What every stage costs, whether all fits the budget, and if not how long a final run would."""
    from experiments import study

    rows, left = study.prices(settings, stages)
    total = sum(row["total"] for row in rows)
    rate = _product_rate(settings)
    fits = total <= settings.budget
    if as_json:
        _print_json(
            {"stages": rows, "total": total, "budget": settings.budget, "fits": fits, "final_steps_that_fit": left}
        )
        return
    print(f"{'stage':10} {'runs':>4} {'steps':>7} {'training':>24} {'validation':>22} {'inference':>22}")
    for row in rows:
        amounts = f"{row['training']:24,} {row['validation']:22,} {row['inference']:22,}"
        print(f"{row['stage']:10} {row['runs']:4} {row['steps']:7,} {amounts}")
    print(
        f"together {total:,} FLOPs (coursework), {total / settings.budget:.2%} of the budget of {settings.budget:.3g}, "
        f"if the largest rank and context are carried forward: {'it fits' if fits else 'IT DOES NOT FIT'}"
    )
    if left is not None:
        print(f"final run: {settings.final_steps:,} steps planned, {left:,} would fit beside the other stages")
    if not fits:
        print(f"all stages shortened: --scale {math.floor(100 * settings.budget / total) / 100:g} would about fit")
    print(_estimate(total / rate, rate))


def _report(args) -> None:
    from experiments import report

    if not (Path(args.run) / "config.toml").is_file():
        raise ValueError(f"{args.run}: has no config.toml: expected the folder of a study or a grid")
    print(report.build(Path(args.run)))


def _grid(args) -> None:
    from experiments.grid import markdown

    out = Path(getattr(args, "out", "runs/grid"))
    if hasattr(args, "merge") and not hasattr(args, "config") and (out / "config.toml").is_file():
        args.config = out / "config.toml"
    settings = _gather(args)
    results = _run_cells(args, settings, out)
    if results:
        print(markdown(settings, results, out))


def _train(args) -> None:
    given = _gather(argparse.Namespace(**{k: v for k, v in vars(args).items() if k not in ("lr", "rank")}))
    lr = getattr(args, "lr", given.learning_rates[-1])
    rank = getattr(args, "rank", given.ranks[-1])
    out = Path(getattr(args, "out", "runs/train"))
    results = _run_cells(args, given.updated({"lr": (lr,), "ranks": (rank,)}), out)
    if results and getattr(args, "json", False):
        _print_json(results[1] | {"untrained_validation_loss": results[0]["validation_loss"], "out": str(out)})
    elif results:
        r = results[1]
        print(
            f"{r['label'] + ': ' if r['label'] else ''}{r['cell']}: validation loss {r['validation_loss']:.4f} nats "
            f"per token after {r['steps']} steps (untrained {results[0]['validation_loss']:.4f}); "
            f"FLOPs {sum(r['flops'].values()):,}; adapter in {out / 'cells' / r['cell'] / 'adapter'}"
        )


def _run_cells(args, settings, out: Path) -> list[dict[str, Any]]:
    from experiments.grid import write_results
    from experiments.progress import Report
    from experiments.shards import Shard, merge, run_shard
    from experiments.study import prepare, price, run_stages, runs_of

    shard, ledger = Shard(*getattr(args, "shard", (1, 1))), Path(getattr(args, "ledger", LEDGER))
    allow_drift = getattr(args, "allow_drift", False)
    if getattr(args, "dry_run", False):
        task, config = prepare(settings)
        cells = [(run.cell, price(task, config, run)["training"]) for run in shard.part(runs_of(settings, "grid"))]
        _dry_run(settings, cells, as_json=getattr(args, "json", False))
        return []
    if hasattr(args, "merge"):
        merge(settings, out, ledger)
        return write_results(settings, out)
    report = args.group.first(Report, settings.batch_size, settings.label) or parallel.Mute()
    try:
        if hasattr(args, "shard"):
            run_shard(settings, out, ledger, report, shard, args.group, allow_drift)
        else:
            run_stages(settings, out, ledger, report, ("grid",), args.group, allow_drift)
    finally:
        report.close()
    if hasattr(args, "shard"):
        print(f"shard {shard} of the grid in {out}; when all have run: grid --merge --out {shlex.quote(str(out))}")
        return []
    return args.group.first(write_results, settings, out) or []


def _dry_run(settings, cells, as_json: bool) -> None:
    total = sum(sum(flops.values()) for _, flops in cells)
    rate = _product_rate(settings)
    if as_json:
        _print_json(
            {
                "cells": {cell.name: flops for cell, flops in cells},
                "total": total,
                "budget": settings.budget,
                "estimated_seconds": total / rate,
            }
        )
        return
    print(f"{'cell':16} {'training':>22} {'validation':>20}")
    for cell, flops in cells:
        print(f"{cell.name:16} {flops['training']:22,} {flops['validation']:20,}")
    print(
        f"together {total:,} FLOPs (coursework), {total / settings.budget:.2%} of the budget of {settings.budget:.3g}"
    )
    print(_estimate(total / rate, rate))


def _estimate(seconds: float, rate: float) -> str:
    from experiments.status import duration

    return (
        f"about {duration(seconds, 'minutes')} here, if products run at the {rate / 1e9:.0f} GFLOP/s that one of "
        "1024 x 1024 just did; small models take longer. Nothing was run."
    )


def _product_rate(settings) -> float:
    """FLOP/s of a square float32 product on this machine, the best of three."""
    import torch

    a = torch.ones(1024, 1024, device=settings.device, dtype=settings.compute_dtype)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - began)
    return 2 * 1024**3 / min(seconds[1:])


def _evaluate(args) -> None:
    from experiments import evaluate, files, judge, naive
    from experiments.budget import Ledger
    from experiments.train import validation_loss
    from qwen_min import FlopMeter

    settings, adapter = _gather(args), getattr(args, "adapter", None)
    if hasattr(args, "out"):
        files.check_own(Path(args.out) / "evaluation", judge.TABLES)
    if args.part not in ("validation", "test"):
        raise ValueError(f"--part is {args.part!r}: expected validation or test")
    task, model = evaluate.prepare(settings, adapter)
    parts = {part: task.forecast_systems(part) for part in (args.part, "shown")}
    systems = list(dict.fromkeys([*parts[args.part], *parts["shown"]]))
    task.check(systems)
    rank, bias = evaluate.rank_of(model), model.logit_bias is not None
    expected = evaluate.predicted(task, model.config, systems, rank, bias)
    expected["validation"] += evaluate.predicted_loss(task, model.config, rank, bias)
    with Ledger(getattr(args, "ledger", LEDGER), settings.budget) as ledger:
        entry = ledger.reserve(f"evaluate {adapter or settings.model}", "evaluate", expected)
        with FlopMeter() as meter:
            losses = validation_loss(model, task.validation_windows, settings.count_padding)
        ledger.spend(entry, "validation", meter.total)
        made = evaluate.forecast(task, model, systems)
        for stage, flops in made.flops.items():
            ledger.spend(entry, stage, flops)
        ledger.settle(entry)
    made.flops["validation"] += meter.total
    plain = naive.forecasts(task, systems)
    rows = {part: [systems.index(system) for system in chosen] for part, chosen in parts.items()}
    by_part = {part: {name: values[rows[part]] for name, values in plain.items()} for part in parts}
    result = losses | {"validation_tokens": task.validation_windows.real_tokens}
    tables = judge.tables(task, made, by_part, parts, result, expected, Path(adapter) if adapter else None)
    evaluation = tables["evaluation.json"]
    scores = [row for row in tables["scores.csv"] if (row["part"], row["unit"]) == (args.part, "raw")]
    if hasattr(args, "out"):
        judge.write(Path(args.out) / "evaluation", tables)
        _draw(task, made.of(parts["shown"]), Path(args.out) / "figures" / "forecasts.png")
    if getattr(args, "json", False):
        _print_json(evaluation | {"scores": scores})
    else:
        print(judge.table(evaluation, scores, args.part))


def _forecast(args) -> None:
    from experiments import evaluate, files, naive, scores
    from experiments.budget import Ledger

    settings, draft = _gather(args), args.draft
    path = Path(getattr(args, "out", f"forecast-{args.system}.png"))
    files.check_file(path)
    evaluate.check_draft(settings, draft)
    task, model = evaluate.prepare(settings, getattr(args, "adapter", None))
    task.check([args.system])
    adapter = getattr(args, "adapter", None)
    with Ledger(getattr(args, "ledger", LEDGER), settings.budget) as ledger:
        rank, bias = evaluate.rank_of(model), model.logit_bias is not None
        expected = evaluate.predicted(task, model.config, [args.system], rank, bias, draft)
        entry = ledger.reserve(f"forecast {adapter or settings.model}", f"system {args.system}", expected)
        made = evaluate.forecast(task, model, [args.system], draft)
        for stage, flops in made.flops.items():
            ledger.spend(entry, stage, flops)
        ledger.settle(entry)
    _draw(task, made, path)
    plain = naive.forecasts(task, [args.system])
    values, unparsed = scores.filled(made.values, plain["persistence"])
    print(
        f"{settings.label + ': ' if settings.label else ''}system {args.system} ({task.shape_of(args.system)}), "
        f"{settings.points} points -> {settings.horizon}, raw units, {settings.judged}; "
        f"{unparsed.sum()} steps did not parse"
    )
    for name, guess in {"model": values, **plain}.items():
        errors = scores.errors(made.truth, guess)
        print(f"{name:16} MSE {errors['mse']:.4f}  MAE {errors['mae']:.4f}")
    print(f"{path}; {sum(made.flops.values()):,} FLOPs (coursework)")


def _draw(task, made, path: Path) -> None:
    """Every forecast in one figure, with bands where several were drawn."""
    from experiments import plots
    from experiments.scores import QUANTILES

    path.parent.mkdir(parents=True, exist_ok=True)
    settings, bands = task.settings, made.quantiles
    systems = [
        {
            "title": f"system {system} ({task.shape_of(system)})",
            "time": task.dataset.time[: settings.points + settings.horizon],
            "context": made.context[i],
            "truth": made.truth[i],
            "forecast": made.values[i],
            "quantiles": None if bands is None else dict(zip(QUANTILES, bands[:, i], strict=True)),
        }
        for i, system in enumerate(made.systems)
    ]
    names, title = task.dataset.names, f"Forecasts, {settings.judged}"
    if len(systems) > 1:
        plots.forecast_grid(systems, names, path, title, settings.label)
    else:
        one = systems[0]
        shown = {key: one[key] for key in ("time", "context", "truth", "forecast", "title", "quantiles")}
        plots.forecast(**shown, names=names, path=path, label=settings.label)


def _data(args) -> None:
    from experiments.preprocessing import preprocessing
    from experiments.task import Task
    from qwen_min import Tokenizer

    settings = _gather(args)
    tokenizer = Tokenizer.from_pretrained(settings.model, settings.revision or None, settings.offline)
    task = Task.prepare(settings, tokenizer)
    dataset, worked = task.dataset, preprocessing(task)
    print(f"{dataset.path}: {dataset.source}; series {dataset.series.shape}; sha256 {dataset.digest}")
    print(
        f"train {len(task.split.train)} / validation {len(task.split.validation)} / test {len(task.split.test)} "
        f"systems, {settings.split}; {worked['alpha_rule']}; {settings.decimals} decimals"
    )
    for example in worked["examples"]:
        print(
            f"\nsystem {example['system']}, first {example['points']} of {dataset.series.shape[1]} points "
            f"({', '.join(example['names'])})"
        )
        for name in ("raw", "scaled"):
            print(f"{name:7}", "  ".join("(" + ", ".join(f"{v:.4f}" for v in row) + ")" for row in example[name]))
        print("text   ", example["text"])
        print("tokens ", example["ids"])
    trip, tokens = worked["round_trip"], len(task.tokens(int(task.split.train[0])))
    print(
        f"\nround trip of {trip['series']} series: largest error {trip['max_abs_error_scaled']:.3g} scaled (half a "
        f"unit is {trip['half_unit_scaled']:g}), {trip['max_abs_error_raw']:.3g} raw; a series is {tokens} tokens"
    )


def _flops_verb(args) -> None:
    from experiments import flops_table, protocols
    from experiments.predict import predict
    from qwen_min import QwenConfig
    from qwen_min.load import resolve

    name = getattr(args, "model", "Qwen2.5-0.5B")
    size = {"batch": 4, "context": 512, "rank": 0}
    if hasattr(args, "protocol"):
        settings = protocols.load(args.protocol).settings
        size = {"batch": settings.batch_size, "context": settings.context, "rank": settings.default_rank}
    size = {flag: getattr(args, flag, value) for flag, value in size.items()} | {"cache": args.cache}
    for flag, value in size.items():
        least = 0 if flag in ("rank", "cache") else 1
        if value < least:
            raise ValueError(f"--{flag} is {value}: expected at least {least}")
    if name.startswith("Qwen2.5-") and not Path(name).is_dir():
        config = QwenConfig.named(name)
    else:
        config = QwenConfig.from_file(resolve(name, offline=getattr(args, "offline", False)) / "config.json")
    batch, tokens, rank, cached = size.values()
    training = getattr(args, "train", False)
    meter = predict(config, batch, tokens, rank=rank, cached=cached, training=training, convention=args.convention)
    if hasattr(args, "plot"):
        from experiments import plots

        plots.flops_bars(meter.by_component(), args.plot, f"{name}: forward of {batch} x {tokens} tokens")
    question = {"model": name} | size
    if getattr(args, "json", False):
        _print_json(flops_table.as_json(meter, question))
        return
    print(
        f"{name}: {batch} x {tokens} tokens after {cached} cached, LoRA rank {rank} on q and v, "
        f"convention {args.convention}\n"
    )
    print(flops_table.table(meter, training, getattr(args, "per_layer", False)))


def _status(args) -> None:
    from experiments import status

    found = status.status(Path(args.run))
    if getattr(args, "json", False):
        _print_json(found.as_json())
    else:
        print(status.text(found))


def _budget(args) -> None:
    from experiments import budget

    path = Path(getattr(args, "ledger", LEDGER))
    if not path.is_file():
        raise ValueError(f"{path}: no such ledger: expected a folder in which 'grid', 'train' or 'evaluate' ran")
    with budget.Ledger(path, getattr(args, "budget", budget.BUDGET)) as ledger:
        if getattr(args, "json", False):
            _print_json(ledger.as_json())
        else:
            print(budget.table(ledger), budget.bar(ledger), sep="\n\n")


def _doctor(args) -> None:
    from experiments import doctor

    for line in doctor.lines(_gather(args)):
        print(line, flush=True)


def _generate(args) -> None:
    import torch

    from experiments.train import load_model
    from lora import load_adapter
    from qwen_min import Tokenizer
    from qwen_min.generate import stream

    settings = _gather(args)
    tokenizer = Tokenizer.from_pretrained(settings.model, settings.revision or None, settings.offline)
    model = load_model(settings)
    tokenizer.check_fits(model.config.vocab_size)
    if hasattr(args, "adapter"):
        load_adapter(model, args.adapter).eval()
    text = Tokenizer.chat([("user", args.prompt)]) if getattr(args, "chat", False) else args.prompt
    ids, stops = tokenizer.encode(text), set()
    if not ids:
        raise ValueError("--prompt is empty: expected text")
    for name in ("<|im_end|>", "<|endoftext|>"):
        stops.add(tokenizer.token_id(name))

    def new():
        for step in stream(
            model,
            torch.tensor([ids], device=model.device),
            args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.sample_seed,
        ):
            if (token := step.item()) in stops:
                return
            yield token

    for piece in tokenizer.stream(new()):
        print(piece, end="", flush=True)
    print()
    if settings.label:
        print(f"[{settings.label}]", file=sys.stderr)


def _bench(args) -> None:
    from experiments.bench import scaling, session, table
    from experiments.settings import POCKET
    from qwen_min.load import resolve

    given, scales = vars(args), hasattr(args, "scaling")
    named = ("repeats", "dtype", "device", "compile", "series", "draft", "quick", "peer")
    asked: dict[str, Any] = {"peer": "none"} if scales else {}
    asked |= {"repeats": 1, "series": 6} if hasattr(args, "quick") else {}
    asked |= {name: given[name] for name in named if name in given}
    if hasattr(args, "what"):
        asked["whats"] = tuple(name for names in args.what for name in names.split(",") if name)
    folder = resolve(getattr(args, "model", POCKET), offline=getattr(args, "offline", False))
    options, out = session.Options(folder, **asked), Path(getattr(args, "out", "runs")) / "bench"
    measure, text = (scaling.scale, table.scaling_text) if scales else (session.bench, table.text)
    report = measure(options, out, lambda line: print(f"bench: {line}", file=sys.stderr, flush=True))
    _print_json(report) if getattr(args, "json", False) else print(text(report))


def _pretrain_pocket(args) -> None:
    from experiments.pocket import pretrain
    from experiments.settings import POCKET

    options = {name: getattr(args, name) for name in ("steps", "seed") if hasattr(args, name)}
    out = Path(getattr(args, "out", POCKET))
    pretrain(out, progress=lambda line: print(line, file=sys.stderr, flush=True), **options)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


_VERBS = {
    "study": _study,
    "baseline": _stage,
    "default": _stage,
    "context": _stage,
    "final": _stage,
    "report": _report,
    "grid": _grid,
    "train": _train,
    "evaluate": _evaluate,
    "forecast": _forecast,
    "data": _data,
    "flops": _flops_verb,
    "status": _status,
    "budget": _budget,
    "doctor": _doctor,
    "generate": _generate,
    "bench": _bench,
    "pretrain-pocket": _pretrain_pocket,
}

if __name__ == "__main__":
    sys.exit(main())
