"""How far a run is: nothing is shown before it is known, and forecasts, fits and figures count too."""

import sys
from pathlib import Path

import pytest
from waves import damped_waves

from experiments.forecasting import forecast as evaluate
from experiments.forecasting import naive
from experiments.run_folder.status import Row, Status
from experiments.settings.record import Settings
from experiments.task.model import prepare
from experiments.training import progress
from experiments.training.progress import Report, counting
from experiments.training.step import validation_loss

STEP = {"cell": "a", "steps": 4, "context": 8, "training": 10**9, "validation": 0}
RECORDS = [
    STEP | {"step": 1, "loss": 0.5},
    STEP | {"step": 2, "loss": 0.4, "validation_loss": 0.6},
    STEP | {"step": 0, "cell": "untrained", "steps": 0, "validation_loss": 0.7},
]


class Bar:
    """What stands in for tqdm: the name, the count and the numbers of every bar."""

    shown: list[tuple[str, int, int, list[str]]] = []

    def __init__(self, total: int, desc: str, unit: str, initial: int):
        self.total, self.name, self.n = total, desc, initial

    def set_postfix(self, numbers: dict[str, str], refresh: bool) -> None:
        self.numbers = numbers

    def update(self, more: int) -> None:
        self.n += more
        self.shown.append((self.name, self.n, self.total, list(self.numbers)))

    def refresh(self) -> None: ...
    def close(self) -> None: ...


@pytest.fixture
def bars(monkeypatch) -> list[tuple[str, int, int, list[str]]]:
    monkeypatch.setattr(progress, "tqdm", Bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(Bar, "shown", [])
    return Bar.shown


def test_a_bar_shows_no_number_before_there_is_one(bars):
    report = Report(2)
    for record in RECORDS:
        report(record)
    counting(report, "a", "forecasts")(3, 10)
    assert bars == [
        ("a", 1, 4, ["loss", "FLOPs"]),
        ("a", 2, 4, ["loss", "val", "tokens/s", "FLOPs"]),
        ("untrained", 0, 0, ["val", "FLOPs"]),
        ("a forecasts", 3, 10, []),
    ]


def test_without_a_terminal_lines_show_none_either_and_what_is_soon_done_has_none(capsys, monkeypatch):
    report = Report(2, "a toy")
    for record in RECORDS:
        report(record)
    count = counting(report, "a", "forecasts")
    count(3, 10)
    now = progress.time.monotonic()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now + 11)
    count(9, 10)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  tokens/s")[0] for line in lines] == [
        "[a toy]",
        "a: step 1/4  loss 0.5000  FLOPs 1.000e+09",
        "a: step 2/4  loss 0.4000  val 0.6000",
        "untrained: step 0/0  val 0.7000  FLOPs 1.000e+09",
        "a forecasts: step 9/10",
    ]


def test_of_a_folder_the_runs_that_are_done_and_the_time_left_for_all_are_shown(capsys, monkeypatch):
    runs = [Row(name, "grid", name, state, 4, 4, None, None, 1, 1, None) for name, state in (("a", "done"), ("b", ""))]
    monkeypatch.setattr(progress, "status", lambda out: Status(str(out), runs, [], 125.0))
    Report(2, out=Path("grid"))(RECORDS[2])
    line = "untrained: step 0/0  val 0.7000  FLOPs 1.000e+09  runs done 1 of 2  left in all 2 minutes\n"
    assert capsys.readouterr().err == line


def test_forecasts_fits_and_validation_windows_are_counted_up_to_the_last(tmp_path):
    data = damped_waves(tmp_path / "waves.h5", 24)
    task, model = prepare(Settings(data=str(data), points=20, horizon=4, num_samples=2, context=32), None)
    systems = list(range(17))  # more than are decoded at once
    counts = dict(forecasts=[], fits=[], windows=[])
    note = {name: (lambda done, of, seen=seen: seen.append((done, of))) for name, seen in counts.items()}
    evaluate.forecast(task, model, systems, progress=note["forecasts"])
    naive.forecasts(task, systems[:3], note["fits"])
    validation_loss(model, task.validation_windows, progress=note["windows"])
    for name, of in (("forecasts", 17 * 2 * 4), ("fits", 3), ("windows", len(task.validation_windows))):
        done = [count for count, _ in counts[name]]
        assert done[0] == 0 and done[-1] == of and done == sorted(done) and {n for _, n in counts[name]} == {of}
    assert len(set(counts["forecasts"])) == 1 + 2 * 4  # step by step in each of two batches
