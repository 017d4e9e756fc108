"""How an answer to an exercise is read and checked: it is Python, an expression or a file that sets `answer`."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.testing import assert_close

Check = Callable[[Any], str]
"""What differs in an answer, in words; empty where it is right."""


@dataclass(frozen=True)
class Exercise:
    """A question in Markdown, a hint, and Python: a solution, and an answer that is wrong, as people give it."""

    question: str
    hint: str
    solution: str
    wrong: str
    check: Check


def read(text: str) -> Any:
    """The answer that a text gives: a path of a Python file which sets `answer`, an expression, or such a file's text.

    `torch`, `np` and `math` are known to it.

    Raises:
        ValueError: it is no Python, raises an error, or sets no `answer`.
    """
    names: dict[str, Any] = {"torch": torch, "np": np, "math": math}
    file = text if text.endswith(".py") else ""
    try:
        code = Path(file).read_text(encoding="utf-8") if file else text
    except OSError as e:
        raise ValueError(f"{file}: {e.strerror}: expected a Python file that sets `answer`") from None
    try:
        try:
            return eval(compile(code.strip(), file or "answer", "eval"), names)
        except SyntaxError:
            exec(compile(code, file or "answer", "exec"), names)
    except Exception as e:  # of the reader's code, any
        raise ValueError(f"the answer ends with {_said(e)}: expected Python that runs") from None
    if "answer" not in names:
        raise ValueError(f"{file or 'the answer'} sets no `answer`: expected a value, or a function of this name")
    return names["answer"]


def same(right: Callable[[], Any], tolerance: float = 0.0) -> Check:
    """The very value: a text, a shape, a set; a number, to a part of itself."""
    right = cache(right)

    def check(answer: Any) -> str:
        expected = right()
        kind = type(expected)
        if kind in (int, float) and type(answer) in (int, float):
            off = abs(answer - expected) > tolerance * abs(expected)
            return f"it is {answer / expected:.6g} times what is right" if off else ""
        if kind is tuple and isinstance(answer, list | torch.Size):
            answer = tuple(answer)
        if type(answer) is not kind:
            return f"it is {answer!r:.80}, a {type(answer).__name__}: expected a {kind.__name__}"
        if answer == expected:
            return ""
        if kind is set:
            return f"{len(answer - expected)} of its names are wrong, and {len(expected - answer)} are missing"
        if len(answer) != len(expected):
            return f"it has the length {len(answer)}, not {len(expected)}"
        wrong = [i for i, (a, b) in enumerate(zip(answer, expected, strict=True)) if a != b]
        return f"it is wrong at {wrong}, counted from 0"

    return check


def function(right: Callable[..., Any], cases: Callable[[], Iterable[tuple]], tolerance: float = 1e-5) -> Check:
    """A function that gives what `right` does, for the arguments of every case; tensors to `tolerance`."""

    def check(answer: Any) -> str:
        if not callable(answer):
            return f"it is {answer!r:.80}: expected a function named `answer`"
        for number, case in enumerate(cases(), 1):
            expected = right(*map(_copy, case))
            try:
                got = answer(*map(_copy, case))
            except Exception as e:  # of the reader's code, any
                return f"with the arguments of case {number} it ends with {_said(e)}"
            if differs := _differs(got, expected, tolerance):
                return f"case {number}, arguments {', '.join(map(_shape, case))}: {differs}"
        return ""

    return check


def _differs(got: Any, expected: Any, tolerance: float) -> str:
    try:
        assert_close(*(torch.as_tensor(x).double() for x in (got, expected)), atol=tolerance, rtol=tolerance)
        return ""
    except AssertionError as e:
        return " ".join(str(e).split())
    except (TypeError, ValueError, RuntimeError):
        return "" if got == expected else f"it gives {got!r:.80}: expected {expected!r:.80}"


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor | np.ndarray) else f"{value!r:.60}"


def _said(error: Exception) -> str:
    return f"{type(error).__name__} ({' '.join(str(error).split())[:160]})"
