"""What every causal mixer shares: checks of its arguments, segments, precision, fresh states, time in chunks.

A mixer is ``f(*inputs, state=None, segment_ids=None, implementation=None) -> (outputs, state)``; CONTRIBUTING.md
says how to write one with these functions, `primitives.testing` holds the laws that it must keep.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, DTypeLike, Int, Shaped


def check_shapes(**arguments: tuple[Any, str]) -> dict[str, int]:
    """Check arrays against named dimensions: ``check_shapes(q=(q, "batch time heads dim"), ...)``.

    A name stands for one size everywhere; `None` arrays are skipped. Returns the sizes by name.
    Raises `TypeError` for what is no array, `ValueError` for a wrong rank, a wrong size or a size of zero.
    """
    sizes: dict[str, int] = {}
    for argument, (array, dimensions) in arguments.items():
        if array is None:
            continue
        if not hasattr(array, "shape"):
            raise TypeError(f"{argument}: expected an array [{dimensions}], got {type(array).__name__}")
        names = dimensions.split()
        known = ", ".join(f"{name}={sizes[name]}" if name in sizes else name for name in names)
        fits = len(names) == len(array.shape)
        for name, size in zip(names, array.shape, strict=False):
            fits = fits and sizes.setdefault(name, size) == size
        if not fits:
            raise ValueError(f"{argument}: expected shape [{known}], got {tuple(array.shape)}")
        for name, size in zip(names, array.shape, strict=True):
            if isinstance(size, int) and size == 0:
                raise ValueError(f"{argument}: expected at least one element along {name}, got shape {array.shape}")
    return sizes


def check_floating(**arguments: Any) -> None:
    """Raise `TypeError` for an array that is not real floating point; `None` is skipped."""
    for argument, array in arguments.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{argument}: expected a floating point dtype, got {array.dtype}")


def check_inexact(**arguments: Any) -> None:
    """Raise `TypeError` for an array that is neither real nor complex floating point."""
    for argument, array in arguments.items():
        if not jnp.issubdtype(array.dtype, jnp.inexact):
            raise TypeError(f"{argument}: expected a real or complex floating point dtype, got {array.dtype}")


def check_segment_ids(segment_ids: Any) -> None:
    """Raise `TypeError` for segment ids that are not integers; ids are int32, so unsigned ones must be narrower.

    With x64 on, int64 is what integers are by default: taken, for values that int32 holds.
    """
    if segment_ids is None:
        return
    if segment_ids.dtype.name not in ("int8", "int16", "int32", "int64", "uint8", "uint16"):
        raise TypeError(f"segment_ids: expected int32 or a narrower integer dtype, got {segment_ids.dtype}")


def check_state(state: Any, kind: type, **dimensions: str) -> dict[str, tuple[Any, str]]:
    """Return the fields of a state for `check_shapes`; raise `TypeError` if it is not `None` or of its kind.

    Its arrays must have the dtypes of the annotations of the kind.
    """
    if state is not None and not isinstance(state, kind):
        raise TypeError(f"state: expected None or {kind.__name__}, got {type(state).__name__}")
    for field in dimensions if state is not None else ():
        expected, found = kind.__annotations__[field], getattr(state, field)
        if not hasattr(found, "dtype") or found.dtype.name not in expected.dtypes:
            what = getattr(found, "dtype", type(found).__name__)
            raise TypeError(f"state.{field}: expected {expected.__name__.partition('[')[0]} numbers, got {what}")
    return {f"state.{field}": (state and getattr(state, field), shape) for field, shape in dimensions.items()}


def check_implementation(implementation: str | None, known: Sequence[str]) -> None:
    """Raise `ValueError` for an implementation that does not exist."""
    if implementation is not None and implementation not in known:
        raise ValueError(f"implementation: expected None or one of {', '.join(known)}, got {implementation!r}")


def accumulation_dtype(*arrays: Array) -> jnp.dtype:
    """The dtype in which a mixer computes and keeps its state: float32, or wider if an input is."""
    return jnp.result_type(jnp.float32, *(array.dtype for array in arrays))


def fresh_like(array: Shaped[Array, "..."], fill: float, dtype: DTypeLike | None = None) -> Shaped[Array, "..."]:
    """A constant of an array's shape that also has its sharding and its varying mesh axes.

    A plain `jnp.zeros` as the first carry of a loop is refused under `shard_map` and under Explicit meshes.
    """
    array = lax.stop_gradient(array).astype(dtype or array.dtype)
    return jnp.where(jnp.zeros_like(array, bool), array, jnp.asarray(fill, array.dtype))


def empty_memory(array: Shaped[Array, "..."], dtype: DTypeLike | None = None) -> Shaped[Array, "..."]:
    """`fresh_like` of zeros, for a state that is multiplied by.

    The barrier hides from the compiler that it is a constant: XLA for CPUs (of jaxlib 0.12) fuses products with such,
    and a sum over them, into a call that reads memory which nothing has written.
    """
    return lax.optimization_barrier(fresh_like(array, 0, dtype))


def fresh_counter(segment_ids: Int[Array, "batch time"] | None, batch: int) -> Int[Array, " batch"]:
    """A zero per row, sharded as rows are: a position, or the segment of a state that is empty and so continues any."""
    return jnp.zeros(batch, jnp.int32) if segment_ids is None else fresh_like(segment_ids[:, 0], 0, jnp.int32)


def vary_together(*arrays: Shaped[Array, "..."]) -> list[Shaped[Array, "..."]]:
    """The same arrays, each varying over all the mesh axes that one of them varies over.

    A `custom_vjp` in a `shard_map` must return cotangents that vary as its arguments do. Those of a parameter vary as
    the tokens do; the sum that makes them one is the transposition of this.
    """
    never = sum(jnp.sum(fresh_like(array, 0)) for array in arrays) != 0
    return [jnp.where(never, array, array) for array in arrays]


class Segments(NamedTuple):
    """Segment ids as a recurrence uses them; the first two are `None` where there is one document, unpadded."""

    valid: Bool[Array, "batch time"] | None  # a token; False is padding
    reset: Bool[Array, "batch time"] | None  # the first token of a document that the carried state does not belong to
    last: Int[Array, " batch"]  # the id that the outgoing state carries


def segments(segment_ids: Int[Array, "batch time"] | None, carried: Int[Array, " batch"]) -> Segments:
    """Where to reset and what to skip, given the last non-negative id of each row so far.

    `None` continues the carried document. A negative id is padding: it neither resets nor is remembered.
    """
    if segment_ids is None:
        return Segments(None, None, carried)
    segment_ids = segment_ids.astype(carried.dtype)
    valid = segment_ids >= 0
    if segment_ids.shape[1] == 1:
        last = jnp.where(valid, segment_ids, carried[:, None])[:, 0]
        return Segments(valid, valid & (segment_ids != carried[:, None]), last)
    ids = jnp.concatenate([carried[:, None], segment_ids], axis=1)
    position = lax.cummax(jnp.where(ids >= 0, jnp.arange(ids.shape[1]), 0), axis=1)
    latest = jax.vmap(lambda ids, position: ids[position])(ids, position)
    return Segments(valid, valid & (segment_ids != latest[:, :-1]), latest[:, -1])


def count_tokens(
    segments: Segments, index: Int[Array, " batch"], start: Int[Array, " batch"], time: int
) -> tuple[Int[Array, "batch time"], Int[Array, "batch time"]]:
    """The number of every token in its row, from `index` on, and that of the first token of its document.

    Padding takes no number: it repeats that of the token before it. `start` is that of the carried document.
    """
    valid, reset, _ = segments
    if valid is None:
        number = index[:, None] + jnp.arange(time, dtype=index.dtype)
        return number, jnp.broadcast_to(start[:, None], number.shape)
    number = index[:, None] + jnp.cumsum(valid, axis=1, dtype=index.dtype) - 1
    return number, lax.cummax(jnp.where(reset, number, start[:, None]), axis=1)


def mask_padding(outputs: Shaped[Array, "batch time *rest"], valid: Bool[Array, "batch time"] | None):
    """Outputs with zeros (and so zero gradients) at padding."""
    return outputs if valid is None else jnp.where(valid.reshape(valid.shape + (1,) * (outputs.ndim - 2)), outputs, 0)


def pad_time(array: Shaped[Array, "batch time *rest"] | None, chunk: int, fill: Any):
    """Fill up the end of the time axis to a multiple of the chunk; `None` stays `None`.

    Raises `ValueError` for a symbolic length: forms that work in chunks need to know how many there are.
    """
    if array is None:
        return None
    if not isinstance(array.shape[1], int):
        raise ValueError(f"time: expected a static length for a form that works in chunks, got {array.shape[1]}")
    padding = [(0, 0), (0, -array.shape[1] % chunk)] + [(0, 0)] * (array.ndim - 2)
    return jnp.pad(array, padding, constant_values=fill)


def chunk_time(array: Shaped[Array, "batch time *rest"] | None, chunk: int):
    """``[chunks, batch, chunk, ...]`` for a scan over chunks; `None` stays `None`."""
    if array is None:
        return None
    return array.reshape(array.shape[0], -1, chunk, *array.shape[2:]).swapaxes(0, 1)


def unchunk_time(array: Shaped[Array, "chunks batch chunk *rest"], time: int) -> Shaped[Array, "batch time *rest"]:
    """The inverse of `chunk_time`."""
    array = array.swapaxes(0, 1)
    return array.reshape(array.shape[0], -1, *array.shape[3:])[:, :time]


def time_index(tree: Any, t: Any, size: int | None = None) -> Any:
    """``x[:, t]`` of every array, or ``x[:, t : t + size]``, for a traced t."""
    return jax.tree.map(
        lambda x: lax.dynamic_slice_in_dim(x, t, size, 1) if size else lax.dynamic_index_in_dim(x, t, 1, False), tree
    )


def time_update(tree: Any, rows: Any, t: Any) -> Any:
    """Write what `time_index` reads, for a traced t; a loop does this in place."""

    def update(x, row):
        return lax.dynamic_update_slice_in_dim(x, row.astype(x.dtype).reshape(x.shape[0], -1, *x.shape[2:]), t, axis=1)

    return jax.tree.map(update, tree, rows)
