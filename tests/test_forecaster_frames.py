"""The forecaster as a library: the field's frames in and out, for the price that was predicted."""

import numpy as np
import pytest

from data import frames, tables
from experiments.accounting.ledger import BudgetExceeded
from experiments.forecaster import Forecaster
from experiments.forecasting.baselines import RULES
from qwen_min import FlopMeter

SIZES = {"points": 12, "num_samples": 4, "context": 32}


def frame(lengths: dict[str, int], names: str = "y"):
    columns: dict[str, list] = {name: [] for name in ("unique_id", "ds", *names.split())}
    for series, points in lengths.items():
        columns["unique_id"] += [series] * points
        columns["ds"] += list(np.datetime64("2024-05-01T00") + np.arange(points) * np.timedelta64(1, "h"))
        for i, name in enumerate(names.split()):
            columns[name] += (2 + i + np.sin(np.arange(points) / 2 + len(series))).tolist()
    return pytest.importorskip("pandas", reason="pandas is not installed").DataFrame(columns)


@pytest.fixture(scope="module")
def forecaster() -> Forecaster:
    return Forecaster.from_pretrained(**SIZES)


def test_arrays_are_forecast_in_their_shape_for_what_was_predicted(forecaster):
    series = 2 + np.sin(np.arange(30)[:, None] / 3 + np.arange(4).reshape(2, 1, 2))
    with FlopMeter() as meter:
        made = forecaster.predict(series, 2)
    assert made.shape == (2, 2, 2) and np.isfinite(made).all()
    assert forecaster.flops["counted"] == meter.total <= forecaster.flops["predicted"]
    assert forecaster.predict(series[..., 0], 2).shape == (2, 2)
    assert forecaster.predict(series[0, :, 0], 3).shape == (3,)
    with pytest.raises(ValueError, match=r"values have shape \(\): expected finite"):
        forecaster.predict(1.0, 2)
    with pytest.raises(BudgetExceeded, match="left of the budget of 1,000"):
        Forecaster.from_pretrained(budget=1000, **SIZES).predict(series, 2)


def test_predict_df_gives_the_columns_of_the_field_with_names_and_times_of_the_frame(forecaster):
    given = frame({"a": 30, "bb": 9}, "u v").rename(columns={"unique_id": "item_id", "ds": "timestamp"})
    found = forecaster.predict_df(given, 2, [0.1, 0.5, 0.9], target=["u", "v"])
    assert [*found.columns] == ["item_id", "timestamp", "target_name", "predictions", "0.1", "0.5", "0.9"]
    assert found["item_id"].tolist() == ["a"] * 4 + ["bb"] * 4 and found["target_name"].tolist() == [*"uuvv"] * 2
    assert found["timestamp"].dt.strftime("%d %H").tolist() == ["02 06", "02 07"] * 2 + ["01 09", "01 10"] * 2
    assert (found["0.1"] <= found["0.5"]).all() and (found["0.5"] <= found["0.9"]).all()
    numbered = given.assign(item_id=given["item_id"].map({"a": 7, "bb": 8}))
    assert forecaster.predict_df(numbered, 1, (), target=["u"])["item_id"].tolist() == [7, 8]
    with pytest.raises(ValueError, match="frame: row 3: column 'u' is missing"):
        forecaster.predict_df(given.assign(u=given["u"].where(given.index != 3)), 2, target=["u"])


def test_cross_validation_is_read_by_the_fields_losses_as_it_is(forecaster):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    losses = pytest.importorskip("utilsforecast.losses", reason="utilsforecast is not installed")
    evaluation = pytest.importorskip("utilsforecast.evaluation", reason="utilsforecast is not installed")
    given = frame({"a": 30, "bb": 20})
    found = forecaster.cross_validation(given, 3, n_windows=2, step_size=4, level=[80])
    names = ["unique_id", "ds", "cutoff", "y", "qwen_min", "qwen_min-lo-80", "qwen_min-hi-80"]
    assert [*found.columns] == [*names, *RULES]
    whole = given.merge(found, on=["unique_id", "ds"], suffixes=("", "_found"))
    assert len(whole) == len(found) == 12 and np.allclose(whole["y"], whole["y_found"])
    ends, hour = given.groupby("unique_id")["ds"].max(), pandas.Timedelta("1h")
    assert {*found["cutoff"]} == {end - hour * back for end in ends for back in (3, 7)}
    assert ((found["ds"] - found["cutoff"]) / hour).tolist() == [1, 2, 3] * 4
    last = given.set_index(["unique_id", "ds"])["y"]
    seen = [last[key] for key in zip(found["unique_id"], found["cutoff"], strict=True)]
    assert np.allclose(found["persistence"], seen)
    models = ["qwen_min", "persistence"]
    mae = losses.mae(found.drop(columns="cutoff"), models=models)
    expected = (found["qwen_min"] - found["y"]).abs().groupby(found["unique_id"]).mean()
    assert np.allclose(mae.set_index("unique_id")["qwen_min"], expected)
    assert losses.coverage(found, models=["qwen_min"], level=80)["qwen_min"].between(0, 1).all()
    scores = evaluation.evaluate(found.drop(columns="cutoff"), metrics=[losses.rmse, losses.smape], models=models)
    assert scores[models].notna().all(axis=None) and len(scores) == 4


def test_fit_takes_as_many_steps_as_its_budget_pays_and_forecasts_change(tmp_path):
    given, of = frame({"a": 60, "bb": 40}), {"id_column": "unique_id", "timestamp_column": "ds", "target": "y"}
    forecaster = Forecaster.from_pretrained(**SIZES | {"num_samples": 1, "batch_size": 1})
    before = forecaster.predict_df(given, 4, (), **of)
    with pytest.raises(ValueError, match="budget is 1 FLOPs: expected at least"):
        forecaster.fit(given, 1, **of)
    forecaster.fit(given, budget=5e9, out=tmp_path / "run", lr=0.05, **of)
    assert 4.4e9 < forecaster.flops["counted"] == forecaster.flops["predicted"] <= 5e9  # a step is 5.5e8
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    after = forecaster.predict_df(given, 4, (), **of)
    assert (before["predictions"] != after["predictions"]).any()


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_file_is_read_as_its_frame_is(suffix, tmp_path):
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    given, path = frame({"a": 9, "bb": 5}, "u v"), tmp_path / f"d.{suffix}"
    given.to_parquet(path) if suffix == "parquet" else given.to_csv(path, index=False)
    held, read = frames.series_of(tables.of_frame(given)), frames.read(path)
    assert (read.ids, read.names, read.clocks) == (held.ids, held.names, held.clocks)
    for one, other in zip(read.values, held.values, strict=True):
        np.testing.assert_array_equal(one, other)
    if suffix == "parquet":
        path.write_bytes(path.read_bytes()[:-40] + b"PAR1")
        with pytest.raises(ValueError, match="is not readable as Parquet .*: expected a Parquet file"):
            frames.read(path)
