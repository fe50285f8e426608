"""Sequence mixers as pure functions on arrays: state in, state out, one function for training and streaming."""

from pallas_kernels import __version__
from primitives.attention import AttentionState, causal_attention, grow_attention_state, init_attention_state
from primitives.prefix_scan import PrefixState, prefix_scan_attention

__all__ = [
    "AttentionState",
    "PrefixState",
    "__version__",
    "causal_attention",
    "grow_attention_state",
    "init_attention_state",
    "prefix_scan_attention",
]
