"""Sigmoid attention: a sigmoid of each logit in the place of the softmax, with what keeps it stable.

Jason Ramapuram, Federico Danieli, Eeshan Dhekane, Floris Weers, Dan Busbridge, Pierre Ablin, Tatiana Likhomanenko,
Jagrit Digani, Zijin Gu, Amitis Shidani, Russ Webb: Theory, Analysis, and Best Practices for Sigmoid Self-Attention,
2024, arXiv:2409.04431.

Implemented: multi-head attention with weights that are not normalised, on `primitives.sigmoid_attention`,

    o_t = Σ_{j≤t} σ(⟨q_t, k_j⟩ / √d_h + b) v_j,  b = −log n

for training sequences of n tokens (`context`), so that the weights of small logits sum to about 1 at the last token;
and the stabilisers that the paper examines: norms of queries and keys, LayerScale (a learned factor for each channel of
the output), and the hybrid norm, ``x + norm(Attention(norm(x)))``, of which the outer norm is here and the inner one is
the stack's.

Deviations and what is open: rotary positions (the halves of a head as pairs) or none, no ALiBi. n is a constant, also
where a context is longer or shorter. No biases in projections. Norms of queries and keys are layer norms over each
head, the outer norm is of the kind of the stack's; LayerScale starts from a number that the caller gives: our reading.
We had the equations and the authors' code, not the paper's sizes: there is a "tiny" preset only.
"""

import dataclasses
import math

import jax.numpy as jnp
from flax import nnx

from primitives import cache_positions, rotary, sigmoid_attention
from zoo.layers import LLAMA, NORMS, MixerConfig, StackConfig, check_rotary, merge_heads, split_heads


class SigmoidAttention(nnx.Module):
    """The mixer. Its state is a `primitives.AttentionState`."""

    def __init__(self, config: "SigmoidAttentionConfig", stack: StackConfig, *, rngs: nnx.Rngs):
        width, dtype = stack.width, stack.dtype
        self.heads, self.rotary, self.bias = config.heads, config.rotary, -math.log(config.context)
        self.query_key_value = stack.linear(3 * width, rngs=rngs)
        self.output = stack.linear(width, rngs=rngs)
        self.query_norm, self.key_norm = (
            nnx.LayerNorm(width // config.heads, dtype=dtype, rngs=rngs) if config.query_key_norm else None
            for _ in range(2)
        )
        self.output_norm = NORMS[stack.norm](width, dtype=dtype, rngs=rngs) if config.output_norm else None
        self.layer_scale = None if config.layer_scale is None else nnx.Param(jnp.full(width, config.layer_scale))

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        q, k, v = jnp.split(split_heads(self.query_key_value(x), 3 * self.heads), 3, axis=2)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.rotary:
            positions = cache_positions(segment_ids, state, *x.shape[:2])
            q, k = rotary(q, positions), rotary(k, positions)
        outputs, state = sigmoid_attention(q, k, v, bias=self.bias, state=state, segment_ids=segment_ids)
        y = self.output(merge_heads(outputs))
        y = y if self.output_norm is None else self.output_norm(y)
        return y if self.layer_scale is None else y * self.layer_scale[...].astype(y.dtype), state


@dataclasses.dataclass(frozen=True)
class SigmoidAttentionConfig(MixerConfig):
    """Sigmoid attention.

    Attributes:
        heads: Of queries, keys and values.
        context: Tokens of a training sequence; the bias of the logits is minus its logarithm.
        rotary: Whether queries and keys are turned by their positions.
        query_key_norm: Whether queries and keys are normalised.
        output_norm: Whether the output is: the outer norm of the hybrid norm.
        layer_scale: The first value of a learned factor for each channel of the output; `None`: without.
    """

    heads: int = 4
    context: int = 512
    rotary: bool = False
    query_key_norm: bool = False
    output_norm: bool = False
    layer_scale: float | None = None

    def check(self, stack: StackConfig) -> None:
        """Raise `ValueError` for heads that do not fit, or a context without tokens."""
        super().check(stack)
        if self.context < 1:
            raise ValueError(f"context: expected a positive number of tokens, got {self.context}")
        if self.rotary:
            check_rotary(stack.width // self.heads)

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> SigmoidAttention:
        """One sigmoid attention."""
        return SigmoidAttention(self, stack, rngs=rngs)


_TINY = SigmoidAttentionConfig(heads=2, context=64, rotary=True, query_key_norm=True, output_norm=True)
PRESETS = {"tiny": StackConfig(width=16, layers=2, pattern=(_TINY,), hidden=32, **LLAMA)}
