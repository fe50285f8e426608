"""MoH against its paper: plain attention as a special case, the two-stage gates, the load balance loss."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from primitives import causal_attention
from zoo.layers import StackConfig, merge_heads, split_heads
from zoo.states import grow_state
from zoo.token_mixers.mixture_of_head_attention import MixtureOfHeadAttentionConfig, load_balance_loss

E = 4  # routed heads


def mixer_and_inputs(active=2, shared=2, routers=3.0):
    config = MixtureOfHeadAttentionConfig(heads=E + shared, shared=shared, active=active, rotary=False)
    mixer = config.mixer(StackConfig(width=4 * (E + shared), pattern=(config,)), 0, rngs=nnx.Rngs(0))
    mixer = jax.tree.map(lambda x: x.astype(jnp.float64), mixer)
    for router in (mixer.stage_router, mixer.routed_router, mixer.shared_router):
        if router is not None:
            router.kernel[...] *= routers
    return mixer, jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 4 * (E + shared))))


def heads_of(mixer, x):
    q, k, v = (split_heads(y, mixer.heads) for y in jnp.split(mixer.query_key_value(x), 3, axis=-1))
    return causal_attention(q, k, v)[0]


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum()


def gates_of(mixer, x):
    """Token by token, as the paper's sheet writes them."""
    gates, probabilities = np.zeros((*x.shape[:2], mixer.heads)), np.zeros((*x.shape[:2], E))
    for index in np.ndindex(*x.shape[:2]):
        token = np.asarray(x[index])
        stage = 2 * softmax(token @ mixer.stage_router.kernel)
        p = probabilities[index] = softmax(token @ mixer.routed_router.kernel)
        top = np.argsort(p)[-mixer.active :]
        gates[index][: mixer.shared] = stage[0] * mixer.shared * softmax(token @ mixer.shared_router.kernel)
        gates[index][mixer.shared + top] = stage[1] * mixer.active * p[top] / p[top].sum()
    return gates, probabilities


def test_all_heads_active_with_unit_gates_are_attention():
    with jax.enable_x64(True):
        for shared in (1, 2):
            mixer, x = mixer_and_inputs(active=E, shared=shared, routers=0.0)
            expected = mixer.output(merge_heads(heads_of(mixer, x)))
            chex.assert_trees_all_close(mixer(x)[0], expected, rtol=0, atol=1e-12)


def test_gates():
    with jax.enable_x64(True):
        mixer, x = mixer_and_inputs()
        gates, _ = gates_of(mixer, x)
        assert np.all((gates > 0).sum(-1) == mixer.shared + mixer.active)
        chex.assert_trees_all_close(np.asarray(mixer.gates(x)[0]), gates, rtol=0, atol=1e-12)
        expected = mixer.output(merge_heads(heads_of(mixer, x) * gates[..., None]))
        chex.assert_trees_all_close(mixer(x)[0], expected, rtol=0, atol=1e-12)


def test_load_balance_loss():
    """E² mean(me ce) over tokens that are no padding, however they came."""
    with jax.enable_x64(True):
        mixer, x = mixer_and_inputs()
        ids = jnp.asarray([[0, 0, 0, 1, 1, 1, -1, -1, -1], [-1, 0, 0, 0, 0, 2, 2, 2, 2]])
        gates, probabilities = gates_of(mixer, x)
        real = np.asarray(ids) >= 0
        me, ce = probabilities[real].mean(0), (gates[real][:, mixer.shared :] > 0).mean(0)
        expected = E**2 * np.mean(me * ce)
        _, whole = mixer(x, segment_ids=ids)
        _, state = mixer(x[:, :4], segment_ids=ids[:, :4])
        _, state = mixer(x[:, 4:], grow_state(state, 9), segment_ids=ids[:, 4:])
        np.testing.assert_allclose(load_balance_loss(whole), expected, rtol=1e-12)
        np.testing.assert_allclose(load_balance_loss(state), expected, rtol=1e-12)
        stacked = jax.tree.map(lambda x: jnp.stack([x, x]), whole)
        np.testing.assert_allclose(load_balance_loss(stacked), [expected] * 2, rtol=1e-12)


def test_the_loss_trains_its_router_alone_and_is_least_where_the_load_is_even():
    with jax.enable_x64(True):
        mixer, x = mixer_and_inputs()
        gradients = jax.grad(lambda mixer: load_balance_loss(mixer(x)[1]))(mixer)
        assert jnp.all(jnp.any(gradients.routed_router.kernel[...] != 0, axis=0))
        assert not jnp.any(gradients.query_key_value.kernel[...])
        assert not jnp.any(gradients.stage_router.kernel[...])
        balance = mixer(x)[1].balance
        state = mixer(x)[1]._replace(
            balance=balance._replace(
                probabilities=jnp.full((2, E), 9 / E), chosen=jnp.full((2, E), 9 * mixer.active / E)
            )
        )
        np.testing.assert_allclose(load_balance_loss(state), mixer.active, rtol=1e-12)
        assert load_balance_loss(mixer(x)[1]) > load_balance_loss(state)


def test_refusals():
    with pytest.raises(ValueError, match="shared: expected a number from 1 to 7, got 8"):
        StackConfig(pattern=(MixtureOfHeadAttentionConfig(shared=8),))
    with pytest.raises(ValueError, match="active: expected a number from 1 to 6, got 7"):
        StackConfig(pattern=(MixtureOfHeadAttentionConfig(active=7),))
