"""Based against its equations, and its sizes against the authors' configurations."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from zoo.layers import StackConfig
from zoo.token_mixers.based import (
    PRESETS,
    GatedConvolutionConfig,
    TaylorAttentionConfig,
    WindowAttentionConfig,
)

TAYLOR = {"360m": [1, 6, 11, 16, 21], "1.3b": [1, 6, 11, 16, 21, 27, 33]}


def build(config, scale=2.0):
    stack = StackConfig(width=8, pattern=(config,))
    mixer = config.mixer(stack, 0, rngs=nnx.Rngs(0))
    return jax.tree.map(lambda x: (scale * x + 0.1).astype(jnp.float64), mixer)


def inputs(time=9):
    return np.random.default_rng(0).normal(size=(2, time, 8))


def heads_of(linear, x, heads):
    return (x @ np.asarray(linear.kernel[...])).reshape(*x.shape[:2], heads, -1)


def test_features_are_the_second_order_and_weights_at_least_half():
    with jax.enable_x64(True):
        mixer = build(TaylorAttentionConfig(heads=2, feature_dim=16), scale=30)
        x = 10 * inputs()
        q, k = mixer.features(mixer.query(jnp.asarray(x))), mixer.features(mixer.key(jnp.asarray(x)))
        products = np.einsum("bthf,bshf->bhts", q, k)
        a = np.einsum("bthd,bshd->bhts", heads_of(mixer.query, x, 2), heads_of(mixer.key, x, 2)) / 4
    assert np.min(a) < -3
    assert np.max(a) > 3
    chex.assert_trees_all_close(products, 1 + a + a**2 / 2, rtol=1e-10)
    assert np.min(products) >= 0.5


def test_taylor_attention_is_its_quadratic_form():
    """All pairs compared, weights 1 + a + a²/2 divided by their sum; no features."""
    with jax.enable_x64(True):
        mixer = build(TaylorAttentionConfig(heads=2, feature_dim=3))
        x = inputs()
        q, k, v = (heads_of(linear, x, 2) for linear in (mixer.query, mixer.key, mixer.value))
        a = np.einsum("bthd,bshd->bhts", q, k) / 3**0.5
        weights = (1 + a + a**2 / 2) * np.tril(np.ones((9, 9)))
        o = np.einsum("bhts,bshd->bthd", weights / weights.sum(axis=-1, keepdims=True), v)
        expected = o.reshape(2, 9, 8) @ np.asarray(mixer.output.kernel[...])
        outputs, state = mixer(jnp.asarray(x))
    chex.assert_trees_all_close(outputs, expected, rtol=0, atol=1e-10)
    assert state.memory.shape == (2, 2, 1 + 3 + 6, 4 + 1)


def test_denominators_stay_positive_in_bfloat16():
    """Features of large bfloat16 queries and keys would cancel to negative weights if they were rounded."""
    config = TaylorAttentionConfig(heads=1, feature_dim=16)
    stack = StackConfig(width=16, pattern=(config,), dtype=jnp.bfloat16)
    mixer = config.mixer(stack, 0, rngs=nnx.Rngs(0))
    x = jnp.asarray(16 * np.random.default_rng(0).normal(size=(1, 256, 16)), jnp.bfloat16)
    q, k = mixer.features(mixer.query(x)), mixer.features(mixer.key(x))
    products = jnp.einsum("bthf,bshf->bhts", q, k, precision="highest")
    assert jnp.min(products) > 0.3
    rounded = jnp.einsum("bthf,bshf->bhts", *(f.astype(jnp.bfloat16).astype(jnp.float32) for f in (q, k)))
    assert jnp.min(rounded) < 0


@pytest.mark.parametrize("rotary", [False, True])
def test_window_attention(rotary):
    """Softmax over a band; rotary products written with complex numbers."""
    with jax.enable_x64(True):
        mixer = build(WindowAttentionConfig(heads=2, window=3, rotary=rotary))
        x = inputs()
        q, k, v = np.split(x @ np.asarray(mixer.query_key_value.kernel[...]), 3, axis=-1)
        q, k, v = (part.reshape(2, 9, 2, 4) for part in (q, k, v))
        outputs, _ = mixer(jnp.asarray(x))
        output = np.asarray(mixer.output.kernel[...])
    if rotary:
        turns = np.exp(1j * np.arange(9)[:, None, None] * 10000.0 ** -(np.arange(2) / 2))
        q, k = ((part[..., :2] + 1j * part[..., 2:]) * turns for part in (q, k))
    s = np.einsum("bthd,bshd->bhts", q, np.conj(k)).real / 2
    distance = np.arange(9)[:, None] - np.arange(9)
    weights = np.where((distance >= 0) & (distance < 3), np.exp(s), 0)
    o = np.einsum("bhts,bshd->bthd", weights / weights.sum(axis=-1, keepdims=True), v)
    chex.assert_trees_all_close(outputs, o.reshape(2, 9, 8) @ output, rtol=0, atol=1e-11)


def test_gated_convolution():
    with jax.enable_x64(True):
        mixer = build(GatedConvolutionConfig())
        x = inputs()
        outputs, _ = mixer(jnp.asarray(x))
        inner = x @ np.asarray(mixer.inner.kernel[...]) + np.asarray(mixer.inner.bias[...])
        weight = np.asarray(mixer.convolution.weight[...])
        outer = np.asarray(mixer.outer.kernel[...])
        bias = np.asarray(mixer.outer.bias[...])
    a, b = inner[..., :16], np.pad(inner[..., :16], [(0, 0), (2, 0), (0, 0)])
    local = weight[2] * a + weight[1] * b[:, 1:-1] + weight[0] * b[:, :-2]
    expected = (local / (1 + np.exp(-local)) * inner[..., 16:]) @ outer + bias
    chex.assert_trees_all_close(outputs, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "millions"), [("360m", 363), ("1.3b", 1349)])
def test_parameters(name, millions):
    """The sum over the authors' configurations by hand, within 4 % of what the models are called."""
    config = PRESETS[name]
    model = jax.eval_shape(lambda: zoo.LanguageModel(config, vocabulary=50_264, tied=True, rngs=nnx.Rngs(0)))
    d, taylor = config.width, len(TAYLOR[name])
    convolution = (d * 4 * d + 4 * d) + 3 * 2 * d + (2 * d * d + d)
    mixers = (config.layers - 2 * taylor) * convolution + taylor * (2 * d * 256 + 2 * d * d) + taylor * 4 * d * d
    count = sum(leaf.size for leaf in jax.tree.leaves(model))
    assert count == 50_264 * d + mixers + config.layers * (3 * d * 2 * d + 2 * d) + d
    assert round(count / 1e6) == millions


def test_places_of_the_mixers():
    for name, taylor in TAYLOR.items():
        kinds = [type(mixer) for mixer in PRESETS[name].pattern]
        assert len(kinds) == PRESETS[name].layers
        assert [i for i, kind in enumerate(kinds) if kind is TaylorAttentionConfig] == taylor
        assert [i for i, kind in enumerate(kinds) if kind is WindowAttentionConfig] == [i + 1 for i in taylor]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TaylorAttentionConfig(heads=3), "heads: expected a divisor of the width, 8, got 3"),
        (TaylorAttentionConfig(heads=2, feature_dim=0), "feature_dim: expected a positive number"),
        (WindowAttentionConfig(heads=2, window=0), "window: expected a positive number"),
        (WindowAttentionConfig(heads=8), "rotary: expected heads of even size, got 1"),
        (GatedConvolutionConfig(taps=0), "taps: expected a positive number"),
        (GatedConvolutionConfig(expansion=0), "expansion: expected a positive number"),
    ],
)
def test_refusals(config, message):
    with pytest.raises(ValueError, match=message):
        StackConfig(width=8, pattern=(config,))
