"""The `flops` verb: what a forward or a training step costs, with each formula and its numbers."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from experiments.accounting.ledger import BUDGET
from qwen_min import FlopMeter
from qwen_min.costs import Node, component
from qwen_min.prices import PRIMITIVES

WIDTH = 100
"""Columns of the tree."""


def as_json(meter: FlopMeter, question: dict[str, Any]) -> dict[str, Any]:
    """One object: the question, `convention, forward, backward, training`, and the forward's three break-downs."""
    return question | {
        "convention": meter.convention,
        "forward": meter.total,
        "backward": meter.backward,
        "training": meter.training,
        "by_module": meter.by_module(),
        "by_component": meter.by_component(),
        "by_primitive": meter.by_primitive(),
    }


def per_layer(meter: FlopMeter) -> dict[str, dict[str, int]]:
    """Forward and backward FLOPs of every module and all modules inside it, in the model's order; "" is the model."""
    modules = (node for _, node in meter.tree().walk() if not node.charge)
    return {node.path: {"forward": node.forward.total, "backward": node.backward.total} for node in modules}


def tree_table(tree: Node, training: bool, depth: int | None = None) -> str:
    """A tree as text of at most `WIDTH` columns: each node with all that is inside it, down to `depth`, its share as
    a bar; with `training` the forward, the backward and both. The only op of a module is its module's line."""

    def figures(node: Node) -> list[int]:
        forward, backward = node.forward.total, node.backward.total
        return [forward, backward, forward + backward] if training else [forward]

    whole = figures(tree)[-1]

    def lines(node: Node, level: int = 0) -> Iterator[tuple[int, Node]]:
        yield level, node
        inside = [child for child in node.children if figures(child)[-1]]
        if level != depth and not (len(inside) == 1 and inside[0].charge):
            for child in inside:
                yield from lines(child, level + 1)

    width = max(len(f"{whole:,}"), len("training")) + 2
    exact = WIDTH - len(figures(tree)) * width >= 40
    width = width if exact else 15
    room = WIDTH - len(figures(tree)) * width - 8
    names = [f"{' ' * level}{_name(node)}"[: room - 1] for level, node in lines(tree)]
    longest = max(map(len, names))
    heads = ("forward", "backward", "training")[: len(figures(tree))]
    text = [" " * longest + "".join(f"{head:>{width}}" for head in heads) + f"{'share':>8}"]
    for name, (_, node) in zip(names, lines(tree), strict=True):
        numbers = "".join(f"{n:{width},}" if exact else f"{n:{width}.6e}" for n in figures(node))
        share = figures(node)[-1] / whole
        bar = "#" * round(share * min(20, room - longest - 1))
        text.append(f"{name:{longest}}{numbers}{share:8.2%} {bar}".rstrip())
    return "\n".join(text)


def _name(node: Node) -> str:
    return f"{node.layers} x {node.name}" if node.layers > 1 else node.name or "the model"


def table(meter: FlopMeter, training: bool) -> str:
    """Forward FLOPs by component, a line for each formula with its numbers; by primitive; the totals."""
    # gradient flags tell layers apart in the backward alone; a line is what a forward of that shape costs
    rows: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for charge in meter.charges():
        each = sum(charge.price.cost(charge.dims, meter.convention)[0].values())
        if each:
            values = charge.price.numbers(charge.dims, meter.convention)
            numbers = ", ".join(f"{d}={v}" for d, v in values.items())
            row = rows[component(charge), charge.price.formula(meter.convention), numbers]
            row[0], row[1] = row[0] + charge.times, row[1] + each * charge.times
    total = meter.total
    lines = [f"{'component':10} {'times':>5}  {'FLOPs':>22} {'share':>7}   formula [its numbers]"]
    for (name, text, numbers), (count, flops) in rows.items():
        lines.append(f"{name:10} {count:5}  {flops:22,} {flops / total:7.2%}   {text} [{numbers}]")
    spent = meter.by_primitive()
    primitives = ", ".join(f"{name.replace('_', ' ')} {spent[name]:,}" for name in PRIMITIVES if name in spent)
    lines += ["", f"by primitive: {primitives}", "", f"forward   {total:26,}"]
    if training:
        lines += [
            f"backward  {meter.backward:26,}",
            f"training  {meter.training:26,}   (10^17 FLOPs pay for {BUDGET // meter.training:,} such steps)",
        ]
    return "\n".join(lines)
