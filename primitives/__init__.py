"""Sequence mixers as pure functions on arrays: state in, state out, one function for training and streaming."""

from pallas_kernels import __version__
from primitives.attention import AttentionState, causal_attention, grow_attention_state, init_attention_state
from primitives.delta_rule import DeltaRuleState, delta_rule
from primitives.feature_maps import (
    NormaliserState,
    elu_plus_one,
    normalised_exponential,
    orthogonal_projection,
    positive_random_features,
    relu,
    taylor_features,
)
from primitives.linear_attention import LinearAttentionState, linear_attention
from primitives.linear_recurrence import LinearRecurrenceState, linear_recurrence
from primitives.normalised_linear_attention import normalised_linear_attention
from primitives.positions import alibi_bias, alibi_slopes, angles, lrpe, relative_shift, rotary, xpos
from primitives.prefix_scan import PrefixState, prefix_scan_attention
from primitives.selective_scan import SelectiveScanState, selective_scan
from primitives.sequence_parallel import sequence_parallel
from primitives.short_convolution import ShortConvolutionState, short_convolution
from primitives.ssd import ssd
from primitives.state_spaces import (
    diagonal_state_space,
    discretise_bilinear,
    discretise_zero_order_hold,
    lru_decay,
    lru_normaliser,
    state_space_bank,
)

__all__ = [
    "AttentionState",
    "DeltaRuleState",
    "LinearAttentionState",
    "LinearRecurrenceState",
    "NormaliserState",
    "PrefixState",
    "SelectiveScanState",
    "ShortConvolutionState",
    "__version__",
    "alibi_bias",
    "alibi_slopes",
    "angles",
    "causal_attention",
    "delta_rule",
    "diagonal_state_space",
    "discretise_bilinear",
    "discretise_zero_order_hold",
    "elu_plus_one",
    "grow_attention_state",
    "init_attention_state",
    "linear_attention",
    "linear_recurrence",
    "lrpe",
    "lru_decay",
    "lru_normaliser",
    "normalised_exponential",
    "normalised_linear_attention",
    "orthogonal_projection",
    "positive_random_features",
    "prefix_scan_attention",
    "relative_shift",
    "relu",
    "rotary",
    "selective_scan",
    "sequence_parallel",
    "short_convolution",
    "ssd",
    "state_space_bank",
    "taylor_features",
    "xpos",
]
