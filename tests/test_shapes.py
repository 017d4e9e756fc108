"""The kind of a series by its stated rule, and one system of each kind."""

from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from data.lotka_volterra import load
from experiments.settings.record import POCKET, Settings
from experiments.task.shapes import RULE, SHAPES, shape
from experiments.task.task import Task
from qwen_min import Tokenizer

NAMED = {20: "growing", 506: "decaying", 906: "oscillating", 654: "settled"}


@pytest.fixture(scope="module")
def published() -> NDArray[np.float32]:
    return load().series


@pytest.fixture(scope="module")
def classes(published: NDArray[np.float32]) -> list[str]:
    return [shape(series) for series in published]


def halves(*ratios: float) -> NDArray[np.float64]:
    """A series whose variables have the range 1 in the first 4 points, and these in the last 4; means differ."""
    wave = np.tile([0.0, 1.0], 2)
    return np.stack([np.concatenate([3 + wave, 5 + ratio * wave]) for ratio in ratios], axis=1)


@pytest.mark.parametrize(("system", "kind"), NAMED.items())
def test_the_four_systems_that_are_shown_are_of_four_kinds(published, system, kind):
    assert shape(published[system]) == kind


def test_the_published_systems_divide_about_as_published(classes):
    assert Counter(classes) == {"growing": 205, "decaying": 640, "oscillating": 113, "settled": 42}


@pytest.mark.parametrize("unit", [3.0, 1e-3, [3.0, 0.2]])
def test_the_kind_does_not_depend_on_the_unit_of_any_variable(published, classes, unit):
    assert [shape(series * np.array(unit)) for series in published[:200]] == classes[:200]


@pytest.mark.parametrize(
    ("ratios", "kind"),
    [
        *(((1.09,), "growing"), ((1.07,), "oscillating"), ((0.94,), "oscillating"), ((0.92,), "decaying")),
        *(((0.06,), "decaying"), ((0.04,), "settled")),
        *(((1.5, 0.5), "oscillating"), ((1.5, 0.9), "growing"), ((0.01, 0.5), "decaying")),
    ],
)
def test_the_mean_ratio_of_the_late_range_to_the_early_one_decides(ratios, kind):
    assert shape(halves(*ratios)) == kind


def test_what_never_changes_is_settled_and_what_begins_to_change_grows():
    assert shape(np.full((80, 2), 2.5)) == shape(np.zeros((5, 2))) == "settled"
    assert shape([[1.0], [1.0], [1.0], [2.0]]) == "growing"
    assert shape([[1.0], [2.0], [1.0], [1.0]]) == "settled"


def test_the_middle_point_of_an_odd_number_is_in_the_late_half():
    assert shape([[0.0], [1.0], [9.0], [0.0], [1.0]]) == "growing"


@pytest.mark.parametrize("series", [np.zeros(8), np.zeros((3, 2)), np.zeros((8, 0)), np.full((8, 2), np.nan)])
def test_a_series_that_has_no_shape_is_refused(series):
    with pytest.raises(ValueError, match="series has shape .*: expected finite values"):
        shape(series)


def test_the_rule_that_is_printed_names_every_kind_and_both_thresholds():
    assert all(word in RULE for word in (*SHAPES, "1.08", "0.05"))


@pytest.mark.parametrize("few", [{}, {"fractions": (0.85, 0.003, 0.147)}])
def test_the_first_validation_system_of_each_kind_is_shown_in_the_fixed_order(classes, few):
    task = Task.prepare(Settings(**few), Tokenizer.from_pretrained(POCKET))
    start = task.split.validation[0]
    kinds = classes[start : task.split.test[0]]
    assert (len(set(kinds)) == 4) == (not few)
    assert task.forecast_systems("shown") == [start + kinds.index(kind) for kind in SHAPES if kind in kinds]
