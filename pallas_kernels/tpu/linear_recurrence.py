"""The diagonal linear recurrence forward and its reverse rule, each in one pass over memory.

Equations and letters are those of `primitives.linear_recurrence`. Time runs along the rows of registers and channels
along their lanes, as both lie in memory. The state that a chunk of time leaves for the next stays in VMEM. Eight tokens
fill a register: three steps scan them, then what came in is added, so that a token costs three steps of an eighth of a
register and not one of a whole. Backwards the recurrence runs over what a token hands to the one before it, since that
needs no decay of a neighbour: ``flow_t = decay_t dx_t`` with ``dx_t = dstates_t + flow_{t+1}``.

A decay that is constant in time is one row: never copied over time, its products computed once per chunk, its cotangent
summed up in VMEM. One of several channels is copied over them. Where documents start and at padding, a row of codes, a
number per token that all channels share, replaces the decay; a transposition makes columns of it.

Cost for a token and 128 channels in ns, forward and backward: bytes at 819 and 1640 GB/s, and the instructions that the
compiler schedules for 512 channels, at the clock that the published FLOP/s of the chip imply (1.50 and 1.75 GHz), not a
timing. The last column is with codes:

    chip   dtype      decay      bytes        instructions   with codes
    v5e    float32    of tokens  1.88, 3.13   0.73, 0.94     0.99, 1.22
    v5e    float32    constant   1.25, 1.88   0.51, 0.70
    v5e    bfloat16   of tokens  0.94, 1.56   0.76, 1.00     0.98, 1.23
    v5e    bfloat16   constant   0.63, 0.94   0.49, 0.77
    v6e    float32    of tokens  0.94, 1.56   0.66, 0.83     0.82, 0.97
    v6e    float32    constant   0.62, 0.94   0.47, 0.75
    v6e    bfloat16   of tokens  0.47, 0.78   0.69, 0.86     0.82, 1.02
    v6e    bfloat16   constant   0.31, 0.47   0.45, 0.73

Memory binds, but for bfloat16 on v6e, where instructions take up to one and a half times as long, and twice with codes.
VMEM: 5.4 MiB at most.
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

CHUNK = 256  # tokens of a block
WIDTH = 512  # channels of a block, at most
ROWS = 8  # of a vector register
STEPS = 1, 2, 4  # of a scan over them
GROUP = 2 * ROWS  # tokens of a turn of the loop: two bfloat16 share a row of a register
HALVES = slice(0, ROWS), slice(ROWS, GROUP)


def refusal(decay, x, hidden):
    """Why the kernel cannot serve these inputs, or `None`."""
    if reason := general_refusal(x):
        return reason
    taken = jnp.float32, jnp.bfloat16, jnp.complex64
    if hidden.dtype not in (jnp.float32, jnp.complex64) or not all(array.dtype in taken for array in (decay, x)):
        got = f"a decay of {decay.dtype} and inputs of {x.dtype} to compute in {hidden.dtype}"
        return f"it takes float32, bfloat16 and complex64 and computes in float32, got {got}"
    return None


def forward(decay, x, valid, reset, hidden):
    """The states of all tokens, and the last as precisely as it came in."""
    tokens, state = _dimensions(x)
    call = per_device(_forward, x, tokens, f"{tokens} {tokens} bt bt {state}", f"{tokens} {state}")
    return call(_per_channel(decay, x), x, valid, reset, hidden)


def backward(decay, valid, reset, hidden, states, dstates, dhidden):
    """The cotangents of the decay, of the inputs and of the state that came in."""
    tokens, state = _dimensions(states)
    arguments = f"{tokens} bt bt {state} {tokens} {tokens} {state}"
    call = per_device(_backward, states, tokens, arguments, f"{tokens} {tokens} {state}")
    (_, pull), decay = jax.vjp(lambda decay: _per_channel(decay, states), decay), _per_channel(decay, states)
    ddecay, dx, dhidden = call(decay, valid, reset, hidden, states, dstates, dhidden)
    return *pull(ddecay), dx, dhidden


def _dimensions(x):
    """A letter per axis, of the tokens and of a state."""
    rest = "cdefghijklmn"[: x.ndim - 2]
    return f"bt{rest}", f"b{rest}"


def _per_channel(decay, x):
    """A decay of every row and channel; in float32 where one was of several, since its cotangent is their sum."""
    shape = x.shape[0], decay.shape[1], *x.shape[2:]
    return decay if decay.shape == shape else jnp.broadcast_to(decay.astype(jnp.result_type(decay, "f4")), shape)


# --- Arrays as the kernels see them --------------------------------------------------------------------------------


@vmap_into_batch
def _forward(decay, x, valid, reset, hidden):
    grid = _Grid.over(x)
    tokens, state = grid.tokens(x), grid.state(hidden)
    operands, results = [grid.tokens(decay), tokens, state, *grid.codes(valid, reset)], [tokens, state]
    states, last = grid.call("linear_recurrence_forward", _forward_kernel, operands, results)
    return grid.array(states, x), grid.array(last, hidden)


@vmap_into_batch
def _backward(decay, valid, reset, hidden, states, dstates, dhidden):
    grid = _Grid.over(states, reverse=True)
    decays, tokens, state = grid.tokens(decay), grid.tokens(states), grid.state(dhidden)
    before = grid.state(hidden, states[:, CHUNK - 1 : -1 : CHUNK])
    operands = [decays, before, tokens, grid.tokens(dstates), state, *grid.codes(valid, reset)]
    results = [decays, tokens, state]
    ddecay, dx, dhidden = grid.call("linear_recurrence_backward", _backward_kernel, operands, results)
    return grid.array(ddecay, decay), grid.array(dx, states), grid.array(dhidden, hidden)


class _Grid(NamedTuple):
    """A kernel's grid of (batch, block of channels, chunk of time), the chunks in order.

    The methods turn an array into what the kernel sees of it: a pair of the array in another shape and of the block of
    that array that a step of the grid reads or writes. Complex numbers are their two parts, one after the other.
    """

    batch: int
    time: int
    channels: int
    parts: int
    reverse: bool  # the last chunk first

    @classmethod
    def over(cls, x, reverse=False):
        """The grid for some tokens."""
        return cls(*x.shape[:2], math.prod(x.shape[2:]), 1 + jnp.iscomplexobj(x), reverse)

    @property
    def chunks(self):
        """How many chunks cover the time."""
        return pl.cdiv(self.time, CHUNK)

    @property
    def width(self):
        """Channels of a block."""
        return min(self.channels, WIDTH // self.parts)

    def chunk(self, step):
        """The chunk that comes at a step."""
        return self.chunks - 1 - step if self.reverse else step

    def tokens(self, x):
        """``[batch, time, ...]``: a chunk of tokens; or ``[batch, 1, ...]``: what all of them share."""
        x = self._split(x.reshape(self.batch, -1, self.channels))
        if x.shape[2] < self.time:
            return x, pl.BlockSpec((None, x.shape[1], 1, self.width), lambda b, c, t: (b, 0, 0, c))
        return x, pl.BlockSpec((None, x.shape[1], CHUNK, self.width), lambda b, c, t: (b, 0, self.chunk(t), c))

    def state(self, x, later=None):
        """``[batch, ...]``: a state; or one for the first chunk and, of `later`, for every other."""
        x = x.reshape(self.batch, 1, self.channels)
        if later is not None:
            x = jnp.concatenate([x, later.reshape(self.batch, -1, self.channels).astype(x.dtype)], axis=1)
        x = self._split(x)[:, :, :, None]
        index = (lambda t: 0) if later is None else self.chunk
        return x, pl.BlockSpec((None, self.parts, None, 1, self.width), lambda b, c, t: (b, 0, index(t), 0, c))

    def codes(self, valid, reset):
        """``[batch, time]`` each, or `None`: what replaces the decay of a token, 0 or 1, or −1 for nothing.

        Beyond the end is padding. A list of one pair, or of none where every decay counts.
        """
        if valid is None and self.time % CHUNK == 0:
            return []
        code = jnp.full((self.batch, self.time), -1, jnp.float32)
        if valid is not None:
            code = jnp.where(reset, 0, jnp.where(valid, code, 1))
        code = jnp.pad(code, [(0, 0), (0, -self.time % CHUNK)], constant_values=1)
        return [(code[:, None], pl.BlockSpec((None, 1, CHUNK), lambda b, c, t: (b, 0, self.chunk(t))))]

    def _split(self, x):
        return jnp.stack([x.real, x.imag], axis=1) if jnp.iscomplexobj(x) else x[:, None]

    def array(self, x, like):
        """The array of the shape of `like` whose parts the kernel made."""
        x = lax.complex(x[:, 0], x[:, 1]) if x.shape[1] == 2 else x[:, 0]
        return x.reshape(like.shape)

    def call(self, name, kernel, operands, results):
        """Run ``kernel(time, *operand_refs, *result_refs, scratch_ref)``; results are like given pairs.

        Traced without x64, so that indices are 32 bits wide.
        """
        (arrays, in_specs), (likes, out_specs) = zip(*operands, strict=True), zip(*results, strict=True)
        with jax.enable_x64(False):
            return pl.pallas_call(
                functools.partial(kernel, self.time),
                out_shape=varying_like(arrays, likes),
                grid=(self.batch, pl.cdiv(self.channels, self.width), self.chunks),
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=[pltpu.VMEM((CHUNK, LANES), jnp.float32)],
                compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
                name=name,
            )(*arrays)


# --- The kernels: a chunk of a block of channels -------------------------------------------------------------------
#
# A number is a tuple of its parts, one or two, each an array of rows of tokens.


def _forward_kernel(time, decay_ref, x_ref, hidden0_ref, *refs):
    *code_ref, states_ref, hidden_ref, codes_ref = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        hidden_ref[...] = hidden0_ref[...]

    code = _codes(code_ref, codes_ref, x_ref.shape[-1])
    gates = _gates(decay_ref, x_ref.shape[-1], code)

    def group(i, hidden):
        rows = pl.ds(i * GROUP, GROUP)
        x, states = _load(x_ref, rows, code), []
        for half, products in zip(HALVES, gates(rows), strict=True):
            states.append(_add(_scan(products, _rows(x, half)), _times(products[-1], hidden)))
            hidden = _rows(states[-1], slice(-1, None))
        _store(states_ref, rows, _map(lambda *x: jnp.concatenate(x), *states))
        return hidden

    turns = pl.cdiv(min(time, CHUNK), GROUP)
    _store(hidden_ref, ..., lax.fori_loop(0, turns, group, _load(hidden_ref, ...)))


def _backward_kernel(time, decay_ref, before_ref, states_ref, dstates_ref, dhidden0_ref, *refs):
    *code_ref, ddecay_ref, dx_ref, dhidden_ref, codes_ref = refs
    constant = decay_ref.shape[1] == 1

    @pl.when(pl.program_id(2) == 0)
    def _():
        dhidden_ref[...] = dhidden0_ref[...]
        if constant:
            ddecay_ref[...] = jnp.zeros_like(ddecay_ref)

    code = _codes(code_ref, codes_ref, dx_ref.shape[-1])
    gates = _gates(decay_ref, dx_ref.shape[-1], code, reverse=True)
    turns = pl.cdiv(min(time, CHUNK), GROUP)
    row = lax.broadcasted_iota(jnp.int32, (GROUP, 1), 0)

    def group(i, carry):
        i = turns - 1 - i
        dhidden, total = carry
        rows, rows_before = (pl.ds(i * GROUP, GROUP) for i in (i, jnp.maximum(i - 1, 0)))
        dstates, states, before = _load(dstates_ref, rows, code), _load(states_ref, rows), _load(before_ref, ...)
        before = _map(lambda x, y: jnp.where(i == 0, x, y[-1:]), before, _load(states_ref, rows_before))
        before = _map(lambda x, y: jnp.where(row == 0, x, pltpu.roll(y, 1, 0)), before, states)
        dx = []
        for half, products in reversed(list(zip(HALVES, gates(rows), strict=True))):
            dstates_half = _rows(dstates, half)
            flow = _scan(products, _times(products[0], dstates_half), reverse=True)
            flow = _add(flow, _times(products[-1], dhidden))
            dhidden = _map(lambda x, y: jnp.where(row[:ROWS] == ROWS - 1, x, pltpu.roll(y, ROWS - 1, 0)), dhidden, flow)
            dx.append(_add(dstates_half, dhidden))
            dhidden = _rows(flow, slice(0, 1))
        dx = _map(lambda *x: jnp.concatenate(x), *dx[::-1])
        _store(dx_ref, rows, dx)
        ddecay = _times(dx, before)[: decay_ref.shape[0]]  # the real part for a real decay of complex numbers
        if code is not None:
            kept = code(rows) < 0
            ddecay = _map(lambda x: jnp.where(kept, x, 0), ddecay)
        if constant:
            return dhidden, _map(lambda total, x: total + x[:ROWS] + x[ROWS:], total, ddecay)
        _store(ddecay_ref, rows, ddecay)
        return dhidden, total

    zeros = (jnp.zeros((ROWS, dx_ref.shape[-1]), jnp.float32),) * (decay_ref.shape[0] if constant else 0)
    dhidden, total = lax.fori_loop(0, turns, group, (_load(dhidden_ref, ...), zeros))
    _store(dhidden_ref, ..., dhidden)
    if constant:
        total = _map(lambda x: jnp.sum(x, axis=0, keepdims=True), total)
        _store(ddecay_ref, ..., _add(_load(ddecay_ref, ...), total))


def _codes(code_ref, codes_ref, width):
    """A function from rows to their codes, in every channel; `None` where every gate is the decay."""
    if not code_ref:
        return None
    for start in range(0, CHUNK, LANES):
        row = code_ref[0][:, start : start + LANES]
        codes_ref[start : start + LANES] = jnp.broadcast_to(row, (LANES, LANES)).T
    return lambda rows: jnp.concatenate([codes_ref[rows]] * pl.cdiv(width, LANES), axis=1)[:, :width]


def _gates(decay_ref, width, code, reverse=False):
    """A function from a group's rows to the products of the gates in each half of it."""
    constant = decay_ref.shape[1] == 1
    if constant:
        decay = _map(lambda x: jnp.broadcast_to(x, (GROUP, width)), _load(decay_ref, ...))
        once = [_products(_rows(decay, HALVES[0]), reverse)] * 2

    def gates(rows):
        if constant and code is None:
            return once
        gate = decay if constant else _load(decay_ref, rows)
        if code is not None:
            replaced = code(rows)
            gate = [jnp.where(replaced < 0, x, y) for x, y in zip(gate, (replaced, 0), strict=False)]
        return [_products(_rows(gate, half), reverse) for half in HALVES]

    return gates


def _products(gate, reverse):
    """The products of up to 1, 2, 4 and 8 gates that end with each row of a register; or that begin with it."""
    products = [gate]
    for step in STEPS:
        products.append(_times(products[-1], _neighbour(products[-1], step, reverse, 1)))
    return products


def _scan(products, x, reverse=False):
    """The recurrence over the rows of a register, from zero."""
    for step, product in zip(STEPS, products, strict=False):
        x = _add(x, _times(product, _neighbour(x, step, reverse, 0)))
    return x


def _neighbour(number, step, reverse, fill):
    """What is `step` rows before, or after, and a real number where no such row is in the register."""
    row = lax.broadcasted_iota(jnp.int32, number[0].shape, 0)
    shift, inside = (ROWS - step, row < ROWS - step) if reverse else (step, row >= step)
    return [jnp.where(inside, pltpu.roll(x, shift, 0), y) for x, y in zip(number, (fill, 0), strict=False)]


def _load(ref, rows, code=None):
    """A number in float32, zero at padding and beyond the end of its array."""
    number = tuple(ref[part, rows].astype(jnp.float32) for part in range(ref.shape[0]))
    return number if code is None else _map(lambda x: jnp.where(code(rows) > 0, 0, x), number)


def _store(ref, rows, number):
    for part, x in enumerate(number):
        ref[part, rows] = x.astype(ref.dtype)


def _map(function, *numbers):
    return tuple(map(function, *numbers))


def _rows(number, rows):
    return _map(lambda x: x[rows], number)


def _add(a, b):
    return _map(jnp.add, a, b)


def _times(a, b):
    if len(a) == 1:
        return _map(lambda x: a[0] * x, b)
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]
