"""Mamba's selective scan forward and its reverse rule, each in one pass over the tokens.

Equations and letters are those of `primitives.selective_scan`; u is ``dt x``, and the skip connection stays outside. A
state is n along the rows of registers and channels along their lanes, so that dt and x, as they lie in memory, are rows
that the load of a register repeats. b and c are columns that all channels share: the matrix unit spreads them over the
lanes once per chunk, before the first block of channels. Sums over n are those of eight tokens at a time.

The states of all channels stay in VMEM while time goes by; blocks of channels are the inner axis of the grid. Forward
keeps the state before every chunk. Backward computes the states and decays of a chunk once more, into VMEM, and goes
back over them; da is summed up over time and db and dc over the blocks of channels where they are.

Cost for a token and 128 channels at n = 16 in ns, forward and backward: bytes at 819 and 1640 GB/s, float32 and
bfloat16 (y, to which the skip connection is added, in float32); exps, of which the chip starts a register per
instruction; and the instructions that the compiler schedules for 2048 channels (the same for both dtypes), at the clock
that the published FLOP/s of the chip imply (1.50 and 1.75 GHz), not a timing:

    chip   float32      bfloat16     exps         instructions
    v5e    2.03, 3.28   1.41, 2.03   1.33, 1.33   4.6, 12.0
    v6e    1.01, 1.64   0.70, 1.01   1.14, 1.14   3.7, 10.0

Vector arithmetic binds, two to ten times as long as memory or exps: forward about 17 operations on 2 registers of a
state. XLA would write those states, n times the tokens, to memory. VMEM: 11.8 MiB at most, for n = 64.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.common import LANES, general_refusal, per_device, varying_like, vmap_into_batch
from pallas_kernels.tpu.linear_recurrence import ROWS

STATE = 8192  # n · channels of a block, at most: an eighth of all registers
WIDTH = 512  # channels of a block, at most
N = 64  # of a state, at most
STATES = 2**17  # n · dim, at most: such states stay in VMEM while time goes by
ROUND = 16  # sizes of chunks are multiples of it: two bfloat16 share a row of a register


def refusal(x, dt, b, hidden):
    """Why the kernel cannot serve these inputs, or `None`."""
    if reason := general_refusal(x):
        return reason
    taken = jnp.float32, jnp.bfloat16
    if hidden.dtype != jnp.float32 or x.dtype not in taken or dt.dtype not in taken:
        got = f"x of {x.dtype} and dt of {dt.dtype} to compute in {hidden.dtype}"
        return f"it takes float32 and bfloat16 tokens and computes in float32, got {got}"
    n, dim = b.shape[-1], x.shape[2]
    if n > N or n * dim > STATES:
        return f"the states of all channels must fit on the chip, n to {N} and n * dim to {STATES}, got {n=}, {dim=}"
    return None


def forward(size, x, dt, a, b, c, reset, hidden):
    """y, the last hidden state and the one before every chunk of `size` tokens, a multiple of `ROUND`."""
    kernel = vmap_into_batch(functools.partial(_forward, size))
    call = per_device(kernel, x, "btd", "btd btd bdn btn btn bt bdn", "btd bdn btdn")
    y, hidden, before = call(x, dt, a, b, c, reset, hidden)
    return y, hidden, before.swapaxes(0, 1)


def backward(size, x, dt, a, b, c, reset, before, dy, dhidden):
    """The cotangents of x, dt, a, b, c and of the hidden state that came in."""
    kernel = vmap_into_batch(functools.partial(_backward, size))
    call = per_device(kernel, x, "btd", "btd btd bdn btn btn bt btdn btd bdn", "btd btd bdn bdtn bdtn bdn")
    dx, ddt, da, db, dc, dhidden = call(x, dt, a, b, c, reset, before.swapaxes(0, 1), dy, dhidden)
    # Sums over channels that devices may hold apart.
    return dx, ddt, da, jnp.sum(db, axis=1).astype(b.dtype), jnp.sum(dc, axis=1).astype(c.dtype), dhidden


# --- Arrays as the kernels see them --------------------------------------------------------------------------------


def _forward(size, x, dt, a, b, c, reset, hidden):
    grid = _Grid.over(size, x, a)
    y, states = grid.tokens(jax.ShapeDtypeStruct(x.shape, hidden.dtype)), grid.states(hidden)
    operands = [grid.tokens(x), grid.tokens(dt), grid.rates(a), grid.columns(b), grid.columns(c), states]
    results = [y, states, grid.before(jax.ShapeDtypeStruct((grid.batch, grid.chunks, grid.n, grid.dim), a.dtype))]
    scratch = [grid.rows] * 2 + [grid.wide] * 2
    y, hidden, before = grid.call("selective_scan_forward", _forward_kernel, reset, operands, results, scratch)
    return y, grid.unstates(hidden), before[:, :, : a.shape[2]].swapaxes(2, 3)


def _backward(size, x, dt, a, b, c, reset, before, dy, dhidden):
    grid = _Grid.over(size, x, a, reverse=True)
    before = jnp.pad(before.swapaxes(2, 3), [(0, 0), (0, 0), (0, grid.n - a.shape[2]), (0, 0)])
    tokens, steps, states = grid.tokens(x), grid.tokens(dt), grid.states(dhidden)
    operands = [tokens, steps, grid.tokens(dy), grid.rates(a), grid.columns(b), grid.columns(c)]
    operands += [grid.before(before), states]
    results = [tokens, steps, states, grid.sums(), grid.sums(), states]
    scratch = [grid.rows] * 5 + [grid.wide] * 2 + [grid.every_state] * 2
    cotangents = grid.call("selective_scan_backward", _backward_kernel, reset, operands, results, scratch)
    dx, ddt, da, db, dc, dhidden = cotangents
    return dx, ddt, grid.unstates(da), grid.unsums(db), grid.unsums(dc), grid.unstates(dhidden)


class _Grid(NamedTuple):
    """A kernel's grid of (batch, chunk of time, block of channels), the chunks in order.

    The methods turn an array into what the kernel sees of it: a pair of the array in another shape and of the block of
    that array that a step of the grid reads or writes.
    """

    batch: int
    time: int
    dim: int
    true_n: int
    size: int  # of a chunk
    reverse: bool  # the last chunk first

    @classmethod
    def over(cls, size, x, a, reverse=False):
        """The grid for some tokens, in chunks of a size."""
        return cls(*x.shape, a.shape[-1], size, reverse)

    @property
    def n(self):
        """Of a state: whole registers."""
        return pl.cdiv(self.true_n, ROWS) * ROWS

    @property
    def chunks(self):
        """How many chunks cover the time."""
        return pl.cdiv(self.time, self.size)

    @property
    def width(self):
        """Channels of a block."""
        return min(self.dim, max(LANES, min(WIDTH, STATE // self.n)))

    @property
    def blocks(self):
        """How many blocks cover the channels."""
        return pl.cdiv(self.dim, self.width)

    def chunk(self, step):
        """The chunk that comes at a step."""
        return self.chunks - 1 - step if self.reverse else step

    def tokens(self, x):
        """``[batch, time, dim]``: a chunk of tokens."""
        return x, pl.BlockSpec((None, self.size, self.width), lambda b, t, d: (b, self.chunk(t), d))

    def states(self, x):
        """``[batch, dim, n]``: the states of all blocks, channels along lanes: they stay while time goes by."""
        x = jnp.pad(x, [(0, 0), (0, -self.dim % self.width), (0, self.n - self.true_n)])
        x = x.reshape(self.batch, self.blocks, self.width, self.n).swapaxes(2, 3)
        return x, pl.BlockSpec((None, *x.shape[1:]), lambda b, t, d: (b, 0, 0, 0))

    def unstates(self, x):
        """What `states` takes, of what it makes."""
        return x.swapaxes(2, 3).reshape(self.batch, -1, self.n)[:, : self.dim, : self.true_n]

    def rates(self, a):
        """``[batch, dim, n]``: exponents of 2 for a block of channels."""
        x, _ = self.states(a * math.log2(math.e))
        return x, pl.BlockSpec((None, None, self.n, self.width), lambda b, t, d: (b, d, 0, 0))

    def before(self, x):
        """``[batch, chunks, n, dim]``: a state per chunk."""
        return x, pl.BlockSpec((None, None, self.n, self.width), lambda b, t, d: (b, self.chunk(t), 0, d))

    def columns(self, x):
        """``[batch, time, n]``: b or c of a chunk of tokens, thrice; zero beyond the end."""
        x = jnp.pad(x, [(0, 0), (0, -self.time % self.size), (0, self.n - self.true_n)]).astype(jnp.float32)
        x = jnp.concatenate([x] * 3, axis=-1)
        return x, pl.BlockSpec((None, self.size, 3 * self.n), lambda b, t, d: (b, self.chunk(t), 0))

    def sums(self):
        """The cotangents of b or c, a column per token of a chunk: a type and a block."""
        like = jax.ShapeDtypeStruct((self.batch, self.chunks, self.n, LANES), jnp.float32)
        return like, pl.BlockSpec((None, None, self.n, LANES), lambda b, t, d: (b, self.chunk(t), 0, 0))

    def unsums(self, x):
        """``[batch, 1, time, n]``."""
        x = x[..., : self.true_n, : self.size].swapaxes(2, 3)
        return x.reshape(self.batch, 1, -1, self.true_n)[:, :, : self.time]

    def resets(self, reset):
        """``[batch, time]``: numbers that the scalar unit reads."""
        reset = jnp.pad(reset.astype(jnp.int32), [(0, 0), (0, -self.time % self.size)])
        shape = None, None, 1, self.size
        block = pl.BlockSpec(shape, lambda b, t, d: (b, self.chunk(t), 0, 0), memory_space=pltpu.SMEM)
        return reset.reshape(self.batch, self.chunks, 1, self.size), block

    @property
    def rows(self):
        """Memory for a row per token."""
        return pltpu.VMEM((self.size, self.width), jnp.float32)

    @property
    def wide(self):
        """Memory for a column per token, in all lanes."""
        return pltpu.VMEM((self.size * self.n, LANES), jnp.float32)

    @property
    def every_state(self):
        """Memory for a state per token, and one more."""
        return pltpu.VMEM((self.size + 1, self.n, self.width), jnp.float32)

    def call(self, name, kernel, reset, operands, results, scratch):
        """Run ``kernel(grid, reset_ref, *operand_refs, *result_refs, *scratch_refs)``; results are like given pairs.

        Traced without x64, so that indices are 32 bits wide.
        """
        kernel = functools.partial(kernel, self, *([None] if reset is None else []))
        operands = operands if reset is None else [self.resets(reset), *operands]
        (arrays, in_specs), (likes, out_specs) = zip(*operands, strict=True), zip(*results, strict=True)
        with jax.enable_x64(False):
            return pl.pallas_call(
                kernel,
                out_shape=varying_like(arrays, [jnp.zeros(like.shape, like.dtype) for like in likes]),
                grid=(self.batch, self.chunks, self.blocks),
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=scratch,
                compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
                name=name,
            )(*arrays)


# --- The kernels: a chunk of a block of channels -------------------------------------------------------------------
#
# States are [n, channels], what belongs to tokens is [tokens, channels]; b and c are [tokens · n, lanes], equal in all.


def _forward_kernel(grid, reset_ref, x_ref, dt_ref, a_ref, b_ref, c_ref, hidden0_ref, *refs):
    y_ref, hidden_ref, before_ref, dt_rows, u_rows, b_wide, c_wide = refs
    chunk, block = pl.program_id(1), pl.program_id(2)

    @pl.when((chunk == 0) & (block == 0))
    def _():
        hidden_ref[...] = hidden0_ref[...]

    @pl.when(block == 0)
    def _():
        b_wide[...], c_wide[...] = _widen(grid, b_ref), _widen(grid, c_ref)

    before_ref[...] = hidden_ref[block]
    x, dt = (_inside(grid, ref[...].astype(jnp.float32), chunk) for ref in (x_ref, dt_ref))
    dt_rows[...], u_rows[...] = dt, dt * x

    def group(i, hidden):
        rows = pl.ds(i * ROWS, ROWS)
        dt, u, a = dt_rows[rows], u_rows[rows], a_ref[...]
        b, c, products = _columns(grid, b_wide, i), _columns(grid, c_wide, i), []
        for j in range(ROWS):
            token = slice(j, j + 1)
            hidden = _decay(dt[token], a, reset_ref, i * ROWS + j) * hidden + b[j] * u[token]
            products.append(c[j] * hidden)
        y_ref[rows] = _sum_n(products)
        return hidden

    hidden_ref[block] = lax.fori_loop(0, grid.size // ROWS, group, hidden_ref[block])


def _backward_kernel(grid, reset_ref, x_ref, dt_ref, dy_ref, a_ref, b_ref, c_ref, before_ref, dhidden0_ref, *refs):
    dx_ref, ddt_ref, da_ref, db_ref, dc_ref, dhidden_ref, dt_rows, u_rows, dy_rows, *refs = refs
    du_rows, dlog_rows, b_wide, c_wide, states, decays = refs
    chunk, block = grid.chunks - 1 - pl.program_id(1), pl.program_id(2)
    groups = grid.size // ROWS

    @pl.when((pl.program_id(1) == 0) & (block == 0))
    def _():
        dhidden_ref[...], da_ref[...] = dhidden0_ref[...], jnp.zeros_like(da_ref)

    @pl.when(block == 0)
    def _():
        b_wide[...], c_wide[...] = _widen(grid, b_ref), _widen(grid, c_ref)
        db_ref[...], dc_ref[...] = jnp.zeros_like(db_ref), jnp.zeros_like(dc_ref)

    x, dt, dy = (_inside(grid, ref[...].astype(jnp.float32), chunk) for ref in (x_ref, dt_ref, dy_ref))
    dt_rows[...], u_rows[...], dy_rows[...] = dt, dt * x, dy

    def again(i, hidden):
        rows = pl.ds(i * ROWS, ROWS)
        dt, u, a, b = dt_rows[rows], u_rows[rows], a_ref[...], _columns(grid, b_wide, i)
        before, decay = [], []
        for j in range(ROWS):
            token = slice(j, j + 1)
            before.append(hidden)
            decay.append(_decay(dt[token], a, reset_ref, i * ROWS + j))
            hidden = decay[j] * hidden + b[j] * u[token]
        states[rows], decays[rows] = jnp.stack(before), jnp.stack(decay)
        return hidden

    states[grid.size] = lax.fori_loop(0, groups, again, _inside(grid, before_ref[...]))
    lane = lax.broadcasted_iota(jnp.int32, db_ref.shape, 1)

    def group(i, carry):
        i = groups - 1 - i
        dhidden, da, db, dc = carry
        rows, rows_and_next = pl.ds(i * ROWS, ROWS), pl.ds(i * ROWS, ROWS + 1)
        dt, u, dy, a = dt_rows[rows], u_rows[rows], dy_rows[rows], a_ref[...]
        b, c, state, decay = _columns(grid, b_wide, i), _columns(grid, c_wide, i), states[rows_and_next], decays[rows]
        du, dlog = [None] * ROWS, [None] * ROWS
        for j in reversed(range(ROWS)):
            token, here = slice(j, j + 1), lane == i * ROWS + j
            dhidden += c[j] * dy[token]
            dc = jnp.where(here, jnp.sum(state[j + 1] * dy[token], axis=1, keepdims=True), dc)
            db = jnp.where(here, jnp.sum(dhidden * u[token], axis=1, keepdims=True), db)
            du[j] = dhidden * b[j]
            dhidden *= decay[j]
            dexponent = dhidden * state[j]
            dlog[j] = dexponent * a
            da += dexponent * dt[token]
        du_rows[rows], dlog_rows[rows] = _sum_n(du), _sum_n(dlog)
        return dhidden, da, db, dc

    carry = dhidden_ref[block], da_ref[block], jnp.zeros_like(db_ref), jnp.zeros_like(dc_ref)
    dhidden_ref[block], da_ref[block], db, dc = lax.fori_loop(0, groups, group, carry)
    db_ref[...] += db
    dc_ref[...] += dc
    du = du_rows[...]
    dx_ref[...] = (dt_rows[...] * du).astype(dx_ref.dtype)
    ddt_ref[...] = (math.log(2) * dlog_rows[...] + x_ref[...].astype(jnp.float32) * du).astype(ddt_ref.dtype)


def _widen(grid, ref):
    """``[tokens, 3 n]``, thrice the same, to ``[tokens · n, lanes]``, by the matrix unit.

    Three bfloat16 hold a float32, and their products with ones are exact.
    """
    x = ref[...]
    leading = x.astype(jnp.bfloat16).astype(jnp.float32)
    middle = (x - leading).astype(jnp.bfloat16).astype(jnp.float32)
    n, lane = (lax.broadcasted_iota(jnp.int32, (grid.size, grid.n, x.shape[1]), axis) for axis in (1, 2))
    part = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    x = jnp.where(part < grid.n, leading, jnp.where(part < 2 * grid.n, middle, x - leading - middle))
    x = jnp.where(lane % grid.n == n, x[:, None], 0).astype(jnp.bfloat16).reshape(-1, x.shape[1])
    return jnp.dot(x, jnp.ones((x.shape[1], LANES), jnp.bfloat16), preferred_element_type=jnp.float32)


def _columns(grid, wide, i):
    """b or c of a group of tokens, in every channel."""
    group = ROWS * grid.n
    x = wide[pl.ds(pl.multiple_of(i * group, group), group)].reshape(ROWS, grid.n, LANES)
    return jnp.concatenate([x] * pl.cdiv(grid.width, LANES), axis=2)[..., : grid.width]


def _decay(dt, a, reset_ref, t):
    decay = jnp.exp2(dt * a)
    return decay if reset_ref is None else jnp.where(reset_ref[0, t] != 0, 0, decay)


def _inside(grid, x, chunk=None):
    """Zeros where a block reaches beyond the end of its array: in its channels, and in the tokens of a chunk."""
    if grid.dim % grid.width:
        channel = lax.broadcasted_iota(jnp.int32, x.shape, 1) + pl.program_id(2) * grid.width
        x = jnp.where(channel < grid.dim, x, 0)
    if chunk is not None and grid.time % grid.size:
        x = jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 0) < grid.time - chunk * grid.size, x, 0)
    return x


def _sum_n(products):
    """Sums over n of products ``[n, channels]`` of eight tokens, a row for each.

    Registers are added in pairs, so that one holds partial sums of two tokens, then of four, then of eight.
    """
    registers = [sum(x[n : n + ROWS] for n in range(0, x.shape[0], ROWS)) for x in products]
    row = lax.broadcasted_iota(jnp.int32, registers[0].shape, 0)
    for step in (4, 2, 1):
        pairs = zip(registers[:step], registers[step:], strict=True)
        registers = [
            jnp.where(row & step == 0, x + pltpu.roll(x, ROWS - step, 0), y + pltpu.roll(y, step, 0)) for x, y in pairs
        ]
    return registers[0]
