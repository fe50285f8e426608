"""Causal softmax attention over a cache of keys and values: the cache is the state.

Ashish Vaswani, Noam Shazeer, Niki Parmar, Jakob Uszkoreit, Llion Jones, Aidan N. Gomez, Łukasz Kaiser, Illia
Polosukhin: Attention Is All You Need, 2017, arXiv:1706.03762, §3.2.1 and §3.2.3.

Tokens that are no padding take the slots of a row's cache one after another. Documents are contiguous there, so that
what a token sees is an interval of slots: from the first one of its document to its own. Padding takes slots below
zero, which no interval contains.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int

from primitives import contract

IMPLEMENTATIONS = ("sequential", "dense", "chunked")
CHUNK = 128  # queries at a time in the chunked form; changes rounding only


class AttentionState(NamedTuple):
    """A cache of keys and values, in the dtype of the inputs; the slots from `index` on are free."""

    keys: Float[Array, "batch capacity kv_heads key_dim"]
    values: Float[Array, "batch capacity kv_heads value_dim"]
    start: Int[Array, " batch"]  # the first slot of the last document
    index: Int[Array, " batch"]  # the slot that the next token takes; more than the capacity after an overflow
    segment: Int[Array, " batch"]  # the last non-negative segment id


jax.export.register_namedtuple_serialization(AttentionState, serialized_name="primitives.AttentionState")


def init_attention_state(
    batch: int, capacity: int, kv_heads: int, key_dim: int, value_dim: int, dtype: DTypeLike = jnp.float32
) -> AttentionState:
    """An empty cache with room for `capacity` tokens in each row."""
    return AttentionState(
        jnp.zeros((batch, capacity, kv_heads, key_dim), dtype),
        jnp.zeros((batch, capacity, kv_heads, value_dim), dtype),
        *(jnp.zeros(batch, jnp.int32) for _ in range(3)),
    )


def grow_attention_state(state: AttentionState, capacity: int) -> AttentionState:
    """The same cache with room for `capacity` tokens, at least as many as it has: a decode loop doubles it.

    Raises `ValueError` for a smaller capacity. A row that has overflowed stays so.
    """
    more = capacity - state.keys.shape[1]
    if more < 0:
        raise ValueError(f"capacity: expected at least the present {state.keys.shape[1]}, got {capacity}")
    keys, values = (jnp.pad(x, [(0, 0), (0, more), (0, 0), (0, 0)]) for x in (state.keys, state.values))
    return state._replace(keys=keys, values=values)


def causal_attention(
    q: Float[Array, "batch time heads key_dim"],
    k: Float[Array, "batch time kv_heads key_dim"],
    v: Float[Array, "batch time kv_heads value_dim"],
    *,
    state: AttentionState | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch time heads value_dim"], AttentionState]:
    """Softmax attention of every token over those up to it (Attention Is All You Need, equation 1).

        s_tj = scale · ⟨q_t, k_j⟩
        o_t = Σ_{j≤t} exp(s_tj − m_t) v_j / Σ_{j≤t} exp(s_tj − m_t),  m_t = max_{j≤t} s_tj

    With a state the new tokens are written behind those that it holds, then attend to all of them; its capacity stays
    as it is.

    Args:
        q: Queries. A group of ``heads / kv_heads`` neighbouring heads shares a head of keys and values.
        k: Keys.
        v: Values.
        state: The cache of what came before, see `init_attention_state`, or `None` for a fresh start, after which the
            cache is full: its capacity is `time`.
        scale: Of the products; ``1 / √key_dim`` where `None`.
        segment_ids: Documents packed in a row; attention does not cross a change of id. Negative ids are padding, with
            zero outputs, zero gradients and no slot in the cache. `None`: the carried document goes on, no padding.
        implementation: ``"sequential"`` (the definition, a scan over time), ``"dense"`` (one masked softmax),
            ``"chunked"`` (blocks of queries one after another: memory linear in time), or `None`: dense where time is
            short. One time step is one masked softmax under every name. All support forward mode.

    Returns:
        Outputs in the dtype of `v`, and the cache with the new tokens. Logits, softmax and sums are float32 or wider.

    Raises:
        ValueError: Shapes that do not fit together, a length of zero, an unknown implementation; or a cache that is too
            small, where that is known when the call is made. Under a transformation it is not: then each token that
            finds no slot, and all that come later in its row, give NaN, the slots already taken stay as they are, and
            `index` exceeds the capacity from then on.
        TypeError: Dtypes that are not floating point (q, k, v) or not integer (segment ids), a foreign state.
    """
    fields = {"keys": "batch capacity kv_heads key_dim", "values": "batch capacity kv_heads value_dim"}
    fields |= {"start": "batch", "index": "batch", "segment": "batch"}
    sizes = contract.check_shapes(
        q=(q, "batch time heads key_dim"),
        k=(k, "batch time kv_heads key_dim"),
        v=(v, "batch time kv_heads value_dim"),
        segment_ids=(segment_ids, "batch time"),
        **contract.check_state(state, AttentionState, **fields),
    )
    if sizes["heads"] % sizes["kv_heads"]:
        raise ValueError(f"q: expected a multiple of the {sizes['kv_heads']} heads of k and v, got {sizes['heads']}")
    contract.check_floating(q=q, k=k, v=v)
    contract.check_segment_ids(segment_ids)
    contract.check_implementation(implementation, IMPLEMENTATIONS)

    if segment_ids is not None:
        k, v = (contract.mask_padding(x, segment_ids >= 0) for x in (k, v))  # no weight times NaN is NaN
    fresh = state is None
    state = _fresh_state(k, v, segment_ids) if fresh else state
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    first, slot, counters = _take_slots(segment_ids, state, q.shape[1])
    _check_room(counters.index, state)

    if implementation == "sequential" and q.shape[1] != 1:
        return _sequential(q, k, v, state, segment_ids, scale)
    attend = _implementation(implementation, q.shape[1])
    state = counters._replace(keys=_write(state.keys, k, slot), values=_write(state.values, v, slot))
    if fresh:  # the tokens where they are, so that an unused cache costs nothing
        return attend(q, k, v, first, slot, slot, scale), state
    capacity = state.keys.shape[1]
    outputs = attend(q, state.keys, state.values, first, slot, jnp.arange(capacity)[None], scale)
    return jnp.where((slot < capacity)[..., None, None], outputs, jnp.nan).astype(v.dtype), state


def _fresh_state(k, v, segment_ids):
    counter = contract.fresh_counter(segment_ids, k.shape[0])
    return AttentionState(contract.fresh_like(k, 0), contract.fresh_like(v, 0), counter, counter, counter)


def _take_slots(segment_ids, state, time):
    """The interval of slots ``[first, slot]`` that each token sees, and the counters after the last token."""
    segments = contract.segments(segment_ids, state.segment)
    slot, first = contract.count_tokens(segments, state.index, state.start, time)
    counters = state._replace(start=first[:, -1], index=slot[:, -1] + 1, segment=segments.last)
    if segments.valid is not None:
        slot = jnp.where(segments.valid, slot, -1 - jnp.arange(time, dtype=slot.dtype))
    return first, slot, counters


def _check_room(index, state):
    capacity = state.keys.shape[1]
    if not isinstance(index, jax.core.Tracer) and (needed := int(jnp.max(index))) > capacity:
        raise ValueError(
            f"state: expected a capacity of {needed} or more, got {capacity}; grow_attention_state makes room"
        )


@jax.vmap
def _write(cache, rows, slot):
    """Rows in their slots; those of padding, and those for which there is no slot, are dropped."""
    rows = rows.astype(cache.dtype)
    return cache.at[slot].set(rows, mode="drop", unique_indices=True, wrap_negative_indices=False)


def _implementation(name, time):
    if name is None:
        name = "chunked" if isinstance(time, int) and time > CHUNK else "dense"
    return _chunked if name == "chunked" and time != 1 else _dense


def _sequential(q, k, v, state, segment_ids, scale):
    def step(state, token):
        q, k, v, segment_ids = jax.tree.map(lambda x: x[:, None], token)
        outputs, state = causal_attention(q, k, v, state=state, scale=scale, segment_ids=segment_ids)
        return state, outputs[:, 0]

    state, outputs = lax.scan(step, state, jax.tree.map(lambda x: x.swapaxes(0, 1), (q, k, v, segment_ids)))
    return outputs.swapaxes(0, 1), state


def _chunked(q, k, v, first, slot, key_slots, scale):
    """Blocks of queries, recomputed in the backward pass: of the logits only one block exists at a time."""
    dtype = contract.accumulation_dtype(q, k, v)
    k, v, out = k.astype(dtype), v.astype(dtype), v.dtype  # here, so that gradients are summed up in this precision
    padded = (contract.pad_time(x, CHUNK, fill) for x, fill in ((q, 0), (first, 0), (slot, -1)))
    chunks = tuple(contract.chunk_time(x, CHUNK) for x in padded)
    outputs = lax.map(jax.checkpoint(lambda chunk: _dense(chunk[0], k, v, *chunk[1:], key_slots, scale)), chunks)
    return contract.unchunk_time(outputs, q.shape[1]).astype(out)


def _dense(q, k, v, first, slot, key_slots, scale):
    """One masked softmax. The maximum is a reference point (no gradient); a row that sees nothing has weights zero."""
    dtype = contract.accumulation_dtype(q, k, v)
    (batch, time, heads, _), kv_heads = q.shape, k.shape[2]
    q = q.astype(dtype).reshape(batch, time, kv_heads, heads // kv_heads, -1) * scale
    visible = (first[:, :, None] <= key_slots[:, None]) & (key_slots[:, None] <= slot[:, :, None])
    s = jnp.where(visible[:, None, None], _matmul("btgrd,bsgd->bgrts", q, k.astype(dtype)), -jnp.inf)
    m = lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True))
    weights = jnp.exp(s - jnp.where(m == -jnp.inf, 0, m))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1)
    return _matmul("bgrts,bsgd->btgrd", weights, v.astype(dtype)).reshape(batch, time, heads, -1).astype(v.dtype)


_matmul = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
