"""Gradients of gradients through the kernels of matrix memories: test-time memories need them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primitives import delta_rule, linear_attention


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("primitive", [linear_attention, delta_rule])
@pytest.mark.usefixtures("tpu_interpreter")
def test_gradients_of_gradients(primitive, channels):
    rng = np.random.default_rng(0)
    shape = 1, 20, 2, 16
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3))
    k /= jnp.linalg.norm(k, axis=-1, keepdims=True)
    g = -jnp.asarray(rng.random(shape if channels else shape[:3]), jnp.float32)
    beta = [jnp.asarray(rng.random(shape[:3]), jnp.float32)] if primitive is delta_rule else []
    ids = jnp.asarray(np.arange(20)[None] // 7, jnp.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def second(implementation, *inputs):
        def loss(*inputs):
            outputs, state = primitive(*inputs, segment_ids=ids, implementation=implementation)
            return jnp.sum(jnp.sin(outputs)) + jnp.sum(state.memory**2)

        every = tuple(range(len(inputs)))
        return jax.grad(lambda *x: sum(jnp.sum(dx**2) for dx in jax.grad(loss, every)(*x)), every)(*inputs)

    inputs = q, k, v, *beta, g
    for got, want in zip(second("pallas", *inputs), second("sequential", *inputs), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.max(np.abs(want)))
