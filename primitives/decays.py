"""Decays between the tokens of a chunk, as exponentials of sums that are never positive.

Within a chunk of C tokens with log decays g ≤ 0, token i sees token j ≤ i through exp(g_{j+1} + … + g_i): the
difference of two prefix sums. Where a log decay of −1e4 stands beside one of −0.01 such a difference would lose its
digits. So each log decay is split into a multiple of a small power of two, whose sums are exact, and a rest, whose sums
are small.

A decay for each key channel does not factor out of the product of query and key, and its parts alone, exp(sum to i) and
exp(−sum to j), overflow. Halving helps: the chunk is cut in two, each half again, and so on; the tokens i of a right
half see those j of the left half through the cut between them, so that exp(g_{j+1} + … + g_i) = exp(to the cut) ·
exp(from the cut), a matmul for each size of halves.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

FLOOR = -1000.0
"""A log decay below is a decay of exactly zero in float32 and float64, also minus infinity; sums of it stay finite."""

matmul = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class Decays(NamedTuple):
    """Decays of chunks, for log decays ``[..., chunk, channels]`` with one channel for all keys or one for each."""

    from_start: Float[Array, "*chunks chunk channels"]  # through the token itself
    to_end: Float[Array, "*chunks chunk channels"]  # behind the token
    total: Float[Array, "*chunks channels"]
    between: Float[Array, "*chunks chunk chunk"] | None  # from j (second) to i ≥ j; where there is one channel
    halves: Float[Array, "*chunks levels chunk channels"] | None  # to or from the cut; where there are more


def chunk_decays(log_decay: Float[Array, "*chunks chunk channels"]) -> Decays:
    """All decays of chunks whose length is a power of two."""
    chunk, channels = log_decay.shape[-2:]
    sums = _prefix_sums(log_decay)
    from_start = jnp.exp(sum(sums))
    to_end = _exp_difference(*((x[..., -1:, :], x) for x in sums))
    between = halves = None
    if channels == 1:
        earlier = ((x, x.swapaxes(-2, -1)) for x in sums)
        between = jnp.where(np.tri(chunk, dtype=bool), _exp_difference(*earlier), 0)
    else:
        cuts = np.stack([_cut(chunk, size) for size in _sizes(chunk)])
        right = np.stack([_is_right(chunk, size) for size in _sizes(chunk)])[..., None]
        pairs = ((x[..., None, :, :], jnp.take(x, cuts, axis=-2)) for x in sums)
        halves = _exp_difference(*((jnp.where(right, x, cut), jnp.where(right, cut, x)) for x, cut in pairs))
    return Decays(from_start, to_end, from_start[..., -1, :], between, halves)


def _prefix_sums(log_decay):
    """Prefix sums as two terms, the first exact."""
    chunk = log_decay.shape[-2]
    quantum = 2.0 ** (math.ceil(math.log2(-FLOOR * chunk)) - 24)  # float32 has 24 bits
    log_decay = jnp.maximum(log_decay, FLOOR)
    coarse = jnp.round(log_decay / quantum) * quantum
    lower = jnp.asarray(np.tri(chunk), log_decay.dtype)
    return tuple(matmul("it,...tc->...ic", lower, x) for x in (coarse, log_decay - coarse))


def _exp_difference(coarse, fine):
    """exp(later − earlier) of prefix sums; where they are in the wrong order, one."""
    return jnp.exp(jnp.minimum((coarse[0] - coarse[1]) + (fine[0] - fine[1]), 0))


def decayed_scores(
    q: Float[Array, "*chunks queries chunk key_dim"], k: Float[Array, "*chunks chunk key_dim"], decays: Decays
) -> Float[Array, "*chunks queries chunk chunk"]:
    """``Σ_c q_ic k_jc decay_ijc`` for j ≤ i, zero above the diagonal."""
    if decays.between is not None:
        return matmul("...rik,...jk->...rij", q, k) * decays.between[..., None, :, :]
    chunk = k.shape[-2]
    if chunk == 1:
        return jnp.sum(q * k[..., None, :, :], axis=-1, keepdims=True)
    rows = q[..., None, :, :] * decays.halves[..., None, :, :, :]
    columns = k[..., None, :, :] * decays.halves
    levels = matmul("...rlik,...ljk->...rlij", rows, columns)
    masks = np.stack([_mask(chunk, size) for size in _sizes(chunk)])
    diagonal = jnp.sum(q * k[..., None, :, :], axis=-1)
    return jnp.sum(jnp.where(masks, levels, 0), axis=-3) + diagonal[..., None] * np.eye(chunk, dtype=q.dtype)


def decayed_scores_gradient(
    dscores: Float[Array, "*chunks queries chunk chunk"],
    q: Float[Array, "*chunks queries chunk key_dim"],
    k: Float[Array, "*chunks chunk key_dim"],
    decays: Decays,
) -> tuple[Float[Array, "*chunks queries chunk key_dim"], Float[Array, "*chunks chunk key_dim"]]:
    """The cotangents of q and k for one of `decayed_scores`."""
    if decays.between is None:
        return jax.vjp(lambda q, k: decayed_scores(q, k, decays), q, k)[1](dscores)
    dscores = dscores * decays.between[..., None, :, :]
    dk = matmul("...jc,...ck->...jk", transposed(join_queries(dscores)), join_queries(q))
    return matmul("...rij,...jk->...rik", dscores, k), dk


def join_queries(x: Float[Array, "*chunks queries chunk dim"]) -> Float[Array, "*chunks rows dim"]:
    """One axis for queries and tokens: sums over both are sums over rows."""
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def invert_unit_triangular(lower: Float[Array, "*chunks chunk chunk"]) -> Float[Array, "*chunks chunk chunk"]:
    """``(1 + L)⁻¹``, L what is below the diagonal, by halving: ``[[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [−C⁻¹ B A⁻¹, C⁻¹]]``.

    As stable as substitution; the alternating series in powers of L is not, its terms cancel where keys are alike.
    """
    chunk = lower.shape[-1]
    if chunk == 1:
        return jnp.ones_like(lower)
    half = chunk // 2
    blocks = jnp.stack([lower[..., :half, :half], lower[..., half:, half:]], axis=-3)
    inverse = invert_unit_triangular(blocks)
    first, second = inverse[..., 0, :, :], inverse[..., 1, :, :]
    between = -matmul("...ij,...jk->...ik", matmul("...ij,...jk->...ik", second, lower[..., half:, :half]), first)
    top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([between, second], axis=-1)], axis=-2)


def transposed(matrix: Float[Array, "*chunks rows columns"]) -> Float[Array, "*chunks columns rows"]:
    """A transposition that stays one: XLA would fold it into a product that takes twice as long on a CPU."""
    return lax.optimization_barrier(matrix.swapaxes(-2, -1))


def _sizes(chunk):
    """The sizes of halves, from single tokens on."""
    return [1 << level for level in range(chunk.bit_length() - 1)]


def _mask(chunk, size):
    """Whether token i is in a right half and j in the left half before the same cut."""
    i, j = np.indices((chunk, chunk))
    right = _is_right(chunk, size)
    return (i // (2 * size) == j // (2 * size)) & right[:, None] & ~right


def _is_right(chunk, size):
    return np.arange(chunk) // size % 2 == 1


def _cut(chunk, size):
    """The last token before the cut of each token's pair of halves."""
    return np.arange(chunk) // (2 * size) * (2 * size) + size - 1
