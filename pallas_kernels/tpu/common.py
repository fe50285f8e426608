"""What the TPU kernels share: precise matmuls, the grid over chunks of time, one call per device of a mesh."""

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, DTypeLike, Float

LANES = 128  # of a vector register: the last dimension of a block is a multiple of it, or whole
CHUNK = LANES  # of time: a chunk of scalars fills a register's lanes
DIM = 256  # of a key or a value of a memory, at most
QUERIES = 1024  # lanes of the queries of a head, at most
# Heads of 128 lanes that a kernel computes side by side, for each kind of decay and dtype: those with which compilers
# schedule the fewest bundles, as `python -m experiments kernel_costs --write-table` found.
SIDE_BY_SIDE = json.loads(Path(__file__).with_name("side_by_side.json").read_text())


def dot(
    a: Float[Array, "*heads _ _"],
    b: Float[Array, "*heads _ _"],
    axes: tuple[int, int] = (1, 0),
    precision: lax.Precision = lax.Precision.HIGHEST,
    parts: int = 2,
) -> Float[Array, "*heads m n"]:
    """Products of two matrices, summed over an axis of each, in float32.

    Only what came in rounded is rounded: two bfloat16 operands take one pass of the matrix unit; a float32 one beside a
    bfloat16 one takes one for each of its `parts` of eight bits, of which three are all; two of float32 take six, or
    three if `precision` is high: then the trailing bits of one do not meet those of the other.
    """
    batch = tuple(range(a.ndim - 2))
    dimensions = tuple((len(batch) + axis,) for axis in axes), (batch, batch)
    product = functools.partial(lax.dot_general, dimension_numbers=dimensions, preferred_element_type=jnp.float32)
    if a.dtype == b.dtype == jnp.float32:
        if precision == lax.Precision.HIGHEST:
            return product(a, b, precision=precision)
        # Spelled out, so that what is interpreted on a CPU is what a TPU computes.
        (a, a_rest), (b, b_rest) = ([part.astype(jnp.bfloat16) for part in _split(x, 2)] for x in (a, b))
        return product(a, b) + (product(a, b_rest) + product(a_rest, b))
    if a.dtype == jnp.float32:
        return sum(product(part.astype(b.dtype), b) for part in _split(a, parts))
    if b.dtype == jnp.float32:
        return sum(product(a, part.astype(a.dtype)) for part in _split(b, parts))
    return product(a, b)


def enough_for(dtype) -> lax.Precision:
    """The precision of products of float32 that are derived from inputs of a dtype, not to be noticed beside these."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.HIGH


def _split(x, parts):
    """A finite float32 as a sum of parts, each, but for the last, rounded to what bfloat16 can hold.

    By their bits: XLA, which interprets kernels on a CPU, may drop a cast to bfloat16 and back.
    """
    for _ in range(parts - 1):
        bits = lax.bitcast_convert_type(x, jnp.int32) + (1 << 15)
        leading = lax.bitcast_convert_type(bits & -(1 << 16), jnp.float32)
        yield leading
        x -= leading
    yield x


def load(ref, lanes: slice, chunk: int | Array, time: int) -> Float[Array, "chunk dim"]:
    """A head of a block of values, zero beyond the end of the array: what a block holds there is undefined."""
    x = ref[:, lanes]
    if time % CHUNK == 0:
        return x
    return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 0) < time - chunk * CHUNK, x, 0)


def head_block(heads: int, most: int, *dims: int) -> int | None:
    """How many heads, side by side, make blocks of at most `most` lanes; `None` if no divisor of `heads` does.

    `dims` are the numbers of lanes that a head takes in the arrays of a kernel. Kernels are unrolled over the heads of
    a block, so small ones count as 32 lanes.
    """
    sizes = (n for n in range(heads, 0, -1) if heads % n == 0 and n * max(*dims, 32) <= most)
    return next((n for n in sizes if n == heads or all(n * dim % LANES == 0 for dim in dims)), None)


def general_refusal(x: Array) -> str | None:
    """Why no kernel can serve such an array, or `None`."""
    if not all(isinstance(size, int) for size in x.shape):
        return f"it needs static shapes, got {x.shape}"
    if AxisType.Auto in (jax.typeof(x).sharding.mesh.axis_types or ()):
        return "XLA cannot split it over Auto axes of a mesh; it needs Explicit ones or a shard_map over all axes"
    return None


def memory_refusal(q: Array, k: Array, v: Array, g: Array) -> str | None:
    """Why no kernel with a memory for each head can serve these inputs, or `None`."""
    if reason := general_refusal(v):
        return reason
    dtypes = {x.dtype for x in (q, k, v)}
    if g.dtype != jnp.float32 or len(dtypes) > 1 or v.dtype not in (jnp.float32, jnp.bfloat16):
        got = ", ".join(str(x.dtype) for x in (q, k, v))
        return f"it takes float32 or bfloat16 q, k and v and computes in float32, got {got} to compute in {g.dtype}"
    most = max(q.shape[-1], v.shape[-1])
    if most > DIM or q.shape[3] * most > QUERIES:
        limits = f"{DIM}, and {QUERIES} with all queries of a head"
        return f"it needs key_dim and value_dim of at most {limits}, got {memory_sizes(q, v)}"
    return None


def memory_sizes(q: Array, v: Array) -> str:
    """The sizes that decide whether a kernel can serve such inputs."""
    (heads, queries, key_dim), value_dim = q.shape[2:], v.shape[-1]
    return f"{heads=}, {queries=}, {key_dim=}, {value_dim=}"


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


def per_device(kernel: Callable, like: Array, dimensions: str, arguments: str, results: str) -> Callable:
    """A kernel as one call per device of an Explicit mesh, split as `like` is.

    XLA cannot partition a kernel. A letter is a dimension, t is time and never split: `dimensions` spells the first of
    `like`, `arguments` and `results` those of the arrays, as in ``"bth bthd"``, where a letter that `like` has not is
    not split. Without an Explicit mesh the kernel returns as it is.
    """
    sharding = jax.typeof(like).sharding
    axes = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    if AxisType.Explicit not in axes.values():
        return kernel
    split = dict(zip(dimensions, sharding.spec, strict=False)) | {"t": None}
    in_specs, out_specs = (
        tuple(PartitionSpec(*map(split.get, letters)) for letters in arrays.split()) for arrays in (arguments, results)
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
    that array that a step of the grid reads or writes; of a result, only the type of the array is needed. Values stay
    as the projections before and after the kernel write and read them, ``[batch, time, heads · dim]``, so that nothing
    is transposed; a head is a slice of lanes. Scalars per token and head come heads first, so that a chunk of them is a
    row of lanes.
    """

    batch: int
    time: int
    heads: int
    block: int  # of so many heads
    reverse: bool  # the last chunk first

    @classmethod
    def over(cls, width: int, *values: Float[Array, "batch time heads ..."], reverse: bool = False) -> "ChunkGrid":
        """The grid for arrays of values, in blocks of at most `width` lanes."""
        shape = values[0].shape[:3]
        return cls(*shape, head_block(shape[2], width, *(math.prod(x.shape[3:]) for x in values)), reverse)

    @property
    def chunks(self) -> int:
        """How many chunks cover the time."""
        return pl.cdiv(self.time, CHUNK)

    def chunk(self, step: int | Array) -> int | Array:
        """The chunk that comes at a step."""
        return self.chunks - 1 - step if self.reverse else step

    def lanes(self, x):
        """``[batch, time, heads, ...]``: a chunk of values, heads side by side."""
        dim = math.prod(x.shape[3:])
        block = pl.BlockSpec((None, CHUNK, self.block * dim), lambda b, h, c: (b, self.chunk(c), h))
        return _reshape(x, self.batch, self.time, self.heads * dim), block

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
        shape = (None, None, 1, self.block * x.shape[2])
        x = jnp.concatenate([x.reshape(self.batch, 1, -1), *later], axis=1)
        return x[:, :, None], pl.BlockSpec(shape, lambda b, h, c: (b, self.chunk(c) if later else 0, 0, h))

    def scalars(self, x):
        """``[batch, heads]``: a scalar per head."""
        block = pl.BlockSpec((None, None, self.block, 1), lambda b, h, c: (b, h, 0, 0))
        return x.reshape(self.batch, -1, self.block, 1), block

    def states(self, x):
        """``[batch, heads, key_dim, value_dim]``: a matrix per head."""
        return x, pl.BlockSpec((None, self.block, *x.shape[2:]), lambda b, h, c: (b, h, 0, 0))

    def chunk_states(self, x):
        """``[batch, chunks, heads, key_dim, value_dim]``: a matrix per chunk and head."""
        return x, pl.BlockSpec((None, None, self.block, *x.shape[3:]), lambda b, h, c: (b, self.chunk(c), h, 0, 0))

    def whole(self, x):
        """A constant matrix, the same for every step."""
        return x, pl.BlockSpec(x.shape, lambda b, h, c: (0, 0))

    def call(self, name, kernel, operands, results, scratch=()):
        """Run ``kernel(*operand_refs, *result_refs, *scratch_refs)``; results are like given pairs.

        `scratch` are shapes of float32. Traced without x64, so that indices are 32 bits wide.
        """
        (arrays, in_specs), (likes, out_specs) = zip(*operands, strict=True), zip(*results, strict=True)
        with jax.enable_x64(False):
            return pl.pallas_call(
                kernel,
                out_shape=varying_like(arrays, likes),
                grid=(self.batch, self.heads // self.block, self.chunks),
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
                compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
                name=name,
            )(*arrays)


def _reshape(x, *shape):
    """An array, or the type of one, in another shape."""
    return jax.ShapeDtypeStruct(shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x.reshape(shape)


def group_heads(heads: int, queries: int, most: int) -> Iterator[tuple[range, list[range]]]:
    """Heads that are computed side by side, at most so many, and the numbers of each one's first query, second, …

    The compiler hardly mixes the instructions of heads that come one after another, but those of stacked ones it does.
    """
    size = next(n for n in range(most, 0, -1) if heads % n == 0)
    for n in range(0, heads, size):
        yield range(n, n + size), [range(n * queries + r, (n + size) * queries, queries) for r in range(queries)]


def side_by_side(kernel: str, channels: int, dtype: DTypeLike) -> int:
    """How many heads of 128 lanes a kernel computes side by side, at most."""
    return SIDE_BY_SIDE[kernel][f"{'scalar' if channels == 1 else 'channels'}, {jnp.dtype(dtype).name}"]


def load_heads(ref, heads: range, dim: int, chunk: int | Array, time: int) -> Float[Array, "heads chunk dim"]:
    """Heads of a block of values, stacked."""
    return jnp.stack([load(ref, slice(h * dim, (h + 1) * dim), chunk, time) for h in heads])


def store_heads(ref, heads: range, values: Float[Array, "heads chunk dim"]) -> None:
    """Write what `load_heads` reads."""
    dim = values.shape[-1]
    for h, x in zip(heads, values, strict=True):
        ref[:, h * dim : (h + 1) * dim] = x.astype(ref.dtype)


def stack_heads[T](trees: Iterable[T]) -> T:
    """What there is for each head as arrays with an axis of heads."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def wide_columns(rows: Float[Array, "n tokens"]) -> list[Float[Array, "tokens lanes"]]:
    """Rows as columns, each over all lanes: matrices of which entry (i, j) is entry i of a row. Finite numbers only.

    By one pass of the matrix unit over three bfloat16 parts, which together are exact. To permute lanes for 128 tokens
    occupies the units that can do it about six times as long; with this the backward kernel of the prefix scan has a
    third of the bundles (v5e).
    """
    n = rows.shape[0]
    parts = jnp.concatenate(list(_split(rows, 3))).T.astype(jnp.bfloat16)
    row = lax.broadcasted_iota(jnp.int32, (3 * n, LANES), 0) % n
    ones = ((row == i).astype(jnp.float32).astype(jnp.bfloat16) for i in range(n))
    return [jnp.dot(parts, one, preferred_element_type=jnp.float32) for one in ones]
