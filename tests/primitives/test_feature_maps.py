"""Feature maps: their kernels, and LightNet's keys as attention over prefixes."""

import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from primitives import (
    elu_plus_one,
    normalised_exponential,
    orthogonal_projection,
    positive_random_features,
    prefix_scan_attention,
    relu,
    taylor_features,
)

exponential = jax.jit(normalised_exponential)


def normal(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape)


# --- Maps of one token ----------------------------------------------------------------------------------------------


def test_elu_plus_one_stays_positive():
    x = jnp.array([-60.0, -1.0, 0.0, 2.0])
    chex.assert_trees_all_close(elu_plus_one(x), jnp.array([np.exp(-60), np.exp(-1), 1, 3]), rtol=1e-5)
    slopes = jax.grad(lambda x: elu_plus_one(x).sum())(x)
    chex.assert_trees_all_close(slopes[jnp.array([0, 1, 3])], jnp.array([np.exp(-60), np.exp(-1), 1]), rtol=1e-5)


def test_relu():
    chex.assert_trees_all_equal(relu(jnp.array([-1.0, 0.0, 2.0])), jnp.array([0.0, 0.0, 2.0]))


@pytest.mark.parametrize("dim", [1, 2, 16])
def test_taylor_features_are_the_second_order(dim):
    q, k = normal(7, dim), normal(7, dim, seed=1)
    with jax.enable_x64(True):
        features = [taylor_features(jnp.asarray(x)) for x in (q, k)]
    assert features[0].shape == (7, 1 + dim + dim * (dim + 1) // 2)
    a = np.sum(q * k, axis=-1) / dim**0.5
    chex.assert_trees_all_close(np.sum(np.prod(features, axis=0), axis=-1), 1 + a + a**2 / 2, rtol=1e-12)


def test_orthogonal_projection():
    rows = np.asarray(orthogonal_projection(jax.random.key(0), 4096 * 8 + 3, 8))
    assert rows.shape == (4096 * 8 + 3, 8)
    products = rows[:-3].reshape(-1, 8, 8) @ rows[:-3].reshape(-1, 8, 8).swapaxes(1, 2)
    assert np.max(np.abs(products * (1 - np.eye(8)))) < 1e-4
    chex.assert_trees_all_close(np.cov(rows.T), np.eye(8), atol=0.05)
    chex.assert_trees_all_close(np.mean(rows**4), 3.0, atol=0.1)  # that of a normal distribution


def test_positive_random_features_estimate_the_exponential():
    q, k = normal(5, 4, scale=0.5), normal(5, 4, seed=1, scale=0.5)
    projection = orthogonal_projection(jax.random.key(1), 1 << 15, 4)
    (phi_q, log_q), (phi_k, log_k) = (positive_random_features(jnp.float32(x), projection) for x in (q, k))
    estimate = (phi_q @ phi_k.T) * jnp.exp(log_q[:, None] + log_k)
    chex.assert_trees_all_close(estimate, np.float32(np.exp(q @ k.T)), rtol=0.06)


def test_positive_random_features_keep_the_gradient():
    """The scale is a reference point: the product with it has the derivative of the exponential."""
    x, projection = jnp.float32(normal(3, 4)), jnp.float32(normal(6, 4, seed=1))

    def direct(x):
        return jnp.sum(jnp.cos(jnp.exp(x @ projection.T - jnp.sum(x**2, -1, keepdims=True) / 2) / 6**0.5))

    def scaled(x):
        features, scale = positive_random_features(x, projection)
        return jnp.sum(jnp.cos(features * jnp.exp(scale)[:, None]))

    chex.assert_trees_all_close(jax.grad(scaled)(x), jax.grad(direct)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_performer_with_normalised_keys_is_a_ratio(scale):
    """The recipe of the docstring: scales of queries dropped, those of keys as weights, far beyond float32's range."""
    q, k, v = (normal(1, 9, 1, 6, seed=seed, scale=s) for seed, s in ((0, scale), (1, scale), (2, 1.0)))
    projection = normal(5, 6, seed=3)
    e_q, e_k = (x[0, :, 0] @ projection.T - np.sum(x[0, :, 0] ** 2, -1, keepdims=True) / 2 for x in (q, k))
    terms = e_q[:, None] + e_k[None]  # [query, key, feature], logarithms
    terms = np.where(np.tril(np.ones((9, 9), bool))[..., None], terms, -np.inf)
    weights = np.exp(terms - terms.max(axis=(1, 2), keepdims=True)).sum(axis=-1)
    expected = (weights / weights.sum(axis=-1, keepdims=True)) @ v[0, :, 0]

    with jax.enable_x64(True):
        phi_q, _ = positive_random_features(jnp.asarray(q), jnp.asarray(projection))
        phi_k, log_k = positive_random_features(jnp.asarray(k), jnp.asarray(projection))
        factor, log_decay, _ = exponential(log_k[..., None])
        ones = np.concatenate([v, np.ones_like(v[..., :1])], axis=-1)
        sums = recurrence(phi_k * factor, log_decay, ones)
        outputs = np.einsum("bthf,bthfd->bthd", phi_q, sums)
    chex.assert_trees_all_close(outputs[0, :, 0, :-1] / outputs[0, :, 0, -1:], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("function", [elu_plus_one, relu, taylor_features])
def test_maps_keep_the_dtype_and_refuse_integers(function):
    assert function(jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.bfloat16
    with pytest.raises(TypeError, match="x: expected a floating point dtype"):
        function(jnp.ones((2, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"x: expected shape \[dim\]"):
        function(jnp.float32(1))


def test_projections_fit():
    with pytest.raises(ValueError, match="projection: expected shape"):
        positive_random_features(jnp.ones((2, 3)), jnp.ones((5, 4)))
    with pytest.raises(ValueError, match="features: expected a positive number"):
        orthogonal_projection(jax.random.key(0), 0, 4)


# --- LightNet's keys ------------------------------------------------------------------------------------------------


def recurrence(keys, log_decay, v):
    """S_t = exp(log_decay_t) S_{t−1} + key_t v_tᵀ, as [batch, time, heads, key_dim, value_dim]."""
    keys, decay, v = np.asarray(keys, np.float64), np.exp(np.asarray(log_decay, np.float64)), np.asarray(v)
    sums, total = [], 0
    for t in range(v.shape[1]):
        total = decay[:, t, ..., None] * total + keys[:, t, ..., None] * v[:, t, :, None]
        sums.append(total)
    return np.stack(sums, axis=1)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_rows_are_attention_over_prefixes(scale):
    k, v = normal(2, 40, 2, 3, scale=scale), normal(2, 40, 2, 5, seed=1)
    with jax.enable_x64(True):
        keys, log_decay, _ = exponential(jnp.asarray(k))
        values = np.broadcast_to(v[..., None, :], (*k.shape, 5)).reshape(2, 40, 6, 5)
        heads, _ = prefix_scan_attention(jnp.asarray(k.reshape(2, 40, 6)), jnp.asarray(values))
    sums = recurrence(keys, log_decay, v)
    chex.assert_trees_all_close(sums.reshape(2, 40, 6, 5), np.asarray(heads), rtol=1e-9, atol=1e-12)


def token_by_token(k, ids):
    """Keys and log decays by the definition, in NumPy; of one row of one channel."""
    keys, decays, total, document = [], [], -np.inf, 0
    for x, i in zip(k, ids, strict=True):
        before = -np.inf if i != document and i >= 0 else total
        after = np.logaddexp(before, x)
        keys.append(np.exp(x - after) if i >= 0 else 0)
        decays.append(before - after if i >= 0 and before > -np.inf else 0)
        total, document = (after, i) if i >= 0 else (total, document)
    return np.array(keys), np.array(decays), total


@settings(max_examples=30, deadline=None)
@given(ids=st.lists(st.sampled_from([-1, 0, 1]), min_size=8, max_size=8), cut=st.integers(1, 7))
def test_documents_padding_and_pieces(ids, cut):
    k, ids = normal(8, scale=5.0), np.array(ids)
    array, segment_ids, state, pieces = jnp.float32(k)[None, :, None, None], jnp.int32(ids)[None], None, []
    for piece in (slice(cut), slice(cut, None)):
        *results, state = exponential(array[:, piece], state=state, segment_ids=segment_ids[:, piece])
        pieces.append(results)
    keys, log_decay = (jnp.concatenate(parts, axis=1).ravel() for parts in zip(*pieces, strict=True))
    expected = token_by_token(k, ids)
    chex.assert_trees_all_close((keys, log_decay), jax.tree.map(np.float32, expected[:2]), rtol=2e-5, atol=1e-6)
    chex.assert_trees_all_close(state.log_sum.ravel(), np.float32(expected[2:]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_gradients_are_finite_and_right(layout):
    """Also at logits of −inf and where nothing came before."""
    k = normal(1, 9, 1, 1)
    ids = None if layout == "plain" else jnp.array([[-1, 0, 0, 1, 1, -1, -1, 1, 2]])

    @jax.jit
    def loss(k):
        keys, log_decay, state = normalised_exponential(k, segment_ids=ids)
        return jnp.sum(jnp.sin(keys)) + jnp.sum(jnp.cos(log_decay)) + jnp.sum(state.log_sum)

    with jax.enable_x64(True):
        jax.test_util.check_grads(loss, (jnp.asarray(k),), order=1, atol=1e-7, rtol=1e-7)
    for extreme in (1e4 * k, 0 * k, np.where(np.arange(9)[:, None, None] < 4, -np.inf, k), 0 * k - np.inf):
        keys, log_decay, _ = exponential(jnp.float32(extreme), segment_ids=ids)
        chex.assert_tree_all_finite((keys, log_decay, jax.grad(loss)(jnp.float32(extreme))))
        assert jnp.all(log_decay <= 0)
        assert jnp.all((keys >= 0) & (keys <= 1))


def test_padding_holds_anything_and_one_step_is_elementwise():
    k = jnp.full((1, 3, 1, 2), jnp.nan).at[:, 1].set(1.0)
    ids = jnp.array([[-1, 0, -1]])
    keys, log_decay, state = exponential(k, segment_ids=ids)
    chex.assert_trees_all_equal(keys, jnp.zeros_like(keys).at[:, 1].set(1))
    chex.assert_trees_all_equal(log_decay, jnp.zeros_like(log_decay))
    chex.assert_trees_all_equal(state.log_sum, jnp.ones((1, 1, 2)))
    step = str(jax.make_jaxpr(normalised_exponential)(k[:, :1], state=state, segment_ids=ids[:, :1]))
    assert not any(word in step for word in ("pad[", "scan[", "while[", "gather["))


def test_normalised_exponential_refuses():
    with pytest.raises(TypeError, match="state: expected None or NormaliserState"):
        normalised_exponential(jnp.ones((1, 2, 1, 2)), state=(1, 2))
    with pytest.raises(ValueError, match="k: expected shape"):
        normalised_exponential(jnp.ones((1, 2, 2)))
