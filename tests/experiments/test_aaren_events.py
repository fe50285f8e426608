"""What `aaren_events` compares: what is scored, references, pairs of models, and what is shown."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from experiments import aaren_events
from experiments.aaren_events import MEASURES, PRESETS, Config, following
from experiments.comparison import MODELS
from experiments.data import event_sequences
from experiments.data.event_sequences import EventData, EventSequence, Sinusoidal, pack_events, simulate
from experiments.results import summary, write_json
from zoo.point_process import Prediction

TINY = Config(
    dataset=("Toy",), seeds=2, learning_rates=(1e-6, 3e-2), steps=40, batch_size=4, width=8, layers=1, heads=2,
    hidden=8, dropout=0.0, length=16, components=2, validation_sequences=4, test_sequences=5,
)  # fmt: skip


def toy(marks=2, sequences=20, process=None, seed=0):
    """Events whose marks take turns, with short gaps before one and long ones before the other."""
    generator = np.random.default_rng(seed)
    kinds = (np.arange(20) + generator.integers(0, 2, (sequences, 1))) % 2
    times = np.cumsum(np.exp(2.0 * kinds + 0.2 * generator.normal(size=kinds.shape)), axis=1)
    every = [EventSequence(t, (k % marks).astype(np.int32)) for t, k in zip(times, kinds, strict=True)]
    splits = {"train": every[:10], "validation": every[10:15], "test": every[15:]}
    return EventData("Toy", splits, marks, "hours", "nowhere", process)


def test_presets_need_no_data(monkeypatch):
    monkeypatch.setattr(event_sequences, "_locate", lambda *_: pytest.fail("looked for events"))
    assert Config() == PRESETS["desk"]
    assert set(PRESETS["paper"].dataset) == set(event_sequences._PUBLISHED)
    assert len(PRESETS["paper"].dataset) == 8
    assert not set(PRESETS["desk"].dataset) & set(event_sequences._PUBLISHED)
    assert PRESETS["desk"].seeds == PRESETS["paper"].seeds == 5


def test_desk_sets_are_here():
    for preset in ("smoke", "desk"):
        aaren_events.check(PRESETS[preset])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dataset": ("Reddit",)}, FileNotFoundError, r"put real/reddit\.npz, as published .*, into a folder"),
        ({"dataset": ("BikeTrip",)}, ValueError, "did you mean BikeTrips"),
        ({"length": 1}, ValueError, "length: expected at least 2 events, got 1"),
        ({"components": 0}, ValueError, "components: expected positive numbers"),
        ({"model": ("mamba",)}, ValueError, "model: expected names out of aaren, transformer"),
    ],
)
def test_misfits_are_refused_before_a_run(options, error, message):
    with pytest.raises(error, match=message):
        aaren_events.check(dataclasses.replace(TINY, **options))


# What is scored


def test_scores_are_those_of_events_that_follow_one_another():
    """Against SciPy, of forecasts that differ from place to place, over several packed sequences and padding."""
    rows = pack_events(toy().splits["train"][:3], 45)
    assert rows["segment_ids"].tolist() == [[0] * 20 + [1] * 20 + [-1] * 5, [0] * 20 + [-1] * 25]
    generator = np.random.default_rng(0)
    means, logits, deviation = generator.normal(size=(2, 45)), generator.normal(size=(2, 45, 2)), 1.3
    single = np.zeros((2, 45, 1))
    prediction = Prediction(single, means[..., None], single + np.log(deviation), logits)
    prediction = Prediction(*(jnp.asarray(x, jnp.float32) for x in prediction))
    found = aaren_events.average(aaren_events.score(prediction, rows))

    forecasts = tuple(np.r_[[0] * 38, [1] * 19]), tuple(np.r_[0:19, 20:39, 0:19])
    happened = forecasts[0], tuple(np.add(forecasts[1], 1))
    gaps, marks = rows["gaps"][happened], rows["marks"][happened]
    means, logits = means[forecasts], logits[forecasts]
    nll = -stats.lognorm.logpdf(gaps, s=deviation, scale=np.exp(means))
    nll -= (logits - np.logaddexp(*logits.T)[:, None])[np.arange(57), marks]
    assert found["nll"] == pytest.approx(nll.mean(), rel=1e-5)
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean((gaps - np.exp(means + deviation**2 / 2)) ** 2)), rel=1e-5)
    assert found["accuracy"] == pytest.approx((marks == logits.argmax(axis=1)).mean())
    halves = [{name: value / 2 for name, value in aaren_events.score(prediction, rows).items()}] * 2
    assert aaren_events.average(*halves) == pytest.approx(found)
    assert "accuracy" not in aaren_events.average(aaren_events.score(prediction._replace(mark_logits=None), rows))


# References


def test_references_of_a_poisson_process():
    process, generator = Sinusoidal(2.0, 0.0, 1.0), np.random.default_rng(0)
    every = [simulate(process, 100, generator) for _ in range(60)]
    data = EventData("Poisson", {"train": every[:40], "test": every[40:]}, 1, "1", "nowhere", process)
    found = aaren_events.score_references(data, data.splits, 4)
    truth = found["true process"]["nll"]
    assert truth == pytest.approx(1 - np.log(2), abs=0.06)
    assert found["Poisson"]["nll"] == pytest.approx(truth, abs=2e-3)
    assert found["renewal"]["nll"] == pytest.approx(truth, abs=2e-2)
    assert found["renewal, marks after marks"] is None
    assert found["Poisson"]["rmse"] == pytest.approx(0.5, rel=0.1)
    assert set(found["Poisson"]) == {"nll", "rmse"}


def test_references_of_marks_that_take_turns():
    data = toy()
    found = aaren_events.score_references(data, data.splits, 2)
    assert found["renewal, marks after marks"]["accuracy"] == 1
    assert 0.4 < found["renewal"]["accuracy"] < 0.6
    assert found["renewal"]["nll"] - found["renewal, marks after marks"]["nll"] == pytest.approx(np.log(2), abs=0.05)
    logs = np.log(following(data.splits["test"]).gaps)
    both = np.logaddexp(*(stats.norm.logpdf(logs, mean, 0.2) for mean in (0, 2))) - np.log(2) - logs
    assert found["renewal"]["nll"] == pytest.approx(np.log(2) - both.mean(), abs=0.05)
    assert found["true process"] is None


def test_mark_that_training_has_not_seen_is_not_impossible():
    data = dataclasses.replace(toy(), marks=3)
    data.splits["test"][0].marks[5] = 2
    found = aaren_events.score_references(data, data.splits, 2)
    assert all(np.isfinite(each["nll"]) for each in found.values() if each)


def test_mixture_is_found():
    generator = np.random.default_rng(0)
    values = np.where(
        generator.uniform(size=30_000) < 0.3, generator.normal(-4, 0.5, 30_000), generator.normal(1, 1, 30_000)
    )
    weights, means, deviations = aaren_events.fit_mixture(values, 2)
    np.testing.assert_allclose([*weights, *means, *deviations], [0.3, 0.7, -4, 1, 0.5, 1], atol=0.05)


# Models


def test_a_cell_is_a_pair_that_learns_and_is_resumed(tmp_path, monkeypatch):
    """The same rows for either model; the rate is that of the better validation; turns are learnt."""
    drawn = []

    def batches(rows, size, *, seed):
        drawn.append((seed, event_sequences.event_batches(rows, size, seed=seed)[7]))
        return event_sequences.event_batches(rows, size, seed=seed)

    monkeypatch.setattr(aaren_events, "event_batches", batches)
    cell = aaren_events.compare(toy(), TINY, tmp_path)
    assert [seeds for seeds, _ in drawn] == [(0, 0, 1, 1)] * 2
    for name, rows in drawn[0][1].items():
        np.testing.assert_array_equal(rows, drawn[1][1][name])
    assert cell["events"] == {"train": 200, "validation": 80, "test": 100}
    assert list(cell["models"]) == list(MODELS)
    for found in cell["models"].values():
        assert found["learning_rate"] == 3e-2 == TINY.learning_rates[int(np.argmin(found["validation_nll"]))]
        assert all(len(found[measure.name]["values"]) == 2 for measure in MEASURES)
        assert found["nll"]["mean"] < cell["references"]["renewal"]["nll"] - 0.5
        assert found["accuracy"]["mean"] > 0.9
    aaren, transformer = (cell["models"][model]["parameters"] for model in MODELS)
    assert aaren == transformer + TINY.layers * TINY.width  # a query for each layer
    monkeypatch.setattr(aaren_events, "train", lambda *_: pytest.fail("trained twice"))
    again = aaren_events.compare(toy(), TINY, tmp_path)
    assert again["models"] == cell["models"]


def test_models_and_references_are_tested_on_the_same_events():
    chosen = aaren_events.spread(toy(sequences=40).splits["test"], 7)
    ids = pack_events(chosen, 16)["segment_ids"]
    assert np.sum((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)) == len(following(chosen).gaps)
    assert aaren_events.spread([1, 2, 3, 4, 5], 3) == [1, 3, 5]
    assert aaren_events.spread([1, 2], 3) == [1, 2]


# What is shown


def test_results_are_shown_and_drawn_from_json(tmp_path, monkeypatch):
    errors = {"aaren": [1.0, 1.2], "transformer": [1.5, 1.6]}

    def train(model, data, parts, config, folder):
        found = {
            measure.name: summary(errors[model]) for measure in MEASURES if data.marks > 1 or measure.name != "accuracy"
        }
        return found | {"learning_rate": 1e-3, "parameters": 1234, "training_seconds": 1.0}

    known = {"Toy": toy(), "Plain": dataclasses.replace(toy(marks=1, process=Sinusoidal(0.3, 0, 1)), name="Plain")}
    monkeypatch.setattr(aaren_events, "train", train)
    monkeypatch.setattr(aaren_events, "load_events", lambda name, **_: known[name])
    found = aaren_events.run(dataclasses.replace(TINY, dataset=tuple(known)), tmp_path)
    write_json(tmp_path / "result.json", found)
    (tmp_path / "aaren_events.png").unlink()
    recorded = json.loads((tmp_path / "result.json").read_text())
    shown = aaren_events.show(recorded)
    aaren_events.draw(recorded, tmp_path)
    assert (tmp_path / "aaren_events.png").stat().st_size > 1000
    nll, rmse, accuracy = (shown.split(f"**{measure.label}**")[1].split("**")[0] for measure in MEASURES)
    assert "| 1.10 ± 0.14 |" in nll
    assert "true process" in nll
    assert "true process" not in rmse
    assert "Plain" in rmse
    assert "Plain" not in accuracy
    assert "Toy" in accuracy


def test_one_model_alone_is_shown(tmp_path, monkeypatch):
    found = {measure.name: summary([1.0]) for measure in MEASURES}
    monkeypatch.setattr(aaren_events, "train", lambda *_: found | {"learning_rate": 1e-3, "parameters": 1})
    monkeypatch.setattr(aaren_events, "load_events", lambda name, **_: toy())
    metrics = aaren_events.run(dataclasses.replace(TINY, model=("aaren",)), tmp_path)
    assert "Transformer" not in aaren_events.show(metrics)
