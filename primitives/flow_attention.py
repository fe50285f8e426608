"""Flow attention: attention in linear time whose weights come from a conserved flow between sources and sinks.

Haixu Wu, Jialong Wu, Jiehui Xu, Jianmin Wang, Mingsheng Long: Flowformer: Linearizing Transformers with Conservation
Flows, 2022, arXiv:2202.06258; what the equations leave open (φ is the sigmoid, where ε goes, the clamp, and the causal
form) is as in the authors' code, https://github.com/thuml/Flowformer.

Keys are sources of a flow with the capacity φ(q)·φ(k) to every query, a sink. Fixing what flows into every sink makes
sources compete; fixing what flows out of every source decides how much each sink is given.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from primitives import contract
from primitives.feature_maps import NormaliserState, normalised_exponential
from primitives.linear_attention import LinearAttentionState, linear_attention
from primitives.linear_recurrence import LinearRecurrenceState, linear_recurrence

IMPLEMENTATIONS = ("sequential", "chunked")
EPSILON = 1e-6  # added to both factors of every flow


class FlowAttentionState(NamedTuple):
    """All sums over the tokens so far. Float32 or wider."""

    keys: Float[Array, "batch heads key_dim"]  # Σ φ(k)
    queries: Float[Array, "batch heads key_dim"]  # Σ φ(q)
    sources: Float[Array, "batch heads key_dim"]  # Σ φ(k) / O
    sinks: Float[Array, "batch heads key_dim"]  # Σ φ(q) / I
    log_sum: Float[Array, "batch heads 1"]  # log Σ exp(Ô), −inf where there are no tokens
    memory: Float[Array, "batch heads key_dim value_dim"]  # Σ φ(k) v̂ᵀ
    tokens: Int[Array, " batch"]  # their number
    segment: Int[Array, " batch"]  # the last non-negative segment id


jax.export.register_namedtuple_serialization(FlowAttentionState, serialized_name="primitives.FlowAttentionState")


def causal_flow_attention(
    q: Float[Array, "batch time heads key_dim"],
    k: Float[Array, "batch time heads key_dim"],
    v: Float[Array, "batch time heads value_dim"],
    *,
    state: FlowAttentionState | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch time heads value_dim"], FlowAttentionState]:
    """Flow attention in which every sum of `flow_attention` is one over the past, divided by its number of tokens.

        I_t = φ(q_t) · Σ_{i≤t} φ(k_i) / t               O_t = φ(k_t) · Σ_{i≤t} φ(q_i) / t
        Î_t = φ(q_t) · Σ_{i≤t} (φ(k_i) / O_i) / t       Ô_t = φ(k_t) · Σ_{i≤t} (φ(q_i) / I_i) / t
        v̂_t = t exp(Ô_t) / Σ_{i≤t} exp(Ô_i) v_t
        o_t = σ(Î_t) Σ_{i≤t} (φ(q_t) · φ(k_i)) v̂_i / (t I_t)

    In the words of the authors' code this is an "approximate normal conservation": O_i knows only of the queries up to
    token i, so what flows out of a source is one on average only. That code clamps Ô before its exponential, to ±1,
    ±5 or ±10 depending on the task, and calls it "for stability"; here a running softmax is stable without.

    Args:
        q: Queries, before φ.
        k: Keys, before φ.
        v: Values.
        state: What came before, or `None` for nothing.
        segment_ids: Documents packed in a row; no sum crosses a change of id, and t counts the tokens of a document.
            Negative ids are padding, with zero outputs and zero gradients. `None`: the carried document goes on, no
            padding.
        implementation: That of `linear_attention`: ``"sequential"`` (a scan over time for all sums but that of the
            softmax; also forward mode), ``"chunked"``, or `None`: chunked where the length is static. One time step is
            one step under every name.

    Returns:
        Outputs in the dtype of `v`, and the state after the last token.

    Raises:
        ValueError: Shapes that do not fit together, a length of zero, an unknown implementation.
        TypeError: Dtypes that are not floating point (q, k, v) or not integer (segment ids), a foreign state.
    """
    contract.check_shapes(
        q=(q, "batch time heads key_dim"),
        k=(k, "batch time heads key_dim"),
        v=(v, "batch time heads value_dim"),
        one=(jax.ShapeDtypeStruct((1,), jnp.int32), "1"),  # gives that name of an axis its size
        segment_ids=(segment_ids, "batch time"),
        **contract.check_state(
            state,
            FlowAttentionState,
            **dict.fromkeys(("keys", "queries", "sources", "sinks"), "batch heads key_dim"),
            log_sum="batch heads 1",
            memory="batch heads key_dim value_dim",
            tokens="batch",
            segment="batch",
        ),
    )
    contract.check_floating(q=q, k=k, v=v)
    contract.check_segment_ids(segment_ids)
    contract.check_implementation(implementation, IMPLEMENTATIONS)

    outputs_dtype = v.dtype
    dtype = contract.accumulation_dtype(q, k, v, *(() if state is None else state[:6]))
    state = _fresh_state(q, v, segment_ids, dtype) if state is None else state
    segments = contract.segments(segment_ids, state.segment)
    number, first = contract.count_tokens(segments, state.tokens, jnp.zeros_like(state.tokens), q.shape[1])
    tokens = number - first + 1
    t = jnp.maximum(tokens, 1).astype(dtype)[..., None, None]  # of padding in front of all tokens it is zero
    sums = functools.partial(_running_sums, state.segment, segment_ids, implementation)

    q, k, v = (contract.mask_padding(x, segments.valid).astype(dtype) for x in (q, k, v))
    q, k = jax.nn.sigmoid(q), jax.nn.sigmoid(k)
    (keys, queries), totals = sums((k, q), state[:2])
    incoming, outgoing = _flow(q, keys) / t, _flow(k, queries) / t
    (sources, sinks), refined = sums((k / outgoing, q / incoming), state[2:4])
    conserved_sink, conserved_source = _flow(q, sources) / t, _flow(k, sinks) / t
    weights, _, normaliser = normalised_exponential(
        conserved_source, state=NormaliserState(state.log_sum, state.segment), segment_ids=segment_ids
    )
    outputs, memory = linear_attention(
        q / (t * incoming),
        k,
        t * weights * v,
        state=LinearAttentionState(state.memory, state.segment),
        scale=1.0,
        segment_ids=segment_ids,
        implementation=implementation,
    )
    outputs = (jax.nn.sigmoid(conserved_sink) * outputs).astype(outputs_dtype)
    sums_after = (*totals, *refined, normaliser.log_sum, memory.memory)
    return outputs, FlowAttentionState(*sums_after, tokens[:, -1], segments.last)


def flow_attention(
    q: Float[Array, "batch sinks heads key_dim"],
    k: Float[Array, "batch sources heads key_dim"],
    v: Float[Array, "batch sources heads value_dim"],
    *,
    segment_ids: Int[Array, "batch time"] | None = None,
) -> Float[Array, "batch sinks heads value_dim"]:
    """Attention of n queries (sinks) to m keys (sources) with conserved flows, not causal (arXiv:2202.06258).

        I = φ(q) · Σ φ(k)               O = φ(k) · Σ φ(q)
        Î = φ(q) · Σ (φ(k) / O)         Ô = min(φ(k) · Σ (φ(q) / I), 1)
        v̂ = m softmax(Ô) v
        o = σ(Î n / m) (φ(q) / I) · Σ φ(k) v̂ᵀ

    φ(k) / O are the capacities that let a flow of 1 out of each source, φ(q) / I those that let one into each sink:
    Σ Î = m and Σ Ô = n (without the minimum, which is from the authors' code, as the ε = 1e-6 in every flow is).

    Args:
        q: Queries, before φ.
        k: Keys, before φ.
        v: Values.
        segment_ids: Documents packed in a row, each a flow of its own; then queries and keys are those of the same
            tokens. Negative ids are padding, with zero outputs and zero gradients. `None`: one document, no padding.

    Returns:
        Outputs in the dtype of `v`.

    Raises:
        ValueError: Shapes that do not fit together, a length of zero.
        TypeError: Dtypes that are not floating point (q, k, v) or not integer (segment ids).
    """
    sinks, sources = ("sinks", "sources") if segment_ids is None else ("time", "time")
    contract.check_shapes(
        q=(q, f"batch {sinks} heads key_dim"),
        k=(k, f"batch {sources} heads key_dim"),
        v=(v, f"batch {sources} heads value_dim"),
        segment_ids=(segment_ids, "batch time"),
    )
    contract.check_floating(q=q, k=k, v=v)
    contract.check_segment_ids(segment_ids)
    total, mix = _total, _mix
    if segment_ids is not None:
        total, mix = (functools.partial(f, segment_ids) for f in (_total_of_document, _mix_document))

    outputs_dtype, dtype = v.dtype, contract.accumulation_dtype(q, k, v)
    valid = None if segment_ids is None else segment_ids >= 0
    q, k, v = (contract.mask_padding(x, valid).astype(dtype) for x in (q, k, v))
    q, k = jax.nn.sigmoid(q), jax.nn.sigmoid(k)
    n, m = (total(contract.fresh_like(x[..., :1], 1)) for x in (q, k))
    incoming, outgoing = _flow(q, total(k)), _flow(k, total(q))
    conserved_sink = _flow(q, total(k / outgoing))
    conserved_source = jnp.minimum(_flow(k, total(q / incoming)), 1)
    competition = jnp.exp(conserved_source - 1)
    v = v * m * competition / _nonzero(total(competition))
    outputs = jax.nn.sigmoid(conserved_sink * n / _nonzero(m)) * mix(q / incoming, k, v)
    return outputs.astype(outputs_dtype)


def _flow(a, b):
    """What flows through a node, as ``[..., 1]``: positive, also where a φ underflows."""
    return jnp.sum((a + EPSILON) * (b + EPSILON), axis=-1, keepdims=True)


def _nonzero(x):
    """A sum of positive numbers, or one where there are none: at padding."""
    return jnp.where(x > 0, x, 1)


# --- Sums over the past --------------------------------------------------------------------------------------------


def _fresh_state(q, v, segment_ids, dtype):
    zero, counter = contract.fresh_like(q[:, 0], 0, dtype), contract.fresh_counter(segment_ids, q.shape[0])
    empty = contract.fresh_like(zero[..., :1], -jnp.inf)
    memory = contract.empty_memory(zero[..., None] * v[:, 0, :, None], dtype)
    return FlowAttentionState(zero, zero, zero, zero, empty, memory, counter, counter)


def _running_sums(segment, segment_ids, implementation, arrays, before):
    """Sums over the tokens so far, for all tokens and after the last."""
    sums, after = linear_recurrence(
        jnp.ones(1, arrays[0].dtype),
        jnp.stack(arrays, axis=2),
        state=LinearRecurrenceState(jnp.stack(before, axis=1), segment),
        segment_ids=segment_ids,
        implementation="sequential" if implementation == "sequential" else None,
    )
    return jnp.unstack(sums, axis=2), jnp.unstack(after.hidden, axis=1)


# --- Sums over a document ------------------------------------------------------------------------------------------


def _total(x):
    return jnp.sum(x, axis=1, keepdims=True)


def _mix(q, k, v):
    memory = jnp.einsum("bshk,bshv->bhkv", k, v, precision=lax.Precision.HIGHEST)
    return jnp.einsum("blhk,bhkv->blhv", q, memory, precision=lax.Precision.HIGHEST)


def _total_of_document(segment_ids, x):
    one = jnp.ones(1, x.dtype)
    x = contract.mask_padding(x, segment_ids >= 0)
    return _both_ways(lambda x, ids: linear_recurrence(one, x, segment_ids=ids)[0], segment_ids, x) - x


def _mix_document(segment_ids, q, k, v):
    own = jnp.sum(q * k, axis=-1, keepdims=True) * v
    mix = lambda q, k, v, ids: linear_attention(q, k, v, scale=1.0, segment_ids=ids)[0]  # noqa: E731
    return _both_ways(mix, segment_ids, q, k, v) - contract.mask_padding(own, segment_ids >= 0)


def _both_ways(function, segment_ids, *arrays):
    """What a causal function says of the past, and what it says of the future; the token itself is in both."""
    backwards = function(*(jnp.flip(x, axis=1) for x in (*arrays, segment_ids)))
    return function(*arrays, segment_ids) + jnp.flip(backwards, axis=1)
