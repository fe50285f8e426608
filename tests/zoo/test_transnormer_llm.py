"""TransNormerLLM against its paper: the layer as sums over pairs of tokens, the decays, the table of variants."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from primitives import linear_attention
from zoo.layers import StackConfig
from zoo.token_mixers.transnormer_llm import PRESETS, TransNormerConfig

TABLE = {  # parameters of the paper's variants, and what we cannot explain of them
    "385m": (384_974_848, 36_864),
    "1b": (992_165_888, 0),
    "3b": (2_876_006_400, 0),
    "7b": (6_780_547_072, 0),
    "13b": (12_620_195_840, 0),
    "65b": (63_528_009_728, 0),
    "175b": (173_356_498_944, 0),
}


def mixer_and_inputs(layer, lrpe, layers=4, time=9):
    stack = StackConfig(width=8, layers=layers, pattern=(TransNormerConfig(2, lrpe=lrpe),))
    mixer = stack.pattern[0].mixer(stack, layer, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, time, 8))
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), mixer), jnp.asarray(x)


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize(("layer", "lrpe"), [(0, True), (0, False), (3, True)])
def test_pairs_of_tokens(layer, lrpe):
    """SRMSNorm(Σ_{s≤t} λ^{t−s} Σ_c q_tc k_sc cos((t−s) θ_c) v_s) ⊙ u_t, with λ from the formula."""
    with jax.enable_x64(True):
        mixer, x = mixer_and_inputs(layer, lrpe)
        q, k, v, u, w = (
            np.asarray(p.kernel[...]) for p in (mixer.query, mixer.key, mixer.value, mixer.gate, mixer.output)
        )
        q, k, v = (y.reshape(2, 9, 2, 4) for y in (silu(x @ q), silu(x @ k), x @ v))
        distance = np.arange(9)[:, None] - np.arange(9)
        theta = np.asarray(mixer.theta[...]) if lrpe else np.zeros((2, 4))
        decay = np.exp(-8 * np.array([1, 2]) / 2 * (1 - layer / 4))
        factor = np.tril(decay[:, None, None] ** np.maximum(distance, 0))[..., None]
        factor = factor * np.cos(distance[..., None] * theta[:, None, None])
        o = np.einsum("bthc,bshc,htsc,bshv->bthv", q, k, factor, v).reshape(2, 9, 8)
        o = o / np.sqrt(np.mean(o**2, axis=-1, keepdims=True) + 1e-6)
        chex.assert_trees_all_close(mixer(x)[0], (o * (x @ u)) @ w, rtol=0, atol=1e-12)


def test_the_first_layer_forgets_fastest_and_the_last_remembers_longest():
    stack = PRESETS["175b"]
    mixers = [
        stack.pattern[0].mixer(StackConfig(96, stack.layers, stack.pattern), n, rngs=nnx.Rngs(0)) for n in (0, 87)
    ]
    first, last = (np.exp(mixer.log_decay[...]) for mixer in mixers)
    np.testing.assert_allclose(first[[0, -1]], np.exp([-8 / 96, -8]), rtol=1e-6)
    np.testing.assert_allclose(last[[0, -1]], np.exp([-8 / 96 / 88, -8 / 88]), rtol=1e-6)


def test_robust_inference_at_the_fastest_decay():
    """λ = e⁻⁸: all at once is the recurrence, where the factors λ^t and λ^{−t} of the plain form leave float32."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 200, 1, 4)).astype(np.float32) for _ in range(3))
    outputs, state = linear_attention(q, k, v, jnp.full(1, -8.0), scale=1.0)
    memory, expected = np.zeros((4, 4)), []
    for t in range(200):
        memory = np.exp(-8) * memory + np.outer(k[0, t, 0], v[0, t, 0])
        expected.append(memory.T @ q[0, t, 0])
    chex.assert_trees_all_close(outputs[0, :, 0], np.float32(expected), rtol=0, atol=1e-5)
    chex.assert_trees_all_close(state.memory[0, 0], np.float32(memory), rtol=0, atol=1e-5)
    with np.errstate(over="ignore"):
        assert np.isinf(np.exp(np.float32(8 * 199)))


def test_no_gradient_reaches_the_decay():
    with jax.enable_x64(True):
        mixer, x = mixer_and_inputs(1, lrpe=True)
        gradient = jax.grad(lambda mixer: jnp.sum(mixer(x)[0] ** 2))(mixer)
    assert not np.any(gradient.log_decay[...])
    assert np.any(gradient.theta[...])


@pytest.mark.parametrize("size", TABLE)
def test_the_table_of_variants(size):
    """With width / 2 angles in each layer instead of `width` in the first, and 50,272 tokens embedded once."""
    config, (stated, unexplained) = PRESETS[size], TABLE[size]
    stack = jax.eval_shape(lambda: zoo.Stack(config, rngs=nnx.Rngs(0)))
    ours = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(stack, nnx.Param)))
    assert ours - config.width + config.layers * config.width // 2 + 50_272 * config.width == stated - unexplained
    assert config.width == 128 * config.pattern[0].heads
    assert config.hidden == -(-8 * config.width // 768) * 256
