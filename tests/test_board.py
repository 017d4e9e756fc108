"""TensorBoard has every point of the records once, however a run was stopped; the records are as without it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from waves import Killed, contents, damped_waves, no_figures, refused

from experiments.run import main
from experiments.run_folder import files
from experiments.training import board, cell

TRAIN = ["train", "--data", "waves.h5", "--steps", "6", "--val-every", "3", "--context", "64", "--batch-size", "1"]
TRAIN += ["--val-series", "1", "--lr", "1e-2", "--rank", "2", "--out", "t"]
FOLDERS = ["untrained", "cells/lr0.01-r2"]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    damped_waves(Path("waves.h5"), 30)
    no_figures(monkeypatch)


def shown() -> dict[str, dict[str, list[tuple[int, float]]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = {}
    for folder in FOLDERS:
        events = EventAccumulator(f"t/tensorboard/{folder}").Reload()
        curves[folder] = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return curves


def recorded() -> dict[str, dict[str, list[tuple[int, float]]]]:
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {folder: {} for folder in FOLDERS}
    for folder in FOLDERS:
        for line in files.read_jsonl(f"t/{folder}/metrics.jsonl"):
            validation = "validation_loss" in line
            names = {"validation_loss": "loss/validation", "validation": "FLOPs/validation"}
            if not validation:
                names = {"loss": "loss/training", "gradient_norm": "gradient_norm", "training": "FLOPs/training"}
            for name, tag in names.items():
                curves[folder].setdefault(tag, []).append((line["step"], float(np.float32(line[name]))))
    return curves


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_point_of_the_records_stands_once_after_a_kill_and_for_cells_that_were_finished_before(monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install -e '.[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(TRAIN) == 0
    plain = contents("t", "results.md")
    shutil.rmtree("t")
    Path("ledger.sqlite").unlink()
    train = cell._State.train

    def killed(self, *arguments):
        if self.step == 5:  # two lines after the checkpoint, which the next start cuts off
            raise Killed
        return train(self, *arguments)

    monkeypatch.setattr(cell._State, "train", killed)
    with pytest.raises(Killed):
        main([*TRAIN, "--log", "tensorboard"])
    assert shown()["cells/lr0.01-r2"]["loss/training"][-1][0] == 5
    monkeypatch.setattr(cell._State, "train", train)
    assert main([*TRAIN, "--log", "tensorboard"]) == 0
    curves = shown()
    assert curves == recorded() and [step for step, _ in curves[FOLDERS[1]]["loss/training"]] == [1, 2, 3, 4, 5, 6]
    found = {name: text for name, text in contents("t", "results.md").items() if not name.startswith("tensorboard/")}
    assert found == plain

    shutil.rmtree("t/tensorboard")
    picture = np.random.RandomState(0).randint(256, size=(5, 7, 3), dtype=np.uint8)
    Path("t/figures").mkdir(exist_ok=True)
    Image.fromarray(picture).save("t/figures/forecasts.png")
    for _ in range(2):
        assert main([*TRAIN, "--log", "tensorboard"]) == 0
    assert shown() == curves
    events = EventAccumulator("t/tensorboard/figures").Reload()
    (image,) = events.Images("figures/forecasts")
    Path("shown.png").write_bytes(image.encoded_image_string)
    np.testing.assert_array_equal(np.asarray(Image.open("shown.png")), picture)


def test_another_program_or_a_missing_one_is_one_line(capsys, monkeypatch):
    assert refused(capsys, *TRAIN, "--log", "wandb") == "log is 'wandb': expected tensorboard\n"
    monkeypatch.setattr(board, "find_spec", lambda _: None)
    assert refused(capsys, *TRAIN, "--log", "tensorboard").startswith("tensorboard is not installed: expected it, by")
