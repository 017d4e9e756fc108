"""Settings: every field checked, TOML in and out, and the preset that the pocket model needs."""

import dataclasses
import re

import pytest

from experiments.settings.record import PRESETS, Settings


def test_settings_written_as_toml_read_back_equal(tmp_path):
    settings = Settings(model='a "b" \\ c\n', lr=(1e-5, 0.25), ranks=(3,), steps=7, offline=True, budget=10**17 + 1)
    path = tmp_path / "config.toml"
    path.write_text(settings.to_toml())
    assert Settings.from_toml(path) == settings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("steps", 0), ("batch_size", 0), ("context", 1), ("decimals", 7), ("alpha", -1.0), ("alpha", float("nan"))),
        *(("dropout", 1.0), ("seed", 2**32), ("lr", (0.0,)), ("lr", (1e-4, 1e-4)), ("ranks", ()), ("ranks", (0,))),
        *(("ranks", (2, 2)), ("preset", "none"), ("dtype", "int8"), ("device", "tpu"), ("budget", 2**63)),
        *(("batch_size", 2**21), ("context", 2**21), ("contexts", (2**21,)), ("ranks", (5000,)), ("budget", 0)),
        *(("split", "by chance"), ("scaling", "maximum"), ("pad_side", "middle"), ("fractions", (0.5, 0.5, 0.5))),
        *(("stride", 0.0), ("stride", 1.5), ("stride", float("inf")), ("num_samples", 0), ("temperature", -0.1)),
        *(("top_p", 0.0), ("top_k", -1), ("repetition_penalty", 0.0), ("contexts", (1,)), ("contexts", (64, 64))),
        *(
            ("shown", (3, 3)),
            ("final_steps", 0),
            ("best_lr", -1e-3),
            ("best_lr", 10.0),
            ("val_every", -1),
            ("point_forecast", "mode"),
        ),
    ],
)
def test_a_value_out_of_range_is_refused_in_one_line_that_names_its_field(field, value):
    with pytest.raises(ValueError, match=rf"^{field} is .*: expected [^\n]+$"):
        Settings(**{field: value})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("steps = 'many'", "steps"),
        ("stepz = 3", "stepz"),
        ("lr = 1e-4", "lr"),
        ("ranks = [1.5]", "ranks"),
        ("offline = 1", "offline"),
        ("steps = ", "Invalid value"),
        ("[train]\nsteps = 3", "train"),
        ("steps = true", "steps"),
    ],
)
def test_a_bad_toml_file_is_refused_in_one_line_that_names_file_and_field(tmp_path, text, named):
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: [^\n]*{named}[^\n]*$"):
        Settings.from_toml(path)


def test_a_toml_file_that_is_not_text_or_not_there_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("binary", "absent", "."):
        with pytest.raises(ValueError, match="expected (a file|UTF-8 text)$"):
            Settings.from_toml(tmp_path / name)


def test_learning_rates_are_the_reports_but_for_the_pocket_model_and_any_can_be_asked_for():
    assert Settings().is_pocket and Settings().learning_rates == PRESETS["pocket"]
    assert Settings(model="elsewhere").learning_rates == PRESETS["reports"] == (1e-5, 5e-5, 1e-4)
    assert Settings(preset="reports").learning_rates == PRESETS["reports"]
    assert Settings(lr=(3e-4,), preset="reports").learning_rates == (3e-4,)


def test_a_shortened_study_has_every_stage_in_proportion_and_enough_series_to_judge_by():
    whole = Settings(steps=300, default_steps=3000, context_steps=10, final_steps=15000, val_every=50)
    short = whole.shorten(0.02)
    assert (short.steps, short.default_steps, short.context_steps, short.final_steps) == (6, 60, 1, 300)
    assert short.val_every == 25  # 12 validations of the longest run, not 300
    assert whole.shorten(0.5).val_every == 625 and Settings(val_every=0).shorten(0.5).val_every == 0
    assert [short.series_of(*asked) for asked in ((150, 0), (8, 0), (150, 4))] == [20, 8, 4]
    assert [whole.series_of(150, 0), whole.series_of(150, 40)] == [150, 40]
    assert Settings(shortened=0.5).series_of(150, 0) == 75


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5, float("nan")])
def test_a_study_is_cut_to_a_part_of_itself(fraction):
    with pytest.raises(ValueError, match=r"^scale is .*: expected more than 0, at most 1$"):
        Settings().shorten(fraction)


def test_how_forecasts_are_made_is_said_in_words():
    assert Settings().judged == "greedy, constrained to valid text"
    assert Settings(constrained=False, repetition_penalty=1.1).judged == "greedy, repetition penalty 1.1"
    drawn = Settings(num_samples=5, top_p=0.8, top_k=20, constrained=False)
    assert dataclasses.replace(drawn, point_forecast="mean").judged.endswith(", the mean of 5 samples")
    assert drawn.judged == "temperature 1, top_k 20, top_p 0.8, the median of 5 samples"
    assert Settings(temperature=0.7, num_samples=5).sampling_temperature == 0.7
