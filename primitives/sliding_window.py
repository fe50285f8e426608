"""Causal softmax attention over the last few tokens; the state is a cache of constant size that rolls.

Rewon Child, Scott Gray, Alec Radford, Ilya Sutskever: Generating Long Sequences with Sparse Transformers, 2019,
arXiv:1904.10509, §4.2, and Iz Beltagy, Matthew E. Peters, Arman Cohan: Longformer, 2020, arXiv:2004.05150, §3.1, for
attention to a window. Padding is left out, as in `short_convolution`: a window is one of tokens, however far apart
they are.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from primitives import contract
from primitives.attention import attend, check_heads, softmax

IMPLEMENTATIONS = ("sequential", "banded")


class SlidingWindowState(NamedTuple):
    """The last ``window − 1`` tokens, the latest last. Float32 or wider."""

    keys: Float[Array, "batch past key_heads key_dim"]  # zeros before the document's first token
    values: Float[Array, "batch past value_heads value_dim"]
    position: Int[Array, " batch"]  # of the next token in its document
    segment: Int[Array, " batch"]  # the last non-negative segment id


jax.export.register_namedtuple_serialization(SlidingWindowState, serialized_name="primitives.SlidingWindowState")


def sliding_window_attention(
    q: Float[Array, "batch time heads key_dim"],
    k: Float[Array, "batch time key_heads key_dim"],
    v: Float[Array, "batch time value_heads value_dim"],
    *,
    window: int,
    prefix: tuple[Float[Array, "prefix key_heads key_dim"], Float[Array, "prefix value_heads value_dim"]] | None = None,
    state: SlidingWindowState | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch time heads value_dim"], SlidingWindowState]:
    """Softmax attention of every token over itself and the ``window − 1`` tokens before it (Longformer, §3.1, causal).

        s_tj = scale · ⟨q_t, k_j⟩
        o_t = Σ_{t−window<j≤t} exp(s_tj − m_t) v_j / Σ_{t−window<j≤t} exp(s_tj − m_t),  m_t = max_j s_tj

    With a `prefix` both sums also run over its keys and values: the persistent tokens of Titans (arXiv:2501.00663),
    attention sinks (arXiv:2309.17453).

    Args:
        q: Queries. A group of ``heads / key_heads`` neighbouring heads shares a head of keys, one of
            ``heads / value_heads`` a head of values.
        k: Keys.
        v: Values, in a multiple of the key heads.
        window: How many tokens a token sees, itself included.
        prefix: Keys and values, no part of the state, that every token of every document sees beside its window.
        state: The last tokens of what came before, or `None` for a fresh start.
        scale: Of the products; ``1 / √key_dim`` where `None`.
        segment_ids: Documents packed in a row; attention does not cross a change of id. Negative ids are padding, with
            zero outputs and zero gradients, and do not count. `None`: the carried document goes on, no padding.
        implementation: ``"sequential"`` (the definition, a scan over time), ``"banded"`` (blocks of `window` queries
            against their own tokens and those of the block before: time and memory in proportion to time · window;
            with segment ids the tokens are moved together for it), or `None`: banded, sequential for a symbolic
            length. One time step is one softmax over the window under every name. All support forward mode.

    Returns:
        Outputs in the dtype of `v`, and the state after the last token. Logits, softmax and sums are float32 or wider.

    Raises:
        ValueError: Shapes that do not fit together, a window or a length of zero, an unknown implementation, or
            ``"banded"`` for a symbolic length.
        TypeError: Dtypes that are not floating point (q, k, v, prefix) or not integer (segment ids), a foreign state, a
            prefix that is no pair.
    """
    fields = {"keys": "batch past key_heads key_dim", "values": "batch past value_heads value_dim"}
    fields = contract.check_state(state, SlidingWindowState, **fields, position="batch", segment="batch")
    cache = {name: fields.pop(f"state.{name}")[0] for name in ("keys", "values")}
    if not (prefix is None or (isinstance(prefix, tuple | list) and len(prefix) == 2)):
        raise TypeError(f"prefix: expected None or a pair of keys and values, got {type(prefix).__name__}")
    pair = dict(zip(("prefix_keys", "prefix_values"), prefix or (), strict=False))
    sizes = contract.check_shapes(
        q=(q, "batch time heads key_dim"),
        k=(k, "batch time key_heads key_dim"),
        v=(v, "batch time value_heads value_dim"),
        prefix_keys=(pair.get("prefix_keys"), "prefix key_heads key_dim"),
        prefix_values=(pair.get("prefix_values"), "prefix value_heads value_dim"),
        segment_ids=(segment_ids, "batch time"),
        **fields,
    )
    check_heads(sizes)
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"window: expected a positive integer, got {window!r}")
    for name, tokens in (("keys", k), ("values", v)):  # not in `check_shapes`, which refuses an axis of size zero
        shape = (sizes["batch"], window - 1, *tokens.shape[2:])
        if cache[name] is not None and cache[name].shape != shape:
            raise ValueError(f"state.{name}: expected shape {shape}, got {cache[name].shape}")
    contract.check_floating(q=q, k=k, v=v, **pair)
    contract.check_segment_ids(segment_ids)
    contract.check_implementation(implementation, IMPLEMENTATIONS)

    dtype = contract.accumulation_dtype(q, k, v, *pair.values(), *(() if state is None else state[:2]))
    state = _fresh_state(k, v, segment_ids, window - 1) if state is None else state
    state = state._replace(keys=state.keys.astype(dtype), values=state.values.astype(dtype))
    segments = contract.segments(segment_ids, state.segment)
    tokens = tuple(contract.mask_padding(x, segments.valid).astype(dtype) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    always = tuple(_for_rows(x.astype(dtype), rows) for x, rows in zip(pair.values(), tokens[1:], strict=False))
    attention = functools.partial(_attend, prefix=always, scale=scale)
    if q.shape[1] == 1:
        run = _step
    else:
        sequential = implementation == "sequential" or (implementation is None and not isinstance(q.shape[1], int))
        run = _sequential if sequential else _banded
    outputs, state = run(*tokens, state, segments, attention)
    return contract.mask_padding(outputs, segments.valid).astype(v.dtype), state._replace(segment=segments.last)


def _fresh_state(k, v, segment_ids, past):
    def zeros(x):
        return jnp.broadcast_to(contract.fresh_like(x[:, :1], 0), (x.shape[0], past, *x.shape[2:]))

    counter = contract.fresh_counter(segment_ids, k.shape[0])
    return SlidingWindowState(zeros(k), zeros(v), counter, counter)


def _for_rows(prefix, tokens):
    """The prefix for each row, sharded as rows are."""
    return prefix + contract.fresh_like(tokens[:, :1], 0)


def _attend(q, keys, values, visible, *, prefix, scale):
    """To the visible ones and to the prefix."""
    if prefix:
        always = jnp.broadcast_to(contract.fresh_like(visible[..., :1], True), (*visible.shape[:2], prefix[0].shape[1]))
        visible = jnp.concatenate([always, visible], axis=-1)
        keys, values = (jnp.concatenate(pair, axis=1) for pair in zip(prefix, (keys, values), strict=True))
    return attend(q, keys, values, visible, scale, softmax)


def _step(q, k, v, state, segments, attention):
    valid, reset, _ = segments
    if reset is not None:
        position = jnp.where(reset[:, 0], 0, state.position)
        before = tuple(jnp.where(reset[..., None, None], 0, x) for x in (state.keys, state.values))
    else:
        position, before = state.position, (state.keys, state.values)
    keys, values = (jnp.concatenate(pair, axis=1) for pair in zip(before, (k, v), strict=True))
    past = keys.shape[1] - 1
    visible = jnp.arange(past + 1) >= past - position[:, None]
    outputs = attention(q, keys, values, visible[:, None])
    after = state._replace(keys=keys[:, 1:], values=values[:, 1:], position=position + 1)
    return outputs, after if valid is None else _select(valid[:, 0], after, state)


def _select(rows, after, before):
    return jax.tree.map(lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b), after, before)


def _sequential(q, k, v, state, segments, attention):
    def step(state, token):
        q, k, v, valid, reset = jax.tree.map(lambda x: x[:, None], token)
        outputs, state = _step(q, k, v, state, segments._replace(valid=valid, reset=reset), attention)
        return state, outputs[:, 0]

    tokens = jax.tree.map(lambda x: x.swapaxes(0, 1), (q, k, v, segments.valid, segments.reset))
    state, outputs = lax.scan(step, state, tokens)
    return outputs.swapaxes(0, 1), state


def _banded(q, k, v, state, segments, attention):
    time, past = q.shape[1], state.keys.shape[1]
    number, first = contract.count_tokens(segments, jnp.zeros_like(state.position), -state.position, time)
    age = number - first  # tokens of the same document before this one
    position, end = age[:, -1] + 1, number[:, -1] + 1
    if segments.valid is not None:
        slot = jnp.where(segments.valid, number, time + jnp.arange(time, dtype=number.dtype))  # none for padding
        q, k, v, age = (_scatter(x, slot) for x in (q, k, v, age))
    outputs = _attend_blocks(q, k, v, age, state, attention)
    if segments.valid is not None:
        outputs = _gather(outputs, slot)

    same_document = jnp.arange(past) >= past - position[:, None]

    def last(before, tokens):
        row = jnp.concatenate([before, tokens], axis=1)
        row = row[:, time:] if segments.valid is None else _slice(row, end, past)
        return jnp.where(same_document[..., None, None], row, 0)

    return outputs, state._replace(keys=last(state.keys, k), values=last(state.values, v), position=position)


def _attend_blocks(q, k, v, age, state, attention):
    """Queries in blocks of a window, or in one where time is shorter, against `past` tokens more than a block has."""
    time, past = q.shape[1], state.keys.shape[1]
    block = min(time, past + 1)
    distance = past + jnp.arange(block)[:, None] - jnp.arange(past + block)

    def attend_block(q, k, v, age):
        visible = (distance >= 0) & (distance <= jnp.minimum(age, past)[..., None])
        return attention(q, k, v, visible)

    q, k, v, age = (_blocks(contract.pad_time(x, block, 0), block) for x in (q, k, v, age))
    k, v = _with_past(k, state.keys), _with_past(v, state.values)
    outputs = jax.vmap(attend_block, in_axes=1, out_axes=1)(q, k, v, age)
    return outputs.reshape(outputs.shape[0], -1, *outputs.shape[3:])[:, :time]


def _blocks(row, block):
    return row.reshape(row.shape[0], -1, block, *row.shape[2:])


def _with_past(blocks, past):
    """The tokens before each block in front of it; if there are several, these are one less than a block has."""
    before = past[:, None]
    if blocks.shape[1] > 1:
        before = jnp.concatenate([before, blocks[:, :-1, 1:]], axis=1)
    return jnp.concatenate([before, blocks], axis=2)


@jax.vmap
def _scatter(rows, slot):
    return jnp.zeros_like(rows).at[slot].set(rows, mode="drop", unique_indices=True)


@jax.vmap
def _gather(rows, slot):
    return rows.at[slot].get(mode="fill", unique_indices=True, fill_value=0)


def _slice(rows, start, size):
    return jax.vmap(lambda rows, start: lax.dynamic_slice_in_dim(rows, start, size))(rows, start)
