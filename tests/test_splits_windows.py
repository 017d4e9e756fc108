"""Splits, windows and the order of batches: nothing twice, nothing lost, and a run can resume."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.splits import Split, held_out_first, in_order, seeded
from data.windows import IGNORED, batch_indices, beginnings, draw_windows, make_windows

PAD = 7


def test_systems_in_order_are_cut_at_70_and_85_percent():
    split = in_order(1000)
    np.testing.assert_array_equal(split.train, np.arange(700))
    np.testing.assert_array_equal(split.validation, np.arange(700, 850))
    np.testing.assert_array_equal(split.test, np.arange(850, 1000))


def whole(split: Split) -> list[int]:
    return sorted(np.concatenate([split.train, split.validation, split.test]).tolist())


@given(st.integers(10, 300), st.integers(0, 2**32 - 1))
def test_each_system_is_in_exactly_one_part(systems, seed):
    rules = in_order(systems), seeded(systems, (0.8, 0.1, 0.1), seed), held_out_first(systems, (0.8, 0.1, 0.1), seed)
    for split in rules:
        assert whole(split) == list(range(systems))
        assert min(len(split.train), len(split.validation), len(split.test)) > 0


def test_a_seed_names_one_split():
    first, again, other = (seeded(100, seed=seed).train for seed in (442, 442, 443))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other) and not np.array_equal(first, np.arange(70))
    # Written down: an adapter's validation systems must be the same under every version of numpy.
    np.testing.assert_array_equal(seeded(20, seed=3).validation, [4, 9, 14])


def test_what_scikit_learn_holds_out_is_held_out():
    """Its `train_test_split(range(1000), test_size=.2, random_state=442)` tests these among others (version 1.5)."""
    split = held_out_first(1000, (0.8, 0.1, 0.1), seed=442)
    held_out = np.sort(np.random.RandomState(442).permutation(1000)[:200])
    np.testing.assert_array_equal(np.sort(np.concatenate([split.validation, split.test])), held_out)
    assert {506, 20, 654, 906} <= set(held_out.tolist())


def test_padding_is_a_token_to_predict_only_when_asked_and_the_left_side_is_counted():
    left, right = (make_windows([[5, 6, 7, 8]], 5, 5, pad_id=0, pad_side=side) for side in ("left", "right"))
    np.testing.assert_array_equal(right.targets, [[6, 7, 8, IGNORED, IGNORED]])
    np.testing.assert_array_equal(right.targets_with_padding, [[6, 7, 8, 0, 0]])
    np.testing.assert_array_equal(left.targets_with_padding, [[0, 0, 6, 7, 8]])
    assert left.left_padding.tolist() == [2] and right.left_padding.tolist() == [0]


@pytest.mark.parametrize(
    ("systems", "fractions", "seed", "problem"),
    [
        (2, (0.70, 0.15, 0.15), 0, "no empty part"),
        (0, (0.70, 0.15, 0.15), 0, "no empty part"),
        (100, (0.70, 0.30, 0.00), 0, "three positive numbers"),
        (100, (0.70, 0.20, 0.20), 0, "three positive numbers"),
        (100, (0.70, 0.30), 0, "three positive numbers"),
        (100, (0.70, float("nan"), 0.15), 0, "three positive numbers"),
        (100, (0.70, 0.15, 0.15), -1, "seed is -1"),
    ],
)
def test_a_split_that_cannot_be_made_is_refused(systems, fractions, seed, problem):
    with pytest.raises(ValueError, match=problem):
        seeded(systems, fractions, seed)  # type: ignore[arg-type]


def test_a_window_predicts_the_tokens_one_later():
    windows = make_windows([[10, 11, 12, 13, 14, 15], [20, 21]], context=4, stride=4, pad_id=PAD)
    np.testing.assert_array_equal(windows.inputs, [[10, 11, 12, 13], [14, PAD, PAD, PAD], [20, PAD, PAD, PAD]])
    np.testing.assert_array_equal(
        windows.targets, [[11, 12, 13, 14], [15, IGNORED, IGNORED, IGNORED], [21, IGNORED, IGNORED, IGNORED]]
    )
    np.testing.assert_array_equal(windows.series, [0, 0, 1])
    np.testing.assert_array_equal(windows.start, [0, 4, 0])
    assert (len(windows), windows.real_tokens) == (3, 6)


def test_padding_on_the_left_moves_the_tokens_to_the_end():
    windows = make_windows([[10, 11, 12, 13, 14]], context=3, stride=2, pad_id=PAD, pad_side="left")
    np.testing.assert_array_equal(windows.inputs, [[10, 11, 12], [PAD, 12, 13]])
    np.testing.assert_array_equal(windows.targets, [[11, 12, 13], [IGNORED, 13, 14]])


def test_no_window_repeats_what_the_one_before_it_has_scored():
    windows = make_windows([list(range(9))], context=4, stride=2, pad_id=PAD)
    np.testing.assert_array_equal(windows.start, [0, 2, 4])  # at 6 the targets 7 and 8 were all scored before
    assert len(make_windows([list(range(5))], context=4, stride=1, pad_id=PAD)) == 1


lengths = st.lists(st.integers(2, 40), min_size=1, max_size=4)


@given(lengths, st.integers(1, 12), st.sampled_from(["right", "left"]))
def test_with_stride_equal_to_context_each_token_but_the_first_is_scored_once(lengths, context, pad_side):
    sequences = [[100 * number + i for i in range(length)] for number, length in enumerate(lengths)]
    windows = make_windows(sequences, context, context, PAD, pad_side)  # type: ignore[arg-type]
    scored = windows.targets[windows.targets != IGNORED]
    np.testing.assert_array_equal(np.sort(scored), np.concatenate([tokens[1:] for tokens in sequences]))
    assert windows.real_tokens == sum(lengths) - len(lengths)


@given(lengths, st.integers(1, 12), st.data())
def test_every_window_scores_something_new_and_together_they_score_everything(lengths, context, data):
    stride = data.draw(st.integers(1, context))
    sequences = [list(range(100 * number, 100 * number + length)) for number, length in enumerate(lengths)]
    windows = make_windows(sequences, context, stride, PAD)
    seen: set[int] = set()
    for inputs, targets, series, start in zip(
        windows.inputs, windows.targets, windows.series, windows.start, strict=True
    ):
        real = targets != IGNORED
        np.testing.assert_array_equal(targets[real], inputs[real] + 1)
        assert inputs[0] == sequences[series][start] and (inputs[~real] == PAD).all()
        assert set(targets[real].tolist()) - seen
        seen |= set(targets[real].tolist())
    assert seen == {token for tokens in sequences for token in tokens[1:]}


@pytest.mark.parametrize(
    ("tokens", "context", "stride", "pad_side"),
    [([5], 4, 4, "right"), ([], 4, 4, "right"), ([1, -100], 4, 4, "right"), ([1, 2], 0, 1, "right"),
     ([1, 2], 4, 0, "right"), ([1, 2], 4, 5, "right"), ([1, 2], 4, 4, "middle")],
)  # fmt: skip
def test_windows_that_would_lose_tokens_are_refused(tokens, context, stride, pad_side):
    with pytest.raises(ValueError, match="expected"):
        make_windows([[1, 2, 3], tokens], context, stride, PAD, pad_side)  # type: ignore[arg-type]


steps_of_any_width = st.lists(st.integers(1, 6), min_size=2, max_size=12)  # the last token of each is 0


@given(st.lists(steps_of_any_width, min_size=1, max_size=4), st.integers(1, 40), st.integers(0, 9), st.integers(0, 99))
def test_drawn_windows_begin_with_a_step_are_full_and_can_be_any_that_are(widths, context, step, seed):
    sequences = [[place for width in one for place in range(width - 1, -1, -1)] for one in widths]
    for one, tokens in zip(widths, sequences, strict=True):
        starts = [int(start) for start in np.cumsum([0, *one[:-1]])]
        full = [start for start in starts if start + context < len(tokens)]
        last = [start for start in starts if start + context >= len(tokens) - 1][:1]
        assert beginnings(tokens, context, 0).tolist() == sorted({*full, *last} or {0})
    drawn = draw_windows(sequences, context, 0, 3, step, seed, PAD)
    np.testing.assert_array_equal(drawn.series, batch_indices(len(sequences), 3, step, seed))
    for row, (number, start) in enumerate(zip(drawn.series, drawn.start, strict=True)):
        assert start in beginnings(sequences[number], context, 0)
        expected = sequences[number][start : start + context + 1]
        assert drawn.inputs[row, : len(expected) - 1].tolist() == expected[:-1]
        assert drawn.targets[row, : len(expected) - 1].tolist() == expected[1:]
    again = draw_windows(sequences, context, 0, 3, step, seed, PAD)
    np.testing.assert_array_equal(drawn.inputs, again.inputs)


def test_each_step_draws_anew_and_every_beginning_comes():
    sequence = [1, 2, 0] * 6
    draws = [[draw_windows([sequence], 6, 0, 2, step, seed, PAD).start for step in range(20)] for seed in (0, 1)]
    assert set(np.ravel(draws[0]).tolist()) == {0, 3, 6, 9, 12} and not np.array_equal(*draws)
    # Written down: a run must resume with the same windows under every version of numpy.
    assert np.ravel(draws[0][:3]).tolist() == [9, 9, 9, 9, 9, 3]


@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_each_epoch_of_batches_is_a_permutation(count, batch_size, seed):
    epochs = 3
    steps = -(-epochs * count // batch_size)
    order = np.concatenate([batch_indices(count, batch_size, step, seed) for step in range(steps)])
    for epoch in np.split(order[: epochs * count], epochs):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(count))


def test_a_resumed_run_takes_the_batches_that_it_would_have_taken():
    straight = [batch_indices(10, 4, step, seed=3) for step in range(9)]
    np.random.seed(0)  # no state is shared with the rest of the program
    resumed = [batch_indices(10, 4, step, seed=3) for step in range(5, 9)]
    np.testing.assert_array_equal(straight[5:], resumed)
    # Written down: a checkpoint must resume in the same order under every version of numpy.
    np.testing.assert_array_equal(straight[2], [7, 6, 5, 1])


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [batch_indices(50, 50, step, seed) for step in (0, 1) for seed in (0, 1)]
    assert len({tuple(order.tolist()) for order in orders}) == 4


@pytest.mark.parametrize("arguments", [(0, 4, 0, 0), (9, 0, 0, 0), (9, 4, -1, 0), (9, 4, 0, -1), (9, 4, 0, 2**32)])
def test_a_batch_that_cannot_be_drawn_is_refused(arguments):
    with pytest.raises(ValueError, match="expected at least"):
        batch_indices(*arguments)
