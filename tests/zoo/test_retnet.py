"""RetNet against its paper: the parallel form with complex rotations and a mask of decays, and its parameters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from zoo.layers import StackConfig
from zoo.token_mixers.retnet import PRESETS, RetentionConfig, decays


def test_parallel_form():
    """Retention(X) = (Q Kᵀ ⊙ D) V with D_ts = γ^{t−s}, Q ⊙ e^{itθ} and K ⊙ e^{−itθ} (equation 5)."""
    with jax.enable_x64(True):
        stack = StackConfig(width=8, pattern=(RetentionConfig(2),))
        mixer = stack.pattern[0].mixer(stack, 0, rngs=nnx.Rngs(0))
        mixer = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), mixer)
        x = np.random.default_rng(0).normal(size=(2, 9, 8))
        q, k, v, gate, w = (
            np.asarray(p.kernel[...]) for p in (mixer.query, mixer.key, mixer.value, mixer.gate, mixer.output)
        )
        turns = np.exp(1j * np.arange(9)[:, None, None] * 10000.0 ** (-2 * np.arange(2) / 4))
        q, k = ((y[..., :2] + 1j * y[..., 2:]) * turns for y in ((x @ p).reshape(2, 9, 2, 4) for p in (q, k)))
        distance = np.arange(9)[:, None] - np.arange(9)
        mask = np.tril((1 - 2.0 ** -np.array([5, 6]))[:, None, None] ** np.maximum(distance, 0))
        scores = np.einsum("bthc,bshc->bhts", q, k.conj()).real / 2 * mask
        o = np.einsum("bhts,bshv->bthv", scores, (x @ v).reshape(2, 9, 2, 8))
        o = (o - o.mean(-1, keepdims=True)) / np.sqrt(o.var(-1, keepdims=True) + 1e-6)
        gate = x @ gate
        expected = (gate / (1 + np.exp(-gate)) * o.reshape(2, 9, 16)) @ w
        chex.assert_trees_all_close(mixer(jnp.asarray(x))[0], expected, rtol=0, atol=1e-12)


def test_decays():
    np.testing.assert_allclose(decays(8), 1 - 2.0 ** (-5 - np.arange(8)), rtol=1e-15)
    np.testing.assert_allclose(decays(3, 512), [1 - 1 / 32, 1 - 1 / 128, 1 - 1 / 512], rtol=1e-15)
    with pytest.raises(ValueError, match="longest: expected at least 32"):
        StackConfig(pattern=(RetentionConfig(longest=16),))
    with pytest.raises(ValueError, match="heads of even size"):
        StackConfig(width=6, pattern=(RetentionConfig(2),))


@pytest.mark.parametrize("size", ["1.3b", "2.7b", "6.7b"])
def test_a_block_has_the_parameters_of_a_transformers(size):
    """8 width² in retention, 4 width² in the feed-forward (§3.1), heads of 256."""
    config = PRESETS[size]
    block = jax.eval_shape(lambda: zoo.Block(config, *config.pattern, 0, rngs=nnx.Rngs(0)))
    mixer, feed_forward = (sum(x.size for x in jax.tree.leaves(part)) for part in (block.mixer, block.feed_forward))
    assert (mixer, feed_forward) == (8 * config.width**2, 4 * config.width**2)
    assert config.width == 256 * config.pattern[0].heads
