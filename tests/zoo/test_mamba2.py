"""Mamba-2 against its equations, one number after another; sizes; its quadratic form."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from zoo.layers import StackConfig
from zoo.token_mixers import mamba2

STACK = StackConfig(16, 1, (mamba2.Mamba2Config(head_dim=8, state_size=3),))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference(mixer, u, quadratic):
    """The block of one row, in NumPy, with a state for each head or with the matrix L ∘ C Bᵀ of all pairs (§3)."""
    p = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(mixer)))
    inner, heads, n, time = len(p["norm"]["scale"]), len(p["d"]), 3, len(u)
    z, x, dt = np.split(u @ p["input"]["kernel"], (inner, 2 * inner + 2 * n), axis=-1)
    taps = len(p["convolution"]["weight"])
    padded = np.concatenate([np.zeros((taps - 1, x.shape[1])), x])
    x = np.stack([(p["convolution"]["weight"] * padded[t : t + taps]).sum(0) for t in range(time)])
    x += p["convolution"]["bias"]
    x *= sigmoid(x)
    x, b, c = np.split(x, (inner, inner + n), axis=-1)
    dt, x = np.log1p(np.exp(dt + p["dt_bias"])), x.reshape(time, heads, -1)
    y = p["d"][:, None] * x
    for head in range(heads):
        log_decay, steps = -np.exp(p["log_a"][head]) * dt[:, head], dt[:, head, None] * x[:, head]
        if quadratic:
            sums = np.cumsum(log_decay)
            y[:, head] += (np.tril(np.exp(sums[:, None] - sums)) * (c @ b.T)) @ steps
        else:
            state = np.zeros((n, x.shape[2]))
            for t in range(time):
                state = np.exp(log_decay[t]) * state + np.outer(b[t], steps[t])
                y[t, head] += c[t] @ state
    y = y.reshape(time, inner) * z * sigmoid(z)
    y *= p["norm"]["scale"] / np.sqrt((y**2).mean(-1, keepdims=True) + mixer.norm.epsilon)
    return y @ p["output"]["kernel"]


@pytest.mark.parametrize("quadratic", [False, True])
def test_equations(quadratic):
    with jax.enable_x64(True):
        mixer = STACK.pattern[0].mixer(STACK, 0, rngs=nnx.Rngs(0))
        generator = np.random.default_rng(0)
        mixer = jax.tree.map(lambda x: x.astype(float) + 0.1 * generator.normal(size=x.shape), mixer)
        u = generator.normal(size=(2, 9, 16))
        expected = np.stack([reference(mixer, row, quadratic) for row in u])
        chex.assert_trees_all_close(mixer(jnp.asarray(u))[0], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("preset", mamba2.SIZES)
def test_parameters(preset):
    """Counted by hand, with the vocabulary of the authors' models and a tied embedding; near what the names say."""
    config = mamba2.PRESETS[preset]
    model = jax.eval_shape(lambda: zoo.LanguageModel(config, vocabulary=50288, tied=True, rngs=nnx.Rngs(0)))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
    width, inner, n, heads = config.width, 2 * config.width, 128, config.width // 32
    projections = width * (2 * inner + 2 * n + heads) + inner * width
    block = projections + 5 * (inner + 2 * n) + 3 * heads + inner + width  # convolution; a, d, bias of dt; norms
    assert parameters == config.layers * block + width + 50288 * width
    assert abs(parameters / float(preset[:-1]) / {"m": 1e6, "b": 1e9}[preset[-1]] - 1) < 0.035


def test_state_is_one_matrix_per_head():
    mixer = STACK.pattern[0].mixer(STACK, 0, rngs=nnx.Rngs(0))
    _, state = jax.eval_shape(mixer, jnp.ones((2, 5, 16)))
    assert state.attention.memory.shape == (2, 4, 3, 8)


def test_refusals():
    with pytest.raises(ValueError, match=r"^head_dim: expected a divisor of 32, got 5"):
        StackConfig(16, 1, (mamba2.Mamba2Config(head_dim=5),))
    with pytest.raises(ValueError, match=r"^taps: expected a positive number, got 0"):
        StackConfig(16, 1, (mamba2.Mamba2Config(taps=0),))
