"""Kernels without their accelerator: an interpreter that looks for races, and TPU compilers without a TPU."""

import os

import jax
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from experiments.compile_prefix_scan import LIBTPU
from primitives.testing import interpreted_kernels


@pytest.fixture
def tpu_interpreter():
    """Run TPU kernels on the CPU, on uninitialised memory full of NaN; fail on a race."""
    with interpreted_kernels():
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
