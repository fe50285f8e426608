"""Mamba against its equations, one number after another; sizes; what the start promises."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from zoo.layers import StackConfig
from zoo.token_mixers import mamba

STACK = StackConfig(16, 1, (mamba.MambaConfig(state_size=3),))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference(mixer, u):
    """The block of one row, in NumPy."""
    p = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(mixer)))
    x, z = np.split(u @ p["input"]["kernel"], 2, axis=-1)
    taps, time, n = len(p["convolution"]["weight"]), len(u), p["log_a"].shape[1]
    padded = np.concatenate([np.zeros((taps - 1, x.shape[1])), x])
    x = np.stack([(p["convolution"]["weight"] * padded[t : t + taps]).sum(0) for t in range(time)])
    x += p["convolution"]["bias"]
    x *= sigmoid(x)
    r, b, c = np.split(x @ p["select"]["kernel"], (-2 * n, -n), axis=-1)
    dt = np.log1p(np.exp(r @ p["dt"]["kernel"] + p["dt_bias"]))
    h, y = np.zeros(p["log_a"].shape), np.zeros_like(x)
    for t in range(time):
        h = np.exp(-np.exp(p["log_a"]) * dt[t][:, None]) * h + np.outer(dt[t] * x[t], b[t])
        y[t] = h @ c[t] + p["d"] * x[t]
    return (y * z * sigmoid(z)) @ p["output"]["kernel"]


def test_equations():
    with jax.enable_x64(True):
        mixer = STACK.pattern[0].mixer(STACK, 0, rngs=nnx.Rngs(0))
        generator = np.random.default_rng(0)
        mixer = jax.tree.map(lambda x: x.astype(float) + 0.1 * generator.normal(size=x.shape), mixer)
        u = generator.normal(size=(2, 9, 16))
        expected = np.stack([reference(mixer, row) for row in u])
        chex.assert_trees_all_close(mixer(jnp.asarray(u))[0], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("preset", mamba.SIZES)
def test_parameters(preset):
    """Counted by hand, with the vocabulary of the authors' models and a tied embedding; near what the names say."""
    config = mamba.PRESETS[preset]
    model = jax.eval_shape(lambda: zoo.LanguageModel(config, vocabulary=50280, tied=True, rngs=nnx.Rngs(0)))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
    width, inner, n, rank = config.width, 2 * config.width, 16, config.width // 16
    projections = 2 * width * inner + inner * (rank + 2 * n) + rank * inner + inner * width
    block = projections + 5 * inner + inner * (n + 2) + width  # convolution; A, D and the bias of dt; norm
    assert parameters == config.layers * block + width + 50280 * width
    assert abs(parameters / float(preset[:-1]) / {"m": 1e6, "b": 1e9}[preset[-1]] - 1) < 0.025


def test_start():
    """A = −1 … −N in every channel, D = 1, steps of a token of zeros log-uniform in [0.001, 0.1]."""
    stack = StackConfig(512, 1, (mamba.MambaConfig(),))
    mixer = stack.pattern[0].mixer(stack, 0, rngs=nnx.Rngs(0))
    chex.assert_trees_all_close(jnp.exp(mixer.log_a[...]), jnp.tile(jnp.arange(1.0, 17), (1024, 1)), rtol=1e-6)
    chex.assert_trees_all_equal(mixer.d[...], jnp.ones(1024))
    steps = np.sort(np.log10(mamba.step_sizes(jnp.zeros(1024), mixer.dt_bias[...])))
    chex.assert_trees_all_close(steps, np.linspace(-3, -1, 1024, dtype=np.float32), atol=0.1)
    assert steps.min() >= -3.001
    assert steps.max() <= -0.999


def test_a_token_is_ignored_or_taken_by_its_step():
    """§3.5: dt → 0 leaves the state as it is, dt → ∞ forgets it: here by the bias of the step."""
    mixer = STACK.pattern[0].mixer(STACK, 0, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 16)), jnp.float32)
    _, state = mixer(x)
    mixer.dt_bias[...] = jnp.full(32, -40.0)
    chex.assert_trees_all_close(mixer(x, state)[1].scan.hidden, state.scan.hidden, atol=1e-6)
    mixer.dt_bias[...] = jnp.full(32, 40.0)
    other = state._replace(scan=state.scan._replace(hidden=state.scan.hidden + 1))
    chex.assert_trees_all_close(mixer(x, state)[0], mixer(x, other)[0], atol=1e-5)


@pytest.mark.parametrize("option", ["expand", "state_size", "taps"])
def test_refusals(option):
    with pytest.raises(ValueError, match=f"^{option}: expected a positive number, got 0"):
        StackConfig(16, 1, (mamba.MambaConfig(**{option: 0}),))
