"""TPU compilers on a machine without a TPU: programs for every generation, and what is known of their kernels' cost.

The compiler is libtpu's, which the `dev` extra brings. `kernel_costs` reads the schedule that it dumps: how many VLIW
bundles a step of a kernel's grid takes, which units they use, what is spilled. These are static counts and no times: a
bundle may also wait for memory. Imports jax only, so that the environment of a peer can run it too.
"""

import contextlib
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
# What libtpu would ask a machine with a TPU.
LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def tpu_devices(topology: str) -> list[jax.Device]:
    """The devices of a TPU topology by its name, ``v5e:2x2``: to compile for, not to run on."""
    os.environ.update(LIBTPU)
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def compile_for_tpu(topology: str, function: Callable, *types: Any) -> jax.stages.Compiled:
    """Compile a function of arrays of the given types for one device of a TPU topology."""
    return trace_for_tpu(topology, function, *types).lower().compile()


def trace_for_tpu(topology: str, function: Callable, *types: Any) -> jax.stages.Traced:
    """A function traced for arrays of the given types on one device of a TPU topology."""
    sharding = SingleDeviceSharding(tpu_devices(topology)[0])
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), types)
    return jax.jit(function).trace(*types)


@contextlib.contextmanager
def dumped_schedules() -> Iterator[Path]:
    """The folder in which libtpu writes its schedules, in a process that has not loaded libtpu yet."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        jax.config.update("jax_enable_compilation_cache", False)  # what is not compiled is not dumped
        yield Path(folder)


def static_costs(dumps: Path, topology: str, function: Callable, *types: Any) -> dict[str, Any]:
    """Temporaries of a compiled function in bytes, and for each of its kernels what a step of the grid costs."""
    for file in dumps.iterdir():
        file.unlink()
    device = tpu_devices(topology)[0]
    with _as_on(device):
        traced = trace_for_tpu(topology, function, *types)
        compiled = traced.lower().compile()
    text = compiled.as_text()
    names = re.findall(r'%?([\w.\-]+) = .*custom_call_target="tpu_custom_call"', text)
    vmem = re.findall(r'memory_space":"1","offset":"\d+","size":"(\d+)"', text)
    grids = _grids(traced.jaxpr.jaxpr)
    memory = compiled.memory_analysis()
    return {
        "temporaries": memory.temp_size_in_bytes,
        "VMEM": max(map(int, vmem), default=0),
        "arguments and results": memory.argument_size_in_bytes + memory.output_size_in_bytes,
        "kernels": [_kernel_costs(dumps, name, grids) for name in names],
    }


def report(topology: str, tokens: int, programs: Iterable[tuple[dict[str, str], Callable, Sequence[Any]]]) -> None:
    """Print the costs of programs, one as a line of JSON: what says which it is, and its costs per token.

    What does not fit into VMEM is left out, with a line on the standard error.
    """
    with dumped_schedules() as dumps:
        for label, function, types in programs:
            try:
                costs = static_costs(dumps, topology, function, *types)
            except jax.errors.JaxRuntimeError as error:
                if "vmem" not in str(error).lower():
                    raise
                print(f"does not fit into VMEM: {topology} {label}", file=sys.stderr)
                continue
            bundles = sum(kernel["grid steps"] * kernel["bundles per step"] for kernel in costs["kernels"])
            chip = topology.partition(":")[0]
            row = label | {"chip": chip, "bundles": bundles, "bundles per token": bundles / tokens} | costs
            print(json.dumps(row), flush=True)


def _as_on(device):
    """Kernels that ask which TPU they are traced for are told."""
    kind = AbstractDevice(platform="tpu", device_kind=device.device_kind, num_cores=1)
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=kind))


def _grids(jaxpr):
    """The grid of every kernel in a program, by the kernel's name."""
    grids = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            grids[equation.params["name"]] = equation.params["grid_mapping"].grid
        for parameter in equation.params.values() if equation.primitive.name != "pallas_call" else ():
            for inner in parameter if isinstance(parameter, tuple | list) else (parameter,):
                inner = getattr(inner, "jaxpr", inner)
                grids |= _grids(inner) if hasattr(inner, "eqns") else {}
    return grids


def _kernel_costs(dumps, name, grids):
    """Counts of a kernel's final schedule; empty bundles, in which results are waited for, count."""
    grid = next(grid for kernel, grid in sorted(grids.items(), key=lambda x: -len(x[0])) if kernel in name)
    schedule, units = (
        next(dumps.glob(f"*-{name}-*-{stage}.txt")).read_text()
        for stage in ("post-bundle-packing-post-ra", "pre-delay_hlo-static-per-bundle-utilization")
    )
    head, counts = units.split("== UTILIZATION:")
    _, labels, capacity = head.strip().splitlines()
    counts = [[int(count) for count in line.split()] for line in counts.strip().splitlines()]
    runs = _runs(schedule, len(counts))
    bundles = sum(runs)
    used = [sum(n * count[unit] for n, count in zip(runs, counts, strict=True)) for unit in range(len(counts[0]))]
    shares = (use / (int(most) * bundles) for use, most in zip(used, capacity.split(), strict=True))
    return {
        "name": re.sub(r"\.\d+$", "", name),
        "grid steps": math.prod(grid),
        "bundles per step": bundles,
        "spilled registers": len(re.findall("spilled vreg", schedule)),
        "use of units": dict(zip(labels.replace(" ", "").split(","), shares, strict=True)),
    }


def _runs(schedule, bundles):
    """How often each bundle runs in a step of the grid: the product of the trip counts of the loops around it.

    The outermost loop is the grid. Regions that are run under a condition count as if they always were.
    """
    runs = None
    for trips, first, last in _loops(schedule):
        inside = [first <= i < last for i in range(bundles)]
        if runs is None:
            runs = [int(i) for i in inside]
        else:
            runs = [n * trips if i else n for n, i in zip(runs, inside, strict=True)]
    return runs or [1] * bundles


def _loops(schedule):
    """Trip counts of the loops of a schedule, the outer ones first, and the bundles of their bodies."""
    trips = None
    for line in schedule.splitlines():
        if loop := re.search(r"^ *loop: start=(\d+), step=(\d+), limit=(\d+)", line):
            start, step, limit = map(int, loop.groups())
            trips = -(-(limit - start) // step)
        elif re.search(r"^ *\$region.*//", line):
            is_body = line.endswith("// loop_body")
        elif trips and (body := re.search(r"^ *// region range: \[(\d+), (\d+)\)", line)) and is_body:
            yield trips, *map(int, body.groups())
            trips = None
