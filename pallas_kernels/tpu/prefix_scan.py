"""Softmax attention over every prefix: the scan forward and its reverse rule, each in one pass over the values.

Equations and letters are those of `primitives.prefix_scan`, whose ``_chunked_forward`` and ``_chunked_backward``
compute the same. What a chunk of time leaves for the next, (m, u, w) forward and (do, dl) backward, stays in VMEM.

In a chunk, row i of a matrix ``[chunk, chunk]`` is a query, column j a token. Kernels have no cumulative maximum: m is
that of the masked row. What belongs to a query is kept as wide as the matrix, equal along its row: it takes no more
registers than a column, and the unit that permutes lanes need not broadcast it for each use.

Columns that are needed so wide come from the matrix unit (`wide_columns`), which has little else to do.

Roofline: per token and head, chunk / 1024 registers of exps and of everything else that is done to scores. 128 tokens
fill the lanes of a register: fewer would leave lanes empty, more cost more. For 128 tokens, 8 heads of 128, bfloat16,
in µs at the published rates, forward and backward:

    chip   bytes        matmuls      exps
    v5e    0.64, 1.28   0.34, 0.34   0.26, 0.09
    v6e    0.32, 0.64   0.07, 0.07   0.22, 0.07

The values are read and written once, but vector instructions bind, not memory: ../README.md has the bundles.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.tpu.common import (
    CHUNK,
    ChunkGrid,
    dot,
    general_refusal,
    head_block,
    load,
    per_device,
    vmap_into_batch,
    wide_columns,
)

WIDTH = 1024  # heads · dim of a block, at most
NEVER = -1e30  # a maximum where nothing has weight, as a finite number


def refusal(s, v):
    """Why the kernel cannot serve these inputs, or `None`."""
    if reason := general_refusal(v):
        return reason
    heads, dim = v.shape[2:]
    if s.dtype != jnp.float32 or v.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16 values and computes in float32, got {v.dtype} to compute in {s.dtype}"
    if head_block(heads, WIDTH, dim) is None:
        return f"it needs heads side by side to fill 128 lanes or a multiple, at most {WIDTH}, got {heads=}, {dim=}"
    return None


def forward(s, v, reset, carry):
    """Outputs, m and u of every token, and the last w."""
    call = per_device(_forward, v, "bth", "bth bthd bt bh bh bhd", "bthd bth bth bhd")
    return call(s, v, reset, *carry)


def backward(gate, decay, v, reset, o0, outputs, m, u, do, do_last, dl_last):
    """The cotangents of s and v, and those of the average and of the log-normaliser that came in."""
    call = per_device(_backward, v, "bth", "bth bth bthd bt bhd bthd bth bth bthd bhd bh", "bth bthd bhd bh")
    return call(gate, decay, v, reset, o0, outputs, m, u, do, do_last, dl_last)


# --- Arrays as the kernels see them --------------------------------------------------------------------------------


@vmap_into_batch
def _forward(s, v, reset, m0, u0, w0):
    grid = ChunkGrid.over(WIDTH, v)
    kernel = functools.partial(_forward_kernel, *v.shape[1::2])
    first, s_rows, lanes = grid.first(reset), grid.rows(s, constant_values=-jnp.inf), grid.lanes(v)
    m0, u0, w = grid.scalars(m0), grid.scalars(u0), grid.vectors(w0)
    operands, results = [first, s_rows, lanes, m0, u0, w], [lanes, s_rows, s_rows, w]
    outputs, m, u, w = grid.call("prefix_scan_forward", kernel, operands, results, scratch=[(grid.block, 1)] * 2)
    return outputs.reshape(v.shape), grid.unrows(m), grid.unrows(u), w.reshape(w0.shape)


@vmap_into_batch
def _backward(gate, decay, v, reset, o0, outputs, m, u, do, do_last, dl_last):
    grid = ChunkGrid.over(WIDTH, v, reverse=True)
    kernel = functools.partial(_backward_kernel, *v.shape[1::2])
    # Beyond the end the average stays what it is.
    m, u = grid.rows(m, mode="edge"), grid.rows(u, mode="edge")
    gate, decay = grid.rows(gate, constant_values=0), grid.rows(decay, constant_values=1)
    lanes, o, do = grid.lanes(v), grid.lanes(outputs), grid.lanes(do)
    o_before = grid.vectors(o0, o[0][:, CHUNK - 1 : -1 : CHUNK])
    do_last, dl_last = grid.vectors(do_last), grid.scalars(dl_last)
    operands = [grid.first(reset), m, u, gate, decay, lanes, o_before, o, do, do_last, dl_last]
    results = [gate, lanes, do_last, dl_last]
    ds, dv, do, dl = grid.call("prefix_scan_backward", kernel, operands, results)
    return grid.unrows(ds), dv.reshape(v.shape), do.reshape(o0.shape), dl.reshape(o0.shape[:2])


# --- The kernels: a chunk of a block of heads ----------------------------------------------------------------------


def _forward_kernel(time, dim, *refs):
    first_ref, s_ref, v_ref, m0_ref, u0_ref, w0_ref, *refs = refs
    o_ref, m_ref, u_ref, w_ref, m_start_ref, u_start_ref = refs
    chunk = pl.program_id(2)

    @pl.when(chunk == 0)
    def _():
        m_start_ref[...], u_start_ref[...], w_ref[...] = m0_ref[...], u0_ref[...], w0_ref[...]

    query, token, first = _positions(first_ref, chunk)
    visible = (first <= token) & (token <= query)
    m_all = u_all = jnp.zeros((CHUNK, CHUNK), jnp.float32)  # a column per head
    for h in range(s_ref.shape[0]):
        head, lanes = slice(h, h + 1), slice(h * dim, (h + 1) * dim)
        v = load(v_ref, lanes, chunk, time)
        scores = jnp.where(visible, s_ref[head], -jnp.inf)
        start = jnp.where(first < 0, m_start_ref[head], -jnp.inf)
        m = jnp.maximum(_wide(jnp.max(scores, axis=1, keepdims=True)), start)
        weights, decay = _exp(scores, m), _exp(start, m)
        u = _wide(jnp.sum(weights, axis=1, keepdims=True)) + decay * u_start_ref[head]
        w = dot(weights, v) + _columns(decay, dim) * w_ref[:, lanes]
        o_ref[:, lanes] = (w * _columns(_reciprocal(u), dim)).astype(o_ref.dtype)
        w_ref[:, lanes] = w[-1:]
        m_all, u_all = jnp.where(token == h, m, m_all), jnp.where(token == h, u, u_all)
    m_ref[...], u_ref[...] = m_all.T[: s_ref.shape[0]], u_all.T[: s_ref.shape[0]]
    m_start_ref[...], u_start_ref[...] = m_ref[:, -1:], u_ref[:, -1:]


def _backward_kernel(time, dim, *refs):
    first_ref, m_ref, u_ref, gate_ref, decay_ref, v_ref, *refs = refs
    o_before_ref, o_ref, do_ref, do_last_ref, dl_last_ref, *refs = refs
    ds_ref, dv_ref, do_next_ref, dl_next_ref = refs
    chunk = pl.num_programs(2) - 1 - pl.program_id(2)

    @pl.when(pl.program_id(2) == 0)
    def _():
        do_next_ref[...], dl_next_ref[...] = do_last_ref[...], dl_last_ref[...]

    query, token, first = _positions(first_ref, chunk)
    visible = (first <= token) & (token <= query)
    m, u, gate, decay = m_ref[...], u_ref[...], gate_ref[...], decay_ref[...]
    last = _exp(jnp.where(visible[-1:], m, -jnp.inf), m[:, -1:]) * u * _reciprocal(u[:, -1:])
    m_queries, u_queries = wide_columns(jnp.maximum(m, NEVER)), wide_columns(_reciprocal(u))
    gate_tokens, last_tokens = wide_columns(gate), wide_columns(last)
    c_all, dl = jnp.zeros((CHUNK, CHUNK), jnp.float32), []
    for h in range(m.shape[0]):
        head, lanes = slice(h, h + 1), slice(h * dim, (h + 1) * dim)
        v, o, do = (load(ref, lanes, chunk, time) for ref in (v_ref, o_ref, do_ref))
        decays = _exp(jnp.where(visible, m[head], -jnp.inf), m_queries[h]) * u[head] * u_queries[h]
        do = dot(decays, do, axes=(0, 0)) + _columns(last_tokens[h], dim) * do_next_ref[:, lanes]
        o_before = jnp.concatenate([o_before_ref[:, lanes], o[:-1].astype(jnp.float32)])
        c = jnp.sum(do * (v - o_before), axis=1, keepdims=True)
        later = jnp.where(token < query, decays * (gate_tokens[h] * c), 0)
        dl.append(last[head] * dl_next_ref[head] - jnp.sum(later, axis=0, keepdims=True))
        dv_ref[:, lanes] = (_columns(gate_tokens[h], dim) * do).astype(dv_ref.dtype)
        do_next_ref[:, lanes] = decay[head, :1] * do[:1]
        c_all = jnp.where(token == h, c, c_all)
    c, dl = c_all.T[: m.shape[0]], jnp.concatenate(dl)
    ds_ref[...] = gate * (dl + decay * c)
    dl_next_ref[...] = (decay * (dl - gate * c))[:, :1]


def _positions(first_ref, chunk):
    """Query, token and the first token that a query sees, counted from the start of the chunk."""
    query, token = (lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (0, 1))
    return query, token, jnp.broadcast_to(first_ref[...] - chunk * CHUNK, (CHUNK, CHUNK)).T


def _wide(column):
    return jnp.broadcast_to(column, (CHUNK, CHUNK))


def _columns(wide, width):
    return wide[:, :width] if width <= CHUNK else jnp.broadcast_to(wide[:, :1], (CHUNK, width))


def _exp(x, reference):
    """exp(x − reference) for x ≤ reference, where −inf − (−inf) counts as −inf: no weight."""
    return jnp.exp(x - jnp.maximum(reference, jnp.finfo(jnp.float32).min))


def _reciprocal(u):
    """1 / u, and finite where u is zero: there the numerator is, too."""
    return 1 / jnp.maximum(u, jnp.finfo(jnp.float32).tiny)
