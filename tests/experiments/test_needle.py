"""The experiments on needles in haystacks and on the parts of memories: what they compute besides training."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import memory_ablations, needle_in_a_haystack
from experiments.data import TextData

TEXT = TextData(*np.random.default_rng(0).integers(32, 127, (3, 5000)).astype(np.uint8), source="random bytes")
NEEDLE = needle_in_a_haystack.Config(width=16, parameters=20_000, window=4, sequences=6, multiples=(1, 2))
SMALL = dataclasses.replace(memory_ablations.PRESETS["smoke"], trials=3, dim=8)


class Oracle(nnx.Module):
    """Looks the value up behind the first marker, and gets as many of its symbols wrong as it is told."""

    def __init__(self, wrong, symbols):
        self.wrong, self.symbols = nnx.Param(wrong), symbols

    def __call__(self, tokens):
        first = jnp.argmax(tokens == 1, axis=1)
        place = jnp.arange(tokens.shape[1]) - (tokens.shape[1] - self.symbols)
        index = jnp.clip(first[:, None] + 2 + place, 0)
        value = jnp.take_along_axis(tokens, index, axis=1) + (place < self.wrong[...])
        return jax.nn.one_hot(value, 256), None


def test_a_value_counts_as_a_whole():
    models = jax.vmap(lambda wrong: Oracle(wrong, NEEDLE.symbols))(jnp.arange(3))
    accuracy = needle_in_a_haystack._test(models, NEEDLE, TEXT.test)
    assert list(accuracy) == ["pass key", "number", "word"]
    for kind in accuracy.values():
        assert {length: found["values"] for length, found in kind.items()} == {"64": [1, 0, 0], "128": [1, 0, 0]}


def test_the_loss_is_that_of_the_value():
    batch = {"tokens": np.full((1, 4), 7), "targets": np.array([[-1, -1, 3, 5]])}
    logits = np.random.default_rng(0).standard_normal((1, 4, 8)).astype(np.float32)
    loss, right = needle_in_a_haystack._judge(lambda tokens: (jnp.asarray(logits), None), batch)
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert loss == pytest.approx(-(log_probability[0, 2, 3] + log_probability[0, 3, 5]) / 2, rel=1e-5)
    assert right.shape == (1,)


def test_models_have_equal_parameters():
    config = needle_in_a_haystack.Config()
    for name in ("memory", "memory_as_context", "mamba2", "attention"):
        mixer = needle_in_a_haystack.mixer(name, config)
        hidden = needle_in_a_haystack.fitting_hidden(mixer, config)
        model = jax.eval_shape(
            lambda mixer=mixer, hidden=hidden: needle_in_a_haystack._model(mixer, config, hidden, jax.random.key(0))
        )
        assert abs(needle_in_a_haystack.count_parameters(model) / config.parameters - 1) < 2e-3


def test_mixers_have_the_sizes_of_the_task():
    gate = needle_in_a_haystack.mixer("memory_as_gate", NEEDLE, momentum=False)
    assert (gate.heads, gate.window, gate.momentum) == (2, 4, False)
    assert needle_in_a_haystack.mixer("attention", NEEDLE).rotary


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixers": ("memori",)}, "mixer: expected one of .* did you mean memor"),
        ({"parameters": 9000}, "parameters: expected at least .* for .*Memory"),
        ({"length": 8}, "length: expected a number from 9"),
        ({"sequences": 100}, "sequences: expected a multiple of 64, or fewer, got 100"),
        ({"multiples": (0, 1)}, "multiples: expected positive numbers"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        needle_in_a_haystack.check(needle_in_a_haystack.Config(**options))


def test_every_length_is_shown_and_drawn(tmp_path):
    def result(mixer, accuracy):
        accuracies = {length: {"mean": accuracy / int(length), "std": None} for length in ("64", "128")}
        kinds = dict.fromkeys(("pass key", "number", "word"), accuracies)
        costs = {"parameters": 1, "hidden": 2, "bytes_of_state": 3, "training_seconds": 4.5}
        return {"mixer": mixer, "accuracy": kinds, **costs}

    metrics = {
        "source": "a text", "length": 64, "references": dict.fromkeys(("pass key", "number", "word"), 1e-3),
        "results": [result("memory", 64), result("window", 32)], "diverged": ["delta"],
    }  # fmt: skip
    text = needle_in_a_haystack.show(json.loads(json.dumps(metrics)))
    assert text.count("| window ") == 4  # three kinds and the costs
    assert "| memory            | 0.962               | 0.5            | 0.802" in text
    assert "| delta             | 0.714               | -              |" in text
    assert "Diverged: delta." in text
    needle_in_a_haystack.draw(metrics, tmp_path)
    assert (tmp_path / "needle_in_a_haystack.png").stat().st_size


# Ablations


@pytest.mark.parametrize("bias", ["squared", "huber", "power 3", "dot product"])
def test_errors_are_those_of_gradient_descent(bias):
    keys, values, clean = memory_ablations._pairs(SMALL, 0, 6, 2)
    found = memory_ablations._errors("linear", bias, keys, values, clean, 0.05, 0.9)
    for trial, (ks, vs, wanted) in enumerate(zip(*(np.asarray(x, float) for x in (keys, values, clean)), strict=True)):
        weights = np.zeros((8, 8))
        for key, value in zip(ks, vs, strict=True):
            r = key @ weights - value
            gradient = {
                "squared": 2 * r,
                "huber": 2 * r * min(1, 1 / np.linalg.norm(r)),
                "power 3": 3 * r * abs(r),
                "dot product": -value,
            }[bias]
            weights = 0.9 * weights - 0.05 * np.outer(key, gradient)
        errors = ((ks @ weights - vs) ** 2).sum(1) / (vs**2).sum(1)
        assert found[trial] == pytest.approx(errors[wanted == 1].mean(), rel=1e-4)


def test_outliers_are_long_and_not_asked_for():
    keys, values, clean = map(np.asarray, memory_ablations._pairs(SMALL, 0, 6, 2))
    np.testing.assert_allclose(np.linalg.norm(keys, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(values, axis=-1), np.where(clean, 1, 10), rtol=1e-5)
    assert (clean.sum(axis=1) == 4).all()
    assert len(np.unique(clean, axis=0)) > 1


def test_steps_are_chosen_on_other_pairs():
    sets = [memory_ablations._pairs(SMALL, seed, 6) for seed in (0, 1)]
    candidates = [(step, None) for step in (0.01, 0.3, 100.0)]
    means = [[np.mean(memory_ablations._errors("linear", "squared", *s, *c)) for c in candidates] for s in sets]
    curve = memory_ablations._curve("linear", "squared", {"0%": sets}, candidates)
    assert curve["chosen"] == {"0%": {"step": 0.3, "decay": None}}
    assert curve["errors"]["0%"]["mean"] == pytest.approx(means[1][1])
    curve = memory_ablations._curve("linear", "power 3", {"0%": sets}, candidates[2:])
    assert curve["errors"]["0%"] == {"mean": None, "std": None}


def test_decay_is_measured_on_the_last_pairs(monkeypatch):
    asked = {}
    monkeypatch.setattr(memory_ablations, "_curve", lambda memory, bias, data, _: asked.update(data) or {})
    curves = memory_ablations._retention(dataclasses.replace(SMALL, written=(8, 11), recalled=3))
    assert {curve["decay"] for curve in curves} == {"none", "chosen"}
    for label, sets in asked.items():
        for keys, _, wanted in sets:
            assert keys.shape[1] == len(wanted.T) == int(label)
            assert np.flatnonzero(wanted).tolist() == [int(label) - 3 + i for i in range(3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ("depth 4",)}, "variants: expected some of memory, .* got depth 4"),
        ({"shares": (0.6,)}, r"shares: expected at most 0\.5, got"),
        ({"written": (4,)}, "written: expected at least the 8 that are recalled"),
        ({"parameters": 9000}, "parameters: expected at least"),
    ],
)
def test_ablations_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        memory_ablations.check(memory_ablations.Config(**options))


def test_variants_differ_from_the_memory_in_one_thing():
    config = memory_ablations.Config()
    memory, context = (needle_in_a_haystack.mixer(name, config) for name in ("memory", "memory_as_context"))
    for name, (base, options, _) in memory_ablations.VARIANTS.items():
        variant, whole = memory_ablations._variant(name, config), memory if base == "memory" else context
        changed = [f.name for f in dataclasses.fields(whole) if getattr(variant, f.name) != getattr(whole, f.name)]
        assert changed == list(options)
