"""Real tokens for every case: validation series as text, one after the other where a window is longer than one."""

from itertools import chain
from pathlib import Path
from typing import Any

from data.grammar import Grammar
from experiments.settings.record import Settings
from experiments.task.task import Task
from qwen_min import Tokenizer


class Texts:
    """The validation series as a model's tokenizer writes them.

    Raises:
        ValueError: the model has no tokenizer that makes one token of each symbol of a series.
    """

    def __init__(self, model: Path):
        self.task = Task.prepare(Settings(model=str(model)), Tokenizer.from_pretrained(model))
        symbols = [self.task.tokenizer.encode(symbol) for symbol in Grammar.symbols]
        if any(len(ids) != 1 for ids in symbols):
            raise ValueError(f"{model}: writes a symbol as several tokens: expected a tokenizer with one for each")
        self.symbols = [ids[0] for ids in symbols]
        self.systems = self.task.split.validation.tolist()
        self.variables = self.task.dataset.series.shape[2]
        self.step = self.task.codec.step_width(self.variables)  # tokens of a step, where no number is wider

    def grammar(self) -> dict[str, Any]:
        """What a job must know to follow the grammar."""
        codec, widest = self.task.codec, self.task.widest
        return {"symbol_ids": self.symbols, "decimals": codec.decimals, "variables": self.variables, "widest": widest}

    def windows(self, rows: int, tokens: int) -> list[list[int]]:
        """(rows, tokens) ids: row i starts with validation series i."""
        found = []
        for first in range(rows):
            order = chain(self.systems[first % len(self.systems) :], self.systems * (1 + tokens // self.step))
            ids: list[int] = []
            while len(ids) < tokens:
                ids += self.task.tokens(next(order))
            found.append(ids[:tokens])
        return found

    def prompts(self, rows: int, tokens: int) -> list[list[int]]:
        """As `windows`, of series whose text ends a step there: as many as there are, then again from the first."""
        ends = self.symbols[Grammar.symbols.index(";")]
        found = [row for row in self.windows(len(self.systems), tokens) if row[-1] == ends]
        if not found:
            raise ValueError(f"no series ends a step at token {tokens}: expected a multiple of {self.step}")
        return [found[i % len(found)] for i in range(rows)]
