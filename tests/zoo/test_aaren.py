"""The mixers against their papers: parameter counts, definitions, and what follows from them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from primitives import rotary
from zoo.token_mixers import aaren, transformer


def count(build):
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(build)))


@pytest.mark.parametrize(("presets", "parameters"), [(aaren.PRESETS, 3_152_896), (transformer.PRESETS, 3_152_384)])
def test_parameters_of_the_paper(presets, parameters):
    config = presets["paper"]
    assert count(lambda: zoo.Block(config, *config.pattern, 0, rngs=nnx.Rngs(0))) == parameters


def test_one_vector_more_than_the_transformer_in_every_preset():
    for name, config in aaren.PRESETS.items():
        sizes = [count(lambda c=c: zoo.Stack(c, rngs=nnx.Rngs(0))) for c in (config, transformer.PRESETS[name])]
        assert sizes[0] - sizes[1] == config.layers * config.width


def mixer_and_inputs(kind, dtype=jnp.float64, **options):
    stack = zoo.StackConfig(width=8, pattern=(kind(heads=2, **options),))
    mixer = jax.tree.map(lambda x: (2 * x + 0.1).astype(dtype), stack.pattern[0].mixer(stack, 0, rngs=nnx.Rngs(0)))
    return mixer, jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 8)), dtype)


def split(x):
    return x.reshape(*x.shape[:-1], 2, 4)


def test_aaren_is_attention_with_a_learned_query():
    """With keys formed and all pairs compared, as the paper writes it."""
    with jax.enable_x64(True):
        mixer, x = mixer_and_inputs(zoo.AarenConfig)
        query, keys, values = split(mixer.query(mixer.learned_query[...])), split(mixer.key(x)), split(mixer.value(x))
        s = jnp.einsum("hd,bthd->bht", query, keys) / 2
        s = jnp.where(jnp.tril(jnp.ones((7, 7), bool)), s[:, :, None, :], -jnp.inf)
        expected = mixer.output(jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(s), values).reshape(x.shape))
        chex.assert_trees_all_close(mixer(x)[0], expected, rtol=0, atol=1e-13)


def test_aaren_is_a_gated_moving_average():
    """Equations.md A.3: o_t = o_{t−1} + g_t (v_t − o_{t−1}) with g_t = exp(s_t) / Σ_{i≤t} exp(s_i)."""
    with jax.enable_x64(True):
        mixer, x = mixer_and_inputs(zoo.AarenConfig)
        weights, values, o = jnp.exp(mixer.logits(x)), split(mixer.value(x)), 0
        for t in range(x.shape[1]):
            gate = weights[:, t] / weights[:, : t + 1].sum(axis=1)
            o = o + gate[..., None] * (values[:, t] - o)
        chex.assert_trees_all_close(mixer(x)[0][:, -1], mixer.output(o.reshape(2, 8)), rtol=0, atol=1e-13)


def test_aaren_forgets_the_order_of_a_prefix_and_the_transformer_does_not():
    for kind, same in ((zoo.AarenConfig, True), (zoo.SelfAttentionConfig, True)):
        mixer, x = mixer_and_inputs(kind, jnp.float32)
        swapped = x.at[:, :2].set(x[:, 1::-1])
        assert jnp.allclose(mixer(x)[0][:, 2:], mixer(swapped)[0][:, 2:], atol=1e-5) == same
    mixer, x = mixer_and_inputs(zoo.SelfAttentionConfig, jnp.float32, rotary=True)
    assert not jnp.allclose(mixer(x)[0][:, 2:], mixer(x.at[:, :2].set(x[:, 1::-1]))[0][:, 2:], atol=1e-3)


def test_transformer_is_multi_head_attention():
    with jax.enable_x64(True):
        mixer, x = mixer_and_inputs(zoo.SelfAttentionConfig)
        q, k, v = map(split, jnp.split(mixer.query_key_value(x), 3, axis=-1))
        s = jnp.where(jnp.tril(jnp.ones((7, 7), bool)), jnp.einsum("bthd,bshd->bhts", q, k) / 2, -jnp.inf)
        expected = mixer.output(jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(s), v).reshape(x.shape))
        chex.assert_trees_all_close(mixer(x)[0], expected, rtol=0, atol=1e-13)


def test_rotary_logits_depend_on_distances_only():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 2, 4)), jnp.float32)

    def logits(positions):
        return jnp.einsum("bthd,bshd->bhts", *(rotary(x, positions[None]),) * 2)

    chex.assert_trees_all_close(logits(jnp.arange(6)), logits(jnp.arange(6) + 100), atol=1e-4)
    assert not jnp.allclose(logits(jnp.arange(6)), logits(2 * jnp.arange(6)), atol=1e-2)
