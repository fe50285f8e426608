"""LightNet against its equations; what its encodings depend on; and that one scan sees everything."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from primitives import prefix_scan_attention
from zoo.layers import StackConfig
from zoo.token_mixers import lightnet
from zoo.token_mixers.lightnet import GridLightNet, LightNetConfig, NonCausalLightNet, grid_positions

STACK = StackConfig(width=8, pattern=(LightNetConfig(heads=2),))


def build(kind, config, *arguments, dtype=jnp.float64, scale=2.0):
    module = kind(config, STACK, *arguments, rngs=nnx.Rngs(0))
    return jax.tree.map(lambda x: (scale * x + 0.1).astype(dtype), module)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def heads_of(linear, x):
    return (x @ np.asarray(linear.kernel[...])).reshape(*x.shape[:2], 2, 4)


def silu(x):
    return x / (1 + np.exp(-x))


def read_out(p, x, o):
    """y = W_o RMSNorm(o ⊙ σ(G_2 G_1 x))."""
    gate = 1 / (1 + np.exp(-(x @ np.asarray(p.gate_in.kernel[...]) @ np.asarray(p.gate_out.kernel[...]))))
    o = o.reshape(x.shape) * gate
    o = o / np.sqrt(np.mean(o**2, axis=-1, keepdims=True) + 1e-6) * np.asarray(p.norm.scale[...])
    return o @ np.asarray(p.output.kernel[...])


def test_recurrence():
    """The state after each token by its sum, softmax over the prefix in each channel; no recurrence."""
    with jax.enable_x64(True):
        mixer = build(lightnet.LightNet, LightNetConfig(heads=2))
        p, x = mixer.projections, normal(2, 9, 8)
        q, k, v = silu(heads_of(p.query, x)), heads_of(p.key, x), heads_of(p.value, x)
        o = np.zeros(v.shape)
        for t in range(9):
            weights = np.exp(k[:, : t + 1])
            weights /= weights.sum(axis=1, keepdims=True)
            o[:, t] = np.einsum("bhc,bihc,bihe->bhe", q[:, t], weights, v[:, : t + 1])
        outputs, state = jax.jit(mixer)(jnp.asarray(x))
        chex.assert_trees_all_close(outputs, read_out(p, x, o), rtol=0, atol=1e-12)
        log_sum = np.log(np.exp(k).sum(axis=1))
        chex.assert_trees_all_close(state.normaliser.log_sum, log_sum, rtol=0, atol=1e-12)


def test_rows_of_the_state_are_heads_of_aaren():
    with jax.enable_x64(True):
        mixer = build(lightnet.LightNet, LightNetConfig(heads=2), scale=20)
        x = jnp.asarray(normal(2, 9, 8))
        _, k, v = mixer.projections.inputs(x)
        _, state = jax.jit(mixer)(x)
        logits, values = k.reshape(2, 9, 8), jnp.broadcast_to(v[..., None, :], (2, 9, 2, 4, 4)).reshape(2, 9, 8, 4)
        attention, _ = prefix_scan_attention(logits, values)
    chex.assert_trees_all_close(state.memory.memory.reshape(2, 8, 4), attention[:, -1], rtol=0, atol=1e-12)


def test_tpe():
    """A sum with powers of the decay, normalised and projected; added to the input and to the output."""
    with jax.enable_x64(True):
        mixer = build(lightnet.LightNet, LightNetConfig(heads=2, tpe=True))
        tpe, x = mixer.tpe, normal(2, 9, 8)
        decay = 1 / (1 + np.exp(-np.asarray(tpe.decay[...])))
        weight = np.sum(np.asarray(tpe.query[...]) * np.asarray(tpe.key[...]), axis=-1, keepdims=True)
        values, average = x.reshape(2, 9, 2, 4), np.zeros((2, 9, 2, 4))
        for t in range(9):
            average[:, t] = weight * sum(decay ** (t - i) * values[:, i] for i in range(t + 1))
        average /= np.sqrt(np.mean(average**2, axis=-1, keepdims=True) + 1e-6)
        average *= np.asarray(tpe.norm.scale[...])
        encoding = average.reshape(2, 9, 8) @ np.asarray(tpe.output.kernel[...])
        plain = build(lightnet.LightNet, LightNetConfig(heads=2))
        plain.projections = mixer.projections
        run = jax.jit(lambda x, moved: (tpe(x)[0], mixer(x)[0], plain(moved)[0]))
        found = jax.tree.map(np.asarray, run(x, x + encoding))
    chex.assert_trees_all_close(found[0], encoding, rtol=0, atol=1e-12)
    chex.assert_trees_all_close(found[1], encoding + found[2], rtol=0, atol=1e-11)


def test_lrpe_in_the_mixer():
    """Weights of the plain mixer times the cosine of the difference of positions, channel by channel."""
    with jax.enable_x64(True):
        mixer = build(lightnet.LightNet, LightNetConfig(heads=2, lrpe=True))
        p, x = mixer.projections, normal(1, 7, 8)
        q, k, v = silu(heads_of(p.query, x)), heads_of(p.key, x), heads_of(p.value, x)
        theta, o = np.asarray(p.theta[...]), np.zeros(v.shape)
        for t in range(7):
            weights = np.exp(k[:, : t + 1])
            weights /= weights.sum(axis=1, keepdims=True)
            turned = weights * np.cos((t - np.arange(t + 1))[:, None, None] * theta)
            o[:, t] = np.einsum("bhc,bihc,bihe->bhe", q[:, t], turned, v[:, : t + 1])
        chex.assert_trees_all_close(jax.jit(mixer)(x)[0], read_out(p, x, o), rtol=0, atol=1e-12)


def test_md_lrpe_depends_on_differences_of_coordinates():
    with jax.enable_x64(True):
        p = build(NonCausalLightNet, LightNetConfig(heads=2, lrpe=True), 2).projections
        assert p.theta.shape == (2, 2)  # 4 channels of a head, 2 axes
        x, y = jnp.asarray(normal(1, 12, 2, 4)), jnp.asarray(normal(1, 12, 2, 4, seed=1))
        grid = grid_positions(1, 3, 4)
        assert grid[0, 5].tolist() == [1, 1]

        def products(positions):
            return jnp.einsum("bthd,bshd->bhts", p.rotate(x, positions), p.rotate(y, positions))

        here = products(grid)
        chex.assert_trees_all_close(products(grid + jnp.array([5, -2])), here, rtol=0, atol=1e-13)
        assert not np.allclose(products(grid * jnp.array([2, 1])), here, atol=1e-3)
        assert not np.allclose(products(grid * jnp.array([1, 2])), here, atol=1e-3)


def test_non_causal_is_one_softmax_over_all_tokens():
    with jax.enable_x64(True):
        mixer = build(NonCausalLightNet, LightNetConfig(heads=2))
        p, x = mixer.projections, normal(2, 9, 8)
        q, k, v = silu(heads_of(p.query, x)), heads_of(p.key, x), heads_of(p.value, x)
        weights = np.exp(k) / np.exp(k).sum(axis=1, keepdims=True)
        o = np.einsum("bthc,bihc,bihe->bthe", q, weights, v)
        run = jax.jit(mixer)
        outputs = run(x)
        chex.assert_trees_all_close(outputs, read_out(p, x, o), rtol=0, atol=1e-12)
        # The causal mixer agrees in the last token, which has seen all; and the order of tokens is nothing.
        causal = build(lightnet.LightNet, LightNetConfig(heads=2))
        causal.projections = p
        chex.assert_trees_all_close(jax.jit(causal)(x)[0][:, -1], outputs[:, -1], rtol=0, atol=1e-12)
        order = np.random.default_rng(1).permutation(9)
        chex.assert_trees_all_close(run(x[:, order]), outputs[:, order], rtol=0, atol=1e-12)


def test_one_scan_reaches_all_pixels():
    """The support of the Jacobian is full on an image; that of the causal mixer, also one scan, is a triangle."""
    x = jnp.asarray(normal(1, 3, 4, 8), jnp.float32)
    grid = build(GridLightNet, LightNetConfig(heads=2, lrpe=True), 2, dtype=jnp.float32)
    causal = build(lightnet.LightNet, LightNetConfig(heads=2), dtype=jnp.float32)

    def support(function):
        jacobian = jax.jit(jax.jacobian(lambda x: function(x).sum(axis=-1).ravel()))(x)
        return np.any(jacobian.reshape(12, 12, 8), axis=-1)

    chex.assert_trees_all_equal(support(grid), np.ones((12, 12), bool))
    one_way = support(lambda x: causal(x.reshape(1, 12, 8))[0])
    chex.assert_trees_all_equal(one_way, np.tril(np.ones((12, 12), bool)))


def test_md_tpe_is_a_sum_over_axes():
    with jax.enable_x64(True):
        grid = build(GridLightNet, LightNetConfig(heads=2, tpe=True), 2)
        x = jnp.asarray(normal(2, 3, 4, 8))

        @jax.jit
        def run(x):
            down = jnp.stack([grid.tpe.along[0](x[:, :, j])[0] for j in range(4)], axis=2)
            right = jnp.stack([grid.tpe.along[1](x[:, i])[0] for i in range(3)], axis=1)
            encoding = grid.tpe(x)
            mixed = grid.mixer((x + encoding).reshape(2, 12, 8), grid_positions(2, 3, 4)).reshape(x.shape)
            return down + right, encoding, encoding + mixed, grid(x)

        by_axis, encoding, expected, outputs = run(x)
    chex.assert_trees_all_close(encoding, by_axis, rtol=0, atol=1e-12)
    chex.assert_trees_all_close(outputs, expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="x: expected a grid of 2 axes"):
        grid.tpe(x[:, 0])


@pytest.mark.parametrize("lrpe", [False, True])
def test_non_causal_documents_and_padding(lrpe):
    """Packed documents equal themselves alone; what stands at padding has no effect, and no gradient, not even NaN."""
    ids = jnp.array([[-1, 0, 0, -1, 0, 2, 2, 2, 0, -1]])
    documents = [[1, 2, 4], [5, 6, 7], [8]]
    with jax.enable_x64(True):
        mixer = build(NonCausalLightNet, LightNetConfig(heads=2, lrpe=lrpe), 2, scale=20)
        x, places = jnp.asarray(normal(1, 10, 8)), jnp.asarray(np.random.default_rng(2).integers(0, 9, (1, 10, 2)))
        run = jax.jit(lambda x: mixer(x, places, segment_ids=ids))
        packed = run(x)
        for document in documents:
            alone = jax.jit(mixer)(x[:, document], places[:, document])
            chex.assert_trees_all_close(packed[:, document], alone, rtol=0, atol=1e-11)
        real, padding = np.concatenate(documents), np.array([0, 3, 9])
        chex.assert_trees_all_equal(run(x.at[:, padding].set(100.0))[:, real], packed[:, real])
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(run(x)[:, real] ** 2)))(x)
        chex.assert_trees_all_equal(gradient[:, padding], jnp.zeros((1, 3, 8)))
        chex.assert_tree_all_finite((packed, gradient))
        assert jnp.all(jnp.any(gradient[:, real] != 0, axis=-1))


def test_non_causal_needs_places_for_lrpe():
    mixer = NonCausalLightNet(LightNetConfig(heads=2, lrpe=True), STACK, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="positions: expected the places of tokens"):
        mixer(jnp.zeros((1, 3, 8)))
