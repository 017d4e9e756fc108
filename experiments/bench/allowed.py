"""What may follow in a job's text, for both sides, and ours alone: what probably does."""

from typing import Any

from data.draft import SeriesDraft
from data.grammar import Grammar
from data.llmtime import Codec
from experiments.task.constrain import Constrained, Drafted


def constraint(job: dict[str, Any], rows: int, vocabulary: int, measure: bool = False) -> Constrained:
    """Only series may follow, without an end: a prompt ends after a step."""
    return Constrained(grammar(job), job["symbol_ids"], vocabulary, rows, 2**30, job["device"], measure)


def draft(job: dict[str, Any], prompt: list[int]) -> Drafted:
    """Guesses at what follows a prompt; a token that is no symbol's is read as the end of what is known."""
    symbols = dict(zip(job["symbol_ids"], Grammar.symbols, strict=True))
    text = "".join(symbols.get(token, "?") for token in prompt)
    return Drafted(SeriesDraft(grammar(job), text), job["symbol_ids"], job["draft"])


def grammar(job: dict[str, Any]) -> Grammar:
    """Of the text of a job's tokens."""
    return Grammar(Codec(job["decimals"]), job["variables"], job["widest"])
