"""Verbs that show what is there: `data`, `flops`, `explain`, `doctor`."""

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from experiments.accounting import explain as explained
from experiments.accounting import flops_table
from experiments.accounting.predict import on_meta, predict
from experiments.settings import protocols
from experiments.task.preprocessing import preprocessing
from experiments.task.task import Task
from experiments.verbs.common import gather, print_json
from experiments.verbs.doctor import lines
from qwen_min import QwenConfig, Tokenizer
from qwen_min.flops import CONVENTIONS
from qwen_min.load import resolve


def data(args: Namespace) -> None:
    settings = gather(args)
    tokenizer = Tokenizer.from_pretrained(settings.model, settings.revision or None, settings.offline)
    task = Task.prepare(settings, tokenizer)
    dataset, worked = task.dataset, preprocessing(task)
    print(f"{dataset.path}: {dataset.source}; series {dataset.series.shape}; sha256 {dataset.digest}")
    print(
        f"train {len(task.split.train)} / validation {len(task.split.validation)} / test {len(task.split.test)} "
        f"systems, {settings.split}; {worked['alpha_rule']}; {settings.decimals} decimals"
        + (f", {task.layout}" if task.layout else "")
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


def flops(args: Namespace) -> None:
    training = hasattr(args, "train")
    name, config, size = _sized(args)
    batch, tokens, rank, cached = size.values()
    if training and cached:
        raise ValueError(f"--cache is {cached} with --train: expected 0, as a training step has no cache")
    meter = predict(config, batch, tokens, rank=rank, cached=cached, training=training, convention=args.convention)
    question: dict[str, Any] = {"model": name} | size
    if hasattr(args, "plot"):
        from experiments import plots  # its library takes a second to load

        plots.flops_bars(meter.by_component(), args.plot, f"{name}: forward of {batch} x {tokens} tokens")
        question["plot"] = args.plot
    if hasattr(args, "json"):
        layers = {"per_layer": flops_table.per_layer(meter)} if hasattr(args, "per_layer") else {}
        print_json(flops_table.as_json(meter, question) | layers)
        return
    print(
        f"{name}: {batch} x {tokens} tokens after {cached} cached, LoRA rank {rank} on q and v, "
        f"convention {args.convention}\n"
    )
    print(flops_table.table(meter, training))
    if hasattr(args, "per_layer"):
        print("", flops_table.layers_table(meter, training), sep="\n")
    if hasattr(args, "plot"):
        print(f"\nwritten: {args.plot}")


def explain(args: Namespace) -> None:
    name, config, size = _sized(args)
    batch, tokens, rank, cached = size.values()
    if args.convention not in CONVENTIONS:
        raise ValueError(f"--convention is {args.convention!r}: expected one of {', '.join(CONVENTIONS)}")
    model, ids, cache = on_meta(config, batch, tokens, rank, cached=cached)
    if not hasattr(args, "what"):
        print(explained.contents(model))
        return
    page = explained.explain(args.what, model, explained.calls(model, ids, cache), args.convention)
    print(f"{name}: {batch} x {tokens} tokens after {cached} cached, LoRA rank {rank} on q and v\n\n{page}")


def _sized(args: Namespace) -> tuple[str, QwenConfig, dict[str, int]]:
    """A model's name and shape, and of a forward: batch, context, rank, cache."""
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
    if re.fullmatch(r"Qwen2\.5-.*|Qwen/Qwen2\.5-[\d.]+B(-Instruct)?", name) and not Path(name).is_dir():
        return name, QwenConfig.named(name), size
    return name, QwenConfig.from_file(resolve(name, offline=hasattr(args, "offline")) / "config.json"), size


def doctor(args: Namespace) -> None:
    for line in lines(gather(args)):
        print(line, flush=True)
