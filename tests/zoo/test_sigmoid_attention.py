"""Sigmoid attention against its paper: the equation, the bias, the stabilisers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo.layers import StackConfig
from zoo.token_mixers.sigmoid_attention import SigmoidAttentionConfig


def mixer_and_inputs(**options):
    config = SigmoidAttentionConfig(heads=2, context=7, **options)
    mixer = config.mixer(StackConfig(width=8, pattern=(config,)), 0, rngs=nnx.Rngs(0))
    mixer = jax.tree.map(lambda x: x.astype(jnp.float64), mixer)
    return mixer, jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 8)))


def definition(mixer, x, bias, norm=lambda heads: heads):
    q, k, v = (y.reshape(2, 7, 2, 4) for y in jnp.split(mixer.query_key_value(x), 3, axis=-1))
    s = jnp.einsum("bthd,bshd->bhts", norm(q), norm(k)) / 2 + bias
    outputs = jnp.einsum("bhts,bshd->bthd", jnp.tril(1 / (1 + jnp.exp(-s))), v)
    return mixer.output(outputs.reshape(x.shape))


def test_equation():
    with jax.enable_x64(True):
        mixer, x = mixer_and_inputs()
        chex.assert_trees_all_close(mixer(x)[0], definition(mixer, x, -np.log(7)), rtol=0, atol=1e-12)


def test_stabilisers():
    """Norms of queries and keys, the outer norm of the hybrid norm, and a factor for each channel of the output."""
    with jax.enable_x64(True):
        mixer, x = mixer_and_inputs(query_key_norm=True, output_norm=True, layer_scale=0.1)

        def standardised(y):
            return (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True) + 1e-6)

        expected = 0.1 * standardised(definition(mixer, x, -np.log(7), standardised))
        chex.assert_trees_all_close(mixer(x)[0], expected, rtol=0, atol=1e-7)  # 0.1 is one of float32


def test_rotary_tells_the_order():
    with jax.enable_x64(True):
        for rotary in (False, True):
            mixer, x = mixer_and_inputs(rotary=rotary)
            swapped = x.at[:, :2].set(x[:, 1::-1])
            assert jnp.allclose(mixer(x)[0][:, 2:], mixer(swapped)[0][:, 2:], atol=1e-10) != rotary


def test_refusals():
    with pytest.raises(ValueError, match="context: expected a positive number"):
        StackConfig(pattern=(SigmoidAttentionConfig(context=0),))
    with pytest.raises(ValueError, match="rotary: expected heads of even size, got 1"):
        StackConfig(width=4, pattern=(SigmoidAttentionConfig(heads=4, rotary=True),))
