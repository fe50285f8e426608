"""What `short_convolution` is, beside the laws of all mixers: oracles, width one, the program."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from primitives import ShortConvolutionState, short_convolution

compiled = jax.jit(short_convolution)


def random_inputs(time, width, batch=2, dim=3):
    generator = np.random.default_rng(0)
    return (generator.normal(size=shape) for shape in ((batch, time, dim), (width, dim), (dim,)))


def convolved(x, weight):
    """Every channel by `np.convolve`, whose filters are flipped."""
    full = [[np.convolve(x[b, :, c], weight[::-1, c]) for c in range(x.shape[2])] for b in range(len(x))]
    return np.moveaxis(np.array(full), 1, 2)[:, : x.shape[1]]


@pytest.mark.parametrize("implementation", [None, "sequential", "parallel"])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_equals_numpy(implementation, width):
    x, weight, bias = random_inputs(9, width)
    with jax.enable_x64(True):
        arrays = jnp.asarray(x), jnp.asarray(weight)
        outputs, state = short_convolution(*arrays, jnp.asarray(bias), implementation=implementation)
        plain, _ = short_convolution(*arrays, implementation=implementation)
    chex.assert_trees_all_close(np.asarray(outputs), convolved(x, weight) + bias, rtol=1e-13, atol=1e-13)
    chex.assert_trees_all_close(np.asarray(plain), convolved(x, weight), rtol=1e-13, atol=1e-13)
    chex.assert_trees_all_close(np.asarray(state.inputs), x[:, 9 - (width - 1) :])


@settings(max_examples=30, deadline=None)
@given(ids=st.lists(st.sampled_from([-1, 0, 1]), min_size=7, max_size=7), width=st.sampled_from([1, 3]))
def test_documents_and_padding_anywhere(ids, width):
    """Each run of one id, with padding taken out, is convolved on its own."""
    x, weight, _ = random_inputs(7, width, batch=1)
    ids, expected = np.array(ids), np.zeros_like(x)
    tokens = np.flatnonzero(ids >= 0)
    for run in np.split(tokens, np.flatnonzero(np.diff(ids[tokens])) + 1):
        if run.size:
            expected[:, run] = convolved(x[:, run], weight)
    outputs, _ = compiled(jnp.float32(x), jnp.float32(weight), segment_ids=jnp.int32(ids[None]))
    chex.assert_trees_all_close(np.asarray(outputs), np.float32(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["sequential", "parallel"])
def test_width_one_has_a_state_without_tokens(implementation):
    x, weight, _ = (jnp.float32(array) for array in random_inputs(4, 1))
    ids = jnp.array([[0, 0, 1, -1], [-1, 2, 2, 2]])
    first, state = short_convolution(x[:, :3], weight, segment_ids=ids[:, :3], implementation=implementation)
    last, state = short_convolution(x[:, 3:], weight, state=state, segment_ids=ids[:, 3:])
    assert state.inputs.shape == (2, 0, 3)
    expected = jnp.where(ids[..., None] >= 0, x * weight, 0)
    chex.assert_trees_all_close(jnp.concatenate([first, last], axis=1), expected)


def test_without_segments_nothing_is_moved():
    x, weight, bias = (jnp.float32(array) for array in random_inputs(9, 4))
    program = str(jax.make_jaxpr(jax.grad(lambda *inputs: jnp.sum(short_convolution(*inputs)[0])))(x, weight, bias))
    assert "gather" not in program
    assert "scatter" not in program
    assert "scan" not in program


def test_the_state_is_as_long_as_the_filter():
    x, weight, _ = (jnp.float32(array) for array in random_inputs(4, 3))
    state = ShortConvolutionState(jnp.zeros((2, 3, 3)), jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match=r"state.inputs: expected shape \[batch, width - 1, dim\] = \(2, 2, 3\)"):
        short_convolution(x, weight, state=state)


def test_symbolic_lengths_export():
    batch, time = jax.export.symbolic_shape("batch, time")
    x, weight, bias = (jnp.float32(array) for array in random_inputs(9, 4))
    shapes = jax.ShapeDtypeStruct((batch, time, 3), jnp.float32), weight, bias
    exported = jax.export.export(compiled, platforms=["cpu"])(*shapes)
    chex.assert_trees_all_close(exported.call(x, weight, bias)[0], short_convolution(x, weight, bias)[0], rtol=1e-5)
