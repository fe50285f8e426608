"""What TPU compilers make of the kernels, for every generation, without a TPU: bundles per token, units, spills, bytes.

These are static counts of the compiler's schedule and never times: waiting for memory is not in them. Memory is beside
them as the cycles that inputs and results take at the published bandwidth, of the clock that published FLOP/s imply. It
needs libtpu, which the `dev` extra brings. With a peer in an environment of its own, the same for deltanet-tpu:

    python -m venv .venv-deltanet
    .venv-deltanet/bin/pip install deltanet-tpu==0.3.0 jax==0.11.2 libtpu==0.0.50.1
    python -m experiments kernel_costs --peer .venv-deltanet/bin/python

`--write-table` first compiles the kernels of matrix memories with more and fewer heads side by side, for v4, v5e, v6e,
and keeps the numbers with the fewest bundles in pallas_kernels/tpu/side_by_side.json. `python -m experiments.publish
RESULT.json` puts a result into pallas_kernels/README.md; a test fails when bundles per token rise by more than 5 %
above it.
"""

import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

import primitives
from experiments import ExperimentError, check_positive
from experiments.peers import check_peer
from experiments.results import table, write_json
from experiments.tpu_compiler import TOPOLOGIES, report
from experiments.trainer import progress
from pallas_kernels.tpu import common

PEER = ("deltanet-tpu==0.3.0", "libtpu==0.0.50.1")
DTYPES = ("float32", "bfloat16")
SIDE_BY_SIDE = (1, 2, 4, 8)
UNITS = ("MXU", "VALU", "XLU", "EUP")
# Published: bytes per second of memory; and cycles per second, from FLOP/s of bfloat16 over those of all matrix units.
CHIPS = {"v5e": (819e9, 197e12 / (4 * 128**2 * 2)), "v6e": (1640e9, 918e12 / (4 * 256**2 * 2))}


def _forward(call: Callable) -> Callable:
    return call


def _forward_backward(call: Callable) -> Callable:
    """Outputs and gradients, for a cotangent that comes in last."""

    def both(*inputs):
        outputs, pull = jax.vjp(call, *inputs[:-1])
        return outputs, pull(inputs[-1])

    return both


PROGRAMS = {"forward": _forward, "forward + backward": _forward_backward}


def _prefix_scan(sizes, dtype):
    batch, time, heads, dim = sizes
    return [((batch, time, heads), dtype), ((batch, time, heads, dim), dtype)]


def _matrix_memory(sizes, dtype, *, gates, channels):
    batch, time, heads, dim = sizes
    decay = (batch, time, heads, dim) if channels else (batch, time, heads)
    return [((batch, time, heads, dim), dtype)] * 3 + [((batch, time, heads), "float32")] * gates + [(decay, "float32")]


def _recurrence(sizes, dtype):
    batch, time, heads, dim = sizes
    return [((batch, time, heads * dim), dtype)] * 2


def _selective_scan(sizes, dtype, n=16):
    batch, time, heads, dim = sizes
    tokens, matrices = (batch, time, heads * dim), (batch, time, n)
    return [(tokens, dtype), (tokens, dtype), ((heads * dim, n), "float32"), (matrices, dtype), (matrices, dtype)]


# Name to primitive and shapes of inputs.
KERNELS: dict[str, tuple[Callable, Callable]] = {
    "prefix_scan_attention": (primitives.prefix_scan_attention, _prefix_scan),
    "linear_attention": (
        primitives.linear_attention,
        functools.partial(_matrix_memory, gates=0, channels=False),
    ),
    "linear_attention, per channel": (
        primitives.linear_attention,
        functools.partial(_matrix_memory, gates=0, channels=True),
    ),
    "delta_rule": (primitives.delta_rule, functools.partial(_matrix_memory, gates=1, channels=False)),
    "delta_rule, per channel": (primitives.delta_rule, functools.partial(_matrix_memory, gates=1, channels=True)),
    "linear_recurrence": (primitives.linear_recurrence, _recurrence),
    "selective_scan": (primitives.selective_scan, _selective_scan),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compiled, and for what."""

    topologies: tuple[str, ...] = TOPOLOGIES
    """Chips, by the names of the smallest arrangement of each."""
    kernels: tuple[str, ...] = tuple(KERNELS)
    """Which of the kernels."""
    dtypes: tuple[str, ...] = DTYPES
    """Of the inputs; log decays and gates are float32."""
    programs: tuple[str, ...] = ("forward", "forward + backward")
    """Without and with gradients."""
    batch: int = 4
    """Rows."""
    time: int = 8192
    """Tokens; with fewer the compiler keeps in VMEM what is then not among the temporaries."""
    heads: int = 8
    """Heads, or an eighth of the channels where there are none."""
    dim: int = 128
    """Size of a key and of a value."""
    peer: Path | None = None
    """Python of an environment with the peer, or none."""
    write_table: bool = False
    """Whether to choose anew how many heads are computed side by side."""
    side_by_side: int = 0
    """So many heads, in every kernel, instead of what the table says; 0 for what it says."""

    def __post_init__(self):
        check_positive(self, except_for=("write_table", "side_by_side"))
        for kernel in self.kernels:
            if kernel not in KERNELS:
                raise ValueError(f"kernels: expected some of {', '.join(KERNELS)}, got {kernel!r}")


PRESETS: dict[str, Config] = {
    "all": Config(),
    "smoke": Config(("v5e:2x2",), ("linear_attention",), ("bfloat16",), ("forward",), 1, 256, 2, 64),
}


def check(config: Config) -> None:
    """Refuse a peer that cannot serve before a run is claimed."""
    if config.peer is not None:
        check_peer(config.peer, PEER)


def run(config: Config, folder: Path) -> dict[str, Any]:
    """Compile; the results as a dictionary."""
    if config.write_table:
        _write_table(config)
    rows = compiled(config)
    if config.peer is not None:
        rows += _peer_rows(config)
    metrics = {
        "shape": {name: getattr(config, name) for name in ("batch", "time", "heads", "dim")},
        "libtpu": importlib.metadata.version("libtpu"),
        "rows": rows,
    }
    print(f"\n{show(metrics)}")
    return metrics


def show(metrics: Mapping[str, Any]) -> str:
    """The tables as Markdown: bundles on every chip, then where they go on one."""
    shape = ", ".join(f"{name} {size:,}" for name, size in metrics["shape"].items())
    programs = defaultdict(dict)
    for row in metrics["rows"]:
        name = row["kernel"], row.get("peer", "here"), row["dtype"], row["program"]
        programs[name][row["chip"]] = row
    names = [dict(zip(("kernel", "by", "dtype", "program"), name, strict=True)) for name in programs]
    bundles = [name | _bundles(rows) for name, rows in zip(names, programs.values(), strict=True)]
    details = [
        name | _details(rows["v5e"]) for name, rows in zip(names, programs.values(), strict=True) if "v5e" in rows
    ]
    return f"""{shape}; libtpu {metrics["libtpu"]}.

Bundles per token, all heads together, and beside them the cycles that inputs and results take to be moved:

{table(bundles)}

On v5e: the share of a unit's slots in use (forward / backward; the peer has more kernels), spilled registers, VMEM of
the largest kernel, and temporaries of the whole program in HBM. Most of these are arrays laid out anew: here they come
as `[batch, time, heads, dim]` and not as a projection leaves them.

{table(details)}"""


def _bundles(rows):
    cells = {chip: f"{row['bundles per token']:.1f}" for chip, row in rows.items()}
    for chip, (bandwidth, clock) in CHIPS.items():
        if chip in rows:
            tokens = rows[chip]["bundles"] / rows[chip]["bundles per token"]
            cycles = rows[chip]["arguments and results"] / tokens / bandwidth * clock
            cells[f"memory, {chip}"] = f"{cycles:.1f}"
    return cells


def _details(row):
    return {
        **{unit: " / ".join(f"{kernel['use of units'][unit]:.2f}" for kernel in row["kernels"]) for unit in UNITS},
        "spilled": " / ".join(str(kernel["spilled registers"]) for kernel in row["kernels"]),
        "VMEM (MiB)": f"{row['VMEM'] / 2**20:.1f}",
        "temporaries (MiB)": f"{row['temporaries'] / 2**20:.1f}",
    }


def compiled(config: Config) -> list[dict[str, Any]]:
    """A row for every kernel, dtype and program on every chip."""
    ours = [sys.executable, "-m", "experiments.kernel_costs"]
    return _rows(ours, config, len(config.kernels) * len(config.dtypes) * len(config.programs))


def _peer_rows(config):
    """The same for the peer's kernels, in both of its precisions, on the chips that it is written for."""
    chips = tuple(topology for topology in config.topologies if topology.startswith(tuple(CHIPS)))
    script = Path(__file__).with_name("deltanet_tpu_peer.py")
    return _rows([config.peer, "-P", script], dataclasses.replace(config, topologies=chips), 12)


def _rows(command, config, count):
    """What processes write, a line of JSON for each of `count` programs; a process for each chip, as many as cores."""
    options = json.dumps(dataclasses.asdict(config) | {"peer": None})

    def run(topology):
        rows = []
        with subprocess.Popen([*command, topology, options], stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                rows.append(json.loads(line))
                bar.update()
        if process.returncode:
            raise ExperimentError(f"compiling for {topology} failed, its error is above")
        return rows

    with (
        progress("compiling", 0, count * len(config.topologies), unit="program") as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        return list(itertools.chain.from_iterable(pool.map(run, config.topologies)))


def _write_table(config):
    """Choose the number of heads side by side that takes the fewest bundles on v4 (the least VMEM), v5e and v6e."""
    kernels = tuple(kernel for kernel in KERNELS if kernel.startswith(("linear_attention", "delta_rule")))
    chips = tuple(topology for topology in TOPOLOGIES if topology.startswith(("v4", *CHIPS)))
    bundles = defaultdict(dict)
    for heads in SIDE_BY_SIDE:
        choice = dataclasses.replace(
            config, topologies=chips, kernels=kernels, programs=("forward + backward",), side_by_side=heads
        )
        for row in compiled(choice):
            kind = f"{'channels' if 'channel' in row['kernel'] else 'scalar'}, {row['dtype']}"
            for kernel in row["kernels"]:
                bundles[kernel["name"], kind].setdefault(heads, []).append(
                    kernel["grid steps"] * kernel["bundles per step"]
                )
    table = defaultdict(dict)
    for (kernel, kind), choices in bundles.items():
        fitting = {heads: sum(counts) for heads, counts in choices.items() if len(counts) == len(chips)}
        table[kernel][kind] = min(fitting, key=fitting.get)
    write_json(Path(common.__file__).with_name("side_by_side.json"), table)


def most_temporaries(config: Config, kernel: str, dtype: str) -> float:
    """Bytes of temporaries that a program with gradients may take at most.

    A copy of every input, output, cotangent and gradient: arrays that come as ``[batch, time, heads, dim]`` are laid
    out anew for a kernel (between two projections they are not, which tests/pallas_kernels asserts for one). Of a state
    per token, what is kept for every 64. And 32 scalars of float32 for each token and head.
    """
    config = dataclasses.replace(config, dtypes=(dtype,), programs=("forward + backward",))
    ((_, function, types),) = programs(config, kernel)
    copies = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((types, jax.eval_shape(function, *types))))
    _, state = jax.eval_shape(KERNELS[kernel][0], *types[:-1])
    states = sum(x.size for x in state if x.ndim > 2) * config.time / 64
    return copies + 4 * (states + 32 * config.batch * config.time * config.heads)


def programs(
    config: Config, kernel: str, implementation: str | None = "pallas"
) -> Iterator[tuple[dict[str, str], Callable, list[PyTree]]]:
    """What says which program it is, the function, the types of its arguments."""
    primitive, shapes = KERNELS[kernel]

    def call(*inputs):
        return primitive(*inputs, implementation=implementation)[0]

    for dtype, program in itertools.product(config.dtypes, config.programs):
        sizes = config.batch, config.time, config.heads, config.dim
        types = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes(sizes, dtype)]
        if program != "forward":
            types.append(jax.eval_shape(call, *types))
        yield {"kernel": kernel, "dtype": dtype, "program": program}, PROGRAMS[program](call), types


def _main(topology, options):
    config = Config(**{name: tuple(x) if isinstance(x, list) else x for name, x in json.loads(options).items()})
    if config.side_by_side:
        for kinds in common.SIDE_BY_SIDE.values():
            kinds.update(dict.fromkeys(kinds, config.side_by_side))
    cases = (case for kernel in config.kernels for case in programs(config, kernel))
    report(topology, config.batch * config.time, cases)


if __name__ == "__main__":
    _main(*sys.argv[1:])
