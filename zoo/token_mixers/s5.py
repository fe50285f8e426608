"""S5: one diagonal state space for all channels.

Jimmy T.H. Smith, Andrew Warrington, Scott W. Linderman: Simplified State Space Layers for Sequence Modeling, 2022,
arXiv:2208.04933.

Implemented: the layer, with the HiPPO-N start in blocks, and the gate behind it. With one of each pair of conjugate
modes, V the eigenvectors of the J blocks and random real B, C at the start,

    a = −exp(log_real) + i · imaginary,  λ, s = discretise_zero_order_hold(a, dt),  b = V* B,  c = C V
    h_t = λ h_{t−1} + s b u_t,  y_t = 2 Re(c h_t) + d u_t
    o_t = gelu(y_t) ⊙ σ(W gelu(y_t) + b)

with a step dt for each mode.

Deviations and what is our reading:

- We had no text of the paper: equations and the start are from memory.
- The real part of a is minus an exponential, so that no state grows; the paper learns a itself. Where c starts from
  complex numbers in the authors' code it starts from real ones here, seen through V in either case. Gelu is its form
  with a tanh.
- Causal. The models for the Long Range Arena, as configured in the authors' code, read in both directions and have
  batch norms; "cifar" has their sizes with layer norms. No dropout within the block.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from primitives import diagonal_state_space, discretise_zero_order_hold
from zoo.layers import MixerConfig, StackConfig, widen
from zoo.token_mixers.s4d import check_state_size, hippo_normal, join_complex, log_steps, modes


class S5(nnx.Module):
    """The mixer. Its state is a `primitives.LinearRecurrenceState` ``[batch, state_size / 2]``, complex."""

    def __init__(self, config: "S5Config", stack: StackConfig, *, rngs: nnx.Rngs):
        size, blocks = config.state_size, config.blocks
        eigenvalues, vectors = hippo_normal(size // blocks)
        b = jax.random.normal(rngs.params(), (blocks, size // blocks, stack.width)) * stack.width**-0.5
        c = jax.random.normal(rngs.params(), (stack.width, blocks, size // blocks)) * size**-0.5
        b = jnp.einsum("nm,jnd->jmd", vectors.conj().astype(np.complex64), b).reshape(size // 2, stack.width)
        c = jnp.einsum("djn,nm->djm", c, vectors.astype(np.complex64)).reshape(stack.width, size // 2)
        self.log_real = nnx.Param(jnp.full(size // 2, math.log(0.5), jnp.float32))
        self.imaginary = nnx.Param(jnp.tile(jnp.asarray(eigenvalues.imag, jnp.float32), blocks))
        self.log_dt = nnx.Param(log_steps(rngs.params(), (size // 2,)))
        self.b, self.c = (nnx.Param(jnp.stack([matrix.real, matrix.imag])) for matrix in (b, c))
        self.d = nnx.Param(jax.random.normal(rngs.params(), (stack.width,)))
        self.gate = stack.linear(stack.width, bias=True, rngs=rngs)

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        a, dt = modes(self.log_real[...], self.imaginary[...]), jnp.exp(widen(self.log_dt[...]))
        decay, scale = discretise_zero_order_hold(a, dt)
        b, c = scale[:, None] * join_complex(self.b[...]), 2 * join_complex(self.c[...])
        y, state = diagonal_state_space(x, decay, b, c, self.d[...], state=state, segment_ids=segment_ids)
        y = jax.nn.gelu(y)
        return y * jax.nn.sigmoid(self.gate(y)), state


@dataclasses.dataclass(frozen=True)
class S5Config(MixerConfig):
    """One diagonal state space for all channels.

    Attributes:
        state_size: P, of which half is kept; a multiple of twice the blocks.
        blocks: J, of the matrix that the modes start from.
    """

    state_size: int = 64
    blocks: int = 1

    def check(self, stack: StackConfig) -> None:
        """Raise `ValueError` for a state that is not made of blocks of pairs."""
        check_state_size(self.state_size, self.blocks)

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> S5:
        """One S5."""
        return S5(self, stack, rngs=rngs)


PRESETS = {
    "tiny": StackConfig(16, 2, (S5Config(state_size=16, blocks=2),), hidden=0),
    "cifar": StackConfig(512, 6, (S5Config(state_size=384, blocks=3),), hidden=0, dropout=0.1, scan=True),
}
