"""Feed a trained model one token at a time: what its state costs in bytes, and the tokens in time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from experiments.measure import fastest_call
from experiments.trainer import progress
from zoo import grow_state, state_bytes

__all__ = ["Stream", "stream"]


class Stream(NamedTuple):
    """Measured after every block of tokens."""

    tokens: list[int]
    """Tokens so far."""
    used_bytes: list[int]
    """Bytes of the state, without free slots of caches."""
    allocated_bytes: list[int]
    """Bytes of the state as it is in memory."""
    seconds: list[float]
    """Cumulative time, without compilation and without the copies of caches that grow."""


def stream(
    model: nnx.Module, inputs: Float[Array, "tokens channels"], *, block: int, repeats: int, label: str
) -> Stream:
    """Feed `inputs` to a model as one document, one token per step; caches start with a block and grow by doubling.

    A block is a `lax.scan` over steps with one token, so that a step's time is not that of calling it from Python. It
    is compiled for each capacity before the clock runs; each block counts with the fastest of its repeats.

    Raises `ValueError` unless the number of tokens is a multiple of the block.
    """
    if len(inputs) % block:
        raise ValueError(f"inputs: expected a multiple of {block} tokens, got {len(inputs)}")

    @jax.jit
    def advance(model, state, tokens):
        def step(state, token):
            outputs, state = model(token[None, None], state)
            return state, outputs[0]

        return jax.lax.scan(step, state, tokens)

    blocks = jnp.asarray(inputs).reshape(-1, block, inputs.shape[-1])
    state, capacity, compiled = model.init_state(1, block), block, {}
    result = Stream([], [], [], [])
    with progress(f"streaming {label}", 0, len(inputs), unit="token") as bar:
        for index, tokens in enumerate(blocks, start=1):
            if index * block > capacity:
                capacity *= 2
                state = grow_state(state, capacity)
            if (key := str(jax.tree.map(jnp.shape, state))) not in compiled:
                compiled[key] = advance.lower(model, state, tokens).compile()
            seconds, (state, _) = fastest_call(compiled[key], model, state, tokens, repeats=repeats)
            used, allocated = state_bytes(state)
            total = seconds + (result.seconds[-1] if result.seconds else 0.0)
            for series, value in zip(result, (index * block, used, allocated, total), strict=True):
                series.append(value)
            bar.update(block)
    return result
