"""Test-time memory: what gradients keep, by the compiler, over tokens and intervals, beside plain scans; and time.

The plain scans are what one writes first: over intervals with gradients for every token, which are weights for every
token, and the recurrence over tokens. Results are compared before anything is timed; temporaries need no run. Nothing
here is a test: run it on a quiet machine. `python -m experiments.publish RESULT.json` puts a result into docs/.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments import check_positive
from experiments.measure import compile_call, growth_exponent, temporary_bytes, time_call, with_gradients
from experiments.results import table
from primitives import mlp_memory, neural_memory

__all__ = ["PRESETS", "Config", "run", "show"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the benchmark."""

    width: int = 384
    """Size of a key and of a value."""
    expansion: int = 4
    """Hidden units of the memory, which has depth 2, in widths."""
    times: tuple[int, ...] = (512, 2048, 8192)
    """Tokens of the comparison of memory."""
    intervals: tuple[int, ...] = (16, 64, 256)
    """Tokens of an interval."""
    timed: tuple[int, ...] = (512, 1024, 2048, 4096)
    """Tokens of the growth of time."""
    timed_interval: int = 64
    """Tokens of an interval of the growth of time."""
    repeats: int = 3
    """The fastest counts."""

    def __post_init__(self):
        check_positive(self)


PRESETS: dict[str, Config] = {
    "full": Config(),
    "smoke": Config(width=8, expansion=2, times=(16, 32), intervals=(4,), timed=(16, 32), timed_interval=4, repeats=1),
}


def run(config: Config, folder: Path) -> dict[str, Any]:
    """Measure; the results as a dictionary."""
    results = {"memory": _memory(config), "time": _time(config)}
    print(f"\n{show(results)}")
    return results


def show(metrics: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    memory, time = metrics["memory"], metrics["time"]
    return "\n\n".join(
        [
            f"Temporaries of forward and backward in copies of the fast weights ({memory['weights_mib']:.1f} MiB), one "
            "row, one head; beside them what the checkpoints between intervals are, weights and momentum:",
            table(memory["rows"]),
            f"Tokens per second, forward and backward, intervals of {time['interval']} tokens; the exponents with which"
            f" time grows are {', '.join(f'{name} {value:.2f}' for name, value in time['exponents'].items())}:",
            table(time["rows"]),
        ]
    )


def _forms(interval):
    """Name to function of (q, k, v, step, decay, momentum, first weight, second weight) to outputs."""
    return {
        "after_interval": functools.partial(_outputs, interval=interval, read="after_interval"),
        "after_token": functools.partial(_outputs, interval=interval, read="after_token"),
        "scan over intervals": functools.partial(_plain, interval=interval),
        "scan over tokens": functools.partial(
            _outputs, interval=interval, read="after_token", implementation="sequential"
        ),
    }


def _outputs(q, k, v, step, decay, momentum, *weights, interval, **options):
    tokens = (q, k, v, step, decay, momentum)
    return neural_memory(*tokens, apply=mlp_memory, initial_weights=weights, update_interval=interval, **options)[0]


def _plain(q, k, v, step, decay, momentum, *weights, interval):
    """The parallel form as it is usually written: a gradient for every token, scans over them, read after each."""

    def loss(weights, k, v):
        return jnp.sum((mlp_memory(weights, k[None])[0] - v) ** 2)

    def update(carry, token):
        gradient, (step, decay, momentum) = token
        weights, speed = carry
        speed = jax.tree.map(lambda s, g: momentum * s - step * g, speed, gradient)
        weights = jax.tree.map(lambda w, s: decay * w + s, weights, speed)
        return (weights, speed), weights

    def window(carry, tokens):
        q, k, v, *gates = tokens
        gradients = jax.vmap(jax.grad(loss), (None, 0, 0))(carry[0], k, v)
        carry, after = lax.scan(update, carry, (gradients, gates))
        return carry, jax.vmap(lambda w, q: mlp_memory(w, q[None])[0])(after, q)

    tokens = jax.tree.map(lambda x: x[0, :, 0].reshape(-1, interval, *x.shape[3:]), [q, k, v, step, decay, momentum])
    weights = jax.tree.map(lambda w: w[0], weights)
    _, outputs = lax.scan(window, (weights, jax.tree.map(jnp.zeros_like, weights)), tokens)
    return outputs.reshape(q.shape)


def _inputs(config, time):
    generator = np.random.default_rng(0)
    hidden = config.width * config.expansion

    def noise(*shape):
        return jnp.asarray(generator.normal(size=shape), jnp.float32)

    q, k, v = (noise(1, time, 1, config.width) for _ in range(3))
    k /= jnp.linalg.norm(k, axis=-1, keepdims=True)
    step, decay, momentum = (jax.nn.sigmoid(noise(1, time, 1)) for _ in range(3))
    first, second = (noise(1, *shape) / shape[0] ** 0.5 for shape in ((config.width, hidden), (hidden, config.width)))
    return q, k, v, 0.01 * step, 1 - 0.1 * decay, 0.9 * momentum, first, second


def _memory(config):
    size = 2 * config.width**2 * config.expansion * 4
    rows = []
    for time in config.times:
        for interval in config.intervals:
            inputs = jax.eval_shape(functools.partial(_inputs, config, time))
            row = {"tokens": time, "interval": interval}
            for name, form in _forms(interval).items():
                row[name] = temporary_bytes(with_gradients(form), inputs) / size
            rows.append(row | {"checkpoints": 4 * (time / interval) ** 0.5})
    return {"weights_mib": size / 2**20, "rows": rows}


def _time(config):
    _compare(config)
    rows, seconds = [], {}
    for time in config.timed:
        inputs, row = _inputs(config, time), {"tokens": time}
        for name, form in _forms(config.timed_interval).items():
            if name.startswith("after"):
                taken = time_call(compile_call(with_gradients(form), inputs), inputs, repeats=config.repeats)
                seconds.setdefault(name, []).append(taken)
                row[name] = time / taken
        rows.append(row)
    exponents = {name: growth_exponent(config.timed, values) for name, values in seconds.items()}
    return {"interval": config.timed_interval, "rows": rows, "exponents": exponents}


def _compare(config):
    """The forms that read after every token agree, in outputs and gradients."""
    inputs, forms = _inputs(config, 2 * config.timed_interval), _forms(config.timed_interval)
    names = "after_token", "scan over intervals", "scan over tokens"
    first, *others = (jax.tree.leaves(compile_call(with_gradients(forms[name]), inputs)(*inputs)) for name in names)
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.max(jnp.abs(b))))
