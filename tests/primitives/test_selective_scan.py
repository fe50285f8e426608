"""What `selective_scan` is, beside the laws of all mixers: an independent oracle, memory, platforms."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primitives import dispatch, selective_scan, state_space_bank
from primitives.selective_scan import CHUNK, IMPLEMENTATIONS

EVERY = (None, *(name for name in IMPLEMENTATIONS if name != "pallas"))  # which tests/pallas_kernels interpret


def random_inputs(time, batch=2, dim=3, n=4, seed=0):
    generator = np.random.default_rng(seed)
    x, dt = generator.normal(size=(2, batch, time, dim))
    b, c = generator.normal(size=(2, batch, time, n))
    return x, np.logaddexp(0, dt), -np.exp(generator.normal(size=(dim, n))), b, c, generator.normal(size=dim)


def looped(x, dt, a, b, c, d):
    """Algorithm 2 of the paper in NumPy, one token after another."""
    hidden, y = np.zeros((x.shape[0], *a.shape)), []
    for t in range(x.shape[1]):
        hidden = np.exp(np.einsum("bd,dn->bdn", dt[:, t], a)) * hidden
        hidden = hidden + np.einsum("bd,bn,bd->bdn", dt[:, t], b[:, t], x[:, t])
        y.append(np.einsum("bdn,bn->bd", hidden, c[:, t]) + d * x[:, t])
    return np.stack(y, axis=1), hidden


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("time", [1, 5, CHUNK + 1])
def test_equals_a_loop(implementation, time):
    inputs = random_inputs(time)
    with jax.enable_x64(True):
        y, state = selective_scan(*map(jnp.asarray, inputs), implementation=implementation)
        chex.assert_trees_all_close((np.asarray(y), np.asarray(state.hidden)), looped(*inputs), rtol=1e-11, atol=1e-13)


def test_is_time_invariant_where_the_tokens_select_nothing():
    x, dt, a, b, c, d = random_inputs(70)
    dt, b, c = (np.broadcast_to(array[:1, :1], array.shape) for array in (dt, b, c))
    with jax.enable_x64(True):
        decay, scale = jnp.exp(dt[0, 0, :, None] * a), dt[0, 0, :, None] * b[0, 0]
        expected, _ = state_space_bank(jnp.asarray(x), decay, scale, jnp.broadcast_to(c[0, 0], a.shape), jnp.asarray(d))
        y, _ = selective_scan(*map(jnp.asarray, (x, dt, a, b, c, d)))
        chex.assert_trees_all_close(y, expected, rtol=1e-11, atol=1e-13)


def test_no_skip_connection():
    *inputs, _ = map(jnp.float32, random_inputs(9))
    chex.assert_trees_all_equal(selective_scan(*inputs), selective_scan(*inputs, jnp.zeros(3)))


def backward_memory(implementation, *inputs):
    def gradients(cotangent, *inputs):
        return jax.vjp(lambda *x: selective_scan(*x, implementation=implementation)[0], *inputs)[1](cotangent)

    return jax.jit(gradients).lower(inputs[0], *inputs).compile().memory_analysis().temp_size_in_bytes


def test_backward_keeps_one_state_for_each_chunk():
    """Beside gradients: states before the chunks and those in one chunk. The sequential form has one for each token."""
    inputs = [jnp.float32(x) for x in random_inputs(8192, batch=1, dim=32, n=16)]
    memory = {name: backward_memory(name, *inputs) for name in EVERY}
    state = 4 * 32 * 16
    kept = (8192 // CHUNK + CHUNK) * state
    assert memory["loop"] < 1.1 * kept + 4 * inputs[0].nbytes
    assert memory["associative"] < 32 * CHUNK * state + kept + 8 * inputs[0].nbytes
    assert memory["sequential"] > 8192 * state


def test_the_choice_for_accelerators_on_a_cpu(monkeypatch):
    """Their reverse rule is that of the associative form, from the states before the chunks."""
    inputs = [jnp.float32(x) for x in random_inputs(CHUNK + 6)]
    _, state = selective_scan(*(x[:, :5] if x.ndim == 3 else x for x in inputs))
    ids = jnp.asarray(np.repeat([[0, -1, 1], [0, 0, -1]], [30, 10, CHUNK - 34], axis=1))

    def gradients(implementation):
        def loss(hidden, *inputs):
            before = state._replace(hidden=hidden)
            y, final = selective_scan(*inputs, state=before, segment_ids=ids, implementation=implementation)
            return jnp.sum(y**2) + jnp.sum(final.hidden**2)

        return jax.jit(jax.grad(loss, range(7)))(state.hidden, *inputs)

    table = dispatch.read_table()["selective_scan"]
    monkeypatch.setattr(dispatch, "read_table", lambda: {"selective_scan": table | {"cpu": table["cuda"]}})
    chex.assert_trees_all_close(gradients(None), gradients("sequential"), rtol=1e-4, atol=1e-4)


def test_any_length_at_once():
    """`None` serves a symbolic length on every platform, with gradients."""
    batch, time = jax.export.symbolic_shape("batch, time")

    @jax.jit
    def gradients(*inputs):
        return jax.grad(lambda *x: jnp.sum(selective_scan(*x)[0] ** 2), range(6))(*inputs)

    wide, narrow = (batch, time, 3), (batch, time, 4)
    arguments = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (wide, wide, (3, 4), narrow, narrow, (3,)))
    exported = jax.export.export(gradients, platforms=("cpu", "tpu", "cuda"))(*arguments)
    for length in (2, 70):
        inputs = [jnp.float32(x) for x in random_inputs(length)]
        chex.assert_trees_all_close(exported.call(*inputs), gradients(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["loop", "associative"])
def test_refuses_a_symbolic_length_in_chunks(implementation):
    (time,) = jax.export.symbolic_shape("time")
    shapes = (1, time, 3), (1, time, 3), (3, 4), (1, time, 4), (1, time, 4)
    with pytest.raises(ValueError, match="static length"):
        jax.eval_shape(
            lambda *x: selective_scan(*x, implementation=implementation),
            *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
        )
