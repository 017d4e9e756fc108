"""The forecasting task as tokens: data set, split, scale, encoding and tokenizer of one run."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data import llmtime, lotka_volterra, splits
from data.llmtime import Codec
from data.lotka_volterra import Dataset
from data.windows import Windows, make_windows
from experiments.settings import Settings
from qwen_min import Tokenizer


@dataclass(frozen=True)
class Task:
    """Series of a data set, as text and token ids and back.

    series[i] / alpha, written by `codec`, is what the model sees; `split` says which systems train.
    """

    settings: Settings
    dataset: Dataset
    split: splits.Split
    alpha: float
    codec: Codec
    tokenizer: Tokenizer

    @classmethod
    def prepare(cls, settings: Settings, tokenizer: Tokenizer) -> "Task":
        """Read or rebuild the data, split it in order 70/15/15, and take the scale from the training part alone.

        Raises:
            ValueError: the data is bad, or a number in it cannot be written.
        """
        dataset = lotka_volterra.load(Path(settings.data) if settings.data else None)
        split = splits.in_order(len(dataset.series))
        alpha = settings.alpha or llmtime.training_maximum(dataset.series[split.train])
        return cls(settings, dataset, split, llmtime.fixed(alpha), Codec(settings.decimals), tokenizer)

    def check(self, systems: Sequence[int]) -> None:
        """Raise ValueError for a system that the data set lacks, or a forecast that is longer than its series."""
        last, points = len(self.dataset.series) - 1, self.dataset.series.shape[1]
        if self.settings.points + self.settings.horizon > points:
            raise ValueError(
                f"{self.dataset.path}: has {points} points: expected at least the {self.settings.points} "
                f"that a forecast sees and the {self.settings.horizon} that it makes"
            )
        for system in systems:
            if not 0 <= system <= last:
                raise ValueError(f"{self.dataset.path}: has no system {system}: expected 0 to {last}")

    def scaled(self, system: int) -> NDArray[np.float64]:
        """Series `system` divided by alpha, (P, V)."""
        return self.dataset.series[system].astype(np.float64) / self.alpha

    def text(self, system: int, points: int | None = None) -> str:
        """The LLMTIME text of the first `points` steps of a series (all unless told)."""
        return self.codec.encode(self.scaled(system)[:points])

    def tokens(self, system: int, points: int | None = None) -> list[int]:
        return self.tokenizer.encode(self.text(system, points))

    @cached_property
    def train_windows(self) -> Windows:
        """Windows of the training part, overlapping by half."""
        return self._windows(self.split.train, max(1, self.settings.context // 2))

    @cached_property
    def validation_windows(self) -> Windows:
        """Windows of the first `val_series` of the validation part, in which each token is predicted once."""
        return self._windows(self.validation_systems, self.settings.context)

    @property
    def validation_systems(self) -> NDArray[np.int64]:
        return self.split.validation[: self.settings.val_series]

    @property
    def tokens_to_forecast(self) -> int:
        """How many tokens the horizon takes when every number fits its width."""
        return self.settings.horizon * self.codec.step_width(self.dataset.series.shape[2])

    def read_forecast(self, ids: Sequence[int]) -> tuple[NDArray[np.float64], int]:
        """New tokens as raw values (horizon, V), NaN where a step did not parse, and how many did not.

        A step keeps its place: one that is malformed is a gap, and never shifts what follows.
        """
        decoded = self.codec.decode(self.tokenizer.decode(ids), self.dataset.series.shape[2])
        values = np.full((self.settings.horizon, self.dataset.series.shape[2]), np.nan)
        within = decoded.index < self.settings.horizon
        values[decoded.index[within]] = decoded.values[within] * self.alpha
        return values, int(np.isnan(values).any(1).sum())

    def _windows(self, systems: NDArray[np.int64], stride: int) -> Windows:
        tokens = [self.tokens(int(system)) for system in systems]
        return make_windows(tokens, self.settings.context, stride, pad_id=self.tokenizer.token_id("<|endoftext|>"))
