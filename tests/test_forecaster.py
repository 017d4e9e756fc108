"""The adapter that comes with the project: named on the command line, with the text that it was trained with."""

import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open

from experiments import run
from experiments.settings.record import POCKET
from experiments.verbs.arguments import parser
from experiments.verbs.common import adapter_of, gather

FOLDER = POCKET.parent / "forecaster"
BASE = "Qwen/Qwen2.5-Coder-0.5B-Instruct"


@pytest.mark.parametrize(
    ("flags", "model", "point"),
    [((), BASE, False), (("--model", "mine", "--point"), "mine", True), (("--config", "own.toml"), BASE, True)],
    ids=["as it was trained", "flags win", "a file wins"],
)
def test_a_named_adapter_brings_its_model_and_its_text(flags, model, point):
    Path("own.toml").write_text("point = true\n")
    args = parser().parse_args(["forecast", "--system", "906", "--adapter", "forecaster", *flags])
    assert adapter_of(args) == FOLDER / "adapter"
    settings = gather(args)
    assert (settings.model, settings.point, settings.vocabulary) == (model, point, "symbols")


def test_a_folder_is_no_name(tmp_path):
    args = parser().parse_args(["evaluate", "--adapter", str(tmp_path)])
    assert adapter_of(args) == tmp_path and gather(args).point


def test_it_is_at_most_10_mb_of_bfloat16_for_its_base_model():
    file, config = FOLDER / "adapter/adapter_model.safetensors", FOLDER / "adapter/adapter_config.json"
    assert file.stat().st_size <= 10**7
    with safe_open(file, "pt") as held:
        assert {held.get_slice(name).get_dtype() for name in held.keys()} == {"BF16"}  # noqa: SIM118
    assert json.loads(config.read_text())["base_model_name_or_path"] == BASE


def test_its_forecast_by_the_real_model_is_as_close_as_its_card_says(real_checkpoint, capsys):
    """System 855, of the test part: another machine may write another digit, and no more."""
    argv = ["forecast", "--adapter", "forecaster", "--model", str(real_checkpoint), "--system", "855"]
    assert run.main(argv) == 0
    mse = dict(re.findall(r"^(\S.*?)\s+MSE (\S+)", capsys.readouterr().out, re.MULTILINE))
    assert float(mse["model"]) < 0.0003 < float(mse["context parroting"])
