"""Causal softmax and sigmoid attention over a cache of keys and values: the cache is the state.

Ashish Vaswani, Noam Shazeer, Niki Parmar, Jakob Uszkoreit, Llion Jones, Aidan N. Gomez, Łukasz Kaiser, Illia
Polosukhin: Attention Is All You Need, 2017, arXiv:1706.03762, §3.2.1 and §3.2.3. Sigmoid weights: Jason Ramapuram,
Federico Danieli, Eeshan Dhekane, Floris Weers, Dan Busbridge, Pierre Ablin, Tatiana Likhomanenko, Jagrit Digani, Zijin
Gu, Amitis Shidani, Russ Webb: Theory, Analysis, and Best Practices for Sigmoid Self-Attention, 2024, arXiv:2409.04431.

Key heads divide value heads, which divide query heads, as in grouped-query attention (Joshua Ainslie et al., 2023,
arXiv:2305.13245: as many of both) and DiffQKV (Zhenghao Lin et al.: Sigma, 2025, arXiv:2501.13629: fewer keys).

Tokens that are no padding take the slots of a row's cache one after another. Documents are contiguous there, so that
what a token sees is an interval of slots: from the first one of its document to its own. Padding takes slots below
zero, which no interval contains.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from primitives import contract

IMPLEMENTATIONS = ("sequential", "dense", "chunked")
CHUNK = 128  # queries at a time in the chunked form; changes rounding only


class AttentionState(NamedTuple):
    """A cache of keys and values, in the dtype of the inputs; the slots from `index` on are free."""

    keys: Float[Array, "batch capacity key_heads key_dim"]
    values: Float[Array, "batch capacity value_heads value_dim"]
    start: Int[Array, " batch"]  # the first slot of the last document
    index: Int[Array, " batch"]  # the slot that the next token takes; more than the capacity after an overflow
    segment: Int[Array, " batch"]  # the last non-negative segment id


jax.export.register_namedtuple_serialization(AttentionState, serialized_name="primitives.AttentionState")


def init_attention_state(
    batch: int,
    capacity: int,
    key_heads: int,
    key_dim: int,
    value_dim: int,
    dtype: DTypeLike = jnp.float32,
    value_heads: int | None = None,
) -> AttentionState:
    """An empty cache with room for `capacity` tokens in each row; `value_heads=None`: as many as heads of keys."""
    return AttentionState(
        jnp.zeros((batch, capacity, key_heads, key_dim), dtype),
        jnp.zeros((batch, capacity, value_heads or key_heads, value_dim), dtype),
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
    k: Float[Array, "batch time key_heads key_dim"],
    v: Float[Array, "batch time value_heads value_dim"],
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
        q: Queries. A group of ``heads / key_heads`` neighbouring heads shares a head of keys, one of
            ``heads / value_heads`` a head of values.
        k: Keys.
        v: Values, in a multiple of the key heads.
        state: The cache of what came before, see `init_attention_state`, or `None` for a fresh start, after which the
            cache is full: its capacity is `time`.
        scale: Of the products; ``1 / √key_dim`` where `None`.
        segment_ids: Documents packed in a row; attention does not cross a change of id. Negative ids are padding, with
            zero outputs, zero gradients and no slot in the cache. `None`: the carried document goes on, no padding.
        implementation: ``"sequential"`` (the definition, a scan over time), ``"dense"`` (all weights at once),
            ``"chunked"`` (blocks of queries one after another: memory linear in time), or `None`: dense where time is
            short. One time step is dense under every name. All support forward mode.

    Returns:
        Outputs in the dtype of `v`, and the cache with the new tokens. Logits, softmax and sums are float32 or wider.

    Raises:
        ValueError: Shapes that do not fit together, a length of zero, an unknown implementation; or a cache that is too
            small, where that is known when the call is made. Under a transformation it is not: then each token that
            finds no slot, and all that come later in its row, give NaN, the slots already taken stay as they are, and
            `index` exceeds the capacity from then on.
        TypeError: Dtypes that are not floating point (q, k, v) or not integer (segment ids), a foreign state.
    """
    return _attention(q, k, v, state, scale, segment_ids, implementation, softmax)


def sigmoid_attention(
    q: Float[Array, "batch time heads key_dim"],
    k: Float[Array, "batch time key_heads key_dim"],
    v: Float[Array, "batch time value_heads value_dim"],
    *,
    bias: float | Float[Array, " heads"],
    state: AttentionState | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch time heads value_dim"], AttentionState]:
    """Attention with a sigmoid of every logit, not normalised (Sigmoid Self-Attention, arXiv:2409.04431, §2).

        o_t = Σ_{j≤t} σ(scale · ⟨q_t, k_j⟩ + bias) v_j

    Arguments, results and errors are those of `causal_attention`, and `bias`, a number or one for each head. With
    ``−log n``, n the number of tokens in the context, the weights of logits of zero sum to n / (n + 1); with 0 they sum
    to n / 2.
    """
    if not isinstance(bias, int | float):
        contract.check_shapes(q=(q, "batch time heads key_dim"), bias=(bias, "heads"))
        contract.check_floating(bias=bias)
    return _attention(q, k, v, state, scale, segment_ids, implementation, functools.partial(_sigmoid, bias))


def cache_positions(
    segment_ids: Int[Array, "batch time"] | None, state: AttentionState | None, batch: int, time: int
) -> Int[Array, "batch time"]:
    """The position in its document of every token that goes into a cache next (that of padding means nothing)."""
    contract.check_state(state, AttentionState)
    counter = contract.fresh_counter(segment_ids, batch)
    index, start, segment = (counter,) * 3 if state is None else (state.index, state.start, state.segment)
    number, first = contract.count_tokens(contract.segments(segment_ids, segment), index, start, time)
    return number - first


def check_heads(sizes: dict[str, int]) -> None:
    """Raise `ValueError` unless key heads divide value heads and those the heads of queries."""
    if sizes["value_heads"] % sizes["key_heads"]:
        raise ValueError(f"v: expected a multiple of the {sizes['key_heads']} heads of k, got {sizes['value_heads']}")
    if sizes["heads"] % sizes["value_heads"]:
        raise ValueError(f"q: expected a multiple of the {sizes['value_heads']} heads of v, got {sizes['heads']}")


def _attention(q, k, v, state, scale, segment_ids, implementation, weigh):
    fields = {"keys": "batch capacity key_heads key_dim", "values": "batch capacity value_heads value_dim"}
    fields |= {"start": "batch", "index": "batch", "segment": "batch"}
    sizes = contract.check_shapes(
        q=(q, "batch time heads key_dim"),
        k=(k, "batch time key_heads key_dim"),
        v=(v, "batch time value_heads value_dim"),
        segment_ids=(segment_ids, "batch time"),
        **contract.check_state(state, AttentionState, **fields),
    )
    check_heads(sizes)
    contract.check_floating(q=q, k=k, v=v)
    contract.check_segment_ids(segment_ids)
    contract.check_implementation(implementation, IMPLEMENTATIONS)

    if segment_ids is not None:
        k, v = (contract.mask_padding(x, segment_ids >= 0) for x in (k, v))  # no weight times NaN is NaN
    fresh = state is None
    state = _fresh_state(k, v, segment_ids) if fresh else state
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    first, slot, counters = _take_slots(segment_ids, state, q.shape[1])
    check_room(counters.index, state)

    if implementation == "sequential" and q.shape[1] != 1:
        return _sequential(q, k, v, state, segment_ids, scale, weigh)
    attend = functools.partial(_implementation(implementation, q.shape[1]), scale=scale, weigh=weigh)
    state = counters._replace(keys=write(state.keys, k, slot), values=write(state.values, v, slot))
    if fresh:  # the tokens where they are, so that an unused cache costs nothing
        return attend(q, k, v, first, slot, slot), state
    capacity = state.keys.shape[1]
    outputs = attend(q, state.keys, state.values, first, slot, jnp.arange(capacity)[None])
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


def check_room(index: Int[Array, " batch"], state: AttentionState) -> None:
    """Raise `ValueError` for a cache without the slots before `index`, if that is no tracer."""
    capacity = state.keys.shape[1]
    if not isinstance(index, jax.core.Tracer) and (needed := int(jnp.max(index))) > capacity:
        raise ValueError(
            f"state: expected a capacity of {needed} or more, got {capacity}; grow_attention_state makes room"
        )


@jax.vmap
def write(
    cache: Float[Array, "batch capacity heads dim"],
    rows: Float[Array, "batch time heads dim"],
    slot: Int[Array, "batch time"],
) -> Float[Array, "batch capacity heads dim"]:
    """A cache with rows in their slots; a row is dropped if its slot is negative (padding) or there is none such."""
    rows = rows.astype(cache.dtype)
    return cache.at[slot].set(rows, mode="drop", unique_indices=True, wrap_negative_indices=False)


def _implementation(name, time):
    if name is None:
        name = "chunked" if isinstance(time, int) and time > CHUNK else "dense"
    return _chunked if name == "chunked" and time != 1 else _dense


def _sequential(q, k, v, state, segment_ids, scale, weigh):
    def step(state, token):
        q, k, v, segment_ids = jax.tree.map(lambda x: x[:, None], token)
        outputs, state = _attention(q, k, v, state, scale, segment_ids, None, weigh)
        return state, outputs[:, 0]

    state, outputs = lax.scan(step, state, jax.tree.map(lambda x: x.swapaxes(0, 1), (q, k, v, segment_ids)))
    return outputs.swapaxes(0, 1), state


def _chunked(q, k, v, first, slot, key_slots, *, scale, weigh):
    """Blocks of queries, recomputed in the backward pass: of the logits only one block exists at a time."""
    dtype = contract.accumulation_dtype(q, k, v)
    k, v, out = k.astype(dtype), v.astype(dtype), v.dtype  # here, so that gradients are summed up in this precision
    padded = (contract.pad_time(x, CHUNK, fill) for x, fill in ((q, 0), (first, 0), (slot, -1)))
    chunks = tuple(contract.chunk_time(x, CHUNK) for x in padded)

    @jax.checkpoint
    def attend_chunk(chunk):
        q, first, slot = chunk
        return _dense(q, k, v, first, slot, key_slots, scale=scale, weigh=weigh)

    return contract.unchunk_time(lax.map(attend_chunk, chunks), q.shape[1]).astype(out)


def _dense(q, k, v, first, slot, key_slots, *, scale, weigh):
    visible = (first[:, :, None] <= key_slots[:, None]) & (key_slots[:, None] <= slot[:, :, None])
    return attend(q, k, v, visible, scale, weigh)


def attend(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys key_heads key_dim"],
    v: Float[Array, "batch keys value_heads value_dim"],
    visible: Bool[Array, "batch queries keys"],
    scale: float,
    weigh: Callable[[Array, Array], Array],
) -> Float[Array, "batch queries heads value_dim"]:
    """``Σ_j weigh(scale · ⟨q_t, k_j⟩)_j v_j`` over the visible keys; no head of keys or values is repeated for it."""
    dtype = contract.accumulation_dtype(q, k, v)
    (batch, time, heads, _), key_heads, value_heads = q.shape, k.shape[2], v.shape[2]
    groups = key_heads, value_heads // key_heads, heads // value_heads
    q = q.astype(dtype).reshape(batch, time, *groups, -1) * scale
    v_groups = v.astype(dtype).reshape(*v.shape[:2], *groups[:2], -1)
    weights = weigh(_matmul("btgurd,bsgd->bgurts", q, k.astype(dtype)), visible[:, None, None, None])
    return _matmul("bgurts,bsgud->btgurd", weights, v_groups).reshape(batch, time, heads, -1).astype(v.dtype)


def softmax(s: Float[Array, "..."], visible: Bool[Array, "..."]) -> Float[Array, "..."]:
    """Of the visible logits; all weights are zero where none is. The maximum is a reference point, without gradient."""
    s = jnp.where(visible, s, -jnp.inf)
    m = lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True))
    weights = jnp.exp(s - jnp.where(m == -jnp.inf, 0, m))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


def _sigmoid(bias, s, visible):
    bias = jnp.asarray(bias, s.dtype)
    bias = bias.reshape(*s.shape[1:4], 1, 1) if bias.ndim else bias
    return jnp.where(visible, jax.nn.sigmoid(s + bias), 0)


_matmul = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
