"""What the TPU kernels share: precise matmuls, the grid over chunks of time, one call per device of a mesh."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

LANES = 128  # of a vector register: the last dimension of a block is a multiple of it, or whole
CHUNK = LANES  # of time: a chunk of scalars fills a register's lanes


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


def per_device(
    kernel: Callable, values: Float[Array, "batch time heads dim"], arguments: str, results: str
) -> Callable:
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


class ChunkGrid(NamedTuple):
    """A kernel's grid of (batch, block of heads, chunk of time), the chunks in order.

    The methods turn an array into what the kernel sees of it: a pair of the array in another shape and of the block of
    that array that a step of the grid reads or writes. Values stay as the projections before and after the kernel
    write and read them, ``[batch, time, heads · dim]``, so that nothing is transposed; a head is a slice of lanes.
    Scalars per token and head come heads first, so that a chunk of them is a row of lanes.
    """

    batch: int
    time: int
    heads: int
    dim: int
    block: int  # of so many heads
    reverse: bool  # the last chunk first

    @classmethod
    def over(cls, values: Float[Array, "batch time heads dim"], width: int, reverse: bool = False) -> "ChunkGrid":
        """The grid for some values, in blocks of at most `width` lanes."""
        return cls(*values.shape, head_block(*values.shape[2:], width), reverse)

    @property
    def chunks(self) -> int:
        """How many chunks cover the time."""
        return pl.cdiv(self.time, CHUNK)

    def chunk(self, step: int | Array) -> int | Array:
        """The chunk that comes at a step."""
        return self.chunks - 1 - step if self.reverse else step

    def lanes(self, x):
        """``[batch, time, heads, dim]``: a chunk of values, heads side by side."""
        block = pl.BlockSpec((None, CHUNK, self.block * self.dim), lambda b, h, c: (b, self.chunk(c), h))
        return x.reshape(self.batch, self.time, -1), block

    def rows(self, x, **padding):
        """``[batch, time, heads]``: a chunk of scalars, heads first; whole chunks, by `jnp.pad` with `padding`."""
        x = jnp.pad(x, [(0, 0), (0, -self.time % CHUNK), (0, 0)], **padding).swapaxes(1, 2)
        block = pl.BlockSpec((None, None, self.block, CHUNK), lambda b, h, c: (b, h, 0, self.chunk(c)))
        return x.reshape(self.batch, -1, self.block, x.shape[2]), block

    def unrows(self, x):
        """What `rows` takes, of what it makes."""
        return x.reshape(self.batch, self.heads, -1)[..., : self.time].swapaxes(1, 2)

    def first(self, reset):
        """``[batch, time]`` of resets, or `None`: the first token that each sees, −1 if it sees what was carried in."""
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
        block = pl.BlockSpec((None, None, self.block, 1), lambda b, h, c: (b, h, 0, 0))
        return x.reshape(self.batch, -1, self.block, 1), block

    def call(self, name, kernel, operands, results, scratch=0):
        """Run ``kernel(time, dim, *operand_refs, *result_refs, *scratch_refs)``; results are like given pairs.

        Scratch is a float32 per head, ``[block, 1]``. Traced without x64, so that indices are 32 bits wide.
        """
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
                name=name,
            )(*arrays)
