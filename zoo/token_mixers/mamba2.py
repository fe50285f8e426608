"""Mamba-2: linear attention with a decay for each head and token, between a short convolution and a gated norm.

Tri Dao, Albert Gu: Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space
Duality, 2024, arXiv:2405.21060.

Implemented: the block of §7 around state-space duality (`primitives.ssd`). All projections are parallel, at the start;
heads share B and C (the multi-value pattern):

    z, [x, B, C], dt = W_in u,  [x, B, C] = silu(conv([x, B, C])),  dt = softplus(dt + b_dt),  a = −exp(log_a)
    S_t = exp(dt_t a) S_{t−1} + B_t (dt_t x_t)ᵀ,  y_t = S_tᵀ C_t + d x_t   for each head
    o = W_out RMSNorm(y ⊙ silu(z))

a starts from minus uniform numbers in [1, 16], d from ones, b_dt so that steps are log-uniform in [0.001, 0.1]. Blocks
have no channel mixer, norms are root mean squares in front.

Presets are named and sized as the authors' published models, whose vocabulary is 50,288 and whose embedding is tied.

Deviations: one group of B and C (the paper has groups for tensor parallelism), output projections are not scaled down
with the depth, and the bias of the convolution starts from zero. We had no text of the paper: equations, sections and
sizes are from memory.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from primitives import LinearAttentionState, ShortConvolutionState, contract, ssd
from zoo.layers import MixerConfig, ShortConvolution, StackConfig, merge_heads, split_heads
from zoo.token_mixers.mamba import step_bias, step_sizes


class Mamba2State(NamedTuple):
    """What a `Mamba2` keeps."""

    convolution: ShortConvolutionState
    attention: LinearAttentionState


jax.export.register_namedtuple_serialization(Mamba2State, serialized_name="zoo.Mamba2State")


class Mamba2(nnx.Module):
    """The mixer."""

    def __init__(self, config: "Mamba2Config", stack: StackConfig, *, rngs: nnx.Rngs):
        self.inner, self.state_size = config.expand * stack.width, config.state_size
        inner, heads = self.inner, self.inner // config.head_dim
        convolved = inner + 2 * config.state_size
        self.input = stack.linear(inner + convolved + heads, rngs=rngs)
        self.convolution = ShortConvolution(convolved, config.taps, bias=True, dtype=stack.dtype, rngs=rngs)
        self.dt_bias = nnx.Param(step_bias(rngs.params(), (heads,)))
        self.log_a = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (heads,), minval=1.0, maxval=16.0)))
        self.d = nnx.Param(jnp.ones(heads))
        self.norm = nnx.RMSNorm(inner, dtype=stack.dtype, rngs=rngs)
        self.output = stack.linear(stack.width, inputs=inner, rngs=rngs)

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        contract.check_state(state, Mamba2State)
        before = Mamba2State(None, None) if state is None else state
        inner, n, heads = self.inner, self.state_size, len(self.d)
        z, x, dt = jnp.split(self.input(x), (inner, 2 * (inner + n)), axis=-1)
        x, convolution = self.convolution(x, before.convolution, segment_ids=segment_ids)
        x, b, c = jnp.split(x, (inner, inner + n), axis=-1)
        y, attention = ssd(
            split_heads(x, heads),
            step_sizes(dt, self.dt_bias[...]),
            -jnp.exp(self.log_a[...]),
            b[:, :, None],
            c[:, :, None],
            self.d[...],
            state=before.attention,
            segment_ids=segment_ids,
        )
        return self.output(self.norm(merge_heads(y) * jax.nn.silu(z))), Mamba2State(convolution, attention)


@dataclasses.dataclass(frozen=True)
class Mamba2Config(MixerConfig):
    """A Mamba-2.

    Attributes:
        expand: How many times as wide as a token all heads together are.
        head_dim: Size of a head, a divisor of that.
        state_size: N, the number of rows of a head's state.
        taps: Of the convolution.
    """

    expand: int = 2
    head_dim: int = 64
    state_size: int = 128
    taps: int = 4

    def check(self, stack: StackConfig) -> None:
        """Raise `ValueError` for sizes that are not positive, and for heads that do not fit."""
        for option in ("expand", "head_dim", "state_size", "taps"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option}: expected a positive number, got {getattr(self, option)}")
        if self.expand * stack.width % self.head_dim:
            raise ValueError(f"head_dim: expected a divisor of {self.expand * stack.width}, got {self.head_dim}")

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> Mamba2:
        """One Mamba-2."""
        return Mamba2(self, stack, rngs=rngs)


SIZES = {"130m": (768, 24), "370m": (1024, 48), "780m": (1536, 48), "1.3b": (2048, 48), "2.7b": (2560, 64)}
PRESETS = {
    "tiny": StackConfig(16, 2, (Mamba2Config(head_dim=8, state_size=4),), hidden=0, norm="rms"),
    **{name: StackConfig(*size, (Mamba2Config(),), hidden=0, norm="rms", scan=True) for name, size in SIZES.items()},
}
