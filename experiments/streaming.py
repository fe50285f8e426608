"""Feed a trained model one token at a time: what its state costs in bytes, and the tokens in time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Shaped

from experiments.measure import fastest_call, growth_exponent
from experiments.trainer import progress
from zoo import grow_state, state_bytes

__all__ = ["Stream", "stream", "summarise"]


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
    model: nnx.Module,
    inputs: Shaped[Array, "steps ..."] | tuple[Shaped[Array, "steps ..."], ...],
    *,
    block: int,
    repeats: int,
    label: str,
    tokens_per_step: int = 1,
) -> Stream:
    """Feed `inputs` to a model as one document, step by step; caches start with a block and grow by doubling.

    A block is a `lax.scan` over single steps, so that a step's time is not that of calling it from Python. It is
    compiled for each capacity before the clock runs; each block counts with the fastest of its repeats.

    Args:
        model: Called as ``model(*inputs, state)``, with a batch of one and a time of one.
        inputs: One array, or those of a model with several.
        block: Steps between measurements.
        repeats: Times that each block is measured.
        label: What the progress bar shows.
        tokens_per_step: That a step puts into a cache.

    Raises:
        ValueError: The number of steps is not a multiple of the block, or differs between inputs.
    """
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    steps, *others = map(len, inputs)
    if steps % block or {steps, *others} != {steps}:
        raise ValueError(f"inputs: expected a multiple of {block} tokens, got {sorted({steps, *others})}")

    @jax.jit
    def advance(model, state, tokens):
        def step(state, token):
            outputs, state = model(*(x[None, None] for x in token), state)
            return state, jax.tree.map(lambda x: x[0], outputs)

        return jax.lax.scan(step, state, tokens)

    blocks = [tuple(jnp.asarray(x[at : at + block]) for x in inputs) for at in range(0, steps, block)]
    state, capacity, compiled = model.init_state(1, block), block, {}
    result = Stream([], [], [], [])
    with progress(f"streaming {label}", 0, steps, unit="token") as bar:
        for index, tokens in enumerate(blocks, start=1):
            if index * block > capacity:
                capacity *= 2
                state = grow_state(state, capacity * tokens_per_step)
            if (key := str(jax.tree.map(jnp.shape, state))) not in compiled:
                compiled[key] = advance.lower(model, state, tokens).compile()
            seconds, (state, _) = fastest_call(compiled[key], model, state, tokens, repeats=repeats)
            used, allocated = state_bytes(state)
            total = seconds + (result.seconds[-1] if result.seconds else 0.0)
            for series, value in zip(result, (index * block, used, allocated, total), strict=True):
                series.append(value)
            bar.update(block)
    return result


def summarise(measured: Stream) -> dict[str, float]:
    """The end of a stream of two or more blocks; how memory and cumulative time grow from an eighth of it on."""
    late = measured.tokens[-1] / 8
    tokens, seconds = (values[-1] - values[-2] for values in (measured.tokens, measured.seconds))
    return {
        "bytes": measured.used_bytes[-1],
        "allocated": measured.allocated_bytes[-1],
        "seconds": measured.seconds[-1],
        "seconds_per_token": seconds / tokens,
        "exponent_of_memory": growth_exponent(measured.tokens, measured.used_bytes, first=late),
        "exponent_of_time": growth_exponent(measured.tokens, measured.seconds, first=late),
    }
