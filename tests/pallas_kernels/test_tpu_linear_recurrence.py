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
from primitives import LinearRecurrenceState, linear_recurrence


def example(batch, time, rest, decay_shape=None, dtype="float32", packed=False, imaginary=False):
    """Decay, inputs and a state that came in; segment ids with padding, or none."""
    rng = np.random.default_rng(time)

    def normal(*shape):
        return rng.normal(size=shape) + (1j * rng.normal(size=shape) if imaginary else 0)

    decay = rng.uniform(0.3, 1, size=(batch, time, *rest) if decay_shape is None else decay_shape)
    decay = decay * np.exp(1j * decay) if imaginary else decay
    ids = np.cumsum(rng.random((batch, time)) < 4 / time, axis=1)
    ids = jnp.asarray(np.where(rng.random((batch, time)) < 0.1, -1, ids), jnp.int32) if packed else None
    wide = "complex64" if imaginary else "float32"
    state = LinearRecurrenceState(jnp.asarray(normal(batch, *rest), wide), jnp.zeros(batch, jnp.int32))
    return (jnp.asarray(decay, dtype), jnp.asarray(normal(batch, time, *rest), dtype), state), ids


@functools.partial(jax.jit, static_argnames="implementation")
def everything(inputs, ids, implementation="pallas"):
    """Outputs, new state, and the gradients of decay, inputs and state for some cotangents of outputs and state."""

    def loss(inputs):
        decay, x, state = inputs
        results = linear_recurrence(decay, x, state=state, segment_ids=ids, implementation=implementation)
        outputs, state = results
        return sum(jnp.sum((x * cotangent(x)).real) for x in (outputs, state.hidden)), results

    gradients, results = jax.grad(loss, has_aux=True, allow_int=True)(inputs)
    return [x for x in jax.tree.leaves((results, gradients)) if jnp.issubdtype(x.dtype, jnp.inexact)]


def cotangent(x):
    """Multiples of 1/4, which no dtype rounds."""
    return (jnp.arange(x.size) % 7 - 3).reshape(x.shape).astype(x.dtype) / 4


def assert_equals_the_recurrence(got, inputs, ids):
    """Compare with the sequential form in float64: root mean square and largest error of every array."""
    tolerance = 3e-3 if got[0].dtype == jnp.bfloat16 else 1e-5
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x if x.dtype == jnp.int32 else x.astype(np.result_type(x.dtype, "f8")), inputs)
        want = jax.tree.map(np.asarray, everything(wide, ids, "sequential"))
    for g, w in zip(got, want, strict=True):
        error = np.abs(np.asarray(g, w.dtype) - w)
        assert np.sqrt(np.mean(error**2)) <= tolerance * np.sqrt(np.mean(np.abs(w) ** 2))
        assert np.max(error) <= 3 * tolerance * np.max(np.abs(w))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 2, (32,)), {}),
        ((1, 70, (3, 50)), {"decay_shape": (3, 1), "packed": True}),  # 150 channels
        ((1, 257, (520,)), {"packed": True}),  # a chunk and a ragged one, a block of channels and a ragged one
        ((1, 256, (2048,)), {"decay_shape": (2048,), "dtype": "bfloat16"}),  # a whole chunk
        ((1, 300, (2, 20)), {"decay_shape": (1, 300, 2, 1), "dtype": "bfloat16", "packed": True}),
        ((2, 260, (300,)), {"decay_shape": (300,), "imaginary": True, "dtype": "complex64", "packed": True}),
    ],
)
@pytest.mark.usefixtures("tpu_interpreter")
def test_equals_the_recurrence(shape, options):
    inputs, ids = example(*shape, **options)
    assert str(jax.make_jaxpr(everything)(inputs, ids)).count("pallas_call[") == 2, "one kernel each way"
    assert_equals_the_recurrence(everything(inputs, ids), inputs, ids)


@pytest.mark.usefixtures("tpu_interpreter")
def test_a_real_decay_of_complex_inputs():
    (decay, *rest), ids = example(1, 40, (32,), imaginary=True, dtype="complex64", packed=True)
    inputs = decay.real, *rest
    assert_equals_the_recurrence(everything(inputs, ids), inputs, ids)


@pytest.mark.usefixtures("tpu_interpreter")
def test_vmap_is_a_longer_batch():
    (decay, x, state), ids = example(3, 5, (32,), decay_shape=(32,), packed=True)
    rows = jax.tree.map(lambda x: x[:, None], (x, state, ids))

    def program(x, state, ids):
        return linear_recurrence(decay, x, state=state, segment_ids=ids, implementation="pallas")

    assert str(jax.make_jaxpr(jax.vmap(program))(*rows)).count("grid=(3, 1, 1)") == 1
    got, want = jax.vmap(program)(*rows), linear_recurrence(decay, x, state=state, segment_ids=ids)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g[:, 0], w, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.usefixtures("tpu_interpreter")
def test_gradients_of_gradients():
    (decay, x, state), ids = example(1, 20, (32,), packed=True)

    @functools.partial(jax.jit, static_argnums=2)
    def second(decay, x, implementation):
        def loss(decay, x):
            run = functools.partial(linear_recurrence, implementation=implementation)
            states, new = run(decay, x, state=state, segment_ids=ids)
            return jnp.sum(jnp.sin(states)) + jnp.sum(new.hidden**2)

        return jax.grad(lambda *x: sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(*x)), (0, 1))(decay, x)

    for g, w in zip(second(decay, x, "pallas"), second(decay, x, "sequential"), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5 * np.max(np.abs(w)))


def test_refuses_what_it_cannot_serve():
    (decay, x, _), _ = example(1, 3, (32,))
    with jax.enable_x64(True):
        for wide in (np.asarray(decay, np.float64), x), (decay, np.asarray(x, np.complex128)):
            with pytest.raises(
                ValueError, match=r"implementation: 'pallas' cannot serve these inputs: .* (float64|complex128)"
            ):
                linear_recurrence(*wide, implementation="pallas")
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
        linear_recurrence(decay, x, implementation="pallas")


# --- Compiled ahead of time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rest", "options"),
    [
        ((16, 64), {"dtype": "bfloat16"}),
        ((300,), {"decay_shape": (300,), "packed": True}),
    ],
)
def test_compiles(tpu_compile, rest, options):
    """One kernel each way; temporaries of at most eight arrays like the inputs. v4 has the least VMEM."""
    types, ids = jax.eval_shape(lambda: example(2, 2048, rest, **options))
    compiled = tpu_compile("v4:2x2x1", everything, types, ids)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    x = types[1]
    assert compiled.memory_analysis().temp_size_in_bytes <= 8 * math.prod(x.shape) * x.dtype.itemsize


def test_compiles_for_complex_numbers(tpu_compile):
    types, _ = jax.eval_shape(lambda: example(1, 512, (256,), imaginary=True, dtype="complex64", decay_shape=(256,)))
    compiled = tpu_compile("v5e:2x2", functools.partial(everything, ids=None), types)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2


def test_a_constant_decay_is_not_copied_over_time(tpu_compile):
    types, _ = jax.eval_shape(lambda: example(4, 8192, (512,), decay_shape=(512,)))
    compiled = tpu_compile("v5e:2x2", lambda *inputs: linear_recurrence(*inputs, implementation="pallas"), *types[:2])
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20


def test_explicit_mesh_gathers_nothing():
    mesh = jax.make_mesh((8, 2), ("batch", "heads"), devices=tpu_devices("v5e:4x4"))
    inputs, ids = jax.eval_shape(lambda: example(8, 256, (4, 64), packed=True))
    axes = (
        P("batch", None, "heads"),
        P("batch", None, "heads"),
        LinearRecurrenceState(P("batch", "heads"), P("batch")),
    )

    def shard(x, axes):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, axes))

    with jax.set_mesh(mesh):
        text = everything.lower(*jax.tree.map(shard, (inputs, ids), (axes, P("batch")))).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert not re.findall("all-gather|all-to-all|collective-permute", text)
