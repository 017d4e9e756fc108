"""The book: its exercises take what is right and refuse what is wrong, and every chapter has some."""

import re
from pathlib import Path

import pytest
from waves import refused

from experiments import run
from experiments.book import checks
from experiments.book.exercises import EXERCISES
from experiments.verbs import book

BOOK = Path(__file__).parents[1] / "docs" / "book"


@pytest.mark.parametrize("number", EXERCISES)
def test_every_solution_is_right_and_the_usual_mistake_is_refused_with_what_differs(number):
    exercise = EXERCISES[number]
    assert exercise.check(checks.read(exercise.solution)) == ""
    assert exercise.check(checks.read(exercise.wrong))
    assert exercise.check("nonsense") and exercise.check(None)


def test_every_chapter_shows_its_exercises_three_at_least_and_every_picture_has_alternative_text():
    chapters = {path.name[:2].lstrip("0"): path.read_text() for path in BOOK.glob("[01]*.md")}
    numbers = [number.split(".") for number in EXERCISES]
    assert chapters.keys() == {chapter for chapter, _ in numbers}
    for chapter, text in chapters.items():
        assert f"```{{exercises}} {chapter}\n" in text
        assert [number for of, number in numbers if of == chapter][:3] == ["1", "2", "3"]
        pictures = [cell for cell in re.findall(r"```{code-cell}\n(.*?)```", text, re.DOTALL) if "panels(" in cell]
        assert pictures and all("\n    alt: " in cell for cell in pictures)


def test_the_tour_is_the_notebook_that_its_source_makes_and_its_pictures_have_alternative_text():
    pytest.importorskip("myst_nb")
    source = (BOOK.parent / "tour.md").read_text()
    assert (BOOK.parent / "tour.ipynb").read_text() == book.notebook(source)
    pictures = [cell for cell in re.findall(r"```{code-cell}\n(.*?)```", source, re.DOTALL) if "panels(" in cell]
    assert pictures and all("\npicture.alt = " in cell for cell in pictures)


def test_an_answer_is_right_or_what_differs_is_said_with_a_hint(tmp_path, capsys):
    file = tmp_path / "rotate.py"
    file.write_text(EXERCISES["2.2"].solution)
    for argv, code, said in (
        (["2.2", str(file)], 0, "2.2 right\n"),
        (["2.1", "(3, 14, 7, 7)"], 1, "2.1 not yet: it is wrong at [3], counted from 0\nhint: (B, H, T, S)"),
        (["6.1", "2048 * 896 * 896"], 1, "6.1 not yet: it is 0.500279 times what is right\nhint: "),
        (["2.2", EXERCISES["2.2"].wrong], 1, "2.2 not yet: case 1, arguments (2, 3, 2, 4), (1, 3, 1, 4), "),
        (["2.2", "lambda x, cos, sin: 1 / 0"], 1, "2.2 not yet: with the arguments of case 1 it ends with Zero"),
        (["2.2"], 0, "Write `answer(x, cos, sin)`"),
        (["2.2", "--solution"], 0, "def answer(x, cos, sin):\n"),
        ([], 0, "1.1   Write `[[1.234, 0.5], [10, 0.456]]` as text"),
    ):
        assert run.main(["exercise", *argv]) == code
        assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["exercise", "2.9"], "there is no exercise '2.9': expected one of 1.1, 1.2, "),
        (["exercise", "2.2", "nowhere.py"], "nowhere.py: No such file or directory: expected a Python file that sets"),
        (["exercise", "2.2", "x ="], "the answer ends with SyntaxError ("),
        (["exercise", "2.2", "x = 1"], "the answer sets no `answer`: expected a value, or a function of this name"),
        (["docs"], "myst_nb not installed: expected them, by pip install -e '.[docs]'"),
    ],
)
def test_bad_input_and_a_missing_extra_are_one_line(argv, line, capsys, monkeypatch):
    monkeypatch.setattr(book, "find_spec", lambda name: None if name == "myst_nb" else name)
    assert refused(capsys, *argv).startswith(line)
