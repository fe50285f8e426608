"""Decays between the tokens of a chunk, as products that never leave [0, 1].

Within a chunk of C tokens with log decays g ≤ 0, token i sees token j ≤ i through exp(g_{j+1} + … + g_i). Such sums are
taken over exactly their terms, as matmuls with constant matrices of zeros and ones: the difference of two prefix sums
would lose its digits where a log decay of −1e4 stands beside one of 0, and exp(−prefix) would overflow.

A decay for each key channel does not factor out of the product of query and key. Halving does it: the chunk is cut in
two, each half again, and so on; the tokens i of a right half see those j of the left half through the cut between them,
so that exp(g_{j+1} + … + g_i) = exp(to the cut) · exp(from the cut), a matmul for each size of halves.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

FLOOR = -1000.0
"""A log decay below is a decay of exactly zero in float32 and float64, −inf among them: sums of it stay finite."""

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
    log_decay = jnp.maximum(log_decay, FLOOR)

    def products(terms):
        return jnp.exp(matmul("...tc,xt->...xc", log_decay, jnp.asarray(terms.reshape(-1, chunk), log_decay.dtype)))

    i, t = np.indices((chunk, chunk))
    edges = products(np.concatenate([t <= i, t > i]))
    from_start, to_end = edges[..., :chunk, :], edges[..., chunk:, :]
    between = halves = None
    if channels == 1:
        i, j, t = np.indices((chunk,) * 3)
        between = products((j < t) & (t <= i)).reshape(*log_decay.shape[:-2], chunk, chunk)
        between = jnp.where(np.tri(chunk, dtype=bool), between, 0)
    else:
        halves = products(np.stack([_terms(chunk, size) for size in _sizes(chunk)]))
        halves = halves.reshape(*log_decay.shape[:-2], -1, chunk, channels)
    return Decays(from_start, to_end, from_start[..., -1, :], between, halves)


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


def invert_unit_triangular(
    strictly_lower: Float[Array, "*chunks chunk chunk"],
) -> Float[Array, "*chunks chunk chunk"]:
    """``(1 + L)⁻¹`` by halving: of a block ``[[A, 0], [B, C]]`` it is ``[[A⁻¹, 0], [−C⁻¹ B A⁻¹, C⁻¹]]``.

    As stable as substitution, unlike the series ``1 − L + L² − …``, whose terms cancel where keys resemble each other.
    """
    chunk = strictly_lower.shape[-1]
    inverse = jnp.broadcast_to(np.eye(chunk, dtype=strictly_lower.dtype), strictly_lower.shape)
    for size in _sizes(chunk):
        between = jnp.where(_mask(chunk, size), strictly_lower, 0)
        if size > 1:  # before, the inverses are those of single ones
            between = matmul("...ij,...jk,...kl->...il", inverse, between, inverse)
        inverse = inverse - between
    return inverse


def _sizes(chunk):
    """The sizes of halves, from single tokens on."""
    return [1 << level for level in range(chunk.bit_length() - 1)]


def _mask(chunk, size):
    """Whether token i is in a right half and j in the left half before the same cut."""
    i, j = np.indices((chunk, chunk))
    return (i // (2 * size) == j // (2 * size)) & (i // size % 2 == 1) & (j // size % 2 == 0)


def _terms(chunk, size):
    """The log decays between each token and its cut: up to a token of a right half, behind one of a left half."""
    i, t = np.indices((chunk, chunk))
    return (i // size == t // size) & np.where(i // size % 2 == 1, t <= i, t > i)
