"""Sequence mixers as pure functions on arrays: state in, state out, one function for training and streaming."""

from pallas_kernels import __version__
from primitives.prefix_scan import PrefixState, prefix_scan_attention

__all__ = ["PrefixState", "__version__", "prefix_scan_attention"]
