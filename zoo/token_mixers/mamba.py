"""Mamba: a state space whose step, input and output depend on the token, between a short convolution and a gate.

Albert Gu, Tri Dao: Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2023, arXiv:2312.00752.

Implemented: the block of §3.4 around the selective scan of §3.2 (`primitives.selective_scan`), with E = 2:

    x, z = W_in u,  x = silu(conv(x)),  [r, B, C] = W_x x,  dt = softplus(W_dt r + b_dt),  A = −exp(log_a)
    h_t = exp(dt_t A) h_{t−1} + dt_t B_t x_t,  y_t = C_t · h_t + D x_t
    o = W_out (y ⊙ silu(z))

A starts from −1 … −N (S4D-Real), D from ones, b_dt so that steps are log-uniform in [0.001, 0.1] (§3.6). r has
⌈width / 16⌉ numbers. Blocks have no channel mixer, norms are root mean squares in front.

Presets are named and sized as the authors' published models, whose vocabulary is 50,280 and whose embedding is tied.

Deviations: W_dt starts from LeCun normals as all projections do, where the authors' code has uniform numbers, and
output projections are not scaled down with the depth. The bias of the convolution starts from zero. We had no text of
the paper: equations, sections and sizes are from memory.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from primitives import SelectiveScanState, ShortConvolutionState, contract, selective_scan
from zoo.layers import MixerConfig, ShortConvolution, StackConfig, widen
from zoo.token_mixers.s4d import log_steps


def step_bias(key, shape):
    """What `step_sizes` makes log-uniform in [0.001, 0.1] where the projection is zero."""
    dt = jnp.exp(log_steps(key, shape))
    return dt + jnp.log(-jnp.expm1(-dt))  # the inverse of the softplus


def step_sizes(projected, bias):
    """``softplus(projected + bias)``, float32 or wider: steps are small, and their products with A are exponents."""
    return jax.nn.softplus(widen(projected) + bias)


class MambaState(NamedTuple):
    """What a `Mamba` keeps."""

    convolution: ShortConvolutionState
    scan: SelectiveScanState


jax.export.register_namedtuple_serialization(MambaState, serialized_name="zoo.MambaState")


class Mamba(nnx.Module):
    """The mixer."""

    def __init__(self, config: "MambaConfig", stack: StackConfig, *, rngs: nnx.Rngs):
        inner, n, self.rank = config.expand * stack.width, config.state_size, -(-stack.width // 16)
        self.input = stack.linear(2 * inner, rngs=rngs)
        self.convolution = ShortConvolution(inner, config.taps, bias=True, dtype=stack.dtype, rngs=rngs)
        self.select = stack.linear(self.rank + 2 * n, inputs=inner, rngs=rngs)
        self.dt = stack.linear(inner, inputs=self.rank, rngs=rngs)
        self.dt_bias = nnx.Param(step_bias(rngs.params(), (inner,)))
        self.log_a = nnx.Param(jnp.broadcast_to(jnp.log(jnp.arange(1, n + 1, dtype=jnp.float32)), (inner, n)))
        self.d = nnx.Param(jnp.ones(inner))
        self.output = stack.linear(stack.width, inputs=inner, rngs=rngs)

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        contract.check_state(state, MambaState)
        before = MambaState(None, None) if state is None else state
        x, z = jnp.split(self.input(x), 2, axis=-1)
        x, convolution = self.convolution(x, before.convolution, segment_ids=segment_ids)
        rank, n = self.rank, self.log_a.shape[1]
        low, b, c = jnp.split(self.select(x), (rank, rank + n), axis=-1)
        dt, a = step_sizes(self.dt(low), self.dt_bias[...]), -jnp.exp(self.log_a[...])
        y, scan = selective_scan(x, dt, a, b, c, self.d[...], state=before.scan, segment_ids=segment_ids)
        return self.output(y * jax.nn.silu(z)), MambaState(convolution, scan)


@dataclasses.dataclass(frozen=True)
class MambaConfig(MixerConfig):
    """A Mamba.

    Attributes:
        expand: E, how many times as wide as a token the state space is.
        state_size: N, of each of its channels.
        taps: Of the convolution.
    """

    expand: int = 2
    state_size: int = 16
    taps: int = 4

    def check(self, stack: StackConfig) -> None:
        """Raise `ValueError` for sizes that are not positive."""
        for option in ("expand", "state_size", "taps"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option}: expected a positive number, got {getattr(self, option)}")

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> Mamba:
        """One Mamba."""
        return Mamba(self, stack, rngs=rngs)


SIZES = {"130m": (768, 24), "370m": (1024, 48), "790m": (1536, 48), "1.4b": (2048, 48), "2.8b": (2560, 64)}
PRESETS = {
    "tiny": StackConfig(16, 2, (MambaConfig(state_size=4),), hidden=0, norm="rms"),
    **{name: StackConfig(*size, (MambaConfig(),), hidden=0, norm="rms", scan=True) for name, size in SIZES.items()},
}
