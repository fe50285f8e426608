import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primitives import linear_attention, normalised_linear_attention, ssd, taylor_features
from primitives.testing import assert_close


def example(time=70, heads=2, dim=8, value_dim=12, seed=0):
    generator = np.random.default_rng(seed)
    q, k = generator.normal(size=(2, 2, time, heads, dim))
    v = generator.normal(size=(2, time, heads, value_dim))
    return q, k, v, -generator.exponential(size=(2, time, heads, dim))


def loop(q, k, v, decay, scale):
    """The recurrence in NumPy, a head at a time."""
    outputs = np.zeros((*q.shape[:3], v.shape[-1]))
    memory = np.zeros((*q.shape[::2][:2], q.shape[-1], v.shape[-1]))
    for t in range(q.shape[1]):
        memory = decay[:, t, :, :, None] * memory + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], memory)
    return outputs, memory


@jax.enable_x64(True)
def test_equals_a_loop_in_numpy():
    q, k, v, g = example()
    expected = loop(q, k, v, np.exp(g), q.shape[-1] ** -0.5)
    outputs, state = linear_attention(*map(jnp.asarray, (q, k, v, g)))
    assert_close((outputs, state.memory), expected, "float64", "linear attention")


@jax.enable_x64(True)
@pytest.mark.parametrize("heads", [(4, 2, 2), (4, 1, 2), (1, 1, 4), (2, 1, 1), (1, 2, 1)])
def test_heads_are_shared_as_if_they_were_repeated(heads):
    generator = np.random.default_rng(0)
    q, k, v = (jnp.asarray(generator.normal(size=(2, 70, n, 8))) for n in heads)
    g = jnp.asarray(-generator.exponential(size=(2, 70, max(heads[1:]))))
    most = max(heads)
    repeated = (jnp.repeat(x, most // x.shape[2], axis=2) for x in (q, k, v, g))
    assert_close(linear_attention(q, k, v, g)[0], linear_attention(*repeated)[0], "float64", "shared heads")
    assert linear_attention(q, k, v, g)[1].memory.shape[1] == max(heads[1:])


@pytest.mark.parametrize("chunk_size", [16, 64, 256])
@pytest.mark.parametrize("channels", [False, True])
def test_small_decays_beside_huge_ones_keep_their_digits(chunk_size, channels):
    """Prefix sums would be of size 1e5 here, where float32 has steps of 1e-2."""
    q, k, v, g = example(time=300)
    g = np.where(np.arange(300)[:, None, None] % 7 == 3, -1e4, g / 100).astype(np.float32)
    g = g if channels else g[..., 0]
    with jax.enable_x64(True):
        reference = linear_attention(*(jnp.asarray(x, "float64") for x in (q, k, v, g)), implementation="sequential")
    inputs = (jnp.asarray(x, jnp.float32) for x in (q, k, v, g))
    outputs, state = linear_attention(*inputs, chunk_size=chunk_size, implementation="chunked")
    assert_close((outputs, state.memory), (reference[0], reference[1].memory), "float32", "huge decays")


@jax.enable_x64(True)
@pytest.mark.parametrize("channels", [False, True])
def test_gradients_of_gradients(channels):
    q, k, v, g = example(time=40)
    inputs = [jnp.asarray(x) for x in (q, k, v, g if channels else g[..., 0])]

    def norm_of_gradients(implementation, *inputs):
        loss = lambda *x: jnp.sum(jnp.sin(linear_attention(*x, implementation=implementation, chunk_size=16)[0]))  # noqa: E731
        return sum(jnp.sum(jnp.square(x)) for x in jax.grad(loss, argnums=(0, 1, 2, 3))(*inputs))

    results = [
        jax.jit(jax.grad(functools.partial(norm_of_gradients, name), argnums=(0, 1, 2, 3)))(*inputs)
        for name in ("chunked", "sequential")
    ]
    assert_close(*results, "float64", "second order", floor=1)


def test_the_reverse_pass_keeps_no_state_per_token():
    def temporaries(time, implementation):
        inputs = [jax.ShapeDtypeStruct((1, time, 2, 64), jnp.float32)] * 3
        inputs.append(jax.ShapeDtypeStruct((1, time, 2), jnp.float32))
        loss = lambda *x: jnp.sum(linear_attention(*x, implementation=implementation)[0])  # noqa: E731
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*inputs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    states = 8192 * 2 * 64 * 64 * 4
    assert temporaries(8192, "chunked") < states / 10
    assert temporaries(8192, "sequential") > states


def test_refusals():
    q, k, v, g = map(jnp.asarray, example(time=8, heads=2))
    with pytest.raises(ValueError, match=r"k: expected a number of heads that divides 3"):
        linear_attention(q[:, :, :1], k, jnp.concatenate([v, v[:, :, :1]], axis=2))
    with pytest.raises(ValueError, match=r"log_decay: expected None or shape .*state_heads"):
        linear_attention(q, k, v, g[0, 0])
    with pytest.raises(ValueError, match="chunk_size: expected None or a power of two, got 48"):
        linear_attention(q, k, v, g, chunk_size=48)
    with pytest.raises(ValueError, match="b: expected a number of groups that divides the 2 heads"):
        ssd(v, g[..., 0], g[0, 0, :, 0], jnp.ones((2, 8, 3, 4)), jnp.ones((2, 8, 3, 4)))
    with pytest.raises(ValueError, match="epsilon: expected a positive number"):
        normalised_linear_attention(q, k, v, epsilon=0.0)


def test_any_length_at_once():
    """A symbolic length is served by the scan, with the state, and refused where chunks are asked for."""
    (time,) = jax.export.symbolic_shape("time")
    shapes = [jax.ShapeDtypeStruct((2, time, 2, size), jnp.float32) for size in (8, 8, 12, 8)]
    exported = jax.export.export(jax.jit(linear_attention))(*shapes)
    inputs = [jnp.asarray(x, jnp.float32) for x in example(time=37)]
    assert_close(exported.call(*inputs), linear_attention(*inputs), "float32", "exported")
    with pytest.raises(ValueError, match="time: expected a static length for implementation 'chunked'"):
        jax.export.export(jax.jit(functools.partial(linear_attention, implementation="chunked")))(*shapes)


@jax.enable_x64(True)
@pytest.mark.parametrize("segmented", [False, True])
def test_ssd_is_the_state_space(segmented):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(1, 50, 4, 6))
    b, c = generator.normal(size=(2, 1, 50, 2, 5))
    dt, a, d = generator.exponential(size=(1, 50, 4)), -generator.exponential(size=4), generator.normal(size=4)
    start = 20 if segmented else 0
    ids = jnp.asarray(np.where(np.arange(50) < 20, 4, 7))[None] if segmented else None
    y, state = ssd(*map(jnp.asarray, (x, dt, a, b, c, d)), segment_ids=ids)
    hidden = np.zeros((4, 5, 6))
    for t in range(50):
        if t == start:
            hidden = np.zeros_like(hidden)
        for head in range(4):
            group = head // 2
            hidden[head] = np.exp(dt[0, t, head] * a[head]) * hidden[head] + np.outer(
                b[0, t, group], dt[0, t, head] * x[0, t, head]
            )
            expected = hidden[head].T @ c[0, t, group] + d[head] * x[0, t, head]
            np.testing.assert_allclose(y[0, t, head], expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(state.memory[0], hidden, rtol=1e-10, atol=1e-12)


@jax.enable_x64(True)
def test_normalised_weights_are_those_of_the_features():
    """Based: weights 1 + a + a²/2 over their sum."""
    q, k, v, _ = map(jnp.asarray, example(time=33))
    outputs, state = normalised_linear_attention(taylor_features(q), taylor_features(k), v, epsilon=1e-30)
    a = jnp.einsum("bihd,bjhd->bhij", q, k) / jnp.sqrt(q.shape[-1])
    weights = jnp.tril(1 + a + a**2 / 2)
    expected = jnp.einsum("bhij,bjhv->bihv", weights / weights.sum(-1, keepdims=True), v)
    assert_close(outputs, expected, "float64", "Based")
    first, carried = normalised_linear_attention(taylor_features(q)[:, :9], taylor_features(k)[:, :9], v[:, :9])
    rest, final = normalised_linear_attention(
        taylor_features(q)[:, 9:], taylor_features(k)[:, 9:], v[:, 9:], state=carried
    )
    assert_close(final.memory, state.memory, "float64", "state of two pieces")
    np.testing.assert_allclose(jnp.concatenate([first, rest], axis=1), expected, rtol=1e-4, atol=1e-5)
