"""The flags of the command line: every verb with its help and an example.

A flag that is not given is absent from the result, so that a protocol, a TOML file or a default can hold instead.
"""

import argparse
import difflib
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from experiments.run_folder.command import MODULE, program
from experiments.training.parallel import rank

LEDGER = "ledger.sqlite"
PATHS = {"model", "data", "adapter", "out", "ledger", "config", "run"} | {
    "plot",
    "csv",
    "speedscope",
    "chrome",
    "html",
    "markdown",
}
"""The flags that name a file or folder."""

EXAMPLES = {
    "study": "python -m experiments.run study --protocol default --scale 0.02",
    "baseline": "python -m experiments.run baseline --protocol default --out runs/study",
    "default": "python -m experiments.run default --protocol default --out runs/study",
    "context": "python -m experiments.run context --protocol default --out runs/study",
    "final": "python -m experiments.run final --protocol default --out runs/study --best-lr 1e-4 --best-rank 8",
    "report": "python -m experiments.run report runs/grid",
    "grid": "python -m experiments.run grid --model Qwen/Qwen2.5-0.5B-Instruct --steps 300 --dry-run",
    "train": "python -m experiments.run train --lr 5e-3 --rank 8 --steps 200 --out runs/one",
    "evaluate": "python -m experiments.run evaluate --adapter runs/grid/cells/lr0.01-r8/adapter",
    "forecast": "python -m experiments.run forecast --data sales.csv --horizon 12 --all",
    "backtest": "python -m experiments.run backtest --data sales.csv --horizon 12 --origins 3",
    "data": "python -m experiments.run data --decimals 3",
    "flops": "python -m experiments.run flops --model Qwen2.5-7B --batch 4 --context 512 --rank 8 --train",
    "status": "python -m experiments.run status runs/grid",
    "budget": "python -m experiments.run budget",
    "doctor": "python -m experiments.run doctor --model Qwen/Qwen2.5-0.5B-Instruct",
    "explain": "python -m experiments.run explain attend --context 128",
    "verify": "python -m experiments.run verify --model Qwen/Qwen2.5-0.5B-Instruct --gradients",
    "docs": "python -m experiments.run docs",
    "exercise": "python -m experiments.run exercise 2.2 rotate.py",
    "generate": "python -m experiments.run generate --prompt '1.00,0.50;1.20,0.60;' --max-new-tokens 50",
    "export": "python -m experiments.run export --adapter runs/grid/cells/lr0.01-r8/adapter --out runs/merged",
    "bench": "python -m experiments.run bench --model weights/pocket --quick --what train,generate",
    "pretrain-pocket": "python -m experiments.run pretrain-pocket --out weights/pocket",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if mistyped := re.search(r"VERB: invalid choice: '(.*?)'", message):
            near = difflib.get_close_matches(mistyped[1], EXAMPLES, 1)
            message = f"no verb {mistyped[1]!r}{f': did you mean {near[0]}' if near else ''}"
        self.exit(2, None if rank() else f"{self.prog}: {' '.join(message.split())}: see --help\n")


class _Version(argparse.Action):
    def __call__(self, parser, *_):
        with suppress(PackageNotFoundError):
            print(f"qwen_min {version('qwen_min')}")
            parser.exit()
        parser.error("qwen_min is not installed, so it has no version")


def parser() -> argparse.ArgumentParser:
    top = _Parser(
        prog=program().rpartition(" ")[2],
        description="Fine-tune Qwen2.5 to forecast series written as digits, "
        "under a budget of 10^17 FLOPs. Every verb has a --help with an example.",
    )
    top.add_argument("--version", action=_Version, nargs=0, help="show what is installed")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        usage = f"%(prog)s [flags], such as\n  {EXAMPLES[name].replace(MODULE, program())}"
        p = verbs.add_parser(name, help=text, description=text, usage=usage, argument_default=argparse.SUPPRESS)
        p.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return p

    for name, text in (
        ("study", "a whole report: baseline, default run, grid, context sweep, final run, evaluation, page"),
        ("baseline", "a study's first stage: the untrained model, validated and judged"),
        ("default", "a study's second stage: the run with the protocol's default learning rate and rank"),
        ("context", "a study's fourth stage, after the grid: the best cell at several contexts"),
        ("final", "a study's last stage: the best cell and context, trained longest, judged on the test part too"),
    ):
        p = verb(name, text)
        _settings(p, "data", "train", "forecast", "grid", "best")
        p.add_argument("--out", help="the study's folder (runs/study-PROTOCOL)")
        if name == "study":
            controls = "then the same shape, and a small one, from random weights, for no more FLOPs than the final run"
            p.add_argument("--controls", action="store_true", help=controls)
            p.add_argument("--dry-run", action="store_true", help="price every stage; run nothing")
            p.add_argument("--json", action="store_true", help="with --dry-run: print one JSON object and nothing else")

    p = verb("report", "the page of a run folder: report.html, report.md, figures, tables")
    p.add_argument("run", metavar="RUN", help="the run's folder")
    beside = "instead: RUN beside these, differences first: compare.html and compare.md, in RUN"
    p.add_argument("--compare", nargs="+", metavar="OTHER", help=beside)

    p = verb("grid", "train every learning rate x rank, then the table and figures; a study's third stage")
    _settings(p, "data", "train", "forecast", "grid")
    p.add_argument("--out", help="the run's folder (runs/grid)")
    part = p.add_mutually_exclusive_group()
    part.add_argument(
        "--shard", type=_shard, metavar="I/N", help="run every N-th cell alone, from the I-th on; one --out for all N"
    )
    part.add_argument("--merge", action="store_true", help="put together what the shards have run")
    p.add_argument("--dry-run", action="store_true", help="show cells, FLOPs and time; run nothing")
    each = "a cell for each value of another setting too, such as schedule=constant|cosine or"
    each += " targets=q_proj+v_proj|all-linear; once for each setting"
    p.add_argument("--over", action="append", metavar="NAME=VALUE|VALUE", help=each)
    halving = "successive halving: after so many steps each the worst cells go no further, such as 30,100,300"
    p.add_argument("--rungs", type=_steps, metavar="STEPS,STEPS", help=halving)
    p.add_argument("--survivors", type=_part, metavar="PART", help="of the cells that go on after a rung (1/3)")

    p = verb("train", "train one learning rate and rank")
    _settings(p, "data", "train")
    p.add_argument("--lr", type=float, nargs=1, help="learning rate (1e-4; for the pocket model 1e-2)")
    p.add_argument("--rank", type=int, nargs=1, dest="ranks", metavar="RANK", help="LoRA rank (8)")
    p.add_argument("--out", help="the run's folder (runs/train)")
    p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    p.add_argument("--dry-run", action="store_true", help="show FLOPs and time; run nothing")

    p = verb("evaluate", "validation loss, and forecasts scored beside naive ones")
    _settings(p, "data", "forecast")
    p.add_argument("--adapter", help="an adapter folder, or forecaster (docs/best.md); none is the untrained model")
    spaced = "evenly spaced, the first after --points points, scored together and one by one (1)"
    p.add_argument("--origins", type=int, metavar="N", help=f"cut-offs of each series, {spaced}")
    p.add_argument("--part", default="validation", help="whose series are forecast: validation or test (validation)")
    tables = "evaluation.json, scores.csv, forecasts.csv and more go into its evaluation/, a figure into its figures/"
    p.add_argument("--out", help=f"a folder: {tables} (nothing is written)")
    p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")

    p = verb("backtest", "forecasts after several cut-offs of every series, counted back from its end, beside copies")
    _settings(p, "data", "forecast")
    p.add_argument("--adapter", help="an adapter folder, or forecaster (docs/best.md); none is the untrained model")
    p.add_argument("--origins", type=int, default=3, metavar="N", help="cut-offs of each series (3)")
    p.add_argument("--origin-step", type=int, help="points between them (the horizon)")
    p.add_argument("--series", nargs="+", metavar="NAME", help="series by their names (all)")
    p.add_argument("--out", help="a folder: backtest.csv, scores.csv, forecasts.png (backtest)")

    p = verb("forecast", "forecast what comes after the data's end, as CSV and a figure; or one system from a point on")
    _settings(p, "data", "forecast")
    p.add_argument("--adapter", help="an adapter folder, or forecaster (docs/best.md); none is the untrained model")
    one = p.add_mutually_exclusive_group()
    one.add_argument("--all", action="store_true", help="every series (the first one alone)")
    one.add_argument("--series", nargs="+", metavar="NAME", help="series of a table by their names")
    from_first = "number of the series, from 0; of HDF5 forecast after its first --points points, and scored"
    one.add_argument("--system", type=int, help=from_first)
    beside = "its CSV has the same name"
    p.add_argument("--out", help=f"the PNG to write; {beside} (forecast.png; with --system forecast-SYSTEM.png)")
    ahead = "guess ahead: a forward carries up to N tokens, verified; the same greedy forecast in fewer forwards (0: "
    ahead += "off; 12 suits a CPU). Reserved as if no guess came true, settled at what ran"
    p.add_argument("--draft", type=int, default=0, metavar="N", help=ahead)

    exact = "the model's probability of every number of the first step, drawn under it and in a JSON file beside"
    p.add_argument("--density", action="store_true", help=exact)

    p = verb("data", "make or check the data set; two worked examples: raw, scaled, text, token ids")
    _settings(p, "data")

    p = verb("flops", "what a forward or a training step costs, formula by formula, without weights")
    _forward(p)
    p.add_argument("--train", action="store_true", help="the backward pass too")
    p.add_argument("--dtype", default="float32", help="of the weights, for their bytes: float32 or bfloat16 (float32)")
    p.add_argument(
        "--compute-dtype", default="float32", help="of all else, for its bytes: float32 or bfloat16 (float32)"
    )
    p.add_argument("--per-layer", action="store_true", help="and a tree of modules and ops, each with what is in it")
    p.add_argument("--depth", type=int, metavar="N", help="that tree down to N levels below the model (all)")
    p.add_argument("--audit", action="store_true", help="what other programs and formulas count, and why it differs")
    p.add_argument("--markdown", help="with --audit: write its tables into this file, too")
    p.add_argument("--memory", action="store_true", help="bytes of a training step, a forward and a decoded token")
    p.add_argument("--fit", type=float, metavar="GB", help="with --memory: the largest batch that fits")
    p.add_argument("--measure", action="store_true", help="run it with a folder's weights: each op's time; or --memory")
    p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    p.add_argument("--plot", help="draw the components' shares into this PNG")
    p.add_argument("--html", help="write a page to look through all of it, for any setting, into this file")
    p.add_argument("--calibrate", action="store_true", help="with --html: measure this machine for its roofline")
    p.add_argument("--csv", help="write every op, its formula, numbers and primitives into this file")
    p.add_argument("--speedscope", help="write the tree as speedscope's JSON")
    p.add_argument("--chrome", help="write the tree as trace events, which a browser's trace viewer opens")

    p = verb("explain", "an op or a layer: its source, its shapes in a model, its price with the numbers")
    p.add_argument("what", nargs="?", metavar="WHAT", help="such as attend, Attention or layers.0.mlp; none lists them")
    _forward(p)

    p = verb("verify", "every layer's activations beside transformers', tokens and text; ends with PASS or FAIL")
    p.add_argument("--model", help="a dense Qwen2.5: a folder or a hub id (weights/pocket)")
    p.add_argument("--offline", action="store_true", help="never open a connection")
    p.add_argument("--against", help="whose computation ours is compared with: transformers (transformers)")
    p.add_argument("--prompt", help="what both read (a short series)")
    p.add_argument("--generate", type=int, metavar="N", help="greedy tokens after it (20)")
    p.add_argument(
        "--gradients", action="store_true", help="compare gradients of its loss, too; of --adapter alone, if any"
    )
    p.add_argument("--adapter", help="an adapter folder, for both; each side also reads what the other writes")
    p.add_argument("--float64", action="store_true", dest="exact", help="how far both are from float64")
    p.add_argument(
        "--break", dest="defect", metavar="NAME", help="plant a defect, which must be found: see docs/verify.md"
    )
    p.add_argument("--tolerance", type=float, help="most difference, as a part of a tensor's largest value (1e-4)")
    p.add_argument("--plain", action="store_true", help="the plain maths alone, without qwen_min.fast")

    p = verb("docs", "build the book in docs/ and name its page; what it shows is run anew")
    p.add_argument("--out", help="the folder (build/docs)")

    p = verb("exercise", "check an answer to an exercise of the book: right, or what differs, and a hint")
    p.add_argument("number", nargs="?", metavar="NUMBER", help="such as 2.2; none lists them")
    answer = "Python: an expression, or a file.py that sets answer, to a value or a function; none shows the question"
    p.add_argument("answer", nargs="?", metavar="ANSWER", help=answer)
    p.add_argument("--solution", action="store_true", help="show it")

    p = verb("status", "what is running, done or failed in a run's folder, how far it is, and the time left")
    p.add_argument("run", metavar="RUN", help="the folder of a study, a grid, its shards or a training run")
    p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")

    p = verb("budget", "what the ledger of this folder holds: spent, reserved, left")
    p.add_argument("--ledger", help=f"the ledger ({LEDGER})")
    p.add_argument("--budget", type=_flops, help="FLOPs (1e17)")
    p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")

    p = verb("doctor", "what is installed, cached and reachable, and what to do")
    _settings(p)

    p = verb("generate", "continue a prompt: the model as a model")
    _settings(p)
    p.add_argument("--prompt", help="the text to continue, or to answer with --chat (standard input)")
    conversation = (
        'answer in Qwen\'s chat format: the prompt, or FILE, a JSON list of {"role": "user", "content": TEXT};'
    )
    p.add_argument("--chat", nargs="?", metavar="FILE", help=f"{conversation} - is standard input")
    p.add_argument("--system", metavar="TEXT", help="the chat's system message (Qwen's own)")
    p.add_argument("--json", action="store_true", help="print one JSON object: text, tokens, FLOPs")
    p.add_argument("--max-new-tokens", type=int, default=200, help="(200)")
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    p.add_argument("--top-p", type=float, default=1.0, help="nucleus of sampling (1)")
    p.add_argument("--sample-seed", type=int, default=0, help="of the samples (0)")
    p.add_argument("--adapter", help="an adapter folder")

    p = verb("export", "merge an adapter into its base model: a folder that Hugging Face's libraries open")
    _settings(p)
    p.add_argument("--adapter", help="an adapter folder, or forecaster; none is the base model alone")
    p.add_argument("--out", required=True, help="the folder to write")

    p = verb("bench", "every job beside transformers + PEFT: time, floor, memory, and whether both computed the same")
    p.add_argument("--model", help="a model's folder or hub id (weights/pocket)")
    p.add_argument("--what", nargs="+", metavar="WHAT", help="of train, evaluate, generate, load, count (all)")
    p.add_argument("--peer", help="transformers or none (transformers; with --scaling none)")
    p.add_argument("--repeats", type=int, help="fresh processes of each side (3; with --quick 1)")
    p.add_argument("--dtype", help="that our weights are kept in: float32 or bfloat16 (bfloat16)")
    p.add_argument("--device", help="cpu or cuda (cpu)")
    p.add_argument("--compile", action="store_true", help="ours as torch's compiler makes it")
    p.add_argument("--series", type=int, help="validation series that are forecast in one call (150; with --quick 6)")
    p.add_argument("--draft", type=int, help="nodes of the symbol tree, a forward (12)")
    p.add_argument("--quick", action="store_true", help="small shapes, to see that all works")
    p.add_argument("--scaling", action="store_true", help="instead: time and memory over context, batch, rank, prompt")
    p.add_argument("--out", help="the run's folder: tables and charts go into its bench/ (runs)")
    p.add_argument("--offline", action="store_true", help="never open a connection")
    p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")

    p = verb("pretrain-pocket", "train the pocket checkpoint from scratch on synthetic series")
    p.add_argument("--out", help="the folder (weights/pocket)")
    p.add_argument("--steps", type=int, help="training steps")
    p.add_argument("--seed", type=int, help="of data and weights")
    p.add_argument("--start", help="a folder that this verb wrote, to train on from its weights; with another seed")
    return top


def _settings(p: argparse.ArgumentParser, *groups: str) -> None:
    """Flags that change `Settings`; without a flag the TOML file, the protocol or the default holds."""
    add = p.add_argument_group("the run").add_argument
    add("--protocol", help="best, default, fung, liu or rai: a whole way of doing it; --config and flags win over it")
    add("--config", help="a TOML file of settings, such as a run's config.toml; flags win over it")
    if "train" in groups or "forecast" in groups:
        add("--budget", type=_flops, help="FLOPs of the whole ledger (1e17)")
        add("--ledger", help=f"the ledger of FLOPs ({LEDGER})")
        add("--seed", type=int, help="of data order, LoRA and dropout (0)")
    if "train" in groups:
        drift = "continue with another torch, device, dtype, processor, number of threads or processes: bits may differ"
        add("--allow-drift", action="store_true", help=f"{drift}; the manifest lists it")
        add(
            "--log", metavar="PROGRAM", help="curves and pictures for tensorboard too, in the run's tensorboard/ (none)"
        )
    add = p.add_argument_group("the model").add_argument
    add("--model", help="a model's folder or hub id (weights/pocket)")
    add("--revision", help="of the hub's model: branch, tag or commit")
    add("--offline", action="store_true", help="never open a connection")
    add("--device", help="cpu or cuda (cpu)")
    add("--compute-dtype", help="of activations and products: float32 or bfloat16 (float32; on a GPU bfloat16)")
    add("--dtype", help="that the weights are kept in: stored (as in their file), float32 or bfloat16 (stored)")
    add("--compile", action="store_true", help="run blocks and loss as torch's compiler makes them, which suits a GPU")
    add("--plain", action="store_true", help="run the plain maths alone, without qwen_min.fast: slow, to find a fault")
    add = p.add_argument_group("the data as text").add_argument
    if "data" in groups or not groups:
        add("--data", help="a CSV, Parquet or HDF5 file (docs/data.md); rebuilt by its law if absent")
        add("--id-column", help="of a table: the column that names the series (unique_id, item_id or id)")
        add("--time-column", help="the column of times (ds, timestamp, date or time)")
        add("--target", nargs="+", help="the columns of values (all others)")
        add("--wide", action="store_true", help="a row for each time, a column for each series")
        add("--fill", help="what is missing by the previous value, or linear between two (refused)")
        add("--beyond", help="a number a thousand times its alpha: refuse, or clip it, with a count (refuse)")
    if "data" in groups:
        add("--split", help="series: in order, shuffled, held out first; time: each series' own first part (in order)")
        add("--decimals", type=int, help="digits after the point (2)")
        point = "write the point of a number (on); off: the last digits are the decimals, fewer tokens"
        add("--point", action=argparse.BooleanOptionalAction, help=point)
        add("--separator", help='between the digits of a number: " " or nothing (nothing)')
        add("--alpha", type=float, help="series are divided by this (maximum of the training part / 9.99)")
    add = p.add_argument_group("training and validation").add_argument
    if "train" in groups:
        add("--steps", type=int, help="training steps of a cell (30)")
        add("--windows", help="of training: strided, or anywhere, drawn anew for each step (strided)")
        add("--batch-size", type=int, help="windows of a step (2)")
        add("--val-every", type=int, help="steps between validations (15); 0 for one after training")
        add("--targets", nargs="+", help="linear layers that get LoRA: names, or all-linear (all-linear)")
        add("--lora-alpha", type=float, help="the update is scaled by this over the rank (the rank, so by 1)")
        add("--rank-stabilised", action="store_true", help="or over the rank's square root")
        add("--keep", help="the adapter of the last validation, or of the best by its loss or horizon error (last)")
        add("--keep-series", type=int, help="series whose horizon error each validation takes then (4); 0 for all")
        forecasts = "forecast with each cell too (a grid does; train does not)"
        add("--forecast-cells", action=argparse.BooleanOptionalAction, help=forecasts)
        add("--patience", type=int, help="stop after so many validations in a row without a lower loss (0: never)")
        add("--dropout", type=float, help="on LoRA's input (0)")
        add("--schedule", help="of the learning rate: constant, linear, cosine or warmup-stable-decay (constant)")
        add("--warmup", type=float, help="steps in which it rises, or a part of the run below 1 (0)")
        add("--decay", type=float, help="last steps, or a part, in which warmup-stable-decay falls (0.2)")
        add("--final-lr", type=float, help="what it falls to, as a part of the learning rate (0)")
        add("--betas", type=float, nargs=2, help="of AdamW (0.9 0.999)")
        add("--weight-decay", type=float, help="of AdamW (0)")
        add("--clip", type=float, help="longest gradient of an update, by its norm; 0 for any (0)")
        add("--vocabulary", help="of the loss: full, or symbols: over the text's own alone, another loss (full)")
        weights = "of the training loss: of digits before the point, of each decimal in turn, of all further ones (1)"
        add("--digit-weights", type=float, nargs="+", metavar="WEIGHT", help=weights)
        distance = "add so much times the mean distance of the digits' probabilities from the true digit (0)"
        add("--number-loss", type=float, help=distance)
        add("--preset", help="learning rates by name: reports or pocket")
    if "train" in groups or "forecast" in groups:
        add("--context", type=int, help="tokens of a window (999)")
        add("--val-series", type=int, help="series of the validation part whose loss is taken (20); 0 for all")
    if "forecast" in groups:
        add = p.add_argument_group("forecasts").add_argument
        add("--points", type=int, help="points of a series that a forecast sees (80)")
        add("--horizon", type=int, help="points that it makes (20)")
        add("--forecast-series", type=int, help="series of a part that are forecast (20); 0 for all")
        add("--constrained", action=argparse.BooleanOptionalAction, help="only text that is a valid encoding (on)")
        add("--num-samples", type=int, help="continuations of a series: quantiles, and their median as forecast (1)")
        add("--point-forecast", help="of several samples: their median or mean, of those that parse (median)")
        add("--temperature", type=float, help="of drawing tokens; 0 is greedy (0; with several samples 1)")
        add("--top-k", type=int, help="draw among the likeliest so many (0: all)")
        add("--top-p", type=float, help="draw among the likeliest that together have this probability (1)")
        add("--repetition-penalty", type=float, help="on tokens that were there before (1: none)")
    if "grid" in groups:
        add = p.add_argument_group("grid and study").add_argument
        add("--scale", type=float, help="shorten every stage to this part of its steps and series, 1 and 20 at least")
        add("--lr", type=float, nargs="+", help="learning rates (1e-5 5e-5 1e-4; pocket's are 1e-3 5e-3 1e-2)")
        add("--ranks", type=int, nargs="+", help="LoRA ranks (2 4 8)")
        seeds = "train each cell with so many seeds, from --seed on; the best is that of the lowest mean (1)"
        add("--seeds", type=int, metavar="N", help=seeds)
    if "best" in groups:
        add("--best-lr", type=float, help="carry this learning rate forward, not that of the lowest validation loss")
        add("--best-rank", type=int, help="carry this rank forward")
        add("--best-context", type=int, help="carry this context forward to the final run")


def _forward(p: argparse.ArgumentParser) -> None:
    """Flags of a forward that is priced."""
    p.add_argument("--model", help="Qwen2.5-0.5B ... Qwen2.5-72B, a folder or a hub id (Qwen2.5-0.5B)")
    p.add_argument("--protocol", help="take batch, context and rank from this protocol's default run")
    p.add_argument("--batch", type=int, help="sequences (4)")
    p.add_argument("--context", type=int, help="new tokens of each (512)")
    p.add_argument("--rank", type=int, help="LoRA rank (0: no LoRA)")
    p.add_argument("--targets", nargs="+", help="linear layers that get LoRA: names, or all-linear (q_proj v_proj)")
    p.add_argument("--cache", type=int, default=0, help="tokens already in the KV cache (0)")
    p.add_argument("--convention", help="coursework, exact or matmul (coursework)")
    p.add_argument("--offline", action="store_true", help="never open a connection")


def _shard(text: str) -> tuple[int, int]:
    """ "2/4": the second of four."""
    number, _, of = text.partition("/")
    if number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of):
        return int(number), int(of)
    raise argparse.ArgumentTypeError(f"{text!r}: expected I/N, I from 1 to N, such as 1/3")


def _steps(text: str) -> list[int]:
    """ "30,100,300": steps of each rung."""
    try:
        return [int(one) for one in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers, such as 30,100,300") from None


def _part(text: str) -> float:
    """ "1/3", or "0.3"."""
    from fractions import Fraction

    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a part, such as 1/3") from None


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
