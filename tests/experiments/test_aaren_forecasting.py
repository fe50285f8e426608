"""What `aaren_forecasting` compares: pairs of models in cells, resumed; what is refused and what is shown."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import aaren_forecasting, forecasting
from experiments.aaren_forecasting import PRESETS, Config
from experiments.comparison import MODELS
from experiments.data import SeriesData, list_series
from experiments.data import series as series_module
from experiments.results import summary, write_json

TINY = dataclasses.replace(PRESETS["smoke"], width=8, hidden=8, context=8, horizon=(4,), steps=2, batch_size=2)


def toy(name="Toy", steps=120, channels=2):
    values = np.random.default_rng(0).normal(size=(steps, channels)).astype(np.float32)
    parts = {"train": range(84), "validation": range(84, 96), "test": range(96, steps)}
    return SeriesData(name, values, np.ones(values.shape, bool), ("a", "b"), parts, 4, "nowhere")


def published():
    return tuple(name for name in list_series() if name in series_module._PUBLISHED)


def test_presets_need_no_data(monkeypatch):
    monkeypatch.setattr(series_module, "_locate", lambda *_: pytest.fail("looked for a series"))
    assert Config() == PRESETS["desk"]
    assert sorted(PRESETS["paper"].dataset) == sorted(published())
    for preset in ("desk", "paper"):
        assert PRESETS[preset].horizon == (96, 192, 336, 720)
        assert PRESETS[preset].seeds == 5


def test_desk_series_have_room_for_every_horizon():
    assert len(PRESETS["desk"].dataset) == 6
    assert not set(PRESETS["desk"].dataset) & set(published())
    aaren_forecasting.check(PRESETS["desk"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dataset": ("ETTh1",)}, FileNotFoundError, "put its published file, ETTh1.csv"),
        ({"dataset": ("VicElek",)}, ValueError, "did you mean VicElec"),
        ({"horizon": (96, 192), "context": 96}, ValueError, "horizon: expected at most 127"),
        ({"model": ("mamba",)}, ValueError, "model: expected names out of aaren, transformer"),
        ({"heads": 3}, ValueError, "heads: expected a divisor of the width"),
        ({"test_windows": 0}, ValueError, "test_windows: expected positive numbers"),
        ({"horizon": ()}, ValueError, "horizon: expected at least one"),
    ],
)
def test_misfits_are_refused_before_a_run(options, error, message):
    with pytest.raises(error, match=message):
        aaren_forecasting.check(dataclasses.replace(TINY, **options))


def test_the_published_files_are_enough(tmp_path, monkeypatch):
    """For the preset "paper", in the published format; tiny ones, of sets that are as small as that."""
    rng = np.random.default_rng(0)
    for name in PRESETS["paper"].dataset:
        small = series_module._PUBLISHED[name]._replace(steps=60, parts=None)
        monkeypatch.setitem(series_module._PUBLISHED, name, small)
        names = small.channels
        names = (*map(str, range(names - 1)), "OT") if isinstance(names, int) else names
        rows = [f"2016-07-01 00:00:00,{','.join(f'{x:.2f}' for x in rng.normal(size=len(names)))}" for _ in range(60)]
        (tmp_path / small.file).write_text("\n".join([f"date,{','.join(names)}", *rows]))
    config = dataclasses.replace(TINY, dataset=PRESETS["paper"].dataset, source_folder=tmp_path)
    aaren_forecasting.check(config)
    with pytest.raises(ValueError, match="horizon: expected at most 6, the steps of the validation part of Weather"):
        aaren_forecasting.check(dataclasses.replace(config, horizon=(7,)))


def test_a_cell_is_a_pair_of_the_same_windows_and_resumed(tmp_path, monkeypatch):
    windows = {}

    def batches(data, batch_size, *, context, horizon, seed):
        found = original(data, batch_size, context=context, horizon=horizon, seed=seed)
        windows.setdefault("seeds", []).append(seed)
        windows.setdefault("first", []).append(found[0]["inputs"])
        return found

    original = forecasting.series_batches
    monkeypatch.setattr(forecasting, "series_batches", batches)
    config = aaren_forecasting.shared(dataclasses.replace(TINY, learning_rates=(1e-3, 1e-2)))
    cell = aaren_forecasting.compare(toy(), 4, config, tmp_path)
    assert windows["seeds"] == [(0, 0, 1, 1)] * 2  # each seed with each rate, for either model
    np.testing.assert_array_equal(*windows["first"])
    assert (cell["dataset"], cell["horizon"], cell["windows"]) == ("Toy", 4, 8)
    assert list(cell["models"]) == list(MODELS)
    for found in cell["models"].values():
        assert len(found["mse"]["values"]) == len(found["mae"]["values"]) == 2
        assert found["learning_rate"] == (1e-3, 1e-2)[int(np.argmin(found["validation_mse"]))]
        assert found["diverged"] == [None] * 4
    aaren, transformer = (cell["models"][model]["parameters"] for model in MODELS)
    assert aaren == transformer + config.layers * config.width  # a query for each layer
    assert set(cell["references"]) == set(forecasting.REFERENCES)
    for function in ("train", "score_references"):
        monkeypatch.setattr(forecasting, function, lambda *_: pytest.fail("done twice"))
    assert aaren_forecasting.compare(toy(), 4, config, tmp_path) == cell


# What is shown


def cell(name, horizon, aaren, transformer, linear, seasonal=0.5):
    """Of errors that are known."""
    models = {
        model: {
            "mse": summary(errors), "mae": summary(errors), "learning_rate": 1e-3, "parameters": 1234,
            "training_seconds": 5.0,
        }
        for model, errors in {"aaren": aaren, "transformer": transformer}.items()
        if errors
    }  # fmt: skip
    references = {"last value": 1.0, "seasonal naive": seasonal, "linear": linear}
    return {
        "dataset": name, "horizon": horizon, "windows": 7, "models": models,
        "references": {k: v and {"mse": v, "mae": v} for k, v in references.items()},
    }  # fmt: skip


def test_results_are_shown_and_drawn_from_json(tmp_path, monkeypatch):
    known = {
        ("One", 4): cell("One", 4, [0.4, 0.402], [0.8, 0.81], 0.2),
        ("One", 6): cell("One", 6, [0.6, 0.61], [0.5, 0.501], 0.3),
        ("Two", 4): cell("Two", 4, [0.1, 0.9], [0.3, 0.3], 0.4, seasonal=None),
        ("Two", 6): cell("Two", 6, [0.5, 0.6], [0.5, 0.7], 0.3, seasonal=None),
    }
    monkeypatch.setattr(aaren_forecasting, "load_series", lambda name, **_: toy(name))
    monkeypatch.setattr(aaren_forecasting, "compare", lambda data, horizon, *_: known[data.name, horizon])
    found = aaren_forecasting.run(dataclasses.replace(TINY, dataset=("One", "Two"), horizon=(4, 6)), tmp_path)
    write_json(tmp_path / "result.json", found)
    (tmp_path / "aaren_forecasting.png").unlink()
    recorded = json.loads((tmp_path / "result.json").read_text())
    shown = aaren_forecasting.show(recorded)
    aaren_forecasting.draw(recorded, tmp_path)
    assert (tmp_path / "aaren_forecasting.png").stat().st_size > 1000
    assert "**MSE**, lower is better. Aaren: 1 win, 2 ties, 1 loss." in shown
    lines = [[part.strip() for part in line.strip("|").split("|")] for line in shown.splitlines() if "|" in line]
    ratios = {line[0]: line[2:] for line in lines if line[1] == "2"}
    expected = np.sqrt([0.401 * 0.5 / (0.805 * 0.3), 0.401 * 0.5 / (0.2 * 0.4), 0.401 * 0.5])
    np.testing.assert_allclose(list(map(float, ratios["4"][:3])), expected, rtol=1e-3)
    assert ["One, 4", "7", "1,234", "0.001", "5", "1,234", "0.001", "5"] in lines


@pytest.mark.parametrize(("transformer", "ratios"), [([], "2 | 0.4 |"), ([0.3], "1.333 | 2 | 0.4 | 1.5 | 0.3 |")])
def test_one_model_or_one_seed_alone_is_shown(tmp_path, transformer, ratios):
    """There is no interval, and no verdict."""
    cells = [cell("One", 4, [0.4], transformer, 0.2)]
    metrics = {"context": 8, "series": {"One": forecasting.describe(toy())}, "cells": cells}
    shown = " ".join(aaren_forecasting.show(metrics).split())
    aaren_forecasting.draw(metrics, tmp_path)
    assert f"| 4 | 1 | {ratios}" in shown
    assert "Aaren: 0 wins" not in shown
    assert not {"win", "tie", "loss"} & set(shown.split())
