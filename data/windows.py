"""Windows over token sequences, and a batch order that can be resumed from a step number alone.

Dimension letters: W windows, C context.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORED = -100  # the target that no loss counts, as in torch's cross_entropy


@dataclass(frozen=True)
class Windows:
    """Inputs and the tokens one later: inputs, targets (W, C) int64; series, start (W,) int64.

    A window is tokens[start : start + C] of sequence `series` and predicts tokens[start + 1 : start + C + 1].
    Where the sequence ends earlier, inputs are padded and targets are IGNORED: a place is padding if and only
    if its target is IGNORED. `vocabulary`, if given, is every token that a target can be, once each: the loss is then
    over these alone. `weights` (W, C) float32, if given, is what the training loss multiplies that of each target by;
    `digits`, if given, the tokens of 0 to 9, for a loss over these.
    """

    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]
    series: NDArray[np.int64]
    start: NDArray[np.int64]
    pad_id: int
    vocabulary: NDArray[np.int64] | None = None
    weights: NDArray[np.float32] | None = None
    digits: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def at(self, chosen: Sequence[int]) -> "Windows":
        """The chosen windows alone, in their order."""
        rows = np.asarray(chosen, np.int64)
        inputs, targets, series, start = (a[rows] for a in (self.inputs, self.targets, self.series, self.start))
        weights = None if self.weights is None else self.weights[rows]
        return Windows(inputs, targets, series, start, self.pad_id, self.vocabulary, weights, self.digits)

    @property
    def real_tokens(self) -> int:
        """Targets that the loss counts."""
        return int((self.targets != IGNORED).sum())

    @property
    def targets_with_padding(self) -> NDArray[np.int64]:
        """Targets in which padding is a token to be predicted as well: a loss over them is lower for no good reason."""
        return np.where(self.targets == IGNORED, self.pad_id, self.targets)

    @property
    def left_padding(self) -> NDArray[np.int64]:
        """How many of each window's first places are padding, (W,): all 0 where windows are padded on the right."""
        return (self.targets != IGNORED).argmax(axis=1)


def make_windows(
    token_lists: Sequence[Sequence[int]], context: int, stride: int, pad_id: int, pad_side: str = "right"
) -> Windows:
    """Cut each sequence at 0, stride, 2 stride, ... while a window has a target that no earlier one has.

    With stride equal to context each token but the first of a sequence is a target exactly once; with a
    smaller one, the later targets of a window come again in the next, with less context. A window padded on
    the left holds its tokens at the end, and its padding must be masked in attention too.
    Raises ValueError for a sequence of fewer than 2 tokens, and for a stride that would skip tokens.
    """
    if context < 1 or not 1 <= stride <= context:
        raise ValueError(f"windows: context is {context}, stride {stride}: expected 1 <= stride <= context")
    # The last target is the last token; a start is worth a window if the one before it ends short of that.
    places = [
        (number, start)
        for number, tokens in enumerate(token_lists)
        for start in range(0, max(1, len(tokens) - 1 - context + stride), stride)
    ]
    return _cut(token_lists, places, context, pad_id, pad_side)


def draw_windows(
    token_lists: Sequence[Sequence[int]],
    context: int,
    ends: int,
    batch_size: int,
    step: int,
    seed: int,
    pad_id: int,
    pad_side: str = "right",
) -> Windows:
    """The windows of batch `step`: each begins at one of the `beginnings` of its sequence, drawn anew.

    Sequences come in the order of `batch_indices`, so all have a window before one has another; where a window holds a
    whole sequence, the batches are those of `make_windows`. A function of its arguments alone.
    Raises ValueError for a sequence of fewer than 2 tokens, and for numbers that are out of range.
    """
    order = batch_indices(len(token_lists), batch_size, step, seed).tolist()
    stream = np.random.RandomState([seed, step, 1])  # of three numbers: none of those that the order is drawn from
    places = [(number, int(stream.choice(beginnings(token_lists[number], context, ends)))) for number in order]
    return _cut(token_lists, places, context, pad_id, pad_side)


def beginnings(tokens: Sequence[int], context: int, ends: int) -> NDArray[np.int64]:
    """Where a window of a sequence may begin: at its start, and after each `ends` until one reaches the last token.

    Only that one may be padded, by less than what stands between two `ends`.
    """
    places = np.append(0, np.flatnonzero(np.asarray(tokens[:-1]) == ends) + 1)
    return places[: 1 + np.count_nonzero(places + context < len(tokens) - 1)]


def _cut(
    token_lists: Sequence[Sequence[int]], places: Sequence[tuple[int, int]], context: int, pad_id: int, pad_side: str
) -> Windows:
    if pad_side not in ("right", "left"):
        raise ValueError(f'windows: pad_side is {pad_side!r}: expected "right" or "left"')
    numbers = dict.fromkeys(number for number, _ in places)
    sequences = {number: np.asarray(token_lists[number], dtype=np.int64) for number in numbers}
    for number, tokens in sequences.items():
        if tokens.ndim != 1 or len(tokens) < 2 or tokens.min() < 0:
            raise ValueError(f"windows: sequence {number} is {tokens.shape}: expected at least 2 token ids")
    inputs = np.full((len(places), context), pad_id, dtype=np.int64)
    targets = np.full((len(places), context), IGNORED, dtype=np.int64)
    for window, (number, start) in enumerate(places):
        tokens = sequences[number][start : start + context + 1]
        real = len(tokens) - 1
        filled = slice(0, real) if pad_side == "right" else slice(context - real, context)
        inputs[window, filled] = tokens[:-1]
        targets[window, filled] = tokens[1:]
    series_of, start_of = np.array(places, dtype=np.int64).reshape(-1, 2).T
    return Windows(inputs, targets, series_of, start_of, pad_id)


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> NDArray[np.int64]:
    """The windows of batch `step`, (batch_size,) int64, in an endless order: permutation after permutation.

    A function of its arguments alone, so a run resumes with its step number. A batch that reaches the end of
    a permutation continues in the next. seed: 0 .. 2^32 - 1. Raises ValueError for numbers out of range.
    """
    if count < 1 or batch_size < 1 or step < 0 or not 0 <= seed < 2**32:
        given = f"count is {count}, batch size {batch_size}, step {step}, seed {seed}"
        raise ValueError(f"batches: {given}: expected at least 1, 1, 0 and 0, and a seed below 2^32")
    epochs, places = np.divmod(step * batch_size + np.arange(batch_size, dtype=np.int64), count)
    # RandomState's stream is frozen (NEP 19), so a run resumes in the same order under every numpy.
    orders = {int(epoch): np.random.RandomState([seed, epoch]).permutation(count) for epoch in np.unique(epochs)}
    return np.array([orders[epoch][place] for epoch, place in zip(epochs, places, strict=True)], dtype=np.int64)
