"""Time split over devices: each computes its piece, and all that they exchange is one state each.

Weigao Sun, Disen Lan, Yiran Zhong, Xiaoye Qu, Yu Cheng: LASP-2: Rethinking Sequence Parallelism for Linear Attention
and Its Hybrid, 2025, arXiv:2502.07563. There one all-gather of ``Σ k vᵀ`` makes linear attention parallel over time.
Here the same holds for every recurrence whose pieces compose: what a piece makes of a state that comes in follows from
its state after a fresh start and from how much of the former it keeps.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from primitives import contract, prefix_scan
from primitives.decays import FLOOR
from primitives.linear_attention import linear_attention
from primitives.linear_recurrence import gates, linear_recurrence
from primitives.prefix_scan import prefix_scan_attention


def sequence_parallel(
    mixer: Callable[..., tuple[Array, Any]],
    *inputs: Array | None,
    axis_name: str,
    state: Any = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    **options: Any,
) -> tuple[Array, Any]:
    """``mixer(*inputs, ...)`` inside a `jax.shard_map` in which time is split over the mesh axis `axis_name`.

    Each device runs its piece from a fresh start; all exchange the states after that (one all-gather, of a size that
    does not depend on time; in the reverse pass a reduction of the same size); each composes those before its own and
    runs its piece from there. Outputs, states and gradients are those of the whole.

    Args:
        mixer: `linear_recurrence`, `linear_attention` or `prefix_scan_attention`.
        *inputs: Of the mixer: the device's piece of those with a time axis.
        axis_name: The mesh axis, in the order of time.
        state: What came before the first piece, the same on all devices; or `None`.
        segment_ids: The device's piece.
        **options: More keyword arguments of the mixer.

    Returns:
        The device's piece of the outputs, and the state after it: on the last device that of the whole.

    Raises:
        ValueError: Another mixer, and what the mixer refuses.
        TypeError: What the mixer refuses.
    """
    if mixer not in _RULES:
        names = ", ".join(rule.__name__ for rule in _RULES)
        raise ValueError(f"mixer: expected one of {names}, got {getattr(mixer, '__name__', mixer)}")
    keeps, compose, empty = _RULES[mixer]
    _, local = mixer(*inputs, segment_ids=segment_ids, **options)
    first = _first_id(segment_ids, local.segment)
    kept = keeps(*inputs, segments=contract.segments(segment_ids, first))
    state = empty(local) if state is None else jax.tree.map(lambda x, like: x.astype(like.dtype), state, local)
    state, piece = jax.tree.map(functools.partial(_vary, axis_name), (state, (local, kept, first)))

    def pass_on(state, numbered):
        number, (local, kept, first) = numbered
        continued = (first == state.segment) | (first < 0)
        fields = compose(state[:-1], local[:-1], kept * _along(continued, kept))
        after = type(local)(*fields, jnp.where(first < 0, state.segment, local.segment))
        earlier = number < lax.axis_index(axis_name)
        return jax.tree.map(functools.partial(jnp.where, earlier), after, state), None

    pieces = lax.all_gather(piece, axis_name)
    state, _ = lax.scan(pass_on, state, (jnp.arange(lax.axis_size(axis_name)), pieces))
    return mixer(*inputs, state=state, segment_ids=segment_ids, **options)


def _first_id(segment_ids, like):
    """The first non-negative id of each row, −1 where there is none: then the document before goes on."""
    if segment_ids is None:
        return jnp.full_like(like, -1)
    at = jnp.argmax(segment_ids >= 0, axis=1)
    return jnp.take_along_axis(segment_ids, at[:, None], axis=1)[:, 0].astype(like.dtype)


def _vary(axis_name, array):
    """The same array, as one that may differ from device to device."""
    return jnp.where(lax.axis_index(axis_name) < 0, array, array)


def _along(rows, array):
    """A number for each row, to multiply an array with."""
    return rows.reshape(rows.shape + (1,) * (array.ndim - 1))


# --- For each mixer: what a piece keeps of what comes in, how that and its own compose, the empty state -----------


def _linear_recurrence_keeps(decay, inputs, *, segments):
    decay = jnp.expand_dims(decay, tuple(range(inputs.ndim - jnp.ndim(decay))))
    decay = decay.astype(contract.accumulation_dtype(decay))
    full = gates(decay, inputs.shape[1], segments.valid, segments.reset)
    return jnp.prod(jnp.broadcast_to(full, inputs.shape), axis=1)


def _linear_attention_keeps(q, k, v, log_decay=None, *, segments):
    """``exp(Σ_t g_t)`` as ``[batch, state_heads, channels, 1]``."""
    g = contract.fresh_like(k[..., :1, :1], 0, contract.accumulation_dtype(k))
    if log_decay is not None:
        log_decay = jnp.maximum(log_decay, FLOOR).astype(contract.accumulation_dtype(log_decay))
        g = g + (log_decay[:, None] if log_decay.ndim == 1 else log_decay.reshape(*log_decay.shape[:3], -1))
    g = contract.mask_padding(g, segments.valid)
    if segments.reset is not None:
        g = jnp.where(segments.reset[..., None, None], FLOOR, g)
    return jnp.exp(jnp.sum(g, axis=1))[..., None]


def _prefix_scan_keeps(logits, values, *, segments):
    """All or nothing."""
    everything = contract.fresh_like(logits[:, 0, 0], 1, contract.accumulation_dtype(logits))
    return everything if segments.reset is None else everything * ~jnp.any(segments.reset, axis=1)


def _affine(earlier, later, kept):
    return (kept * earlier[0] + later[0],)


def _softmax(earlier, later, kept):
    return prefix_scan.combine(earlier, later, kept == 0)


def _zero(state):
    return jax.tree.map(lambda x: contract.fresh_like(x, 0), state)


def _no_weight(state):
    return _zero(state)._replace(max=contract.fresh_like(state.max, -jnp.inf))


_RULES = {
    linear_recurrence: (_linear_recurrence_keeps, _affine, _zero),
    linear_attention: (_linear_attention_keeps, _affine, _zero),
    prefix_scan_attention: (_prefix_scan_keeps, _softmax, _no_weight),
}
