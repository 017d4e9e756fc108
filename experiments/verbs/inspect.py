"""Verbs that show what is there: `data`, `flops`, `explain`, `doctor`."""

import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.accounting import audit, explorer, flops_files, flops_table, memory
from experiments.accounting import explain as explained
from experiments.accounting.predict import on_meta, predict
from experiments.bench import resident
from experiments.run_folder import files
from experiments.settings import protocols
from experiments.settings.record import TYPES
from experiments.task.preprocessing import preprocessing
from experiments.task.task import Task
from experiments.verbs.common import gather, print_json
from experiments.verbs.doctor import lines
from lora.layer import TARGETS
from qwen_min import FlopMeter, QwenConfig, Tokenizer
from qwen_min.costs import Node, as_csv, ops
from qwen_min.load import resolve
from qwen_min.prices import CONVENTIONS


def data(args: Namespace) -> None:
    settings = gather(args)
    tokenizer = Tokenizer.from_pretrained(settings.model, settings.revision or None, settings.offline)
    task = Task.prepare(settings, tokenizer)
    dataset, worked = task.dataset, preprocessing(task)
    shape: tuple[int | str, ...] = dataset.series.shape
    if dataset.frame:
        lengths = [*map(len, dataset.frame.values)]
        shape = len(lengths), f"{min(lengths)}-{max(lengths)}", len(dataset.names)
    print(f"{dataset.path}: {dataset.source}; series ({', '.join(map(str, shape))}); sha256 {dataset.digest}")
    print(
        f"train {len(task.split.train)} / validation {len(task.split.validation)} / test {len(task.split.test)} "
        f"systems, {settings.split}; {worked['alpha_rule']}; {settings.decimals} decimals"
        + (f", {task.layout}" if task.layout else "")
    )
    for example in worked["examples"]:
        print(
            f"\nsystem {example['system']}, first {example['points']} of {len(task.raw(example['system']))} points "
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
    depth = getattr(args, "depth", None)
    if depth is not None and depth < 0:
        raise ValueError(f"--depth is {depth}: expected at least 0")
    if hasattr(args, "calibrate") and not hasattr(args, "html"):
        raise ValueError("--calibrate without --html: expected both, as the measured machine stands on the page")
    if training and cached:
        raise ValueError(f"--cache is {cached} with --train: expected 0, as a training step has no cache")
    targets = getattr(args, "targets", list(TARGETS))
    if hasattr(args, "markdown") and not hasattr(args, "audit"):
        raise ValueError("--markdown without --audit: expected both, as it is the audit's table")
    for flag in ("fit", "measure"):
        if hasattr(args, flag) and not hasattr(args, "memory"):
            raise ValueError(f"--{flag} without --memory: expected both")
    if hasattr(args, "memory"):
        _memory(args, name, config, size, targets)
        return
    if hasattr(args, "audit"):
        if (asked := getattr(args, "convention", "exact")) != "exact":
            raise ValueError(f"--convention is {asked!r} with --audit: expected exact, which it uses")
        _audit(args, name, config, size, targets)
        return
    convention = getattr(args, "convention", "coursework")
    options: dict[str, Any] = {"rank": rank, "targets": targets, "cached": cached, "training": training}
    meter = predict(config, batch, tokens, convention=convention, **options)
    activation, weight = _bytes("compute-dtype", args.compute_dtype), _bytes("dtype", args.dtype)
    tree = meter.tree(activation=activation, weight=weight)
    written = {flag: getattr(args, flag) for flag in EXPORTS if hasattr(args, flag)}
    for flag, path in written.items():
        EXPORTS[flag](path, meter, tree, f"{name}: {batch} x {tokens} tokens")
    if hasattr(args, "html"):
        start = size | {"guesses": 13, "targets": targets, "phase": "training" if training else "forward"}
        start |= {"convention": convention, "x": activation, "w": weight}
        machines = [explorer.calibrated()] if hasattr(args, "calibrate") else []
        files.write_text(args.html, explorer.page(name, config, start, machines))
        written["html"] = args.html
    if hasattr(args, "json"):
        shown = flops_table.as_json(meter, {"model": name} | size | written)
        if hasattr(args, "per_layer"):
            shown |= {"per_layer": flops_table.per_layer(meter), "ops": list(ops(tree, convention))}
        print_json(shown)
        return
    print(
        f"{name}: {batch} x {tokens} tokens after {cached} cached, LoRA rank {rank} on {', '.join(targets)}, "
        f"convention {convention}\n"
    )
    print(flops_table.table(meter, training))
    if hasattr(args, "per_layer") or depth is not None:
        print("", flops_table.tree_table(meter.tree(fold=True), training, depth), sep="\n")
    if written:
        print(f"\nwritten: {', '.join(written.values())}")


def _audit(args: Namespace, name: str, config: QwenConfig, size: dict[str, int], targets: list[str]) -> None:
    """What others count of the same work, beside ours."""
    _alone(args, "audit")
    batch, tokens, rank, cached = size.values()
    if cached:
        raise ValueError(f"--cache is {cached} with --audit: expected 0, as most programs know no cache")
    records = audit.audit(config, batch, tokens, rank, targets)
    title = f"{name}: {batch} x {tokens} tokens, LoRA rank {rank}" + (f" on {', '.join(targets)}" if rank else "")
    if hasattr(args, "markdown"):
        files.write_text(args.markdown, f"## {title}\n\n{audit.page(records)}")
    if hasattr(args, "json"):
        print_json({"model": name} | size | {"targets": targets, "convention": "exact", "rows": records})
        return
    print(title, "", audit.table(records), sep="\n")
    if hasattr(args, "markdown"):
        print(f"written: {args.markdown}")


def _memory(args: Namespace, name: str, config: QwenConfig, size: dict[str, int], targets: list[str]) -> None:
    """What each phase holds, and the largest batch that fits."""
    _alone(args, "memory", "audit", "convention")
    batch, tokens, rank, cached = size.values()
    fit: Any = getattr(args, "fit", None)
    if fit is not None and not 0 < fit < 1e9:
        raise ValueError(f"--fit is {fit:g}: expected gigabytes above 0")
    if hasattr(args, "measure") and not Path(name).is_dir():
        raise ValueError(f"--measure with --model {name}: expected a folder with its weights")
    types = {"weight": args.dtype, "activation": args.compute_dtype}
    for flag, kind in zip(("dtype", "compute-dtype"), types.values(), strict=True):
        _bytes(flag, kind)
    options: dict[str, Any] = {"tokens": tokens, "rank": rank, "targets": targets, "cached": cached or tokens}

    def held(phase: str, n: int) -> dict[str, int]:
        return memory.predict(phase, config, n, **options, **{key: getattr(torch, kind) for key, kind in types.items()})

    rows = dict.fromkeys(memory.PHASES, batch) | {memory.PHASES[0]: memory.at_once(config, batch, tokens)}
    found = {phase: held(phase, n) for phase, n in rows.items()}
    if hasattr(args, "measure"):
        for phase in found:
            found[phase]["measured"] = resident.measured(phase, name, batch=batch, **options, **types)
    fits = {}
    for phase in found if fit is not None else ():

        def total(n: int, phase: str = phase) -> int:
            return held(phase, n)["total"]

        fits[phase] = memory.largest(total, int(fit * 1e9))
    if hasattr(args, "json"):
        shown = {"model": name} | size | {"cache": cached or tokens, "targets": targets} | types
        shown |= {"at_once": rows, "bytes": found} | ({"fit_gb": fit, "largest_batch": fits} if fits else {})
        print_json(shown)
        return
    print(
        f"{name}: {batch} x {tokens} tokens, LoRA rank {rank}, weights {args.dtype}, all else {args.compute_dtype}; "
        f"of the batch a training step on a CPU runs {rows[memory.PHASES[0]]} at once; "
        f"a token is decoded after {cached or tokens}\n"
    )
    print("\n".join(memory.table(found)))
    if fits:
        said = ", ".join(f"{phase} {n:,}" for phase, n in fits.items())
        print(f"\nmost sequences at once in {fit:g} GB: {said}")


def _alone(args: Namespace, mode: str, *others: str) -> None:
    for flag in ("train", "per_layer", "depth", "html", *EXPORTS, *others):
        if hasattr(args, flag):
            raise ValueError(f"--{mode} with --{flag.replace('_', '-')}: expected one of the two")


def _bytes(flag: str, kind: str) -> int:
    if kind not in TYPES:
        raise ValueError(f"--{flag} is {kind!r}: expected {' or '.join(TYPES)}")
    return TYPES[kind].itemsize


def _plot(path: str, meter: FlopMeter, _: Node, title: str) -> None:
    from experiments import plots  # its library takes a second to load

    plots.flops_bars(meter.by_component(), path, title.replace(": ", ": forward of "))


EXPORTS: dict[str, Callable[[str, FlopMeter, Node, str], None]] = {
    "plot": _plot,
    "csv": lambda path, meter, tree, _: files.write_text(path, as_csv(tree, meter.convention)),
    "speedscope": lambda path, _, tree, title: files.write_json(path, flops_files.as_speedscope(tree, title)),
    "chrome": lambda path, meter, tree, _: files.write_json(path, flops_files.as_trace(tree, meter.convention)),
}
"""What writes the file of each flag."""


def explain(args: Namespace) -> None:
    name, config, size = _sized(args)
    batch, tokens, rank, cached = size.values()
    convention = getattr(args, "convention", "coursework")
    if convention not in CONVENTIONS:
        raise ValueError(f"--convention is {convention!r}: expected one of {', '.join(CONVENTIONS)}")
    targets = getattr(args, "targets", list(TARGETS))
    model, ids, cache = on_meta(config, batch, tokens, rank, targets, cached)
    if not hasattr(args, "what"):
        print(explained.contents(model))
        return
    page = explained.explain(args.what, model, explained.calls(model, ids, cache), convention)
    print(f"{name}: {batch} x {tokens} tokens after {cached} cached, LoRA rank {rank} on {', '.join(targets)}\n")
    print(page)


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
