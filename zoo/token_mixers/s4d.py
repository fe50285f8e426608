"""S4D: a diagonal state space for every channel.

Albert Gu, Ankit Gupta, Karan Goel, Christopher Ré: On the Parameterization and Initialization of Diagonal State Space
Models, 2022, arXiv:2206.11893.

Implemented: the diagonal state space with its starts, by zero-order hold or the bilinear rule, in the block of S4. For
channel i with N/2 modes, one of each pair of conjugates, and n from 0,

    a = −exp(log_real) + i · imaginary,  λ, s = discretise(a, dt_i)
    h_t = λ h_{t−1} + s u_t,  y_t = 2 Re ⟨c, h_t⟩ + d_i u_t
    o_t = GLU(W gelu(y_t) + b)

- "linear" (S4D-Lin): a_n = −1/2 + iπn
- "inverse" (S4D-Inv): a_n = −1/2 + i (N/π) (N / (2n + 1) − 1)
- "legs" (S4D-LegS): the eigenvalues of the normal part of the HiPPO-LegS matrix, those with a positive imaginary part

Deviations and what is our reading:

- We had no text of the paper: equations and starts are from memory.
- b is one and not learned: outputs depend on the products of b and c only.
- A recurrence (`primitives.state_space_bank`) where the paper convolves with the kernel of the whole sequence; the
  states of all tokens exist at once.
- Causal. The models for the Long Range Arena, as configured in the authors' code for S4, read in both directions and
  have batch norms; "cifar" has their sizes (N = 64) with layer norms behind the blocks. No dropout within the block,
  and gelu is its form with a tanh.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from primitives import discretise_bilinear, discretise_zero_order_hold, state_space_bank
from zoo.layers import MixerConfig, StackConfig, check_choice, widen

DISCRETISATIONS = {"zero_order_hold": discretise_zero_order_hold, "bilinear": discretise_bilinear}


def log_steps(key, shape):
    """Logarithms of step sizes, uniform between those of 0.001 and 0.1."""
    return jax.random.uniform(key, shape, minval=math.log(1e-3), maxval=math.log(1e-1))


def join_complex(parts):
    """Complex numbers of their real and imaginary parts: parameters are real, optimizers and casts know no others.

    Float32 or wider: there are no narrower complex numbers.
    """
    real, imaginary = (widen(part) for part in parts)
    return lax.complex(real, imaginary)


def modes(log_real, imaginary):
    """``−exp(log_real) + i · imaginary``: modes in continuous time that do not grow."""
    return join_complex((-jnp.exp(widen(log_real)), imaginary))


def hippo_normal(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues with a positive imaginary part of the normal part of HiPPO-LegS, largest first, and eigenvectors.

    A = N − p pᵀ with ``A_nk = −√((2n + 1)(2k + 1))`` below the diagonal, −(n + 1) on it and zero above, p_n = √(n + ½).
    N + ½ is skew-symmetric, so the real part of all is −½. Of each pair of conjugates, `size` / 2, one is returned.
    """
    n = np.arange(size)
    root = np.sqrt(2 * n + 1)
    skew = (np.triu(np.outer(root, root), 1) - np.tril(np.outer(root, root), -1)) / 2
    imaginary, vectors = np.linalg.eigh(-1j * skew)
    positive = slice(None, size // 2 - 1, -1)
    return -0.5 + 1j * imaginary[positive], vectors[:, positive]


def initial_imaginary(start: str, size: int) -> np.ndarray:
    """The imaginary parts of `size` / 2 modes; their real parts are −½."""
    n = np.arange(size // 2)
    if start == "legs":
        return hippo_normal(size)[0].imag
    return {"linear": np.pi * n, "inverse": size / np.pi * (size / (2 * n + 1) - 1)}[start]


def check_state_size(state_size: int, parts: int = 1) -> None:
    """Raise `ValueError` unless a state is so many parts of pairs of conjugates."""
    if state_size < 1 or parts < 1 or state_size % (2 * parts):
        raise ValueError(f"state_size: expected a positive multiple of {2 * parts}, got {state_size}")


class S4D(nnx.Module):
    """The mixer. Its state is a `primitives.LinearRecurrenceState` ``[batch, width, state_size / 2]``, complex."""

    def __init__(self, config: "S4DConfig", stack: StackConfig, *, rngs: nnx.Rngs):
        shape = stack.width, config.state_size // 2
        imaginary = initial_imaginary(config.start, config.state_size)
        self.log_real = nnx.Param(jnp.full(shape, math.log(0.5), jnp.float32))
        self.imaginary = nnx.Param(jnp.broadcast_to(jnp.asarray(imaginary, jnp.float32), shape))
        self.log_dt = nnx.Param(log_steps(rngs.params(), (stack.width,)))
        self.c = nnx.Param(jax.random.normal(rngs.params(), (2, *shape)) * 0.5**0.5)
        self.d = nnx.Param(jax.random.normal(rngs.params(), (stack.width,)))
        self.output = stack.linear(2 * stack.width, bias=True, rngs=rngs)
        self.discretisation = config.discretisation

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        a, dt = modes(self.log_real[...], self.imaginary[...]), jnp.exp(widen(self.log_dt[...]))
        decay, b = DISCRETISATIONS[self.discretisation](a, dt[:, None])
        c = 2 * join_complex(self.c[...])
        y, state = state_space_bank(x, decay, b, c, self.d[...], state=state, segment_ids=segment_ids)
        return jax.nn.glu(self.output(jax.nn.gelu(y))), state


@dataclasses.dataclass(frozen=True)
class S4DConfig(MixerConfig):
    """A diagonal state space for every channel.

    Attributes:
        state_size: N, of each channel; even, for half of it is kept.
        start: Of the state matrix.
        discretisation: From continuous to discrete time.
    """

    state_size: int = 64
    start: Literal["linear", "inverse", "legs"] = "linear"
    discretisation: Literal["zero_order_hold", "bilinear"] = "zero_order_hold"

    def check(self, stack: StackConfig) -> None:
        """Raise `ValueError` for an odd state and for unknown names."""
        check_state_size(self.state_size)
        check_choice("start", self.start, ("linear", "inverse", "legs"))
        check_choice("discretisation", self.discretisation, DISCRETISATIONS)

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> S4D:
        """One S4D."""
        return S4D(self, stack, rngs=rngs)


PRESETS = {
    "tiny": StackConfig(16, 2, (S4DConfig(state_size=8),), hidden=0),
    "cifar": StackConfig(512, 6, (S4DConfig(),), hidden=0, norm_place="post", dropout=0.1, scan=True),
}
