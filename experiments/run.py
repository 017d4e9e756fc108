"""The command line: `python -m experiments.run VERB`.

Exit codes: 0 done; 2 bad input (one line on stderr); 3 over the budget; 4 the run failed; 130 interrupted.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

LEDGER = "ledger.sqlite"

_EXAMPLES = {
    "grid": "python -m experiments.run grid --model Qwen/Qwen2.5-0.5B-Instruct --steps 300 --dry-run",
    "train": "python -m experiments.run train --lr 5e-3 --rank 8 --steps 200 --out runs/one",
    "evaluate": "python -m experiments.run evaluate --adapter runs/grid/cells/lr0.01-r8/adapter",
    "forecast": "python -m experiments.run forecast --system 906 --adapter runs/grid/cells/lr0.01-r8/adapter",
    "data": "python -m experiments.run data --decimals 3",
    "flops": "python -m experiments.run flops --model Qwen2.5-7B --batch 4 --context 512 --rank 8 --train",
    "budget": "python -m experiments.run budget",
    "doctor": "python -m experiments.run doctor --model Qwen/Qwen2.5-0.5B-Instruct",
    "generate": "python -m experiments.run generate --prompt '1.00,0.50;1.20,0.60;' --max-new-tokens 50",
    "bench": "python -m experiments.run bench --model weights/pocket --what train generate",
    "pretrain-pocket": "python -m experiments.run pretrain-pocket --out weights/pocket",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}: see --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="experiments.run",
        description="Fine-tune Qwen2.5 to forecast series written as digits, "
        "under a budget of 10^17 FLOPs. Every verb has a --help with an example.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        p = verbs.add_parser(
            name, help=text, description=text, epilog=f"example: {_EXAMPLES[name]}", argument_default=argparse.SUPPRESS
        )
        p.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return p

    p = verb("grid", "train every learning rate x rank, then the table and figures")
    _settings(p, "data", "train", "lists")
    p.add_argument("--out", help="the run's folder (runs/grid)")
    p.add_argument("--dry-run", action="store_true", help="show cells, FLOPs and time; run nothing")

    p = verb("train", "train one learning rate and rank")
    _settings(p, "data", "train")
    p.add_argument("--lr", type=float, help="learning rate (1e-4; for the pocket model 1e-2)")
    p.add_argument("--rank", type=int, help="LoRA rank (8)")
    p.add_argument("--out", help="the run's folder (runs/train)")
    p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    p.add_argument("--dry-run", action="store_true", help="show FLOPs and time; run nothing")

    p = verb("evaluate", "validation loss, and forecasts scored beside naive ones")
    _settings(p, "data", "forecast")
    p.add_argument("--adapter", help="an adapter folder; none is the untrained model")
    p.add_argument("--out", help="a folder for evaluation.json and the figures of the first four forecasts")
    p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")

    p = verb("forecast", "forecast one system and draw it")
    _settings(p, "data", "forecast")
    p.add_argument("--adapter", help="an adapter folder; none is the untrained model")
    p.add_argument("--system", type=int, required=True, help="number of the series, from 0")
    p.add_argument("--out", help="the PNG to write (forecast-SYSTEM.png)")

    p = verb("data", "make or check the data set; two worked examples: raw, scaled, text, token ids")
    _settings(p, "data")

    p = verb("flops", "what a forward or a training step costs, formula by formula, without weights")
    p.add_argument("--model", help="Qwen2.5-0.5B ... Qwen2.5-72B, a folder or a hub id (Qwen2.5-0.5B)")
    p.add_argument("--batch", type=int, default=4, help="sequences (4)")
    p.add_argument("--context", type=int, default=512, help="new tokens of each (512)")
    p.add_argument("--rank", type=int, default=0, help="LoRA rank on q and v (0: no LoRA)")
    p.add_argument("--cache", type=int, default=0, help="tokens already in the KV cache (0)")
    p.add_argument("--train", action="store_true", help="the backward pass too")
    p.add_argument("--convention", default="coursework", help="coursework, exact or matmul (coursework)")
    p.add_argument("--per-layer", action="store_true", help="list every module")
    p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    p.add_argument("--plot", help="draw the components' shares into this PNG")
    p.add_argument("--offline", action="store_true", help="never open a connection")

    p = verb("budget", "what the ledger of this folder holds: spent, reserved, left")
    p.add_argument("--ledger", help=f"the ledger ({LEDGER})")
    p.add_argument("--budget", type=_flops, help="FLOPs (1e17)")
    p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")

    p = verb("doctor", "what is installed, cached and reachable, and what to do")
    _settings(p)

    p = verb("generate", "continue a prompt: the model as a model")
    _settings(p)
    p.add_argument("--prompt", required=True, help="the text to continue, or to answer with --chat")
    p.add_argument("--chat", action="store_true", help="put the prompt into Qwen's chat format")
    p.add_argument("--max-new-tokens", type=int, default=200, help="(200)")
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    p.add_argument("--top-p", type=float, default=1.0, help="nucleus of sampling (1)")
    p.add_argument("--sample-seed", type=int, default=0, help="of the samples (0)")
    p.add_argument("--adapter", help="an adapter folder")

    p = verb("bench", "training, evaluation, generation and loading beside transformers + PEFT, in fresh processes")
    p.add_argument("--model", help="a model's folder or hub id (weights/pocket)")
    p.add_argument("--what", nargs="+", default=["train"], help="train, evaluate, generate, load (train)")
    p.add_argument("--batch", type=int, default=4, help="sequences of a step (4)")
    p.add_argument("--context", type=int, default=512, help="tokens of each (512)")
    p.add_argument("--repeats", type=int, default=2, help="fresh processes of each side (2)")
    p.add_argument("--dtype", default="float32", help="that our weights are kept in: float32 or bfloat16 (float32)")
    p.add_argument("--no-peer", action="store_true", help="measure this project alone")
    p.add_argument("--offline", action="store_true", help="never open a connection")
    p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")

    p = verb("pretrain-pocket", "train the pocket checkpoint from scratch on synthetic series")
    p.add_argument("--out", help="the folder (weights/pocket)")
    p.add_argument("--steps", type=int, help="training steps")
    p.add_argument("--seed", type=int, help="of data and weights")
    return parser


def _settings(p: argparse.ArgumentParser, *groups: str) -> None:
    """Flags that change `Settings`; without a flag the TOML file or the default holds."""
    add = p.add_argument
    add("--model", help="a model's folder or hub id (weights/pocket)")
    add("--revision", help="of the hub's model: branch, tag or commit")
    add("--offline", action="store_true", help="never open a connection")
    add("--device", help="cpu or cuda (cpu)")
    add("--dtype", help="that the weights are kept in: float32 or bfloat16 (float32)")
    add("--config", help="a TOML file of settings, such as a run's config.toml; flags win over it")
    if "data" in groups or not groups:
        add("--data", help="an HDF5 file with /trajectories (systems, points, variables); rebuilt by its law if absent")
    if "data" in groups:
        add("--decimals", type=int, help="digits behind the point (2)")
        add("--alpha", type=float, help="series are divided by this (maximum of the training part / 9.99)")
    if "train" in groups:
        add("--steps", type=int, help="training steps of a cell (120)")
        add("--batch-size", type=int, help="windows of a step (4)")
        add("--val-every", type=int, help="steps between validations and checkpoints (30)")
        add("--dropout", type=float, help="on LoRA's input (0)")
        add("--preset", help="learning rates by name: reports or pocket")
    if "train" in groups or "forecast" in groups:
        add("--context", type=int, help="tokens of a window (512)")
        add("--val-series", type=int, help="series of the validation part that are used (20)")
        add("--seed", type=int, help="of data order, LoRA and dropout (0)")
        add("--budget", type=_flops, help="FLOPs of the whole ledger (1e17)")
        add("--ledger", help=f"the ledger of FLOPs ({LEDGER})")
    if "forecast" in groups:
        add("--points", type=int, help="points that a forecast sees (80)")
        add("--horizon", type=int, help="points that it makes (20)")
    if "lists" in groups:
        add("--lr", type=float, nargs="+", help="learning rates (1e-5 5e-5 1e-4; pocket's are 1e-3 5e-3 1e-2)")
        add("--ranks", type=int, nargs="+", help="LoRA ranks (2 4 8)")


def _flops(text: str) -> int:
    """A number of FLOPs, "100000000000000000" or "1e17", as the exact integer it names."""
    from decimal import Decimal, InvalidOperation

    try:
        number = Decimal(text)
        if number == number.to_integral_value() and 0 < number < 2**63:
            return int(number)
    except InvalidOperation:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of FLOPs, such as 1e17")


def _gather(args: argparse.Namespace):
    """The `Settings` of a command line."""
    from experiments.settings import Settings

    given = vars(args)
    settings = Settings.from_toml(given["config"]) if "config" in given else Settings()
    names = Settings.__dataclass_fields__.keys() & given.keys()
    return settings.updated({name: given[name] for name in names})


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    # Threads that wait should sleep: spinning, which is OpenMP's default, two busy processes on two cores made each
    # other ten times slower (889 for 10,380 tokens/s, pocket model). Read when torch is imported, below.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Imported behind the parser: --help and a mistyped flag need no torch.
    from experiments.budget import BudgetExceeded
    from experiments.errors import RunFailed

    try:
        _VERBS[args.verb](args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, RunFailed) as e:
        if getattr(args, "debug", False):
            raise
        print(" ".join(str(e).split()), file=sys.stderr)
        return 3 if isinstance(e, BudgetExceeded) else 4 if isinstance(e, RunFailed) else 2


def _grid(args) -> None:
    from experiments.grid import markdown

    settings, out = _gather(args), Path(getattr(args, "out", "runs/grid"))
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
    from experiments.grid import plan, run_grid
    from experiments.progress import Report

    if getattr(args, "dry_run", False):
        _dry_run(settings, plan(settings)[1], as_json=getattr(args, "json", False))
        return []
    report = Report(settings.batch_size * settings.context, settings.label)
    try:
        return run_grid(settings, out, Path(getattr(args, "ledger", LEDGER)), report)
    finally:
        report.close()


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
    print(
        f"about {total / rate / 60:.0f} minutes here, if products run at the {rate / 1e9:.0f} GFLOP/s that one of "
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
    from experiments import evaluate, files
    from experiments.budget import Ledger

    settings = _gather(args)
    task, model = evaluate.prepare(settings, getattr(args, "adapter", None))
    with Ledger(getattr(args, "ledger", LEDGER), settings.budget) as ledger:
        run = f"evaluate {getattr(args, 'adapter', settings.model)}"
        report, forecasts = evaluate.evaluate(task, model, task.validation_systems.tolist(), ledger, run)
    if hasattr(args, "out"):
        out = Path(args.out)
        files.write_json(out / "evaluation.json", report)
        for i in range(min(4, len(forecasts.systems))):
            _draw(task, forecasts, i, out / "figures" / f"forecast-{forecasts.systems[i]}.png")
    _print_json(report) if getattr(args, "json", False) else print(evaluate.table(report))


def _forecast(args) -> None:
    from experiments import evaluate
    from experiments.budget import Ledger
    from qwen_min import FlopMeter

    settings = _gather(args)
    task, model = evaluate.prepare(settings, getattr(args, "adapter", None))
    task.check([args.system])
    adapter, path = getattr(args, "adapter", None), Path(getattr(args, "out", f"forecast-{args.system}.png"))
    with Ledger(getattr(args, "ledger", LEDGER), settings.budget) as ledger:
        expected = evaluate.predicted(task, model, [args.system], loss=False)
        entry = ledger.reserve(f"forecast {adapter or settings.model}", f"system {args.system}", expected)
        with FlopMeter() as meter:
            forecasts = evaluate.forecast(task, model, [args.system])
        ledger.spend(entry, "inference", meter.total)
        ledger.settle(entry)
    _draw(task, forecasts, 0, path)
    scores = evaluate.scores(task, forecasts)
    print(
        f"{settings.label + ': ' if settings.label else ''}system {args.system}, {settings.points} points -> "
        f"{settings.horizon}, raw units; {forecasts.unparsed[0]} steps did not parse"
    )
    for name, score in scores.items():
        print(f"{name:16} MSE {score['mse']:.4f}  MAE {score['mae']:.4f}")
    print(f"{path}; {meter.total:,} FLOPs (coursework)")


def _draw(task, forecasts, i: int, path: Path) -> None:
    from experiments import plots

    path.parent.mkdir(parents=True, exist_ok=True)
    settings = task.settings
    plots.forecast(
        task.dataset.time[: settings.points + settings.horizon],
        forecasts.context[i],
        forecasts.truth[i],
        forecasts.values[i],
        task.dataset.names,
        path,
        f"System {forecasts.systems[i]}",
        settings.label,
    )


def _data(args) -> None:
    from experiments.task import Task
    from qwen_min import Tokenizer

    settings = _gather(args)
    tokenizer = Tokenizer.from_pretrained(settings.model, settings.revision or None, settings.offline)
    task = Task.prepare(settings, tokenizer)
    dataset, shown = task.dataset, 4
    print(f"{dataset.path}: {dataset.source}; series {dataset.series.shape}; sha256 {dataset.digest}")
    print(
        f"train {len(task.split.train)} / validation {len(task.split.validation)} / test {len(task.split.test)} "
        f"systems, in order; alpha {task.alpha:.6g}; {settings.decimals} decimals"
    )
    for system in (int(task.split.train[0]), int(task.split.train[1])):
        text = task.text(system, shown)
        print(f"\nsystem {system}, first {shown} of {dataset.series.shape[1]} points ({', '.join(dataset.names)})")
        for name, values in (("raw    ", dataset.series[system]), ("scaled ", task.scaled(system))):
            print(name, "  ".join("(" + ", ".join(f"{v:.4f}" for v in row) + ")" for row in values[:shown]))
        print("text   ", text)
        print("tokens ", tokenizer.encode(text))
    width = task.codec.step_width(dataset.series.shape[2])
    print(f"\na step is {width} tokens, a series {len(task.tokens(int(task.split.train[0])))}")


def _flops_verb(args) -> None:
    from experiments import flops_table
    from experiments.predict import predict
    from qwen_min import QwenConfig
    from qwen_min.load import resolve

    name = getattr(args, "model", "Qwen2.5-0.5B")
    for flag, least in (("batch", 1), ("context", 1), ("rank", 0), ("cache", 0)):
        if getattr(args, flag) < least:
            raise ValueError(f"--{flag} is {getattr(args, flag)}: expected at least {least}")
    if name.startswith("Qwen2.5-") and not Path(name).is_dir():
        config = QwenConfig.named(name)
    else:
        config = QwenConfig.from_file(resolve(name, offline=getattr(args, "offline", False)) / "config.json")
    training = getattr(args, "train", False)
    meter = predict(
        config,
        args.batch,
        args.context,
        rank=args.rank,
        cached=args.cache,
        training=training,
        convention=args.convention,
    )
    if hasattr(args, "plot"):
        from experiments import plots

        plots.flops_bars(meter.by_component(), args.plot, f"{name}: forward of {args.batch} x {args.context} tokens")
    question = {"model": name, "batch": args.batch, "context": args.context, "rank": args.rank, "cache": args.cache}
    if getattr(args, "json", False):
        _print_json(flops_table.as_json(meter, question))
        return
    print(
        f"{name}: {args.batch} x {args.context} tokens after {args.cache} cached, LoRA rank {args.rank} on q and v, "
        f"convention {args.convention}\n"
    )
    print(flops_table.table(meter, training, getattr(args, "per_layer", False)))


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
    from experiments import bench
    from experiments.settings import POCKET, Settings
    from qwen_min.load import resolve

    Settings(dtype=args.dtype)  # refuses an unknown type
    for flag in ("batch", "context", "repeats"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} is {getattr(args, flag)}: expected at least 1")
    if unknown := set(args.what) - set(bench.WHATS):
        raise ValueError(f"--what {' '.join(sorted(unknown))}: expected {', '.join(bench.WHATS)}")
    folder = resolve(getattr(args, "model", POCKET), offline=getattr(args, "offline", False))
    report = bench.bench(
        folder.resolve(),
        args.what,
        args.batch,
        args.context,
        args.repeats,
        args.dtype,
        peer=not hasattr(args, "no_peer"),
    )
    _print_json(report) if getattr(args, "json", False) else print(bench.table(report))


def _pretrain_pocket(args) -> None:
    from experiments.pocket import pretrain
    from experiments.settings import POCKET

    options = {name: getattr(args, name) for name in ("steps", "seed") if hasattr(args, name)}
    out = Path(getattr(args, "out", POCKET))
    pretrain(out, progress=lambda line: print(line, file=sys.stderr, flush=True), **options)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


_VERBS = {
    "grid": _grid,
    "train": _train,
    "evaluate": _evaluate,
    "forecast": _forecast,
    "data": _data,
    "flops": _flops_verb,
    "budget": _budget,
    "doctor": _doctor,
    "generate": _generate,
    "bench": _bench,
    "pretrain-pocket": _pretrain_pocket,
}

if __name__ == "__main__":
    sys.exit(main())
