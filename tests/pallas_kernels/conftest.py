"""Kernels without their accelerator: an interpreter that looks for races, and TPU compilers without a TPU."""

import pytest
from jax.experimental.pallas import tpu as pltpu

from experiments.tpu_compiler import compile_for_tpu
from primitives.testing import interpreted_kernels


@pytest.fixture
def tpu_interpreter():
    """Run TPU kernels on the CPU, on uninitialised memory full of NaN; fail on a race."""
    with interpreted_kernels():
        yield
    pltpu.reset_tpu_interpret_mode_state()


@pytest.fixture(scope="session")
def tpu_compile():
    """Compile a function of arrays of the given types for one device of a TPU topology."""

    def compile(topology, function, *types):
        compiled = compile_for_tpu(topology, function, *types)
        assert "tpu_custom_call" in compiled.as_text(), "no TPU kernel in the compiled program"
        return compiled

    return compile
