"""Kernels without their accelerator: an interpreter that looks for races, and TPU compilers without a TPU."""

import os

import jax
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

# What libtpu would ask a machine with a TPU, and a lock that is of no use without one.
LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@pytest.fixture
def tpu_interpreter():
    """Run TPU kernels on the CPU, on uninitialised memory full of NaN; raise on a race."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
        yield
    pltpu.reset_tpu_interpret_mode_state()


@pytest.fixture(scope="session")
def tpu_devices():
    """The devices of a TPU topology by its name: ``v5e:2x2``."""
    os.environ.update(LIBTPU)
    return lambda name: topologies.get_topology_desc(platform="tpu", topology_name=name).devices


@pytest.fixture(scope="session")
def tpu_compile(tpu_devices):
    """Compile a function of arrays of the given types for one device of a TPU topology."""

    def compile(topology, function, *types):
        sharding = jax.sharding.SingleDeviceSharding(tpu_devices(topology)[0])
        types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), types)
        compiled = jax.jit(function).lower(*types).compile()
        assert "tpu_custom_call" in compiled.as_text(), "no TPU kernel in the compiled program"
        return compiled

    return compile
