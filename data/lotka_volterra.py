"""The predator-prey data set: read from HDF5, or rebuilt by its law when no file is given; what tasks take data from.

The law is Rosenzweig-MacArthur, prey x that grows logistically and a predator y that saturates (Holling II):

    dx/dt = r x (1 - x / K) - a x y / (1 + h x)
    dy/dt = e a x y / (1 + h x) - m y

Source: Rosenzweig & MacArthur 1963, "Graphical representation and stability conditions of predator-prey
interactions". Dimension letters: S systems, P points in time, V variables.
"""

import hashlib
import io
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy
from numpy.typing import NDArray
from scipy.integrate import solve_ivp

from data.frames import SeriesSet

CACHE = Path(__file__).with_name("lotka_volterra_data.h5")
EXPECTED = "expected an HDF5 file with /trajectories (systems, points, variables)"
REMEDY = "delete it, and it is rebuilt when it is next needed"
MOST_PER_BYTE = 1032  # bytes that deflate makes of one at most, and so the most that a file can hold
WRITTEN_DIGEST = "values_sha256"  # attribute: the exact values as they were written
REAL, REBUILT, OTHER = "real file, as published", "rebuilt by its law", "other data"

SEED, SYSTEMS, POINTS, LAST_TIME = 0, 1000, 100, 200.0
# In the order in which they are drawn: r, a, m, h, e, K, then the initial x and y.
RANGES = ((0.1, 0.3), (0.2, 0.5), (0.1, 0.3), (0.05, 0.2), (0.3, 0.7), (5.0, 15.0), (0.8, 1.2), (0.8, 1.2))

# Exact values of the published file, whatever container they are in.
PUBLISHED_DIGEST = "858e0b0f29c8fde6ca6b776d35cd84359a5b13200af78dca28d513474480724f"
# Values in units of ROUNDING. A rebuilt value is up to 1.2e-7 (float32's last bit) from the published one,
# and with 200,000 values a plainer unit such as 0.1 leaves one of them 1.5e-8 from a tie. With 0.26 the
# nearest published value is 3.8e-6 from a tie, 32 times as far as any rebuilt one moves (measured).
ROUNDING = 0.26
ROUNDED_DIGEST = "a28d693512fe41b74469ca9ce61749af2c0e493033cae7171c36b705225cfb66"
# Two values no further apart than this are the same number as two machines integrate it: above the last bit
# of float32 at the largest value (13.7: 9.5e-7).
SAME_VALUE = 1e-6


@dataclass(frozen=True)
class Dataset:
    """Series and where they come from.

    time: (P,) float64, in the file's unit. series: (S, P, V) float32, finite. names: of V.
    digest: SHA-256 of the file's bytes. source: one line that says whether these are the published values.
    frame: where they are those of a table: series is then float64, `frame.aligned`, and time 0, 1, ...
    """

    time: NDArray[np.float64]
    series: NDArray[np.floating[Any]]
    names: tuple[str, ...]
    digest: str
    source: str
    path: Path
    frame: SeriesSet | None = None

    @classmethod
    def of(cls, frame: SeriesSet, least: int = 0) -> "Dataset":
        """Of a table, with at least so many points a series, NaN before it begins."""
        series, source = frame.aligned(least), "; ".join(("a table", *frame.notes))
        time = np.arange(series.shape[1], dtype=np.float64)
        return cls(time, series, frame.names, frame.digest, source, Path(frame.name), frame)

    @property
    def signed(self) -> bool:
        """Whether any number is negative, so that the text has a minus."""
        return bool((self.series < 0).any())


def load(path: Path | None = None) -> Dataset:
    """Read a data set and check it; without a path, the data set that is rebuilt once into `data/`.

    path: an HDF5 file with `/trajectories` (S, P, V), finite, and optionally `/time` (P,), which is 0, 1, 2, ...
    where it is absent. Two variables are taken for prey and predator unless a number is negative: populations are not.
    Raises ValueError with one line: the file, what is wrong, what was expected; OSError where the data set that is
    rebuilt cannot be written.
    """
    if path is not None:
        return _read(Path(path))
    if not CACHE.exists():
        rebuild(CACHE)
    try:
        dataset = _read(CACHE)
    except ValueError as error:
        raise ValueError(f"{error}; {REMEDY}") from None
    if dataset.source not in (REAL, REBUILT):
        raise ValueError(f"{CACHE}: {dataset.source}: expected the rebuilt data set; {REMEDY}")
    return dataset


def rebuild(path: Path) -> None:
    """Write the data set at `path` by its law: the same bytes each time on one machine, in one move.

    Of the 1000 published series 991 come out bit-identical (990 with scipy 1.12 to 1.15), the others within
    1.2e-7. Raises ValueError where scipy integrates to other values, OSError where nothing can be written.
    """
    time, series = integrate()
    draft = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.h5")  # two processes never share a draft
    try:
        # From v110 on the structure has checksums; without them a damaged file can crash HDF5 (measured).
        with h5py.File(draft, "w", libver="v110") as file:
            file.attrs[WRITTEN_DIGEST] = np.bytes_(_exact_digest(time, series))
            file.create_dataset("trajectories", data=series, track_times=False)
            file.create_dataset("time", data=time, track_times=False)
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:  # h5py: RuntimeError where the disk fills up
        raise OSError(f"{path}: cannot be written ({_one_line(error)}): expected a writable folder") from None
    finally:
        draft.unlink(missing_ok=True)


def integrate() -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """The published systems by their law: time (P,) float64 and series (S, P, 2) float32, prey then predator.

    LSODA at scipy's default tolerances is part of it: the published values are its output, not the limit.
    Raises ValueError where scipy integrates to other values (before 1.12: by up to 0.01, measured).
    """
    random = np.random.RandomState(SEED)
    systems = np.stack([random.uniform(low, high, SYSTEMS) for low, high in RANGES], axis=1)  # (S, 8)
    time = np.linspace(0.0, LAST_TIME, POINTS)
    series = np.empty((SYSTEMS, POINTS, 2), dtype=np.float32)
    for system, (*law, x0, y0) in enumerate(systems.tolist()):
        solution = solve_ivp(derivatives, (0.0, LAST_TIME), (x0, y0), method="LSODA", t_eval=time, args=law)
        series[system] = solution.y.T  # (2, P) -> (P, 2)
    if _rounded_digest(series) != ROUNDED_DIGEST:
        found = f"scipy {scipy.__version__} integrates the predator-prey law to other values"
        raise ValueError(f"{found}: expected scipy 1.12 or newer, or the data as a file")
    return time, series


def derivatives(
    t: float, state: NDArray[np.float64], r: float, a: float, m: float, h: float, e: float, K: float
) -> tuple[float, float]:
    """The law: dx/dt and dy/dt at the state (x, y); the time t is not part of it."""
    x, y = state
    # Per predator. The association decides last bits: this one gives the most identical series (measured).
    eaten = a * x / (1 + h * x)
    return r * x * (1 - x / K) - eaten * y, e * eaten * y - m * y


def _read(path: Path) -> Dataset:
    if not path.exists():
        raise ValueError(f"{path}: no such file: {EXPECTED}")
    if not path.is_file():
        raise ValueError(f"{path}: is not a file: {EXPECTED}")
    try:
        content = path.read_bytes()  # once, so that the digest is of the bytes that the values come from
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): {EXPECTED}") from None
    try:
        with h5py.File(io.BytesIO(content), "r") as file:
            stored = {name: _values(file, name, len(content)) for name in ("trajectories", "time")}
            written_digest = bytes(np.bytes_(file.attrs.get(WRITTEN_DIGEST, b"")))
    except Exception as error:  # h5py raises OSError, RuntimeError, KeyError, ... by where the damage is
        raise ValueError(f"{path}: is not readable as HDF5 ({_one_line(error)}): {EXPECTED}") from None
    stored = {name: values for name, values in stored.items() if values is not None}
    if "trajectories" not in stored:
        raise ValueError(f"{path}: has no dataset /trajectories: {EXPECTED}")
    series = _checked_series(path, np.asarray(stored["trajectories"]))
    points, variables = series.shape[1:]
    time = _checked_time(path, np.asarray(stored.get("time", np.arange(points))), points)
    populations = variables == 2 and not (series < 0).any()
    names = ("prey", "predator") if populations else tuple(f"x{variable}" for variable in range(variables))
    if written_digest and (found := _exact_digest(time, series)).encode() != written_digest:
        recorded = ascii(written_digest.decode("latin-1"))[1:-1]
        unlike = f"sha256 of its values is {found}, recorded {recorded:.64}"
        raise ValueError(f"{path}: {unlike}: expected the file as it was written")
    source = _source(time, series, written_digest)
    return Dataset(time, series, names, hashlib.sha256(content).hexdigest(), source, path)


def _values(file: h5py.File, name: str, size: int) -> NDArray[Any] | None:
    """What a dataset of a file of `size` bytes holds; None where it is no dataset.

    A file could have it in another file, or claim more than memory holds: it is asked before anything is read.
    """
    links, key = file.id.links, name.encode()
    if not links.exists(key):
        return None
    if links.get_info(key).type == h5py.h5l.TYPE_EXTERNAL:
        raise ValueError(f"/{name} lies in another file")
    item = file.get(name)
    if not isinstance(item, h5py.Dataset):
        return None
    if item.external or item.is_virtual:
        raise ValueError(f"/{name} lies in another file")
    if item.size is not None and item.size * item.dtype.itemsize > MOST_PER_BYTE * size:
        raise ValueError(f"/{name} has shape {item.shape}, more than {size} bytes can hold")
    # What is no number is refused by its type; to read it could ask for anything.
    return item[()] if item.dtype.kind in "iufcSb" else np.empty(0, item.dtype)


def _checked_series(path: Path, stored: NDArray[Any]) -> NDArray[np.float32]:
    if stored.dtype.kind not in "iuf":
        raise ValueError(f"{path}: /trajectories has dtype {stored.dtype}: expected real numbers")
    if stored.ndim != 3 or 0 in stored.shape:
        raise ValueError(f"{path}: /trajectories has shape {stored.shape}: expected 3 dimensions, none empty")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as that
        series = stored.astype(np.float32)
    bad = ~np.isfinite(series)
    if bad.any():
        system, point, variable = first = tuple(np.argwhere(bad)[0])
        where = f"system {system}, point {point}, variable {variable}"
        raise ValueError(f"{path}: {where} is {stored[first]}: expected finite numbers")
    return series


def _checked_time(path: Path, stored: NDArray[Any], points: int) -> NDArray[np.float64]:
    if stored.dtype.kind not in "iuf" or stored.shape != (points,):
        raise ValueError(f"{path}: /time is {stored.dtype} {stored.shape}: expected real numbers ({points},)")
    time = stored.astype(np.float64)
    if not np.isfinite(time).all() or (np.diff(time) <= 0).any():
        raise ValueError(f"{path}: /time is not finite and increasing: expected {points} increasing numbers")
    return time


def _source(time: NDArray[np.float64], series: NDArray[np.float32], written_digest: bytes) -> str:
    """Name where values come from: published, rebuilt, altered from these, or another data set."""
    exact = _exact_digest(time, series)
    if exact == PUBLISHED_DIGEST:
        return REAL
    if exact.encode() == written_digest and _rounded_digest(series) == ROUNDED_DIGEST:
        return REBUILT
    if series.shape != (SYSTEMS, POINTS, 2):
        return OTHER
    law_time, law = integrate()
    gap = np.abs(series.astype(np.float64) - law)
    differing = int((gap > SAME_VALUE).any(axis=(1, 2)).sum())
    time_differs = "" if np.allclose(time, law_time) else ", and so does /time"
    if differing == 0 and not time_differs:
        return REBUILT
    reordered = np.abs(np.sort(series, axis=None) - np.sort(law, axis=None)).max() <= SAME_VALUE
    # A fresh draw from the same ranges is .79 of the mean value away (measured): under .5 it is this one.
    if differing == SYSTEMS and gap.mean() > 0.5 * law.mean() and not reordered:
        return OTHER
    return f"ALTERED: {differing} of {SYSTEMS} series differ from the published values{time_differs}"


def _exact_digest(time: NDArray[np.float64], series: NDArray[np.float32]) -> str:
    return _digest(series.shape, time.astype("<f8"), series.astype("<f4"))


def _rounded_digest(series: NDArray[np.float32]) -> str:
    return _digest(series.shape, np.rint(series.astype(np.float64) / ROUNDING).astype("<i4"))


def _digest(shape: tuple[int, ...], *arrays: NDArray[Any]) -> str:
    return hashlib.sha256(repr(shape).encode() + b"".join(array.tobytes() for array in arrays)).hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
