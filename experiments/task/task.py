"""The forecasting task as tokens: data set, split, scale, encoding and tokenizer of one run."""

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import frames, llmtime, lotka_volterra, splits
from data.frames import SeriesSet
from data.grammar import Grammar
from data.llmtime import Codec
from data.lotka_volterra import Dataset
from data.windows import IGNORED, Windows, batch_indices, beginnings, draw_windows, make_windows
from experiments.settings.record import Settings
from experiments.task.constrain import symbol_tokens
from experiments.task.shapes import FEWEST_POINTS, SHAPES, Shape, shape
from qwen_min import QwenConfig, Tokenizer

WIDEST = 3  # digits before the point of a number of a table: a hundred times the percentile that it is scaled by


@dataclass(frozen=True)
class Task:
    """Series of a data set, as text and token ids and back.

    series[i] / alphas[i], written by `codec`, is what the model sees; `split` says which systems train. Where
    series are too few to split, all are in its first part; scale and width come from the points that forecasts see.
    Series of a table end together: one that is shorter than the points that a forecast sees is seen whole.
    """

    settings: Settings
    dataset: Dataset
    split: splits.Split
    alphas: NDArray[np.float64]  # (S,), or (S, V) where variables have their own
    codec: Codec
    tokenizer: Tokenizer
    start: int = 0  # the first point that a forecast sees
    _tokens: dict[tuple[int, int | None], list[int]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def prepare(
        cls,
        settings: Settings,
        tokenizer: Tokenizer,
        needs_split: bool = True,
        ahead: bool = False,
        frame: SeriesSet | None = None,
    ) -> "Task":
        """Read or rebuild the data, split it by systems or time, and scale it as the settings say.

        Without `needs_split` a few series will do, as nothing trains: see `_unsplit`. `ahead`: forecasts begin where
        the data ends. `frame`: the data, where it is no file's.

        Raises:
            ValueError: the data is bad, or a number in it cannot be written.
        """
        dataset = _dataset(settings, needs_split and settings.split == "time", frame)
        try:
            found = _split(settings, dataset, needs_split) if needs_split or not dataset.frame else None
            split, settings = (found, settings) if found else _unsplit(settings, len(dataset.series))
            scored = 0 if ahead else settings.horizon
            start = max(0, dataset.series.shape[1] - settings.points - scored) if ahead or dataset.frame else 0
            alphas = _alphas(settings, dataset, split, start)
        except ValueError as e:
            raise ValueError(f"{dataset.path}: {e}") from None
        shortest, point, separator = not settings.trailing_zeros, settings.point, settings.separator
        codec = Codec(settings.decimals, shortest=shortest, point=point, separator=separator)
        task = cls(settings, dataset, split, alphas, codec, tokenizer, start)
        return task._within() if dataset.frame else task

    @property
    def layout(self) -> str:
        """What is unlike the default in the text of a number, in words."""
        said = {"no point": not self.codec.point, "a space between digits": self.codec.separator}
        return ", ".join(words for words, holds in said.items() if holds)

    def _within(self) -> "Task":
        """A table's task whose numbers all have at most `WIDEST` digits before the point.

        Raises ValueError for a wider one where the settings refuse it; clipped ones are counted in the data's source.
        """
        by, first = self.alphas.reshape(len(self.alphas), 1, -1), 0 if len(self.split.validation) else self.start
        scaled = np.abs(self.dataset.series[:, first:] / by)
        wide = np.argwhere(np.round(scaled, self.codec.decimals) >= 10**WIDEST) + [0, first, 0]
        if not len(wide):
            return self
        system, point, variable = wide[0].tolist()
        if self.settings.beyond == "refuse":
            value, alpha = self.dataset.series[system, point, variable], by[system, 0, variable % by.shape[2]]
            raise ValueError(
                f"{self.dataset.path}: {self.dataset.names[variable]!r:.60} of series {self.called(system)!r:.60} at "
                f"{self.when(system, point - self.start)} is {value:g}, over {10**WIDEST} times its alpha {alpha:.3g}: "
                "expected smaller numbers, a larger --alpha, or --beyond clip"
            )
        source = f"{self.dataset.source}; {len(wide)} values clipped"
        return replace(self, dataset=replace(self.dataset, source=source))

    @property
    def alpha_rule(self) -> str:
        """What series are divided by, in words."""
        own = f"a variable has its own where they differ by more than {llmtime.APART:g} times"
        if self.dataset.frame and not self.settings.alpha:
            seen = "the points that its forecast sees" + ", in training of all" * bool(len(self.split.validation))
            return f"alpha of each series = the 95th percentile of sizes / 10, of {seen}; {own}"
        if self.settings.alpha or self.settings.scaling == "training maximum":
            rule = "as given" if self.settings.alpha else "the training part's maximum / 9.99"
            if self.alphas.ndim > 1:
                each = ", ".join(f"{alpha:.6g}" for alpha in self.alphas[0])
                return f"alpha = {each} for the variables of all series, {rule}; {own}"
            return f"alpha = {self.alphas[0]:.6g} for all series, {rule}"
        in_context = self.settings.scaling == "context percentile"
        seen = f"its first {self.settings.points} points" if in_context else "all its points, the horizon's too"
        few = "" if len(self.split.validation) else " (too few series to split)"
        return f"alpha of each series = the largest of its variables' 95th percentiles / 10, from {seen}{few}"

    def under(self, settings: Settings) -> "Task":
        """The same data and text under settings that differ in the training alone: steps, context, learning rate."""
        return replace(self, settings=settings)

    @cached_property
    def origins(self) -> list["Task"]:
        """The task at each of N cut-offs, its start at 0, k, 2k, ...: k is the most with which all N forecasts have a
        truth, (P - points - horizon) // (N - 1). So the first is that of a single one, the last nearest to the end.
        Those of a table are counted back from its end: the last is that of a single one.

        Raises:
            ValueError: fewer than N fit.
        """
        settings, held = self.settings, self.dataset.series.shape[1]
        if self.dataset.frame:
            back = [self.origin_step * i for i in reversed(range(1, settings.origins))]
            return [*(self._from(self.start - points) for points in back), self]
        count, free = settings.origins, held - settings.points - settings.horizon
        if count > max(1, free + 1):
            window = f"{settings.points} + {settings.horizon} of {held} points"
            raise ValueError(f"origins is {count}: expected at most {max(1, free + 1)}, where {window} fit")
        return [self] + [self._from(i * (free // (count - 1))) for i in range(1, count)]

    def _from(self, start: int) -> "Task":
        """The task of a later or earlier cut-off, scaled anew where the scale is that of the points seen."""
        settings = self.settings
        own = (settings.scaling == "context percentile" or self.dataset.frame) and not settings.alpha
        alphas = _alphas(settings, self.dataset, self.split, start) if own else self.alphas
        return replace(self, start=start, alphas=alphas, _tokens={})

    @property
    def origin_step(self) -> int:
        """Points between the origins of a table."""
        return self.settings.origin_step or self.settings.horizon

    @property
    def cut_off(self) -> int:
        """How many points of a series (a table's: of the longest) come before the forecast."""
        empty = int(np.isnan(self.dataset.series[..., 0]).all(0).sum()) if self.dataset.frame else 0
        return self.start + self.settings.points - empty

    @property
    def series(self) -> NDArray[np.floating[Any]]:
        """All series from the start on, (S, P - start, V)."""
        return self.dataset.series[:, self.start :]

    def called(self, system: int) -> str:
        """A series' name: of a table its own, else its number."""
        return self.dataset.frame.ids[system] if self.dataset.frame else str(system)

    def when(self, system: int, point: int) -> float | int | str:
        """When a point of a forecast is, counted from the first that it sees: a table's time as text, or a number."""
        if frame := self.dataset.frame:
            begins = self.dataset.series.shape[1] - len(frame.values[system])
            return frame.clocks[system].text(self.start + point - begins)
        return float(self.time[point])

    @property
    def time(self) -> NDArray[np.float64]:
        """When the points and the horizon of a forecast are, (points + horizon,): beyond the data in its last step; of
        a table, whose series have times of their own, in steps after the last point seen.
        """
        if self.dataset.frame:
            return np.arange(1.0 - self.settings.points, self.settings.horizon + 1)
        known, wanted = self.dataset.time[self.start :], self.settings.points + self.settings.horizon
        step = known[-1] - known[-2]
        return np.concatenate((known, known[-1] + step * np.arange(1, wanted - len(known) + 1)))[:wanted]

    def check(self, systems: Sequence[int], scored: bool = True) -> None:
        """Raise ValueError for a system that the data set lacks, or a forecast that sees more points than there are.

        One that is `scored` ends with the data too.
        """
        last, points = len(self.dataset.series) - 1, self.dataset.series.shape[1]
        if self.dataset.frame:
            return self._check_frame(systems, scored)
        if self.settings.points + self.settings.horizon * scored > points:
            raise ValueError(
                f"{self.dataset.path}: has {points} points: expected at least the {self.settings.points} "
                f"that a forecast sees" + f" and the {self.settings.horizon} that it makes" * scored
            )
        if points < FEWEST_POINTS:
            raise ValueError(f"{self.dataset.path}: has {points} points: expected at least {FEWEST_POINTS}")
        for system in systems:
            if not 0 <= system <= last:
                raise ValueError(f"{self.dataset.path}: has no system {system}: expected 0 to {last}")

    def _check_frame(self, systems: Sequence[int], scored: bool) -> None:
        frame = self.dataset.frame
        assert frame
        made = (self.settings.horizon + (self.settings.origins - 1) * self.origin_step) * scored
        for system in systems:
            if not 0 <= system < len(frame.ids):
                raise ValueError(f"{self.dataset.path}: has no system {system}: expected 0 to {len(frame.ids) - 1}")
            points, seen = len(frame.values[system]), frame.context[system]
            if points - made < max(seen, FEWEST_POINTS):
                of = f"{points - seen} of its {points} points in this part" if seen else f"{points} points"
                rule = f"at least {max(FEWEST_POINTS - seen, 0) + made}" + f", {made} of which are forecast" * scored
                raise ValueError(f"{self.dataset.path}: series {self.called(system)!r:.60} has {of}: expected {rule}")

    def check_fits(self, config: QwenConfig) -> None:
        """Raise ValueError for a window or a token that a model has no place for."""
        if self.settings.context > config.max_position_embeddings:
            raise ValueError(
                f"{self.tokenizer.path.with_name('config.json')}: max_position_embeddings is "
                f"{config.max_position_embeddings}: expected at least the context, which is {self.settings.context}"
            )
        self.tokenizer.check_fits(config.vocab_size)

    def raw(self, system: int, points: int | None = None) -> NDArray[np.float64]:
        """`points` points of a series from the start on, or all of the series; those that a shorter one lacks left out.

        (P, V)"""
        whole = self.dataset.series[system] if points is None else self.series[system][:points]
        return whole[~np.isnan(whole[:, 0])].astype(np.float64)

    def scaled(self, system: int, points: int | None = None) -> NDArray[np.float64]:
        """`raw` divided by its alpha, (P, V), a table's values clipped where that was asked for."""
        values = self.raw(system, points) / self.alphas[system]
        largest = 10**WIDEST - 10.0**-self.codec.decimals
        return np.clip(values, -largest, largest) if self.dataset.frame else values

    def text(self, system: int, points: int | None = None) -> str:
        """The LLMTIME text of `raw`."""
        return self.codec.encode(self.scaled(system, points))

    def tokens(self, system: int, points: int | None = None) -> list[int]:
        """Their ids, kept: windows of several contexts are cut from the same."""
        if (system, points) not in self._tokens:
            self._tokens[system, points] = self.encode(self.text(system, points))
        return self._tokens[system, points]

    def encode(self, text: str) -> list[int]:
        """The ids of a series' text, one for each symbol: Qwen's tokenizer would join ",-", ";-" or " ." to one."""
        return [token for part in re.split("([- ])", text) for token in self.tokenizer.encode(part)]

    @cached_property
    def train_windows(self) -> Windows:
        """Strided windows of the training part; they overlap by half by default."""
        return self._windows(self.split.train, make_windows, self._in_tokens(self.settings.stride))

    def train_batch(self, step: int) -> Windows:
        """The windows of a training step, a function of the seed and the step alone."""
        settings = self.settings
        order = settings.batch_size, step, settings.seed
        if settings.windows == "strided":
            return self.train_windows.at(batch_indices(len(self.train_windows), *order).tolist())
        return self._windows(self.split.train, draw_windows, self.step_end, *order)

    @property
    def train_window_count(self) -> int:
        """How many windows training steps choose or draw from."""
        if self.settings.windows == "strided":
            return len(self.train_windows)
        tokens, context = map(self.tokens, self.split.train.tolist()), self.settings.context
        return sum(len(beginnings(one, context, self.step_end)) for one in tokens)

    @cached_property
    def validation_windows(self) -> Windows:
        """Windows of the validation part's first series, in which each token is predicted once."""
        return self._windows(self.validation_systems, make_windows, self._in_tokens(1.0))

    @property
    def validation_systems(self) -> NDArray[np.int64]:
        """Those whose loss is taken."""
        return self._first_to_validate(self.settings.val_series)

    @property
    def keep_systems(self) -> list[int]:
        """Those of the validation part whose horizon error chooses the adapter, where `keep` is "horizon"."""
        return self._first_to_validate(self.settings.keep_series).tolist()

    def _first_to_validate(self, most: int) -> NDArray[np.int64]:
        return self.split.validation[: self.settings.series_of(len(self.split.validation), most)]

    def forecast_systems(self, part: str) -> list[int]:
        """Those of a part ("validation", "test") that are forecast, or those that are drawn one by one ("shown")."""
        settings, validation = self.settings, self.split.validation
        if part != "shown":
            systems = getattr(self.split, part)
            return systems[: settings.series_of(len(systems), settings.forecast_series)].tolist()
        if settings.shown or settings.shown_series:
            return list(settings.shown) or validation[: settings.shown_series].tolist()
        first = {self.shape_of(system): system for system in reversed(validation.tolist())}
        return [first[kind] for kind in SHAPES if kind in first]

    def shape_of(self, system: int) -> Shape:
        """The class of a system's whole course: "growing", "decaying", "oscillating" or "settled"."""
        return shape(self.raw(system))

    @cached_property
    def widest(self) -> int:
        """The most digits before the point in any number of the training part."""
        train = self.split.train
        whole = len(self.split.validation)
        series = (self.dataset.series if whole else self.series[:, : self.settings.points])[train].astype(np.float64)
        by = self.alphas[train].reshape(len(train), 1, -1)
        largest = np.round(np.nanmax(np.abs(series / by)), self.codec.decimals)
        return min(len(str(int(largest))), WIDEST) if self.dataset.frame else len(str(int(largest)))

    @cached_property
    def grammar(self) -> Grammar:
        """Of the series as text, no number wider than those of the training part."""
        return Grammar(self.codec, self.dataset.series.shape[2], self.widest, self.dataset.signed)

    @property
    def symbols(self) -> int:
        """How many tokens the loss is over; 0 for all."""
        return len(self.grammar.symbols) if self.settings.vocabulary == "symbols" else 0

    @property
    def tokens_to_forecast(self) -> int:
        """How many tokens the horizon takes at most, when no number is wider than those of the training part."""
        codec, dataset = replace(self.codec, integer_digits=self.widest), self.dataset
        return self.settings.horizon * codec.step_width(dataset.series.shape[2], dataset.signed)

    def read_forecast(self, ids: Sequence[int], system: int) -> NDArray[np.float64]:
        """New tokens as raw values (horizon, V), NaN where a step did not parse.

        A step keeps its place: one that is malformed is a gap, and never shifts what follows.
        """
        decoded = self.codec.decode(self.tokenizer.decode(ids), self.dataset.series.shape[2])
        values = np.full((self.settings.horizon, self.dataset.series.shape[2]), np.nan)
        within = decoded.index < self.settings.horizon
        values[decoded.index[within]] = decoded.values[within] * self.alphas[system]
        return values

    @property
    def step_end(self) -> int:
        """The token of ";"."""
        return self.tokenizer.encode(";")[0]

    def _in_tokens(self, stride: float) -> int:
        """A stride in tokens is cut to the window: beyond it tokens would be skipped."""
        context = self.settings.context
        return max(1, int(stride * context)) if stride <= 1 else min(int(stride), context)

    def _windows(self, systems: NDArray[np.int64], cut: Callable[..., Windows], *how: int) -> Windows:
        settings, pad_id = self.settings, self.tokenizer.token_id("<|endoftext|>")
        tokens = [self.tokens(system)[self._seen(system) :] for system in systems.tolist()]
        windows = cut(tokens, settings.context, *how, pad_id, settings.pad_side)
        if settings.vocabulary == "symbols":
            windows = replace(
                windows, vocabulary=np.array(symbol_tokens(self.tokenizer, self.grammar.symbols), np.int64)
            )
        if settings.digit_weights:
            windows = replace(windows, weights=self._weights(systems, windows))
        if settings.number_loss:
            windows = replace(windows, digits=np.array(symbol_tokens(self.tokenizer, string.digits), np.int64))
        return windows

    def _seen(self, system: int) -> int:
        """How many tokens of a series belong to points that another part is for: no window is of these."""
        points = self.dataset.frame.context[system] if self.dataset.frame else 0
        ends = np.flatnonzero(np.asarray(self.tokens(system)) == self.step_end) if points else np.empty(0, int)
        return int(ends[points - 1]) + 1 if points else 0

    def _places(self, system: int) -> NDArray[np.int64]:
        """Of each token of a series' windows: see `Codec.places`."""
        text, tokens = self.text(system), self.tokens(system)
        if len(text) != len(tokens):
            wrong = f"{len(text)} symbols of a series are {len(tokens)} tokens"
            raise ValueError(f"{self.tokenizer.path}: {wrong}: expected a token for each symbol, to weigh digits")
        return self.codec.places(text)[self._seen(system) :]

    def _weights(self, systems: NDArray[np.int64], windows: Windows) -> NDArray[np.float32]:
        """What the loss of each target is multiplied by, (W, C); 1 where it is no digit, or padding."""
        places_of = cache(self._places)
        weights = np.ones(windows.targets.shape, np.float32)
        for row, (series, start) in enumerate(zip(windows.series, windows.start, strict=True)):
            places = places_of(int(systems[series]))[start + 1 :]
            of_places = np.take(self.settings.digit_weights, places, mode="clip")
            real = windows.targets[row] != IGNORED
            weights[row, real] = np.where(places < 0, 1, of_places)[: real.sum()]
        return weights


def _dataset(settings: Settings, by_time: bool, frame: SeriesSet | None) -> Dataset:
    """The data of a task; a table, or what is split by time, as a frame with room for all that forecasts see."""
    if frame is None and settings.data and frames.reads(path := Path(settings.data)):
        names = ("id_column", "time_column", "target", "wide", "fill")
        frame = frames.read(path, **{name: getattr(settings, name) for name in names})
    if frame is None:
        dataset = lotka_volterra.load(Path(settings.data) if settings.data else None)
        if not by_time:
            return dataset
        frame = replace(
            frames.of_array(dataset.series.astype(np.float64)),
            names=dataset.names,
            name=str(dataset.path),
            digest=dataset.digest,
        )
    if by_time:
        try:
            frame = frame.pieces(settings.fractions)
        except ValueError as e:
            raise ValueError(f"{frame.name}: {e}") from None
    step = settings.origin_step or settings.horizon
    return Dataset.of(frame, settings.points + settings.horizon + (settings.origins - 1) * step)


def _split(settings: Settings, dataset: Dataset, needed: bool) -> splits.Split | None:
    """None where the series are too few, unless the split is needed."""
    systems = len(dataset.series)
    if dataset.frame and any(dataset.frame.context):  # the pieces of a split by time
        return splits.Split(*np.split(np.arange(systems), 3))
    try:
        if settings.split in ("in order", "time"):
            return splits.in_order(systems, settings.fractions)
        rule = splits.seeded if settings.split == "shuffled" else splits.held_out_first
        return rule(systems, settings.fractions, settings.split_seed)
    except ValueError as e:
        if needed:
            raise ValueError(f"{e}, or --split time" if dataset.frame else str(e)) from None
        return None


def _unsplit(settings: Settings, systems: int) -> tuple[splits.Split, Settings]:
    """All systems in one part, and no scale that would need others: each series' own, from the points seen."""
    if settings.scaling == "training maximum" and not settings.alpha:
        settings = replace(settings, scaling="context percentile")
    none = np.arange(0)
    return splits.Split(np.arange(systems), none, none), settings


def _alphas(settings: Settings, dataset: Dataset, split: splits.Split, start: int) -> NDArray[np.float64]:
    """What each series is divided by, (S,), or each variable of it, (S, V); forecasts see points from `start` on."""
    series = dataset.series[:, start:]
    largest = float(np.nanmax(np.abs(series)))
    if settings.alpha and largest and round(largest / settings.alpha, settings.decimals) == 0:
        most = 2 * largest * 10**settings.decimals
        raise ValueError(f"alpha is {settings.alpha:g}: expected less than {most:.3g}, or every value is written as 0")
    if settings.alpha:
        return np.full(len(series), llmtime.fixed(settings.alpha))
    if dataset.frame:
        whole = set(split.train.tolist()) if len(split.validation) else set()
        seen = [dataset.series[i] if i in whole else one[: settings.points] for i, one in enumerate(series)]
        sizes = [llmtime.sizes(one[~np.isnan(one[:, 0])]) for one in seen]
        return np.array([np.maximum(llmtime.of_each(one) / 10, 1e-290) for one in sizes])
    if settings.scaling == "training maximum":
        series = dataset.series
        each = llmtime.of_each(np.abs(series[split.train]).max((0, 1)))
        if np.ptp(each):
            return np.tile(each.astype(np.float64) / 9.99, (len(series), 1))
        return np.full(len(series), llmtime.training_maximum(series[split.train]))
    if settings.scaling == "context percentile":
        return np.array([llmtime.context_percentile(one, settings.points) for one in series])
    return np.array([llmtime.whole_series_percentile(one) for one in series])
