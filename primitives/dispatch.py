"""Which implementation `None` stands for, per platform, chosen when a call is lowered and not when it is traced.

The choices are in fastest.json, written by the benchmark of each primitive; `basis` says what each was measured on, or
why it was chosen where it could not be measured.
"""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
from jax import lax

TABLE = Path(__file__).with_name("fastest.json")


@functools.cache
def read_table() -> dict[str, dict[str, dict[str, str]]]:
    """Primitive to platform to `implementation` and `basis`."""
    return json.loads(TABLE.read_text())


def by_platform[T](primitive: str, candidates: Mapping[str, Callable[..., T]], **replaced: str) -> Callable[..., T]:
    """The fastest of the candidates on the platform that the result is lowered for.

    Args:
        primitive: Its name in the table.
        candidates: Functions by the names that the table uses.
        **replaced: Per platform, a candidate to use in place of the table's: the shape guards of a kernel.
    """
    names = {platform: choice["implementation"] for platform, choice in read_table()[primitive].items()} | replaced
    return functools.partial(lax.platform_dependent, **{platform: candidates[name] for platform, name in names.items()})


def differentiate_as(form: Callable, kernel: Callable) -> Callable:
    """A kernel with the derivative of its XLA form: what gradients of gradients need."""
    call = jax.custom_vjp(kernel)
    call.defvjp(lambda *inputs: (kernel(*inputs), inputs), lambda inputs, outputs: jax.vjp(form, *inputs)[1](outputs))
    return call
