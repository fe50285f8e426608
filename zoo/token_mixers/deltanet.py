"""DeltaNet: linear attention in which a token replaces what its key retrieves, rather than adding to it.

Songlin Yang, Bailin Wang, Yu Zhang, Yikang Shen, Yoon Kim: Parallelizing Linear Transformers with the Delta Rule over
Sequence Length, 2024, arXiv:2406.06484; the rule as a linear attention is from Imanol Schlag, Kazuki Irie, Jürgen
Schmidhuber: Linear Transformers Are Secretly Fast Weight Programmers, 2021, arXiv:2102.11174.

Implemented: the mixer of the first paper on `primitives.delta_rule`. For each head, with a short causal convolution
`conv` of each channel and ``unit(x) = x / √(Σ x² + 1e-6)``,

    q_t = unit(silu(conv(W_q x)_t)),  k_t = unit(silu(conv(W_k x)_t)),  v_t = silu(conv(W_v x)_t),  β_t = σ(W_β x_t)
    S_t = S_{t−1} + β_t k_t (v_t − S_{t−1}ᵀ k_t)ᵀ,  o_t = S_tᵀ q_t
    y_t = W_o [RMSNorm(o_t) of all heads]

in blocks of RMS norms and SwiGLU without biases. β < 1 and keys of norm one make every ``I − β k kᵀ`` a contraction.

Deviations: this is neither the form of the second paper (features of queries and keys that sum to one, no convolution)
nor a hybrid (the first paper replaces layers by attention: a pattern of the stack does that). o has no factor 1/√d, as
the authors' code has before its norm, where it changes only what ε means. Projections start from LeCun normals. We had
the paper's abstract and the authors' code. Presets: "1.3b" has the sizes of the authors' published model, with an inner
size of SwiGLU of ⅔ · 4 · width, rounded up to a multiple of 256; "340m" is our reading of the smaller one.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from primitives import DeltaRuleState, ShortConvolutionState, contract, delta_rule
from zoo.layers import LLAMA, MixerConfig, ShortConvolution, StackConfig, merge_heads, split_heads, unit, widen


class DeltaNetState(NamedTuple):
    """The last tokens of the convolution, and the memory of the delta rule."""

    convolution: ShortConvolutionState
    memory: DeltaRuleState


jax.export.register_namedtuple_serialization(DeltaNetState, serialized_name="zoo.DeltaNetState")


class DeltaNet(nnx.Module):
    """The mixer, for heads of any size. Its state is a `DeltaNetState`.

    A mixer with decays or an output gate is a subclass with its own `log_decay` or `gate`.
    """

    def __init__(self, stack: StackConfig, heads: int, key_dim: int, value_dim: int, *, rngs: nnx.Rngs):
        self.splits, channels = (heads * key_dim, 2 * heads * key_dim), heads * (2 * key_dim + value_dim)
        self.query_key_value = stack.linear(channels, rngs=rngs)
        self.convolution = ShortConvolution(channels, 4, dtype=stack.dtype, rngs=rngs)
        self.beta = stack.linear(heads, rngs=rngs)
        self.norm = nnx.RMSNorm(value_dim, epsilon=1e-5, dtype=stack.dtype, rngs=rngs)
        self.output = stack.linear(stack.width, inputs=heads * value_dim, rngs=rngs)
        self.heads = heads

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        contract.check_state(state, DeltaNetState)
        convolution, memory = (None, None) if state is None else state
        mixed, convolution = self.convolution(self.query_key_value(x), convolution, segment_ids=segment_ids)
        q, k, v = (split_heads(y, self.heads) for y in jnp.split(mixed, self.splits, axis=-1))
        beta, log_decay = jax.nn.sigmoid(widen(self.beta(x))), self.log_decay(x)
        o, memory = delta_rule(unit(q), unit(k), v, beta, log_decay, state=memory, scale=1.0, segment_ids=segment_ids)
        y = self.gate(x, merge_heads(self.norm(o)))
        return self.output(y), DeltaNetState(convolution, memory)

    def log_decay(self, x):
        """Log decays of the memory, as `delta_rule` takes them: none."""
        return None

    def gate(self, x, y):
        """What of the outputs passes: all."""
        return y


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig(MixerConfig):
    """DeltaNet.

    Attributes:
        heads: Of queries, keys and values, which share the width.
    """

    heads: int = 4

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> DeltaNet:
        """One DeltaNet."""
        return DeltaNet(stack, self.heads, stack.width // self.heads, stack.width // self.heads, rngs=rngs)


PRESETS = {
    "tiny": StackConfig(width=16, layers=2, pattern=(DeltaNetConfig(heads=2),), hidden=32, **LLAMA),
    "340m": StackConfig(width=1024, layers=24, pattern=(DeltaNetConfig(heads=8),), hidden=2816, **LLAMA),
    "1.3b": StackConfig(width=2048, layers=24, pattern=(DeltaNetConfig(heads=16),), hidden=5632, **LLAMA),
}
