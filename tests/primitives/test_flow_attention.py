"""Flow attention against its formulas, written out in NumPy with all pairs, and the conservation of its flows."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primitives import causal_flow_attention, flow_attention

EPSILON = 1e-6


def example(sinks=13, sources=13, batch=2, heads=2, dim=5, value_dim=3, seed=0):
    generator = np.random.default_rng(seed)
    shapes = ((sinks, dim), (sources, dim), (sources, value_dim))
    return [2 * generator.normal(size=(batch, time, heads, size)) for time, size in shapes]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def dot(a, b):
    return np.sum((a + EPSILON) * (b + EPSILON), axis=-1)


def capacities(q, k):
    """φ(q), φ(k), and the two that are normalised: φ(q) / I and φ(k) / O."""
    q, k = sigmoid(q), sigmoid(k)
    return q, k, q / dot(q, k.sum(0))[:, None], k / dot(k, q.sum(0))[:, None]


def whole(q, k, v):
    """One head of the non-causal form, with the matrix of all flows."""
    n, m = len(q), len(k)
    q, k, sinks, sources = capacities(q, k)
    refined_sink, refined_source = dot(q, sources.sum(0)), np.clip(dot(k, sinks.sum(0)), -1, 1)
    competition = np.exp(refined_source) / np.exp(refined_source).sum() * m
    return sigmoid(refined_sink * n / m)[:, None] * (sinks @ k.T @ (competition[:, None] * v))


def causal(q, k, v, bound=np.inf):
    """One head of the causal form, with the matrix of all flows; `bound` is the clamp of the authors' code."""
    t, mask = 1.0 + np.arange(len(q)), np.tri(len(q))
    q, k = sigmoid(q), sigmoid(k)
    incoming, outgoing = dot(q, mask @ k) / t, dot(k, mask @ q) / t
    refined_sink = dot(q, mask @ (k / outgoing[:, None])) / t
    refined_source = np.clip(dot(k, mask @ (q / incoming[:, None])) / t, -bound, bound)
    competition = np.exp(refined_source) / (mask @ np.exp(refined_source)) * t
    flows = mask * (q @ k.T) / (incoming * t)[:, None]
    return sigmoid(refined_sink)[:, None] * (flows @ (competition[:, None] * v))


def each_head(function, q, k, v, **options):
    rows = [
        [function(*(x[b, :, h] for x in (q, k, v)), **options) for h in range(q.shape[2])] for b in range(q.shape[0])
    ]
    return np.moveaxis(np.array(rows), 1, 2)


@jax.enable_x64(True)
@pytest.mark.parametrize(("sinks", "sources"), [(13, 13), (4, 9), (9, 1)])
def test_equals_its_formulas(sinks, sources):
    inputs = example(sinks, sources)
    chex.assert_trees_all_close(
        flow_attention(*map(jnp.asarray, inputs)), each_head(whole, *inputs), atol=1e-12, rtol=1e-12
    )


@jax.enable_x64(True)
@pytest.mark.parametrize("bound", [np.inf, 5])
def test_the_causal_form_equals_its_formulas_and_the_code_where_its_clamp_is_wide(bound):
    inputs = example(100)[:1] + example(100, 100, seed=1)[1:]
    outputs, state = jax.jit(causal_flow_attention)(*map(jnp.asarray, inputs))
    chex.assert_trees_all_close(outputs, each_head(causal, *inputs, bound=bound), atol=1e-12, rtol=1e-11)
    chex.assert_trees_all_equal(state.tokens, jnp.full(2, 100))


def test_normalised_capacities_conserve_the_flow():
    """The claim of the paper, of the reference above: one flows into every sink, one out of every source."""
    q, k, sinks, sources = capacities(*(x[0, :, 0] for x in example(4, 9)[:2]))
    np.testing.assert_allclose(sinks @ k.sum(0), 1, atol=1e-4)
    np.testing.assert_allclose(sources @ q.sum(0), 1, atol=1e-4)


@jax.enable_x64(True)
def test_all_that_flows_out_of_the_sources_arrives():
    """Equal sources do not compete: the output for values of one is σ(Î n / m), and Σ Î = m."""
    q, k, v = map(jnp.asarray, example(4, 9))
    gates = flow_attention(q, jnp.broadcast_to(k[:, :1], k.shape), jnp.ones_like(v))[..., 0]
    chex.assert_trees_all_close(jnp.sum(jnp.log(gates / (1 - gates)), axis=1), jnp.full((2, 2), 4.0), atol=1e-4)


@jax.enable_x64(True)
def test_what_conserves_the_flow_by_itself_is_the_same_in_both_forms():
    """Equal sources and equal sinks: no competition, Î = 1, and the output is σ(1) times the mean of what is seen."""
    q, k, v = map(jnp.asarray, example())
    q, k = (jnp.broadcast_to(x[:, :1], x.shape) for x in (q, k))
    outputs, _ = causal_flow_attention(q, k, v)
    means = jnp.cumsum(v, axis=1) / jnp.arange(1, 14)[:, None, None]
    chex.assert_trees_all_close(outputs, jax.nn.sigmoid(1.0) * means, atol=1e-4)
    chex.assert_trees_all_close(flow_attention(q, k, v)[:, -1], outputs[:, -1], atol=1e-4)


@jax.enable_x64(True)
def test_order_of_sources_does_not_matter():
    q, k, v = map(jnp.asarray, example(4, 9))
    chex.assert_trees_all_close(flow_attention(q, k, v), flow_attention(q, k[:, ::-1], v[:, ::-1]), atol=1e-13)


@jax.enable_x64(True)
def test_documents_and_padding():
    """Packed documents are flows of their own; padding, whatever it holds, has outputs and gradients of zero."""
    ids = np.array([[-1, 4, 4, -1, 4, 0, 0, 0, 4, 4, 4, 4, -1], [2] * 12 + [-5]])
    documents = [(0, [1, 2, 4]), (0, [5, 6, 7]), (0, [8, 9, 10, 11]), (1, list(range(12)))]
    inputs = [np.where((ids < 0)[..., None, None], np.nan, x) for x in example()]
    inputs, segment_ids = list(map(jnp.asarray, inputs)), jnp.asarray(ids, jnp.int32)
    weights = jnp.cos(jnp.arange(inputs[2].size)).reshape(inputs[2].shape)

    def packed(*inputs):
        outputs = flow_attention(*inputs, segment_ids=segment_ids)
        return jnp.sum(weights * outputs), outputs

    def alone(*inputs):
        outputs = jnp.zeros_like(inputs[2])
        for row, tokens in documents:
            outputs = outputs.at[row, np.array(tokens)].set(
                flow_attention(*(x[row : row + 1, np.array(tokens)] for x in inputs))[0]
            )
        return jnp.sum(weights * outputs), outputs

    results, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))(*inputs) for f in (packed, alone)
    )
    chex.assert_trees_all_close(results, expected, atol=1e-11)


@pytest.mark.parametrize("size", [1e4, 20.0])
def test_extremes_are_finite(size):
    q, k, v = (jnp.asarray(x, jnp.float32) for x in example())

    def loss(q, k, v):
        return jnp.sum(jnp.sin(flow_attention(size * q, size * k, v))) + jnp.sum(
            jnp.sin(flow_attention(-size * q**2, -size * k**2, v))
        )

    chex.assert_tree_all_finite(jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v))


def test_half_precision_is_rounded_once():
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in example()]
    outputs = flow_attention(*inputs)
    assert outputs.dtype == jnp.bfloat16
    wide = flow_attention(*(x.astype(jnp.float32) for x in inputs))
    chex.assert_trees_all_equal(outputs, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("argument", "error", "change"),
    [
        ("k", ValueError, lambda q, k, v: {"k": k[..., :2]}),
        ("v", ValueError, lambda q, k, v: {"v": v[:, :3]}),
        ("segment_ids", ValueError, lambda q, k, v: {"segment_ids": jnp.zeros((2, 3), jnp.int32)}),
        ("segment_ids", TypeError, lambda q, k, v: {"segment_ids": jnp.zeros((2, 13))}),
        ("k", ValueError, lambda q, k, v: {"k": k[:, :3], "v": v[:, :3], "segment_ids": jnp.zeros((2, 13), jnp.int32)}),
        ("q", TypeError, lambda q, k, v: {"q": jnp.zeros(q.shape, jnp.int32)}),
    ],
)
def test_refusals(argument, error, change):
    q, k, v = map(jnp.asarray, example())
    with pytest.raises(error, match=f"^{argument}: "):
        flow_attention(**{"q": q, "k": k, "v": v} | change(q, k, v))
