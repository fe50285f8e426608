"""States of models as wholes: a fresh one, a larger one, and how many bytes it takes."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Shaped

from primitives import AttentionState, grow_attention_state


def init_state(model: nnx.Module, inputs: Shaped[Array, "batch one ..."], capacity: int = 1) -> Any:
    """The fresh state of a mixer, block, stack or model for inputs like these: what it returns after padding only."""
    _, state = model(inputs, segment_ids=jnp.full(inputs.shape[:2], -1))
    return grow_state(state, capacity)


def grow_state(state: Any, capacity: int) -> Any:
    """The same state with room for `capacity` tokens in its caches; other states stay as they are.

    Additional leading axes, of stacked layers or models, stay too.
    Raises `ValueError` for less than the present capacity.
    """

    def grow(node):
        if not _is_cache(node):
            return node
        function = functools.partial(grow_attention_state, capacity=capacity)
        for _ in range(node.index.ndim - 1):
            function = jax.vmap(function)
        return function(node)

    return jax.tree.map(grow, state, is_leaf=_is_cache)


class StateBytes(NamedTuple):
    """Bytes of a state."""

    used: int  # without the free slots of caches
    allocated: int


def state_bytes(state: Any) -> StateBytes:
    """Count the bytes of a concrete state of any model, also with additional leading axes (of a `vmap`)."""
    allocated = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = sum(_free_bytes(node) for node in jax.tree.leaves(state, is_leaf=_is_cache) if _is_cache(node))
    return StateBytes(allocated - free, allocated)


def _is_cache(node):
    return isinstance(node, AttentionState)


def _free_bytes(cache):
    capacity = cache.keys.shape[-3]
    bytes_per_slot = (cache.keys.nbytes + cache.values.nbytes) // (cache.index.size * capacity)
    return bytes_per_slot * int(jnp.sum(jnp.maximum(capacity - cache.index, 0)))


def parameter_dtype(model: nnx.Module) -> jnp.dtype:
    """The dtype of a model's parameters."""
    return jax.tree.leaves(model)[0].dtype
