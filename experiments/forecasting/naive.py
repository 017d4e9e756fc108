"""Forecasts that need no model, of a study's systems: made once, kept in the run folder, read back."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.forecasting.baselines import RULES, SEASONAL
from experiments.forecasting.law_fit import FEWEST_POINTS, law_fit
from experiments.run_folder import files
from experiments.task.task import Task
from experiments.training.progress import Counted

Forecasts = dict[str, NDArray[np.float64]]


def forecasts(task: Task, systems: Sequence[int], progress: Counted = lambda done, of: None) -> Forecasts:
    """Persistence, the context's mean, a seasonal repeat, and for predator and prey a fit of their law, (N, h, V).

    Those of several origins stand one after the other, (N, sum of their h, V). `progress` takes how many fits are done,
    which take a while, and of how many."""
    return _joined([_forecasts(one, systems, progress) for one in task.origins])


def _joined(origins: Sequence[Forecasts]) -> Forecasts:
    return {name: np.concatenate([one[name] for one in origins], 1) for name in origins[0]}


def _forecasts(task: Task, systems: Sequence[int], progress: Counted) -> Forecasts:
    settings, dataset = task.settings, task.dataset
    context = [task.raw(system, settings.points) for system in systems]
    found = {name: np.stack([rule(one, settings.horizon) for one in context]) for name, rule in RULES.items()}
    if not dataset.frame and dataset.names == ("prey", "predator") and settings.points >= FEWEST_POINTS:
        fits: list[NDArray[np.float64]] = []
        for one in context:
            progress(len(fits), len(context))
            fits.append(law_fit(task.time, one))
        progress(len(fits), len(context))
        found["law fit"] = np.stack(fits)
    return found


def kept(task: Task, systems: Sequence[int], path: Path, progress: Counted = lambda done, of: None) -> Forecasts:
    """The forecasts of `systems`, from the CSV at `path`, or made and written there; of later origins at `path`-2, ...

    Raises:
        ValueError: the file is not what this wrote for these systems.
    """
    paths = [path, *(path.with_stem(f"{path.stem}-{number}") for number in range(2, len(task.origins) + 1))]
    return _joined([_kept(*each, systems, progress) for each in zip(task.origins, paths, strict=True)])


def _kept(task: Task, path: Path, systems: Sequence[int], progress: Counted) -> Forecasts:
    settings, names = task.settings, task.dataset.names
    time = task.time[settings.points :]
    if not path.is_file():
        made = _forecasts(task, systems, progress)
        written = []
        for name, values in made.items():
            for i, v, step in np.ndindex(len(systems), len(names), settings.horizon):
                row = {"forecaster": name, "unique_id": systems[i], "ds": float(time[step]), "variable": names[v]}
                row["y"] = float(task.series[systems[i], settings.points + step, v])
                written.append(row | {"y_hat": float(values[i, step, v])})
        files.write_csv(path, written)
        return made
    try:
        _, rows = files.read_csv(path)
        found: Forecasts = {}
        shape = len(systems), len(names), settings.horizon
        for name in dict.fromkeys(row["forecaster"] for row in rows):
            mine = [row for row in rows if row["forecaster"] == name]
            if [int(row["unique_id"]) for row in mine] != np.repeat(systems, shape[1] * shape[2]).tolist():
                raise ValueError("forecasts of other systems")
            values = np.array([float(row["y_hat"]) for row in mine]).reshape(shape)
            found[name] = values.transpose(0, 2, 1)  # (N, h, V)
        if SEASONAL not in found:
            raise ValueError(f"no {SEASONAL}")
    except (ValueError, KeyError) as e:
        raise ValueError(f"{path}: {e}: expected the forecasts of this run; delete it, and it is made again") from None
    return found
