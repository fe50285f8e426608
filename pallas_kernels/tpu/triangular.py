"""The inverse of a unit triangular matrix of a chunk, inside a kernel.

By halving, as `primitives.decays.invert_unit_triangular`: ``[[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [−C⁻¹ B A⁻¹, C⁻¹]]``, for
all blocks of a size at once. It is as stable as substitution; an alternating series in powers of L is not: its terms
cancel where keys are alike.

While blocks are small, most of a matrix ``[chunk, chunk]`` would be zeros. So blocks of a size are kept side by side: a
*strip* ``[size, chunk]``, in the lanes that they have in the matrix. A strip times a matrix with blocks along its
diagonal is a strip again, and takes the matrix unit the time of `size` rows, not of 128. Blocks of 8, which are one
register, are solved by substitution.

The chain of products is long, and each waits for the one before. So kernels run it for several heads side by side, by
`jax.vmap`, which interleaves their steps; the compiler does not interleave one head's program with the next. Bundles
per token and head that it schedules on v5e (v6e), products in three passes: head by head, halving whole matrices, 26.5
(26.2); strips 12.1 (16.4); strips, four heads side by side, 4.7 (5.6), eight 2.8 (4.3).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.tpu.common import CHUNK, dot

SMALL = 8  # rows of a register


def invert_unit_triangular(lower: Float[Array, "chunk chunk"], precision: lax.Precision) -> Float[Array, "chunk chunk"]:
    """``(1 + L)⁻¹``, for an L that is zero on the diagonal and above; precision is that of its products."""
    inverse, size = _substitute(_strip(lower, SMALL)), SMALL
    while size < CHUNK:
        between = dot(_strip_below(lower, size), _along_diagonal(inverse, size), precision=precision)
        between = dot(inverse, _below_diagonal(between, size), precision=precision)
        left = _lane(size) & size == 0
        inverse = jnp.concatenate([jnp.where(left, inverse, 0), jnp.where(left, -between, inverse)])
        size *= 2
    return inverse


def _substitute(lower):
    """The inverse of blocks of `SMALL` rows: one row after another is taken out of those below it."""
    column, row = _lane(SMALL) & (SMALL - 1), lax.broadcasted_iota(jnp.int32, (SMALL, CHUNK), 0)
    inverse = jnp.where(column == row, 1.0, 0.0)
    for j in range(SMALL - 1):
        factors = jnp.where(column == j, lower, 0)
        for level in range(j.bit_length()):
            factors += jnp.roll(factors, -(1 << level), axis=1)  # to the columns before, where row j is not yet zero
        inverse -= factors * inverse[j : j + 1]
    return inverse


def _strip(matrix, size):
    """The blocks on the diagonal."""
    return sum(jnp.where(_block(size) == n, rows, 0) for n, rows in enumerate(_rows(matrix, size)))


def _strip_below(matrix, size):
    """The blocks of right halves and the left halves before them, in the lanes of the latter."""
    pairs = enumerate(_rows(matrix, size)[1::2])
    return sum(jnp.where(_block(size) == 2 * n, rows, 0) for n, rows in pairs)


def _along_diagonal(strip, size):
    """The matrix with the blocks of a strip on its diagonal."""
    return jnp.concatenate([jnp.where(_block(size) == n, strip, 0) for n in range(CHUNK // size)])


def _below_diagonal(strip, size):
    """The matrix with the blocks of a strip one block below the diagonal; of every second block row."""
    return jnp.concatenate([jnp.where(_block(size) == n - 1, strip, 0) * (n % 2) for n in range(CHUNK // size)])


def _rows(matrix, size):
    return [matrix[n : n + size] for n in range(0, CHUNK, size)]


def _block(size):
    """The block that a lane of a strip belongs to."""
    return _lane(size) >> (size.bit_length() - 1)


def _lane(size):
    return lax.broadcasted_iota(jnp.int32, (size, CHUNK), 1)
