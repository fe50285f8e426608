"""Accelerator kernels behind the primitives: `tpu/` (Mosaic). Each is optional and never changes a result."""

__all__: list[str] = []
__version__ = "0.1.0"
