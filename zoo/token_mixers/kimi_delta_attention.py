"""Kimi Delta Attention (KDA): the delta rule with a decay for each key channel, and its hybrid with attention.

Kimi Team: Kimi Linear: An Expressive, Efficient Attention Architecture, 2025, arXiv:2510.26692.

Implemented: the mixer of `zoo.token_mixers.deltanet`, for heads of one size whatever the width, with

    S_t = (I − β_t k_t k_tᵀ) diag(α_t) S_{t−1} + β_t k_t v_tᵀ,  o_t = S_tᵀ q_t
    α_t = exp(−A softplus(W_α↑ W_α↓ x_t + b)),  A = exp(a) for each head, b for each key channel
    y_t = W_o [RMSNorm(o_t) ⊙ σ(W_g↑ W_g↓ x_t + b_g) of all heads]

where the projections of decays and gates have the rank of a head; and the paper's pattern of three KDA to one layer of
full attention without positions.

Deviations: full attention is `zoo.token_mixers.transformer.SelfAttention` without biases, heads sharing the width; the
paper's is multi-head latent attention (MLA), whose cache is compressed. Channel mixers are dense; all but the first of
the paper's are mixtures of experts. A starts uniformly in (1, 16), b as in Gated DeltaNet (our reading), projections
from LeCun normals; o has no factor 1/√d before its norm. We had the paper's abstract and an implementation by its
authors. Presets: "48b_a3b" has the layers, the width and the heads of the published configuration of that name with the
inner size of its one dense layer in all of them, and is **not** a model of 48 billion parameters.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.layers import LLAMA, MixerConfig, StackConfig, split_heads, widen
from zoo.token_mixers.deltanet import DeltaNet
from zoo.token_mixers.gated_deltanet import initial_rates
from zoo.token_mixers.mamba import step_bias
from zoo.token_mixers.transformer import SelfAttentionConfig


class KimiDeltaAttention(DeltaNet):
    """The mixer. Its state is a `zoo.token_mixers.deltanet.DeltaNetState`."""

    def __init__(self, config: "KimiDeltaAttentionConfig", stack: StackConfig, *, rngs: nnx.Rngs):
        heads, dim = config.heads, config.head_dim
        super().__init__(stack, heads, dim, dim, rngs=rngs)
        self.decay = LowRank(stack, dim, heads * dim, rngs=rngs)
        self.decay_bias = nnx.Param(step_bias(rngs.params(), (heads, dim)))
        self.log_rate = nnx.Param(initial_rates(rngs.params(), (heads, 1), 1))
        self.output_gate = LowRank(stack, dim, heads * dim, bias=True, rngs=rngs)

    def log_decay(self, x):
        """``−A softplus(W_α↑ W_α↓ x + b)`` for each key channel."""
        steps = split_heads(widen(self.decay(x)), self.heads) + self.decay_bias[...]
        return -jnp.exp(self.log_rate[...]) * jax.nn.softplus(steps)

    def gate(self, x, y):
        """``y ⊙ σ(W_g↑ W_g↓ x + b_g)``."""
        return y * jax.nn.sigmoid(self.output_gate(x))


class LowRank(nnx.Module):
    """A projection of tokens through few channels."""

    def __init__(self, stack: StackConfig, rank: int, outputs: int, *, bias: bool = False, rngs: nnx.Rngs):
        self.down = stack.linear(rank, rngs=rngs)
        self.up = stack.linear(outputs, inputs=rank, bias=bias, rngs=rngs)

    def __call__(self, x):
        """``[batch, time, width]`` to ``[batch, time, outputs]``."""
        return self.up(self.down(x))


@dataclasses.dataclass(frozen=True)
class KimiDeltaAttentionConfig(MixerConfig):
    """Kimi Delta Attention.

    Attributes:
        heads: Of queries, keys and values.
        head_dim: Size of each, and rank of the projections of decays and gates.
    """

    heads: int = 4
    head_dim: int = 128

    def check(self, stack: StackConfig) -> None:
        """Raise `ValueError` for sizes below one."""
        for name in ("heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> KimiDeltaAttention:
        """One Kimi Delta Attention."""
        return KimiDeltaAttention(self, stack, rngs=rngs)


def hybrid(heads: int, head_dim: int, kimi: int = 3) -> tuple[MixerConfig, ...]:
    """Some layers of KDA, then one of full attention without positions."""
    kimi_delta = KimiDeltaAttentionConfig(heads=heads, head_dim=head_dim)
    return (*(kimi_delta,) * kimi, SelfAttentionConfig(heads=heads, biases=False))


PRESETS = {
    "tiny": StackConfig(
        width=16, layers=2, pattern=(KimiDeltaAttentionConfig(heads=2, head_dim=8),), hidden=32, **LLAMA
    ),
    "tiny_hybrid": StackConfig(width=16, layers=4, pattern=hybrid(heads=2, head_dim=8), hidden=32, **LLAMA),
    "48b_a3b": StackConfig(
        width=2304, layers=27, pattern=6 * hybrid(32, 128) + hybrid(32, 128, kimi=2), hidden=9216, **LLAMA
    ),
}
