"""How the forecasts of a run were judged: the records below its evaluation/."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from experiments.forecasting.baselines import SEASONAL
from experiments.forecasting.scores import QUANTILES, verdict
from experiments.report.records import Fields, Records, Row

Floats = NDArray[np.float64]

MODEL, LAW = "model", "law fit"  # among the forecasters
NAIVE = "naive/shown.csv"

_SCORES = {
    **dict.fromkeys(("part", "unit", "forecaster", "variable"), "text"),
    **dict.fromkeys(("series", "steps", "unparsed_steps", "won"), "count"),
    **dict.fromkeys(("mse", "rmse", "mae", "mape"), "number"),
    **dict.fromkeys(("mse_low", "mse_high", "mae_low", "mae_high", "r2", "skill"), "number or nothing"),
    **dict.fromkeys(("crps", "coverage50", "coverage80", "width50", "width80"), "number or nothing"),
    **dict.fromkeys(("difference_low", "difference_high"), "number or nothing?"),
    **dict.fromkeys(("smape", "mase", "wql", "win_rate"), "number or nothing?"),
    "reference": "text?",
}
_SERIES = {"unique_id": "text", "ds": "number", "variable": "text", "y": "number"}
_SYSTEMS = {
    **dict.fromkeys(("unique_id", "class", "parts", "forecaster", "variable"), "text"),
    **dict.fromkeys(("mse", "rmse", "mae", "mape"), "number"),
    **dict.fromkeys(("r2", "cut_mass", "cut_mass_mean"), "number or nothing"),
    "unparsed_steps": "count",
}


@dataclass(frozen=True)
class System:
    """One series of the part "shown" as it was forecast: context (P, V), truth and forecast (h, V), raw units.

    A step that did not parse is NaN in `forecast`; `quantiles` (h, V) by level, or None."""

    id: str
    shape: str
    time: Floats
    context: Floats
    truth: Floats
    forecast: Floats
    quantiles: dict[float, Floats] | None

    @property
    def title(self) -> str:
        return f"system {self.id} ({self.shape})" if self.shape else f"system {self.id}"


class Evaluation:
    """The records below a run's evaluation/, each read when it is asked for."""

    def __init__(self, records: Records, folder: str):
        self.records, self.folder = records, folder

    def file(self, name: str) -> str:
        return f"{self.folder}/evaluation/{name}"

    @cached_property
    def about(self) -> Fields:
        return self.records.json(self.file("evaluation.json"))

    @cached_property
    def scores(self) -> list[Row]:
        """The rows of scores.csv; an older one has no column for the reference, which was the seasonal repeat."""
        rows = self.records.csv(self.file("scores.csv"), **_SCORES)
        return [row | {"reference": row["reference"] or SEASONAL} for row in rows]

    @cached_property
    def systems(self) -> list[Row]:
        return self.records.csv(self.file("systems.csv"), **_SYSTEMS)

    @cached_property
    def systems_scaled(self) -> list[Row]:
        return self.records.csv(self.file("systems_scaled.csv"), **_SYSTEMS)

    @cached_property
    def horizon(self) -> list[Row]:
        columns = dict.fromkeys(("part", "forecaster", "variable"), "text") | {"step": "count"}
        columns |= dict.fromkeys(("mse", "mae", "running_rmse"), "number")
        return self.records.csv(self.file("horizon.csv"), **columns)

    @cached_property
    def tokens(self) -> list[Row]:
        counts = dict.fromkeys(("position", "step", "token"), "count")
        return self.records.csv(self.file("tokens.csv"), unique_id="text", **counts, text="text", nats="number")

    @property
    def scored(self) -> str:
        """What is scored, in words; an older evaluation.json has one origin."""
        origins = self.about.values.get("origins", 1)
        return "the horizon" if origins == 1 else f"the horizons at {origins} origins"

    @property
    def parts(self) -> list[str]:
        return [part for part in ("validation", "test", "shown") if part in self.about.fields("parts").values]

    @property
    def shown(self) -> list[str]:
        return [str(system) for system in self.about.counts("parts.shown")] if "shown" in self.parts else []

    def by_forecaster(self, part: str) -> dict[str, Row]:
        """The rows of scores.csv of a part, all variables, raw units."""
        wanted = {"part": part, "unit": "raw", "variable": "all"}
        return {row["forecaster"]: row for row in self.scores if wanted.items() <= row.items()}

    def score(self, part: str) -> Row | None:
        """The model's row of scores.csv, all variables, raw units, if there is one."""
        return self.by_forecaster(part).get(MODEL)

    def mse(self, part: str) -> dict[str, float]:
        """The MSE by forecaster, all variables, raw units."""
        return {name: row["mse"] for name, row in self.by_forecaster(part).items()}

    def series_mse(self, part: str, forecaster: str) -> dict[str, float]:
        """The MSE of each series of a part, all variables, raw units, by its name."""
        wanted = {"forecaster": forecaster, "variable": "all"}
        rows = [row for row in self.systems if wanted.items() <= row.items()]
        return {row["unique_id"]: row["mse"] for row in rows if part in row["parts"].split()}

    def verdict(self, part: str, untrained: float | None) -> str:
        """`scores.verdict` of a part that was scored; `untrained`: the untrained model's MSE on it, if there is one."""
        return verdict(self.mse(part), len(self.about.counts(f"parts.{part}")), untrained)

    @cached_property
    def names(self) -> list[str]:
        """The variables, in the order of the records."""
        return list(dict.fromkeys(row["variable"] for row in self._history))

    @cached_property
    def forecasts(self) -> list[System]:
        """The shown systems as the model forecast them."""
        levels = {level: f"q{level:g}" for level in QUANTILES}
        file, either = self.file("forecasts.csv"), dict.fromkeys(("y_hat", *levels.values()), "number or nothing")
        rows = self.records.csv(file, **_SERIES, **either)
        return [self._system(system, file, rows, levels) for system in self.shown]

    def naive(self, forecaster: str) -> list[System]:
        """The shown systems as a naive forecaster has them; none where it is not recorded."""
        if not self.records.has(NAIVE):
            return []
        rows = self.records.csv(NAIVE, forecaster="text", **_SERIES, y_hat="number or nothing")
        rows = [row for row in rows if row["forecaster"] == forecaster]
        return [self._system(system, NAIVE, rows, {}) for system in self.shown] if rows else []

    @cached_property
    def _history(self) -> list[Row]:
        return self.records.csv(self.file("history.csv"), **_SERIES)

    def _system(self, system: str, file: str, rows: Sequence[Row], levels: Mapping[float, str]) -> System:
        """One series as the rows of a file forecast it, with the columns of its quantiles by level."""
        past = [row for row in self._history if row["unique_id"] == system]
        future = [row for row in rows if row["unique_id"] == system]
        time = [row["ds"] for row in (*past, *future) if row["variable"] == self.names[0]]
        context = self._grid(self.file("history.csv"), past, "y", system)
        truth, forecast = (self._grid(file, future, column, system) for column in ("y", "y_hat"))
        bands = {level: self._grid(file, future, column, system) for level, column in levels.items()}
        sampled = any(np.isfinite(values).any() for values in bands.values())
        shape = next((row["class"] for row in reversed(self.systems) if row["unique_id"] == system), "")
        return System(system, shape, np.array(time), context, truth, forecast, bands if sampled else None)

    def _grid(self, file: str, rows: Sequence[Row], column: str, system: str) -> Floats:
        """The values of one column as (steps, V), an empty one NaN."""
        values = [[row[column] for row in rows if row["variable"] == name] for name in self.names]
        if not rows or len({len(one) for one in values}) != 1 or sum(map(len, values)) != len(rows):
            counts = ", ".join(f"{len(one)} of {name}" for name, one in zip(self.names, values, strict=True))
            raise ValueError(
                f"{self.records.root / file}: system {system} has {counts or 'no rows'}: "
                "expected some of each variable, and as many of each"
            )
        return np.array(values, np.float64).T
