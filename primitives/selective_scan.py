"""The selective scan: a diagonal state space whose step, input and output matrices depend on the token.

Albert Gu, Tri Dao: Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2023, arXiv:2312.00752: equation
(2), Algorithm 2. As in the authors' code, the state matrix is discretised by zero-order hold, ``exp(dt a)``, and the
input matrix by Euler's rule, ``dt b``, which is not the ``(dt a)⁻¹ (exp(dt a) − 1) dt b`` of equation (4).

States are n times as large as the tokens, so no form keeps one per token: the reverse passes recompute those of a chunk
from the one before it. A reset is a decay of 0, padding is ``dt = 0``; ``dx`` is the cotangent of x, ``ddt`` of dt.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.tpu import selective_scan as tpu_kernel
from primitives import contract, dispatch
from primitives.linear_recurrence import FILLED, compose

IMPLEMENTATIONS = ("sequential", "associative", "loop", "pallas")
CHUNK = 64  # tokens per state that is kept, at most; it changes rounding only


class SelectiveScanState(NamedTuple):
    """The hidden state after the last token. Float32 or wider."""

    hidden: Float[Array, "batch dim n"]
    segment: Int[Array, " batch"]  # the last non-negative segment id


jax.export.register_namedtuple_serialization(SelectiveScanState, serialized_name="primitives.SelectiveScanState")


def selective_scan(
    x: Float[Array, "batch time dim"],
    dt: Float[Array, "batch time dim"],
    a: Float[Array, "dim n"],
    b: Float[Array, "batch time n"],
    c: Float[Array, "batch time n"],
    d: Float[Array, " dim"] | None = None,
    *,
    state: SelectiveScanState | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch time dim"], SelectiveScanState]:
    """Mamba's state space of every channel (arXiv:2312.00752, equation (2), Algorithm 2):

        h_t = exp(dt_t a) h_{t−1} + dt_t b_t x_t
        y_t = c_t · h_t + d x_t

    Args:
        x: Inputs.
        dt: Step sizes, positive, after the softplus.
        a: The diagonal of the state matrix, negative: no exponent is positive.
        b: Input matrix of every token.
        c: Output matrix of every token.
        d: The skip connection, or `None` for none.
        state: The hidden state of what came before, or `None` for zero.
        segment_ids: Documents packed in a row; the state is zero before each. Negative ids are padding, with zero
            outputs and zero gradients. `None`: the carried document goes on, no padding.
        implementation: ``"sequential"`` (the definition, a scan over time), ``"associative"`` (`lax.associative_scan`
            in chunks), ``"loop"`` (in place), ``"pallas"`` (the TPU kernel), or `None`: what is fastest on the platform
            that the call is lowered for, see `primitives.dispatch`. The first two also support forward mode, and the
            first, of which the gradient keeps a state per token, serves symbolic lengths; the others have a reverse
            rule of their own that keeps one state per `CHUNK` tokens. One time step is one step of the recurrence under
            every name.

    Returns:
        Outputs in the dtype of `x`, and the state after the last token.

    Raises:
        ValueError: Shapes that do not fit together, a length of zero, an unknown implementation, a form in chunks for a
            symbolic length, or ``"pallas"`` for inputs that the kernel cannot serve; the message says why.
        TypeError: Dtypes that are not floating point or not integer (segment ids), a foreign state.
    """
    contract.check_shapes(
        x=(x, "batch time dim"),
        dt=(dt, "batch time dim"),
        a=(a, "dim n"),
        b=(b, "batch time n"),
        c=(c, "batch time n"),
        d=(d, "dim"),
        segment_ids=(segment_ids, "batch time"),
        **contract.check_state(state, SelectiveScanState, hidden="batch dim n", segment="batch"),
    )
    contract.check_floating(x=x, dt=dt, a=a, b=b, c=c, d=d)
    contract.check_segment_ids(segment_ids)
    contract.check_implementation(implementation, IMPLEMENTATIONS)

    outputs_dtype = x.dtype
    dtype = contract.accumulation_dtype(x, dt, a, b, c, *(() if state is None else state[:1]))
    state = _fresh_state(x, a, segment_ids, dtype) if state is None else state
    valid, reset, last = contract.segments(segment_ids, state.segment)
    narrow = [contract.mask_padding(array, valid) for array in (x, dt, b, c)]
    x, dt, b, c = (array.astype(dtype) for array in narrow)
    hidden = state.hidden.astype(dtype)
    # As large as a state: its cotangent is then summed up over time only, in place, and over the batch once.
    a = a.astype(dtype) + contract.fresh_like(hidden, 0)

    if x.shape[1] == 1:
        scan = _step
    elif implementation == "associative":
        scan = _associative
    elif implementation == "sequential" or (implementation is None and not isinstance(x.shape[1], int)):
        scan = _sequential
    else:
        x, dt, b, c = narrow  # less memory to move
        if implementation == "pallas" and (reason := tpu_kernel.refusal(x, dt, b, hidden)):
            raise ValueError(f"implementation: 'pallas' cannot serve these inputs: {reason}")
        scan = functools.partial(_scan, implementation)
    y, hidden = scan(*contract.vary_together(x, dt, a, b, c), reset, hidden)
    y = y if d is None else y + d.astype(dtype) * x
    return y.astype(outputs_dtype), SelectiveScanState(hidden, last)


def _fresh_state(x, a, segment_ids, dtype):
    return SelectiveScanState(
        contract.fresh_like(x[:, 0, :, None] * a, 0, dtype), contract.fresh_counter(segment_ids, x.shape[0])
    )


# --- The recurrence ----------------------------------------------------------------------------------------------


def _discretise(x, dt, a, b, reset):
    """The decay and the input ``[..., dim, n]`` of one token, or of several where a has an axis for them."""
    x, dt = x.astype(a.dtype), dt.astype(a.dtype)
    decay = jnp.exp(dt[..., None] * a)
    if reset is not None:
        decay = jnp.where(reset[..., None, None], 0, decay)
    return decay, (dt * x)[..., None] * b[..., None, :]


def _read(hidden, c):
    return jnp.sum(hidden * c[..., None, :], axis=-1)


def _token(x, dt, a, b, c, reset, hidden):
    """y and the next hidden state of one token."""
    decay, inputs = _discretise(x, dt, a, b, reset)
    hidden = decay * hidden + inputs
    return _read(hidden, c), hidden


def _step(x, dt, a, b, c, reset, hidden):
    x, dt, b, c, reset = jax.tree.map(lambda array: array[:, 0], (x, dt, b, c, reset))
    y, hidden = _token(x, dt, a, b, c, reset, hidden)
    return y[:, None], hidden


def _sequential(x, dt, a, b, c, reset, hidden):
    def step(hidden, token):
        x, dt, b, c, reset = token
        y, hidden = _token(x, dt, a, b, c, reset, hidden)
        return hidden, y

    hidden, y = lax.scan(step, hidden, jax.tree.map(lambda array: array.swapaxes(0, 1), (x, dt, b, c, reset)))
    return y.swapaxes(0, 1), hidden


@jax.checkpoint
def _chunk(x, dt, a, b, c, reset, hidden):
    """y of a chunk and the hidden state after it, by `lax.associative_scan`."""
    decay, states = lax.associative_scan(compose, _discretise(x, dt, a[:, None], b, reset), axis=1)
    states += decay * hidden[:, None]
    return _read(states, c), states[:, -1]


def _associative(*arguments):
    y, hidden, _ = _associative_forward(*arguments)
    return y, hidden


def _chunk_size(time):
    """Chunks of one size, with as little padding as possible, that the kernel can work in."""
    if not isinstance(time, int):
        raise ValueError(f"time: expected a static length for a form that works in chunks, got {time}")
    size = -(-time // -(-time // CHUNK))
    return size + -size % tpu_kernel.ROUND


def _chunks(*arrays):
    """The chunks of the arrays, time filled up with zeros, which change no state."""
    size = _chunk_size(arrays[0].shape[1])
    return jax.tree.map(lambda array: contract.chunk_time(contract.pad_time(array, size, 0), size), arrays)


# --- With a reverse rule that keeps the state before every chunk --------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(implementation, x, dt, a, b, c, reset, hidden):
    return _scan_forward(implementation, x, dt, a, b, c, reset, hidden)[0]


def _scan_forward(implementation, x, dt, a, b, c, reset, hidden):
    forward, _ = _implementation(implementation, x, dt, b, hidden)
    y, hidden, before = forward(x, dt, a, b, c, reset, hidden)
    return (y, hidden), (x, dt, a, b, c, reset, before)


def _scan_backward(implementation, residuals, cotangents):
    x, dt, _, b, _, _, before = residuals
    _, backward = _implementation(implementation, x, dt, b, before)
    dx, ddt, da, db, dc, dhidden = backward(*residuals, *cotangents)
    return dx, ddt, da, db, dc, None, dhidden


_scan.defvjp(_scan_forward, _scan_backward)


def _implementation(implementation, x, dt, b, hidden):
    """The (forward, backward) pair to run; for `None` each chooses when it is lowered."""
    size = _chunk_size(x.shape[1])
    pairs = {
        "loop": (_loop_forward, _loop_backward),
        "associative": (_associative_forward, _associative_backward),
        "pallas": (
            dispatch.differentiate_as(_associative_forward, functools.partial(tpu_kernel.forward, size)),
            dispatch.differentiate_as(_associative_backward, functools.partial(tpu_kernel.backward, size)),
        ),
    }
    if implementation is not None:
        return pairs[implementation]
    guard = {"tpu": "associative"} if tpu_kernel.refusal(x, dt, b, hidden) or x.shape[2] < FILLED else {}
    return tuple(
        dispatch.by_platform("selective_scan", {name: pair[i] for name, pair in pairs.items()}, **guard) for i in (0, 1)
    )


def _associative_forward(x, dt, a, b, c, reset, hidden):
    def chunk(hidden, tokens):
        x, dt, b, c, reset = tokens
        y, after = _chunk(x, dt, a, b, c, reset, hidden)
        return after, (y, hidden)

    hidden, (y, before) = lax.scan(chunk, hidden, _chunks(x, dt, b, c, reset))
    return contract.unchunk_time(y, x.shape[1]), hidden, before


def _associative_backward(x, dt, a, b, c, reset, before, dy, dhidden):
    def chunk(carry, tokens):
        dhidden, da = carry
        x, dt, b, c, reset, dy, before = tokens
        _, pull = jax.vjp(lambda x, dt, a, b, c, hidden: _chunk(x, dt, a, b, c, reset, hidden), x, dt, a, b, c, before)
        dx, ddt, da_chunk, db, dc, dhidden = pull((dy, dhidden))
        return (dhidden, da + da_chunk), (dx, ddt, db, dc)

    chunks = (*_chunks(x, dt, b, c, reset, dy), before)
    (dhidden, da), rows = lax.scan(chunk, (dhidden, contract.fresh_like(a, 0)), chunks, reverse=True)
    dx, ddt, db, dc = (contract.unchunk_time(row, x.shape[1]) for row in rows)
    return dx, ddt, da, db, dc, dhidden


def _pad(*arrays):
    size = _chunk_size(arrays[0].shape[1])
    return size, *(contract.pad_time(array, size, 0) for array in arrays)


def _loop_forward(x, dt, a, b, c, reset, hidden):
    """One token at a time, in place, without a copy in the order of time."""
    time = x.shape[1]
    size, x, dt, b, c, reset = _pad(x, dt, b, c, reset)

    def chunk(carry, start):
        def body(i, loop):
            hidden, y = loop
            x_t, dt_t, b_t, c_t, reset_t = contract.time_index((x, dt, b, c, reset), start + i)
            y_t, hidden = _token(x_t, dt_t, a, b_t, c_t, reset_t, hidden)
            return hidden, contract.time_update(y, y_t, start + i)

        return lax.fori_loop(0, size, body, carry), carry[0]

    starts = jnp.arange(0, x.shape[1], size, dtype=jnp.int32)
    (hidden, y), before = lax.scan(chunk, (hidden, contract.fresh_like(x, 0, hidden.dtype)), starts)
    return y[:, :time], hidden, before


def _loop_backward(x, dt, a, b, c, reset, before, dy, dhidden):
    time = x.shape[1]
    size, x, dt, b, c, reset, dy = _pad(x, dt, b, c, reset, dy)

    def token_at(t, reset_t):
        x_t, dt_t, b_t, c_t = contract.time_index((x, dt, b, c), t)
        return lambda *arguments: _token(*arguments[:5], reset_t, arguments[5]), (x_t, dt_t, a, b_t, c_t)

    def chunk(carry, tokens):
        start, hidden = tokens

        def again(i, loop):
            hidden, states = loop
            states = contract.time_update(states, hidden, i)
            token, arguments = token_at(start + i, contract.time_index(reset, start + i))
            return token(*arguments, hidden)[1], states

        def body(i, loop):
            dhidden, da, rows = loop
            i = size - 1 - i
            token, arguments = token_at(start + i, contract.time_index(reset, start + i))
            _, pull = jax.vjp(token, *arguments, contract.time_index(states, i))
            dx, ddt, da_t, db, dc, dhidden = pull((contract.time_index(dy, start + i), dhidden))
            return dhidden, da + da_t, contract.time_update(rows, (dx, ddt, db, dc), start + i)

        states = jnp.repeat(contract.fresh_like(hidden, 0)[:, None], size, axis=1)
        _, states = lax.fori_loop(0, size, again, (hidden, states))
        return lax.fori_loop(0, size, body, carry), None

    starts = jnp.arange(0, x.shape[1], size, dtype=jnp.int32)
    fresh = contract.fresh_like(a, 0), tuple(contract.fresh_like(array, 0) for array in (x, dt, b, c))
    (dhidden, da, rows), _ = lax.scan(chunk, (dhidden, *fresh), (starts, before), reverse=True)
    dx, ddt, db, dc = (row[:, :time] for row in rows)
    return dx, ddt, da, db, dc, dhidden
