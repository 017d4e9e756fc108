"""The `flops` verb: what a forward or a training step costs, with each formula and its numbers."""

from collections import defaultdict
from typing import Any

from experiments.accounting.ledger import BUDGET
from qwen_min import FlopMeter
from qwen_min.flops import PRIMITIVES, Price, component


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
    rows: dict[str, dict[str, int]] = {}
    for charge in meter.charges():
        costs = charge.price.cost(charge.dims, meter.convention)
        parts = charge.module.split(".") if charge.module else []
        for depth in range(len(parts) + 1):
            row = rows.setdefault(".".join(parts[:depth]), {"forward": 0, "backward": 0})
            for phase, cost in zip(row, costs, strict=True):
                row[phase] += charge.times * sum(cost.values())
    return rows


def layers_table(meter: FlopMeter, training: bool) -> str:
    """`per_layer` as text, with shares of the forward, and with `training` what a training step costs."""
    head = f"{'module, with the modules inside it':44} {'forward':>22} {'share':>7}"
    lines = [head + (f" {'backward':>22} {'training':>22}" if training else "")]
    for name, row in per_layer(meter).items():
        line = f"{name or 'the model':44} {row['forward']:22,} {row['forward'] / meter.total:7.2%}"
        lines.append(line + (f" {row['backward']:22,} {sum(row.values()):22,}" if training else ""))
    return "\n".join(lines)


def table(meter: FlopMeter, training: bool) -> str:
    """Forward FLOPs by component, a line for each formula with its numbers; by primitive; the totals."""
    # gradient flags tell layers apart in the backward alone; a line is what a forward of that shape costs
    rows: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for charge in meter.charges():
        each = sum(charge.price.cost(charge.dims, meter.convention)[0].values())
        if each:
            values = charge.price.values(charge.dims, meter.convention)
            numbers = ", ".join(f"{d}={v}" for d, v in values.items() if not d.startswith("g"))
            row = rows[component(charge), formula(charge.price, meter.convention), numbers]
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


def formula(price: Price, convention: str) -> str:
    """The forward price as text, as `convention` counts it."""
    return f"2·{price.product.replace(',', '·')}" if convention == "matmul" else price.formula
