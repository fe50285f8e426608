"""Softmax attention over every prefix: the scan forward and its reverse rule, each in one pass over the values.

Equations and letters are those of `primitives.prefix_scan`; ``_chunked_forward`` and ``_chunked_backward`` there compute
the same. The grid is (batch, block of heads, chunk of time), the last in order: what one chunk leaves for the next,
(m, u, w) forward and (do, dl) backward, stays in VMEM. Values stay ``[batch, time, heads · dim]``, as the projection
before and after the kernel has them, so that neither needs a transposition; a head is a slice of lanes. Scalars per
token and head (s, m, u, gates) come heads first, ``[heads, time]``, so that a chunk of them is one row of lanes.

Inside a chunk row i of a matrix ``[chunk, chunk]`` is a query, column j a token. There is no cumulative maximum in a
kernel: m is the maximum of the masked row. A quantity per query is kept as wide as that matrix, equal along its row: it
takes the same registers as one column, and spares the permute unit a broadcast for each use.

Cost. A matrix of scores costs 1 exp, some 40 vector and 3 permute operations per query and token, so chunk / 1024
registers of each per token and head. 128 tokens fill the lanes of a register: a smaller chunk would leave lanes empty,
a larger one takes more operations. Bytes are the least possible, 2 · itemsize · dim per token and head forward, 4
backward. Of bfloat16, 8 heads of 64 and a chunk, the compiler schedules {TODO}
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.common import dot, head_block, per_device, varying_like, vmap_into_batch

CHUNK = 128
WIDTH = 1024  # heads · dim of a block, at most


def refusal(s, v):
    """Why the kernel cannot serve these inputs, or `None`."""
    if not all(isinstance(size, int) for size in v.shape):
        return f"it needs static shapes, got values of shape {v.shape}"
    if s.dtype != jnp.float32 or v.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16 values and computes in float32, got {v.dtype} to compute in {s.dtype}"
    if head_block(*v.shape[2:], WIDTH) is None:
        return f"it found no block of at most {WIDTH} lanes, whole or a multiple of 128, in {v.shape[2:]} (heads, dim)"
    return None


def forward(s, v, reset, carry):
    """Outputs, m and u of every token, and the last w."""
    call = per_device(_forward, v, "bth bthd bt bh bh bhd", "bthd bth bth bhd")
    return call(s, v, reset, *carry)


def backward(gate, decay, v, reset, o0, outputs, m, u, do, do_last, dl_last):
    """The cotangents of s and v, and those of the average and of the log-normaliser that came in."""
    call = per_device(_backward, v, "bth bth bthd bt bhd bthd bth bth bthd bhd bh", "bth bthd bhd bh")
    return call(gate, decay, v, reset, o0, outputs, m, u, do, do_last, dl_last)


# --- Arrays as the kernels see them --------------------------------------------------------------------------------


@vmap_into_batch
def _forward(s, v, reset, m0, u0, w0):
    grid = _Grid(*v.shape, head_block(*v.shape[2:], WIDTH), reverse=False)
    first, s_rows, lanes = grid.first(reset), grid.rows(s, constant_values=-jnp.inf), grid.lanes(v)
    m0, u0, w = grid.scalars(m0), grid.scalars(u0), grid.vectors(w0)
    operands, results = [first, s_rows, lanes, m0, u0, w], [lanes, s_rows, s_rows, w]
    outputs, m, u, w = grid.call(_forward_kernel, operands, results, scratch=2)
    return outputs.reshape(v.shape), grid.unrows(m), grid.unrows(u), w.reshape(w0.shape)


@vmap_into_batch
def _backward(gate, decay, v, reset, o0, outputs, m, u, do, do_last, dl_last):
    grid = _Grid(*v.shape, head_block(*v.shape[2:], WIDTH), reverse=True)
    # Beyond the end the average stays what it is.
    m, u = grid.rows(m, mode="edge"), grid.rows(u, mode="edge")
    gate, decay = grid.rows(gate, constant_values=0), grid.rows(decay, constant_values=1)
    lanes, o, do = grid.lanes(v), grid.lanes(outputs), grid.lanes(do)
    o_before = grid.vectors(o0, o[0][:, CHUNK - 1 : -1 : CHUNK])
    do_last, dl_last = grid.vectors(do_last), grid.scalars(dl_last)
    operands = [grid.first(reset), m, u, gate, decay, lanes, o_before, o, do, do_last, dl_last]
    results = [gate, lanes, do_last, dl_last]
    ds, dv, do, dl = grid.call(_backward_kernel, operands, results)
    return grid.unrows(ds), dv.reshape(v.shape), do.reshape(o0.shape), dl.reshape(o0.shape[:2])


class _Grid(NamedTuple):
    """Which block of an array each step of the grid reads or writes; the methods return (array, block) pairs."""

    batch: int
    time: int
    heads: int
    dim: int
    block: int  # of so many heads
    reverse: bool  # the last chunk first

    @property
    def chunks(self):
        return pl.cdiv(self.time, CHUNK)

    def chunk(self, step):
        return self.chunks - 1 - step if self.reverse else step

    def lanes(self, x):
        """``[batch, time, heads, dim]``: a chunk of values, heads side by side."""
        block = pl.BlockSpec((None, CHUNK, self.block * self.dim), lambda b, h, c: (b, self.chunk(c), h))
        return x.reshape(self.batch, self.time, -1), block

    def rows(self, x, **padding):
        """``[batch, time, heads]``: a chunk of scalars, heads first; filled up to whole chunks."""
        x = jnp.pad(x, [(0, 0), (0, -self.time % CHUNK), (0, 0)], **padding).swapaxes(1, 2)
        block = pl.BlockSpec((None, None, self.block, CHUNK), lambda b, h, c: (b, h, 0, self.chunk(c)))
        return x.reshape(self.batch, -1, self.block, x.shape[2]), block

    def unrows(self, x):
        return x.reshape(self.batch, self.heads, -1)[..., : self.time].swapaxes(1, 2)

    def first(self, reset):
        """The first token that each token sees, or −1 if it sees what was carried in."""
        first = jnp.full((self.batch, self.time), -1, jnp.int32)
        if reset is not None:
            first = lax.cummax(jnp.where(reset, jnp.arange(self.time, dtype=jnp.int32), first), axis=1)
        first = jnp.pad(first, [(0, 0), (0, -self.time % CHUNK)], mode="edge")
        return first[:, None], pl.BlockSpec((None, 1, CHUNK), lambda b, h, c: (b, 0, self.chunk(c)))

    def vectors(self, x, *later):
        """``[batch, heads, dim]``: a vector per head; or one for the first chunk and, of `later`, for every other."""
        x = jnp.concatenate([x.reshape(self.batch, 1, -1), *later], axis=1)
        shape = (None, None, 1, self.block * self.dim)
        return x[:, :, None], pl.BlockSpec(shape, lambda b, h, c: (b, self.chunk(c) if later else 0, 0, h))

    def scalars(self, x):
        """``[batch, heads]``: a scalar per head."""
        return x.reshape(self.batch, -1, self.block, 1), pl.BlockSpec(
            (None, None, self.block, 1), lambda b, h, c: (b, h, 0, 0)
        )

    def call(self, kernel, operands, results, scratch=0):
        (arrays, in_specs), (likes, out_specs) = zip(*operands, strict=True), zip(*results, strict=True)
        with jax.enable_x64(False):
            return pl.pallas_call(
                functools.partial(kernel, self.time, self.dim),
                out_shape=varying_like(arrays, likes),
                grid=(self.batch, self.heads // self.block, self.chunks),
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=[pltpu.VMEM((self.block, 1), jnp.float32)] * scratch,
                compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
                name="prefix_scan" + kernel.__name__.removesuffix("_kernel"),
            )(*arrays)


# --- The kernels: a chunk of a block of heads ----------------------------------------------------------------------


def _forward_kernel(
    time, dim, first_ref, s_ref, v_ref, m0_ref, u0_ref, w0_ref, o_ref, m_ref, u_ref, w_ref, m_start_ref, u_start_ref
):
    chunk = pl.program_id(2)

    @pl.when(chunk == 0)
    def _():
        m_start_ref[...], u_start_ref[...], w_ref[...] = m0_ref[...], u0_ref[...], w0_ref[...]

    query, token, first = _positions(first_ref, chunk)
    visible = (first <= token) & (token <= query)
    m_all = u_all = jnp.zeros((CHUNK, CHUNK), jnp.float32)  # a column per head
    for h in range(s_ref.shape[0]):
        head, lanes = slice(h, h + 1), slice(h * dim, (h + 1) * dim)
        v = _load(v_ref, lanes, chunk, time)
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


def _backward_kernel(
    time,
    dim,
    first_ref,
    m_ref,
    u_ref,
    gate_ref,
    decay_ref,
    v_ref,
    o_before_ref,
    o_ref,
    do_ref,
    do_last_ref,
    dl_last_ref,
    ds_ref,
    dv_ref,
    do_next_ref,
    dl_next_ref,
):
    chunk = pl.num_programs(2) - 1 - pl.program_id(2)

    @pl.when(pl.program_id(2) == 0)
    def _():
        do_next_ref[...], dl_next_ref[...] = do_last_ref[...], dl_last_ref[...]

    query, token, first = _positions(first_ref, chunk)
    visible = (first <= token) & (token <= query)
    m, u, gate, decay = m_ref[...], u_ref[...], gate_ref[...], decay_ref[...]
    last = _exp(jnp.where(visible[-1:], m, -jnp.inf), m[:, -1:]) * u * _reciprocal(u[:, -1:])
    m_queries, u_queries, gate_tokens, last_tokens = m.T, _reciprocal(u).T, gate.T, last.T
    c_all, dl = jnp.zeros((CHUNK, CHUNK), jnp.float32), []
    for h in range(m.shape[0]):
        head, lanes = slice(h, h + 1), slice(h * dim, (h + 1) * dim)
        v, o, do = (_load(ref, lanes, chunk, time) for ref in (v_ref, o_ref, do_ref))
        decays = _exp(jnp.where(visible, m[head], -jnp.inf), m_queries[:, head]) * u[head] * u_queries[:, head]
        do = dot(decays, do, transpose=True) + last_tokens[:, head] * do_next_ref[:, lanes]
        o_before = jnp.concatenate([o_before_ref[:, lanes], o[:-1].astype(jnp.float32)])
        c = _wide(jnp.sum(do * (v - o_before), axis=1, keepdims=True))
        later = jnp.where(token < query, decays * (gate_tokens[:, head] * c), 0)
        dl.append(last[head] * dl_next_ref[head] - jnp.sum(later, axis=0, keepdims=True))
        dv_ref[:, lanes] = (gate_tokens[:, head] * do).astype(dv_ref.dtype)
        do_next_ref[:, lanes] = decay[head, :1] * do[:1]
        c_all = jnp.where(token == h, c, c_all)
    c, dl = c_all.T[: m.shape[0]], jnp.concatenate(dl)
    ds_ref[...] = gate * (dl + decay * c)
    dl_next_ref[...] = (decay * (dl - gate * c))[:, :1]


def _positions(first_ref, chunk):
    """Query, token and the first token that each query sees, counted from the start of the chunk."""
    query, token = (lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (0, 1))
    return query, token, jnp.broadcast_to(first_ref[...] - chunk * CHUNK, (CHUNK, CHUNK)).T


def _load(ref, lanes, chunk, time):
    """What a block holds beyond the end of its array is undefined: zeros."""
    x = ref[:, lanes]
    if time % CHUNK == 0:
        return x
    return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 0) < time - chunk * CHUNK, x, 0)


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
