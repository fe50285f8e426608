"""Gated linear attention against its paper: the parallel form with products of gates, and its parameters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from zoo.layers import StackConfig
from zoo.token_mixers.gated_linear_attention import PRESETS, GatedLinearAttentionConfig


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_parallel_form():
    """o_t = Σ_{s≤t} ⟨q_t ⊙ α_{s+1} ⊙ … ⊙ α_t, k_s⟩ v_s / √d_k, with gates α = σ(W_2 W_1 x + b)^{1/16}."""
    with jax.enable_x64(True):
        stack = StackConfig(width=16, pattern=(GatedLinearAttentionConfig(2, rank=3),))
        mixer = stack.pattern[0].mixer(stack, 0, rngs=nnx.Rngs(0))
        # Larger weights than initial ones: gates that matter, and biases and norms that are not trivial.
        mixer = jax.tree.map(lambda leaf: (2 * leaf + 0.1).astype(jnp.float64), mixer)
        x = np.random.default_rng(0).normal(size=(2, 9, 16))
        weights = {name: np.asarray(getattr(mixer, name).kernel[...]) for name in ("query", "key", "value", "output")}
        q, k, v = ((x @ weights[name]).reshape(2, 9, 2, -1) for name in ("query", "key", "value"))
        low, high = mixer.decay_in.kernel[...], mixer.decay_out.kernel[...]
        gates = sigmoid(np.asarray((x @ low) @ high + mixer.decay_out.bias[...])).reshape(2, 9, 2, 4) ** (1 / 16)
        o = np.zeros((2, 9, 2, 8))
        for t in range(9):
            for s in range(t + 1):
                between = np.prod(gates[:, s + 1 : t + 1], axis=1)
                o[:, t] += np.sum(q[:, t] * between * k[:, s], axis=-1, keepdims=True) / 2 * v[:, s]
        o = o / np.sqrt(np.mean(o**2, axis=-1, keepdims=True) + 1e-6) * np.asarray(mixer.norm.scale[...])
        gate = np.asarray(x @ mixer.gate.kernel[...] + mixer.gate.bias[...])
        expected = (gate * sigmoid(gate) * o.reshape(2, 9, 16)) @ weights["output"]
        chex.assert_trees_all_close(mixer(jnp.asarray(x))[0], expected, rtol=0, atol=1e-11)


def count(module):
    return sum(leaf.size for leaf in jax.tree.leaves(module))


@pytest.mark.parametrize(("size", "stated"), [("340m", 340e6), ("1.3b", 1.3e9)])
def test_parameters(size, stated):
    """4 width² and 24 width of low rank in the layer (§4.4); with 32,000 tokens embedded once, the names of presets."""
    config = PRESETS[size]
    width = config.width
    block = jax.eval_shape(lambda: zoo.Block(config, *config.pattern, 0, rngs=nnx.Rngs(0)))
    assert count(block.mixer) == 4 * width**2 + 24 * width + (width + width // 2 + width // 4)
    assert abs(config.layers * count(block) + 32_000 * width - stated) < 0.01 * stated


def test_heads_divide_keys_too():
    with pytest.raises(ValueError, match="heads: expected a divisor of the width"):
        StackConfig(width=12, pattern=(GatedLinearAttentionConfig(4),))
