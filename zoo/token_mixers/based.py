"""Based: linear attention with Taylor features, attention over a short window, and short gated convolutions.

Simran Arora, Sabri Eyuboglu, Michael Zhang, Aman Timalsina, Silas Alberti, Dylan Zinsley, James Zou, Atri Rudra,
Christopher Ré: Simple linear attention language models balance the recall-throughput tradeoff, 2024, arXiv:2402.18668.

Implemented are the three mixers, one for each block of a hybrid stack with gated linear units and RMS norms:

- `TaylorAttention`: linear attention whose features are the exponential to second order. For q, k of `feature_dim`

      φ(q)·φ(k) = 1 + a + a²/2,  a = ⟨q, k⟩ / √feature_dim
      o_t = Σ_{i≤t} (φ(q_t)·φ(k_i)) v_i / (ε + Σ_{i≤t} φ(q_t)·φ(k_i)),  y_t = W_o [o_t of all heads]

  on `primitives.taylor_features` and `primitives.normalised_linear_attention`. Every weight is at least 1/2.
- `WindowAttention`: softmax attention with rotary positions over the last `window` tokens.
- `GatedConvolution`: ``y = W_o (silu(h ∗ W_a x) ⊙ W_b x)``, h a causal filter of each channel and three taps.

The number of features and the window set the size of the state, and so what can be recalled: head h of a Taylor layer
keeps ``(1 + d + d (d + 1) / 2) (head_dim + 1)`` numbers for d features, a window keeps `window` − 1 keys and values.

Presets "360m" and "1.3b": depth, width, places of the mixers, heads, features and the channel mixer are those of the
authors' public configurations, which count 363 and 1349 million parameters with the vocabulary of GPT-2, padded to
50,264, and the embedding as the head.

Deviations and what is left open (we had the abstract and the public code, not the paper's appendix):

- The code keeps x_i x_j and x_j x_i as two features, here they are one: products are the same, states 0.56 times as
  large for 16 features. Features are float32 or wider whatever the dtype of the stack, since their products cancel.
- `window` counts a token itself. The configurations ask their attention for 128 tokens before a token, we take 128 with
  it; the paper speaks of windows of 64 and 128.
- Projections start from LeCun normals, not from the code's initializer. Attention rotates halves of a head.
- The code's configurations without gated convolutions, with a decay, or with other feature maps are not here.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from primitives import (
    SlidingWindowState,
    contract,
    normalised_linear_attention,
    rotary,
    sliding_window_attention,
    taylor_features,
)
from zoo.layers import (
    LLAMA,
    MixerConfig,
    PositionState,
    ShortConvolution,
    StackConfig,
    check_rotary,
    count_positions,
    merge_heads,
    split_heads,
    widen,
)

# --- Taylor attention -----------------------------------------------------------------------------------------------


class TaylorAttention(nnx.Module):
    """The mixer. Its state is a `primitives.LinearAttentionState`."""

    def __init__(self, config: "TaylorAttentionConfig", stack: StackConfig, *, rngs: nnx.Rngs):
        self.heads = config.heads
        features = config.heads * config.feature_dim
        self.query, self.key = (stack.linear(features, rngs=rngs) for _ in range(2))
        self.value, self.output = (stack.linear(stack.width, rngs=rngs) for _ in range(2))

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        q, k = self.features(self.query(x)), self.features(self.key(x))
        v = split_heads(self.value(x), self.heads)
        outputs, state = normalised_linear_attention(q, k, v, epsilon=1e-12, state=state, segment_ids=segment_ids)
        return self.output(merge_heads(outputs)), state

    def features(self, x):
        """φ of each head, float32 or wider."""
        return taylor_features(widen(split_heads(x, self.heads)))


@dataclasses.dataclass(frozen=True)
class TaylorAttentionConfig(MixerConfig):
    """`feature_dim`: size of queries and keys of a head, before φ."""

    heads: int = 16
    feature_dim: int = 16

    def check(self, stack: StackConfig) -> None:
        """Raise `ValueError` for heads that do not fit."""
        super().check(stack)
        if self.feature_dim < 1:
            raise ValueError(f"feature_dim: expected a positive number, got {self.feature_dim}")

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> TaylorAttention:
        """One Taylor attention."""
        return TaylorAttention(self, stack, rngs=rngs)


# --- Attention over a window ----------------------------------------------------------------------------------------


class WindowAttention(nnx.Module):
    """The mixer. Its state is a `primitives.SlidingWindowState`."""

    def __init__(self, config: "WindowAttentionConfig", stack: StackConfig, *, rngs: nnx.Rngs):
        self.heads, self.window, self.rotary = config.heads, config.window, config.rotary
        self.query_key_value = stack.linear(3 * stack.width, rngs=rngs)
        self.output = stack.linear(stack.width, rngs=rngs)

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        contract.check_state(state, SlidingWindowState)
        q, k, v = (split_heads(part, self.heads) for part in jnp.split(self.query_key_value(x), 3, axis=-1))
        if self.rotary:
            before = None if state is None else PositionState(state.position, state.segment)
            positions, _ = count_positions(segment_ids, before, *x.shape[:2])
            q, k = rotary(q, positions), rotary(k, positions)
        outputs, state = sliding_window_attention(q, k, v, window=self.window, state=state, segment_ids=segment_ids)
        return self.output(merge_heads(outputs)), state


@dataclasses.dataclass(frozen=True)
class WindowAttentionConfig(MixerConfig):
    """`window`: tokens that a token sees, itself among them; `rotary`: turn queries and keys by their positions."""

    heads: int = 16
    window: int = 64
    rotary: bool = True

    def check(self, stack: StackConfig) -> None:
        """Raise `ValueError` for heads that do not fit and an empty window."""
        super().check(stack)
        if self.window < 1:
            raise ValueError(f"window: expected a positive number, got {self.window}")
        if self.rotary:
            check_rotary(stack.width // self.heads)

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> WindowAttention:
        """One attention."""
        return WindowAttention(self, stack, rngs=rngs)


# --- Gated convolution ----------------------------------------------------------------------------------------------


class GatedConvolution(nnx.Module):
    """The mixer. Its state is a `primitives.ShortConvolutionState`."""

    def __init__(self, config: "GatedConvolutionConfig", stack: StackConfig, *, rngs: nnx.Rngs):
        inner = config.expansion * stack.width
        self.inner = stack.linear(2 * inner, bias=True, rngs=rngs)
        self.convolution = ShortConvolution(inner, config.taps, activation="silu", dtype=stack.dtype, rngs=rngs)
        self.outer = stack.linear(stack.width, inputs=inner, bias=True, rngs=rngs)

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        local, gate = jnp.split(self.inner(x), 2, axis=-1)
        local, state = self.convolution(local, state, segment_ids=segment_ids)
        return self.outer(local * gate), state


@dataclasses.dataclass(frozen=True)
class GatedConvolutionConfig(MixerConfig):
    """`taps`: tokens that the filter sees, its own among them; `expansion`: inner size in widths."""

    taps: int = 3
    expansion: int = 2

    def check(self, stack: StackConfig) -> None:
        """Raise `ValueError` for sizes below one."""
        for name in ("taps", "expansion"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> GatedConvolution:
        """One gated convolution."""
        return GatedConvolution(self, stack, rngs=rngs)


# --- Stacks ---------------------------------------------------------------------------------------------------------


def hybrid(layers: int, taylor: tuple[int, ...], *, heads: int, feature_dim: int, window: int) -> tuple:
    """The pattern of a whole stack: Taylor attention in some blocks, a window in each next one, else convolutions."""
    pattern = [GatedConvolutionConfig()] * layers
    for layer in taylor:
        pattern[layer : layer + 2] = TaylorAttentionConfig(heads, feature_dim), WindowAttentionConfig(heads, window)
    return tuple(pattern)


def _stack(width, layers, taylor, **options):
    pattern = hybrid(layers, taylor, **options)
    return StackConfig(width, layers, pattern, hidden=2 * width, **LLAMA)


PRESETS = {
    "tiny": _stack(16, 3, (1,), heads=2, feature_dim=4, window=4),
    "360m": _stack(1024, 27, (1, 6, 11, 16, 21), heads=16, feature_dim=16, window=128),
    "1.3b": _stack(1792, 36, (1, 6, 11, 16, 21, 27, 33), heads=16, feature_dim=16, window=128),
}
