"""Flowformer's two modules against their formulas in NumPy, and what makes them different."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import zoo
from zoo.token_mixers.flowformer import CausalFlowAttentionConfig, FlowAttention

EPSILON = 1e-6


def modules_and_inputs(time=9, width=8):
    config = CausalFlowAttentionConfig(heads=2)
    stack = zoo.StackConfig(width=width, pattern=(config,))
    causal = config.mixer(stack, 0, rngs=nnx.Rngs(0))
    whole = FlowAttention(config, stack, rngs=nnx.Rngs(0))
    modules = jax.tree.map(lambda x: (3 * x + 0.1).astype(jnp.float64), (causal, whole))
    return *modules, np.random.default_rng(0).normal(size=(2, time, width))


@jax.jit
def run(module, x):
    return module(x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference(mixer, x, causal):
    """With sums over what each token sees."""
    kernel, bias = np.asarray(mixer.query_key_value.kernel), np.asarray(mixer.query_key_value.bias)
    q, k, v = np.split((x @ kernel + bias).reshape(*x.shape[:2], 6, -1), 3, axis=2)
    q, k, seen = sigmoid(q), sigmoid(k), np.tri(x.shape[1]) if causal else np.ones((x.shape[1],) * 2)
    number = seen.sum(axis=1)[:, None, None]
    n = number if causal else 1

    def total(y):
        return np.einsum("ts,bshd->bthd", seen, y)

    def flow(a, b):
        return np.sum((a + EPSILON) * (b + EPSILON), axis=-1, keepdims=True) / n

    incoming, outgoing = flow(q, total(k)), flow(k, total(q))
    sink, source = flow(q, total(k / outgoing)), flow(k, total(q / incoming))
    weights = np.exp(source if causal else np.minimum(source, 1))
    scores = np.einsum("bthk,bshk,ts->bths", q, k, seen) / (n * incoming)
    y = sigmoid(sink) * np.einsum("bths,bshv->bthv", scores, number * weights / total(weights) * v)
    return y.reshape(x.shape) @ np.asarray(mixer.output.kernel) + np.asarray(mixer.output.bias)


@jax.enable_x64(True)
def test_modules_equal_the_formulas():
    causal, whole, x = modules_and_inputs()
    outputs, state = run(causal, x)
    chex.assert_trees_all_close(outputs, reference(causal, x, True), atol=1e-11)
    chex.assert_trees_all_close(run(whole, x), reference(whole, x, False), atol=1e-11)
    chex.assert_trees_all_equal(state.tokens, jnp.array([9, 9]))


@jax.enable_x64(True)
def test_only_the_causal_form_is_causal():
    causal, whole, x = modules_and_inputs()
    changed = x + np.where(np.arange(9) < 5, 0, 1)[:, None]
    chex.assert_trees_all_equal(run(causal, x)[0][:, :5], run(causal, changed)[0][:, :5])
    difference = run(whole, x)[:, :5] - run(whole, changed)[:, :5]
    assert float(jnp.min(jnp.max(jnp.abs(difference), axis=-1))) > 1e-3
