"""The diagonal linear recurrence ``h_t = decay_t · h_{t−1} + inputs_t``, real or complex: the core of state spaces.

Eric Martin, Chris Cundy: Parallelizing Linear Recurrent Neural Nets Over Sequence Length, 2018, arXiv:1709.04057, has
it as a scan of (decay, input) with an associative operator, and its reverse pass as the same recurrence from the end:
``dh_t = do_t + decay_{t+1} dh_{t+1}``, ``dinputs_t = dh_t``, ``ddecay_t = dh_t h_{t−1}``, where ``dx`` is the cotangent
of x.

A reset is a decay of 0, padding is a decay of 1 with an input of 0; so nothing but `_gate` knows of documents.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact, Int

from pallas_kernels.tpu import linear_recurrence as tpu_kernel
from primitives import contract, dispatch

IMPLEMENTATIONS = ("sequential", "associative", "loop", "pallas")
CHUNK = 64  # of the associative form; it changes rounding only
FILLED = 128  # channels from which on `None` is the kernel on a TPU: it keeps them along the lanes of registers


class LinearRecurrenceState(NamedTuple):
    """The hidden state after the last token. Float32 or wider, complex if the decay or the inputs are."""

    hidden: Inexact[Array, "batch *rest"]
    segment: Int[Array, " batch"]  # the last non-negative segment id


jax.export.register_namedtuple_serialization(LinearRecurrenceState, serialized_name="primitives.LinearRecurrenceState")


def linear_recurrence(
    decay: Inexact[Array, "..."],
    inputs: Inexact[Array, "batch time *rest"],
    *,
    state: LinearRecurrenceState | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    implementation: str | None = None,
) -> tuple[Inexact[Array, "batch time *rest"], LinearRecurrenceState]:
    """The states of ``h_t = decay_t · h_{t−1} + inputs_t``, elementwise (arXiv:1709.04057).

    Args:
        decay: Real or complex, of any shape that broadcasts to that of `inputs` by NumPy's rules: ``[dim]``,
            ``[batch, time, dim]``, ``[batch, time, heads, 1]``, … One that is constant in time is not copied over it.
        inputs: Real or complex, with any number of axes after batch and time, also none.
        state: The hidden state of what came before, or `None` for zero.
        segment_ids: Documents packed in a row; the state is zero before each. Negative ids are padding, with zero
            outputs and zero gradients. `None`: the carried document goes on, no padding.
        implementation: ``"sequential"`` (the definition, a scan over time), ``"associative"`` (`lax.associative_scan`
            in chunks), ``"loop"`` (in place), ``"pallas"`` (the TPU kernel), or `None`: what is fastest on the platform
            that the call is lowered for, see `primitives.dispatch`. The first two also support forward mode; the others
            have a reverse rule of their own that keeps decay and states. One time step is one step of the recurrence
            under every name.

    Returns:
        The states of all tokens in the dtype of `inputs`, or complex64 (complex128 for float64) where only the decay
        is complex; and the state after the last token.

    Raises:
        ValueError: Shapes that do not fit together, a length of zero, an unknown implementation, ``"associative"`` for
            a symbolic length, or ``"pallas"`` for inputs that the kernel cannot serve; the message says why.
        TypeError: Dtypes that are neither real nor complex floating point (decay, inputs) or not integer (segment ids),
            a foreign state, a complex state of a real recurrence.
    """
    rest = " ".join(f"axis{axis}" for axis in range(2, getattr(inputs, "ndim", 2)))
    contract.check_shapes(
        inputs=(inputs, f"batch time {rest}"),
        segment_ids=(segment_ids, "batch time"),
        **contract.check_state(state, LinearRecurrenceState, hidden=f"batch {rest}", segment="batch"),
    )
    _check_decay(decay, inputs)
    contract.check_inexact(decay=decay, inputs=inputs)
    contract.check_segment_ids(segment_ids)
    contract.check_implementation(implementation, IMPLEMENTATIONS)
    outputs_dtype = jnp.result_type(inputs.dtype, jnp.complex64) if jnp.iscomplexobj(decay) else inputs.dtype
    if state is not None and jnp.iscomplexobj(state.hidden) and not jnp.issubdtype(outputs_dtype, jnp.complexfloating):
        raise TypeError(f"state.hidden: expected real numbers, as decay and inputs are, got {state.hidden.dtype}")

    dtype = contract.accumulation_dtype(decay, inputs, *(() if state is None else state[:1]))
    state = _fresh_state(inputs, segment_ids, dtype) if state is None else state
    valid, reset, last = contract.segments(segment_ids, state.segment)
    # bfloat16 stays as narrow as it comes, and a real decay of complex numbers real: less memory to move.
    decay = jnp.expand_dims(decay, tuple(range(inputs.ndim - decay.ndim)))
    if decay.dtype != jnp.bfloat16:
        decay = decay.astype(dtype if jnp.iscomplexobj(decay) else jnp.finfo(dtype).dtype)
    x = contract.mask_padding(inputs.astype(dtype if outputs_dtype != jnp.bfloat16 else outputs_dtype), valid)
    hidden = state.hidden.astype(dtype)

    if inputs.shape[1] == 1:
        scan = _step
    elif implementation == "sequential":
        scan = _sequential
    elif implementation == "associative":
        scan = _associative
    else:
        if decay.shape[1] == 1:
            # As large as a state: its cotangent is then summed up over time only, in place, and over the rest once.
            decay += contract.fresh_like(hidden if jnp.iscomplexobj(decay) else hidden.real, 0)[:, None]
        if implementation == "pallas" and (reason := tpu_kernel.refusal(decay, x, hidden)):
            raise ValueError(f"implementation: 'pallas' cannot serve these inputs: {reason}")
        decay, x, hidden = contract.vary_together(decay, x, hidden)
        scan = functools.partial(_scan, implementation)
    states, hidden = scan(decay, x, valid, reset, hidden)
    return contract.mask_padding(states, valid).astype(outputs_dtype), LinearRecurrenceState(hidden, last)


def _check_decay(decay, inputs):
    if not hasattr(decay, "shape"):
        raise TypeError(f"decay: expected an array, got {type(decay).__name__}")
    pairs = zip(reversed(decay.shape), reversed(inputs.shape), strict=False)
    if len(decay.shape) > len(inputs.shape) or not all(size == full or size == 1 for size, full in pairs):
        raise ValueError(
            f"decay: expected a shape that broadcasts to that of inputs [batch, time, ...], {tuple(inputs.shape)}, "
            f"got {tuple(decay.shape)}"
        )


def _fresh_state(inputs, segment_ids, dtype):
    return LinearRecurrenceState(
        contract.fresh_like(inputs[:, 0], 0, dtype), contract.fresh_counter(segment_ids, inputs.shape[0])
    )


# --- The recurrence and the operator -----------------------------------------------------------------------------


def compose(earlier, later):
    """The associative operator: h ↦ decay · h + input of two neighbouring stretches to that of both."""
    (decay_a, x_a), (decay_b, x_b) = earlier, later
    return decay_a * decay_b, decay_b * x_a + x_b


def _gate(decay, valid, reset):
    """The decay, 0 where a document starts and 1 at padding; of all tokens or of one."""
    if valid is None:
        return decay
    valid, reset = (mask.reshape(mask.shape + (1,) * (decay.ndim - mask.ndim)) for mask in (valid, reset))
    return jnp.where(reset, 0, jnp.where(valid, decay, 1))


def gates(decay, time, valid, reset):
    """The gate of every token."""
    return _gate(jnp.broadcast_to(decay, (decay.shape[0], time, *decay.shape[2:])), valid, reset)


def _step(decay, x, valid, reset, hidden):
    hidden = _gate(decay, valid, reset)[:, 0] * hidden + x[:, 0]
    return hidden[:, None], hidden


def _sequential(decay, x, valid, reset, hidden):
    def step(hidden, token):
        decay, x = token
        hidden = decay * hidden + x
        return hidden, hidden

    rows = gates(decay, x.shape[1], valid, reset).swapaxes(0, 1), x.swapaxes(0, 1)
    hidden, states = lax.scan(step, hidden, rows)
    return states.swapaxes(0, 1), hidden


def _associative(decay, x, valid, reset, hidden):
    return _scan_chunks(gates(decay, x.shape[1], valid, reset), x, hidden)


def _scan_chunks(gates, x, hidden, reverse=False):
    """`lax.associative_scan` in chunks: over all of a long sequence it would keep log₂(time) copies of it."""

    @jax.checkpoint
    def chunk(hidden, tokens):
        decay, states = lax.associative_scan(compose, tokens, axis=1, reverse=reverse)
        states += decay * hidden[:, None]
        return states[:, 0 if reverse else -1], states

    gates, x = gates.astype(jnp.promote_types(gates.dtype, jnp.finfo(hidden.dtype).dtype)), x.astype(hidden.dtype)
    chunks = tuple(
        contract.chunk_time(contract.pad_time(array, CHUNK, fill), CHUNK) for array, fill in ((gates, 1), (x, 0))
    )
    hidden, states = lax.scan(chunk, hidden, chunks, reverse=reverse)
    return contract.unchunk_time(states, x.shape[1]), hidden


# --- With a reverse rule that keeps decay and states --------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(implementation, decay, x, valid, reset, hidden):
    return _scan_forward(implementation, decay, x, valid, reset, hidden)[0]


def _scan_forward(implementation, decay, x, valid, reset, hidden):
    forward, _ = _implementation(implementation, decay, x, hidden)
    states, final = forward(decay, x, valid, reset, hidden)
    return (states, final), (decay, valid, reset, hidden, states)


def _scan_backward(implementation, residuals, cotangents):
    decay, _, _, hidden, states = residuals
    _, backward = _implementation(implementation, decay, states, hidden)
    ddecay, dx, dhidden = backward(*residuals, *cotangents)
    return ddecay, dx, None, None, dhidden


_scan.defvjp(_scan_forward, _scan_backward)


def _implementation(implementation, decay, x, hidden):
    """The (forward, backward) pair to run; for `None` each chooses when it is lowered."""
    pairs = {
        "loop": (_loop, _loop_backward),
        "associative": (_associative_forward, _associative_backward),
        "pallas": (
            dispatch.differentiate_as(_associative_forward, tpu_kernel.forward),
            dispatch.differentiate_as(_associative_backward, tpu_kernel.backward),
        ),
    }
    if implementation is not None:
        return pairs[implementation]
    guard = {}
    if not isinstance(x.shape[1], int):
        guard = dict.fromkeys(("tpu", "cuda", "default"), "loop")
    elif tpu_kernel.refusal(decay, x, hidden) or math.prod(x.shape[2:]) < FILLED:
        guard = {"tpu": "associative"}
    return tuple(
        dispatch.by_platform("linear_recurrence", {name: pair[i] for name, pair in pairs.items()}, **guard)
        for i in (0, 1)
    )


def _decay_at(decay, t):
    return decay[:, 0] if decay.shape[1] == 1 else contract.time_index(decay, t)


def _loop(decay, x, valid, reset, hidden):
    """One token at a time, in place: no transposition to time-major, which costs as much as the rest on a CPU."""

    def body(t, loop):
        hidden, states = loop
        x_t, valid_t, reset_t = contract.time_index((x, valid, reset), t)
        hidden = _gate(_decay_at(decay, t), valid_t, reset_t) * hidden + x_t
        return hidden, contract.time_update(states, hidden, t)

    hidden, states = lax.fori_loop(0, x.shape[1], body, (hidden, contract.fresh_like(x, 0)))
    return states, hidden


def _loop_backward(decay, valid, reset, hidden, states, dstates, dhidden):
    time = states.shape[1]

    def body(i, loop):
        dhidden, ddecay, dx = loop
        t = time - 1 - i
        dstates_t, valid_t, reset_t = contract.time_index((dstates, valid, reset), t)
        dhidden += dstates_t
        before = jnp.where(t == 0, hidden, contract.time_index(states, jnp.maximum(t - 1, 0)))
        _, pull = jax.vjp(lambda decay, before: _gate(decay, valid_t, reset_t) * before, _decay_at(decay, t), before)
        ddecay_t, dbefore = pull(dhidden)
        if decay.shape[1] == 1:
            ddecay += ddecay_t[:, None]
        else:
            ddecay = contract.time_update(ddecay, ddecay_t, t)
        return dbefore, ddecay, contract.time_update(dx, dhidden, t)

    rows = contract.fresh_like(decay, 0), contract.fresh_like(states, 0)
    dhidden, ddecay, dx = lax.fori_loop(0, time, body, (dhidden, *rows))
    return ddecay, dx, dhidden


def _associative_forward(decay, x, valid, reset, hidden):
    states, hidden = _associative(decay, x, valid, reset, hidden)
    return states.astype(x.dtype), hidden


def _associative_backward(decay, valid, reset, hidden, states, dstates, dhidden):
    every = gates(decay, states.shape[1], valid, reset)
    after = jnp.concatenate([every[:, 1:], jnp.ones_like(every[:, :1])], axis=1)
    dx, _ = _scan_chunks(after, dstates, dhidden, reverse=True)
    before = jnp.concatenate([hidden[:, None], states[:, :-1]], axis=1)
    _, pull = jax.vjp(lambda decay, before: gates(decay, states.shape[1], valid, reset) * before, decay, before)
    ddecay, dbefore = pull(dx)
    return ddecay, dx.astype(states.dtype), dbefore[:, 0]
