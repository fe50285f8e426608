import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tpu import linear_attention as kernel
from primitives.testing import TOLERANCE, row_errors

SCALE = 0.3
NAMES = "outputs", "memory", "dq", "dk", "dv", "dg", "dmemory"


def example(batch, time, heads, queries, key_dim, value_dim, channels, dtype="float32", extreme=False):
    """Inputs, and cotangents of outputs and memory. Resets; decays of −1e4 beside −0.01 if extreme."""
    rng = np.random.default_rng(time)

    def normal(*shape, dtype="float32"):
        return jnp.asarray(rng.normal(size=shape), dtype)

    q, k = normal(batch, time, heads, queries, key_dim, dtype=dtype), normal(batch, time, heads, key_dim)
    k, v = (k / math.sqrt(key_dim)).astype(dtype), normal(batch, time, heads, value_dim, dtype=dtype)
    g = -jnp.exp(normal(batch, time, heads, key_dim if channels else 1) - 2)
    if extreme:
        g = jnp.where(rng.random(g.shape) < 0.05, -1e4, -0.01)
    g = jnp.where(rng.random((batch, time, 1, 1)) < 0.02, -jnp.inf, g)
    states = (normal(batch, heads, key_dim, value_dim) for _ in range(2))
    memory, dmemory = states
    do = normal(batch, time, heads, queries, value_dim, dtype=dtype)
    return (q, k, v, g, memory), (do, dmemory)


@jax.jit
def everything(inputs, cotangents):
    """Outputs, the memory after them, and the gradients of all inputs, by the kernels."""
    *tokens, _ = inputs
    results, memories = kernel.forward(SCALE, *inputs)
    return *results, *kernel.backward(SCALE, *tokens, memories, *cotangents)


def recurrence(q, k, v, g, memory):
    def step(memory, token):
        q, k, v, g = token
        memory = jnp.exp(g)[..., None] * memory + k[..., None] * v[..., None, :]
        return memory, SCALE * jnp.einsum("bhrk,bhkv->bhrv", q, memory)

    memory, outputs = jax.lax.scan(step, memory, jax.tree.map(lambda x: x.swapaxes(0, 1), (q, k, v, g)))
    return outputs.swapaxes(0, 1), memory


def assert_equals_the_recurrence(got, inputs, cotangents):
    """Compare every row with the recurrence in float64, as tightly as the laws of `primitives.testing` do."""
    dtype = got[0].dtype.name
    with jax.enable_x64(True):
        inputs, cotangents = jax.tree.map(lambda x: np.asarray(x, np.float64), (inputs, cotangents))
        results, transposed = jax.vjp(recurrence, *inputs)
        want = *results, *transposed(cotangents)
    for name, g, w in zip(NAMES, got, want, strict=True):
        g, w = (np.asarray(x, np.float64) for x in (g, w))
        if name == "dg" and w.shape[-1] == 1:
            g, w = g[..., 0], w[..., 0]
        floor, unit = (0.1, 0.02) if name in ("outputs", "memory") else (1, 0.2)
        share = 0.75 if w.shape[-1] < 16 else 0.2 if name == "outputs" else 0.5
        worst, rms = row_errors(g, w, floor, unit)
        assert worst <= TOLERANCE[dtype], f"{name}: {worst}"
        assert rms <= share * TOLERANCE[dtype], f"{name}: {rms}"


@pytest.mark.parametrize(
    ("shape", "dtype", "extreme"),
    [
        ((2, 1, 2, 1, 16, 24, False), "float32", False),
        ((1, 63, 2, 2, 32, 64, True), "bfloat16", True),
        ((2, 130, 3, 1, 16, 24, True), "float32", True),  # a chunk and a ragged one, whole arrays as blocks
        ((1, 128, 1, 1, 128, 128, False), "bfloat16", True),
        ((1, 129, 1, 4, 64, 32, False), "float32", True),
        ((1, 300, 2, 1, 64, 64, False), "bfloat16", False),
        ((1, 256, 1, 1, 256, 128, True), "bfloat16", False),
        ((1, 70, 8, 1, 128, 256, False), "float32", False),  # blocks of heads
    ],
)
@pytest.mark.usefixtures("tpu_interpreter")
def test_equals_the_recurrence(shape, dtype, extreme):
    inputs, cotangents = example(*shape, dtype, extreme)
    assert kernel.refusal(*inputs[:4]) is None
    assert str(jax.make_jaxpr(everything)(inputs, cotangents)).count("pallas_call[") == 2, "one kernel each way"
    assert_equals_the_recurrence(everything(inputs, cotangents), inputs, cotangents)


@pytest.mark.usefixtures("tpu_interpreter")
def test_without_gradients_no_memories_are_written():
    inputs, _ = example(1, 130, 2, 1, 16, 16, False)
    (outputs, memory), memories = kernel.forward(SCALE, *inputs)
    (same, same_memory), none = kernel.forward(SCALE, *inputs, save=False)
    assert memories.shape == (1, 2, 2, 16, 16)
    assert none is None
    np.testing.assert_array_equal(memories[:, 0], inputs[-1])
    np.testing.assert_array_equal(outputs, same)
    np.testing.assert_array_equal(memory, same_memory)


@pytest.mark.usefixtures("tpu_interpreter")
def test_vmap_is_a_longer_batch():
    inputs, cotangents = example(3, 5, 2, 1, 16, 16, False)
    rows = jax.tree.map(lambda x: x[:, None], (inputs, cotangents))
    assert str(jax.make_jaxpr(jax.vmap(everything))(*rows)).count("grid=(3, 1, 1)") == 2
    for got, want in zip(jax.vmap(everything)(*rows), everything(inputs, cotangents), strict=True):
        np.testing.assert_allclose(got[:, 0], want, rtol=1e-5, atol=1e-6)


def test_refuses_what_it_cannot_serve():
    (q, k, v, g, _), _ = example(1, 3, 2, 1, 16, 16, False)
    assert "float16" in kernel.refusal(q.astype("float16"), k, v, g)
    assert "bfloat16" in kernel.refusal(q.astype("bfloat16"), k, v, g)
    assert "key_dim=512" in kernel.refusal(*(jnp.zeros((1, 3, 2, *s)) for s in ((1, 512), (512,), (16,), (1,))))
    assert "queries=8" in kernel.refusal(*(jnp.zeros((1, 3, 2, *s)) for s in ((8, 256), (256,), (16,), (1,))))
    assert "heads=50" in kernel.refusal(*(jnp.zeros((1, 3, 50, *s)) for s in ((1, 48), (48,), (48,), (1,))))


# --- Compiled ahead of time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 256, 1, 4, 256, 256, True), "float32"),  # the most VMEM
        ((1, 200, 4, 2, 32, 64, False), "bfloat16"),
        ((1, 200, 3, 1, 48, 80, True), "bfloat16"),  # whole arrays as blocks
    ],
)
def test_compiles_every_size_of_head(tpu_compile, shape, dtype):
    """On the chip with the least VMEM."""
    types = jax.eval_shape(functools.partial(example, *shape, dtype))
    compiled = tpu_compile("v4:2x2x1", everything, *types)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
