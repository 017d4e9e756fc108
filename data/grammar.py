"""Which character may follow in a text of a `Codec`: a finite automaton, for decoding that cannot go wrong.

Source: Willard and Louf 2023, "Efficient Guided Generation for Large Language Models", section 3, where a language
model's tokens are masked by the automaton's state. Here a token is a character.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.llmtime import Codec

DIGITS = "0123456789"


class Grammar:
    """The steps of numbers that `codec` can write with at most `widest` digits before the point.

    Numbers are not negative unless the grammar is `signed`; it has a symbol more then, the minus. Without a point it
    has one less, and a separator is one more.

    states: how many there are. 0 is the start of a step, and what ";" leads back to: `step_ends`.
    symbols: the characters, in the order of the tables' columns.
    follows: (states, symbols) bool, which symbol may come next; at least one in each state.
    next: (states, symbols), the state that a symbol leads to, -1 where it may not come.

    Raises:
        ValueError: there are no variables, or the codec writes no number so narrow, or none so wide.
    """

    symbols: tuple[str, ...] = (*DIGITS, ".", ",", ";")
    step_ends = 0

    def __init__(self, codec: Codec, variables: int, widest: int = 1, signed: bool = False):
        if variables < 1:
            raise ValueError(f"grammar: {variables} variables: expected at least 1")
        if not codec.integer_digits <= widest <= codec.most_integer_digits:
            fit = f"{codec.integer_digits} to {codec.most_integer_digits}"
            raise ValueError(f"grammar: at most {widest} digits before the point: expected {fit}")
        self.codec, self.variables, self.widest, self.signed = codec, variables, widest, signed
        self.symbols = (*DIGITS, *"." * codec.point, ",", ";", *"-" * signed, *codec.separator)
        # Without a point all digits are alike: a whole number of more of them.
        alike = 0 if codec.point else codec.decimals
        self._decimals, self._fewest, self._most = codec.decimals - alike, codec.integer_digits + alike, widest + alike
        places, rows = [_Place(0)], []
        for place in places:  # which grows as new ones are met
            met = [self._after(place, symbol) for symbol in self.symbols]
            places += dict.fromkeys(p for p in met if p is not None and p not in places)
            rows.append([-1 if p is None else places.index(p) for p in met])
        self.states = len(places)
        self.next: NDArray[np.int64] = np.array(rows, dtype=np.int64)
        self.follows: NDArray[np.bool_] = self.next >= 0

    def _after(self, place: "_Place", symbol: str) -> "_Place | None":
        """Where `symbol` leads to; None where `Codec.decode` would reject whatever comes after it."""
        begun, apart = place.whole > 0 or place.decimals >= 0, place._replace(apart=True)
        if symbol == self.codec.separator:
            more = begun and not place.apart and any(self._after(apart, s) for s in (*DIGITS, "."))
            return apart if more else None
        if begun and self.codec.separator and (symbol in (*DIGITS, ".")) != place.apart:
            return None
        variable, whole, decimals, zero, minus, _ = place
        fewest, last = self._fewest, self._decimals
        if symbol == "-":
            return _Place(variable, minus=True) if place == _Place(variable) else None
        if symbol in DIGITS:
            minus = minus and symbol == "0"
            if minus and (decimals + 1 == last if decimals >= 0 else not last and whole + 1 == fewest):
                return None  # no digit is left that could make the number less than zero
        if symbol in DIGITS and decimals < 0:
            if whole == (fewest if zero else self._most):
                return None
            return _Place(variable, whole + 1, zero=zero if whole else symbol == "0", minus=minus)
        if symbol in DIGITS:
            useless = self.codec.shortest and symbol == "0"  # unless another digit comes after it, or it is the first
            if decimals == last or useless and 0 < decimals == last - 1:
                return None
            return _Place(variable, 0, decimals + 1, useless and decimals > 0, minus)
        if symbol == ".":
            return _Place(variable, 0, 0, minus=minus) if last and decimals < 0 and whole >= fewest else None
        if minus:
            return None
        if last == 0:
            complete = whole >= fewest
        else:
            complete = decimals == last or self.codec.shortest and decimals > 0 and not zero
        if not complete or (symbol == ";") != (variable == self.variables - 1):
            return None
        return _Place((variable + 1) % self.variables)


class _Place(NamedTuple):
    """How much of which number a step holds so far."""

    variable: int
    whole: int = 0  # digits before the point
    decimals: int = -1  # after it; -1 before it
    zero: bool = False  # before the point: the first digit is 0; after it: the number may not end here, on a 0
    minus: bool = False  # it began with one, and no digit but 0 has come: there is no -0
    apart: bool = False  # a separator came last, so that a digit or the point must follow
