"""Sequence mixers as pure functions on arrays: state in, state out, one function for training and streaming."""

from pallas_kernels import __version__
from primitives.attention import (
    AttentionState,
    cache_positions,
    causal_attention,
    grow_attention_state,
    init_attention_state,
    sigmoid_attention,
)
from primitives.delta_rule import DeltaRuleState, delta_rule
from primitives.dynamical_systems import (
    DynamicalSystem,
    causal_map,
    gated_rnn_system,
    linear_attention_system,
    normalised_system,
    run_system,
    selective_scan_system,
    softmax_attention_system,
    ssd_system,
)
from primitives.feature_maps import (
    NormaliserState,
    elu_plus_one,
    normalised_exponential,
    orthogonal_projection,
    positive_random_features,
    relu,
    taylor_features,
)
from primitives.flow_attention import FlowAttentionState, causal_flow_attention, flow_attention
from primitives.linear_attention import LinearAttentionState, linear_attention
from primitives.linear_recurrence import LinearRecurrenceState, linear_recurrence
from primitives.neural_memory import (
    NeuralMemoryState,
    huber_error,
    keep,
    linear_memory,
    mlp_memory,
    neural_memory,
    power_error,
    power_norm,
    softmax_retention,
    squared_error,
)
from primitives.normalised_linear_attention import normalised_linear_attention
from primitives.positions import alibi_bias, alibi_slopes, angles, lrpe, relative_shift, rotary, xpos
from primitives.prefix_scan import PrefixState, prefix_scan_attention
from primitives.selective_scan import SelectiveScanState, selective_scan
from primitives.sequence_parallel import sequence_parallel
from primitives.short_convolution import ShortConvolutionState, short_convolution
from primitives.sliding_window import SlidingWindowState, sliding_window_attention
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
    "DynamicalSystem",
    "FlowAttentionState",
    "LinearAttentionState",
    "LinearRecurrenceState",
    "NeuralMemoryState",
    "NormaliserState",
    "PrefixState",
    "SelectiveScanState",
    "ShortConvolutionState",
    "SlidingWindowState",
    "__version__",
    "alibi_bias",
    "alibi_slopes",
    "angles",
    "cache_positions",
    "causal_attention",
    "causal_flow_attention",
    "causal_map",
    "delta_rule",
    "diagonal_state_space",
    "discretise_bilinear",
    "discretise_zero_order_hold",
    "elu_plus_one",
    "flow_attention",
    "gated_rnn_system",
    "grow_attention_state",
    "huber_error",
    "init_attention_state",
    "keep",
    "linear_attention",
    "linear_attention_system",
    "linear_memory",
    "linear_recurrence",
    "lrpe",
    "lru_decay",
    "lru_normaliser",
    "mlp_memory",
    "neural_memory",
    "normalised_exponential",
    "normalised_linear_attention",
    "normalised_system",
    "orthogonal_projection",
    "positive_random_features",
    "power_error",
    "power_norm",
    "prefix_scan_attention",
    "relative_shift",
    "relu",
    "rotary",
    "run_system",
    "selective_scan",
    "selective_scan_system",
    "sequence_parallel",
    "short_convolution",
    "sigmoid_attention",
    "sliding_window_attention",
    "softmax_attention_system",
    "softmax_retention",
    "squared_error",
    "ssd",
    "ssd_system",
    "state_space_bank",
    "taylor_features",
    "xpos",
]
