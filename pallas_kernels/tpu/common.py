"""What the TPU kernels share: matmuls of a stated precision, blocks of heads, one call per device of a mesh."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

LANES = 128  # of a vector register: the last dimension of a block is a multiple of it, or whole


def dot(a: Float[Array, "..."], b: Float[Array, "k n"], *, transpose: bool = False) -> Float[Array, "m n"]:
    """``a @ b``, or ``a.T @ b``, for a float32 `a`, in float32.

    A float32 `b` takes six passes of the matrix unit. A bfloat16 `b` takes two, one for the leading and one for the
    trailing eight bits of `a`, so that only what came in rounded is rounded.
    """
    dimensions = (((0 if transpose else 1,), (0,)), ((), ()))
    product = functools.partial(lax.dot_general, dimension_numbers=dimensions, preferred_element_type=jnp.float32)
    if b.dtype == jnp.float32:
        return product(a, b, precision=lax.Precision.HIGHEST)
    leading = a.astype(b.dtype)
    return product(leading, b) + product((a - leading).astype(b.dtype), b)


def head_block(heads: int, dim: int, most: int) -> int | None:
    """How many heads, side by side, make a block of at most `most` lanes; `None` if no divisor of `heads` does.

    Kernels are unrolled over the heads of a block, so small ones count as 32 lanes.
    """
    sizes = (n for n in range(heads, 0, -1) if heads % n == 0 and n * max(dim, 32) <= most)
    return next((n for n in sizes if n == heads or n * dim % LANES == 0), None)


def varying_like(operands: Sequence[Array], results: Sequence[Array]) -> list[jax.ShapeDtypeStruct]:
    """Output types of a kernel: those of `results`, varying over every manual mesh axis that an operand varies over."""

    def types(operands, results):
        zero = sum(x.ravel()[0].astype(jnp.float32) for x in operands)
        return [x + zero.astype(x.dtype) for x in results]

    return jax.eval_shape(types, operands, results)


def vmap_into_batch(kernel: Callable) -> Callable:
    """A kernel under `jax.vmap` as one call with a longer batch: the first dimension of all that it takes and returns.

    That saves a dimension of the grid, and the interpreter refuses one that `vmap` adds to stated semantics.
    """
    call = jax.custom_batching.custom_vmap(kernel)

    @call.def_vmap
    def _(size, batched, *operands):
        def fold(x, batched):
            x = x if batched else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = call(*jax.tree.map(fold, operands, tuple(batched)))
        return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results), jax.tree.map(lambda _: True, results)

    return call


def per_device(kernel: Callable, values: Float[Array, "batch time heads dim"], arguments: str, results: str) -> Callable:
    """A kernel as one call per device of an Explicit mesh, over batch and heads as `values` are sharded.

    XLA cannot partition a kernel. `arguments` and `results` spell the dimensions of the arrays, as in ``"bth bthd"``:
    every b is sharded like that of `values`, every h too, and nothing else is. Without an Explicit mesh the kernel
    returns as it is.
    """
    sharding = jax.typeof(values).sharding
    axes = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    if AxisType.Explicit not in axes.values():
        return kernel
    batch, _, heads, _ = sharding.spec
    split = {"b": batch, "h": heads}
    in_specs, out_specs = (
        tuple(PartitionSpec(*map(split.get, dimensions)) for dimensions in arrays.split())
        for arrays in (arguments, results)
    )
    axis_names = {name for name, kind in axes.items() if kind != AxisType.Manual}
    mapped = jax.shard_map(kernel, in_specs=in_specs, out_specs=out_specs, axis_names=axis_names)

    def call(*operands):
        pairs = zip(operands, in_specs, strict=True)
        return mapped(*(x if x is None else jax.sharding.reshard(x, spec) for x, spec in pairs))

    return call
