"""What a model says of the next step without drawing: the probability of each number that it could write there.

A number is a path down the grammar: from each prefix the model's own softmax (temperature 1) over the symbols that may
follow. Prefixes are read breadth-first, all that are known so far as one tree after the prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.grammar import Grammar
from experiments.accounting import predict
from experiments.forecasting.scores import QUANTILES
from experiments.task.constrain import symbol_tokens
from experiments.task.task import Task
from qwen_min import FlopMeter, Qwen, QwenConfig
from qwen_min.fast.tree import forward
from qwen_min.generate import prefill

Array = NDArray[np.float64]

BELOW = 1e-4  # prefixes of numbers that are less likely than this are not read by default
MOST_NODES = 2000  # of a tree: 2 decimals take 120, 3 take 1,120


@dataclass(frozen=True)
class Density:
    """The probability of each number, raw units: values (n,) rising, probabilities (n,), their sum 1 - `pruned`.

    `pruned` is the probability of what was left out. Below, probabilities are divided by what was kept: so no value of
    the CDF is off by more than `pruned`.
    """

    values: Array
    probabilities: Array
    pruned: float

    @property
    def cdf(self) -> Array:
        """P(X <= value) at each value, (n,)."""
        total = np.cumsum(self.probabilities)
        return total / total[-1]

    def quantile(self, level: float) -> float:
        """The least value with a CDF of at least `level`."""
        return float(self.values[min(int(np.searchsorted(self.cdf, level)), len(self.values) - 1)])

    def crps(self, truth: float) -> float:
        """E|X - y| - E|X - X'| / 2, exactly: the second half is the integral of F (1 - F).

        Source: Gneiting & Raftery 2007, "Strictly proper scoring rules, prediction, and estimation", section 4.2."""
        p, f = self.probabilities / self.probabilities.sum(), self.cdf[:-1]
        return float(p @ np.abs(self.values - truth) - (f * (1 - f)) @ np.diff(self.values))

    def pit(self, truth: float) -> float:
        """P(X < y) + P(X = y) / 2, which is uniform over many forecasts that are calibrated; y as it would be written.

        Source: Czado, Gneiting & Held 2009, "Predictive model assessment for count data", of which this is the middle.
        """
        p = self.probabilities / self.probabilities.sum()
        return float(p[self.values < truth].sum() + p[self.values == truth].sum() / 2)

    def record(self, truth: float | None) -> dict[str, Any]:
        """Everything of it as JSON; scores where the truth is known."""
        found: dict[str, Any] = {"values": self.values.tolist(), "probabilities": self.probabilities.tolist()}
        found |= {"cdf": self.cdf.tolist(), "pruned": self.pruned}
        found |= {"quantiles": {f"{level:g}": self.quantile(level) for level in QUANTILES}}
        return found | ({} if truth is None else {"crps": self.crps(truth), "pit": self.pit(truth)})


@dataclass
class _Tree:
    """Symbols after a prompt, each with the one that it follows: -1 for the prompt's last token."""

    symbols: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)

    def add(self, symbol: int, parent: int) -> int:
        self.symbols.append(symbol)
        self.parents.append(parent)
        return len(self.symbols) - 1


Ask = Callable[[_Tree, Sequence[int], Sequence[int]], Array]
"""Probabilities (n, symbols) after n nodes, -1 for the prompt, in these states of the grammar."""


def _walk(grammar: Grammar, before: str, below: float, ask: Ask) -> tuple[dict[str, float], float]:
    """The probability of each number after the numbers `before` it in its step, and of what was left out.

    Raises:
        ValueError: the grammar does not allow what is before, or there are too many numbers to read.
    """
    tree, node, state = _Tree(), -1, grammar.step_ends
    for character in before:
        symbol = grammar.symbols.index(character)
        node, state = tree.add(symbol, node), int(grammar.next[state, symbol])
        if state < 0:
            raise ValueError(f"before is {before!r:.60}: expected numbers of a step, each with its comma")
    found: dict[str, float] = {}
    pruned, last = 0.0, [(node, state, "", 1.0)]
    while last:
        if len(tree.symbols) > MOST_NODES:
            raise ValueError(f"a density takes a tree of over {MOST_NODES} symbols: expected fewer digits a number")
        every = ask(tree, [one[0] for one in last], [one[1] for one in last])
        met = []
        for (node, state, text, reached), after in zip(last, every, strict=True):
            for symbol in np.flatnonzero(grammar.follows[state]).tolist():
                p, to, path, only = reached * float(after[symbol]), state, list[int](), [symbol]
                while len(only) == 1 and grammar.symbols[only[0]] not in ",;":  # what must follow is not asked for
                    path += only
                    to = int(grammar.next[to, only[0]])
                    only = np.flatnonzero(grammar.follows[to]).tolist()
                written = text + "".join(grammar.symbols[one] for one in path)
                if len(only) == 1:
                    found[written] = p
                elif p < below:
                    pruned += p
                else:
                    at = node
                    for one in path:
                        at = tree.add(one, at)
                    met.append((at, to, written, p))
        last = met
    if not found:
        raise ValueError(f"below is {below}: expected less, as it leaves out every number")
    return found, pruned


def priced(task: Task, config: QwenConfig, system: int, **trained: Any) -> int:
    """The most FLOPs of `densities`: exactly those where nothing is left out and all numbers are as wide.

    `trained` is rank, targets and logit_bias, as in `predict`.

    Raises:
        ValueError: there are too many numbers to read.
    """
    grammar, codec = task.grammar, task.codec
    prompt, some = len(task.tokens(system, task.settings.points)), len(grammar.symbols)
    config = replace(config, max_position_embeddings=prompt + MOST_NODES)  # a tree is priced as a chain
    read = predict.predict(config, 1, prompt, last_only=True, symbols=some, **trained)
    parts = read.by_component()
    head = parts["head"] + parts.get("logit_bias", 0)
    total = read.total - head

    def ask(tree: _Tree, at: Sequence[int], states: Sequence[int]) -> Array:
        nonlocal total
        nodes = len(tree.symbols)
        total += predict.predict(config, 1, nodes, cached=prompt, symbols=some, **trained).total if nodes else head
        return np.ones((len(at), some))

    largest = 10.0**grammar.widest - 10.0**-codec.decimals
    widest = codec.encode([[-largest if grammar.signed else largest]]).replace(";", ",")
    for variable in range(grammar.variables):
        _walk(grammar, widest * variable, 0.0, ask)
    return total


@torch.inference_mode()
def densities(task: Task, model: Qwen, system: int, step: str, below: float = BELOW) -> tuple[list[Density], int]:
    """What the model says of each variable after the first `points` of a system, and the FLOPs that it took.

    Args:
        step: the text of the next step, "1.23,0.45;": each variable is conditional on the ones before it there.
        below: prefixes that are less likely are not read: the numbers that begin so are left out; 0 for none.

    Raises:
        ValueError: `below` or `step` is no such value, or there are too many numbers to read.
    """
    if not 0 <= below < 1:
        raise ValueError(f"below is {below}: expected at least 0, less than 1")
    grammar, device = task.grammar, model.device
    ids = symbol_tokens(task.tokenizer, grammar.symbols)
    symbols, follows = torch.tensor(ids, device=device), torch.from_numpy(grammar.follows).to(device)
    with FlopMeter() as meter:
        prompt = torch.tensor([task.tokens(system, task.settings.points)], device=device)
        read = prefill(model, prompt, MOST_NODES)

        def ask(tree: _Tree, at: Sequence[int], states: Sequence[int]) -> Array:
            hidden = read.hidden
            if tree.symbols:
                hidden = forward(model.model, symbols[tree.symbols][None], read.rewound(), tree.parents)
            logits = model.head(hidden, symbols)[0, list(at)].double()  # (n, symbols)
            return logits.masked_fill(~follows[list(states)], -torch.inf).softmax(-1).cpu().numpy()

        made = []
        for variable in range(grammar.variables):
            before = "".join(number + "," for number in step.split(",")[:variable])
            found, pruned = _walk(grammar, before, below, ask)
            alpha = np.broadcast_to(task.alphas[system], grammar.variables)[variable]
            values = np.array([*map(task.codec.value, found)]) * alpha
            order = np.argsort(values)
            made.append(Density(values[order], np.array([*found.values()])[order], pruned))
    return made, meter.total
