"""What is particular to softmax and sigmoid attention: the cache. The laws are in tests/test_laws.py."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from primitives import (
    AttentionState,
    attention,
    cache_positions,
    causal_attention,
    grow_attention_state,
    init_attention_state,
    sigmoid_attention,
)

IMPLEMENTATIONS = (None, *attention.IMPLEMENTATIONS)
jitted = jax.jit(causal_attention)


def inputs_for(time, batch=2, heads=4, kv_heads=2, dim=8, value_dim=6, dtype=jnp.float32, seed=0):
    generator = np.random.default_rng(seed)
    shapes = (heads, dim), (kv_heads, dim), (kv_heads, value_dim)
    return tuple(jnp.asarray(generator.normal(size=(batch, time, *shape)), dtype) for shape in shapes)


def empty(capacity, batch=2, kv_heads=2, dim=8, value_dim=6, dtype=jnp.float32):
    return init_attention_state(batch, capacity, kv_heads, dim, value_dim, dtype)


@pytest.mark.parametrize("time", [1, 13, 200])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_jax(implementation, time):
    q, k, v = inputs_for(time, value_dim=8)
    outputs, _ = causal_attention(q, k, v, implementation=implementation)
    chex.assert_trees_all_close(outputs, jax.nn.dot_product_attention(q, k, v, is_causal=True), atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("key_heads", "value_heads"), [(1, 8), (2, 4), (2, 8), (4, 4), (8, 8)])
def test_shared_heads_are_repeated_heads(implementation, key_heads, value_heads):
    """Fewer keys than values than queries; the cache holds no more than there is."""
    q, k, _ = inputs_for(9, heads=8, kv_heads=key_heads)
    v = inputs_for(9, kv_heads=value_heads, seed=1)[2]
    state = init_attention_state(2, 9, key_heads, 8, 6, value_heads=value_heads)
    outputs, state = causal_attention(q, k, v, state=state, implementation=implementation)
    repeated = (jnp.repeat(x, 8 // x.shape[2], axis=2) for x in (k, v))
    chex.assert_trees_all_close(outputs, causal_attention(q, *repeated)[0], atol=2e-6)
    chex.assert_trees_all_equal((state.keys, state.values), (k, v))


def test_no_head_is_repeated():
    """Nothing in a step is larger than the cache."""
    q, k, v = inputs_for(1, batch=1, heads=8, kv_heads=1)
    state = empty(64, batch=1, kv_heads=1)
    program = jax.make_jaxpr(causal_attention)(q, k, v, state=state)
    assert max(out.aval.size for equation in program.eqns for out in equation.outvars) == state.keys.size


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sigmoid_attention_is_its_definition(implementation):
    """With a number as a bias and one for each head, and through a cache."""
    with jax.enable_x64(True):
        q, k, v = inputs_for(7, dtype=jnp.float64)
        s = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 2, axis=2)) / 8**0.5
        for bias in (-np.log(7), jnp.asarray([0.0, -1.0, 2.0, -3.0])):
            weights = jnp.tril(1 / (1 + jnp.exp(-s - jnp.broadcast_to(bias, 4)[:, None, None])))
            expected = jnp.einsum("bhts,bshd->bthd", weights, jnp.repeat(v, 2, axis=2))
            outputs, _ = sigmoid_attention(q, k, v, bias=bias, implementation=implementation)
            chex.assert_trees_all_close(outputs, expected, rtol=0, atol=1e-13)
            state = empty(7, dtype=jnp.float64)
            for piece in (slice(0, 3), slice(3, 4), slice(4, 7)):
                tokens = (x[:, piece] for x in (q, k, v))
                outputs, state = sigmoid_attention(*tokens, bias=bias, state=state, implementation=implementation)
                chex.assert_trees_all_close(outputs, expected[:, piece], rtol=0, atol=1e-13)


def test_sigmoid_weights_of_small_logits_sum_to_almost_one():
    """arXiv:2409.04431: n σ(−log n) = n / (n + 1), and n / 2 without a bias."""
    n = 300
    q, k, _ = inputs_for(n)
    ones = jnp.ones((2, n, 2, 1))
    for bias, total in ((-np.log(n), n / (n + 1)), (0.0, n / 2)):
        outputs, _ = sigmoid_attention(0 * q, k, ones, bias=bias)
        chex.assert_trees_all_close(outputs[:, -1], jnp.full((2, 4, 1), total), rtol=1e-5)


def test_cache_positions_are_those_in_the_document():
    ids = jnp.asarray([[0, 0, -1, 0, 3], [-1, 1, 1, 2, 2]])
    _, state = causal_attention(*inputs_for(5), state=empty(9), segment_ids=ids)
    real = ids >= 0
    assert cache_positions(ids, None, 2, 5)[real].tolist() == [0, 1, 2, 0, 0, 1, 0, 1]
    assert cache_positions(jnp.asarray([[3, 4], [2, 0]]), state, 2, 2).tolist() == [[1, 0], [2, 0]]
    assert cache_positions(None, state, 2, 2).tolist() == [[1, 2], [2, 3]]


def definition(q, k, v, ids):
    """A loop over rows, tokens and heads, in numpy."""
    outputs = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, row in enumerate(ids):
        document, last, documents = -1, None, []
        for i in row:
            document += i >= 0 and i != last
            last = i if i >= 0 else last
            documents.append(document if i >= 0 else -1)
        for t in range(q.shape[1]):
            seen = [j for j in range(t + 1) if documents[j] == documents[t] and documents[t] >= 0]
            for h in range(q.shape[2] if seen else 0):
                group = h // (q.shape[2] // k.shape[2])
                s = k[b, seen, group] @ q[b, t, h] / np.sqrt(q.shape[-1])
                p = np.exp(s - s.max())
                outputs[b, t, h] = p @ v[b, seen, group] / p.sum()
    return outputs


@settings(max_examples=15, deadline=None)
@given(ids=st.lists(st.integers(-2, 2), min_size=24, max_size=24), cut=st.sampled_from([1, 6, 11]))
def test_any_documents(ids, cut):
    """Packed, padded, reappearing documents, cut in two anywhere."""
    q, k, v = inputs_for(12)
    ids = np.reshape(ids, (2, 12)).astype(np.int32)
    expected = definition(*(np.asarray(x, np.float64) for x in (q, k, v)), ids)
    outputs, _ = jitted(q, k, v, segment_ids=ids)
    np.testing.assert_allclose(outputs, expected, atol=2e-6)
    before, state = jitted(q[:, :cut], k[:, :cut], v[:, :cut], state=empty(12), segment_ids=ids[:, :cut])
    after, _ = jitted(q[:, cut:], k[:, cut:], v[:, cut:], state=state, segment_ids=ids[:, cut:])
    np.testing.assert_allclose(np.concatenate([before, after], axis=1), expected, atol=2e-6)


def test_cache_holds_real_tokens_only():
    q, k, v = inputs_for(5)
    ids = jnp.asarray([[-1, 4, -3, 4, 5], [-1, -1, -1, -1, -1]])
    _, state = causal_attention(q, k, v, state=empty(7), segment_ids=ids)
    chex.assert_trees_all_equal(state.keys[0, :3], k[0, jnp.asarray([1, 3, 4])])
    assert not jnp.any(state.keys[0, 3:])
    assert not jnp.any(state.values[1])
    for field, expected in (("start", [2, 0]), ("index", [3, 0]), ("segment", [5, 0])):
        assert getattr(state, field).tolist() == expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_overflow_raises_where_concrete(implementation):
    q, k, v = inputs_for(6)
    with pytest.raises(ValueError, match="state: expected a capacity of 6 or more, got 5"):
        causal_attention(q, k, v, state=empty(5), implementation=implementation)
    ids = jnp.asarray([[0, 0, -1, 0, 0, 0]] * 2)
    causal_attention(q, k, v, state=empty(5), segment_ids=ids, implementation=implementation)  # padding takes no slot


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_overflow_is_nan_where_traced(implementation):
    """Per row, from the token without a slot on, for ever, and without touching what is in the cache."""
    q, k, v = inputs_for(6)
    ids = jnp.asarray([[0] * 6, [0, 0, -1, -1, 0, 0]])
    call = jax.jit(lambda *x, **rest: causal_attention(*x, **rest, implementation=implementation))
    outputs, state = call(q, k, v, state=empty(4), segment_ids=ids)
    whole, _ = call(q, k, v, segment_ids=ids)
    assert jnp.all(jnp.isnan(outputs[0, 4:]))
    chex.assert_trees_all_close((outputs[0, :4], outputs[1]), (whole[0, :4], whole[1]), atol=1e-6)
    chex.assert_trees_all_equal(state.keys[0], k[0, :4])
    assert state.index.tolist() == [6, 4]
    later, _ = call(q[:, :1], k[:, :1], v[:, :1], state=grow_attention_state(state, 9), segment_ids=ids[:, :1] + 1)
    assert not jnp.any(jnp.isnan(later[1]))
    refused = jax.jit(causal_attention)(q[:, :1], k[:, :1], v[:, :1], state=state, segment_ids=ids[:, :1] + 1)[0]
    assert jnp.all(jnp.isnan(refused))


def test_decoding_grows_and_compiles_once_per_capacity():
    q, k, v = inputs_for(16)
    traces = []

    @jax.jit
    def step(state, *token):
        traces.append(None)
        return causal_attention(*token, state=state)

    state, outputs = empty(1), []
    for t in range(16):
        if t == state.keys.shape[1]:
            state = grow_attention_state(state, 2 * t)
        output, state = step(state, *(x[:, t : t + 1] for x in (q, k, v)))
        outputs.append(output)
    assert len(traces) == 5  # capacities 1, 2, 4, 8, 16
    chex.assert_trees_all_close(jnp.concatenate(outputs, axis=1), causal_attention(q, k, v)[0], atol=1e-6)
    with pytest.raises(ValueError, match="capacity: expected at least the present 16, got 15"):
        grow_attention_state(state, 15)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_has_no_gradient(implementation):
    """And what stands in padded queries and keys, if finite, reaches nothing."""
    q, k, v = (x.at[:, 3:5].set(1e30) for x in inputs_for(8))
    ids = jnp.asarray([[0, 0, 0, -1, -1, 0, 1, 1]] * 2)

    def loss(*x):
        return jnp.sum(jnp.square(causal_attention(*x, segment_ids=ids, implementation=implementation)[0]))

    outputs, _ = causal_attention(q, k, v, segment_ids=ids, implementation=implementation)
    assert not jnp.any(outputs[:, 3:5])
    for gradient in jax.grad(loss, (0, 1, 2))(q, k, v):
        assert jnp.all(jnp.isfinite(gradient))
        assert jnp.any(gradient)
        assert not jnp.any(gradient[:, 3:5])


def test_gradients_by_finite_differences():
    with jax.enable_x64(True):
        q, k, v = inputs_for(5, dtype=jnp.float64)
        ids = jnp.asarray([[0, 0, -1, 0, 3], [0, 1, 1, 0, 0]])
        _, state = causal_attention(*inputs_for(3, dtype=jnp.float64, seed=1), state=empty(8, dtype=jnp.float64))

        def outputs(q, k, v, keys, values):
            results, final = causal_attention(q, k, v, state=state._replace(keys=keys, values=values), segment_ids=ids)
            return results, final.keys, final.values

        check_grads(outputs, (q, k, v, state.keys, state.values), order=1, modes=("fwd", "rev"), atol=1e-7, rtol=1e-7)


def test_chunked_memory_is_linear():
    def temporaries(implementation, time):
        def loss(*x):
            return jnp.sum(causal_attention(*x, implementation=implementation)[0])

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*inputs_for(time, batch=1)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries("chunked", 2048) < 3 * temporaries("chunked", 1024)
    assert temporaries("chunked", 2048) < temporaries("dense", 2048) / 4
    assert temporaries(None, 2048) == temporaries("chunked", 2048)


def test_scale_dtypes_and_narrow_cache():
    q, k, v = inputs_for(5)
    chex.assert_trees_all_close(
        causal_attention(q, k, v, scale=1.0)[0], causal_attention(q * 8**0.5, k, v)[0], atol=1e-6
    )
    for dtype in (jnp.bfloat16, jnp.float16):
        narrow = tuple(x.astype(dtype) for x in (q, k, v))
        outputs, state = causal_attention(*narrow)
        assert outputs.dtype == state.keys.dtype == dtype
        exact, _ = causal_attention(*(x.astype(jnp.float32) for x in narrow))
        chex.assert_trees_all_close(outputs.astype(jnp.float32), exact, atol=2.0**-7)
    outputs, state = causal_attention(q, k, v, state=empty(5, dtype=jnp.bfloat16))
    assert outputs.dtype == jnp.float32
    assert state.keys.dtype == jnp.bfloat16


def test_refusals():
    q, k, v = inputs_for(4)
    with pytest.raises(ValueError, match="q: expected a multiple of the 2 heads of v, got 3"):
        causal_attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="v: expected a multiple of the 2 heads of k, got 1"):
        causal_attention(q, k, v[:, :, :1])
    with pytest.raises(ValueError, match=r"bias: expected shape \[heads=4\], got \(2,\)"):
        sigmoid_attention(q, k, v, bias=jnp.zeros(2))
    with pytest.raises(ValueError, match=r"state\.keys: expected shape"):
        causal_attention(q, k, v, state=empty(8, dim=5))
    with pytest.raises(TypeError, match="state: expected None or AttentionState"):
        causal_attention(q, k, v, state=tuple(empty(8)))


@pytest.mark.parametrize("implementation", attention.IMPLEMENTATIONS)
@pytest.mark.parametrize("packed", [False, True])
def test_fresh_start_inside_a_shard_map(implementation, packed):
    """The counters of a state that is made inside vary over rows alone, though keys vary over heads too."""
    mesh = jax.make_mesh((4, 2), ("batch", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows, cache = jax.sharding.PartitionSpec("batch"), jax.sharding.PartitionSpec("batch", None, "heads")
    x, ids = jax.random.normal(jax.random.key(0), (4, 6, 4, 8)), jnp.arange(6)[None].repeat(4, 0) // 4

    def call(x, ids):
        return causal_attention(x, x, x, segment_ids=ids if packed else None, implementation=implementation)

    out_specs = (cache, AttentionState(cache, cache, rows, rows, rows))
    sharded = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=(cache, rows), out_specs=out_specs))(x, ids)
    chex.assert_trees_all_close(sharded, call(x, ids), rtol=1e-5, atol=1e-6)
