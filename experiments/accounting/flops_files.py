"""The tree of FLOPs in the formats of other programs: speedscope's profiles, trace events."""

from typing import Any

from qwen_min.costs import Node


def as_speedscope(tree: Node, name: str) -> dict[str, Any]:
    """Two profiles, forward and backward, whose weights are FLOPs: https://www.speedscope.app/file-format-schema.json.

    A program that reads numbers as floats rounds what is above 2^53.
    """
    frames: dict[str, int] = {}
    stacks: list[tuple[list[int], Node]] = []

    def visit(node: Node, above: list[int]) -> None:
        label = f"{node.path} {node.name}" if node.charge else node.path or name
        stack = [*above, frames.setdefault(label, len(frames))]
        if node.charge:
            stacks.append((stack, node))
        for child in node.children:
            visit(child, stack)

    visit(tree, [])
    profiles = []
    for phase in ("forward", "backward"):
        weights = [getattr(node, phase).total for _, node in stacks]
        profile = {"type": "sampled", "name": phase, "unit": "none", "startValue": 0, "endValue": sum(weights)}
        profiles.append(profile | {"samples": [stack for stack, _ in stacks], "weights": weights})
    return {
        "$schema": "https://www.speedscope.app/file-format-schema.json",
        "name": name,
        "shared": {"frames": [{"name": label} for label in frames]},
        "profiles": profiles,
    }


def as_trace(tree: Node, convention: str) -> dict[str, Any]:
    """Trace events of the forward and then the backward, at a million FLOPs a microsecond; `args` has the exact ones.

    The ops of a module stand side by side, each module over what is inside it; the backward is the forward mirrored.
    Source: the Trace Event Format of Chromium's trace viewer, complete events ("X").
    """
    events: list[dict[str, Any]] = []

    def visit(node: Node, phase: str, start: int) -> None:
        cost = getattr(node, phase)
        if not (flops := cost.total):
            return
        args: dict[str, Any] = {"flops": flops, "bytes read": cost.read, "bytes written": cost.written}
        if node.charge:
            numbers = node.charge.price.numbers(node.charge.dims, convention)
            args |= {"times": node.times, "formula": node.charge.price.formula(convention)} | numbers
        event = {"name": node.name or phase, "cat": phase, "ph": "X", "pid": 0, "tid": 0}
        events.append(event | {"ts": start / 1e6, "dur": flops / 1e6, "args": args})
        for child in node.children if phase == "forward" else reversed(node.children):
            visit(child, phase, start)
            start += getattr(child, phase).total

    visit(tree, "forward", 0)
    visit(tree, "backward", tree.forward.total)
    return {"traceEvents": events, "displayTimeUnit": "ms"}
