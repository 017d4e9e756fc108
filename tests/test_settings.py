"""Settings: every field checked, TOML in and out, and the preset that the pocket model needs."""

import pytest

from experiments.settings import PRESETS, Settings


def test_settings_written_as_toml_read_back_equal(tmp_path):
    settings = Settings(model='a "b" \\ c\n', lr=(1e-5, 0.25), ranks=(3,), steps=7, offline=True, budget=10**17 + 1)
    path = tmp_path / "config.toml"
    path.write_text(settings.to_toml())
    assert Settings.from_toml(path) == settings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("context", 1),
        ("decimals", 7),
        ("alpha", -1.0),
        ("alpha", float("nan")),
        ("dropout", 1.0),
        ("seed", 2**32),
        ("lr", (0.0,)),
        ("lr", (1e-4, 1e-4)),
        ("ranks", ()),
        ("ranks", (0,)),
        ("ranks", (2, 2)),
        ("preset", "none"),
        ("dtype", "int8"),
        ("device", "tpu"),
        ("budget", 2**63),
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
    with pytest.raises(ValueError, match=rf"^{path}: [^\n]*{named}[^\n]*$"):
        Settings.from_toml(path)


def test_a_toml_file_that_is_not_text_or_not_there_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("binary", "absent", "."):
        with pytest.raises(ValueError, match="expected a (TOML )?file$"):
            Settings.from_toml(tmp_path / name)


def test_learning_rates_are_the_reports_but_for_the_pocket_model_and_any_can_be_asked_for():
    assert Settings().is_pocket and Settings().learning_rates == PRESETS["pocket"]
    assert Settings(model="elsewhere").learning_rates == PRESETS["reports"] == (1e-5, 5e-5, 1e-4)
    assert Settings(preset="reports").learning_rates == PRESETS["reports"]
    assert Settings(lr=(3e-4,), preset="reports").learning_rates == (3e-4,)
