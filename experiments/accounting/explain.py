"""The `explain` verb: an op's or a layer's lines of source, its shapes in a model, and its price with its numbers."""

import ast
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qwen_min import FlopMeter, Qwen, ops
from qwen_min.costs import Charge, component
from qwen_min.flops import Metered, unmetered
from qwen_min.prices import Price
from qwen_min.trace import replaced

PRICES = {name: value for name, value in vars(ops).items() if isinstance(value, Price)}
OPS: dict[str, Callable] = {
    name: value
    for name, value in vars(ops).items()
    if inspect.isfunction(value) and PRICES.keys() & set(value.__code__.co_names)
}
"""Every op that charges something, by name."""


class Call(NamedTuple):
    """One call of an op: its tensors' shapes and its numbers as text, and what it charged."""

    op: str
    arguments: str
    result: str
    charges: tuple[Charge, ...]

    @property
    def module(self) -> str:
        return self.charges[0].module

    def cost(self, convention: str) -> int:
        return sum(cost(charge, convention) * charge.times for charge in self.charges)


def cost(charge: Charge, convention: str) -> int:
    """Forward FLOPs of a charge, once."""
    return sum(charge.price.cost(charge.dims, convention)[0].values())


def calls(model: Qwen, ids: Tensor, cache: Any = None) -> list[Call]:
    """Every call of an op in one forward, in order; a model on the meta device needs no weights."""
    found: list[Call] = []

    def watched(name: str, op: Callable, *args: Any, **options: Any) -> Any:
        with FlopMeter() as meter:
            result = op(*args, **options)
        given = inspect.signature(op).bind(*args, **options).arguments.items()
        arguments = ", ".join(f"{argument} {_shown(value)}" for argument, value in given if value is not None)
        found.append(Call(name, arguments, _shown(result), tuple(meter.charges())))
        return result

    with ExitStack() as stack, torch.no_grad(), unmetered():
        for name, op in OPS.items():
            stack.enter_context(replaced(ops, name, partial(watched, name, op)))
        stack.enter_context(FlopMeter())  # so that modules say which of them runs
        model(ids, cache)
    return found


def explain(what: str, model: Qwen, seen: list[Call], convention: str) -> str:
    """The page of an op of `qwen_min/ops.py`, or of the layers of a name: a class's, or the end of a module's.

    Args:
        what: "attend", "Attention", "mlp", "layers.0.self_attn.q_proj".
        model: whose layers they are.
        seen: its `calls`.

    Raises:
        ValueError: there is nothing of that name.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Metered) and _is(what, name, m)}
    if what in OPS:
        lines, inside = _page(OPS[what]), [call for call in seen if call.op == what]
    elif layers:
        lines = _page(type(next(iter(layers.values()))))
        inside = [call for call in seen if any(_within(call.module, name) for name in layers)]
    else:
        known = [*OPS, *_classes(model)]
        raise ValueError(f"{what!r} is no op or layer: expected one of {', '.join(known)}, or the name of a module")
    total, spent = (sum(call.cost(convention) for call in some) for some in (seen, inside))
    lines += [f"{spent:,} of the forward's {total:,} FLOPs, {spent / total:.2%}, in the convention {convention}:"]
    for call, times in grouped(inside).items():
        lines += ["", f"{call.op} in {call.module or 'the model'}" + (f", {times} times" if times > 1 else "")]
        lines.append(f"    {call.arguments} -> {call.result}")
        for part, formula, numbers, flops in worked(call, convention):
            sum_of = f"{formula} = {numbers} = {flops:,}" if flops else f"nothing in a forward, by {convention}"
            lines.append(f"    {part}: {sum_of}")
    return "\n".join(lines)


def contents(model: Qwen) -> str:
    """What there is to explain: every op, and every class of layers, with the first line of its docstring."""
    lines = []
    for head, things in (("ops", OPS), ("layers", _classes(model))):
        lines += [f"{head}:", *(f"    {name:16} {_first_line(thing)}" for name, thing in things.items()), ""]
    return "\n".join([*lines, "and any module by its name or the end of it, such as layers.0.mlp"])


def grouped(calls: Iterable[Call]) -> Counter[Call]:
    """Calls that are alike, whichever layer they are in, and how many there are."""
    return Counter(call._replace(charges=tuple(map(_anywhere, call.charges))) for call in calls)


def worked(call: Call, convention: str) -> Iterator[tuple[str, str, str, int]]:
    """Of each charge of a call: the component, its formula, that with the numbers, and the FLOPs; 0 where none are."""
    for charge in call.charges:
        text, values = charge.price.formula(convention), charge.price.numbers(charge.dims, convention)
        yield component(charge), text, re.sub(r"[A-Za-z]\w*", partial(_number, values), text), cost(charge, convention)


def _number(values: dict[str, int], name: re.Match[str]) -> str:
    return str(values[name[0]])


def source(thing: Any) -> tuple[str, int, list[str], list[str]]:
    """Of an op or a class: its file, the number of its first line, the lines of its prices, and its own."""
    path, (text, first) = Path(inspect.getsourcefile(thing) or ""), inspect.getsourcelines(thing)
    prices: list[str] = []
    if inspect.isfunction(thing) and (named := set(thing.__code__.co_names) & PRICES.keys()):
        whole = inspect.getsource(inspect.getmodule(thing) or ops)
        for node in ast.parse(whole).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in named:
                prices += (ast.get_source_segment(whole, node) or "").splitlines()
    place = path.relative_to(Path(ops.__file__).parents[1]).as_posix()
    return place, first, prices, [line.rstrip() for line in text]


def _page(thing: Any) -> list[str]:
    """Where an op or a class stands, and its lines, an op's after those of its prices."""
    place, first, prices, lines = source(thing)
    return [f"{place}:{first}", "", *prices, *(["", ""] if inspect.isfunction(thing) else []), *lines, ""]


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_shown, value))
    return str(tuple(value.shape)) if isinstance(value, Tensor) else str(value)


def _is(what: str, name: str, module: nn.Module) -> bool:
    return what in (type(module).__name__, name) or name.endswith(f".{what}")


def _within(module: str, layer: str) -> bool:
    return not layer or module == layer or module.startswith(f"{layer}.")


def _anywhere(charge: Charge) -> Charge:
    """The charge as it is in any layer."""
    return charge._replace(module=re.sub(r"layers\.\d+", "layers.N", charge.module))


def _classes(model: Qwen) -> dict[str, type]:
    return {type(m).__name__: type(m) for m in model.modules() if isinstance(m, Metered)}


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]
