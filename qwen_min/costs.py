"""What was charged, as a tree of modules and ops: FLOPs and bytes of every node, as CSV, as a page."""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from html import escape
from itertools import groupby
from typing import Any, NamedTuple

from qwen_min.prices import PRIMITIVES, Dims, Price


class Charge(NamedTuple):
    """One kind of charge that a meter has seen, and how many `times`."""

    module: str
    price: Price
    dims: Dims
    times: int


@dataclass
class Cost:
    """What a forward, or a backward, of a part of the model costs: FLOPs by primitive, bytes read and written."""

    flops: Counter[str] = field(default_factory=Counter)
    read: int = 0
    written: int = 0

    @property
    def total(self) -> int:
        return self.flops.total()

    def add(self, flops: Mapping[str, int], read: int, written: int, times: int) -> None:
        for primitive, n in flops.items():
            self.flops[primitive] += n * times
        self.read, self.written = self.read + read * times, self.written + written * times


@dataclass
class Node:
    """A module with all that is inside it, or an op: a node of the tree that `FlopMeter.tree` returns.

    `name` is the last part of `path` ("model.layers.0.mlp.up_proj"; empty for the whole), or the op's ("linear").
    `layers` equal layers stand in one node. An op has what was charged last (its flags of gradients may differ from
    call to call) and how many `times`; a module has `children`, in the order of the forward.
    """

    name: str
    path: str
    forward: Cost = field(default_factory=Cost)
    backward: Cost = field(default_factory=Cost)
    children: list["Node"] = field(default_factory=list)
    layers: int = 1
    charge: Charge | None = None
    times: int = 0

    def walk(self, depth: int = 0) -> Iterator[tuple[int, "Node"]]:
        """This node and all below it, each with its depth, a parent before its children."""
        yield depth, self
        for child in self.children:
            yield from child.walk(depth + 1)


def component(charge: Charge) -> str:
    """The part of the architecture that a charge belongs to; a linear layer's follows from its module's name."""
    last = charge.module.rpartition(".")[2]
    names = {"o_proj": "output", "lm_head": "head"}
    return charge.price.component or names.get(last) or last.removesuffix("_proj")


def tree_of(
    charges: Iterable[Charge], convention: str, fold: bool = False, activation: int = 4, weight: int = 4
) -> Node:
    """See `flops.FlopMeter.tree`."""
    charges = list(charges)

    @cache  # layers are charged alike
    def priced(price: Price, dims: Dims):
        return price.cost(dims, convention), price.bytes(dims, activation, weight)

    names = _folded(tree_of(charges, convention)) if fold else {}
    root = Node("", "")
    modules, ops = {"": root}, dict[tuple, Node]()
    for charge in charges:
        inside, path = [root], ""
        for part in charge.module.split(".") if charge.module else ():
            part, count = names.get((path, part), (part, 1))
            path = f"{path}.{part}".lstrip(".")
            if path not in modules:
                modules[path] = Node(part, path, layers=count)
                inside[-1].children.append(modules[path])
            inside.append(modules[path])
        key = (path, charge.price, *charge.price.numbers(charge.dims, convention).values())
        if key not in ops:
            ops[key] = Node(charge.price.name, path)
            inside[-1].children.append(ops[key])
        op = ops[key]
        op.charge, op.times = charge, op.times + charge.times
        (forward, backward), (read, written, d_read, d_written) = priced(charge.price, charge.dims)
        for node in (*inside, op):
            node.forward.add(forward, read, written, charge.times)
            node.backward.add(backward, d_read, d_written, charge.times)
    return root


def _folded(tree: Node) -> dict[tuple[str, str], tuple[str, int]]:
    """Of each layer, by its list and number: the name of the run of layers that cost what it does, and their count."""

    def costs(layer: Node) -> list:
        inside = [node for _, node in layer.walk()]
        return [(node.forward.flops, node.backward.flops, node.times, node.name) for node in inside[1:]]

    names: dict[tuple[str, str], tuple[str, int]] = {}
    for _, node in tree.walk():
        for _, run in groupby((child for child in node.children if child.name.isdigit()), costs):
            layers = [layer.name for layer in run]
            name = layers[0] if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
            names |= {(node.path, layer): (name, len(layers)) for layer in layers}
    return names


def ops(tree: Node, convention: str) -> Iterator[dict[str, Any]]:
    """Every op of a tree in a flat record: where it stands, its formula with its numbers, FLOPs and bytes."""
    for _, node in tree.walk():
        if not (charge := node.charge):
            continue
        numbers = charge.price.numbers(charge.dims, convention)
        row: dict[str, Any] = {"module": node.path, "op": node.name, "component": component(charge)}
        row |= {"times": node.times, "formula": charge.price.formula(convention)}
        row["numbers"] = " ".join(f"{name}={n}" for name, n in numbers.items())
        for phase, cost in (("forward", node.forward), ("backward", node.backward)):
            row |= {phase: cost.total} | {f"{phase}_{name}": cost.flops[name] for name in PRIMITIVES}
            row |= {f"{phase}_bytes_read": cost.read, f"{phase}_bytes_written": cost.written}
        yield row


def _check(tree: Node) -> None:
    if not tree.children:
        raise ValueError("the meter has seen no op: expected a forward inside of it")


def as_csv(tree: Node, convention: str) -> str:
    """A line for each op and shape, every number in full."""
    _check(tree)
    text = io.StringIO()
    rows = list(ops(tree, convention))
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_html(tree: Node, convention: str, title: str) -> str:
    """A page of nested lines that open: FLOPs forward and backward, their share, and bytes; of an op its formula."""
    _check(tree)
    whole = tree.forward.total + tree.backward.total

    def line(node: Node) -> str:
        share = (node.forward.total + node.backward.total) / whole
        name = f"{node.layers} x {node.name}" if node.layers > 1 else node.name or title
        costs = f"{node.forward.total:,} + {node.backward.total:,}"
        moved = sum(cost.read + cost.written for cost in (node.forward, node.backward))
        text = f"<b>{escape(name)}</b> {costs} <i>{share:.2%}</i> {moved:,} bytes"
        if node.charge:
            numbers = node.charge.price.numbers(node.charge.dims, convention).items()
            filled = ", ".join(f"{dimension}={n}" for dimension, n in numbers)
            text += f" <code>{node.times} x {escape(node.charge.price.formula(convention))} [{filled}]</code>"
        return f'<span style="background-size:{100 * share:.3f}% 100%">{text}</span>'

    def block(node: Node, level: int = 0) -> str:
        if not node.children:
            return f"<p>{line(node)}</p>"
        inside = "".join(block(child, level + 1) for child in node.children)
        return f"<details{' open' * (level < 2)}><summary>{line(node)}</summary>{inside}</details>"

    said = f"FLOPs under the convention {convention}: forward + backward, the share of both, bytes read and written."
    return f"{_HEAD.replace('TITLE', escape(title))}<p>{said}</p>{block(tree)}"


_HEAD = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>TITLE</title>
<style>
:root { color-scheme: light dark; font: 14px/1.6 system-ui, sans-serif }
details > *:not(summary) { margin: 0 0 0 1.2em }
span { background: linear-gradient(#5b8def55, #5b8def55) no-repeat }
p { margin: 0 } code { opacity: .75 }
</style>
"""
