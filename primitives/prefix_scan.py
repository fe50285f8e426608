"""Softmax attention over every prefix, as a recurrence and as a scan: the core of "Attention as an RNN".

Leo Feng, Frederick Tung, Hossein Hajimirsadeghi, Mohamed Osama Ahmed, Yoshua Bengio, Greg Mori:
Attention as an RNN, 2024, arXiv:2405.13956. Letters: s logits, v values, m running maximum, u denominator,
w numerator, o outputs; ``dx`` is the cotangent of x.

The maximum is a *reference point*, not a quantity: shifting it rescales u and w and changes nothing that the state
stands for. So no gradient flows into it, in any implementation; that of the state that comes in flows out of it
through the sums that it scales.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.tpu import prefix_scan as tpu_kernel
from primitives import contract, dispatch

IMPLEMENTATIONS = ("sequential", "associative", "loop", "chunked", "pallas")
CHUNK, ASSOCIATIVE_CHUNK = 64, 16  # of the forms that work in chunks; they change rounding only


class PrefixState(NamedTuple):
    """Softmax statistics of a prefix: ``numerator / denominator`` is attention over it. Float32 or wider."""

    max: Float[Array, "batch heads"]  # the largest logit so far; −inf for the empty prefix
    denominator: Float[Array, "batch heads"]  # Σ exp(s − max)
    numerator: Float[Array, "batch heads dim"]  # Σ exp(s − max) v
    segment: Int[Array, " batch"]  # the last non-negative segment id


jax.export.register_namedtuple_serialization(PrefixState, serialized_name="primitives.PrefixState")


def prefix_scan_attention(
    logits: Float[Array, "batch time heads"],
    values: Float[Array, "batch time heads dim"],
    *,
    state: PrefixState | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch time heads dim"], PrefixState]:
    """Attention of a fixed query over every prefix: ``o_t = Σ_{i≤t} exp(s_i) v_i / Σ_{i≤t} exp(s_i)``.

    As a recurrence (Attention as an RNN, §3.1), safe for logits of any size since no exponent is positive:

        m_t = max(m_{t−1}, s_t)
        u_t = exp(m_{t−1} − m_t) u_{t−1} + exp(s_t − m_t)
        w_t = exp(m_{t−1} − m_t) w_{t−1} + exp(s_t − m_t) v_t
        o_t = w_t / u_t

    and as a scan of (m, u, w) with an associative operator (§3.2). The paper starts from m = 0; that underflows to NaN
    when the first logits are far below, so the empty prefix is (−inf, 0, 0) here, the operator's identity.

    Args:
        logits: Scores of the tokens. −inf gives a token no weight.
        values: What is averaged.
        state: Statistics of what came before, or `None` for the empty prefix.
        segment_ids: Documents packed in a row; attention does not cross a change of id. Negative ids are padding, with
            zero outputs and zero gradients. `None`: the carried document goes on, no padding.
        implementation: ``"sequential"`` (the definition, a scan over time), ``"associative"`` (`lax.associative_scan`
            in chunks), ``"loop"`` (the recurrence in place), ``"chunked"`` (masked matmuls in chunks), ``"pallas"``
            (the TPU kernel), or `None`: what is fastest on the platform that the call is lowered for, see
            `primitives.dispatch`. The first two also support forward mode; the others have a reverse rule of their own
            that keeps inputs, outputs, m and u, and nothing else. One time step is one step of the recurrence under
            every name.

    Returns:
        Outputs in the dtype of `values` (zero where no token has weight yet), and the state after the last token.

    Raises:
        ValueError: Shapes that do not fit together, a length of zero, an unknown implementation, or ``"pallas"`` for
            inputs that the kernel cannot serve; the message says why.
        TypeError: Dtypes that are not floating point (logits, values) or not integer (segment ids), a foreign state.
    """
    fields = {"max": "batch heads", "denominator": "batch heads", "numerator": "batch heads dim", "segment": "batch"}
    contract.check_shapes(
        logits=(logits, "batch time heads"),
        values=(values, "batch time heads dim"),
        segment_ids=(segment_ids, "batch time"),
        **contract.check_state(state, PrefixState, **fields),
    )
    contract.check_floating(logits=logits, values=values)
    contract.check_segment_ids(segment_ids)
    contract.check_implementation(implementation, IMPLEMENTATIONS)

    dtype = contract.accumulation_dtype(logits, values, *(() if state is None else state[:3]))
    state = _fresh_state(logits, values, segment_ids, dtype) if state is None else state
    valid, reset, last = contract.segments(segment_ids, state.segment)
    s = logits.astype(dtype) if valid is None else jnp.where(valid[..., None], logits.astype(dtype), -jnp.inf)
    values = contract.mask_padding(values, valid)  # no weight times NaN is NaN
    carry = tuple(x.astype(dtype) for x in state[:3])

    if logits.shape[1] == 1:
        scan = _step
    elif implementation == "sequential":
        scan = _sequential
    elif implementation == "associative":
        scan = _associative
    else:
        if implementation == "pallas" and (reason := tpu_kernel.refusal(s, values)):
            raise ValueError(f"implementation: 'pallas' cannot serve these inputs: {reason}")
        scan = functools.partial(_scan, implementation)
    outputs, carry = scan(s, values, valid, reset, carry)
    return outputs.astype(values.dtype), PrefixState(*carry, last)


def _fresh_state(logits, values, segment_ids, dtype):
    s, v = logits[:, 0], values[:, 0]
    return PrefixState(
        contract.fresh_like(s, -jnp.inf, dtype),
        contract.fresh_like(s, 0, dtype),
        contract.fresh_like(v, 0, dtype),
        contract.fresh_counter(segment_ids, logits.shape[0]),
    )


# --- The recurrence and the operator -----------------------------------------------------------------------------


def _exp(x, reference):
    """exp(x − reference) for x ≤ reference, where −inf − (−inf) counts as −inf: no weight."""
    return jnp.exp(x - jnp.where(reference == -jnp.inf, 0, reference))


def combine(earlier, later, reset=None):
    """The associative operator: (m, u, w) of two neighbouring stretches to that of both; a reset drops the earlier."""
    (m_a, u_a, w_a), (m_b, u_b, w_b) = earlier, later
    if reset is not None:
        m_a = jnp.where(reset[..., None], -jnp.inf, m_a)
    m = lax.stop_gradient(jnp.maximum(m_a, m_b))
    decay_a, decay_b = _exp(m_a, m), _exp(m_b, m)
    return m, decay_a * u_a + decay_b * u_b, decay_a[..., None] * w_a + decay_b[..., None] * w_b


def _leaf(s, v):
    """(m, u, w) of single tokens."""
    return s, (s > -jnp.inf).astype(s.dtype), v.astype(s.dtype)


def _attend(u, w):
    """o = w / u, zero where nothing has weight."""
    return w * _reciprocal(u)[..., None]


def _reciprocal(u):
    return jnp.where(u > 0, 1 / jnp.where(u > 0, u, 1), 0)


def _pad(s, v, reset, chunk):
    """Whole chunks: tokens without weight at the end, which change no state."""
    return contract.pad_time(s, chunk, -jnp.inf), contract.pad_time(v, chunk, 0), contract.pad_time(reset, chunk, False)


def _step(s, v, valid, reset, carry):
    m, u, w = combine(carry, _leaf(s[:, 0], v[:, 0]), None if reset is None else reset[:, 0])
    return contract.mask_padding(_attend(u, w)[:, None], valid), (m, u, w)


def _sequential(s, v, valid, reset, carry):
    def step(carry, token):
        s, v, reset = token
        carry = combine(carry, _leaf(s, v), reset)
        return carry, carry[1:]

    carry, (u, w) = lax.scan(step, carry, jax.tree.map(lambda x: x.swapaxes(0, 1), (s, v, reset)))
    return contract.mask_padding(_attend(u, w).swapaxes(0, 1), valid), carry


def _associative(s, v, valid, reset, carry):
    """`lax.associative_scan` in chunks: over all of a long sequence it would keep log₂(time) copies of it."""

    @jax.checkpoint
    def chunk(carry, tokens):
        s, v, reset = tokens
        reset = jnp.zeros_like(s[..., 0], bool) if reset is None else reset
        stretches, crossed = lax.associative_scan(
            lambda a, b: (combine(a[0], b[0], b[1]), a[1] | b[1]), (_leaf(s, v), reset), axis=1
        )
        m, u, w = combine(jax.tree.map(lambda x: x[:, None], carry), stretches, crossed)
        return (m[:, -1], u[:, -1], w[:, -1]), _attend(u, w)

    chunks = tuple(contract.chunk_time(x, ASSOCIATIVE_CHUNK) for x in _pad(s, v, reset, ASSOCIATIVE_CHUNK))
    carry, outputs = lax.scan(chunk, carry, chunks)
    return contract.mask_padding(contract.unchunk_time(outputs, s.shape[1]), valid), carry


# --- With a reverse rule that keeps inputs, outputs and normalisers -----------------------------------------------
#
# Backwards, attention over prefixes is a gated average: o_t = λ_t o_{t−1} + g_t v_t with g_t = exp(s_t − m_t) / u_t and
# λ_t = 1 − g_t = exp(m_{t−1} − m_t) u_{t−1} / u_t. Its cotangents, that of the average (do) and that of the logarithm
# of the normaliser (dl, a scalar), obey
#
#     c_t = do_t · (v_t − o_{t−1});  ds_t = g_t (dl_t + λ_t c_t);  dv_t = g_t do_t
#     do_{t−1} += λ_t do_t;          dl_{t−1} = λ_t (dl_t − g_t c_t)
#
# Differences of values are taken before anything is summed up, so nothing cancels when one token has all the weight.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(implementation, s, v, valid, reset, carry):
    return _scan_forward(implementation, s, v, valid, reset, carry)[0]


def _scan_forward(implementation, s, v, valid, reset, carry):
    forward, _ = _implementation(implementation, s, v)
    outputs, m, u, w = forward(s, v, reset, carry)
    final = m[:, -1], u[:, -1], w
    return (contract.mask_padding(outputs, valid), final), (s, v, valid, reset, carry, outputs, m, u, w)


def _scan_backward(implementation, residuals, cotangents):
    s, v, valid, reset, (m0, u0, w0), outputs, m, u, w = residuals
    do, (_, du, dw) = cotangents
    o0 = _attend(u0, w0)
    u_last = u[:, -1]
    gate, decay = _gates(s, reset, m0, u0, m, u)
    _, backward = _implementation(implementation, s, v)
    ds, dv, do, dl = backward(
        gate,
        decay,
        v,
        reset,
        o0,
        outputs,
        m,
        u,
        contract.mask_padding(do, valid),
        u_last[..., None] * dw,
        u_last * du + jnp.sum(w * dw, axis=-1),
    )
    return ds, dv, None, None, (dl, _reciprocal(u0) * (dl - jnp.sum(do * o0, axis=-1)), _attend(u0, do))


_scan.defvjp(_scan_forward, _scan_backward)


def _implementation(implementation, s, v):
    """The (forward, backward) pair to run; for `None` each chooses when it is lowered."""
    pairs = {
        "loop": (_loop_forward, _loop_backward),
        "chunked": (_chunked_forward, _chunked_backward),
        "pallas": (
            dispatch.differentiate_as(_chunked_forward, tpu_kernel.forward),
            dispatch.differentiate_as(_chunked_backward, tpu_kernel.backward),
        ),
    }
    if implementation is not None:
        return pairs[implementation]
    guard = {"tpu": "chunked"} if tpu_kernel.refusal(s, v) else {}
    if not isinstance(v.shape[1], int):
        guard = dict.fromkeys(("tpu", "cuda", "default"), "loop")
    return tuple(
        dispatch.by_platform("prefix_scan_attention", {name: pair[i] for name, pair in pairs.items()}, **guard)
        for i in (0, 1)
    )


def _gates(s, reset, m0, u0, m, u):
    """g and λ of every token."""
    m_before, u_before = (jnp.concatenate([x0[:, None], x[:, :-1]], axis=1) for x0, x in ((m0, m), (u0, u)))
    decay = _exp(m_before, m) * u_before * _reciprocal(u)
    return _exp(s, m) * _reciprocal(u), decay if reset is None else jnp.where(reset[..., None], 0, decay)


def _loop_forward(s, v, reset, carry):
    """One token at a time, in place: no transposition to time-major, which costs as much as the rest on a CPU."""

    def body(t, loop):
        carry, rows = loop
        m, u, w = combine(carry, _leaf(*contract.time_index((s, v), t)), contract.time_index(reset, t))
        return (m, u, w), contract.time_update(rows, (_attend(u, w), m, u), t)

    rows = contract.fresh_like(v, 0), contract.fresh_like(s, 0), contract.fresh_like(s, 0)
    (_, _, w), (outputs, m, u) = lax.fori_loop(0, s.shape[1], body, (carry, rows))
    return outputs, m, u, w


def _loop_backward(gate, decay, v, reset, o0, outputs, m, u, do, do_last, dl_last):
    def body(i, loop):
        (do_t, dl_t), rows = loop
        t = v.shape[1] - 1 - i
        v_t, g_t, decay_t = contract.time_index((v, gate, decay), t)
        do_t += contract.time_index(do, t)
        c_t = jnp.sum(do_t * (v_t - _row_before(outputs, o0, t)), axis=-1)
        rows = contract.time_update(rows, (g_t * (dl_t + decay_t * c_t), g_t[..., None] * do_t), t)
        return (decay_t[..., None] * do_t, decay_t * (dl_t - g_t * c_t)), rows

    rows = contract.fresh_like(gate, 0), contract.fresh_like(v, 0)
    (do, dl), (ds, dv) = lax.fori_loop(0, v.shape[1], body, ((do_last, dl_last), rows))
    return ds, dv, do, dl


def _row_before(outputs, o0, t):
    return jnp.where(t == 0, o0, contract.time_index(outputs, jnp.maximum(t - 1, 0)))


def _chunked_forward(s, v, reset, carry):
    """Matmuls in chunks, one chunk after another: a chunk's weights are masked before they are multiplied."""
    time, (s, v, reset) = s.shape[1], _pad(s, v, reset, CHUNK)

    def body(i, loop):
        (m0, u0, w0), rows = loop
        s_c, v_c, reset_c = contract.time_index((s, v, reset), i * CHUNK, CHUNK)
        visible, first = _chunk_masks(s_c, reset_c)
        scores = jnp.where(visible, s_c.swapaxes(1, 2)[:, :, None, :], -jnp.inf)
        m0 = jnp.where(first, m0[..., None], -jnp.inf)
        m = jnp.maximum(jnp.max(scores, axis=-1), m0)
        weights, decay = _exp(scores, m[..., None]), _exp(m0, m)
        u = jnp.sum(weights, axis=-1) + decay * u0[..., None]
        w = _matmul("bhij,bjhd->bhid", weights, v_c) + decay[..., None] * w0[:, :, None]
        outputs = _attend(u, w).swapaxes(1, 2), m.swapaxes(1, 2), u.swapaxes(1, 2)
        return (m[..., -1], u[..., -1], w[:, :, -1]), contract.time_update(rows, outputs, i * CHUNK)

    rows = contract.fresh_like(v, 0), contract.fresh_like(s, 0), contract.fresh_like(s, 0)
    (_, _, w), rows = lax.fori_loop(0, s.shape[1] // CHUNK, body, (carry, rows))
    return *(x[:, :time] for x in rows), w


def _chunked_backward(gate, decay, v, reset, o0, outputs, m, u, do, do_last, dl_last):
    time, v, reset = v.shape[1], contract.pad_time(v, CHUNK, 0), contract.pad_time(reset, CHUNK, False)
    # Beyond the end the average stays what it is: no gate, no decay, maximum and denominator of the last token.
    end = jnp.arange(gate.shape[1] + -time % CHUNK)[:, None] >= time
    m, u = (jnp.where(end, x[:, -1:], contract.pad_time(x, CHUNK, 0)) for x in (m, u))
    gate, decay, do = (contract.pad_time(x, CHUNK, fill) for x, fill in ((gate, 0), (decay, 1), (do, 0)))

    def body(i, loop):
        (do_next, dl_next), rows = loop
        i = v.shape[1] // CHUNK - 1 - i
        v_c, o_c, do_c = contract.time_index((v, outputs, do), i * CHUNK, CHUNK)
        o_c = jnp.concatenate([_row_before(outputs, o0, i * CHUNK)[:, None], o_c[:, :-1]], axis=1)
        g_c, decay_c, m_c, u_c = (x.swapaxes(1, 2) for x in contract.time_index((gate, decay, m, u), i * CHUNK, CHUNK))
        visible, _ = _chunk_masks(g_c.swapaxes(1, 2), contract.time_index(reset, i * CHUNK, CHUNK))
        m_seen = jnp.where(visible, m_c[..., None, :], -jnp.inf)
        decays = _exp(m_seen, m_c[..., None]) * u_c[..., None, :] * _reciprocal(u_c)[..., None]  # [i, j]: Π_{j<k≤i} λ_k
        do_c = _matmul("bhij,bihd->bhjd", decays, do_c) + decays[:, :, -1, :, None] * do_next[:, :, None]
        c = jnp.sum(do_c * (v_c - o_c).swapaxes(1, 2), axis=-1)
        dl = decays[:, :, -1] * dl_next[..., None] - _matmul("bhij,bhi->bhj", jnp.tril(decays, -1), g_c * c)
        ds, dv = g_c * (dl + decay_c * c), g_c[..., None] * do_c
        first = decay_c[..., 0]
        return (
            (first[..., None] * do_c[:, :, 0], first * (dl - g_c * c)[..., 0]),
            contract.time_update(rows, (ds.swapaxes(1, 2), dv.swapaxes(1, 2)), i * CHUNK),
        )

    outputs = contract.pad_time(outputs, CHUNK, 0)
    rows = contract.fresh_like(gate, 0), contract.fresh_like(v, 0)
    (do, dl), rows = lax.fori_loop(0, v.shape[1] // CHUNK, body, ((do_last, dl_last), rows))
    return *(x[:, :time] for x in rows), do, dl


def _chunk_masks(s, reset):
    """Which tokens of a chunk each of its tokens sees, and which of them see what was carried in; heads first."""
    crossed = jnp.zeros_like(jnp.max(s, axis=-1), jnp.int32) if reset is None else jnp.cumsum(reset, axis=1)
    return jnp.tril(crossed[:, :, None] == crossed[:, None, :])[:, None], crossed[:, None] == 0


_matmul = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
