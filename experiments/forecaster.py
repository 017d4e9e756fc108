"""Forecasts as a library: frames in, frames out, with the names that the field's tools have.

Forecaster.from_pretrained(model, adapter=None)     .predict(values, prediction_length)
.predict_df(frame, prediction_length, ...)          as Chronos-2 has it
.cross_validation(frame, h, n_windows, ...)         as nixtla has it
.fit(frame, budget=1e15)                            LoRA on the past of the frame's series
"""

import shutil
import weakref
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data import frames, tables
from data.frames import SeriesSet
from experiments.accounting.ledger import Ledger
from experiments.forecasting import future, horizon, naive
from experiments.forecasting.evaluate import settled
from experiments.forecasting.forecast import Forecasts
from experiments.run_folder.folder import RunFolder
from experiments.settings.record import FORECASTER, Settings
from experiments.task.model import trained_model
from experiments.task.task import Task
from experiments.training.cell import Cell, predicted, run_cell
from experiments.training.progress import Report
from lora import load_adapter
from qwen_min import Qwen, Tokenizer
from qwen_min.load import resolve


class Forecaster:
    """A model that forecasts frames. `flops` is what the last call was predicted to take, and took.

    Every call is priced first, and refused if that is more than what is left of the settings' budget.
    """

    def __init__(self, settings: Settings, model: Qwen, tokenizer: Tokenizer, ledger: Path | None = None):
        self.settings, self.model, self.tokenizer = settings, model, tokenizer
        self.flops: dict[str, int] = {"predicted": 0, "counted": 0}
        own = mkdtemp(prefix="forecaster-")
        weakref.finalize(self, shutil.rmtree, own, ignore_errors=True)
        self.ledger = ledger or Path(own) / "ledger.sqlite"

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        adapter: str | Path | None = None,
        ledger: str | Path | None = None,
        **settings: Any,
    ) -> "Forecaster":
        """A forecaster from a folder or a hub id.

        Args:
            model: by default the pocket model, or the base model of the adapter "forecaster".
            adapter: a folder, or "forecaster" (docs/best.md), which brings its settings.
            ledger: where FLOPs are charged; by default a file that goes with the forecaster.
            settings: any field of `Settings`, such as points (most that a forecast sees), decimals, num_samples.
        """
        base, given = Settings(), {"model": str(model)} if model else {}
        if adapter == "forecaster":
            base, adapter = Settings.from_toml(FORECASTER / "config.toml"), FORECASTER / "adapter"
        chosen = base.updated({"num_samples": 20, "origins": 1} | given | settings)
        folder = resolve(chosen.model, chosen.revision or None, chosen.offline)
        held = Path(ledger) if ledger else None
        return cls(chosen, trained_model(chosen, adapter), Tokenizer(folder / "tokenizer.json"), held)

    def predict(self, values: ArrayLike, prediction_length: int) -> NDArray[np.float64]:
        """The future of a series (P,), of several (S, P), or of several of V variables (S, P, V): (h,), (S, h), ..."""
        given = np.asarray(values, np.float64)
        if not 1 <= given.ndim <= 3 or not given.size or not np.isfinite(given).all():
            raise ValueError(f"values have shape {given.shape}: expected finite (P,), (S, P) or (S, P, V)")
        each = given.reshape(1 if given.ndim == 1 else len(given), -1, given.shape[2] if given.ndim == 3 else 1)
        _, made = self._forecast(frames.of_array(each), prediction_length)
        return made.values if given.ndim == 3 else made.values[..., 0] if given.ndim == 2 else made.values[0, :, 0]

    def predict_df(
        self,
        df: Any,
        prediction_length: int,
        quantile_levels: Sequence[float] = future.LEVELS,
        id_column: str = "item_id",
        timestamp_column: str = "timestamp",
        target: str | Sequence[str] = "target",
        fill: str = "",
    ) -> Any:
        """The future of every series of a long pandas frame.

        Returns a frame of a row for each series, variable and step: the two columns, "target_name", "predictions", and
        a column for each quantile level, such as "0.1", of `num_samples` samples; without levels a greedy forecast.
        Raises ValueError for a frame that cannot be read, BudgetExceeded before anything runs.
        """
        series = _series(df, id_column, timestamp_column, target, fill)
        drawn: dict[str, Any] = {} if quantile_levels else {"num_samples": 1}
        task, made = self._forecast(series, prediction_length, **drawn)
        return _frame(df, series, future.rows(task, made, quantile_levels))

    def cross_validation(
        self,
        df: Any,
        h: int,
        n_windows: int = 1,
        step_size: int | None = None,
        level: Sequence[float] = (),
        id_col: str = "unique_id",
        time_col: str = "ds",
        target_col: str = "y",
        fill: str = "",
    ) -> Any:
        """Forecasts of `h` steps after `n_windows` cut-offs of every series, the last `h` points before its end, each
        `step_size` (h by default) before the next, beside the copies that need no model.

        Returns a frame: id_col, time_col, "cutoff", target_col, "qwen_min", with a level such as 80 "qwen_min-lo-80"
        and "qwen_min-hi-80", and each copy's column. utilsforecast's losses read it.
        """
        series = _series(df, id_col, time_col, target_col, fill)
        changes: dict[str, Any] = {"origins": n_windows, "origin_step": step_size or 0}
        changes |= {} if level else {"num_samples": 1}
        task, made = self._forecast(series, h, ahead=False, **changes)
        return _frame(df, series, future.windows(task, made, naive.forecasts(task, made.systems), level))

    def fit(
        self,
        df: Any,
        budget: float = 1e15,
        rank: int = 8,
        lr: float = 0.0,
        out: str | Path | None = None,
        **columns: Any,
    ) -> "Forecaster":
        """Train LoRA of the base model on the first 70 % of each series, for as many steps as the budget in FLOPs pays,
        one validation included; from then on forecasts are those of the trained model. Returns the forecaster.

        Args:
            columns: id_column, timestamp_column, target and fill, as in `predict_df`.
            out: the run's folder, with its adapter; by default it is not kept.
        """
        names = {"id_column": "item_id", "timestamp_column": "timestamp", "target": "target", "fill": ""} | columns
        series = _series(df, names["id_column"], names["timestamp_column"], names["target"], names["fill"])
        settings = replace(self.settings, split="time", val_every=0, keep="last", steps=1, rungs=())
        task = Task.prepare(settings, self.tokenizer, frame=series)
        task.check_fits(self.model.config)
        cell = Cell(lr or max(settings.learning_rates), rank)
        tried = (task.under(replace(settings, steps=steps)) for steps in (1, 2))
        one, two = (sum(predicted(each, cell, self.model.config).values()) for each in tried)
        steps = 1 + int((budget - one) // (two - one))
        if steps < 1:
            raise ValueError(f"budget is {budget:g} FLOPs: expected at least {one:,}, of a step and a validation")
        task = task.under(replace(settings, steps=steps))
        expected = predicted(task, cell, self.model.config)
        with TemporaryDirectory(prefix="forecaster-") as place, closing(Report(settings.batch_size)) as report:
            folder = RunFolder(Path(out or place))
            with Ledger(self.ledger, self.settings.budget) as ledger:
                result = run_cell(task, cell, expected, folder, ledger, f"fit {folder.path}", report, horizon.error)
            self.model = load_adapter(trained_model(settings, None), folder.adapter).eval()
        self.flops = {"predicted": sum(expected.values()), "counted": sum(result["flops"].values())}
        return self

    def _forecast(self, series: SeriesSet, steps: int, ahead: bool = True, **changes: Any) -> tuple[Task, Forecasts]:
        settings = self.settings.updated({"horizon": steps, "split": "in order"} | changes)
        task = Task.prepare(settings, self.tokenizer, needs_split=False, ahead=ahead, frame=series)
        systems = list(range(len(series.ids)))
        task.check(systems, scored=not ahead)
        made, _, expected = settled(task, self.model, systems, self.ledger, "forecast", series.name)
        self.flops = {"predicted": sum(expected.values()), "counted": sum(made.flops.values())}
        return task, made


def _series(df: Any, by: str, at: str, target: str | Sequence[str], fill: str) -> SeriesSet:
    names = (target,) if isinstance(target, str) else tuple(target)
    return frames.series_of(tables.of_frame(df), by, at, names, fill=fill)


def _frame(df: Any, series: SeriesSet, rows: list[dict[str, Any]]) -> Any:
    """Rows as a frame, with names and times of the types that the given one has."""
    import pandas

    (by, at), found = series.keys, pandas.DataFrame(rows)
    found[by] = found[by].map({str(name): name for name in df[by]})
    for column in {at, "cutoff"} & {*found.columns} if series.clocks[0].base else ():
        found[column] = pandas.to_datetime(found[column])
    return found
