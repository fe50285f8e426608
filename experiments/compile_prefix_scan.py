"""What TPU compilers say of the kernels of `primitives.prefix_scan_attention`, for every generation, without a TPU.

Nothing runs: VMEM, temporaries and the time to compile come from the compiler and from the clock around it. It needs
libtpu, which the `dev` extra brings. The temporaries are mostly copies: arrays that come as [batch, time, heads, dim]
are laid out anew for the kernel. Between two projections they are not, which tests/pallas_kernels asserts.
"""

import dataclasses
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from experiments import check_positive
from experiments.measure import with_gradients
from experiments.results import table
from primitives import prefix_scan_attention

TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
# What libtpu would ask a machine with a TPU.
LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the inputs."""

    batch: int = 4
    """Rows."""
    time: int = 16384
    """Tokens."""
    heads: int = 8
    """Heads."""
    dim: int = 128
    """Size of a value."""
    topologies: tuple[str, ...] = TOPOLOGIES
    """Chips, by the names of the smallest arrangement of each."""

    def __post_init__(self):
        check_positive(self)


PRESETS: dict[str, Config] = {"all": Config(), "smoke": Config(batch=1, time=256, topologies=("v5e:2x2",))}


def run(config: Config, folder: Path) -> dict[str, Any]:
    """Compile; the results as a dictionary."""
    rows = [
        _compile(topology, dtype, name, function, config)
        for topology in config.topologies
        for dtype in (jnp.float32, jnp.bfloat16)
        for name, function in (("forward", _outputs), ("forward + backward", with_gradients(_outputs)))
    ]
    print(f"batch {config.batch}, time {config.time}, heads {config.heads}, dim {config.dim}\n")
    print(table(rows))
    return {"rows": rows}


def tpu_devices(topology: str) -> list[jax.Device]:
    """The devices of a TPU topology by its name, ``v5e:2x2``: to compile for, not to run on."""
    os.environ.update(LIBTPU)
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def compile_for_tpu(topology: str, function: Callable, *types: PyTree) -> jax.stages.Compiled:
    """Compile a function of arrays of the given types for one device of a TPU topology."""
    sharding = SingleDeviceSharding(tpu_devices(topology)[0])
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), types)
    return jax.jit(function).lower(*types).compile()


def _outputs(logits, values):
    return prefix_scan_attention(logits, values)[0]


def _compile(topology, dtype, name, function, config):
    shape = config.batch, config.time, config.heads
    types = (jax.ShapeDtypeStruct((*shape, *rest), dtype) for rest in ((), (config.dim,)))
    begun = time.perf_counter()
    compiled = compile_for_tpu(topology, function, *types)
    seconds = time.perf_counter() - begun
    kernels = [line for line in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    vmem = [
        int(size) for line in kernels for size in re.findall(r'memory_space":"1","offset":"\d+","size":"(\d+)"', line)
    ]
    return {
        "chip": topology.partition(":")[0],
        "dtype": jnp.dtype(dtype).name,
        "program": name,
        "kernels": len(kernels),
        "VMEM (MiB)": max(vmem, default=0) / 2**20,
        "temporaries (MiB)": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        "seconds to compile": seconds,
    }
