"""HGRN against its paper: the complex recurrence token by token, and the lower bounds of its forget gates."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo.layers import StackConfig
from zoo.token_mixers.hgrn import HGRNConfig


def build(layer, layers=4, width=6):
    stack = StackConfig(width, layers, (HGRNConfig(),))
    return stack.pattern[0].mixer(stack, layer, rngs=nnx.Rngs(0))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("layer", [0, 3])
def test_recurrence(layer):
    with jax.enable_x64(True):
        # Not the initial weights: biases, norm and bound that are not trivial.
        mixer = jax.tree.map(lambda leaf: 2 * leaf.astype(jnp.float64) + 0.1, build(layer))
        mixer.depth[...] = jnp.asarray(layer / 4)
        x = np.random.default_rng(0).normal(size=(2, 9, 6))

        def project(linear):
            return np.asarray(x @ linear.kernel[...] + linear.bias[...])

        c = project(mixer.inputs)
        c = c * sigmoid(c)
        c = c[..., :6] + 1j * c[..., 6:]
        bound = layer * np.exp(0.1) / (layer * np.exp(0.1) + 4 - layer)
        keep = bound + (1 - bound) * sigmoid(project(mixer.forget))
        turn = np.exp(1j * np.asarray(mixer.theta[...]))
        h, hidden = np.zeros((2, 6), complex), []
        for t in range(9):
            h = keep[:, t] * turn * h + (1 - keep[:, t]) * c[:, t]
            hidden.append(h)
        hidden = np.stack(hidden, axis=1)
        y = sigmoid(project(mixer.gate)) * np.concatenate([hidden.real, hidden.imag], axis=-1)
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
        y = y * np.asarray(mixer.norm.scale[...]) + np.asarray(mixer.norm.bias[...])
        expected = y @ np.asarray(mixer.output.kernel[...]) + np.asarray(mixer.output.bias[...])
        outputs, state = mixer(jnp.asarray(x))
        chex.assert_trees_all_close((outputs, state.hidden), (expected, h), rtol=0, atol=1e-12)


def paper_bounds(table):
    """The cumulative sum of a softmax over layers, without its first row."""
    share = np.exp(table) / np.sum(np.exp(table), axis=0)
    return np.cumsum(share, axis=0) - share[0]


def test_bounds_start_as_those_of_the_paper():
    ours = np.stack([build(layer).lower_bound() for layer in range(4)])
    chex.assert_trees_all_close(ours, np.float32(paper_bounds(np.ones((4, 6)))), atol=1e-7)


@pytest.mark.parametrize("layer", range(4))
def test_a_bound_is_the_papers_for_a_table_with_equal_rows(layer):
    mixer = build(layer)
    mixer.bound[...] = jnp.linspace(-3.0, 3.0, 6)
    table = np.zeros((4, 6))
    table[1 : layer + 1] = np.linspace(-3, 3, 6)
    chex.assert_trees_all_close(mixer.lower_bound(), np.float32(paper_bounds(table)[layer]), atol=1e-6)


def test_the_first_layer_may_forget_all_and_the_last_keeps_most():
    x = jnp.full((1, 1, 6), 1e3)
    for layer in range(4):
        mixer = build(layer)
        keep, write = mixer.forget_gate(x)
        chex.assert_trees_all_close(keep + write, jnp.ones((1, 1, 6)), atol=1e-6)
        chex.assert_trees_all_close(jnp.min(keep), jnp.float32(layer / 4), atol=1e-6)
