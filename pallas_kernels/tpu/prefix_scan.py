"""Softmax attention over every prefix on TPU: forward and backward in one pass over the values each.

Letters and equations are those of `primitives.prefix_scan`. TODO
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.common import dot, head_block, per_device, varying_like

CHUNK = 128
WIDTH = 1024  # heads · dim of a block, at most


def refusal(s, v):
    """Why the kernel cannot serve these inputs, or `None`."""
    if not all(isinstance(size, int) for size in v.shape):
        return f"it needs static shapes, got values of {v.shape}"
    if s.dtype != jnp.float32 or v.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes values in float32 or bfloat16 and accumulates in float32, got {v.dtype} and {s.dtype}"
    if head_block(*v.shape[2:], WIDTH) is None:
        return f"heads of dim {v.shape[3]} do not group into blocks of at most {WIDTH} lanes, got {v.shape[2]} heads"
    return None


def forward(s, v, reset, carry):
    """Outputs, m and u of every token, and the last w."""
    call = per_device(_forward, v, "bth bthd bt bh bh bhd", "bthd bth bth bhd")
    return call(s, v, reset, *carry)


def backward(gate, decay, v, reset, o0, outputs, m, u, do, do_last, dl_last):
    """The cotangents of s and v, and of the average and the log-normaliser that came in."""
    call = per_device(_backward, v, "bth bth bthd bt bhd bthd bth bth bthd bhd bh", "bth bthd bhd bh")
    return call(gate, decay, v, reset, o0, outputs, m, u, do, do_last, dl_last)


def _forward(s, v, reset, m0, u0, w0):
    grid = _Grid.over(v)
    first, s, v, w = grid.first(reset), grid.rows(s, constant_values=-jnp.inf), grid.lanes(v), grid.state_lanes(w0)
    m, u = grid.state(m0), grid.state(u0)
    outputs, m, u, w = grid.call(_forward_kernel, [first, s, v, m, u, w], like=[v, s, s, w], scratch=2)
    return grid.unlanes(outputs), grid.unrows(m), grid.unrows(u), grid.unlanes(w)[:, 0]


def _backward(gate, decay, v, reset, o0, outputs, m, u, do, do_last, dl_last):
    grid = _Grid.over(v, reverse=True)
    o_before = jnp.concatenate([o0[:, None], outputs[:, grid.chunk - 1 : -1 : grid.chunk]], axis=1)
    gate, v = grid.rows(gate), grid.lanes(v)
    do_last, dl_last = grid.state_lanes(do_last), grid.state(dl_last)
    operands = [
        grid.first(reset),
        grid.rows(m, mode="edge"),
        grid.rows(u, mode="edge"),
        gate,
        grid.rows(decay, constant_values=1),
        v,
        grid.before(o_before),
        grid.lanes(outputs),
        grid.lanes(do),
        do_last,
        dl_last,
    ]
    ds, dv, do, dl = grid.call(_backward_kernel, operands, like=[gate, v, do_last, dl_last], scratch=0)
    return grid.unrows(ds), grid.unlanes(dv), grid.unlanes(do)[:, 0], grid.unstate(dl)


# --- The kernels: one chunk of one block of heads ------------------------------------------------------------------


def _forward_kernel(time, dim, first_ref, s_ref, v_ref, m0_ref, u0_ref, w0_ref, o_ref, m_ref, u_ref, w_ref, *start):
    chunk = pl.program_id(2)
    m_start, u_start = start

    @pl.when(chunk == 0)
    def _():
        m_start[...], u_start[...], w_ref[...] = m0_ref[...], u0_ref[...], w0_ref[...]

    visible, continues, live = _masks(first_ref, chunk, time)
    head_of_lane = lax.broadcasted_iota(jnp.int32, visible.shape, 1)
    ms = us = jnp.zeros(visible.shape, jnp.float32)
    for h in range(s_ref.shape[0]):
        head, lanes = slice(h, h + 1), slice(h * dim, (h + 1) * dim)
        v = live(v_ref[:, lanes])
        scores = jnp.where(visible, s_ref[head], -jnp.inf)
        start = jnp.where(continues, m_start[head], -jnp.inf)
        m = jnp.maximum(_wide(jnp.max, scores), start)
        weights, decay = _exp(scores, m), _exp(start, m)
        u = _wide(jnp.sum, weights) + decay * u_start[head]
        w = dot(weights, v) + _columns(decay, dim) * w_ref[:, lanes]
        o_ref[:, lanes] = (w * _columns(_reciprocal(u), dim)).astype(o_ref.dtype)
        w_ref[:, lanes] = w[-1:]
        ms, us = jnp.where(head_of_lane == h, m, ms), jnp.where(head_of_lane == h, u, us)
    m, u = ms.T[: s_ref.shape[0]], us.T[: s_ref.shape[0]]
    m_ref[...], u_ref[...] = m, u
    m_start[...], u_start[...] = m[:, -1:], u[:, -1:]


def _backward_kernel(time, dim, first_ref, m_ref, u_ref, gate_ref, decay_ref, v_ref, o_before_ref, o_ref, do_ref, do_last_ref, dl_last_ref, ds_ref, dv_ref, do_next_ref, dl_next_ref):
    chunk = pl.num_programs(2) - 1 - pl.program_id(2)

    @pl.when(pl.program_id(2) == 0)
    def _():
        do_next_ref[...], dl_next_ref[...] = do_last_ref[...], dl_last_ref[...]

    visible, _, live = _masks(first_ref, chunk, time)
    later = lax.broadcasted_iota(jnp.int32, visible.shape, 1) < lax.broadcasted_iota(jnp.int32, visible.shape, 0)
    m, u, gate, decay = m_ref[...], u_ref[...], gate_ref[...], decay_ref[...]
    last = _exp(jnp.where(visible[-1:], m, -jnp.inf), m[:, -1:]) * u * _reciprocal(u[:, -1:])
    m_queries, u_queries, gate_tokens, last_tokens = m.T, _reciprocal(u).T, gate.T, last.T
    head_of_lane = lax.broadcasted_iota(jnp.int32, visible.shape, 1)
    cs, dls = jnp.zeros(visible.shape, jnp.float32), []
    for h in range(m.shape[0]):
        head, lanes = slice(h, h + 1), slice(h * dim, (h + 1) * dim)
        v, o, do = (live(ref[:, lanes]) for ref in (v_ref, o_ref, do_ref))
        decays = _exp(jnp.where(visible, m[head], -jnp.inf), m_queries[:, head]) * u[head] * u_queries[:, head]
        do = dot(decays, do, transpose_a=True) + last_tokens[:, head] * do_next_ref[:, lanes]
        o_before = jnp.concatenate([o_before_ref[:, lanes], o[:-1].astype(jnp.float32)], axis=0)
        c = jnp.broadcast_to(jnp.sum(do * (v - o_before), axis=1, keepdims=True), visible.shape)
        dls.append(last[head] * dl_next_ref[head] - jnp.sum(jnp.where(later, decays * (gate_tokens[:, head] * c), 0), axis=0, keepdims=True))
        dv_ref[:, lanes] = (gate_tokens[:, head] * do).astype(dv_ref.dtype)
        do_next_ref[:, lanes] = decay[head, :1] * do[:1]
        cs = jnp.where(head_of_lane == h, c, cs)
    c, dl = cs.T[:m.shape[0]], jnp.concatenate(dls, axis=0)
    ds_ref[...] = gate * (dl + decay * c)
    dl_next_ref[...] = (decay * (dl - gate * c))[:, :1]


def _exp(x, reference):
    """exp(x − reference) for x ≤ reference, where −inf − (−inf) counts as −inf: no weight."""
    return jnp.exp(x - jnp.maximum(reference, jnp.finfo(jnp.float32).min))


def _wide(reduce, x):
    return jnp.broadcast_to(reduce(x, axis=1, keepdims=True), x.shape)


def _columns(x, width):
    return x[:, :width] if width <= x.shape[1] else jnp.broadcast_to(x[:, :1], (x.shape[0], width))


def _reciprocal(u):
    return pl.reciprocal(jnp.maximum(u, jnp.finfo(jnp.float32).tiny))


def _masks(first_ref, chunk, time):
    """Which tokens [1, chunk] each query [chunk, 1] sees, which queries see the carried state, which tokens exist."""
    size = first_ref.shape[1]
    query, token = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    first = first_ref[...].T - chunk * size
    return (first <= token) & (token <= query), jnp.broadcast_to(first < 0, query.shape), (lambda x: x) if time % size == 0 else lambda x: jnp.where(query[:, :1] < time - chunk * size, x, 0)


# --- Arrays and blocks ---------------------------------------------------------------------------------------------


class _Grid(NamedTuple):
    batch: int
    time: int
    heads: int
    dim: int
    chunk: int
    block: int  # heads of a block
    reverse: bool

    @classmethod
    def over(cls, v, reverse=False):
        return cls(*v.shape, CHUNK, head_block(*v.shape[2:], WIDTH), reverse)

    @property
    def chunks(self):
        return pl.cdiv(self.time, self.chunk)

    def _at(self, c):
        return self.chunks - 1 - c if self.reverse else c

    def rows(self, x, **pad):
        x = jnp.pad(x, [(0, 0), (0, -self.time % self.chunk), (0, 0)], **pad).swapaxes(1, 2)
        x = x.reshape(self.batch, self.heads // self.block, self.block, -1)
        return x, pl.BlockSpec((None, None, self.block, self.chunk), lambda b, h, c: (b, h, 0, self._at(c)))

    def before(self, x):
        return x.reshape(self.batch, self.chunks, 1, -1), pl.BlockSpec((None, None, 1, self.block * self.dim), lambda b, h, c: (b, self._at(c), 0, h))

    def first(self, reset):
        if reset is None:
            x = jnp.full((self.batch, self.time), -1, jnp.int32)
        else:
            x = lax.cummax(jnp.where(reset, jnp.arange(self.time, dtype=jnp.int32), -1), axis=1)
        x = jnp.pad(x, [(0, 0), (0, -self.time % self.chunk)], mode="edge")
        return x[:, None], pl.BlockSpec((None, 1, self.chunk), lambda b, h, c: (b, 0, self._at(c)))

    def lanes(self, x):
        return x.reshape(self.batch, self.time, -1), pl.BlockSpec((None, self.chunk, self.block * self.dim), lambda b, h, c: (b, self._at(c), h))

    def state(self, x):
        return x.reshape(self.batch, -1, self.block, 1), pl.BlockSpec((None, None, self.block, 1), lambda b, h, c: (b, h, 0, 0))

    def state_lanes(self, x):
        return x.reshape(self.batch, 1, -1), pl.BlockSpec((None, 1, self.block * self.dim), lambda b, h, c: (b, 0, h))

    def unlanes(self, x):
        return x.reshape(self.batch, -1, self.heads, self.dim)

    def unrows(self, x):
        return x.reshape(self.batch, self.heads, -1)[..., : self.time].swapaxes(1, 2)

    def unstate(self, x):
        return x.reshape(self.batch, self.heads)

    def call(self, kernel, operands, like, scratch):
        arrays, in_specs = zip(*operands)
        results, out_specs = zip(*like)
        with jax.enable_x64(False):
            return pl.pallas_call(
                functools.partial(kernel, self.time, self.dim),
                out_shape=varying_like(arrays, *results),
                grid=(self.batch, self.heads // self.block, self.chunks),
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=[pltpu.VMEM((self.block, 1), jnp.float32)] * scratch,
                compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
                name=kernel.__name__.strip("_"),
            )(*arrays)
