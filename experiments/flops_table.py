"""The `flops` verb: what a forward or a training step costs, with each formula and its numbers."""

from collections import defaultdict
from typing import Any

from experiments.budget import BUDGET
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


def table(meter: FlopMeter, training: bool, per_layer: bool) -> str:
    """Forward FLOPs by component, a line for each formula with its numbers; by primitive; the totals."""
    # gradient flags tell layers apart in the backward alone; a line is what a forward of that shape costs
    rows: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for charge in meter.charges():
        each = sum(charge.price.cost(charge.dims, meter.convention)[0].values())
        if each:
            values = charge.price.values(charge.dims, meter.convention)
            numbers = ", ".join(f"{d}={v}" for d, v in values.items() if not d.startswith("g"))
            row = rows[component(charge), _formula(charge.price, meter.convention), numbers]
            row[0], row[1] = row[0] + charge.times, row[1] + each * charge.times
    total = meter.total
    lines = [f"{'component':10} {'times':>5}  {'FLOPs':>22} {'share':>7}   formula [its numbers]"]
    for (name, formula, numbers), (count, flops) in rows.items():
        lines.append(f"{name:10} {count:5}  {flops:22,} {flops / total:7.2%}   {formula} [{numbers}]")
    spent = meter.by_primitive()
    lines += [
        "",
        "by primitive: "
        + ", ".join(f"{name.replace('_', ' ')} {spent[name]:,}" for name in PRIMITIVES if name in spent),
    ]
    if per_layer:
        lines += ["", "by module:"]
        lines += [f"  {name:44} {n:22,}" for name, n in meter.by_module().items()]
    lines += ["", f"forward   {total:26,}"]
    if training:
        lines += [
            f"backward  {meter.backward:26,}",
            f"training  {meter.training:26,}   (10^17 FLOPs pay for {BUDGET // meter.training:,} such steps)",
        ]
    return "\n".join(lines)


def _formula(price: Price, convention: str) -> str:
    return f"2·{price.product.replace(',', '·')}" if convention == "matmul" else price.formula
