"""TODO."""

from pallas_kernels import __version__

__all__: list[str] = ["__version__"]
