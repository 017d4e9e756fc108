"""The data set: rebuilt by its law, read from HDF5, refused in one line where it is not what it should be."""

import hashlib
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.integrate import solve_ivp

from data import lotka_volterra
from data.lotka_volterra import Dataset, load, rebuild

PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "lotka_volterra_data.h5"
needs_published = pytest.mark.skipif(not PUBLISHED.exists(), reason=f"the published file is not at {PUBLISHED}")
Writer = Callable[..., Path]


@pytest.fixture(scope="session")
def rebuilt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rebuilt") / "rebuilt.h5"
    rebuild(path)
    return path


@pytest.fixture(scope="session")
def rebuilt(rebuilt_file: Path) -> Dataset:
    return load(rebuilt_file)


@pytest.fixture
def integrated(monkeypatch: pytest.MonkeyPatch, rebuilt: Dataset) -> list[str]:
    """Take the law's values from the one rebuild instead of integrating again; a list of the calls."""
    calls: list[str] = []

    def integrate() -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        calls.append("integrate")
        return rebuilt.time, rebuilt.series

    monkeypatch.setattr(lotka_volterra, "integrate", integrate)
    return calls


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    def writer(**datasets: object) -> Path:
        path = tmp_path / "given.h5"
        with h5py.File(path, "w") as file:
            for name, values in datasets.items():
                file.create_dataset(name, data=values)
        return path

    return writer


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the data set is rebuilt once; nothing is there yet."""
    monkeypatch.setattr(lotka_volterra, "CACHE", tmp_path / "cached.h5")
    return tmp_path / "cached.h5"


def refusal(path: Path | None) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message and "expected" in message, message
    return message


def tie_margin(series: NDArray[np.float32]) -> float:
    units = series.astype(np.float64) / lotka_volterra.ROUNDING
    return float(np.abs(units - np.floor(units) - 0.5).min()) * lotka_volterra.ROUNDING


@needs_published
def test_the_rebuilt_series_are_the_published_ones_to_the_last_bit_of_float32(rebuilt):
    published = load(PUBLISHED)
    identical = (rebuilt.series == published.series).all(axis=(1, 2)).sum()
    assert identical >= 980
    assert np.abs(rebuilt.series.astype(np.float64) - published.series).max() <= 2e-7
    np.testing.assert_array_equal(rebuilt.time, published.time)


@needs_published
def test_the_published_file_is_named_as_such():
    published = load(PUBLISHED)
    assert published.source == "real file, as published"
    assert published.digest == hashlib.sha256(PUBLISHED.read_bytes()).hexdigest()
    assert published.digest.startswith("adaf44d8") and published.digest.endswith("b5632")


@needs_published
def test_the_published_and_the_rebuilt_values_round_to_one_digest_with_room_to_spare(rebuilt):
    for series in (load(PUBLISHED).series, rebuilt.series):
        assert lotka_volterra._rounded_digest(series) == lotka_volterra.ROUNDED_DIGEST
        assert tie_margin(series) > 3e-6  # measured 3.85e-6; values move by 1.2e-7


def test_the_rebuilt_data_set_has_the_published_shape_names_and_time(rebuilt):
    assert rebuilt.series.shape == (1000, 100, 2) and rebuilt.series.dtype == np.float32
    assert rebuilt.time.dtype == np.float64
    np.testing.assert_array_equal(rebuilt.time, np.linspace(0, 200, 100))
    assert rebuilt.names == ("prey", "predator")
    assert rebuilt.source == "rebuilt by its law"
    # Means of the published data set, as its description gives them.
    np.testing.assert_allclose(rebuilt.series.mean(axis=(0, 1)), [1.70, 0.57], atol=0.005)


def each_50th(rebuilt: Dataset, **other: float) -> Callable[..., Any]:
    """A solver that integrates one system of 50 again, with other options; the rest it has from the one rebuild."""
    systems = itertools.count()

    def solve(*arguments: Any, **options: Any) -> Any:
        system = next(systems)
        return SimpleNamespace(y=rebuilt.series[system].T) if system % 50 else solve_ivp(*arguments, **options | other)

    return solve


def test_a_rebuild_writes_the_same_bytes_again(rebuilt_file, rebuilt, tmp_path, monkeypatch):
    monkeypatch.setattr(lotka_volterra, "solve_ivp", each_50th(rebuilt))
    rebuild(tmp_path / "again.h5")
    assert (tmp_path / "again.h5").read_bytes() == rebuilt_file.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.h5"]  # no draft is left


def test_without_a_path_the_data_set_is_rebuilt_once_and_then_read(cached, rebuilt, integrated):
    for dataset in (load(), load()):
        np.testing.assert_array_equal(dataset.series, rebuilt.series)
        assert (dataset.source, dataset.path) == ("rebuilt by its law", cached)
        assert dataset.digest == rebuilt.digest
    assert integrated == ["integrate"]


@needs_published
def test_the_published_file_in_the_place_of_the_rebuilt_one_is_taken_as_it_is(cached):
    cached.write_bytes(PUBLISHED.read_bytes())
    assert load().source == "real file, as published"


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_a_damaged_cached_file_is_refused_with_what_to_do(damage, cached, rebuilt_file, integrated):
    content = rebuilt_file.read_bytes()
    cached.write_bytes(content[:5000] if damage == "truncated" else content)
    if damage == "altered":
        with h5py.File(cached, "r+") as file:
            file["trajectories"][7, 3, 1] += 1e-5  # too little for the rounded digest to see
    message = refusal(None)
    assert str(cached) in message and "delete it" in message


def test_an_integrator_that_gives_other_values_is_refused(rebuilt, tmp_path, monkeypatch):
    """scipy before 1.12 interpolates LSODA's steps differently and is off by up to 0.01."""
    monkeypatch.setattr(lotka_volterra, "solve_ivp", each_50th(rebuilt, rtol=1e-4))
    with pytest.raises(ValueError, match=r"expected scipy 1\.12 or newer"):
        rebuild(tmp_path / "other.h5")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["taken.h5", "absent/rebuilt.h5"])
def test_a_file_that_cannot_be_put_in_its_place_leaves_no_draft(name, tmp_path, integrated):
    (tmp_path / "taken.h5").mkdir()
    with pytest.raises(OSError, match=rf"{re.escape(name)}: cannot be written .*expected a writable folder") as caught:
        rebuild(tmp_path / name)
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["taken.h5"]


@pytest.mark.parametrize(
    ("alter", "label"),
    [
        (lambda s: s.__setitem__((5, 9, 0), s[5, 9, 0] + 1e-4), "ALTERED: 1 of 1000 series differ"),
        (lambda s: s.__setitem__(slice(0, 30), 1e30), "ALTERED: 30 of 1000 series differ"),
        (lambda s: s.__imul__(np.float32(1.1)), "ALTERED: 1000 of 1000 series differ"),
        (lambda s: s.__setitem__(..., s[..., ::-1].copy()), "ALTERED: 1000 of 1000 series differ"),
        (lambda s: s.__setitem__(..., np.roll(s, 1, axis=0)), "ALTERED: 1000 of 1000 series differ"),
        (lambda s: s.__imul__(np.float32(3)), "other data"),
        (lambda s: s.__setitem__((5, 9, 0), np.nextafter(s[5, 9, 0], np.float32(9))), "rebuilt by its law"),
    ],
    ids=["one value", "30 series", "scaled", "columns swapped", "reordered", "far away", "last bit"],
)
def test_data_near_the_published_ones_are_named_altered(alter, label, rebuilt, integrated, write):
    series = rebuilt.series.copy()
    alter(series)
    source = load(write(trajectories=series, time=rebuilt.time)).source
    assert source.startswith(label) and "/time" not in source


def test_another_time_axis_is_named(rebuilt, integrated, write):
    source = load(write(trajectories=rebuilt.series)).source
    assert source == "ALTERED: 0 of 1000 series differ from the published values, and so does /time"


def test_other_data_are_read_as_they_are(write):
    series = np.random.default_rng(0).uniform(0, 9, (4, 6, 3))
    path = write(trajectories=series)
    dataset = load(path)
    np.testing.assert_array_equal(dataset.series, series.astype(np.float32))
    np.testing.assert_array_equal(dataset.time, np.arange(6.0))
    assert dataset.names == ("x0", "x1", "x2")
    assert (dataset.source, dataset.path) == ("other data", path)
    assert dataset.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_whole_numbers_and_a_given_time_are_read(write):
    series = np.arange(12).reshape(2, 3, 2)
    dataset = load(write(trajectories=series, time=np.array([0, 2, 5])))
    np.testing.assert_array_equal(dataset.series, series.astype(np.float32))
    np.testing.assert_array_equal(dataset.time, [0.0, 2.0, 5.0])


def test_negative_numbers_are_read_and_make_two_variables_no_populations(write):
    series = np.ones((2, 3, 2), np.float32)
    assert not load(write(trajectories=series)).signed
    series[1, 2, 0] = -0.25
    dataset = load(write(trajectories=series))
    np.testing.assert_array_equal(dataset.series, series)
    assert dataset.signed and dataset.names == ("x0", "x1")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_the_first_bad_value_is_named_by_its_place(value, write):
    series = np.ones((3, 4, 2))
    series[1, 2, 1] = series[2, 0, 0] = value
    path = write(trajectories=series)
    assert refusal(path).startswith(f"{path}: system 1, point 2, variable 1 is {value}:")


@pytest.mark.parametrize(
    ("datasets", "problem"),
    [
        ({"series": np.ones((2, 3, 2))}, "has no dataset /trajectories"),
        ({"trajectories/inner": np.ones((2, 3, 2))}, "has no dataset /trajectories"),
        ({"trajectories": np.ones((2, 3))}, r"shape \(2, 3\)"),
        ({"trajectories": np.ones((2, 0, 2))}, r"shape \(2, 0, 2\)"),
        ({"trajectories": h5py.Empty("f4")}, "dtype object"),
        ({"trajectories": np.full((1, 2, 2), b"1.0")}, "dtype |S3"),
        ({"trajectories": np.ones((2, 3, 2), dtype=complex)}, "dtype complex128"),
        ({"trajectories": np.ones((2, 3, 2)), "time": np.arange(4.0)}, "/time"),
        ({"trajectories": np.ones((2, 3, 2)), "time": [0.0, np.nan, 2.0]}, "/time"),
        ({"trajectories": np.ones((2, 3, 2)), "time": [0.0, 2.0, 1.0]}, "/time"),
    ],
)
def test_a_file_of_another_form_is_refused(datasets, problem, write):
    path = write(**datasets)
    with pytest.raises(ValueError, match=problem):
        load(path)
    assert refusal(path).startswith(f"{path}: ")


def test_a_missing_file_a_folder_and_a_file_that_is_not_hdf5_are_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent.h5")
    assert "is not a file" in refusal(tmp_path)
    for content in (b"", b"prey,predator\n1.0,0.5\n"):
        (tmp_path / "text.h5").write_bytes(content)
        assert "is not readable as HDF5" in refusal(tmp_path / "text.h5")


def test_a_truncated_file_is_refused_wherever_it_ends(write):
    path = write(trajectories=np.ones((5, 40, 2)), time=np.arange(40.0))
    content = path.read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        assert refusal(path).startswith(f"{path}: ")
