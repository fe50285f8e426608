"""What is particular to a window: what is in it, and the state that rolls. The laws are in tests/test_laws.py."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from primitives import SlidingWindowState, causal_attention, sliding_window, sliding_window_attention

IMPLEMENTATIONS = (None, *sliding_window.IMPLEMENTATIONS)
jitted = jax.jit(sliding_window_attention, static_argnames=("window", "implementation"))


def inputs_for(time, batch=2, heads=4, key_heads=1, value_heads=2, dim=4, value_dim=3, dtype=jnp.float32):
    generator = np.random.default_rng(0)
    shapes = (heads, dim), (key_heads, dim), (value_heads, value_dim)
    return tuple(jnp.asarray(generator.normal(size=(batch, time, *shape)), dtype) for shape in shapes)


def definition(q, k, v, window, ids, prefix=None):
    """A loop over rows, documents, tokens and heads, in numpy."""
    outputs = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, row in enumerate(ids):
        tokens = np.flatnonzero(row >= 0)
        for run in np.split(tokens, np.flatnonzero(np.diff(row[tokens])) + 1):
            for place, t in enumerate(run):
                seen = run[max(0, place - window + 1) : place + 1]
                for h in range(q.shape[2]):
                    key, value = (h // (q.shape[2] // x.shape[2]) for x in (k, v))
                    keys, values = k[b, seen, key], v[b, seen, value]
                    if prefix is not None:
                        keys = np.concatenate([prefix[0][:, key], keys])
                        values = np.concatenate([prefix[1][:, value], values])
                    s = keys @ q[b, t, h] / np.sqrt(q.shape[-1])
                    p = np.exp(s - s.max())
                    outputs[b, t, h] = p @ values / p.sum()
    return outputs


@settings(max_examples=25, deadline=None)
@given(
    ids=st.lists(st.integers(-1, 1), min_size=22, max_size=22),
    window=st.sampled_from([3, 20]),
    implementation=st.sampled_from(sliding_window.IMPLEMENTATIONS),
)
def test_any_documents(ids, window, implementation):
    """Packed, padded, reappearing documents, cut in two, with a window longer than the rows."""
    (q, k, v), cut = inputs_for(11), 4
    ids = np.reshape(ids, (2, 11)).astype(np.int32)
    expected = definition(*(np.asarray(x, np.float64) for x in (q, k, v)), window, ids)
    options = {"window": window, "implementation": implementation}
    np.testing.assert_allclose(jitted(q, k, v, segment_ids=ids, **options)[0], expected, atol=2e-6)
    before, state = jitted(*(x[:, :cut] for x in (q, k, v)), segment_ids=ids[:, :cut], **options)
    after, _ = jitted(*(x[:, cut:] for x in (q, k, v)), segment_ids=ids[:, cut:], state=state, **options)
    np.testing.assert_allclose(np.concatenate([before, after], axis=1), expected, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("time", [1, 7, 8])
def test_a_wide_window_is_causal_attention(implementation, time):
    with jax.enable_x64(True):
        q, k, v = inputs_for(time, dtype=jnp.float64)
        outputs, _ = sliding_window_attention(q, k, v, window=8, implementation=implementation)
        chex.assert_trees_all_close(outputs, causal_attention(q, k, v)[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_state_rolls(implementation):
    """It holds the last tokens of the last document that are no padding, and where the next one stands."""
    q, k, v = inputs_for(6)
    ids = jnp.asarray([[0, 0, 0, 0, -1, 0], [0, 0, 0, 1, 1, -1]])
    _, state = sliding_window_attention(q, k, v, window=4, segment_ids=ids, implementation=implementation)
    chex.assert_trees_all_equal(state.keys[0], k[0, jnp.asarray([2, 3, 5])])
    chex.assert_trees_all_equal(state.values[1], v[1, 2:5].at[0].set(0))
    assert state.position.tolist() == [5, 2]
    assert state.segment.tolist() == [0, 1]
    _, state = sliding_window_attention(q, k, v, window=4, state=state, implementation=implementation)
    chex.assert_trees_all_equal(state.keys, k[:, 3:])
    assert state.position.tolist() == [11, 8]


def test_a_window_of_one_is_the_token_itself():
    q, k, v = inputs_for(3)
    outputs, state = sliding_window_attention(q, k, v, window=1)
    chex.assert_trees_all_close(outputs, jnp.repeat(v, 2, axis=2), atol=1e-6)
    assert state.keys.shape == (2, 0, 1, 4)
    step, _ = sliding_window_attention(q[:, :1], k[:, :1], v[:, :1], window=1, state=state)
    chex.assert_trees_all_close(step, outputs[:, :1])


def prefix_for(count=3, key_heads=1, value_heads=2, dim=4, value_dim=3):
    generator = np.random.default_rng(1)
    shapes = (count, key_heads, dim), (count, value_heads, value_dim)
    return tuple(jnp.asarray(2 * generator.normal(size=shape), jnp.float32) for shape in shapes)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_prefix_is_seen_by_every_token(implementation):
    """In every document, as far from its beginning as may be, and it is no part of the state."""
    q, k, v = inputs_for(11)
    prefix, options = prefix_for(), {"window": 3, "implementation": implementation}
    ids = jnp.asarray([[0] * 9 + [-1] + [0], [-1, 0, 1, 1, 1, 1, 1, -1, -1, 2, 2]])
    outputs, state = jitted(q, k, v, prefix=prefix, segment_ids=ids, **options)
    wide = (np.asarray(x, np.float64) for x in (q, k, v))
    expected = definition(*wide, 3, np.asarray(ids), [np.asarray(x, np.float64) for x in prefix])
    np.testing.assert_allclose(outputs, expected, atol=2e-6)
    without, same = jitted(q, k, v, segment_ids=ids, **options)
    chex.assert_trees_all_equal(state, same)
    assert jnp.max(jnp.abs(outputs - without)) > 0.1


def test_refused_prefixes():
    q, k, v = inputs_for(4)
    keys, values = prefix_for()
    for prefix, error, message in (
        (keys, TypeError, "prefix: expected None or a pair of keys and values, got"),
        ((keys,), TypeError, "prefix: expected None or a pair of keys and values, got tuple"),
        ((keys, values[:2]), ValueError, r"prefix_values: expected shape \[prefix=3, value_heads=2, value_dim=3\]"),
        ((keys[:, :, :3], values), ValueError, r"prefix_keys: expected shape \[prefix, key_heads=1, key_dim=4\]"),
        ((keys[:0], values[:0]), ValueError, "prefix_keys: expected at least one element along prefix"),
        ((keys.astype(int), values), TypeError, "prefix_keys: expected a floating point dtype"),
    ):
        with pytest.raises(error, match=message):
            sliding_window_attention(q, k, v, window=3, prefix=prefix)


def test_work_is_linear_in_time():
    def cost(time):
        lowered = jax.jit(lambda *x: sliding_window_attention(*x, window=16)[0]).lower(*inputs_for(time))
        return lowered.compile().cost_analysis()["flops"]

    assert cost(512) < 2.5 * cost(256)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_has_no_gradient(implementation):
    """And what stands there, if only NaN, reaches nothing."""
    q, k, v = (x.at[:, 2:4].set(jnp.nan) for x in inputs_for(7))
    ids = jnp.asarray([[0, 0, -1, -1, 0, 1, 1]] * 2)

    def loss(*x):
        outputs, state = sliding_window_attention(*x, window=3, segment_ids=ids, implementation=implementation)
        return jnp.sum(outputs**2) + jnp.sum(state.keys**2)

    for gradient in jax.grad(loss, (0, 1, 2))(q, k, v):
        assert jnp.all(jnp.isfinite(gradient))
        assert jnp.any(gradient)
        assert not jnp.any(gradient[:, 2:4])


def test_a_symbolic_length_runs_token_by_token():
    q, k, v = inputs_for(5)
    (time,) = jax.export.symbolic_shape("time")
    shapes = (jax.ShapeDtypeStruct((2, time, *x.shape[2:]), x.dtype) for x in (q, k, v))
    exported = jax.export.export(jax.jit(lambda *x: sliding_window_attention(*x, window=3)[0]))(*shapes)
    chex.assert_trees_all_close(exported.call(q, k, v), sliding_window_attention(q, k, v, window=3)[0], atol=1e-6)


def test_refusals():
    q, k, v = inputs_for(4)
    for window in (0, -1, 2.0):
        with pytest.raises(ValueError, match="window: expected a positive integer"):
            sliding_window_attention(q, k, v, window=window)
    _, state = sliding_window_attention(q, k, v, window=3)
    assert isinstance(state, SlidingWindowState)
    with pytest.raises(ValueError, match=r"state\.keys: expected shape \(2, 3, 1, 4\), got \(2, 2, 1, 4\)"):
        sliding_window_attention(q, k, v, window=4, state=state)
    with pytest.raises(ValueError, match="q: expected a multiple of the 2 heads of v, got 3"):
        sliding_window_attention(q[:, :, :3], k, v, window=3)
