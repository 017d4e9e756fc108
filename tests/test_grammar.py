"""The automaton accepts the texts that a codec writes, of negative numbers if it is signed, and no other."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from data.grammar import Grammar
from data.llmtime import Codec


def accepts(grammar: Grammar, text: str) -> bool:
    state = 0
    for character in text:
        if character not in grammar.symbols:
            return False
        state = grammar.next[state, grammar.symbols.index(character)]
        if state < 0:
            return False
    return state == grammar.step_ends


def fits(text: str, codec: Codec, variables: int, widest: int, signed: bool) -> bool:
    """The same by `Codec.decode`: every step is one that it could have written, none is wide, or negative unasked."""
    numbers = [number.removeprefix("-" if signed else "") for number in re.split("[,;]", text)]
    if codec.separator:
        numbers = [number.replace(codec.separator, "") for number in numbers]
    most = widest if codec.point else widest + codec.decimals
    narrow = all(len(number.partition(".")[0]) <= most for number in numbers)
    narrow = narrow and (signed or "-" not in text)
    return narrow and (not text or text.endswith(";")) and codec.decode(text, variables).rejected == 0


@st.composite
def grammars(draw: st.DrawFn) -> Grammar:
    decimals, fewest = draw(st.integers(0, 5)), draw(st.integers(1, 3))
    shortest = decimals > 0 and draw(st.booleans())
    codec = Codec(decimals, fewest, shortest, shortest or draw(st.booleans()), draw(st.sampled_from(["", " "])))
    return Grammar(codec, draw(st.integers(1, 3)), draw(st.integers(fewest, 5)), draw(st.booleans()))


@given(grammars(), st.data())
def test_every_text_that_is_written_for_numbers_that_fit_is_accepted(grammar, data):
    codec, largest = grammar.codec, 10.0**grammar.widest - 10.0**-grammar.codec.decimals
    numbers = st.floats(0, largest) | st.integers(0, int(largest)).map(float) | st.floats(0, 1)
    if grammar.signed:
        numbers |= numbers.map(float.__neg__)
    values = data.draw(arrays(np.float64, (3, grammar.variables), elements=numbers))
    assert accepts(grammar, codec.encode(values))


@given(grammars(), st.data())
def test_every_text_that_is_accepted_is_read_whole(grammar, data):
    text, state = "", 0
    while len(text) < 60 or state != grammar.step_ends:
        column = data.draw(st.sampled_from(np.flatnonzero(grammar.follows[state]).tolist()))
        ends = [c for c in np.flatnonzero(grammar.follows[state]).tolist() if grammar.symbols[c] in ".,;"]
        if len(text) >= 60 and ends:  # then to the end
            column = ends[0]
        text, state = text + grammar.symbols[column], grammar.next[state, column]
    decoded = grammar.codec.decode(text, grammar.variables)
    assert (decoded.rejected, decoded.steps) == (0, text.count(";"))
    assert grammar.signed or (decoded.values >= 0).all()
    assert (np.abs(decoded.values) < 10.0**grammar.widest).all()
    assert grammar.codec.encode(decoded.values) == text


@pytest.mark.parametrize(
    ("codec", "variables", "widest"),
    [
        *((Codec(0), 1, 1), (Codec(0), 2, 2), (Codec(0, 2), 1, 3), (Codec(1), 1, 2), (Codec(1, 2), 1, 2)),
        *((Codec(2), 1, 1), (Codec(1, shortest=True), 1, 2), (Codec(2, shortest=True), 1, 1)),
        *((Codec(3, shortest=True), 1, 1), (Codec(2, point=False), 1, 2), (Codec(1, 1, point=False), 2, 1)),
        *((Codec(0, separator=" "), 2, 2), (Codec(1, separator=" "), 1, 1)),
        (Codec(2, shortest=True, separator=" "), 1, 1),
        (Codec(1, point=False, separator=" "), 1, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("signed", [False, True])
def test_of_all_short_texts_exactly_those_that_could_have_been_written_are_accepted(codec, variables, widest, signed):
    grammar = Grammar(codec, variables, widest, signed)
    alphabet = "01.,;" + "-" * signed + codec.separator
    texts = ("".join(t) for n in range(7) for t in itertools.product(alphabet, repeat=n))
    for text in texts:
        assert accepts(grammar, text) == fits(text, codec, variables, widest, signed), text


@given(st.text(alphabet="0129.,;- ", max_size=24), grammars())
def test_of_any_text_exactly_what_could_have_been_written_is_accepted(text, grammar):
    assert accepts(grammar, text) == fits(text, grammar.codec, grammar.variables, grammar.widest, grammar.signed)


@given(grammars())
def test_the_tables_agree_and_no_state_is_a_dead_end(grammar):
    symbols = "0123456789" + "." * grammar.codec.point + ",;" + "-" * grammar.signed + grammar.codec.separator
    assert grammar.symbols == tuple(symbols)
    assert grammar.next.shape == grammar.follows.shape == (grammar.states, len(symbols))
    np.testing.assert_array_equal(grammar.follows, grammar.next >= 0)
    assert grammar.next.max() == grammar.states - 1 and grammar.next.min() == -1
    end = symbols.index(";")
    assert (grammar.next[:, end] <= 0).all()  # ";" leads to the start, and nothing else does
    assert (np.delete(grammar.next, end, axis=1) != 0).all()
    for digit in range(2, 10):  # 1 to 9 are alike
        np.testing.assert_array_equal(grammar.next[:, digit], grammar.next[:, 1])
    ends = {0}
    for _ in range(grammar.states):
        ends |= {s for s in range(grammar.states) if ends & set(grammar.next[s].tolist())}
    assert ends == set(range(grammar.states))


@pytest.mark.parametrize(
    ("codec", "variables", "widest", "problem"),
    [
        (Codec(), 0, 1, "0 variables: expected at least 1"),
        (Codec(2, 3), 2, 2, "at most 2 digits before the point: expected 3 to 13"),
        (Codec(10), 2, 6, "at most 6 digits before the point: expected 1 to 5"),
    ],
)
def test_a_grammar_of_no_text_is_refused_in_one_line(codec, variables, widest, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        Grammar(codec, variables, widest)
    assert "\n" not in str(caught.value)
