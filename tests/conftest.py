"""Eight CPU devices for the laws about meshes, quick compilation, `--full` for the whole product of the laws' axes."""

import os

# Before jax is imported. The tests compile thousands of small programs and run each once.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)


def pytest_addoption(parser):
    """Add `--full`."""
    parser.addoption("--full", action="store_true", help="run the laws over the full product of their axes")
