"""Positions: complex rotations as oracles, products that depend on differences alone, values from the papers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from primitives import alibi_bias, alibi_slopes, lrpe, relative_shift, rotary, xpos


def vectors(dim=6, time=5, heads=2, seed=0):
    return np.random.default_rng(seed).normal(size=(1, time, heads, dim))


def logits(q, k):
    return np.einsum("bthd,bshd->bhts", np.asarray(q), np.asarray(k))


def test_rotary_is_complex_multiplication():
    x, positions = vectors(), np.array([[0, 1, 5, 7, 100]])
    turned = (x[..., :3] + 1j * x[..., 3:]) * np.exp(
        1j * positions[..., None, None] * 10000.0 ** (-np.arange(0, 6, 2) / 6)
    )
    with jax.enable_x64(True):
        actual = rotary(jnp.asarray(x), jnp.asarray(positions))
    chex.assert_trees_all_close(np.asarray(actual), np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-12)


def rotated(q, k, positions):
    return rotary(q, positions), rotary(k, positions)


def phased(q, k, positions):
    theta = jnp.asarray(np.random.default_rng(5).normal(size=(2, 6)))
    return lrpe(q, positions, theta), lrpe(k, positions, theta)


@pytest.mark.parametrize("encode", [rotated, xpos, phased])
@settings(max_examples=10, deadline=None)
@given(shift=st.integers(-1000, 1000))
def test_logits_depend_on_differences_alone(encode, shift):
    positions = jnp.array([[0, 1, 2, 5, 9]])
    with jax.enable_x64(True):
        q, k = (jnp.asarray(vectors(seed=seed)) for seed in (0, 1))
        here, there = (logits(*encode(q, k, p)) for p in (positions, positions + shift))
        other = logits(*encode(q, k, 2 * positions))
    chex.assert_trees_all_close(there, here, rtol=1e-9, atol=1e-9)
    assert not np.allclose(other, here, atol=1e-2)


def test_xpos_decays_as_in_the_paper():
    """Equal vectors in one pair: the product is ζ^{(n−m)/512} cos of the angle between them."""
    q = np.zeros((1, 2, 1, 4))
    q[..., 1] = 1  # of pair (1, 3): ζ = (1/2 + 0.4) / 1.4, a hundredth of a radian per step
    with jax.enable_x64(True):
        q, k = xpos(jnp.asarray(q), jnp.asarray(q), jnp.array([[0, 300]]))
    expected = (0.9 / 1.4) ** (300 / 512) * np.cos(3.0)
    chex.assert_trees_all_close(logits(q, k)[0, 0, 1, 0], expected, rtol=1e-12)


def test_xpos_stays_in_range():
    positions = jnp.array([[-34_900, 34_900]])
    q, k = xpos(jnp.ones((1, 2, 1, 4)), jnp.ones((1, 2, 1, 4)), positions)
    chex.assert_tree_all_finite((q, k))
    assert float(jnp.min(jnp.linalg.norm(q, axis=-1))) > 0


def test_lrpe_of_several_axes():
    """⟨q, k⟩ = Σ_c q_c k_c cos(Δ_axis(c) θ_c), five channels over two axes: three and two."""
    q, k, theta = vectors(5), vectors(5, seed=1), np.random.default_rng(2).normal(size=(2, 3))
    positions = np.random.default_rng(3).integers(-20, 20, (1, 5, 2))
    phase = (positions[:, :, None, :, None] * theta[:, None]).reshape(1, 5, 2, 6)[..., :5]
    difference = phase[:, :, None] - phase[:, None]
    expected = np.einsum("bthd,bshd,btshd->bhts", q, k, np.cos(difference))
    with jax.enable_x64(True):
        encoded = (lrpe(jnp.asarray(x), jnp.asarray(positions), jnp.asarray(theta)) for x in (q, k))
        chex.assert_trees_all_close(logits(*encoded), expected, rtol=1e-10, atol=1e-12)


def test_alibi_slopes_of_the_paper():
    chex.assert_trees_all_close(alibi_slopes(8), 0.5 ** np.arange(1, 9, dtype=np.float32))
    chex.assert_trees_all_close(alibi_slopes(16)[:2], np.float32([2**-0.5, 0.5]))
    chex.assert_trees_all_close(
        alibi_slopes(12), np.float32([*0.5 ** np.arange(1, 9), *2.0 ** -np.array([0.5, 1.5, 2.5, 3.5])])
    )
    chex.assert_trees_all_close(alibi_slopes(1), np.float32([2.0**-8]))
    with pytest.raises(ValueError, match="heads"):
        alibi_slopes(0)


def test_alibi_bias():
    bias = alibi_bias(alibi_slopes(2), jnp.array([[3, 4]]), jnp.array([[1, 2, 3, 4]]))
    distance = np.array([[2, 1, 0, 1], [3, 2, 1, 0]])
    chex.assert_trees_all_close(bias[0], -np.array([2.0**-4, 2.0**-8], np.float32)[:, None, None] * distance)


@pytest.mark.parametrize("time", [1, 2, 7])
def test_relative_shift_is_a_gather(time):
    x = np.random.default_rng(0).normal(size=(2, 3, time, time)).astype(np.float32)
    expected = np.zeros_like(x)
    for i in range(time):
        for j in range(i + 1):
            expected[..., i, j] = x[..., i, time - 1 - i + j]
    chex.assert_trees_all_equal(relative_shift(jnp.asarray(x)), expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_that_of_the_result_alone(dtype):
    x, positions = jnp.asarray(vectors(), dtype), jnp.array([[0, 1, 5, 700, 1001]])
    chex.assert_trees_all_equal(rotary(x, positions), rotary(x.astype(jnp.float32), positions).astype(dtype))
    assert lrpe(x, positions, jnp.ones((2, 6), dtype)).dtype == xpos(x, x, positions)[1].dtype == dtype


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, p: rotary(x[..., :5], p), ValueError, "x: expected an even dim"),
        (lambda x, p: rotary(x, p[0]), ValueError, "positions: expected shape"),
        (lambda x, p: rotary(x.astype(jnp.int32), p), TypeError, "x: expected a floating point dtype"),
        (lambda x, p: xpos(x, x[..., :4], p), ValueError, "k: expected shape"),
        (lambda x, p: xpos(x[..., :5], x[..., :5], p), ValueError, "q: expected an even dim"),
        (lambda x, p: lrpe(x, p, jnp.ones((2, 5))), ValueError, "theta: expected 6 angles"),
        (lambda x, p: lrpe(x, p, jnp.ones((3, 6))), ValueError, "theta: expected shape"),
        (lambda x, p: relative_shift(x), ValueError, "logits: expected shape"),
        (lambda x, p: relative_shift(x[0, 0, 0]), ValueError, "logits: expected shape"),
        (lambda x, p: alibi_bias(x, p, p), ValueError, "slopes: expected shape"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call(jnp.float32(vectors()), jnp.arange(5)[None])
