"""What `forecasting` compares: errors, forecasts without a network, the choice of a rate, and what is shown."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from experiments import forecasting
from experiments.data import SeriesData
from experiments.forecasting import Config
from experiments.measure import count_parameters
from experiments.results import write_json

TINY = Config(
    dataset=("TechStocks",), models=("aaren",), context=8, horizon=(4,), seeds=2, learning_rates=(1e-3, 1e-1), steps=2,
    batch_size=2, validation_windows=5, test_windows=7, width=8, layers=1, heads=2, hidden=8,
)  # fmt: skip


def series(values, *, season=None, observed=None):
    values = np.asarray(values, np.float32)
    cuts = [0, len(values) * 7 // 10, len(values) * 8 // 10, len(values)]
    parts = dict(zip(("train", "validation", "test"), map(range, cuts[:-1], cuts[1:]), strict=True))
    observed = np.ones(values.shape, bool) if observed is None else observed
    return SeriesData("Toy", values, observed, tuple(map(str, range(values.shape[1]))), parts, season, "nowhere")


def noise(steps=120, channels=3):
    return np.random.default_rng(0).normal(size=(steps, channels))


# Errors


def test_missing_values_do_not_count():
    batch = {"targets": np.array([[[1.0], [2.0], [9.0]]]), "observed": np.array([[[True], [True], [False]]])}
    found = forecasting.errors(jnp.array([[[1.5], [0.0], [0.0]]]), batch)
    assert {name: float(value) for name, value in found.items()} == {"mse": 4.25, "mae": 2.5, "count": 2}


def test_score_is_the_mean_over_all_windows():
    """Whatever the size of the batches, of windows that overlap, with missing values."""
    observed = noise() > -1
    data = series(noise(), observed=observed)
    windows = range(96, 120 - 4 + 1)
    missing = np.concatenate([observed[first : first + 4].ravel() for first in windows])
    squares = np.concatenate([data.values[first : first + 4].ravel().astype(float) ** 2 for first in windows])
    config = dataclasses.replace(TINY, test_windows=1000)
    batches = forecasting.evaluation_batches(data, "test", 4, config)
    found = forecasting.score(lambda batch: forecasting.errors(jnp.zeros_like(batch["targets"]), batch), batches)
    assert found["mse"] == pytest.approx(squares[missing].mean(), rel=1e-5)
    assert len(batches) == 1
    small = forecasting.series_evaluation_batches(data, "test", 5, context=8, horizon=4)
    again = forecasting.score(lambda batch: forecasting.errors(jnp.zeros_like(batch["targets"]), batch), small)
    assert again["mse"] == pytest.approx(found["mse"], rel=1e-5)


# References


def test_seasonal_naive_repeats_the_last_season():
    inputs = jnp.arange(6.0).reshape(1, 6, 1)
    assert forecasting.seasonal_naive(inputs, 7, 3).ravel().tolist() == [3, 4, 5, 3, 4, 5, 3]
    assert forecasting.seasonal_naive(inputs, 2, 1).ravel().tolist() == [5, 5]
    assert forecasting.seasonal_naive(inputs, 2, 6).ravel().tolist() == [0, 1]


def test_linear_model_is_ridge_regression():
    """Of each channel alone, on all windows of the training part."""
    data, penalty = series(noise()), 0.3
    (weights,) = forecasting.fit_linear(data, 8, 4, [penalty])
    assert weights.shape == (3, 9, 4)
    for channel, found in enumerate(weights):
        windows = np.stack([data.values[start : start + 12, channel] for start in range(84 - 12 + 1)]).astype(float)
        windows = windows - windows[:, 7:8]
        past = np.concatenate([windows[:, :8], np.ones((len(windows), 1))], axis=1)
        ridge = np.sqrt(penalty * len(windows)) * np.eye(9)  # as further rows
        stacked = np.concatenate([past, ridge]), np.concatenate([windows[:, 8:], np.zeros((9, 4))])
        np.testing.assert_allclose(found, np.linalg.lstsq(*stacked)[0], atol=1e-5)
    inputs = jnp.asarray(data.values[None, 90:98])
    forecast = forecasting.linear(inputs, weights)
    past = np.append(data.values[90:98, 1] - data.values[97, 1], 1)
    np.testing.assert_allclose(forecast[0, :, 1], past @ weights[1] + data.values[97, 1], atol=1e-6)


def test_references_of_a_periodic_series():
    """Sines are forecast by their season and by a linear recurrence, and not by their last value."""
    time = np.arange(400)[:, None]
    data = series(np.sin(2 * np.pi * time / 8 + np.arange(2)), season=8)
    config = dataclasses.replace(TINY, context=16)
    found = forecasting.score_references(data, 8, config)
    assert found["seasonal naive"]["mse"] < 1e-9
    assert found["linear"]["mse"] < 1e-3
    assert found["last value"]["mse"] > 0.5
    assert found["linear"]["penalty"] == min(forecasting.PENALTIES)
    assert found["linear"]["parameters"] == 2 * 17 * 8
    assert len(found["linear"]["validation_mse"]) == len(forecasting.PENALTIES)
    for season in (17, None):  # not within the context, or none
        without = forecasting.score_references(dataclasses.replace(data, season=season), 8, config)
        assert without["seasonal naive"] is None


def test_penalty_is_chosen_on_the_validation_part():
    data = series(noise())
    found = forecasting.score_references(data, 4, TINY)["linear"]

    def mse(split, weights):
        batches = forecasting.evaluation_batches(data, split, 4, TINY)
        total = forecasting.score(lambda b: forecasting.errors(forecasting.linear(b["inputs"], weights), b), batches)
        return total["mse"]

    fits = forecasting.fit_linear(data, 8, 4, forecasting.PENALTIES)
    by_penalty = [mse("validation", weights) for weights in fits]
    np.testing.assert_allclose(found["validation_mse"], by_penalty, rtol=1e-4)
    best = int(np.argmin(by_penalty))
    assert found["penalty"] == forecasting.PENALTIES[best]
    assert found["mse"] == pytest.approx(mse("test", fits[best]), rel=1e-4)


# Models


def test_models_have_the_shared_sizes():
    config = Config(width=32, heads=4, window=16)
    for stack in ("aaren", "transformer", "gated_deltanet", "titans_mag", "yaad"):
        model = jax.eval_shape(lambda stack=stack: forecasting.create(stack, config, 3, 5, jax.random.key(0)))
        outputs, _ = jax.eval_shape(lambda model: model(jnp.zeros((2, 96, 3))), model)
        assert outputs.shape == (2, 5, 3), stack
    one, two = (
        jax.eval_shape(lambda stack=stack: forecasting.create(stack, config, 3, 5, jax.random.key(0)))
        for stack in ("aaren", "transformer")
    )
    assert count_parameters(one) == count_parameters(two) + config.layers * config.width  # a query for each layer
    mixer = zoo.configure("titans_mag_forecaster").pattern[0]
    assert hasattr(mixer, "window")


def test_rate_is_chosen_on_the_validation_part_and_a_run_is_resumed(tmp_path, monkeypatch):
    data = series(noise())
    config = dataclasses.replace(TINY, learning_rates=(1e-3, 1e30))
    found = forecasting.train("aaren", data, 4, config, tmp_path / "run")
    assert found["learning_rate"] == 1e-3
    assert not np.isfinite(found["validation_mse"][1])
    assert np.isfinite(found["validation_mse"][0])
    assert len(found["mse"]["values"]) == len(found["mae"]["values"]) == 2
    assert found["mse"]["values"][0] != found["mse"]["values"][1]
    assert 0.5 < found["mse"]["mean"] < 5
    monkeypatch.setattr(forecasting, "series_batches", lambda *_, **__: {})  # nothing is left to train
    again = forecasting.train("aaren", data, 4, config, tmp_path / "run")
    assert (again["mse"], again["mae"]) == (found["mse"], found["mae"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dataset": ("ETTh1",)}, FileNotFoundError, "put its published file, ETTh1.csv"),
        ({"dataset": ("VicElek",)}, ValueError, "did you mean VicElec"),
        ({"horizon": (96, 192)}, ValueError, "horizon: expected at most 127"),
        ({"models": ("aren",)}, ValueError, "did you mean aaren"),
        ({"heads": 3}, ValueError, "heads: expected a divisor of the width"),
    ],
)
def test_misfits_are_refused_before_a_run(options, error, message):
    with pytest.raises(error, match=message):
        forecasting.check(dataclasses.replace(TINY, **options))


def test_presets_need_no_data(monkeypatch):
    monkeypatch.setattr("experiments.data.series._locate", lambda *_: pytest.fail("looked for a series"))
    assert Config() == forecasting.PRESETS["demo"]
    with pytest.raises(ValueError, match="steps: expected positive numbers"):
        Config(steps=0)


# What is shown


def metrics(monkeypatch):
    """Of models that a table of errors stands for."""
    values = {"aaren": [0.5, 0.7], "titans_lmm": [0.4, 0.5], "yaad": [0.9, 0.8]}

    def train(stack, data, horizon, config, folder):
        if stack == "moneta":
            raise forecasting.DivergedError("gone")
        errors = forecasting.summary(values[stack])
        return {"model": stack, "mse": errors, "mae": errors, "learning_rate": 1e-3, "parameters": 1234}

    monkeypatch.setattr(forecasting, "train", train)
    return dataclasses.replace(TINY, models=(*values, "moneta"), horizon=(4, 6))


def test_results_are_shown_and_drawn_from_json(tmp_path, monkeypatch):
    config = dataclasses.replace(metrics(monkeypatch), data_dir=tmp_path / "data")
    found = forecasting.run(config, tmp_path)
    write_json(tmp_path / "result.json", found)
    (tmp_path / "forecasting.png").unlink()
    recorded = json.loads((tmp_path / "result.json").read_text())
    shown = forecasting.show(recorded)
    forecasting.draw(recorded, tmp_path)
    assert (tmp_path / "forecasting.png").stat().st_size > 1000
    assert shown.count("TechStocks, 4 steps ahead, 7 windows:") == 1
    assert shown.count("TechStocks, 6 steps ahead, 7 windows:") == 1
    assert shown.count("Diverged: moneta.") == 2
    lines = [line.split("|")[1].strip() for line in shown.splitlines() if line.startswith("|")]
    first = lines.index("forecast by")
    assert lines[first + 2 : first + 7] == ["titans_lmm", "aaren", "yaad", "last value", "linear"]
    assert "| 0.450 ± 0.071 |" in shown
    assert "titans_lmm, 0.4500" in shown
    assert "aaren, 0.6000" in shown
