"""Series of people's own: tables as named series, what is refused and where, scales, splits by time, the future."""

import gzip
import json
from datetime import date, timedelta
from pathlib import Path

import h5py
import numpy as np
import pytest
from waves import refused

from data import frames, tables
from experiments import plots, run
from experiments.run_folder.files import read_csv
from experiments.settings.record import POCKET, Settings
from experiments.task.task import Task
from qwen_min import Tokenizer


def written(text: str | bytes, name: str = "d.csv") -> Path:
    path = Path(name)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def series(text: str, **options) -> dict[str, tuple[list, list]]:
    """Each series of a CSV: its values by variable, and its times up to the one after its last."""
    found = frames.read(written(text), **options)
    return {
        name: (values.T.tolist(), [clock.text(i) for i in range(len(values) + 1)])
        for name, values, clock in zip(found.ids, found.values, found.clocks, strict=True)
    }


LONG = "unique_id,ds,y\n"
LEAP_DAYS = ["2024-02-28", "2024-02-29", "2024-03-01"]
MONTH_ENDS = ["2024-01-31", "2024-02-29", "2024-03-31", "2024-04-30"]
QUARTERS = ["2023-11-01", "2024-02-01", "2024-05-01", "2024-08-01"]
HALF_HOURS = [f"2024-01-0{time}+02:00" for time in ("1T23:00:00", "1T23:30:00", "2T00:00:00")]
NAMED = {"id_column": "who", "time_column": "when", "target": ("q",)}
TABLES: list[tuple[str, dict, dict]] = [
    (f"{LONG}a,1,1.5\nb,7,-2\na,2,.5\nb,9,3e2", {}, {"a": ([[1.5, 0.5]], [1, 2, 3]), "b": ([[-2, 300]], [7, 9, 11])}),
    (f"{LONG}NA,3,3\nNA,1,1\nNA,2,2", {}, {"NA": ([[1, 2, 3]], [1, 2, 3, 4])}),
    ("y\n1\n2\n", {}, {"0": ([[1, 2]], [0, 1, 2])}),
    ("id;date;u;v\nn 1;2024-02-28;1;2\nn 1;2024-02-29;3;4", {}, {"n 1": ([[1, 3], [2, 4]], LEAP_DAYS)}),
    ("who,when,p,q\nx,5,1,2\nx,6,3,4\n", NAMED, {"x": ([[2, 4]], [5, 6, 7])}),
    (f"{LONG}a,2024-01-31,1\na,2024-02-29,2\na,2024-03-31,3", {}, {"a": ([[1, 2, 3]], MONTH_ENDS)}),
    (f"{LONG}a,2023-11,1\na,2024-02,2\na,2024-05,3", {}, {"a": ([[1, 2, 3]], QUARTERS)}),
    (f"{LONG}a,2024-01-01T23:00:00+02:00,1\na,2024-01-01 23:30:00+02:00,2", {}, {"a": ([[1, 2]], HALF_HOURS)}),
    (
        "\ufeffds,a b,c\n1,1,\n2,2,-5\n3,,-6",
        {"wide": True},
        {"a b": ([[1, 2]], [1, 2, 3]), "c": ([[-5, -6]], [2, 3, 4])},
    ),
    (f"{LONG}a,1,1\na,2,\na,4,4", {"fill": "linear"}, {"a": ([[1, 2, 3, 4]], [1, 2, 3, 4, 5])}),
    (f"{LONG}a,1,1\na,2,NA\na,4,4\na,5,", {"fill": "previous"}, {"a": ([[1, 1, 1, 4, 4]], [1, 2, 3, 4, 5, 6])}),
]


@pytest.mark.parametrize(("text", "options", "expected"), TABLES)
def test_a_table_is_read_as_named_series_at_regular_times(text, options, expected):
    assert series(text, **options) == expected


def test_what_was_filled_is_counted_and_variables_keep_their_names():
    found = frames.read(written("unique_id,ds,u,v\na,1,1,2\na,3,,5\na,4,6,6"), fill="linear")
    assert (found.names, found.notes) == (("u", "v"), ("3 missing values filled (linear)",))
    assert found.values[0].tolist() == [[1, 2], [1 + 5 / 3, 3.5], [1 + 10 / 3, 5], [6, 6]]


ROW = "a,1,1\n"
DAYS = "".join(f"a,2024-01-0{day},1\n" for day in (1, 2, 3))
BAD: list[tuple[str | bytes, str]] = [
    ("", "is empty: expected CSV"),
    ("\n", "row 1: column '': expected names"),
    ("unique_id,ds,y", "has no rows"),
    ("unique_id,ds,y\n\n\n", "has no rows"),
    ("unique_id,ds,,y\na,1,1,1", "row 1: column '': expected names, each once"),
    ("unique_id,ds,y,y\na,1,1,1", "row 1: column 'y': expected names, each once"),
    ("unique_id,ds\na,1", "has the columns one of 'unique_id', 'ds': expected one of values"),
    (f"{LONG}{ROW}a,2", "row 3: has 2 cells: expected 3"),
    (f"{LONG}{ROW}a,2,1,5", "row 3: has 4 cells: expected 3"),
    (f"{LONG}{ROW}\na,2,2", "row 3: is empty: expected 3 cells"),
    (f"{LONG}{ROW}a,2,x", "row 3: column 'y' is 'x': expected a number"),
    (f"{LONG}{ROW}a,2,1_000", "row 3: column 'y' is '1_000': expected a number"),
    (f'{LONG}{ROW}a,2,"1,5"', "row 3: column 'y' is '1,5': expected a number"),
    (f"{LONG}{ROW}a,2,1.5 €", "row 3: column 'y' is '1.5 €'"),
    (f"{LONG}{ROW}a,2,٣", "row 3: column 'y' is"),
    (f"{LONG}{ROW}a,2,true", "row 3: column 'y' is 'true'"),
    (f"{LONG}{ROW}a,2,=A1+1", "row 3: column 'y' is '=A1+1'"),
    (f"{LONG}{ROW}a,2,#DIV/0!", "row 3: column 'y' is '#DIV/0!'"),
    (f"{LONG}{ROW}a,2,0x10", "row 3: column 'y' is '0x10'"),
    (f"{LONG}{ROW}a,2,50%", "row 3: column 'y' is '50%'"),
    (f"{LONG}{ROW}a,2,inf", "row 3: column 'y' is infinite: expected a finite number"),
    (f"{LONG}{ROW}a,2,-Infinity", "row 3: column 'y' is infinite"),
    (f"{LONG}{ROW}a,2,1e999", "row 3: column 'y' is infinite"),
    (f"{LONG}{ROW}a,2,-1e200", "row 3: column 'y' is -1e+200: expected a finite number, below 1e100"),
    (f"{LONG}{ROW}a,2,", "row 3: column 'y' is missing: expected a number, or --fill"),
    (f"{LONG}{ROW}a,2,NaN\na,3,1", "row 3: column 'y' is missing"),
    (f"{LONG}a,1,\na,2,1", "row 2: column 'y' is missing"),
    (f"{LONG}{ROW},2,1", "row 3: column 'unique_id' is empty"),
    (f"{LONG}{ROW}a,,1", "row 3: column 'ds' is empty: expected a time"),
    (f"{LONG}{ROW}a,1,2", "row 3: time 1 of series 'a' again: expected each once"),
    (f"{LONG}{DAYS}a,2024-01-02,2", "row 5: time 2024-01-02 00:00:00 of series 'a' again"),
    (f"{LONG}{ROW}a,2,1\na,3,1\na,5,1", "row 5: time 5 of series 'a' comes after a gap of 1 points: expected a step"),
    (f"{LONG}a,0,1\na,2,1\na,4,1\na,7,1", "row 5: time 7 of series 'a' is 3 after the one before"),
    (f"{LONG}{DAYS}a,2024-01-09,1", "row 5: time 2024-01-09 00:00:00 of series 'a' is 6 days after"),
    (f"{LONG}{DAYS}a,2024-01-05,1", "a gap of 1 points: expected a step of 1 day, or --fill"),
    (f"{LONG}{DAYS}a,2024-01-03T07:00:00,1", "row 5: time 2024-01-03 07:00:00 of series 'a' is 7:00:00 after"),
    (f"{LONG}{ROW}a,2,1\na,9000000000000000,1", "row 4: time 9000000000000000 of series 'a' is"),
    (f"{LONG}{DAYS}a,2024-02-30,1", "row 5: column 'ds' is '2024-02-30': expected a whole number, or ISO 8601"),
    (f"{LONG}{DAYS}a,05/01/2024,1", "row 5: column 'ds' is '05/01/2024'"),
    (f"{LONG}a,1.5,1", "row 2: column 'ds' is '1.5'"),
    (f"{LONG}a,noon,1", "row 2: column 'ds' is 'noon'"),
    (f"{LONG}{DAYS}a,4,1", "row 5: time '4' is unlike those before: expected one kind"),
    (f"{LONG}{ROW}a,2024-01-02,1", "row 3: time '2024-01-02' is unlike those before"),
    (f"{LONG}a,2024-01-01T00:00:00Z,1\na,2024-01-02T00:00:00,1", "row 3: time '2024-01-02T00:00:00' has another zone"),
    (f"{LONG}a,2024-01-01T00Z,1\nb,2024-01-02T00:00+01:00,1", "row 3: time '2024-01-02T00:00+01:00' has another zone"),
    (f"{LONG}{DAYS}a,2024-01-04T00:00:00Z,1", "has another zone: expected no zone, as row 2"),
    ("unique_id,day,y\na,2024-01-01,1", "is '2024-01-01': expected a number such as -1.5, or nothing (the time is nam"),
    (f'{LONG}{ROW}"a,2,1\na,3,1', "row 3: a quote that never closes: expected a whole row in each line"),
    (f'{LONG}{ROW}a,2,"1"5', "row 3: "),
    (f'"unique_id,ds,y\n{ROW}', "row 1: a quote that never closes"),
    (f"{LONG}{ROW}a,2,{'1' * (tables.LONGEST_LINE + 1)}", "row 3: is longer than 1,048,576 bytes: expected"),
    ("unique_id,ds,y\r" + "a,1,1\r" * 3, "row 1: holds the control character '\\r'"),
    (f"{LONG}{ROW}a,2,1\0", "row 3: holds the control character '\\x00'"),
    (f"{LONG}{ROW}".encode() + b"\xe9,2,1", "row 3: byte 0xe9 is no UTF-8"),
    (f"{LONG}{ROW}".encode("utf-16"), "is UTF-16: expected CSV"),
    (b"PK\x03\x04" + bytes(50), "is an Excel file or an archive: expected CSV"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(50), "is an old Excel file: expected CSV"),
    (gzip.compress(LONG.encode()), "is compressed: expected CSV"),
    (b"PAR1" + bytes(20), "is Parquet: expected CSV"),
    (b"%PDF-1.7\n", "is a PDF: expected CSV"),
    (b"\x89HDF\r\n\x1a\n" + bytes(50), "is HDF5: expected CSV"),
    ("<html><body>\nno such page\n", "row 2: column '<html><body>' is 'no such page'"),
    ('{"a": [1, 2]}\n[3]\n', "row "),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_a_bad_file_is_one_line_with_its_row_its_fault_and_what_was_expected(case):
    content, said = BAD[case]
    path = written(content)
    with pytest.raises(ValueError) as refusal:
        frames.read(path)
    line = str(refusal.value)
    assert line.startswith("d.csv: ") and said in line and "expected" in line and "\n" not in line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--time-column", "when"], "has no column 'when' (--time-column): expected one of 'unique_id', 'ds', 'y'"),
        (["--target", "z"], "d.csv: has no column 'z' (--target)"),
        (["--id-column", "y"], "d.csv: row 2: column 'unique_id' is 'a': expected a number"),
        (["--fill", "zero"], "fill is 'zero': expected one of previous, linear"),
        (["--beyond", "wrap"], "beyond is 'wrap': expected one of refuse, clip"),
        (["--wide"], "d.csv: row 2: column 'unique_id' is 'a': expected a number"),
        (["--series", "zz"], "d.csv: has no series 'zz': expected such as 'a'"),
        (["--data", "none.csv"], "none.csv: no such file: expected a CSV file"),
        (["--data", "d.parquet"], "d.parquet: is not Parquet: expected Parquet"),
        ([], "d.csv: series 'a' has 3 points: expected at least 4"),
        (["--out", "d.png"], "d.csv: is the data, and would be written over: expected another --out"),
    ],
)
def test_a_command_on_a_bad_table_is_one_line_and_exit_code_2(flags, said, capsys):
    written(LONG + "a,1,1\na,2,2\na,3,3\n")
    written("no parquet", "d.parquet")
    assert said in refused(capsys, "forecast", "--data", "d.csv", "--horizon", "2", *flags)


# Scales, widths, splits, the future


SIZES = {"points": 12, "horizon": 3}
FLAGS = ["--points", "12", "--horizon", "3"]


def table(lengths: dict[str, int], name: str = "d.csv", variables: str = "u v", **scales: float) -> str:
    """Waves about a level of 2, in days; a variable or a series in `scales` is multiplied by its number."""
    lines = [",".join(("unique_id", "ds", *variables.split()))]
    for series, points in lengths.items():
        for t in range(points):
            wave = 2 + np.sin(t / 2 + len(series))
            values = (f"{wave * scales.get(one, 1) * scales.get(series, 1):.6g}" for one in variables.split())
            lines.append(f"{series},{date(2024, 1, 1) + timedelta(days=t)},{','.join(values)}")
    written("\n".join(lines), name)
    return name


def task(data: str, ahead: bool = False, **settings) -> Task:
    chosen = Settings(data=data, **(SIZES | settings))
    return Task.prepare(chosen, Tokenizer.from_pretrained(POCKET), needs_split=not ahead, ahead=ahead)


def test_a_series_is_scaled_by_what_its_forecast_sees_a_variable_alone_where_they_differ_by_ten():
    data = table({"a": 30, "bb": 9}, variables="u v w", v=-100, w=3, bb=1e-7)
    found = task(data, ahead=True)
    for system, series in enumerate(frames.read(Path(data)).values):
        sizes = np.percentile(np.abs(series[-12:]), 95, axis=0)
        np.testing.assert_allclose(found.alphas[system], sizes / 10)
    assert "a variable has its own where they differ by more than 10 times" in found.alpha_rule
    assert (found.dataset.signed, found.widest) == (True, 2)
    alike = task(table({"a": 30, "bb": 9}, w=3), ahead=True)
    assert {len(set(alphas)) for alphas in alike.alphas.tolist()} == {1}
    with h5py.File("d.h5", "w") as file:
        file["trajectories"] = np.ones((20, 15, 2)) * (1, 20)
    assert task("d.h5").alphas.tolist() == [[1 / 9.99, 20 / 9.99]] * 20
    assert "alpha = 0.1001, 2.002 for the variables of all series" in task("d.h5").alpha_rule


@pytest.mark.parametrize(("cells", "alpha"), [("0", 0.1), ("0 " * 39 + "7", 0.7), ("1e-300", 1e-290)])
def test_a_series_of_zeros_or_of_hardly_any_size_has_a_scale(cells, alpha):
    values = (cells.split() * 40)[-40:]
    found = task(str(written("y\n" + "\n".join(values))), ahead=True, points=40)
    np.testing.assert_allclose(found.alphas, alpha)


def test_a_value_beyond_the_width_is_refused_by_its_name_or_clipped_with_a_count():
    values = [1.0] * 38 + [5000.0, 1.0]
    data = str(written("ds,y\n" + "\n".join(f"{i},{value}" for i, value in enumerate(values))))
    said = "d.csv: 'y' of series '0' at 38 is 5000, over 1000 times its alpha 0.1: expected .*, or --beyond clip"
    with pytest.raises(ValueError, match=said):
        task(data, ahead=True, points=40)
    clipped = task(data, ahead=True, points=40, beyond="clip")
    assert clipped.dataset.source == "a table; 1 values clipped"
    assert clipped.text(0, 40).endswith("10.00;999.99;10.00;") and clipped.widest == 3
    assert clipped.raw(0)[38] == 5000
    assert task(data, ahead=True, points=40, alpha=10.0).text(0).endswith("0.10;500.00;0.10;")


def test_split_by_time_trains_on_each_series_past_and_no_window_is_of_another_part(monkeypatch):
    data = table({"a": 40, "bb": 20})
    found = task(data, split="time", context=64)
    series = frames.read(Path(data)).values
    assert [*map(len, found.dataset.frame.values)] == [28, 14, 34, 17, 40, 20]
    parts = found.split.train, found.split.validation, found.split.test
    assert [part.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    for system, values in enumerate([series[0][:28], series[1][:14]]):
        np.testing.assert_array_equal(found.raw(system), values)
        np.testing.assert_allclose(found.alphas[system], np.percentile(values, 95, axis=0).max() / 10)
    windows, text = found.validation_windows, found.text(2)
    of_first = windows.inputs[windows.series == 0][0]
    own = found.codec.encode(found.scaled(2)[28:])
    assert text.endswith(own) and found.tokenizer.decode(of_first.tolist()).startswith(own[:-1])
    np.testing.assert_array_equal(found.raw(2, 12 + 3), series[0][34 - 15 : 34])
    found.check([2, 3, 4, 5])
    with pytest.raises(ValueError, match="series 'bb' has 3 of its 17 points in this part: expected at least 6, 6 of"):
        task(data, split="time", origins=2).check([3])
    assert [task(data, split="time", origins=3, origin_step=2).origins[i].cut_off for i in range(3)] == [33, 35, 37]
    with pytest.raises(ValueError, match="parts of .*: expected no empty part, or --split time"):
        task(data)
    with pytest.raises(ValueError, match="d.csv: split by time: series 'bb' has 2 points"):
        task(table({"a": 40, "bb": 2}), split="time")


def test_forecast_writes_the_future_of_every_series_and_draws_it(capsys, monkeypatch):
    monkeypatch.setattr(plots, "forecast_grid", lambda systems, names, path, *_: path.write_text(systems[1]["title"]))
    monkeypatch.setattr(plots, "forecast", lambda path, **_: path.touch())
    data = table({"a": 30, "bb": 9})
    assert run.main(["forecast", "--data", data, *FLAGS, "--all", "--num-samples", "3", "--out", "f.png"]) == 0
    said = capsys.readouterr().out
    assert "2 of 2 series of d.csv (a table), up to 12 points -> 3" in said and "written: f.csv, f.png;" in said
    names, rows = read_csv("f.csv")
    assert names == ["unique_id", "ds", "target_name", "predictions", *(f"0.{level}" for level in range(1, 10))]
    days = {"a": ("2024-01-31", "2024-02-01", "2024-02-02"), "bb": ("2024-01-10", "2024-01-11", "2024-01-12")}
    assert [(row["unique_id"], row["target_name"], row["ds"]) for row in rows] == [
        (series, variable, day) for series in days for variable in "uv" for day in days[series]
    ]
    for row in rows:
        levels = [float(row[f"0.{level}"]) for level in range(1, 10)]
        assert levels == sorted(levels) and float(row["predictions"]) == levels[4]
    assert Path("f.png").read_text().startswith("bb (")
    assert run.main(["forecast", "--data", data, *FLAGS, "--series", "bb", "--draft", "5"]) == 0
    assert [row["unique_id"] for row in read_csv("forecast.csv")[1]] == ["bb"] * 6


def test_a_long_series_is_trained_on_its_past_and_judged_on_its_later_parts(capsys, monkeypatch):
    monkeypatch.setattr(plots, "forecast_grid", lambda *_: None)
    data = table({"a": 60, "bb": 40})
    small = ["--split", "time", "--context", "32", "--val-series", "1"]
    assert run.main(["train", "--data", data, *small, "--steps", "1", "--out", "t", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["flops"] == result["predicted_flops"]
    judged = ["--adapter", f"t/cells/{result['cell']}/adapter", "--part", "test", "--origins", "2", "--json"]
    assert run.main(["evaluate", "--data", data, *small, *FLAGS, *judged]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["predicted_flops"]["validation"] == found["flops"]["validation"]
    assert found["flops"]["inference"] <= found["predicted_flops"]["inference"]
    assert [one["cut_off"] for one in found["by_origin"]] == [54, 57]
    assert found["parts"]["test"] == [4, 5] and found["trained_on_this_data"] is True
