"""Gated DeltaNet: the delta rule with a decay of the memory for each head and token.

Songlin Yang, Jan Kautz, Ali Hatamizadeh: Gated Delta Networks: Improving Mamba2 with Delta Rule, 2024,
arXiv:2412.06464.

Implemented: the mixer of `zoo.token_mixers.deltanet` with the gated delta rule and an output gate,

    S_t = α_t S_{t−1} + β_t k_t (v_t − α_t S_{t−1}ᵀ k_t)ᵀ,  o_t = S_tᵀ q_t
    α_t = exp(−A softplus(W_α x_t + b)),  A = exp(a) for each head, as in Mamba-2
    y_t = W_o [RMSNorm(o_t) ⊙ silu(W_g x_t) of all heads]

with queries and keys of ¾ of the width, values and gates of 3/2 of it, so that a mixer has about 6 width² parameters.
A starts uniformly in (0, 16), the softplus at 0 of its input log-uniformly in (0.001, 0.1).

Deviations: those of DeltaNet; A starts above 1e-3, so that its logarithm is finite. The paper's hybrids with windowed
attention (H1) and with Mamba-2 too (H2) are patterns of a stack, no presets. We had the paper's abstract and the
authors' code. Presets: width, layers and inner size of the published configurations "0.4B" and "1.3B"; that they have 9
heads is our reading.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.layers import LLAMA, MixerConfig, StackConfig, widen
from zoo.token_mixers.deltanet import DeltaNet
from zoo.token_mixers.mamba import step_bias


class GatedDeltaNet(DeltaNet):
    """The mixer. Its state is a `zoo.token_mixers.deltanet.DeltaNetState`."""

    def __init__(self, config: "GatedDeltaNetConfig", stack: StackConfig, *, rngs: nnx.Rngs):
        key_dim, value_dim = config.head_sizes(stack)
        super().__init__(stack, config.heads, key_dim, value_dim, rngs=rngs)
        self.decay = stack.linear(config.heads, rngs=rngs)
        self.decay_bias = nnx.Param(step_bias(rngs.params(), (config.heads,)))
        self.log_rate = nnx.Param(initial_rates(rngs.params(), (config.heads,), 1e-3))
        self.output_gate = stack.linear(config.heads * value_dim, rngs=rngs)

    def log_decay(self, x):
        """``−A softplus(W_α x + b)`` for each head."""
        return -jnp.exp(self.log_rate[...]) * jax.nn.softplus(widen(self.decay(x)) + self.decay_bias[...])

    def gate(self, x, y):
        """``y ⊙ silu(W_g x)``."""
        return y * jax.nn.silu(self.output_gate(x))


def initial_rates(key, shape, smallest):
    """The logarithm of rates that are uniform up to 16, as in Mamba-2."""
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, smallest, 16))


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig(MixerConfig):
    """Gated DeltaNet.

    Attributes:
        heads: Of queries, keys and values.
        key_expansion: Channels of all keys, in widths.
        value_expansion: Channels of all values, in widths.
    """

    heads: int = 4
    key_expansion: float = 0.75
    value_expansion: float = 1.5

    def check(self, stack: StackConfig) -> None:
        """Raise `ValueError` for heads that do not fit."""
        for name in ("key_expansion", "value_expansion"):
            channels = getattr(self, name) * stack.width
            if self.heads < 1 or channels < 1 or channels % self.heads:
                raise ValueError(f"{name}: expected whole channels for each of {self.heads} heads, got {channels}")

    def head_sizes(self, stack: StackConfig) -> tuple[int, int]:
        """Channels of a key and of a value."""
        return tuple(
            int(expansion * stack.width) // self.heads for expansion in (self.key_expansion, self.value_expansion)
        )

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> GatedDeltaNet:
        """One Gated DeltaNet."""
        return GatedDeltaNet(self, stack, rngs=rngs)


PRESETS = {
    "tiny": StackConfig(width=16, layers=2, pattern=(GatedDeltaNetConfig(heads=2),), hidden=32, **LLAMA),
    "0.4b": StackConfig(width=1536, layers=11, pattern=(GatedDeltaNetConfig(heads=9),), hidden=6144, **LLAMA),
    "1.3b": StackConfig(width=2400, layers=16, pattern=(GatedDeltaNetConfig(heads=9),), hidden=5888, **LLAMA),
}
