import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tpu import delta_rule as kernel
from primitives import DeltaRuleState, delta_rule
from primitives.testing import TOLERANCE, row_errors


def example(time, heads=2, queries=1, key_dim=32, value_dim=32, channels=1, dtype="float32", batch=1):
    """q, k, v, g, beta and the memory that came in, as the kernel takes them, with keys of norm 1 and beta up to 2."""
    rng = np.random.default_rng(time)
    tokens = batch, time, heads

    def normal(*shape):
        return rng.normal(size=shape).astype("float32")

    k = normal(*tokens, key_dim)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    values = normal(*tokens, queries, key_dim), k, normal(*tokens, value_dim)
    g, beta = -0.3 * np.logaddexp(normal(*tokens, channels), 0), 2 / (1 + np.exp(-normal(*tokens, 1)))
    return *(jnp.asarray(x, dtype) for x in values), *map(
        jnp.asarray, (g, beta, normal(batch, heads, key_dim, value_dim))
    )


def cotangents(q, v, memory):
    """Of the outputs and of the last memory: multiples of 1/4, which no dtype rounds."""
    shapes = ((*q.shape[:4], v.shape[-1]), v.dtype), (memory.shape, memory.dtype)
    return [((np.arange(math.prod(shape)) % 7 - 3) / 4).reshape(shape).astype(dtype) for shape, dtype in shapes]


@functools.partial(jax.jit, static_argnums=0)
def everything(scale, q, k, v, g, beta, memory):
    """Outputs, new memory, and the gradients of all inputs."""
    (outputs, after), memories = kernel.forward(scale, q, k, v, g, beta, memory)
    gradients = kernel.backward(scale, q, k, v, g, beta, memories, *cotangents(q, v, memory))
    return outputs, after, *gradients


def recurrence(scale, q, k, v, g, beta, memory):
    """The same by the sequential form, in float64."""
    batch, time, heads, queries, key_dim = q.shape

    def run(q, k, v, g, beta, memory):
        state = DeltaRuleState(memory, jnp.zeros(batch, jnp.int32))
        q, g = q.reshape(batch, time, -1, key_dim), g if g.shape[-1] > 1 else g[..., 0]
        outputs, state = delta_rule(q, k, v, beta[..., 0], g, state=state, scale=scale, implementation="sequential")
        return outputs.reshape(batch, time, heads, queries, -1), state.memory

    with jax.enable_x64(True):
        inputs = [jnp.asarray(x, jnp.float64) for x in (q, k, v, g, beta, memory)]
        results, pull = jax.jit(lambda *x: jax.vjp(run, *x))(*inputs)
        gradients = pull(tuple(jnp.asarray(x, jnp.float64) for x in cotangents(q, v, memory)))
        return [np.asarray(x) for x in (*results, *gradients)]


NAMES = "outputs", "memory", "dq", "dk", "dv", "dg", "dbeta", "dmemory"


def assert_equals_the_recurrence(inputs, scale=0.5, unit=0.2):
    """Of every row, the largest and the root-mean-square error; the memory as float32, whatever the inputs are."""
    got, want = everything(scale, *inputs), recurrence(scale, *inputs)
    dtype = str(inputs[0].dtype)
    for name, g, w in zip(NAMES, got, want, strict=True):
        is_result = name in ("outputs", "memory")
        tolerance = TOLERANCE["float32" if name == "memory" else dtype]
        g, w = (x[..., 0] if x.shape[-1] == 1 else x for x in (np.asarray(g, np.float64), w))
        worst, rms = row_errors(g, w, *((0.1, 0.02) if is_result else (1, unit)))
        assert worst <= tolerance, f"{name}: {worst:.2e} > {tolerance:.2e}"
        assert rms <= tolerance * (0.2 if name == "outputs" else 0.75), f"{name}: root mean square {rms:.2e}"


@pytest.mark.parametrize(
    "options",
    [
        {"time": 1, "key_dim": 16, "value_dim": 24},
        {"time": 63, "queries": 4, "dtype": "bfloat16"},
        {"time": 128, "heads": 1, "key_dim": 128, "value_dim": 64, "channels": 128, "dtype": "bfloat16"},
        {"time": 130, "heads": 3, "key_dim": 16, "value_dim": 24, "channels": 16, "queries": 2},
        {"time": 130, "heads": 1, "key_dim": 256, "value_dim": 256},
        {"time": 300, "key_dim": 64, "value_dim": 128, "dtype": "bfloat16"},
    ],
    ids=str,
)
@pytest.mark.usefixtures("tpu_interpreter")
def test_equals_the_recurrence(options):
    inputs = example(**options)
    program = str(jax.make_jaxpr(functools.partial(everything, 0.5))(*inputs))
    assert program.count("pallas_call[") == 2, "one kernel each way"
    assert_equals_the_recurrence(inputs)


def resets(q, k, v, g, beta, memory):
    """Decays of zero, tiny ones and none, side by side."""
    g = np.where(np.sin(1e6 * g) > 0.7, -np.inf, np.where(np.sin(1e5 * g) > 0.7, -1e4, g))
    return q, k, v, jnp.asarray(g), beta, memory


def one_key(q, k, v, g, beta, memory):
    """Every token writes where all others did: an alternating series for the inverse would cancel."""
    return q, jnp.broadcast_to(k[:, :1], k.shape), v, 0 * g, jnp.full_like(beta, 0.98), memory


@pytest.mark.parametrize("change", [resets, one_key])
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"channels": 16, "dtype": "bfloat16"}], ids=str)
@pytest.mark.usefixtures("tpu_interpreter")
def test_extremes(change, options):
    assert_equals_the_recurrence(change(*example(200, key_dim=16, value_dim=24, **options)), unit=1)


@pytest.mark.usefixtures("tpu_interpreter")
def test_vmap_is_a_longer_batch():
    inputs = example(5, batch=3)
    rows = [x[:, None] for x in inputs]
    program = jax.vmap(functools.partial(everything, 0.5))
    assert str(jax.make_jaxpr(program)(*rows)).count("grid=(3, 1, 1)") == 2
    for got, want in zip(program(*rows)[:2], everything(0.5, *inputs)[:2], strict=True):
        np.testing.assert_allclose(got[:, 0], want, rtol=1e-5, atol=1e-6)


def test_refuses_what_it_cannot_serve():
    q, k, v, g, *_ = example(3)
    assert kernel.refusal(q, k, v, g) is None
    assert "float16" in kernel.refusal(q, k, v.astype("float16"), g)
    assert "at most 256" in kernel.refusal(q, k, jnp.zeros((1, 3, 2, 257)), g)
    assert "heads=11" in kernel.refusal(*example(3, heads=11)[:4])


# --- Compiled ahead of time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 8, "key_dim": 32, "value_dim": 32, "channels": 32},
        {"heads": 2, "key_dim": 256, "value_dim": 256, "channels": 256},
        {"heads": 4, "queries": 2, "key_dim": 64, "value_dim": 128, "dtype": "bfloat16"},
        {"heads": 1, "queries": 4, "key_dim": 256, "value_dim": 256, "channels": 256, "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_compiles_every_size_of_head(tpu_compile, options):
    """On the chip with the least VMEM."""
    types = jax.eval_shape(functools.partial(example, 256, **options))
    compiled = tpu_compile("v4:2x2x1", functools.partial(everything, 0.5), *types)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
