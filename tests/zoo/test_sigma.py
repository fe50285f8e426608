"""DiffQKV attention against its paper: grouped-query attention as a special case, augmented queries, the cache."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo.layers import StackConfig
from zoo.states import init_state, state_bytes
from zoo.token_mixers.sigma import PRESETS, DiffQKVAttentionConfig
from zoo.token_mixers.transformer import SelfAttentionConfig


def build(config, width=16, dtype=jnp.float64):
    mixer = config.mixer(StackConfig(width=width, pattern=(config,)), 0, rngs=nnx.Rngs(0))
    return jax.tree.map(lambda x: x.astype(dtype), mixer)


@pytest.mark.parametrize("rotary", [False, True])
def test_as_many_keys_as_values_are_grouped_query_attention(rotary):
    with jax.enable_x64(True):
        mixer = build(DiffQKVAttentionConfig(4, 2, 2, rotary=rotary))
        baseline = build(SelfAttentionConfig(4, 2, rotary=rotary, biases=False))
        kernels = (mixer.query.kernel[...], mixer.key.kernel[...], mixer.value.kernel[...])
        baseline.query_key_value.kernel[...] = jnp.concatenate(kernels, axis=1)
        baseline.output.kernel[...] = mixer.output.kernel[...]
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 16)))
        chex.assert_trees_all_close(mixer(x), baseline(x), rtol=0, atol=1e-12)


def test_fewer_keys_than_values_and_augmented_queries():
    """A loop over heads; queries and keys of half the channels."""
    with jax.enable_x64(True):
        mixer = build(DiffQKVAttentionConfig(8, 2, 4, key_dim=2, query_hidden=24, rotary=False), width=32)
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 32)))
        inner = x @ mixer.query_inner.kernel[...]
        q = (inner / (1 + jnp.exp(-inner))) @ mixer.query.kernel[...]
        k, v = x @ mixer.key.kernel[...], x @ mixer.value.kernel[...]
        heads = []
        for h in range(8):
            key, value = h // 4, h // 2
            s = jnp.einsum("btd,bsd->bts", q[..., 2 * h : 2 * h + 2], k[..., 2 * key : 2 * key + 2]) / 2**0.5
            p = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((7, 7), bool)), s, -jnp.inf))
            heads.append(p @ v[..., 4 * value : 4 * value + 4])
        expected = jnp.concatenate(heads, axis=-1) @ mixer.output.kernel[...]
        chex.assert_trees_all_close(mixer(x)[0], expected, rtol=0, atol=1e-12)


def test_the_cache_of_the_paper_is_three_eighths_smaller():
    """4 heads of keys and 16 of values against 16 of both: −37.5 %; with keys of half the size −43.75 %."""

    def cache(**options):
        mixer = build(DiffQKVAttentionConfig(heads=32, value_heads=16, **options), 128, jnp.float32)
        state = init_state(mixer, jnp.zeros((1, 1, 128)), capacity=10)
        return state.keys.nbytes + state.values.nbytes, state_bytes(state).allocated

    grouped, _ = cache(key_heads=16)
    compressed, everything = cache(key_heads=4)
    assert compressed == grouped * (1 - 0.375)
    assert cache(key_heads=4, key_dim=2)[0] == grouped * (1 - 0.4375)
    assert everything == compressed + 3 * 4


def test_parameters_of_the_example():
    """Our count of what the equations say: a query path through 3072, keys of 4 × 64, values of 16 × 64, an output."""
    stack = PRESETS["1.5b"]
    mixer = jax.eval_shape(lambda: stack.pattern[0].mixer(stack, 0, rngs=nnx.Rngs(0)))
    sizes = 2048 * 3072 + 3072 * 2048 + 2048 * 4 * 64 + 2048 * 16 * 64 + 2048 * 2048
    assert sum(leaf.size for leaf in jax.tree.leaves(mixer)) == sizes


def test_refusals():
    for options, message in (
        ({"value_heads": 3}, "value_heads: expected a divisor of the 4 heads, got 3"),
        ({"key_heads": 4}, "key_heads: expected a divisor of the 2 heads, got 4"),
        ({"key_dim": 3}, "rotary: expected heads of even size, got 3"),
        ({"query_hidden": 0}, "query_hidden: expected a positive number, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            StackConfig(pattern=(DiffQKVAttentionConfig(**options),))
