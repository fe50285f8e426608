"""What `aaren_efficiency` measures: state of streams in all settings, costs of training, and what is shown."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import aaren_efficiency, streaming
from experiments.aaren_efficiency import PRESETS, SETTINGS, Config
from experiments.comparison import MODELS
from experiments.results import write_json
from experiments.streaming import Stream, stream, summarise

TINY = Config(width=8, layers=1, heads=2, hidden=8, steps=12, block=4, lengths=(8, 16), repeats=1)


def test_presets():
    assert Config() == PRESETS["desk"]
    assert list(SETTINGS) == list(PRESETS["desk"].setting)
    assert max(PRESETS["desk"].lengths) == 16384


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"setting": ("vision",)}, "setting: expected names out of reinforcement learning"),
        ({"steps": 10}, "steps: expected two or more whole blocks of 4 steps, got 10"),
        ({"steps": 4}, "two or more whole blocks"),
        ({"lengths": (8, 8)}, "lengths: expected two or more different ones"),
        ({"heads": 3}, "heads: expected a divisor of the width"),
        ({"repeats": 0}, "repeats: expected positive numbers"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **options)


# Streams


@pytest.mark.parametrize("setting", SETTINGS)
def test_state_of_a_stream(setting):
    """Two numbers and the sum of values for each head of Aaren; keys and values of every token of a Transformer."""
    chosen = SETTINGS[setting]
    aaren, transformer = (aaren_efficiency.measure_stream(setting, model, TINY) for model in MODELS)
    for found in (aaren, transformer):
        assert found["stream"]["tokens"] == [4, 8, 12]
        assert np.all(np.diff(found["stream"]["seconds"]) > 0)
    assert len(set(aaren["stream"]["used_bytes"])) == 1
    assert abs(aaren["exponent_of_memory"]) < 1e-9
    block = 4 * chosen.tokens_per_step * 2 * 4 * TINY.width  # keys and values of four bytes
    assert np.diff(transformer["stream"]["used_bytes"]).tolist() == [block, block]
    assert np.diff(transformer["stream"]["allocated_bytes"]).tolist() == [block, 2 * block]  # doubled twice


@pytest.mark.parametrize("setting", ["reinforcement learning", "time-series classification"])
def test_a_stream_ends_like_the_whole_at_once(setting, monkeypatch):
    """Of several arrays and of one alone."""
    chosen, states = SETTINGS[setting], []
    model = aaren_efficiency.create(f"aaren{chosen.head}", TINY, **chosen.arguments)
    inputs = chosen.inputs(np.random.default_rng(0), 8)
    monkeypatch.setattr(streaming, "state_bytes", lambda state: states.append(state) or (1, 1))
    stream(model, inputs if len(inputs) > 1 else inputs[0], block=4, repeats=2, label="")
    assert len(states) == 2
    for part, state in zip((4, 8), states, strict=True):
        _, whole = jax.jit(model.__call__)(*(jnp.asarray(x)[None, :part] for x in inputs))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), state, whole)


def test_inputs_of_a_stream_have_equal_lengths():
    with pytest.raises(ValueError, match=r"inputs: expected a multiple of 4 tokens, got \[6\]"):
        stream(None, np.zeros((6, 1)), block=4, repeats=1, label="")
    with pytest.raises(ValueError, match=r"got \[4, 8\]"):
        stream(None, (np.zeros((8, 1)), np.zeros(4)), block=4, repeats=1, label="")


def test_summary_of_a_stream():
    tokens = [10, 20, 40, 80, 160]
    found = summarise(Stream(tokens, [7] * 5, [3 * n for n in tokens], [1e-3 * n**2 for n in tokens]))
    assert found["exponent_of_memory"] == pytest.approx(0, abs=1e-9)
    assert found["exponent_of_time"] == pytest.approx(2)
    assert (found["bytes"], found["allocated"]) == (7, 480)
    assert found["seconds_per_token"] == pytest.approx(1e-3 * (160**2 - 80**2) / 80)


# Training


def test_training_is_measured_forward_and_backward():
    found = aaren_efficiency.measure_training(TINY)
    assert list(found) == ["forward", "forward and backward"]
    for name, growth in found.items():
        assert list(growth["tokens"]) == [8, 16]
        for model in MODELS:
            assert all(seconds > 0 for seconds in growth["seconds"][model])
            small, large = growth["temporary_bytes"][model]
            assert 0 < small < large, (name, model)
    for model in MODELS:
        forward, backward = (np.array(growth["temporary_bytes"][model]) for growth in found.values())
        assert (forward < backward).all()


def test_gradients_are_those_of_all_parameters():
    stack = aaren_efficiency.create("aaren", TINY)
    x = jnp.ones((1, 5, TINY.width))
    value, gradient = jax.eval_shape(jax.value_and_grad(aaren_efficiency.loss), stack, x)
    assert value.shape == ()
    assert list(map(jnp.shape, jax.tree.leaves(gradient))) == list(map(jnp.shape, jax.tree.leaves(stack)))


# What is shown


def test_results_are_shown_and_drawn_from_json(tmp_path):
    """Of numbers that are known; nothing is measured."""
    tokens = [4, 8, 12]

    def streamed(scale):
        measured = Stream(tokens, [scale] * 3, [2 * scale] * 3, [scale * n for n in tokens])
        return {"stream": measured._asdict(), **summarise(measured)}

    growth = {
        "tokens": [8, 16],
        "seconds": {"aaren": [1.0, 2.0], "transformer": [2.0, 8.0]},
        "exponents": {"aaren": 1.0, "transformer": 2.0},
        "temporary_bytes": {"aaren": [1e6, 2e6], "transformer": [3e6, 12e6]},
        "exponents_of_memory": {"aaren": 1.0, "transformer": 2.0},
    }
    metrics = {
        "streams": {setting: {"aaren": streamed(2.0), "transformer": streamed(7.0)} for setting in SETTINGS},
        "training": {"forward": growth, "forward and backward": growth},
    }
    write_json(tmp_path / "result.json", metrics)
    metrics = json.loads((tmp_path / "result.json").read_text())
    shown = aaren_efficiency.show(metrics)
    aaren_efficiency.draw(metrics, tmp_path)
    assert (tmp_path / "aaren_efficiency.png").stat().st_size > 1000
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines() if "|" in line]
    assert ["event forecasting", "3.5", "3.5", "3.5"] in lines
    assert lines.count(["16", "8", "2", "4", "2", "12"]) == 2
    assert "1.00 (Aaren) and 2.00 (Transformer)" in shown
    assert "Streams of 12 steps" in shown


def test_run_measures_once(tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, setting=("event forecasting",))
    monkeypatch.setattr(aaren_efficiency, "measure_training", lambda _: {})
    monkeypatch.setattr(aaren_efficiency, "measure_stream", lambda *_: {"bytes": 1})
    monkeypatch.setattr(aaren_efficiency, "show", lambda metrics: "")
    monkeypatch.setattr(aaren_efficiency, "draw", lambda *_: None)
    first = aaren_efficiency.run(config, tmp_path)
    assert first == {"streams": {"event forecasting": {model: {"bytes": 1} for model in MODELS}}, "training": {}}
    monkeypatch.setattr(aaren_efficiency, "measure_stream", lambda *_: pytest.fail("measured twice"))
    assert aaren_efficiency.run(config, tmp_path) == first
