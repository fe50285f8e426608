"""S4D, S5 and LRU against their equations, one complex number after another, and where they start from."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.signal
from flax import nnx

from zoo.layers import StackConfig
from zoo.token_mixers import lru, s4d, s5

WIDTH, TIME = 6, 11


def build(config, width=WIDTH):
    """A mixer with parameters away from their start, and inputs, in float64."""
    stack, generator = StackConfig(width, 1, (config,)), np.random.default_rng(0)
    mixer = config.mixer(stack, 0, rngs=nnx.Rngs(0))
    mixer = jax.tree.map(lambda x: x.astype(float) + 0.1 * generator.normal(size=x.shape), mixer)
    parameters = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(mixer)))
    return mixer, parameters, generator.normal(size=(2, TIME, width))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def affine(x, layer):
    return x @ layer["kernel"] + layer["bias"]


def gated_linear_unit(x, layer):
    value, gate = np.split(affine(x, layer), 2, axis=-1)
    return value * sigmoid(gate)


def run(decay, b, c, d, u):
    """y = Re(c h) + d u, one row after another, modes as they are."""
    y = np.zeros(u.shape)
    for row in range(len(u)):
        h = np.zeros(len(decay), complex)
        for t in range(u.shape[1]):
            h = decay * h + b @ u[row, t]
            y[row, t] = (c @ h).real + d * u[row, t]
    return y


def complex_pair(parts):
    return parts[0] + 1j * parts[1]


@pytest.mark.parametrize("discretisation", s4d.DISCRETISATIONS)
def test_s4d_equations(discretisation):
    with jax.enable_x64(True):
        mixer, p, u = build(s4d.S4DConfig(state_size=8, discretisation=discretisation))
        a, dt, c = -np.exp(p["log_real"]) + 1j * p["imaginary"], np.exp(p["log_dt"])[:, None], complex_pair(p["c"])
        if discretisation == "bilinear":
            decay, b = (1 + dt * a / 2) / (1 - dt * a / 2), dt / (1 - dt * a / 2)
        else:
            decay, b = np.exp(dt * a), (np.exp(dt * a) - 1) / a
        # Both modes of each pair, every channel by itself.
        decay, b, c = (np.concatenate([x, x.conj()], axis=1)[:, :, None] for x in (decay, b, c))
        y = [run(decay[i, :, 0], b[i], c[i].T, p["d"][i : i + 1], u[..., i : i + 1]) for i in range(WIDTH)]
        expected = gated_linear_unit(gelu(np.concatenate(y, axis=-1)), p["output"])
        chex.assert_trees_all_close(mixer(jnp.asarray(u))[0], expected, rtol=1e-10, atol=1e-12)


def test_s4d_is_a_convolution_with_its_kernel():
    """K_l = 2 Re Σ_n c_n b_n λ_n^l (the paper's Vandermonde product), over the whole sequence."""
    with jax.enable_x64(True):
        mixer, p, u = build(s4d.S4DConfig(state_size=8))
        a, dt = -np.exp(p["log_real"]) + 1j * p["imaginary"], np.exp(p["log_dt"])[:, None]
        vandermonde = np.exp((dt * a)[..., None] * np.arange(TIME))
        kernel = 2 * np.einsum("dn,dnl->ld", complex_pair(p["c"]) * (np.exp(dt * a) - 1) / a, vandermonde).real
        y = np.stack([[scipy.signal.convolve(row[:, i], kernel[:, i])[:TIME] for i in range(WIDTH)] for row in u])
        expected = gated_linear_unit(gelu(y.swapaxes(1, 2) + p["d"] * u), p["output"])
        chex.assert_trees_all_close(mixer(jnp.asarray(u))[0], expected, rtol=1e-10, atol=1e-12)


def test_s4d_starts():
    n = np.arange(32)
    chex.assert_trees_all_close(s4d.initial_imaginary("linear", 64), np.pi * n)
    inverse = s4d.initial_imaginary("inverse", 64)
    chex.assert_trees_all_close(inverse, 64 / np.pi * (64 / (2 * n + 1) - 1))
    for start in ("linear", "inverse", "legs"):
        stack = StackConfig(4, 1, (s4d.S4DConfig(start=start),))
        mixer = stack.pattern[0].mixer(stack, 0, rngs=nnx.Rngs(0))
        chex.assert_trees_all_close(jnp.exp(mixer.log_real[...]), jnp.full((4, 32), 0.5))
        chex.assert_trees_all_close(mixer.imaginary[2], jnp.float32(s4d.initial_imaginary(start, 64)))
    # "inverse" is what the paper conjectures for the eigenvalues of "legs": the largest agree best.
    assert np.abs(inverse[:4] / s4d.initial_imaginary("legs", 64)[:4] - 1).max() < 0.1


@pytest.mark.parametrize("size", [2, 8, 64])
def test_hippo_normal(size):
    """Its eigenvalues and vectors, with their conjugates, make up HiPPO-LegS + p pᵀ; written entry by entry."""
    n = np.arange(size)
    legs = np.array([[-np.sqrt((2 * i + 1) * (2 * k + 1)) if i > k else -(i + 1.0) * (i == k) for k in n] for i in n])
    normal = legs + np.sqrt(np.outer(n + 0.5, n + 0.5))
    values, vectors = s4d.hippo_normal(size)
    assert values.shape == (size // 2,)
    assert np.all(values.imag > 0)
    assert np.all(np.diff(values.imag) < 0)
    half = (vectors * values) @ vectors.conj().T
    chex.assert_trees_all_close(half + half.conj(), normal.astype(complex), atol=1e-10)


def test_s5_equations():
    with jax.enable_x64(True):
        mixer, p, u = build(s5.S5Config(state_size=8, blocks=2))
        a, dt = -np.exp(p["log_real"]) + 1j * p["imaginary"], np.exp(p["log_dt"])
        decay, b, c = np.exp(a * dt), ((np.exp(a * dt) - 1) / a)[:, None] * complex_pair(p["b"]), complex_pair(p["c"])
        both = [np.concatenate([x, x.conj()], axis=axis) for x, axis in ((decay, 0), (b, 0), (c, 1))]
        y = gelu(run(*both, p["d"], u))
        expected = y * sigmoid(affine(y, p["gate"]))
        chex.assert_trees_all_close(mixer(jnp.asarray(u))[0], expected, rtol=1e-10, atol=1e-12)


def test_s5_starts_from_a_real_system_with_the_hippo_matrix():
    """Modes together are h' = N h + B u, y = C h with N block-diagonal and real random B, C: the kernel C e^{Nt} B."""
    width, size = 5, 8
    stack = StackConfig(width, 1, (s5.S5Config(state_size=2 * size, blocks=2),))
    mixer = stack.pattern[0].mixer(stack, 0, rngs=nnx.Rngs(0))
    a = -np.exp(mixer.log_real[...]) + 1j * mixer.imaginary[...]
    b, c = (complex_pair(np.asarray(x[...], float)) for x in (mixer.b, mixer.c))
    values, vectors = s4d.hippo_normal(size)
    chex.assert_trees_all_close(a, np.tile(values, 2).astype(a.dtype), rtol=1e-6)
    half = np.kron(np.eye(2), vectors)  # real b, c are V b + its conjugate: b is V* of it
    real_b, real_c = 2 * (half @ b).real, 2 * (c @ half.conj().T).real
    normal = np.kron(np.eye(2), 2 * ((vectors * values) @ vectors.conj().T).real)
    for t in (0.0, 0.3, 1.0):
        kernel = 2 * ((c * np.exp(a * t)) @ b).real
        chex.assert_trees_all_close(kernel, real_c @ scipy.linalg.expm(normal * t) @ real_b, rtol=1e-4, atol=1e-5)
    assert abs(np.var(real_b) * width - 1) < 0.5
    assert abs(np.var(real_c) * 2 * size - 1) < 0.5


def test_lru_equations():
    with jax.enable_x64(True):
        mixer, p, u = build(lru.LRUConfig(state_size=8))
        decay = np.exp(-np.exp(p["log_nu"]) + 1j * np.exp(p["log_theta"]))
        b = np.exp(p["log_gamma"])[:, None] * complex_pair(p["b"])
        y = run(decay, b, complex_pair(p["c"]), p["d"], u)
        expected = gated_linear_unit(gelu(y), p["output"])
        chex.assert_trees_all_close(mixer(jnp.asarray(u))[0], expected, rtol=1e-10, atol=1e-12)


def test_lru_starts_on_a_ring():
    """|λ|² and phases are uniform, and states of white noise have unit variance times |B u|²: γ² = 1 − |λ|²."""
    config = lru.LRUConfig(state_size=2000, r_min=0.5, r_max=0.9, max_phase=0.3)
    mixer = config.mixer(StackConfig(4, 1, (config,)), 0, rngs=nnx.Rngs(0))
    decay = np.exp(-np.exp(mixer.log_nu[...]) + 1j * np.exp(mixer.log_theta[...]))
    for found, low, high in ((np.abs(decay) ** 2, 0.25, 0.81), (np.angle(decay), 0.0, 0.3)):
        assert low - 1e-5 <= found.min()
        assert found.max() <= high + 1e-5
        chex.assert_trees_all_close(
            np.sort(found), np.linspace(low, high, 2000, dtype=found.dtype), atol=0.05 * (high - low)
        )
    chex.assert_trees_all_close(np.exp(2 * mixer.log_gamma[...]), 1 - np.abs(decay) ** 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (s4d.S4DConfig(state_size=7), "^state_size: expected a positive multiple of 2, got 7"),
        (s4d.S4DConfig(start="linaer"), "^start: expected one of .* did you mean linear"),
        (s4d.S4DConfig(discretisation="euler"), "^discretisation: expected one of"),
        (s5.S5Config(state_size=12, blocks=4), "^state_size: expected a positive multiple of 8, got 12"),
        (lru.LRUConfig(state_size=0), "^state_size: expected a positive number, got 0"),
        (lru.LRUConfig(r_max=1.0), "^r_min, r_max: expected 0 <= r_min < r_max < 1"),
        (lru.LRUConfig(max_phase=7.0), "^max_phase: expected a number in"),
    ],
)
def test_refusals(config, message):
    with pytest.raises(ValueError, match=message):
        StackConfig(WIDTH, 1, (config,))
