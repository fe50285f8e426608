"""LRU: a linear recurrence with complex modes, parameterised in discrete time.

Antonio Orvieto, Samuel L. Smith, Albert Gu, Anushan Fernando, Caglar Gulcehre, Razvan Pascanu, Soham De: Resurrecting
Recurrent Neural Networks for Long Sequences, 2023, arXiv:2303.06349.

Implemented: the Linear Recurrent Unit with its stable exponential parameterisation, its start on a ring of the unit
disk and its normalisation, in a block with a gated linear unit:

    λ = exp(−exp(log_nu) + i exp(log_theta)),  |λ|² uniform in [r_min², r_max²], phase uniform in [0, max_phase]
    h_t = λ ⊙ h_{t−1} + exp(log_gamma) ⊙ (B u_t),  log_gamma = log √(1 − |λ|²) at the start
    y_t = Re(C h_t) + d ⊙ u_t
    o_t = GLU(W gelu(y_t) + b)

Deviations and what is our reading: the start of B and C (complex normals, their squared moduli 1/width and 2/state_size
on average) and the block around the unit are our reading of the paper, of which we had no text; its models have batch
norms, here are layer norms. The ring that a preset starts from is ours, and the paper's sizes are not here.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from primitives import diagonal_state_space, lru_decay, lru_normaliser
from zoo.layers import MixerConfig, StackConfig, widen
from zoo.token_mixers.s4d import join_complex


class LRU(nnx.Module):
    """The mixer. Its state is a `primitives.LinearRecurrenceState` ``[batch, state_size]``, complex."""

    def __init__(self, config: "LRUConfig", stack: StackConfig, *, rngs: nnx.Rngs):
        width, size = stack.width, config.state_size
        # Above zero, where logarithms are finite.
        ring, phase = (jax.random.uniform(rngs.params(), (size,), minval=1e-6) for _ in range(2))
        square = config.r_min**2 + ring * (config.r_max**2 - config.r_min**2)
        self.log_nu = nnx.Param(jnp.log(-0.5 * jnp.log(square)))
        self.log_theta = nnx.Param(jnp.log(config.max_phase * phase))
        self.log_gamma = nnx.Param(jnp.log(lru_normaliser(self.log_nu[...])))
        self.b = nnx.Param(jax.random.normal(rngs.params(), (2, size, width)) * (2 * width) ** -0.5)
        self.c = nnx.Param(jax.random.normal(rngs.params(), (2, width, size)) * size**-0.5)
        self.d = nnx.Param(jax.random.normal(rngs.params(), (width,)))
        self.output = stack.linear(2 * width, bias=True, rngs=rngs)

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        log_nu, log_theta, log_gamma = (widen(p[...]) for p in (self.log_nu, self.log_theta, self.log_gamma))
        decay = lru_decay(log_nu, log_theta)
        b, c = jnp.exp(log_gamma)[:, None] * join_complex(self.b[...]), join_complex(self.c[...])
        y, state = diagonal_state_space(x, decay, b, c, self.d[...], state=state, segment_ids=segment_ids)
        return jax.nn.glu(self.output(jax.nn.gelu(y))), state


@dataclasses.dataclass(frozen=True)
class LRUConfig(MixerConfig):
    """A linear recurrent unit.

    Attributes:
        state_size: Number of complex modes.
        r_min: The least modulus of a mode at the start.
        r_max: The largest.
        max_phase: The largest phase of a mode at the start.
    """

    state_size: int = 64
    r_min: float = 0.9
    r_max: float = 0.999
    max_phase: float = 2 * math.pi

    def check(self, stack: StackConfig) -> None:
        """Raise `ValueError` for an empty state, and for a ring that is not in the unit disk."""
        if self.state_size < 1:
            raise ValueError(f"state_size: expected a positive number, got {self.state_size}")
        if not 0 <= self.r_min < self.r_max < 1:
            raise ValueError(f"r_min, r_max: expected 0 <= r_min < r_max < 1, got {self.r_min}, {self.r_max}")
        if not 0 < self.max_phase <= 2 * math.pi:
            raise ValueError(f"max_phase: expected a number in (0, 2π], got {self.max_phase}")

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> LRU:
        """One LRU."""
        return LRU(self, stack, rngs=rngs)


PRESETS = {"tiny": StackConfig(16, 2, (LRUConfig(state_size=8),), hidden=0)}
