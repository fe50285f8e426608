import jax
import jax.numpy as jnp
import numpy as np

from primitives import delta_rule


def test_a_fresh_state_is_no_constant_to_the_compiler():
    """One chunk from nothing, and a sum of squares in the same program: XLA's fusion of both read unwritten memory."""
    k, v = np.random.default_rng(0).normal(size=(2, 8, 20, 1, 32)).astype(np.float32)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)

    def error(k, v, implementation):
        _, state = delta_rule(k, k, v, jnp.full(k.shape[:3], 0.6), scale=1.0, implementation=implementation)
        return jnp.sum((jnp.einsum("bhkv,bthk->bthv", state.memory, k) - v) ** 2, axis=(2, 3))

    chunked, sequential = (jax.jit(error, static_argnums=2)(k, v, name) for name in ("chunked", "sequential"))
    np.testing.assert_allclose(chunked, sequential, rtol=1e-4)
