"""The small data set of tests that run a verb: damped waves of predator and prey."""

from pathlib import Path

import h5py
import numpy as np


def damped_waves(path: Path, points: int, variables: int = 2) -> Path:
    """Write twenty damped waves about 2, two units of time a point or a little more, to an HDF5 file; return its path.

    The bytes are the same whenever it is written: a run records their digest.
    """
    times, draw = np.linspace(0, 2 * points, points), np.random.RandomState(0)
    phases = draw.uniform(0, 6, (20, 1, variables))
    series = 2 + np.exp(-times / 60)[:, None] * np.sin(times[:, None] / 3 + phases)
    with h5py.File(path, "w") as file:
        file.create_dataset("trajectories", data=series.astype(np.float32), track_times=False)
        file.create_dataset("time", data=times, track_times=False)
    return path
