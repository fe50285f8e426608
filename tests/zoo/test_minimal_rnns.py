"""minGRU and minLSTM against their equations; their sizes; extremes of their gates."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo.layers import StackConfig
from zoo.token_mixers import minimal_rnns

WIDTH = 5


def build(config):
    """A mixer with biases away from zero, and inputs, in float64."""
    stack, generator = StackConfig(WIDTH, 1, (config,)), np.random.default_rng(0)
    mixer = config.mixer(stack, 0, rngs=nnx.Rngs(0))
    mixer = jax.tree.map(lambda x: x.astype(float) + 0.1 * generator.normal(size=x.shape), mixer)
    return mixer, generator.normal(size=(2, 9, WIDTH))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def affine(x, layer):
    return x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("expand", [1, 2])
@pytest.mark.parametrize("kind", [minimal_rnns.MinGRUConfig, minimal_rnns.MinLSTMConfig])
def test_equations(kind, expand, positive):
    with jax.enable_x64(True):
        mixer, x = build(kind(expand=expand, positive=positive))
        candidates, gates = affine(x, mixer.candidate), sigmoid(affine(x, mixer.gate))
        if positive:
            candidates = np.where(candidates >= 0, candidates + 0.5, sigmoid(candidates))
        h, states = 0, []
        for t in range(x.shape[1]):
            if kind is minimal_rnns.MinGRUConfig:
                h = (1 - gates[:, t]) * h + gates[:, t] * candidates[:, t]
            else:
                f, i = np.split(gates[:, t], 2, axis=-1)
                h = f / (f + i) * h + i / (f + i) * candidates[:, t]
            states.append(h)
        states = np.stack(states, axis=1)
        expected = states if expand == 1 else affine(states, mixer.output)
        y, state = mixer(jnp.asarray(x))
        chex.assert_trees_all_close(y, expected, rtol=1e-11, atol=1e-13)
        chex.assert_trees_all_close(state.recurrence.hidden, h, rtol=1e-11, atol=1e-13)


def test_convolution_in_front():
    with jax.enable_x64(True):
        mixer, x = build(minimal_rnns.MinGRUConfig(taps=3))
        weight, bias = np.asarray(mixer.convolution.weight[...]), np.asarray(mixer.convolution.bias[...])
        padded = np.pad(x, ((0, 0), (2, 0), (0, 0)))
        filtered = bias + sum(weight[j] * padded[:, j : j + x.shape[1]] for j in range(3))
        mixer.convolution, expected = None, mixer(jnp.asarray(x))[0]
        chex.assert_trees_all_close(mixer(jnp.asarray(filtered))[0], expected, rtol=1e-12)


@pytest.mark.parametrize(("kind", "matrices"), [(minimal_rnns.MinGRUConfig, 2), (minimal_rnns.MinLSTMConfig, 3)])
def test_parameters_of_the_paper(kind, matrices):
    """2 d_h d_x of a minGRU and 3 d_h d_x of a minLSTM, without biases and the way back from an expansion."""
    for expand in (1, 4):
        mixer = kind(expand=expand).mixer(StackConfig(WIDTH, 1, (kind(),)), 0, rngs=nnx.Rngs(0))
        assert mixer.candidate.kernel.size + mixer.gate.kernel.size == matrices * expand * WIDTH * WIDTH
        assert (mixer.output is None) == (expand == 1)


def test_gates_that_are_both_closed_still_sum_to_one():
    """f, i → 0 at the same rate: their quotients exist, although in float32 f / (f + i) would be 0 / 0."""
    mixer = minimal_rnns.MinLSTMConfig().mixer(
        StackConfig(WIDTH, 1, (minimal_rnns.MinLSTMConfig(),)), 0, rngs=nnx.Rngs(0)
    )
    mixer.gate.bias[...] = jnp.full(2 * WIDTH, -200.0)

    def loss(mixer, x):
        return jnp.sum(mixer(x)[0] ** 2)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, WIDTH)), jnp.float32)
    f, i = np.split(x[0, 0] @ np.asarray(mixer.gate.kernel[...]), 2)
    expected = sigmoid(i - f) * affine(np.asarray(x[0, 0]), mixer.candidate)
    chex.assert_trees_all_close(mixer(x)[0][0, 0], expected.astype(np.float32), rtol=1e-4)
    chex.assert_tree_all_finite(jax.grad(loss)(mixer, x))


def test_positive_candidates_make_positive_states():
    with jax.enable_x64(True):
        for kind in (minimal_rnns.MinGRUConfig, minimal_rnns.MinLSTMConfig):
            mixer, x = build(kind(positive=True))
            assert jnp.all(mixer(jnp.asarray(10 * x))[0] > 0)


def test_refusals():
    with pytest.raises(ValueError, match=r"^expand: expected a positive number, got 0"):
        StackConfig(WIDTH, 1, (minimal_rnns.MinGRUConfig(expand=0),))
    with pytest.raises(ValueError, match=r"^taps: expected a positive number, or 0"):
        StackConfig(WIDTH, 1, (minimal_rnns.MinLSTMConfig(taps=-1),))
