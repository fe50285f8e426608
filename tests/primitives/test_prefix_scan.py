"""What `prefix_scan_attention` is, beside the laws of all mixers: independent oracles, memory, platforms."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from primitives import dispatch, prefix_scan_attention
from primitives.prefix_scan import IMPLEMENTATIONS

ON_CPU = (None, *(name for name in IMPLEMENTATIONS if name != "pallas"))


def random_inputs(time, scale=1.0, batch=2, heads=3, dim=5, seed=0):
    generator = np.random.default_rng(seed)
    return scale * generator.normal(size=(batch, time, heads)), generator.normal(size=(batch, time, heads, dim))


def masked_softmax(logits, values):
    """The many-to-many attention of the paper as one masked softmax, in NumPy."""
    scores = np.where(np.tril(np.ones((logits.shape[1],) * 2, bool)), logits.swapaxes(1, 2)[:, :, None, :], -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bhij,bjhd->bihd", weights / weights.sum(axis=-1, keepdims=True), values)


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_equals_masked_softmax(implementation, scale):
    logits, values = random_inputs(70, scale)
    with jax.enable_x64(True):
        outputs, _ = prefix_scan_attention(jnp.asarray(logits), jnp.asarray(values), implementation=implementation)
        chex.assert_trees_all_close(np.asarray(outputs), masked_softmax(logits, values), rtol=1e-12, atol=1e-13)


def test_is_a_gated_average():
    logits, values = random_inputs(40)
    with jax.enable_x64(True):
        outputs = np.asarray(prefix_scan_attention(jnp.asarray(logits), jnp.asarray(values))[0])
    gates = np.exp(logits - np.logaddexp.accumulate(logits, axis=1))[..., None]
    steps = gates[:, 1:] * (values[:, 1:] - outputs[:, :-1])
    chex.assert_trees_all_close(np.diff(outputs, axis=1), steps, rtol=1e-9, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(6)))
def test_order_of_the_past_does_not_matter(order):
    logits, values = random_inputs(7)
    order = [*order, 6]
    outputs, shuffled = (
        prefix_scan_attention(jnp.asarray(s, jnp.float32), jnp.asarray(v, jnp.float32), implementation="loop")[0]
        for s, v in ((logits, values), (logits[:, order], values[:, order]))
    )
    chex.assert_trees_all_close(shuffled[:, -1], outputs[:, -1], rtol=1e-5, atol=1e-6)


def test_starts_where_a_zero_maximum_would_underflow():
    logits, values = random_inputs(5)
    outputs, state = prefix_scan_attention(jnp.float32(logits - 200), jnp.float32(values))
    chex.assert_trees_all_close(outputs, np.float32(masked_softmax(logits - 200, values)), rtol=1e-4, atol=1e-5)
    assert float(jnp.max(state.max)) < -190


@pytest.mark.parametrize("implementation", ["loop", "chunked"])
def test_backward_keeps_no_state_per_token(implementation):
    """Inputs, outputs and normalisers, and the cotangents of the inputs, are all that exists."""
    logits, values = (jnp.float32(x) for x in random_inputs(8192, batch=1, heads=2, dim=64))

    def gradients(logits, values, cotangent):
        _, pull = jax.vjp(lambda s, v: prefix_scan_attention(s, v, implementation=implementation)[0], logits, values)
        return pull(cotangent)

    memory = jax.jit(gradients).lower(logits, values, values).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.25 * values.nbytes + 8 * logits.nbytes


@pytest.mark.parametrize("implementation", [None, "loop", "chunked"])
def test_second_derivatives(implementation):
    def curvature(implementation):
        def loss(logits, values):
            outputs, state = prefix_scan_attention(logits, values, implementation=implementation)
            return jnp.sum(jnp.sin(outputs)) + jnp.sum(jnp.cos(state.numerator / state.denominator[..., None]))

        def slope(inputs):
            gradients = jax.grad(loss, (0, 1))(*inputs)
            return sum(jnp.vdot(g, d) for g, d in zip(gradients, directions, strict=True))

        return jax.jit(jax.grad(slope))((logits, values))

    with jax.enable_x64(True):
        logits, values = (jnp.asarray(x) for x in random_inputs(70, batch=1))
        directions = tuple(jnp.asarray(x) for x in random_inputs(70, batch=1, seed=1))
        chex.assert_trees_all_close(curvature(implementation), curvature("sequential"), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_chooses_when_lowered(platform):
    """One traced function, lowered for every platform; the kernel is in the TPU's program alone."""
    logits, values = (jnp.zeros((2, 256, 8)), jnp.zeros((2, 256, 8, 64)))
    text = jax.jit(prefix_scan_attention).trace(logits, values).lower(lowering_platforms=(platform,)).as_text()
    assert ("tpu_custom_call" in text) == (platform == "tpu")


def test_table_of_the_fastest_names_candidates():
    table = dispatch.read_table()["prefix_scan_attention"]
    assert table.keys() == {"cpu", "default", "cuda", "tpu"}
    assert {choice["implementation"] for choice in table.values()} <= {"loop", "chunked", "pallas"}


def test_pallas_says_why_not():
    logits, values = (jnp.zeros((2, 8, 3)), jnp.zeros((2, 8, 3, 2000)))
    with pytest.raises(ValueError, match="'pallas' cannot serve these inputs: it needs heads side by side"):
        prefix_scan_attention(logits, values, implementation="pallas")


def test_symbolic_lengths_export():
    batch, time = jax.export.symbolic_shape("batch, time")
    shapes = [jax.ShapeDtypeStruct((batch, time, 3, *rest), jnp.float32) for rest in ((), (5,))]
    exported = jax.export.export(jax.jit(prefix_scan_attention), platforms=["cpu"])(*shapes)
    logits, values = (jnp.float32(x) for x in random_inputs(70))
    chex.assert_trees_all_close(exported.call(logits, values)[0], prefix_scan_attention(logits, values)[0], rtol=1e-5)
