"""What the TPU kernels share: matmuls that say their precision, blocks of heads, one call per device of a mesh."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

LANES = 128  # of a vector register: the last dimension of a block is a multiple of it, or whole


def dot(a: Float[Array, "..."], b: Float[Array, "k n"], transpose_a: bool = False) -> Float[Array, "m n"]:
    """``a @ b`` or ``a.T @ b`` in float32 for a float32 `a`, to 16 bits of `a` where `b` is bfloat16."""
    dimensions = (((0 if transpose_a else 1,), (0,)), ((), ()))
    product = functools.partial(lax.dot_general, dimension_numbers=dimensions, preferred_element_type=jnp.float32)
    if b.dtype == jnp.float32:
        return product(a, b, precision=lax.Precision.HIGHEST)
    leading = a.astype(b.dtype)
    return product(leading, b) + product((a - leading.astype(a.dtype)).astype(b.dtype), b)


def head_block(heads: int, dim: int, most: int) -> int | None:
    """The most heads whose values side by side, at most ``most`` numbers, make a legal block; `None` if none do."""
    sizes = (n for n in range(heads, 0, -1) if heads % n == 0 and n * dim <= most)
    return next((n for n in sizes if n == heads or n * dim % LANES == 0), None)


def varying_like(operands: tuple[Array, ...], *results: Array) -> list[jax.ShapeDtypeStruct]:
    """Output types of a kernel: those of `results`, varying over every manual mesh axis that an operand varies over."""

    def every(operands, results):
        zero = sum(jnp.zeros_like(x, jnp.float32).ravel()[0] for x in operands)
        return [x + zero.astype(x.dtype) for x in results]

    return jax.eval_shape(every, operands, results)


def per_device(kernel: Callable, values: Array, arguments: str, results: str) -> Callable:
    """Wrap a kernel in `shard_map` over batch and heads, as an Explicit mesh shards `values`; else return it as it is.

    A kernel is no operation that XLA can partition. ``arguments`` and ``results`` name the dimensions of the arrays in
    order, as in ``"bth bthd bt"``: b is split like the first dimension of `values` (b, t, h, d), h like the third.
    """
    sharding = jax.typeof(values).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return kernel
    batch, _, heads, _ = sharding.spec
    splits = {"b": batch, "h": heads}
    in_specs, out_specs = (
        tuple(PartitionSpec(*map(splits.get, array)) for array in arrays.split()) for arrays in (arguments, results)
    )

    def reshard(x, spec):
        return None if x is None else jax.sharding.reshard(x, spec)

    mapped = jax.shard_map(kernel, in_specs=in_specs, out_specs=out_specs)
    return lambda *operands: mapped(*map(reshard, operands, in_specs))
