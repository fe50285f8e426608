import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primitives import delta_rule, linear_attention
from primitives.testing import assert_close, row_errors


def example(time=70, heads=2, dim=8, seed=0):
    generator = np.random.default_rng(seed)
    q, k, v = generator.normal(size=(3, 2, time, heads, dim))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = 2 * generator.uniform(size=(2, time, heads))
    return q, k, v, beta, -generator.exponential(size=(2, time, heads, dim))


@jax.enable_x64(True)
@pytest.mark.parametrize("channels", [False, True])
def test_equals_a_loop_in_numpy(channels):
    q, k, v, beta, g = example()
    decay = np.exp(g if channels else np.broadcast_to(g[..., :1], g.shape))
    memory = np.zeros((2, 2, 8, 8))
    expected = np.zeros_like(v)
    for t in range(q.shape[1]):
        for row in range(2):
            for head in range(2):
                key = k[row, t, head]
                erase = np.eye(8) - beta[row, t, head] * np.outer(key, key)
                memory[row, head] = erase @ (decay[row, t, head][:, None] * memory[row, head])
                memory[row, head] += beta[row, t, head] * np.outer(key, v[row, t, head])
                expected[row, t, head] = memory[row, head].T @ q[row, t, head] / np.sqrt(8)
    inputs = (jnp.asarray(x) for x in (q, k, v, beta, g if channels else g[..., 0]))
    outputs, state = delta_rule(*inputs)
    assert_close((outputs, state.memory), (expected, memory), "float64", "delta rule")


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_equal_keys_and_full_steps_are_stable(beta):
    """With β = 2 each step is a reflection; powers of the overlaps alone would reach 2⁶⁴ in a chunk."""
    q, k, v, *_ = example(time=400)
    k = np.broadcast_to(k[:, :1], k.shape)
    inputs = [x.astype(np.float32) for x in (q, k, v, np.full(k.shape[:3], beta))]
    with jax.enable_x64(True):
        exact = delta_rule(*(jnp.asarray(x, jnp.float64) for x in inputs), implementation="sequential")[0]
    sequential = delta_rule(*map(jnp.asarray, inputs), implementation="sequential")[0]
    chunked = delta_rule(*map(jnp.asarray, inputs), implementation="chunked", chunk_size=64)[0]
    rounding, _ = row_errors(np.asarray(sequential), np.asarray(exact))
    error, _ = row_errors(np.asarray(chunked), np.asarray(exact))
    assert 0 < error < 10 * rounding < 1e-3


@jax.enable_x64(True)
def test_what_was_written_is_read():
    """With β = 1 a key retrieves what it was last written with; orthonormal keys do not disturb each other."""
    generator = np.random.default_rng(0)
    keys = np.linalg.qr(generator.normal(size=(8, 8)))[0]
    order = generator.integers(8, size=50)
    k, v = jnp.asarray(keys[order])[None, :, None], jnp.asarray(generator.normal(size=(1, 50, 1, 4)))
    outputs, _ = delta_rule(k, k, v, jnp.ones((1, 50, 1)), scale=1.0)
    np.testing.assert_allclose(outputs, v, atol=1e-12)


@jax.enable_x64(True)
def test_orthonormal_keys_once_each_make_it_linear_attention():
    generator = np.random.default_rng(0)
    k = jnp.asarray(np.linalg.qr(generator.normal(size=(8, 8)))[0])[None, :, None]
    q, v = (jnp.asarray(generator.normal(size=(1, 8, 1, 8))) for _ in range(2))
    expected, state = linear_attention(q, k, v)
    outputs, other = delta_rule(q, k, v, jnp.ones((1, 8, 1)))
    assert_close((outputs, other.memory), (expected, state.memory), "float64", "orthonormal keys")


def test_the_reverse_pass_keeps_no_state_per_token():
    def temporaries(implementation):
        inputs = [jax.ShapeDtypeStruct((1, 8192, 2, 64), jnp.float32)] * 3
        inputs += [jax.ShapeDtypeStruct((1, 8192, 2), jnp.float32)] * 2
        loss = lambda *x: jnp.sum(delta_rule(*x, implementation=implementation)[0])  # noqa: E731
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4))).lower(*inputs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    states = 8192 * 2 * 64 * 64 * 4
    assert temporaries("chunked") < states / 10
    assert temporaries("sequential") > states
