"""Decays between the tokens of a chunk, inside a kernel, as exponentials of sums that are never positive.

Equations and letters are those of `primitives.decays`. Log decays come as a scalar per token and head, or with a
channel for each row of the memory.

Scalars: prefix sums of a block of heads are one product of rows of lanes and a triangle of ones. They have two terms,
the coarse one exact, so that their differences keep their digits where −1e4 stands beside −0.01.

Channels: the decays to and from the cut of each size of halves are products of few decays, built up from single tokens
by doubling: no sums, no differences, one exponential for each log decay. A token of a right half takes its reader and
one of a left half its key to the cut, in *one* matrix X: X Xᵀ holds the scores of this size where the right half meets
the left one, and so do the gradients. That is a pass of the matrix unit for each size of halves, mostly masked: cheaper
than vector instructions on small blocks.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.tpu.common import CHUNK, ChunkGrid, dot, enough_for, load

FLOOR = -1000.0  # a log decay below is a decay of exactly zero in float32; sums of it stay finite
SIZES = tuple(1 << level for level in range(CHUNK.bit_length() - 1))  # of halves, from single tokens on
SUBLANES = 8  # of a vector register of float32
REGISTER = 16  # rows that fill one of bfloat16


class Decays(NamedTuple):
    """Decays of a chunk of a head; channels are 1 or key_dim. Functions of them also take heads stacked in front."""

    from_start: Float[Array, "chunk channels"]  # through the token itself
    to_end: Float[Array, "chunk channels"]  # behind the token
    total: Float[Array, "1 channels"]
    between: Float[Array, "chunk chunk"] | None  # from j (second) to i ≥ j, else zero; where there is one channel
    halves: tuple[Float[Array, "chunk channels"], ...] | None  # to or from the cut; where there are more

    @property
    def memory(self) -> Float[Array, "rows 1"]:
        """The total as a column: the decay of each row of the memory."""
        if self.halves is None:
            return self.total
        rows = jnp.broadcast_to(self.total, (*self.total.shape[:-2], SUBLANES, self.total.shape[-1]))
        return rows.swapaxes(-2, -1)[..., :1]


def decay_operand(grid: ChunkGrid, g: Float[Array, "batch time heads channels"]) -> tuple:
    """Log decays as `block_decays` reads them."""
    return grid.rows(g[..., 0]) if g.shape[-1] == 1 else grid.lanes(g)


def operand_decays(grid: ChunkGrid, dg: Array, g: Float[Array, "batch time heads channels"]) -> Array:
    """Cotangents of log decays, of what `decay_operand` makes of these."""
    return grid.unrows(dg)[..., None] if g.shape[-1] == 1 else dg.reshape(g.shape)


def block_decays(g_ref, heads: int, chunk: int | Array, time: int) -> Callable[[int], Decays]:
    """The decays of each head of a block, as a function of its number."""
    if is_scalar(g_ref):
        return _scalar_decays(g_ref[...])
    dim = g_ref.shape[1] // heads
    return lambda h: _channel_decays(load(g_ref, slice(h * dim, (h + 1) * dim), chunk, time))


def is_scalar(g_ref) -> bool:
    """Whether a block holds a log decay for each token and head, not one for each channel."""
    return g_ref.shape[0] < CHUNK  # so many heads; else so many tokens


def _channel_decays(g):
    from_start = total = jnp.exp(g)
    to_end, halves = jnp.ones_like(g), []
    for size in SIZES:
        other = _swapped(total, size)
        halves.append(_halves(from_start, to_end, size))
        from_start = _halves(from_start * other, from_start, size)
        to_end = _halves(to_end, to_end * other, size)
        total *= other
    return Decays(from_start, to_end, total[..., -1:, :], None, tuple(halves))


def _swapped(x, size):
    """Every left half and its right half swapped."""
    if size >= SUBLANES:
        return _halves(jnp.roll(x, size, -2), jnp.roll(x, -size, -2), size)
    registers = x.reshape(-1, SUBLANES, x.shape[-1])
    down, up = (pltpu.roll(registers, n, 1).reshape(x.shape) for n in (size, SUBLANES - size))
    return _halves(down, up, size)


def _scalar_decays(g):
    heads = g.shape[0]
    i, j = token_pairs()
    triangle = (i <= j).astype(jnp.float32).astype(jnp.bfloat16)
    quantum = 2.0**-6  # a multiple of it is a sum of two bfloat16; a sum of 128 multiples is exact in float32
    g = jnp.maximum(g, FLOOR)
    coarse = jnp.round(g / quantum) * quantum
    sums = [dot(x, triangle) for x in (coarse, g - coarse)]
    from_start, to_end = jnp.exp(sum(sums)), _exp_difference([x[:, -1:] for x in sums], sums)
    columns = jnp.concatenate([*sums, from_start, to_end]).T

    def head(h):
        *later, start, end = (columns[:, n + h : n + h + 1] for n in range(0, 4 * heads, heads))
        between = _exp_difference(later, [x[h : h + 1] for x in sums])
        return Decays(start, end, from_start[h : h + 1, -1:], jnp.where(j <= i, between, 0), None)

    return head


def _exp_difference(later, earlier):
    """exp(later − earlier) of prefix sums; where they are in the wrong order, one."""
    return jnp.exp(jnp.minimum((later[0] - earlier[0]) + (later[1] - earlier[1]), 0))


def token_pairs(*heads: int) -> tuple[Int[Array, "*heads chunk chunk"], Int[Array, "*heads chunk chunk"]]:
    """The numbers of the token of a row and of that of a column."""
    row, column = (lax.broadcasted_iota(jnp.int32, (*heads, CHUNK, CHUNK), len(heads) + axis) for axis in (0, 1))
    return row, column


def decayed_scores(
    reader: Float[Array, "*heads chunk key_dim"], k: Float[Array, "*heads chunk key_dim"], decays: Decays
) -> Float[Array, "*heads chunk chunk"]:
    """``Σ_c reader_ic k_jc decay_ijc`` for j ≤ i, zero above the diagonal. Readers are queries, or the keys again.

    For outputs, whose rounding is to be that of their inputs: products of what is derived from these are `enough_for`.
    """
    if decays.halves is None:
        return dot(reader, k, (1, 1)) * decays.between
    i, j = token_pairs(*k.shape[:-2])
    distance = jnp.where(j <= i, i ^ j, -1)  # its highest bit is the size of the halves at which i and j part
    scores = jnp.where(distance == 0, dot(reader, k, (1, 1)), 0)
    for size, halves in zip(SIZES, decays.halves, strict=True):
        x = _to_the_cut(reader, k, halves, size)
        met = _spread(dot(_right(x, size), x, (1, 1), enough_for(k.dtype)), size)
        scores = _halves(jnp.where(distance >= size, met, scores), scores, size)
    return scores


def decayed_scores_and_gradient(
    dscores: Float[Array, "*heads chunk chunk"],
    reader: Float[Array, "*heads chunk key_dim"],
    k: Float[Array, "*heads chunk key_dim"],
    decays: Decays,
    precision: lax.Precision = lax.Precision.HIGHEST,
) -> tuple[Float[Array, "..."], ...]:
    """`decayed_scores`, the cotangents dreader and dk for one of them, and what flows through the decays between.

    The flow is that of every pair of tokens where there is one channel, and ``reader · dreader − k · dk`` elementwise
    where there are more. Both parts of this are sums of the same rounded products, so that what a chunk holds twice
    cancels. The scores here are of rounded products too: all are in the dtype of the readers and keys, of `precision`.
    """
    if decays.halves is None:
        scores, flow = decayed_scores(reader, k, decays), dscores
        dscores = (dscores * decays.between).astype(k.dtype)
        return scores, dot(dscores, k), dot(dscores, reader, (0, 0)), scores * flow
    i, j = token_pairs(*k.shape[:-2])
    distance = jnp.where(j <= i, i ^ j, -1)
    scores = jnp.where(distance == 0, dot(reader, k, (1, 1), precision), 0)
    diagonal = jnp.where(i == j, dscores, 0).astype(k.dtype)
    dreader, dk = dot(diagonal, k, precision=precision), dot(diagonal, reader, precision=precision)
    flow = jnp.zeros(k.shape, jnp.float32)
    below = jnp.where(j < i, dscores, 0)
    both = below + below.swapaxes(-2, -1)
    for size, halves in zip(SIZES, decays.halves, strict=True):
        x = _to_the_cut(reader, k, halves, size).astype(k.dtype)
        met = _spread(dot(_right(x, size), x, (1, 1), precision), size)
        scores = _halves(jnp.where(distance >= size, met, scores), scores, size)
        dx = dot(jnp.where(((i ^ j) >= size) & ((i ^ j) < 2 * size), both, 0).astype(k.dtype), x, precision=precision)
        flow += _halves(x * dx, -x * dx, size)
        dx *= halves
        dreader, dk = _halves(dreader + dx, dreader, size), _halves(dk, dk + dx, size)
    return scores, dreader, dk, flow


def _to_the_cut(reader, k, halves, size):
    return _halves(reader.astype(jnp.float32), k.astype(jnp.float32), size) * halves


def _right(x, size):
    """The right halves, where they are whole registers; else all."""
    if size < REGISTER:
        return x
    return jnp.concatenate([x[..., n : n + size, :] for n in range(size, CHUNK, 2 * size)], axis=-2)


def _spread(x, size):
    """What `_right` takes, of what it makes; left halves are anything."""
    if size < REGISTER:
        return x
    halves = (x[..., n : n + size, :] for n in range(0, CHUNK // 2, size))
    return jnp.concatenate([half for right in halves for half in (right, right)], axis=-2)


def _halves(right, left, size):
    """The tokens of right halves of one array, those of left halves of another."""
    if size < SUBLANES:
        token = lax.broadcasted_iota(jnp.int32, right.shape, right.ndim - 2)
        return jnp.where(token & size != 0, right, left)
    cuts = range(size, CHUNK, 2 * size)
    pairs = ((left[..., n - size : n, :], right[..., n : n + size, :]) for n in cuts)
    return jnp.concatenate([x for pair in pairs for x in pair], axis=-2)


def decay_gradient(
    flow: Float[Array, "*heads chunk _"],
    past: Float[Array, "*heads chunk key_dim"],
    beyond: Float[Array, "*heads chunk key_dim"],
    passing: Float[Array, "*heads key_dim value_dim"],
    decays: Decays,
    dtype,
) -> Float[Array, "..."]:
    """dg of a chunk: within + Σ_{i≥t} past_i + Σ_{j<t} beyond_j + total · passing; of scalars a row, [1, chunk].

    `past` are readers that find what was before the chunk, `beyond` keys that are read behind it, `passing` is the
    memory before the chunk times the cotangent of that after it, all elementwise. Within the chunk what flows past t is
    that of readers from t on less that of keys there; or, of scalars, that of pairs j < t ≤ i, where nothing cancels.
    """
    t, i = token_pairs(*past.shape[:-2])
    after, before = (x.astype(jnp.float32).astype(dtype) for x in (i >= t, i < t))
    if decays.halves is None:
        within = row_sums(jnp.where(i < t, dot(after, flow), 0), dtype)
        past, beyond = row_sums(past, dtype), row_sums(beyond, dtype)
        carried = decays.total * jnp.sum(jnp.sum(passing, axis=-2, keepdims=True), axis=-1, keepdims=True)
        return (within + dot(past, after, (1, 1)) + dot(beyond, before, (1, 1)))[..., :1, :] + carried
    return dot(after, flow + past) + dot(before, beyond) + decays.total * row_sums(passing, dtype)[..., :1, :]


def write_decay_gradient(dg_ref, g_ref, head: int, dg: Float[Array, "..."]):
    """Write what `decay_gradient` makes for a head of a block. Nothing passes a decay of zero.

    There the sums cancel, and what rounding leaves of them is dropped.
    """
    if is_scalar(g_ref):
        at = slice(head, head + 1), slice(None)
    else:
        at = slice(None), slice(head * dg.shape[1], (head + 1) * dg.shape[1])
    dg_ref[at] = jnp.where(g_ref[at] > FLOOR, dg, 0)


def row_sums(x, dtype):
    """The sum over each row, as rows of lanes, all alike: by a product with ones, which need not be transposed."""
    return dot(jnp.ones((*x.shape[:-2], SUBLANES, x.shape[-1]), dtype), x, (1, 1))
