"""Series as text for a language model: scale rules, and numbers as digits.

Scaled values are x / alpha. "," stands between the variables of a step and ";" after every step. Qwen makes
one token of each character here, so characters are tokens. Source: Gruver et al. 2023, "Large Language Models
Are Zero-Shot Time Series Forecasters" (LLMTIME), section 3; there the digits are spaced out and the point is
left out, both options of `Codec`. Dimension letters: S series, P points, V variables.
"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

# float64 keeps every decimal number of this many digits apart (C's DBL_DIG).
FLOAT64_DIGITS = 15
SEPARATORS = ("", " ")
PERCENTILE = 95  # of sizes, which is written 10: see below


def fixed(alpha: float) -> float:
    """One alpha for all series, as given; ValueError unless it is finite and positive."""
    return _checked("fixed scale", alpha)


def training_maximum(train: ArrayLike) -> float:
    """alpha = max |train| / 9.99: the largest size in the training series (S, P, V) is written 9.99, or -9.99."""
    rule = "training maximum"
    return _checked(rule, np.max(_filled(rule, train)) / 9.99)


def context_percentile(series: ArrayLike, context_points: int) -> float:
    """alpha = max over variables of percentile 95, / 10, of the sizes in the first points of one series (P, V)."""
    rule, values = "context percentile", np.atleast_1d(series)
    if not 1 <= context_points <= len(values):
        raise ValueError(f"{rule}: {context_points} points of context: expected 1 to {len(values)}, all there are")
    return _largest_percentile(rule, values[:context_points])


def whole_series_percentile(series: ArrayLike) -> float:
    """As `context_percentile`, but of all points: a forecast that is scaled so has seen its horizon.

    Kept to reproduce results that were scaled like this.
    """
    return _largest_percentile("whole-series percentile", series)


APART = 10.0  # sizes of variables that differ by more get an alpha each: two decimals would be left of the smaller


def of_each(sizes: ArrayLike) -> NDArray[np.float64]:
    """The sizes of variables (V,) that differ by more than ten times; else, for all of them, the largest.

    What is 0 has no size of its own: it takes the largest, and 1 where all are 0."""
    found = np.asarray(sizes, np.float64)
    found = np.where(found > 0, found, found.max() or 1.0)
    return found if found.max() / found.min() > APART else np.full_like(found, found.max())


def sizes(series: ArrayLike) -> NDArray[np.float64]:
    """The percentile 95 of the sizes of each variable of a series (P, V); its largest where that is 0."""
    values = np.abs(np.asarray(series, np.float64))
    found = np.percentile(values, PERCENTILE, axis=0)
    return np.where(found > 0, found, values.max(axis=0))


@dataclass(frozen=True)
class Decoded:
    """What a text says: values (n, V) float64, and which step of the text each row is, index (n,).

    steps: the steps in the text, rejected: those that are not rows, so n + rejected = steps.
    """

    values: NDArray[np.float64]
    index: NDArray[np.int64]
    rejected: int
    steps: int


@dataclass(frozen=True)
class Codec:
    """Numbers with `decimals` decimals and at least `integer_digits` digits before the point.

    Numbers that need more integer digits get them; with 0 decimals there is no point. What is written reads
    back to half a unit in the last place (and half a spacing of float64). For that a number has at most 15
    digits: rounded, it must be less than 10^(15 - decimals) in size.

    shortest: trailing zeros are dropped, all but the first decimal, as in Python's str() of the rounded number
        (but never an exponent): "2.0", "1.5", "0.123". So the width of a number varies.
    point: False leaves it out, and the last `decimals` digits are the decimals: "123", "-045", "1200".
    separator: what stands between the digits of a number, the point among them: " " or nothing. "-1 . 2 3".
    """

    decimals: int = 2
    integer_digits: int = 1
    shortest: bool = False
    point: bool = True
    separator: str = ""

    def __post_init__(self) -> None:
        whole, decimals = self.integer_digits, self.decimals
        if whole < 1 or decimals < 0 or whole + decimals > FLOAT64_DIGITS:
            rule = f"at least 1 and 0, together at most {FLOAT64_DIGITS}"
            raise ValueError(f"codec: {whole} integer digits and {decimals} decimals: expected {rule}")
        if self.shortest and decimals == 0:
            raise ValueError("codec: shortest with 0 decimals: expected at least 1, which is always written")
        if self.shortest and not self.point:
            raise ValueError("codec: shortest without a point: expected one, or nothing says where decimals begin")
        if self.separator not in SEPARATORS:
            raise ValueError(f"codec: separator is {self.separator!r:.60}: expected one of {SEPARATORS}")

    def step_width(self, variables: int, signed: bool = False) -> int:
        """Characters, which are tokens, of a step of numbers that fit (`shortest`: at most; `signed`: all negative)."""
        digits = self.integer_digits + self.decimals + (self.point and self.decimals > 0)
        return variables * (signed + digits + (digits - 1) * len(self.separator) + 1)

    def encode(self, values: ArrayLike) -> str:
        """Scaled values (P, V) as text such as "1.23,0.45;1.30,0.50;".

        Raises ValueError for other shapes, and for a number that is not finite or has too many digits.
        """
        rows = np.asarray(values, dtype=np.float64)
        if rows.ndim != 2 or rows.shape[1] == 0:
            raise ValueError(f"encode: values have shape {rows.shape}: expected (points, variables)")
        if not np.isfinite(rows).all():
            step, variable = first = tuple(np.argwhere(~np.isfinite(rows))[0])
            raise ValueError(f"encode: step {step}, variable {variable} is {rows[first]}: expected finite")
        return "".join(",".join(map(self._number, row)) + ";" for row in rows.tolist())

    def decode(self, text: str, variables: int) -> Decoded:
        """Read the steps that `encode` could have written, and count the others; no text raises.

        A step is what stands between two ";": exactly `variables` numbers, or it is rejected as a whole, so
        no number can move to another column. What follows the last ";" is a step too, unless it is empty.
        """
        if variables < 1:
            raise ValueError(f"decode: {variables} variables: expected at least 1")
        grammar = re.compile(",".join([self._grammar] * variables))
        steps = text.split(";")
        if not steps[-1]:
            steps.pop()
        rows, index = [], []
        for i, step in enumerate(steps):
            compact = step.replace(self.separator, "")
            if grammar.fullmatch(compact) and ",".join(map(self._spread, compact.split(","))) == step:
                rows.append([self.value(number) for number in compact.split(",")])
                index.append(i)
        values = np.array(rows, dtype=np.float64).reshape(-1, variables)
        return Decoded(values, np.array(index, dtype=np.int64), len(steps) - len(index), len(steps))

    def value(self, number: str) -> float:
        """A number as `encode` writes it, read to the nearest float64."""
        return float(number.replace(self.separator, "")) / (1 if self.point else 10**self.decimals)

    def places(self, text: str) -> NDArray[np.int64]:
        """Where each symbol of a text that `encode` wrote stands in its number, (len(text),).

        0 is a digit before the point, n that of decimal n, -1 what is no digit.
        """
        places = np.full(len(text), -1)
        for number in re.finditer("[^,;]+", text):
            digits = [i for i in range(*number.span()) if text[i].isdigit()]
            before = sum(map(str.isdigit, number[0].partition(".")[0])) if self.point else len(digits) - self.decimals
            places[digits] = np.maximum(np.arange(len(digits)) - before + 1, 0)
        return places

    @property
    def most_integer_digits(self) -> int:
        """Digits before the point of the largest numbers that can be written."""
        return FLOAT64_DIGITS - self.decimals

    @property
    def _grammar(self) -> str:
        fewest, most = self.integer_digits, self.most_integer_digits
        if not self.point:
            fewest, most = fewest + self.decimals, most + self.decimals
        no_minus_zero = r"(?!-[0.]+(?![0-9.]))"
        no_leading_zero = rf"(?!0[0-9]{{{fewest}}})"  # before more digits than `integer_digits`
        fraction = rf"\.[0-9]{{{self.decimals}}}" if self.decimals and self.point else ""
        if self.shortest:  # after the first decimal, others that do not end in zero
            fraction = r"\.[0-9]" + (rf"(?:[0-9]{{0,{self.decimals - 2}}}[1-9])?" if self.decimals > 1 else "")
        return rf"{no_minus_zero}-?{no_leading_zero}[0-9]{{{fewest},{most}}}{fraction}"

    def _number(self, value: float) -> str:
        fraction = self.decimals + (self.decimals > 0)
        digits = f"{abs(value):0{self.integer_digits + fraction}.{self.decimals}f}"
        if len(digits) - fraction > self.most_integer_digits:
            limit = f"less than 1e{self.most_integer_digits} in size with {self.decimals} decimals"
            raise ValueError(f"encode: {value} is too large: expected {limit}")
        if self.shortest:
            digits = digits.rstrip("0")
            digits += "0" if digits.endswith(".") else ""
        if not self.point:
            digits = digits.replace(".", "")
        return self._spread(f"-{digits}" if value < 0 and digits.strip("0.") else digits)

    def _spread(self, number: str) -> str:
        """A number with its digits apart; the minus stays at the first."""
        return "-" * number.startswith("-") + self.separator.join(number.removeprefix("-"))


def _largest_percentile(rule: str, series: ArrayLike) -> float:
    values = _filled(rule, series)
    if values.ndim != 2:
        raise ValueError(f"{rule}: values have shape {values.shape}: expected (points, variables)")
    return _checked(rule, np.percentile(values, PERCENTILE, axis=0).max() / 10)


def _filled(rule: str, values: ArrayLike) -> NDArray[np.float64]:
    """The sizes of values that are there and finite."""
    array = np.abs(np.asarray(values, dtype=np.float64))
    if array.size == 0 or not np.isfinite(array).all():
        problem = "not all finite" if array.size else "empty"
        raise ValueError(f"{rule}: values are {problem}: expected finite numbers")
    return array


def _checked(rule: str, alpha: float) -> float:
    if not (np.isfinite(alpha) and alpha > 0):
        raise ValueError(f"{rule}: alpha is {alpha}: expected finite and positive (are all values zero?)")
    return float(alpha)
