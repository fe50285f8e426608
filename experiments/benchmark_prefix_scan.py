"""Time, memory, growth and rounding of `primitives.prefix_scan_attention`, every implementation in one run.

Times are ratios to a jitted copy of the values, measured in the same run, beside those of the plain associative scan
over the whole sequence; results are compared before anything is timed. Nothing here is a test: run it on a quiet
machine. With --write-table the platform's fastest implementation goes into the table behind `implementation=None`.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments import check_positive
from experiments.figures import draw_growth, figure
from experiments.measure import compile_call, measure_growth, temporary_bytes, time_call, with_gradients
from experiments.results import environment, table, write_json
from primitives import dispatch, prefix_scan, prefix_scan_attention
from primitives.testing import row_errors


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the benchmark."""

    batch: int = 4
    """Rows."""
    heads: int = 8
    """Heads."""
    dim: int = 64
    """Size of a value."""
    time: int = 8192
    """Tokens of the comparison of implementations."""
    growth: tuple[int, ...] = (1024, 4096, 16384, 65536, 262144)
    """Tokens of the growth of time."""
    memory_time: int = 65536
    """Tokens of the comparison of memory, with one row."""
    error_time: int = 1000
    """Tokens of the comparison of rounding."""
    repeats: int = 10
    """The fastest counts."""
    write_table: bool = False
    """Write the fastest implementation on this platform to primitives/fastest.json."""

    def __post_init__(self):
        check_positive(self)


PRESETS: dict[str, Config] = {
    "full": Config(),
    "smoke": Config(batch=1, heads=2, dim=8, time=256, growth=(128, 256), memory_time=512, error_time=100, repeats=1),
}


def run(config: Config, folder: Path) -> dict[str, Any]:
    """Measure; the results as a dictionary, a figure of the growth in `folder`."""
    results = {"time": _time(config), "growth": _growth(config), "memory": _memory(config), "error": _error(config)}
    _draw(results["growth"], folder)
    if config.write_table:
        _write_table(results["time"]["rows"])
    print(f"\nfigure: {folder / 'growth.png'}")
    return results


def _forms():
    """Name to function of (logits, values) to outputs."""
    forms = {"None": functools.partial(_outputs, implementation=None), "plain associative_scan": _plain_associative}
    names = [name for name in prefix_scan.IMPLEMENTATIONS if name != "pallas" or jax.default_backend() == "tpu"]
    return forms | {name: functools.partial(_outputs, implementation=name) for name in names}


def _outputs(logits, values, implementation):
    return prefix_scan_attention(logits, values, implementation=implementation)[0]


def _copy(logits, values):
    return values.copy()


def _plain_associative(logits, values):
    """The paper's operator in one `lax.associative_scan` over all of time."""

    def combine(a, b):
        m = jnp.maximum(a[0], b[0])
        decay_a, decay_b = jnp.exp(a[0] - m), jnp.exp(b[0] - m)
        return m, a[1] * decay_a + b[1] * decay_b, a[2] * decay_a[..., None] + b[2] * decay_b[..., None]

    _, u, w = lax.associative_scan(combine, (logits, jnp.ones_like(logits), values), axis=1)
    return w / u[..., None]


def _inputs(batch, length, config, scale=1.0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0))
    logits = scale * jax.random.normal(keys[0], (batch, length, config.heads))
    return logits.astype(dtype), jax.random.normal(keys[1], (batch, length, config.heads, config.dim), dtype)


def _time(config):
    """Ratios to a copy of the values."""
    inputs = _inputs(config.batch, config.time, config)
    expected = jax.tree.leaves(compile_call(with_gradients(_plain_associative), inputs)(*inputs))
    copy = time_call(compile_call(_copy, inputs), inputs, repeats=config.repeats)
    rows = []
    for name, form in _forms().items():
        forward, both = compile_call(form, inputs), compile_call(with_gradients(form), inputs)
        for leaf, reference in zip(jax.tree.leaves(both(*inputs)), expected, strict=True):
            np.testing.assert_allclose(leaf, reference, rtol=1e-3, atol=1e-4)
        ratios = (time_call(compiled, inputs, repeats=config.repeats) / copy for compiled in (forward, both))
        names = ("forward / copy", "forward + backward / copy")
        rows.append({"implementation": name} | dict(zip(names, ratios, strict=True)))
    shape = f"batch {config.batch}, time {config.time}, heads {config.heads}, dim {config.dim}"
    print(f"{shape}, float32 on {jax.default_backend()}; a copy of the values takes {1e3 * copy:.1f} ms\n")
    print(table(rows))
    return {"copy_seconds": copy, "rows": rows}


def _growth(config):
    """Seconds against time, those of a copy too: what fits a cache is faster than what does not."""
    form = functools.partial(_outputs, implementation=None)
    functions = {"copy": _copy, "forward": form, "forward + backward": with_gradients(form)}
    growth = measure_growth(
        functions, lambda length: _inputs(config.batch, length, config), config.growth, repeats=config.repeats
    )
    print(f"\nTime grows from {config.growth[0]:,} to {config.growth[-1]:,} tokens with the exponent:\n")
    print(table([growth["exponents"]]))
    return growth


def _memory(config):
    """Bytes that the compiler reserves besides inputs and outputs."""
    inputs = _inputs(1, config.memory_time, config)
    rows = []
    for name, form in _forms().items():
        temporaries = temporary_bytes(with_gradients(form), inputs)
        rows.append({"implementation": name, "temporaries / bytes of values": temporaries / inputs[1].nbytes})
    print(f"\nForward + backward at {config.memory_time:,} tokens ({inputs[1].nbytes / 2**20:.0f} MiB of values):\n")
    print(table(rows))
    return rows


def _error(config):
    """Largest error in a row, against the sequential form in float64 on the same rounded inputs."""
    ramp = jnp.linspace(-1e4, 1e4, config.error_time)[None, :, None]
    kinds = {"N(0, 1)": (1.0, 0.0), "N(0, 30²)": (30.0, 0.0), "ramp ±1e4": (0.0, ramp), "all equal": (0.0, 1.0)}
    rows = []
    for kind, (scale, shift) in kinds.items():
        for dtype in (jnp.float32, jnp.bfloat16):
            logits, values = _inputs(1, config.error_time, config, scale, dtype)
            logits = (logits.astype(jnp.float32) + shift).astype(dtype)
            with jax.enable_x64(True):
                exact = _outputs(logits.astype(jnp.float64), values.astype(jnp.float64), "sequential")
            row = {"logits": kind, "dtype": jnp.dtype(dtype).name}
            for name, form in _forms().items():
                row[name] = row_errors(np.asarray(form(logits, values), np.float64), np.asarray(exact))[0]
            rows.append(row)
    print(f"\nLargest error of an output, relative to the root mean square of its row, {config.error_time} tokens:\n")
    print(table(rows))
    return rows


def _write_table(rows):
    """Of the implementations with a reverse rule of their own, the fastest forward and backward."""
    rows = [row for row in rows if row["implementation"] in ("loop", "chunked", "pallas")]
    fastest = min(rows, key=lambda row: row["forward + backward / copy"])["implementation"]
    machine = environment()["machine"]["cpu"] if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    basis = f"measured by python -m experiments benchmark_prefix_scan --write-table on {machine}, jax {jax.__version__}"
    content = json.loads(dispatch.TABLE.read_text())
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    content["prefix_scan_attention"][platform] = {"implementation": fastest, "basis": basis}
    write_json(dispatch.TABLE, content)


def _draw(growth, folder):
    with figure(folder / "growth.png", width=4.5, height=3.4) as (axis,):
        draw_growth(axis, growth, title="prefix_scan_attention")
