"""Time-invariant diagonal state spaces on `linear_recurrence`: S4D, S5 and LRU are choices of its decay.

- S4D: Albert Gu, Ankit Gupta, Karan Goel, Christopher Ré: On the Parameterization and Initialization of Diagonal State
  Space Models, 2022, arXiv:2206.11893. Every channel has a state space of its own: `state_space_bank`.
- S5: Jimmy T.H. Smith, Andrew Warrington, Scott W. Linderman: Simplified State Space Layers for Sequence Modeling,
  2022, arXiv:2208.04933. One state space with vectors in and out: `diagonal_state_space`.
- LRU: Antonio Orvieto and others: Resurrecting Recurrent Neural Networks for Long Sequences, 2023, arXiv:2303.06349.
  The same, parameterised in discrete time: `lru_decay`, `lru_normaliser`.

Of pairs of conjugate modes papers keep one and double the real part: that factor belongs into c.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact, Int

from primitives import contract
from primitives.linear_recurrence import LinearRecurrenceState, linear_recurrence

_TERMS = 16  # of a series that is exact in float64 for |z| < 1/2


# --- Parameters ---------------------------------------------------------------------------------------------------


def discretise_zero_order_hold(
    a: Inexact[Array, "..."], dt: Float[Array, "..."]
) -> tuple[Inexact[Array, "..."], Inexact[Array, "..."]]:
    """The discrete form of h' = a h + u for inputs that are constant within a step, elementwise: (decay, input scale).

        decay = exp(a dt),  scale = a⁻¹ (exp(a dt) − 1)

    a and dt broadcast. Both results and their gradients are finite and right for a dt → 0, where the scale is dt.
    """
    z = a * dt
    return jnp.exp(z), dt * _mean_exponential(z)


def _mean_exponential(z):
    """(exp(z) − 1) / z, of which the derivative cancels out near 0: there by its series Σ z^k / (k + 1)!."""
    small = jnp.abs(z) < 0.5
    near, far = jnp.where(small, z, 0), jnp.where(small, 1, z)
    series = jnp.zeros_like(z)
    for k in reversed(range(_TERMS)):
        series = series * near + 1 / math.factorial(k + 1)
    return jnp.where(small, series, jnp.expm1(far) / far)


def discretise_bilinear(
    a: Inexact[Array, "..."], dt: Float[Array, "..."]
) -> tuple[Inexact[Array, "..."], Inexact[Array, "..."]]:
    """The discrete form of h' = a h + u by the trapezoidal rule (Tustin), elementwise: (decay, input scale).

        decay = (1 + a dt / 2) / (1 − a dt / 2),  scale = dt / (1 − a dt / 2)

    a and dt broadcast.
    """
    half = a * dt / 2
    return (1 + half) / (1 - half), dt / (1 - half)


def lru_decay(log_nu: Float[Array, "..."], log_theta: Float[Array, "..."]) -> Inexact[Array, "..."]:
    """The stable exponential parameterisation of LRU: ``λ = exp(−exp(log_nu) + i exp(log_theta))``, so |λ| < 1."""
    return jnp.exp(lax.complex(-jnp.exp(log_nu), jnp.exp(log_theta)))


def lru_normaliser(log_nu: Float[Array, "..."]) -> Float[Array, "..."]:
    """LRU's factor of the inputs, ``√(1 − |λ|²)``: states of white noise have its variance. Right for |λ| → 1 too."""
    return jnp.sqrt(-jnp.expm1(-2 * jnp.exp(log_nu)))


# --- State spaces -------------------------------------------------------------------------------------------------


def diagonal_state_space(
    u: Float[Array, "batch time dim"],
    decay: Inexact[Array, " n"],
    b: Inexact[Array, "n dim"],
    c: Inexact[Array, "dim n"],
    d: Float[Array, " dim"] | None = None,
    *,
    state: LinearRecurrenceState | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch time dim"], LinearRecurrenceState]:
    """One state space with vectors in and out, as in S5 and LRU:

        h_t = decay h_{t−1} + b u_t
        y_t = Re(c h_t) + d u_t

    Args:
        u: Inputs.
        decay: Of every mode, discrete; real or complex as b and c.
        b: Input matrix, discrete: with the scale of the discretisation, or with LRU's normaliser.
        c: Output matrix.
        d: The skip connection of every channel, or `None` for none.
        state: The state of what came before, ``[batch, n]``, or `None` for zero.
        segment_ids: As of `linear_recurrence`.
        implementation: As of `linear_recurrence`.

    Returns:
        Outputs in the dtype of `u`, and the state after the last token.

    Raises:
        ValueError: Shapes that do not fit together, and what `linear_recurrence` raises.
        TypeError: Dtypes that are not floating point (u, d), nor complex (decay, b, c), and what it raises.
    """
    shapes = {"decay": (decay, "n"), "b": (b, "n dim"), "c": (c, "dim n")}
    contract.check_shapes(u=(u, "batch time dim"), **shapes, d=(d, "dim"), segment_ids=(segment_ids, "batch time"))
    expand, read = _einsum("btd,nd->btn"), _einsum("btn,dn->btd")
    return _state_space(expand, read, u, decay, b, c, d, state, segment_ids, implementation)


def state_space_bank(
    u: Float[Array, "batch time dim"],
    decay: Inexact[Array, "dim n"],
    b: Inexact[Array, "dim n"],
    c: Inexact[Array, "dim n"],
    d: Float[Array, " dim"] | None = None,
    *,
    state: LinearRecurrenceState | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch time dim"], LinearRecurrenceState]:
    """A state space with one input and one output for every channel, as in S4D:

        h_t[i] = decay[i] h_{t−1}[i] + b[i] u_t[i]
        y_t[i] = Re(c[i] · h_t[i]) + d[i] u_t[i]

    Arguments, results and errors are those of `diagonal_state_space`, but for the shapes: decay, b and c are
    ``[dim, n]``, the state is ``[batch, dim, n]``. The states of all tokens exist at once, n times the inputs.
    """
    shapes = {"decay": (decay, "dim n"), "b": (b, "dim n"), "c": (c, "dim n")}
    contract.check_shapes(u=(u, "batch time dim"), **shapes, d=(d, "dim"), segment_ids=(segment_ids, "batch time"))
    expand, read = _einsum("btd,dn->btdn"), _einsum("btdn,dn->btd")
    return _state_space(expand, read, u, decay, b, c, d, state, segment_ids, implementation)


def _einsum(subscripts: str) -> Callable[[Array, Array], Array]:
    return lambda x, y: jnp.einsum(subscripts, x, y, precision=lax.Precision.HIGHEST)


def _state_space(expand, read, u, decay, b, c, d, state, segment_ids, implementation):
    contract.check_floating(u=u, d=d)
    contract.check_inexact(decay=decay, b=b, c=c)
    dtype = contract.accumulation_dtype(u)
    inputs = contract.mask_padding(u.astype(dtype), None if segment_ids is None else segment_ids >= 0)
    # Real times complex and the real part of a product as real matmuls: half of the work of complex ones.
    x = lax.complex(expand(inputs, b.real), expand(inputs, b.imag)) if jnp.iscomplexobj(b) else expand(inputs, b)
    h, state = linear_recurrence(decay, x, state=state, segment_ids=segment_ids, implementation=implementation)
    y = read(h.real, c.real)
    if jnp.iscomplexobj(h) and jnp.iscomplexobj(c):
        y -= read(h.imag, c.imag)
    y = y if d is None else y + d * inputs
    return y.astype(u.dtype), state
