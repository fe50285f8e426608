"""Eight CPU devices for the laws about meshes; `--full` for the whole product of the laws' axes."""

import jax

jax.config.update("jax_num_cpu_devices", 8)


def pytest_addoption(parser):
    """Add `--full`."""
    parser.addoption("--full", action="store_true", help="run the laws over the full product of their axes")
