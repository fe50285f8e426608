"""What measurements share: the fastest of some calls, how a series grows, a function with its gradients."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

__all__ = ["fastest_call", "growth_exponent", "with_gradients"]


def fastest_call[T](function: Callable[..., T], *arguments: Any, repeats: int) -> tuple[float, T]:
    """Seconds of the fastest of some calls until their result is there, and that result."""
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        result = jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - begun)
    return min(seconds), result


def growth_exponent(sizes: Sequence[float], values: Sequence[float], *, first: float = 0) -> float:
    """The slope of log(values) over log(sizes) from size `first` on: 0 constant, 1 linear, 2 quadratic."""
    sizes, values = np.asarray(sizes, float), np.asarray(values, float)
    late = sizes >= first
    return float(np.polyfit(np.log(sizes[late]), np.log(values[late]), deg=1)[0])


def with_gradients(function: Callable[..., Array]) -> Callable[..., tuple[Array, tuple[Array, ...]]]:
    """Outputs, and the gradients of all inputs for the outputs themselves as cotangents."""

    def call(*inputs):
        outputs, pull = jax.vjp(function, *inputs)
        return outputs, pull(outputs)

    return call
