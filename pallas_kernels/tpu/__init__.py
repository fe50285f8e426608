"""Kernels in Pallas for TPU (Mosaic): one module per primitive, and what they share."""
