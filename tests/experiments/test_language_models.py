"""The experiments with language models: what they compare, and what they compute besides training."""

import jax
import numpy as np
import pytest

from experiments import byte_language_models, mqar


def test_points_of_recall():
    config = mqar.Config(mixers=("attention", "window"))
    points = mqar._points(config)
    assert [name for name, _ in points] == ["attention", "window", "window", "window"]
    assert mqar._points(mqar.Config(mixers=("window", "lstm"), sweep=False)) == [
        ("window", {"window": 8}),
        ("lstm", {}),
    ]
    sizes = {
        window: mqar._model("window", {"window": window}, config, jax.random.key(0)).stack.blocks[1].mixer.window
        for window in (8, 16)
    }
    assert sizes == {8: 8, 16: 16}


def test_published_order():
    def result(mixer, accuracy):
        return {"mixer": mixer, "accuracy": {"easy": {"mean": 1.0}, "hard": {"mean": accuracy}}}

    results = [result("window", 0.2), result("window", 0.4), result("delta", 0.3), result("lstm", 0.9)]
    rows, counts = mqar._published(results)
    assert [(row["mixer"], row["here"]) for row in rows] == [("delta", 0.3), ("window", 0.4)]
    assert counts == (0, 0, 1)
    assert mqar._published([*results, result("delta", 0.4)])[1] == (0, 1, 1)
    assert mqar._published([*results, result("delta", 0.5)])[1] == (1, 0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixers": ("atention",)}, "mixer: expected one of .* did you mean attention"),
        ({"heads": 3}, "heads: expected a divisor of the width"),
        ({"test": ((8, 4, 1),)}, "length: expected"),
        ({"steps": 0}, "steps"),
    ],
)
def test_recall_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        mqar.check(mqar.Config(**options))


@pytest.mark.parametrize("name", ["attention", "mamba", "base_convolution"])
def test_models_have_equal_parameters(name):
    config = byte_language_models.Config()
    budget = byte_language_models._parameters("attention", config, config.hidden)
    hidden = byte_language_models._fitting_hidden(name, config, budget)
    assert abs(byte_language_models._parameters(name, config, hidden) / budget - 1) < 2e-3


def test_bits_per_byte_of_counts():
    """Of a text that repeats two bytes, the next one is certain once one is known."""
    two = np.asarray([3, 200], np.uint8)

    def entropy(order):
        return byte_language_models._entropy(np.tile(two, 50_000), np.tile(two, 50), order)

    assert entropy(0) == pytest.approx(1, abs=1e-3)
    assert entropy(1) == pytest.approx(0, abs=1e-3)
    assert entropy(2) == pytest.approx(0, abs=1e-3)


def test_bits_per_byte_of_a_model():
    """Equal to those of its logits over the windows, of a model that has seen nothing about 8."""
    config = byte_language_models.Config(width=16, hidden=8, heads=2, layers=1, test_windows=3, length=10)
    text = np.random.default_rng(0).integers(0, 256, 31).astype(np.uint8)
    models = jax.vmap(lambda key: byte_language_models._create("delta", config, 8, key))(
        jax.random.split(jax.random.key(0), 2)
    )
    found = byte_language_models._bits_per_byte(models, text, config)
    for member, bits in enumerate(found):
        model = jax.tree.map(lambda x, member=member: x[member], models)
        windows = text[:30].reshape(3, 10).astype(np.int32), text[1:].reshape(3, 10).astype(np.int32)
        log_probability = jax.nn.log_softmax(model(windows[0])[0])
        expected = -np.take_along_axis(np.asarray(log_probability), windows[1][..., None], -1).mean() / np.log(2)
        assert bits == pytest.approx(expected, rel=1e-5)
