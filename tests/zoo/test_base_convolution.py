"""BaseConv against its equation, and how far it sees."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from zoo.layers import StackConfig
from zoo.token_mixers.base_convolution import PRESETS, BaseConvolutionConfig


def mixer_and_inputs(taps, dtype=jnp.float64):
    stack = StackConfig(width=4, pattern=(BaseConvolutionConfig(taps),))
    mixer = jax.tree.map(lambda x: (x + 0.1).astype(dtype), stack.pattern[0].mixer(stack, 0, rngs=nnx.Rngs(0)))
    return mixer, jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 4)), dtype)


@pytest.mark.parametrize("taps", [1, 3, 9])
def test_equation(taps):
    """y = (W u + b_1) ⊙ (h ∗ u + b_2), the convolution as the product of two polynomials in each channel."""
    with jax.enable_x64(True):
        mixer, u = mixer_and_inputs(taps)
        filters = np.asarray(mixer.convolution.weight[...])[::-1]  # h_0 is that of the present token
        local = np.zeros(u.shape)
        for row in range(2):
            for channel in range(4):
                local[row, :, channel] = np.convolve(u[row, :, channel], filters[:, channel])[:9]
        local += mixer.convolution.bias[...]
        expected = (u @ mixer.projection.kernel[...] + mixer.projection.bias[...]) * local
        chex.assert_trees_all_close(mixer(u)[0], expected, rtol=0, atol=1e-13)


def test_reach_is_the_filter():
    mixer, u = mixer_and_inputs(3, jnp.float32)
    jacobian = jax.jit(jax.jacobian(lambda u: mixer(u[None])[0][0, -1]))(u[0])  # [channel, token, channel]
    reached = np.any(jacobian, axis=(0, 2))
    chex.assert_trees_all_equal(reached, np.arange(9) > 9 - 1 - 3)


def test_mqar_sizes():
    """Each of four layers: a projection and a filter, both with biases, and a norm; no channel mixer."""
    stack = jax.eval_shape(lambda: zoo.Stack(PRESETS["mqar"], rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(stack))
    assert count == 4 * (64 * 64 + 64 + 64 + 2 * 64) + 2 * (3 + 64) * 64 + 2 * 64


def test_refuses_no_taps():
    with pytest.raises(ValueError, match="taps: expected a positive number"):
        StackConfig(pattern=(BaseConvolutionConfig(0),))
