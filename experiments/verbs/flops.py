"""Verbs that price a forward: `flops`, with its ways `--audit` and `--memory`, and `explain`."""

import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.accounting import audit, clock, explorer, flops_files, flops_table, memory
from experiments.accounting import explain as explained
from experiments.accounting.predict import on_meta, predict
from experiments.bench import resident
from experiments.run_folder import files
from experiments.settings import protocols
from experiments.settings.record import TYPES
from experiments.verbs.common import print_json
from lora import add_lora
from lora.layer import TARGETS
from qwen_min import FlopMeter, Qwen, QwenConfig
from qwen_min.costs import Node, as_csv, ops
from qwen_min.load import resolve
from qwen_min.prices import CONVENTIONS


def flops(args: Namespace) -> None:
    name, config, size = _sized(args)
    for flag, mode in {"calibrate": "html", "markdown": "audit", "fit": "memory"}.items():
        if hasattr(args, flag) and not hasattr(args, mode):
            raise ValueError(f"--{flag} without --{mode}: expected both")
    if hasattr(args, "measure") and not Path(name).is_dir():
        raise ValueError(f"--measure with --model {name}: expected a folder with its weights")
    way = _memory if hasattr(args, "memory") else _audit if hasattr(args, "audit") else _priced
    way(args, name, config, size, getattr(args, "targets", list(TARGETS)))


def _priced(args: Namespace, name: str, config: QwenConfig, size: dict[str, int], targets: list[str]) -> None:
    """What a forward or a training step costs, op by op."""
    batch, tokens, rank, cached = size.values()
    training, depth, measure = hasattr(args, "train"), getattr(args, "depth", None), hasattr(args, "measure")
    if depth is not None and depth < 0:
        raise ValueError(f"--depth is {depth}: expected at least 0")
    if training and cached:
        raise ValueError(f"--cache is {cached} with --train: expected 0, as a training step has no cache")
    if training and measure:
        raise ValueError("--measure with --train: expected one of the two, as a forward alone is measured")
    convention = getattr(args, "convention", "coursework")
    options: dict[str, Any] = {"rank": rank, "targets": targets, "cached": cached}
    meter = predict(config, batch, tokens, convention=convention, training=training, **options)
    activation, weight = _bytes("compute-dtype", args.compute_dtype), _bytes("dtype", args.dtype)
    tree = meter.tree(activation=activation, weight=weight)
    written = {flag: getattr(args, flag) for flag in EXPORTS if hasattr(args, flag)}
    for flag, path in written.items():
        EXPORTS[flag](path, meter, tree, f"{name}: {batch} x {tokens} tokens")
    seconds = _clocked(args, name, batch, tokens, rank, targets, cached) if measure else {}
    machines = [explorer.calibrated()] if measure or hasattr(args, "calibrate") else []
    if hasattr(args, "html"):
        start = size | {"guesses": 13, "targets": targets, "phase": "training" if training else "forward"}
        shown_as = getattr(args, "convention", "exact") if measure else convention  # what was executed is measured
        start |= {"convention": shown_as, "x": activation, "w": weight}
        files.write_text(args.html, explorer.page(name, config, start, machines, seconds))
        written["html"] = args.html
    rows = []
    if measure:
        exact = predict(config, batch, tokens, convention="exact", **options)
        rows = clock.beside(exact.tree(activation=activation, weight=weight), seconds, *machines[0][1:])
    if hasattr(args, "json"):
        shown = flops_table.as_json(meter, {"model": name} | size | written)
        if hasattr(args, "per_layer"):
            shown |= {"per_layer": flops_table.per_layer(meter), "ops": list(ops(tree, convention))}
        if measure:
            shown |= {"machine": dict(zip(("name", "flops_per_second", "bytes_per_second"), machines[0], strict=True))}
            shown |= {"seconds": rows}
        print_json(shown)
        return
    print(
        f"{name}: {batch} x {tokens} tokens after {cached} cached, LoRA rank {rank} on {', '.join(targets)}, "
        f"convention {convention}\n"
    )
    print(flops_table.table(meter, training))
    if hasattr(args, "per_layer") or depth is not None:
        print("", flops_table.tree_table(meter.tree(fold=True), training, depth), sep="\n")
    if measure:
        machine, rate, bandwidth = machines[0]
        print(f"\n{machine}: {rate:.3g} FLOP/s, {bandwidth:.3g} bytes/s; FLOPs as executed (exact)\n")
        print("\n".join(clock.table(rows)))
    if written:
        print(f"\nwritten: {', '.join(written.values())}")


def _clocked(
    args: Namespace, folder: str, batch: int, tokens: int, rank: int, targets: list[str], cached: int
) -> clock.Seconds:
    """The seconds of every op of that forward, with the weights of a folder."""
    model = Qwen.from_pretrained(folder, args.dtype, offline=True, compute_dtype=args.compute_dtype)
    if rank:
        add_lora(model, rank, targets=targets)
    return clock.clocked(model, torch.zeros(batch, tokens, dtype=torch.int64), cached)


def _audit(args: Namespace, name: str, config: QwenConfig, size: dict[str, int], targets: list[str]) -> None:
    """What others count of the same work, beside ours."""
    _alone(args, "audit", "measure")
    if (asked := getattr(args, "convention", "exact")) != "exact":
        raise ValueError(f"--convention is {asked!r} with --audit: expected exact, which it uses")
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
            for row, holes in (("measured", False), ("with holes", True)):
                found[phase][row] = resident.measured(phase, name, holes=holes, batch=batch, **options, **types)
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
