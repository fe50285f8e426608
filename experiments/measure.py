"""What measurements share: compiled calls and their time and memory, how it grows, a function with its gradients."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, PyTree

__all__ = [
    "compile_call",
    "count_parameters",
    "fastest_call",
    "fitting_size",
    "growth_exponent",
    "measure_growth",
    "temporary_bytes",
    "time_call",
    "with_gradients",
]


def compile_call(function: Callable, inputs: Sequence[PyTree]) -> jax.stages.Compiled:
    """A function compiled for inputs, which may be mere shapes."""
    return jax.jit(function).lower(*inputs).compile()


def count_parameters(model: nnx.Module) -> int:
    """Numbers that are trained, of a model or of its mere shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def fitting_size(count: Callable[[int], int], budget: int, start: int) -> int:
    """The size with which a count, linear in it, comes nearest to a budget; counted at `start` and the next one."""
    fewest, more = count(start), count(start + 1)
    return start + round((budget - fewest) / (more - fewest))


def time_call(compiled: jax.stages.Compiled, inputs: Sequence[PyTree], *, repeats: int) -> float:
    """Seconds of the fastest call, after one that does not count."""
    jax.block_until_ready(compiled(*inputs))
    return fastest_call(compiled, *inputs, repeats=repeats)[0]


def temporary_bytes(function: Callable, inputs: Sequence[PyTree]) -> int:
    """Bytes that the compiler reserves besides inputs and outputs; nothing runs."""
    return compile_call(function, inputs).memory_analysis().temp_size_in_bytes


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


def measure_growth(
    functions: Mapping[str, Callable], inputs: Callable[[int], Sequence[PyTree]], sizes: Sequence[int], *, repeats: int
) -> dict[str, Any]:
    """Seconds of functions of the same inputs at every number of tokens, and the exponents with which they grow."""
    seconds = {name: [] for name in functions}
    for size in sizes:
        arguments = inputs(size)
        for name, function in functions.items():
            seconds[name].append(time_call(compile_call(function, arguments), arguments, repeats=repeats))
    exponents = {name: growth_exponent(sizes, values) for name, values in seconds.items()}
    return {"tokens": sizes, "seconds": seconds, "exponents": exponents}


def with_gradients(function: Callable[..., Array]) -> Callable[..., tuple[Array, tuple[Array, ...]]]:
    """Outputs, and the gradients of all inputs for the outputs themselves as cotangents."""

    def call(*inputs):
        outputs, pull = jax.vjp(function, *inputs)
        return outputs, pull(outputs)

    return call
