"""The grammar over token ids: a model that can write nothing but series, what that cuts off, and guesses ahead."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from data.draft import SeriesDraft
from data.grammar import Grammar
from qwen_min import Tokenizer


class Constrained:
    """A `generate.Constraint`: each row follows the grammar for `steps` steps, and is free after them.

    Rows start where a step does: prompts end after a ";".

    Args:
        grammar: of the text.
        symbol_ids: the token of each of `grammar.symbols`.
        vocabulary: how many tokens the model has, V.
        rows: how many sequences, samples included.
        steps: after so many a row is done.
        measure: whether to take the probability that is cut off. Without it logits of the symbols are all that is
            needed, so `tokens` are those, and a row that is done is free among them.

    Raises:
        ValueError: a symbol has no token of its own, or a number is out of its range.
    """

    def __init__(
        self,
        grammar: Grammar,
        symbol_ids: Sequence[int],
        vocabulary: int,
        rows: int,
        steps: int,
        device: torch.device | str = "cpu",
        measure: bool = True,
    ):
        ids, count = list(symbol_ids), len(grammar.symbols)
        if len(ids) != count or len(set(ids)) != count or not all(0 <= i < vocabulary for i in ids):
            raise ValueError(f"symbol tokens are {ids}: expected {count} different ones, 0 to {vocabulary - 1}")
        if rows < 1 or steps < 1:
            raise ValueError(f"constraint has {rows} rows of {steps} steps: expected at least 1 of each")
        self.steps = steps
        # One more state than the grammar has, which is never left: done. One more symbol: every other token.
        self._start, self._done = grammar.step_ends, grammar.states
        allowed = torch.zeros(grammar.states + 1, vocabulary, dtype=torch.bool)
        allowed[:-1, ids] = torch.from_numpy(grammar.follows)
        allowed[-1] = True
        self.tokens: Tensor | None = None
        if not measure:
            self.tokens = torch.tensor(sorted(ids), device=device)  # in the vocabulary's order: of equals the same wins
            allowed = allowed[:, sorted(ids)]
        follow = torch.full((grammar.states + 1, count + 1), -1)
        follow[:-1, :-1] = torch.from_numpy(grammar.next)
        follow[-1] = self._done
        symbols = torch.full((vocabulary,), count)
        symbols[ids] = torch.arange(count)
        self._allowed, self._next, self._symbols = (t.to(device) for t in (allowed, follow, symbols))
        self._state = torch.full((rows,), self._start, device=device)
        self._written, self._count = torch.zeros_like(self._state), torch.zeros_like(self._state)
        self._kept = torch.ones(rows, dtype=torch.float64, device=device)
        self._cut = torch.zeros_like(self._kept)

    @classmethod
    def for_tokenizer(cls, tokenizer: Tokenizer, grammar: Grammar, **options: Any) -> "Constrained":
        """For a tokenizer that makes one token of each symbol; ValueError for another."""
        return cls(grammar, symbol_tokens(tokenizer, grammar.symbols), **options)

    def allowed(self) -> Tensor:
        """(rows, V) bool: the tokens that may come next, of `tokens` if those are given; all in a row that is done."""
        return self._allowed[self._state]

    def advance(self, new: Tensor, kept: Tensor | None) -> None:
        """Take the chosen tokens (rows), and the probability (rows) that the model gave to all that were allowed.

        Raises:
            ValueError: a token was not allowed.
        """
        live = ~self.done
        state = self._next[self._state, self._symbols[new]]
        if (state < 0).any():
            row = int((state < 0).nonzero()[0])
            raise ValueError(f"row {row}: token {int(new[row])} may not come here: expected one that is allowed")
        if kept is not None:
            kept = kept.double().where(live, 1)
            self._kept *= kept
            self._cut += 1 - kept
        self._count += live
        self._written += live & (state == self._start)
        self._state = state.masked_fill(self._written == self.steps, self._done)

    @property
    def done(self) -> Tensor:
        """(rows) bool: which have written all their steps."""
        return self._state == self._done

    @property
    def cut(self) -> Tensor:
        """(rows) float64: 1 - the product over tokens of what was kept.

        It is the probability that free decoding, had it come the same way, would have left the grammar on it.
        """
        self._check_measured()
        return 1 - self._kept

    @property
    def cut_mean(self) -> Tensor:
        """(rows) float64: the mean over the tokens of a row's steps of the probability that was cut off."""
        self._check_measured()
        return self._cut / self._count.clamp(min=1)

    def _check_measured(self) -> None:
        if self.tokens is not None:
            raise ValueError("what was cut off is not measured: expected a constraint with measure=True")


class Drafted:
    """A `generate.Draft` for series as text.

    Args:
        draft: of the prompt's text.
        symbol_ids: the token of each of `draft.grammar.symbols`.
        nodes: how many tokens a forward carries at most: the last one chosen, and guesses.
    """

    def __init__(self, draft: SeriesDraft, symbol_ids: Sequence[int], nodes: int):
        if nodes < 1:
            raise ValueError(f"draft has {nodes} nodes: expected at least 1")
        self.draft, self.nodes = draft, nodes
        self._tokens = dict(zip(draft.grammar.symbols, symbol_ids, strict=True))
        self._symbols = {token: symbol for symbol, token in self._tokens.items()}

    @classmethod
    def for_tokenizer(cls, tokenizer: Tokenizer, grammar: Grammar, text: str, nodes: int) -> "Drafted":
        """After a prompt's text, for a tokenizer as in `Constrained.for_tokenizer`."""
        return cls(SeriesDraft(grammar, text), symbol_tokens(tokenizer, grammar.symbols), nodes)

    def guess(self) -> list[tuple[int, int]]:
        """(parent, token) of each guess: see `generate.Draft`."""
        return [(parent, self._tokens[symbol]) for parent, symbol in self.draft.guess(self.nodes - 1)]

    def advance(self, token: int) -> None:
        """Take note of a chosen token; one that is no symbol's ends the guesses until the next step."""
        self.draft.advance(self._symbols.get(token, "?"))


def symbol_tokens(tokenizer: Tokenizer, symbols: Iterable[str]) -> list[int]:
    """The token of each symbol; ValueError where one has no single token."""
    ids: list[int] = []
    for symbol in symbols:
        tokens = tokenizer.encode(symbol)
        if len(tokens) != 1:
            raise ValueError(f"{tokenizer.path}: {symbol!r} is the tokens {tokens}: expected a single one")
        ids += tokens
    return ids
