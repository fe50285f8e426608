"""RAT: a gated recurrence inside chunks, softmax attention across them.

Xiuying Wei, Anunay Yadav, Razvan Pascanu, Caglar Gulcehre: RAT: Bridging RNN Efficiency and Attention Accuracy in
Language Modeling, 2025, arXiv:2507.04416.

Implemented: with gates g = σ(W_g u + b_g), z = σ(W_z u), values x = W_x u, and queries and keys that neighbouring heads
share in groups, in chunks of C tokens from the start of a document on, for a token t of chunk c

    k̃_t = g_t ⊙ k̃_{t−1} + (1 − g_t) ⊙ k_t,  x̃_t = g_t ⊙ x̃_{t−1} + (1 − g_t) ⊙ x_t,  both 0 before a chunk
    o_t = softmax(⟨q_t, k̃_j⟩ / √d_h) x̃_j  over j = t and the last tokens j of the chunks 0 … c − 1
    y_t = W_o (z_t ⊙ o_t)

on `primitives.linear_recurrence`, with rotations of q and k̃ by the number of the chunk. C = 1 with g = 0 is causal
attention, a C of at least the length is a gated recurrent network. Of earlier chunks only the last tokens are kept and
compared, at most ⌈T / C⌉ for T new tokens, so that training costs O(T² / C) products and the cache is C times smaller.

Deviations and what is open:

- One softmax over both kinds of keys; the authors' code computes two parts and merges them, which is the same.
- Half of a head's channels are paired with the other half in rotations. b_g starts from log U(1, C − 1), as in the
  authors' code. All logits of a call exist at once.
- The norm before and the residual connection around are the stack's. Local attention, which the paper interleaves, is
  for the pattern of a stack.
- The cache is a `primitives.AttentionState` with a slot for each complete chunk. Functions that give a cache room for a
  number of tokens (`zoo.grow_state`, `init_state(capacity=...)`) give it as many slots, C times what is needed: a C-th
  of the tokens, rounded up, is enough.
- "1.3b" has the number of parameters (about) and the chunks of 16 that the paper's abstract names; its other sizes are
  our choice.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from primitives import (
    AttentionState,
    LinearRecurrenceState,
    attention,
    contract,
    init_attention_state,
    linear_recurrence,
    rotary,
)
from zoo.layers import (
    LLAMA,
    MixerConfig,
    PositionState,
    StackConfig,
    check_rotary,
    count_positions,
    fresh_positions,
    merge_heads,
    split_heads,
    widen,
)


class RATState(NamedTuple):
    """Where a row stands, the recurrence of keys and values in its last chunk, and the ends of complete chunks."""

    position: PositionState
    recurrence: LinearRecurrenceState
    ends: AttentionState


jax.export.register_namedtuple_serialization(RATState, serialized_name="zoo.RATState")


def recurrent_chunk_attention(
    q: Float[Array, "batch time heads dim"],
    k: Float[Array, "batch time heads dim"],
    v: Float[Array, "batch time heads dim"],
    gate: Float[Array, "batch time heads dim"],
    *,
    chunk: int,
    rotate: bool = False,
    state: RATState | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
) -> tuple[Float[Array, "batch time heads dim"], RATState]:
    """Attention of every token over its own recurrent state and those at the ends of earlier chunks: see above."""
    contract.check_state(state, RATState)
    time = q.shape[1]
    state = _fresh_state(k, v, segment_ids, -(-time // chunk)) if state is None else state
    positions, position = count_positions(segment_ids, state.position, *q.shape[:2])
    number, place = positions // chunk, positions % chunk

    gate = widen(gate)[:, :, None]
    inputs = (1 - gate) * jnp.stack([k, v], axis=2)
    decay = jnp.where((place == 0)[..., None, None, None], 0, gate)
    tokens, recurrence = linear_recurrence(decay, inputs, state=state.recurrence, segment_ids=segment_ids)
    k, v = tokens[:, :, 0].astype(k.dtype), tokens[:, :, 1].astype(v.dtype)
    if rotate:
        q, k = rotary(q, number), rotary(k, number)

    first, index, slot, ends = _end_slots(place == chunk - 1, segment_ids, state.ends)
    attention.check_room(ends.index, ends)
    ends = ends._replace(keys=attention.write(ends.keys, k, slot), values=attention.write(ends.values, v, slot))
    capacity = ends.keys.shape[1]
    slots = jnp.arange(capacity)
    visible = (first[..., None] <= slots) & (slots < index[..., None])
    outputs = _attend(q, k, v, ends, visible)
    outputs = jnp.where((index <= capacity)[..., None, None], outputs, jnp.nan)
    return outputs.astype(v.dtype), RATState(position, recurrence, ends)


def _fresh_state(k, v, segment_ids, capacity):
    counter = contract.fresh_counter(segment_ids, k.shape[0])
    hidden = contract.fresh_like(jnp.stack([k[:, 0], v[:, 0]], axis=1), 0, contract.accumulation_dtype(k, v))
    ends = init_attention_state(k.shape[0], capacity, *k.shape[2:], v.shape[-1], v.dtype)
    return RATState(
        fresh_positions(segment_ids, k.shape[0]),
        LinearRecurrenceState(hidden, counter),
        ends._replace(start=counter, index=counter, segment=counter),
    )


def _end_slots(is_end, segment_ids, ends):
    """The slots ``[first, index)`` that each token sees, that into which it goes if it ends a chunk, the counters."""
    segments = contract.segments(segment_ids, ends.segment)
    if segments.valid is not None:
        is_end &= segments.valid
    index = ends.index[:, None] + jnp.cumsum(is_end, axis=1, dtype=jnp.int32) - is_end
    start = ends.start[:, None]
    first = start if segments.reset is None else lax.cummax(jnp.where(segments.reset, index, start), axis=1)
    slot = jnp.where(is_end, index, -1 - jnp.arange(is_end.shape[1]))
    after = ends._replace(start=first[:, -1], index=index[:, -1] + is_end[:, -1], segment=segments.last)
    return first, index, slot, after


def _attend(q, k, v, ends, visible):
    """Softmax over the visible ends and the token itself."""
    dtype = contract.accumulation_dtype(q, k, v)
    q, k, v, keys, values = (x.astype(dtype) for x in (q * q.shape[-1] ** -0.5, k, v, ends.keys, ends.values))
    precision = lax.Precision.HIGHEST
    earlier = jnp.einsum("bthd,bshd->bhts", q, keys, precision=precision)
    own = jnp.einsum("bthd,bthd->bht", q, k, precision=precision)[..., None]
    visible = jnp.concatenate([visible, jnp.ones_like(visible[..., :1])], axis=-1)[:, None]
    weights = attention.softmax(jnp.concatenate([earlier, own], axis=-1), visible)
    outputs = jnp.einsum("bhts,bshd->bthd", weights[..., :-1], values, precision=precision)
    return outputs + weights[..., -1].swapaxes(1, 2)[..., None] * v


class RAT(nnx.Module):
    """The mixer. Its state is a `RATState`."""

    def __init__(self, config: "RATConfig", stack: StackConfig, *, rngs: nnx.Rngs):
        width, self.heads, self.groups = stack.width, config.heads, config.groups
        self.chunk, self.rotary = config.chunk, config.rotary
        self.gate_value_forget = stack.linear(3 * width, rngs=rngs)
        self.query_key = stack.linear(2 * config.groups * width // config.heads, rngs=rngs)
        horizon = jax.random.uniform(rngs.params(), (width,), minval=1, maxval=max(config.chunk - 1, 1))
        self.forget_bias = nnx.Param(jnp.log(horizon))
        self.output = stack.linear(width, rngs=rngs)

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        z, v, g = jnp.split(self.gate_value_forget(x), 3, axis=-1)
        q, k = jnp.split(split_heads(self.query_key(x), 2 * self.groups), 2, axis=2)
        q, k = (jnp.repeat(array, self.heads // self.groups, axis=2) for array in (q, k))
        gate = jax.nn.sigmoid(widen(g) + self.forget_bias[...])
        outputs, state = recurrent_chunk_attention(
            q,
            k,
            split_heads(v, self.heads),
            split_heads(gate, self.heads),
            chunk=self.chunk,
            rotate=self.rotary,
            state=state,
            segment_ids=segment_ids,
        )
        return self.output(jax.nn.sigmoid(z) * merge_heads(outputs)), state


@dataclasses.dataclass(frozen=True)
class RATConfig(MixerConfig):
    """RAT.

    Attributes:
        heads: Of values and gates.
        groups: Heads of queries and keys before they are repeated, a divisor of `heads`.
        chunk: Tokens of a chunk.
        rotary: Whether queries and keys are turned by the number of their chunk.
    """

    heads: int = 4
    groups: int = 1
    chunk: int = 16
    rotary: bool = True

    def check(self, stack: StackConfig) -> None:
        """Raise `ValueError` for heads that do not fit, or a chunk without tokens."""
        super().check(stack)
        if self.groups < 1 or self.heads % self.groups:
            raise ValueError(f"groups: expected a divisor of the {self.heads} heads, got {self.groups}")
        if self.chunk < 1:
            raise ValueError(f"chunk: expected a positive number of tokens, got {self.chunk}")
        if self.rotary:
            check_rotary(stack.width // self.heads)

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> RAT:
        """One RAT."""
        return RAT(self, stack, rngs=rngs)


PRESETS = {
    "tiny": StackConfig(width=16, layers=2, pattern=(RATConfig(heads=2, chunk=4),), hidden=32, **LLAMA),
    "1.3b": StackConfig(width=2048, layers=24, pattern=(RATConfig(heads=16),), hidden=5504, scan=True, **LLAMA),
}
