"""Series as text: what is written reads back, no text breaks the reader, scales see what they say."""

import itertools
from collections import Counter
from decimal import ROUND_HALF_EVEN, Context, Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from data.llmtime import Codec, context_percentile, fixed, training_maximum, whole_series_percentile
from qwen_min import Tokenizer

POCKET = Path(__file__).parents[1] / "weights" / "pocket"
layouts = st.booleans(), st.sampled_from(["", " "])  # with a point or not, and what is between digits


def test_a_series_is_written_with_fixed_width_and_reads_back():
    values = np.array([[1.234, 0.45], [1.3, 0.5], [12.0, -0.004], [9.996, -0.3]])
    text = Codec().encode(values)
    assert text == "1.23,0.45;1.30,0.50;12.00,0.00;10.00,-0.30;"
    decoded = Codec().decode(text, 2)
    np.testing.assert_array_equal(decoded.values, [[1.23, 0.45], [1.3, 0.5], [12.0, 0.0], [10.0, -0.3]])
    np.testing.assert_array_equal(decoded.index, [0, 1, 2, 3])
    assert (decoded.rejected, decoded.steps) == (0, 4)


def test_integer_digits_are_filled_with_zeros_and_no_decimals_have_no_point():
    assert Codec(decimals=1, integer_digits=3).encode([[1.25, 1234.5]]) == "001.2,1234.5;"
    assert Codec(decimals=0, integer_digits=2).encode([[7.0, 110.0]]) == "07,110;"


@pytest.mark.parametrize(
    ("codec", "text", "width"),
    [
        (Codec(point=False), "123,046;1000,-030;000,-1234;", 8),
        (Codec(separator=" "), "1 . 2 3,0 . 4 6;1 0 . 0 0,-0 . 3 0;0 . 0 0,-1 2 . 3 4;", 16),
        (Codec(point=False, separator=" "), "1 2 3,0 4 6;1 0 0 0,-0 3 0;0 0 0,-1 2 3 4;", 12),
        (Codec(1, 2, point=False), "012,005;100,-003;000,-123;", 8),
        (Codec(0, point=False), "1,0;10,0;0,-12;", 4),
        (Codec(3, shortest=True, separator=" "), "1 . 2 3,0 . 4 6;9 . 9 9 6,-0 . 3;0 . 0,-1 2 . 3 4;", 20),
    ],
    ids=str,
)
def test_the_point_is_left_out_and_digits_stand_apart(codec, text, width):
    values = np.array([[1.23, 0.46], [9.996, -0.3], [0.0, -12.34]])
    assert codec.encode(values) == text and codec.step_width(2) == width
    np.testing.assert_allclose(codec.decode(text, 2).values, np.round(values, codec.decimals) + 0.0, atol=1e-12)


@given(st.integers(0, 6), st.integers(1, 6), st.integers(1, 4), *layouts, st.data())
def test_each_step_has_the_promised_width(decimals, whole, variables, point, separator, data):
    largest = 10.0**whole - 10.0**-decimals
    values = data.draw(arrays(np.float64, (3, variables), elements=st.floats(0, largest)))
    codec = Codec(decimals, whole, False, point, separator)
    steps = codec.encode(values).split(";")
    assert [len(step) + 1 for step in steps[:-1]] == [codec.step_width(variables)] * 3


def test_shortest_numbers_drop_trailing_zeros_but_for_the_first_decimal():
    codec, values = Codec(3, shortest=True), np.array([[2.0, 1.5], [0.12345, 10.0], [-0.0001, -0.25], [100.05, 0.0]])
    text = codec.encode(values)
    assert text == "2.0,1.5;0.123,10.0;0.0,-0.25;100.05,0.0;"
    np.testing.assert_array_equal(codec.decode(text, 2).values, np.round(values, 3) + 0.0)
    for step in ("2.00,1.5", "2,1.5", "2.,1.5", "1.50,1.5", "0.1234,1.5", "1.2300,1.5", "-0.0,1.5", "1.000,1.5"):
        assert codec.decode(step, 2).rejected == 1, step
    assert codec.decode("1.0,2.5;1.005,0.101", 2).rejected == 0


@given(st.integers(1, 4), st.floats(-1e9, 1e9) | st.floats(-20, 20))
def test_shortest_numbers_are_written_as_python_writes_the_rounded_number(decimals, value):
    """To four decimals: a smaller number Python would write with an exponent."""
    expected = str(round(value, decimals))
    assert Codec(decimals, shortest=True).encode([[value]]) == ("0.0" if expected == "-0.0" else expected) + ";"


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.data())
def test_no_step_of_shortest_numbers_is_wider_than_promised(decimals, whole, variables, data):
    largest = 10.0**whole - 10.0**-decimals
    values = data.draw(arrays(np.float64, (3, variables), elements=st.floats(0, largest)))
    codec = Codec(decimals, whole, shortest=True)
    widest = codec.step_width(variables)
    assert all(len(step) + 1 <= widest for step in codec.encode(values).split(";"))
    assert len(codec.encode([[largest] * variables])) == widest


CODECS = [Codec(), Codec(3, shortest=True), Codec(0, 2), Codec(4, 1), Codec(1, 3, shortest=True), Codec(6)]
CODECS += [Codec(point=False), Codec(1, 2, separator=" "), Codec(3, 1, False, False, " "), Codec(0, separator=" ")]


def number(field: str, codec: Codec) -> float | None:
    """A number as the codec's docstring says it is written, read character by character; None for any other text."""
    digits = field.removeprefix("-")
    if codec.separator:
        if set(digits[1::2]) - {" "} or digits.endswith(" "):
            return None
        digits = digits[::2]
    whole, point, fraction = digits.partition(".")
    if not codec.point:
        whole, point, fraction = digits[: -codec.decimals or None], ".", digits[len(digits) - codec.decimals :]
    if not whole or not set(whole + fraction) <= set("0123456789") or bool(point) != (codec.decimals > 0):
        return None
    if codec.shortest:
        fits = len(fraction) == 1 or 1 < len(fraction) <= codec.decimals and not fraction.endswith("0")
    else:
        fits = len(fraction) == codec.decimals
    narrow = codec.integer_digits <= len(whole) <= 15 - codec.decimals
    filled = whole[0] == "0" and len(whole) > codec.integer_digits
    size, negative = int(whole + fraction), field.startswith("-")
    if not fits or not narrow or filled or negative and not size:
        return None
    return (-1 if negative else 1) * (size / 10 ** len(fraction))


def plainly_read(text: str, codec: Codec, variables: int) -> tuple[list[int], list[list[float]], int]:
    steps = text.split(";")
    if not steps[-1]:
        del steps[-1]
    index, rows = [], []
    for i, step in enumerate(steps):
        row = [number(field, codec) for field in step.split(",")]
        if len(row) == variables and None not in row:
            index.append(i)
            rows.append([value for value in row if value is not None])
    return index, rows, len(steps)


def same_as_plainly_read(text: str, codec: Codec, variables: int) -> Counter[str]:
    """Assert that the codec reads what the plain reader reads; how many steps were parsed and rejected."""
    decoded, (index, rows, steps) = codec.decode(text, variables), plainly_read(text, codec, variables)
    assert (decoded.steps, decoded.rejected) == (steps, steps - len(index)), repr(text)
    assert decoded.index.tolist() == index and decoded.values.tolist() == rows, repr(text)
    assert decoded.values.shape == (len(rows), variables)
    return Counter(texts=1, parsed=len(rows), rejected=steps - len(rows), empty=not steps)


def series(draw: np.random.Generator, points: int, variables: int) -> np.ndarray:
    return draw.normal(scale=10.0 ** draw.integers(-2, 4), size=(points, variables))


def test_30000_token_sequences_over_all_ids_are_read_as_a_plain_reader_reads_them():
    """A third of any ids (and of some that have no token), a third of symbols, a third of series with ids changed."""
    draw, tokenizer, seen = np.random.default_rng(0), Tokenizer.from_pretrained(POCKET), Counter[str]()
    symbols = np.array(tokenizer.encode("0123456789" * 2 + ".,;" * 6 + "- "))
    for start, sequences in itertools.product(range(0, 30000, 100), ["any", "symbols", "series"]):
        lengths = draw.integers(1, 61, size=34 if sequences == "series" else 33)
        codec, variables = CODECS[start // 100 % len(CODECS)], 1 + start // 100 % 3
        if sequences == "series":
            ids = np.array(tokenizer.encode(codec.encode(series(draw, 600 // variables, variables))))[: lengths.sum()]
            changed = draw.random(len(ids)) < 0.02
            ids[changed] = draw.integers(0, len(tokenizer) + 10, size=changed.sum())
        elif sequences == "symbols":
            ids = draw.choice(symbols, lengths.sum())
        else:
            ids = draw.integers(0, len(tokenizer) + 10, size=lengths.sum())
        for part in np.split(ids, np.cumsum(lengths)[:-1]):
            seen += same_as_plainly_read(tokenizer.decode(part.tolist()), codec, variables)
    print(dict(seen))
    assert seen["texts"] == 30000 and seen["parsed"] > 9000 and seen["rejected"] > 30000 and seen["empty"]


STRANGE = [*"0123456789.,;-", *"+ e_\n\t\0\x7f", *"\u0661\uff11\u2212\ud800\udcff\U0001f40d", "nan", "1e9"]


def mutated(text: str, draw: np.random.Generator) -> str:
    """One to four characters inserted, deleted, replaced or swapped with the next."""
    characters = list(text)
    for _ in range(draw.integers(1, 5)):
        at, how = int(draw.integers(len(characters))), draw.integers(4)
        strange = STRANGE[draw.integers(len(STRANGE))]
        if how == 0:
            characters.insert(at, strange)
        elif how == 1:
            del characters[at]
        elif how == 2:
            characters[at] = strange
        else:
            characters[at : at + 2] = characters[at : at + 2][::-1]
    return "".join(characters)


def test_10000_mutated_texts_are_read_as_a_plain_reader_reads_them():
    draw, seen = np.random.default_rng(1), Counter[str]()
    for i in range(10000):
        codec, variables = CODECS[i % len(CODECS)], 1 + i % 3
        text = mutated(codec.encode(series(draw, int(draw.integers(1, 7)), variables)) + ";" * 4, draw)
        seen += same_as_plainly_read(text, codec, variables)
    print(dict(seen))
    assert seen["texts"] == 10000 and min(seen["parsed"], seen["rejected"]) > 10000


EXACT = Context(prec=2000)  # digits of any float64, and of any difference here


def hard_values(draw: np.random.Generator, codec: Codec, points: int, variables: int) -> np.ndarray:
    """Ordinary numbers, some replaced by what is hard to write: one kind in each series."""
    values, limit = series(draw, points, variables), 10.0 ** (15 - codec.decimals)
    unit, whole = 10.0**-codec.decimals, draw.integers(-(10**6), 10**6, size=values.shape)
    some = draw.random(values.shape) < 0.3
    hard = [
        (whole + 0.5) * unit,  # near a tie
        (whole * 2 + 1) / 2.0 ** draw.integers(1, 8),  # a tie exactly, at 1 to 7 decimals
        np.full(values.shape, -0.0),
        np.sign(values) * 5e-324 * np.abs(whole),  # denormal
        np.sign(values) * (limit - unit / 2 * draw.integers(0, 4, size=values.shape)),  # at the width's limit
        np.sign(values) * np.nextafter(limit - unit / 2, draw.choice([0, np.inf], values.shape)),
        np.sign(values) * 10.0 ** draw.uniform(10, 308, size=values.shape),
        draw.choice([np.nan, np.inf, -np.inf], values.shape),
    ]
    return np.where(some, hard[draw.integers(len(hard))], values)


def test_10000_series_read_back_to_half_a_unit_or_are_refused_in_one_line():
    """Half a unit of the decimal numbers themselves, exactly; float64 then is the nearest to what was written."""
    draw, seen = np.random.default_rng(2), Counter[str]()
    for i in range(10000):
        codec, variables = CODECS[i % len(CODECS)], 1 + i % 3
        values = hard_values(draw, codec, int(draw.integers(1, 8)), variables)
        numbers = [Decimal(value) for value in values.ravel().tolist()]
        unit = Decimal(1).scaleb(-codec.decimals)
        if not all(
            x.is_finite() and abs(x.quantize(unit, ROUND_HALF_EVEN, EXACT)) < Decimal(10) ** (15 - codec.decimals)
            for x in numbers
        ):
            with pytest.raises(ValueError, match="^encode: .*: expected ") as caught:
                codec.encode(values)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
            seen["refused"] += 1
            continue
        text = codec.encode(values)
        fields = [field.replace(" ", "") for step in text.split(";")[:-1] for field in step.split(",")]
        written = [Decimal(field).scaleb(0 if codec.point else -codec.decimals) for field in fields]
        assert all(
            abs(EXACT.subtract(a, b)) <= unit / 2 and (not a or (a > 0) == (b > 0))
            for a, b in zip(written, numbers, strict=True)
        )
        decoded = codec.decode(text, variables)
        assert decoded.values.tolist() == np.array(written, dtype=np.float64).reshape(values.shape).tolist()
        assert not np.signbit(decoded.values[decoded.values == 0]).any() and decoded.rejected == 0
        assert codec.encode(decoded.values) == text
        seen["kept"] += 1
    print(dict(seen))
    assert min(seen.values()) > 2000 and seen.total() == 10000


def test_a_last_step_counts_if_it_is_complete_and_is_rejected_if_it_is_cut():
    assert Codec().decode("1.00,2.00;3.00,4.00", 2).rejected == 0
    assert Codec().decode("1.00,2.00;3.00,4.0", 2).rejected == 1
    assert Codec().decode("", 2).steps == 0
    assert Codec().decode("9" * 5000 + ".00,0.45", 2).rejected == 1  # more digits than Python's int reads


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([[1.0, 2.0], [3.0, np.nan]], "step 1, variable 1 is nan"),
        ([[np.inf]], "step 0, variable 0 is inf"),
        ([1.0, 2.0], r"shape \(2,\)"),
        ([[]], r"shape \(1, 0\)"),
        ([[1e13]], "less than 1e13 in size with 2 decimals"),
        ([[-9999999999999.996]], "less than 1e13"),
        ([[1e300]], "less than 1e13"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(values, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        Codec().encode(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("decimals", "whole"), [(-1, 1), (2, 0), (10, 6)])
def test_a_codec_that_float64_cannot_keep_is_refused(decimals, whole):
    with pytest.raises(ValueError, match="together at most 15"):
        Codec(decimals, whole)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"decimals": 0, "shortest": True}, "shortest with 0 decimals: expected at least 1"),
        ({"shortest": True, "point": False}, "shortest without a point: expected one"),
        ({"separator": "_"}, "separator is '_': expected one of"),
    ],
)
def test_a_codec_whose_text_could_not_be_read_is_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        Codec(**options)


def test_the_scale_rules_are_their_formulas():
    train = np.random.default_rng(0).gamma(2.0, size=(4, 30, 2))
    assert fixed(0.5) == 0.5
    assert training_maximum(train) == train.max() / 9.99
    prey, predator = train[1].T
    expected = max(np.percentile(prey[:20], 95), np.percentile(predator[:20], 95)) / 10
    assert context_percentile(train[1], 20) == expected
    expected = max(np.percentile(prey, 95), np.percentile(predator, 95)) / 10
    assert whole_series_percentile(train[1]) == expected


def test_the_scale_rules_take_sizes_whatever_the_sign():
    train = np.random.default_rng(0).gamma(2.0, size=(4, 30, 2))
    signed = train * np.where(train > 1, -1, 1)
    assert training_maximum(signed) == training_maximum(train)
    assert context_percentile(signed[0], 20) == context_percentile(train[0], 20)
    assert whole_series_percentile(signed[0]) == whole_series_percentile(train[0])


def test_the_context_scale_does_not_see_the_future_and_the_whole_series_scale_does():
    series = np.random.default_rng(1).gamma(2.0, size=(30, 2))
    other_future = series.copy()
    other_future[20:] = np.nan
    assert context_percentile(other_future, 20) == context_percentile(series, 20)
    other_future[20:] = 100.0
    assert whole_series_percentile(other_future) != whole_series_percentile(series)


ZEROS, UNKNOWN = np.zeros((5, 2)), np.full((5, 2), np.nan)
EMPTY: list[float] = []


@pytest.mark.parametrize(
    ("rule", "arguments"),
    [
        *((fixed, (alpha,)) for alpha in (0.0, -1.0, np.nan, np.inf)),
        *((training_maximum, (train,)) for train in (ZEROS, UNKNOWN, EMPTY)),
        *((context_percentile, (series, 2)) for series in (ZEROS, UNKNOWN, EMPTY, 1.0, [1.0, 2.0])),
        *((context_percentile, (ZEROS + 1, points)) for points in (0, 6)),
        *((whole_series_percentile, (series,)) for series in (ZEROS, UNKNOWN, EMPTY, 1.0)),
    ],
)
def test_a_scale_that_is_not_finite_and_positive_is_refused_in_one_line(rule, arguments):
    with pytest.raises(ValueError, match="expected") as caught:
        rule(*arguments)
    assert "\n" not in str(caught.value)
