import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.tpu_compiler import tpu_devices
from primitives import SelectiveScanState, selective_scan


def example(batch, time, dim, n, dtype="float32", packed=False):
    """x, dt, a, b, c, d and a state that came in; segment ids with padding, or none."""
    rng = np.random.default_rng(time)

    def normal(*shape, dtype=dtype):
        return jnp.asarray(rng.normal(size=shape), dtype)

    x, dt, a = normal(batch, time, dim), jax.nn.softplus(normal(batch, time, dim) - 1), -jnp.exp(normal(dim, n))
    state = SelectiveScanState(normal(batch, dim, n, dtype="float32"), jnp.zeros(batch, jnp.int32))
    ids = np.cumsum(rng.random((batch, time)) < 4 / time, axis=1)
    ids = jnp.asarray(np.where(rng.random((batch, time)) < 0.1, -1, ids), jnp.int32) if packed else None
    return (x, dt, a, normal(batch, time, n), normal(batch, time, n), normal(dim), state), ids


@functools.partial(jax.jit, static_argnames="implementation")
def everything(inputs, ids, implementation="pallas"):
    """Outputs, new state, and the gradients of all inputs and the state for some cotangents of outputs and state."""

    def loss(inputs):
        *arrays, state = inputs
        results = selective_scan(*arrays, state=state, segment_ids=ids, implementation=implementation)
        y, state = results
        return sum(jnp.sum(x * cotangent(x)) for x in (y, state.hidden)), results

    gradients, results = jax.grad(loss, has_aux=True, allow_int=True)(inputs)
    return [x for x in jax.tree.leaves((results, gradients)) if jnp.issubdtype(x.dtype, jnp.floating)]


def cotangent(x):
    """Multiples of 1/4, which no dtype rounds."""
    return (jnp.arange(x.size) % 7 - 3).reshape(x.shape).astype(x.dtype) / 4


def assert_equals_the_recurrence(got, inputs, ids):
    """Compare with the sequential form in float64: root mean square and largest error of every array."""
    tolerance = 1e-5 if got[0].dtype == jnp.float32 else 5e-3
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x if x.dtype == jnp.int32 else x.astype("float64"), inputs)
        want = jax.tree.map(np.asarray, everything(wide, ids, "sequential"))
    for g, w in zip(got, want, strict=True):
        error = np.asarray(g, np.float64) - w
        assert np.sqrt(np.mean(error**2)) <= tolerance * np.sqrt(np.mean(w**2))
        assert np.max(np.abs(error)) <= 3 * tolerance * np.max(np.abs(w))


@pytest.mark.parametrize(
    ("shape", "dtype", "packed"),
    [
        ((2, 2, 32, 8), "float32", False),
        ((1, 70, 600, 16), "bfloat16", True),  # two chunks, a block of channels and a ragged one
        ((1, 30, 2048, 12), "float32", True),  # n fills no registers
        ((1, 64, 200, 64), "float32", False),
    ],
)
@pytest.mark.usefixtures("tpu_interpreter")
def test_equals_the_recurrence(shape, dtype, packed):
    inputs, ids = example(*shape, dtype, packed)
    assert str(jax.make_jaxpr(everything)(inputs, ids)).count("pallas_call[") == 2, "one kernel each way"
    assert_equals_the_recurrence(everything(inputs, ids), inputs, ids)


@pytest.mark.usefixtures("tpu_interpreter")
def test_vmap_is_a_longer_batch():
    (*inputs, state), ids = example(3, 5, 32, 8, packed=True)
    x, dt, a, b, c, d = inputs
    rows = jax.tree.map(lambda x: x[:, None], (x, dt, b, c, state, ids))

    def program(x, dt, b, c, state, ids):
        return selective_scan(x, dt, a, b, c, d, state=state, segment_ids=ids, implementation="pallas")

    assert str(jax.make_jaxpr(jax.vmap(program))(*rows)).count("grid=(3, 1, 1)") == 1
    got, want = jax.vmap(program)(*rows), selective_scan(*inputs, state=state, segment_ids=ids)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g[:, 0], w, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.usefixtures("tpu_interpreter")
def test_gradients_of_gradients():
    (x, dt, *rest, state), ids = example(1, 20, 32, 8, packed=True)

    @functools.partial(jax.jit, static_argnums=2)
    def second(x, dt, implementation):
        def loss(x, dt):
            y, new = selective_scan(x, dt, *rest, state=state, segment_ids=ids, implementation=implementation)
            return jnp.sum(jnp.sin(y)) + jnp.sum(new.hidden**2)

        return jax.grad(lambda *x: sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(*x)), (0, 1))(x, dt)

    for g, w in zip(second(x, dt, "pallas"), second(x, dt, "sequential"), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5 * np.max(np.abs(w)))


def test_refuses_what_it_cannot_serve():
    def refuses(reason, *shape, dtype="float32"):
        (*inputs, _), _ = jax.eval_shape(lambda: example(*shape, dtype))
        with pytest.raises(ValueError, match=reason):
            jax.eval_shape(functools.partial(selective_scan, implementation="pallas"), *inputs)

    refuses("implementation: 'pallas' cannot serve these inputs: .* float16", 1, 3, 32, 8, dtype="float16")
    refuses("n to 64 and .* to 131072, got n=65, dim=32", 1, 3, 32, 65)
    refuses("got n=16, dim=8200", 1, 3, 8200, 16)


# --- Compiled ahead of time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "n", "dtype", "packed"), [(2048, 16, "bfloat16", False), (300, 64, "float32", True)])
def test_compiles(tpu_compile, dim, n, dtype, packed):
    """One kernel each way; temporaries of at most twelve arrays like x: a state is n times as large as a token.

    v4 has the least VMEM.
    """
    shape = 2, 2048, dim
    types, ids = jax.eval_shape(lambda: example(*shape, n, dtype, packed))
    compiled = tpu_compile("v4:2x2x1", everything, types, ids)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    assert compiled.memory_analysis().temp_size_in_bytes <= 12 * math.prod(shape) * jnp.dtype(dtype).itemsize


def test_explicit_mesh_gathers_nothing():
    mesh = jax.make_mesh((8, 2), ("batch", "dim"), devices=tpu_devices("v5e:4x4"))
    inputs, ids = jax.eval_shape(lambda: example(8, 256, 512, 16, packed=True))
    wide, narrow = P("batch", None, "dim"), P("batch")
    state = SelectiveScanState(P("batch", "dim"), P("batch"))
    axes = wide, wide, P("dim"), narrow, narrow, P("dim"), state

    def shard(x, axes):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, axes))

    with jax.set_mesh(mesh):
        text = everything.lower(*jax.tree.map(shard, (inputs, ids), (axes, P("batch")))).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert not re.findall("all-gather|all-to-all|collective-permute", text)
