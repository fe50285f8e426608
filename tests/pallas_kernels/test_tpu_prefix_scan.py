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
from primitives import PrefixState, prefix_scan_attention


def example(batch, time, heads, dim, dtype="float32", packed=False):
    """Logits, values and a state that came in; segment ids with padding, or none."""
    rng = np.random.default_rng(time)

    def normal(*shape, dtype="float32"):
        return jnp.asarray(rng.normal(size=shape), dtype)

    s, v = 3 * normal(batch, time, heads, dtype=dtype), normal(batch, time, heads, dim, dtype=dtype)
    m, w = normal(batch, heads), normal(batch, heads, dim)
    second_chunk = np.arange(time) == 128  # begins a document
    ids = np.cumsum((rng.random((batch, time)) < 4 / time) | second_chunk, axis=1)
    ids = np.where((rng.random((batch, time)) < 0.1) & ~second_chunk, -1, ids)
    state = PrefixState(m, 1 + normal(batch, heads) ** 2, w, jnp.zeros(batch, jnp.int32))
    return (s, v, state), jnp.asarray(ids, jnp.int32) if packed else None


@functools.partial(jax.jit, static_argnames="implementation")
def everything(inputs, ids, implementation="pallas"):
    """Outputs, new state, and the gradients of logits, values and state for some cotangents of outputs and state."""

    def loss(inputs):
        s, v, state = inputs
        results = prefix_scan_attention(s, v, state=state, segment_ids=ids, implementation=implementation)
        outputs, state = results
        return sum(jnp.sum(x * cotangent(x)) for x in (outputs, state.denominator, state.numerator)), results

    gradients, results = jax.grad(loss, has_aux=True, allow_int=True)(inputs)
    return [x for x in jax.tree.leaves((results, gradients)) if jnp.issubdtype(x.dtype, jnp.floating)]


def cotangent(x):
    """Multiples of 1/4, which no dtype rounds."""
    return (jnp.arange(x.size) % 7 - 3).reshape(x.shape).astype(x.dtype) / 4


def assert_equals_the_recurrence(got, inputs, ids):
    """Compare with the sequential form in float64: root mean square and largest error of every array."""
    tolerance = 1e-5 if got[0].dtype == jnp.float32 else 3e-3
    with jax.enable_x64(True):
        inputs = jax.tree.map(lambda x: x if x.dtype == jnp.int32 else np.asarray(x, np.float64), inputs)
        want = jax.tree.map(np.asarray, everything(inputs, ids, "sequential"))
    for g, w in zip(got, want, strict=True):
        assert w.dtype == np.float64
        error = np.asarray(g, np.float64) - w
        assert np.sqrt(np.mean(error**2)) <= tolerance * np.sqrt(np.mean(w**2))
        assert np.max(np.abs(error)) <= 3 * tolerance * np.max(np.abs(w))


@pytest.mark.parametrize(
    ("shape", "dtype", "packed"),
    [
        ((2, 2, 2, 32), "float32", False),  # less than a chunk
        ((1, 63, 2, 64), "bfloat16", True),
        ((1, 64, 1, 128), "float32", True),
        ((1, 65, 2, 64), "float32", False),
        ((2, 130, 2, 64), "bfloat16", False),  # a chunk and a ragged one
        ((1, 130, 4, 32), "float32", True),
        ((1, 256, 1, 128), "bfloat16", True),  # whole chunks
        ((1, 130, 4, 512), "float32", True),  # two blocks of heads, each head wider than a chunk
    ],
)
@pytest.mark.usefixtures("tpu_interpreter")
def test_equals_the_recurrence(shape, dtype, packed):
    inputs, ids = example(*shape, dtype, packed)
    assert str(jax.make_jaxpr(everything)(inputs, ids)).count("pallas_call[") == 2, "one kernel each way"
    assert_equals_the_recurrence(everything(inputs, ids), inputs, ids)


@pytest.mark.usefixtures("tpu_interpreter")
def test_no_weight_at_first():
    (s, v, _), ids = example(1, 130, 2, 32, packed=True)
    s = jnp.where(jnp.arange(130)[:, None] < 70, -jnp.inf, 1e4 * s)
    empty = PrefixState(jnp.full((1, 2), -jnp.inf), jnp.zeros((1, 2)), jnp.zeros((1, 2, 32)), jnp.zeros(1, jnp.int32))
    assert_equals_the_recurrence(everything((s, v, empty), ids), (s, v, empty), ids)


@pytest.mark.usefixtures("tpu_interpreter")
def test_vmap_is_a_longer_batch():
    inputs, ids = example(3, 5, 2, 32, packed=True)
    rows = jax.tree.map(lambda x: x[:, None], (inputs, ids))
    program = jax.vmap(
        lambda s, ids: prefix_scan_attention(*s[:2], state=s[2], segment_ids=ids, implementation="pallas")
    )
    assert str(jax.make_jaxpr(program)(*rows)).count("grid=(3, 1, 1)") == 1
    got, want = program(*rows), prefix_scan_attention(*inputs[:2], state=inputs[2], segment_ids=ids)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g[:, 0], w, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.usefixtures("tpu_interpreter")
def test_gradients_of_gradients():
    (s, v, state), ids = example(1, 70, 2, 32, packed=True)

    @functools.partial(jax.jit, static_argnums=2)
    def second(s, v, implementation):
        def loss(s, v):
            attend = functools.partial(prefix_scan_attention, implementation=implementation)
            outputs, new = attend(s, v, state=state, segment_ids=ids)
            following, _ = attend(s[:, :2], v[:, :2], state=new)
            return jnp.sum(jnp.sin(outputs)) + jnp.sum(following**2)

        return jax.grad(lambda *x: sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(*x)), (0, 1))(s, v)

    for g, w in zip(second(s, v, "pallas"), second(s, v, "sequential"), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5 * np.max(np.abs(w)))


def test_refuses_what_it_cannot_serve():
    (s, v, _), _ = example(1, 3, 2, 32)
    with pytest.raises(ValueError, match=r"implementation: 'pallas' cannot serve these inputs: .* float16"):
        prefix_scan_attention(s.astype("float16"), v.astype("float16"), implementation="pallas")
    with pytest.raises(ValueError, match="at most 1024, got heads=2, dim=1100"):
        prefix_scan_attention(s, jnp.zeros((1, 3, 2, 1100)), implementation="pallas")
    with jax.enable_x64(True), pytest.raises(ValueError, match="float64"):
        prefix_scan_attention(np.asarray(s, np.float64), v, implementation="pallas")
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
        prefix_scan_attention(s, v, implementation="pallas")


@pytest.mark.usefixtures("tpu_interpreter")
def test_float32_with_x64_on():
    inputs, ids = example(1, 5, 2, 32, packed=True)
    want = everything(inputs, ids)
    with jax.enable_x64(True):
        got = everything(inputs, ids)
    assert [x.dtype for x in got] == [x.dtype for x in want]
    jax.tree.map(np.testing.assert_array_equal, got, want)


# --- Compiled ahead of time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("implementation", "dtype"), [("pallas", "float32"), (None, "bfloat16")])
def test_compiles(tpu_compile, implementation, dtype):
    """One kernel each way; temporaries of at most three arrays like the values and 32 numbers per token and head."""
    shape = 2, 16384, 2, 64
    types, _ = jax.eval_shape(functools.partial(example, *shape, dtype))
    program = functools.partial(everything, ids=None, implementation=implementation)
    compiled = tpu_compile("v5e:2x2", program, types)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    bound = 3 * math.prod(shape) * jnp.dtype(dtype).itemsize + 32 * 4 * math.prod(shape[:3])
    assert compiled.memory_analysis().temp_size_in_bytes <= bound


@pytest.mark.parametrize("implementation", ["pallas", None])
def test_explicit_mesh_gathers_nothing(implementation):
    mesh = jax.make_mesh((8, 2), ("batch", "heads"), devices=tpu_devices("v5e:4x4"))
    inputs, ids = jax.eval_shape(functools.partial(example, 8, 256, 4, 64, packed=True))
    state = PrefixState(P("batch", "heads"), P("batch", "heads"), P("batch", "heads"), P("batch"))
    axes = (P("batch", None, "heads"), P("batch", None, "heads"), state), P("batch")

    def shard(x, axes):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, axes))

    program = jax.jit(functools.partial(everything, implementation=implementation))
    with jax.set_mesh(mesh):
        text = program.lower(*jax.tree.map(shard, (inputs, ids), axes)).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert not re.findall("all-gather|all-to-all|collective-permute", text)


def copies(text, size):
    """Instructions of a compiled program that rearrange an array of at least so many elements."""
    found = re.findall(r"= \(?\w+\[([\d,]*)\]\S* (copy|copy-start|transpose)\(", text)
    return [(shape, name) for shape, name in found if math.prod(map(int, shape.split(",") if shape else ())) >= size]


@pytest.mark.parametrize(("dim", "dtype"), [(64, "float32"), (64, "bfloat16"), (128, "float32"), (128, "bfloat16")])
def test_projections_around_it_need_no_copy(tpu_compile, dim, dtype):
    batch, time, heads, width = 4, 2048, 8, 384

    def layer(x, weights):
        logits, values, out = weights
        s, v = x @ logits, (x @ values).reshape(batch, time, heads, dim)
        outputs, _ = prefix_scan_attention(s, v)
        return outputs.reshape(batch, time, heads * dim) @ out

    def gradient(x, weights):
        return jax.grad(lambda *inputs: jnp.sum(layer(*inputs).astype(jnp.float32) ** 2), (0, 1))(x, weights)

    def transposed(x, weights):
        logits, values, _ = weights
        v = (x @ values).reshape(batch, heads, time, dim).swapaxes(1, 2)
        return prefix_scan_attention(x @ logits, v)[0]

    shapes = (batch, time, width), ((width, heads), (width, heads * dim), (heads * dim, width))
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x, dtype), shapes, is_leaf=lambda x: isinstance(x[0], int))
    size = batch * time * heads * dim
    assert not copies(tpu_compile("v5e:2x2", layer, *types).as_text(), size)
    if dim == 64:
        assert not copies(tpu_compile("v5e:2x2", gradient, *types).as_text(), size)
    else:
        assert copies(tpu_compile("v5e:2x2", transposed, *types).as_text(), size), "a copy that is there is not found"


def test_rematerialised_layers_compile(tpu_compile):
    """The interpreter's effects cannot be rematerialised, the kernel can."""
    (s, v, _), _ = jax.eval_shape(functools.partial(example, 2, 256, 2, 64))

    def loss(s, v):
        def layer(v, _):
            return prefix_scan_attention(s, v, implementation="pallas")[0], None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), v, length=3)[0])

    program = tpu_compile("v5e:2x2", jax.grad(loss, argnums=(0, 1)), s, v).as_text()
    # Forward, and backward once more with its own kernel: a scan runs its body, whatever its length.
    assert program.count('custom_call_target="tpu_custom_call"') == 3
