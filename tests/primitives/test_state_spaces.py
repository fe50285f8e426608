"""Discretisations and their limits; state spaces against dense matrices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from primitives import (
    diagonal_state_space,
    discretise_bilinear,
    discretise_zero_order_hold,
    lru_decay,
    lru_normaliser,
    state_space_bank,
)


@pytest.mark.parametrize(
    ("discretise", "method"), [(discretise_zero_order_hold, "zoh"), (discretise_bilinear, "bilinear")]
)
def test_discretisations_are_those_of_scipy(discretise, method):
    for a in (-0.7, -1e-3, -30.0, -0.5 + 3j, -0.01 + 0.2j):
        for dt in (1e-3, 0.1, 1.0):
            matrix = np.array([[a.real, -a.imag], [a.imag, a.real]])  # a complex number as a real matrix
            system = scipy.signal.cont2discrete((matrix, np.eye(2), np.eye(2), np.zeros((2, 2))), dt, method)
            with jax.enable_x64(True):
                found = discretise(jnp.asarray(a), jnp.asarray(dt))
            for number, expected in zip(found, system[:2], strict=True):
                chex.assert_trees_all_close(complex(number), complex(*expected[:, 0]), rtol=1e-10)


@pytest.mark.parametrize("discretise", [discretise_zero_order_hold, discretise_bilinear])
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_limit_of_small_steps(discretise, dtype):
    """decay = 1 + a dt + …, scale = dt (1 + a dt / 2 + …), and their derivatives with respect to a."""
    for a in (0.0, -1e-30, -1e-4):
        dt = jnp.float32(1e-2)
        decay, scale = discretise(jnp.asarray(a, dtype), dt)
        chex.assert_trees_all_close((decay.real, scale.real), (1 + a * dt, dt * (1 + a * dt / 2)), rtol=1e-6)
        for i, expected in ((0, dt), (1, dt**2 / 2)):
            gradient = jax.grad(lambda a, i=i, dt=dt: discretise(a, dt)[i].real)(jnp.asarray(a, dtype))
            chex.assert_trees_all_close(gradient.real, expected, rtol=1e-4)


def test_gradient_of_the_scale_does_not_cancel():
    z = np.linspace(-3, 0, 301)
    with jax.enable_x64(True):
        exact = jax.vmap(jax.grad(lambda z: discretise_zero_order_hold(z, 1.0)[1]))(jnp.asarray(z))
    # ∫₀¹ s exp(z s) ds by Gauß–Legendre.
    nodes, weights = np.polynomial.legendre.leggauss(20)
    s = (nodes + 1) / 2
    chex.assert_trees_all_close(np.asarray(exact), np.exp(np.outer(z, s)) @ (weights / 2 * s), rtol=1e-13)
    single = jax.vmap(jax.grad(lambda z: discretise_zero_order_hold(z, 1.0)[1]))(jnp.float32(z))
    chex.assert_trees_all_close(single, np.float32(exact), rtol=3e-6)


def random_system(*shape, imaginary, seed=0):
    generator = np.random.default_rng(seed)

    def numbers(*shape):
        return generator.normal(size=shape) + (1j * generator.normal(size=shape) if imaginary else 0)

    decay = generator.uniform(0.5, 1, size=shape) * (np.exp(1j * generator.normal(size=shape)) if imaginary else 1)
    return decay, numbers


@pytest.mark.parametrize("imaginary", [False, True])
def test_state_space_is_a_convolution(imaginary):
    decay, numbers = random_system(4, imaginary=imaginary)
    b, c, d, u = numbers(4, 3), numbers(3, 4), numbers(3).real, numbers(2, 20, 3).real
    kernel = np.einsum("in,nk,nj->kij", c, decay[:, None] ** np.arange(20), b).real
    expected = d * u
    for k in range(20):
        expected[:, k:] += np.einsum("ij,btj->bti", kernel[k], u[:, : 20 - k])
    with jax.enable_x64(True):
        y, state = diagonal_state_space(*map(jnp.asarray, (u, decay, b, c, d)))
        assert state.hidden.shape == (2, 4)
        chex.assert_trees_all_close(np.asarray(y), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("imaginary", [False, True])
def test_bank_is_a_state_space_per_channel(imaginary):
    decay, numbers = random_system(3, 4, imaginary=imaginary)
    b, c, d, u = numbers(3, 4), numbers(3, 4), numbers(3).real, numbers(2, 20, 3).real
    ids = np.repeat([[0, -1, 1], [2, 2, 3]], [8, 2, 10], axis=1)
    with jax.enable_x64(True):
        u, decay, b, c, d, ids = map(jnp.asarray, (u, decay, b, c, d, ids))
        y, state = state_space_bank(u, decay, b, c, d, segment_ids=ids)
        assert state.hidden.shape == (2, 3, 4)
        for i in range(3):
            one = slice(i, i + 1)
            matrices = decay[i], b[i, :, None], c[one], d[one]
            expected, final = diagonal_state_space(u[..., one], *matrices, segment_ids=ids)
            chex.assert_trees_all_close((y[..., one], state.hidden[:, i]), (expected, final.hidden), rtol=1e-10)


def test_state_goes_on():
    decay, numbers = random_system(4, imaginary=True)
    u, b, c = jnp.float32(numbers(2, 20, 3).real), jnp.complex64(numbers(4, 3)), jnp.complex64(numbers(3, 4))
    whole, _ = diagonal_state_space(u, jnp.complex64(decay), b, c)
    first, state = diagonal_state_space(u[:, :7], jnp.complex64(decay), b, c)
    second, _ = diagonal_state_space(u[:, 7:], jnp.complex64(decay), b, c, state=state)
    chex.assert_trees_all_close(jnp.concatenate([first, second], axis=1), whole, rtol=1e-5, atol=1e-5)


def test_lru():
    log_nu, log_theta = np.log([1e-6, 0.1, 2.0]), np.log([0.1, 1.0, 3.0])
    decay, normaliser = lru_decay(jnp.float32(log_nu), jnp.float32(log_theta)), lru_normaliser(jnp.float32(log_nu))
    modulus = np.exp(-np.exp(log_nu))
    chex.assert_trees_all_close(decay, np.complex64(modulus * np.exp(1j * np.exp(log_theta))), rtol=1e-6)
    chex.assert_trees_all_close(normaliser, np.float32(np.sqrt(1 - modulus**2)), rtol=1e-5)


@pytest.mark.parametrize(("name", "shape"), [("decay", (4, 1)), ("b", (3, 4)), ("c", (4, 3)), ("d", (4,))])
def test_refuses_matrices_that_do_not_fit(name, shape):
    matrices = {"decay": jnp.ones(4), "b": jnp.ones((4, 3)), "c": jnp.ones((3, 4)), "d": jnp.ones(3)}
    with pytest.raises(ValueError, match=name):
        diagonal_state_space(jnp.ones((2, 5, 3)), **matrices | {name: jnp.ones(shape)})
    with pytest.raises(TypeError, match=name):
        diagonal_state_space(jnp.ones((2, 5, 3)), **matrices | {name: jnp.ones(matrices[name].shape, int)})
