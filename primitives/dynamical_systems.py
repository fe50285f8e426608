"""Attention, state spaces and gated recurrent networks as one linear system whose matrices depend on the token.

Jerome Sieber, Carmen Amo Alonso, Alexandre Didier, Melanie N. Zeilinger, Antonio Orvieto: Understanding the differences
in Foundation Models: Attention, State Space Models, and Recurrent Neural Networks, 2024, arXiv:2405.15731:

    h_i = Λ_i h_{i−1} + B_i u_i
    y_i = C_i h_i + D_i u_i

with a diagonal Λ, and the map Φ of all inputs to all outputs. A mixer is a function from its queries, keys, gates … to
such a system. To compute with, take the mixer itself: here B and C are written out, also where they are mostly zeros.

We had the paper's abstract and outline, not its text; what is ours:

- u is what a mixer writes into its state (values, channels), so projections of the tokens are no part of B.
- Heads are systems of their own, and so are the channels of a mixer that does not mix them, with one input each.
- Softmax attention has the features of an exponential, of which there are infinitely many. On one given sequence the
  keys span a space of as many dimensions as there are keys; in that basis φ(k_j) is the j-th unit vector, φ(q_i) holds
  the exponentials of q_i with every key, and the system is exact: its state is the cache of the values.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from primitives import contract


class DynamicalSystem(NamedTuple):
    """The matrices of every token."""

    decay: Float[Array, "batch time heads n"]  # the diagonal of Λ
    input_matrix: Float[Array, "batch time heads n inputs"]  # B
    output_matrix: Float[Array, "batch time heads outputs n"]  # C
    skip: Float[Array, "batch time heads outputs inputs"]  # D


def run_system(
    system: DynamicalSystem,
    u: Float[Array, "batch time heads inputs"],
    hidden: Float[Array, "batch heads n"] | None = None,
) -> tuple[Float[Array, "batch time heads outputs"], Float[Array, "batch heads n"]]:
    """Outputs of all tokens and the last hidden state, token by token as defined; `hidden` is zero where `None`.

    Raises `ValueError` for shapes that do not fit together, `TypeError` for what is not floating point.
    """
    _check(system)
    contract.check_shapes(
        decay=(system.decay, "batch time heads n"),
        input_matrix=(system.input_matrix, "batch time heads n inputs"),
        u=(u, "batch time heads inputs"),
        hidden=(hidden, "batch heads n"),
    )
    contract.check_floating(u=u, hidden=hidden)

    def token(hidden, matrices):
        (decay, b, c, d), u = matrices
        hidden = decay * hidden + _matvec(b, u)
        return hidden, _matvec(c, hidden) + _matvec(d, u)

    if hidden is None:
        hidden = contract.fresh_like(_matvec(system.input_matrix[:, 0], u[:, 0]), 0)
    time_major = DynamicalSystem(*(matrix.swapaxes(0, 1) for matrix in system)), u.swapaxes(0, 1)
    hidden, y = lax.scan(token, hidden, time_major)
    return y.swapaxes(0, 1), hidden


def causal_map(system: DynamicalSystem) -> Float[Array, "batch heads time outputs time inputs"]:
    """Φ with ``y_i = Σ_{j≤i} Φ_ij u_j``: of attention the matrix of its weights, times identities.

        Φ_ij = C_i Λ_i … Λ_{j+1} B_j  (j < i),  Φ_ii = C_i B_i + D_i

    Raises as `run_system` does.
    """
    _check(system)
    decay, b, c, d = system
    i, j = jnp.arange(decay.shape[1])[:, None], jnp.arange(decay.shape[1])
    products = jnp.cumprod(jnp.where((i > j)[:, :, None, None], decay[:, :, None], 1), axis=1)
    products = jnp.where((i >= j)[:, :, None, None], products, 0)
    phi = jnp.einsum("bihon,bijhn,bjhnd->bhiojd", c, products, b, precision=lax.Precision.HIGHEST)
    return phi + jnp.einsum("bihod,ij->bhiojd", d, jnp.eye(len(j), dtype=d.dtype))


# --- The systems of mixers ----------------------------------------------------------------------------------------


def linear_attention_system(
    q: Float[Array, "batch time heads key_dim"],
    k: Float[Array, "batch time heads key_dim"],
    value_dim: int,
    log_decay: Float[Array, "batch time heads #key_dim"] | None = None,
    *,
    scale: float = 1.0,
) -> DynamicalSystem:
    """Of `linear_attention`, u = v: Λ = exp(log_decay) ⊗ I, B = k ⊗ I, C = scale qᵀ ⊗ I, with I over the values."""
    eye = jnp.eye(value_dim, dtype=k.dtype)
    decay = jnp.ones_like(k) if log_decay is None else jnp.broadcast_to(jnp.exp(log_decay), k.shape)
    b = jnp.einsum("bthk,vw->bthkvw", k, eye).reshape(*k.shape[:3], -1, value_dim)
    c = jnp.einsum("bthk,vw->bthvkw", scale * q, eye).reshape(*k.shape[:3], value_dim, -1)
    return DynamicalSystem(jnp.repeat(decay, value_dim, axis=-1), b, c, jnp.zeros((*k.shape[:3], *eye.shape), k.dtype))


def normalised_system(system: DynamicalSystem, eta: Float[Array, "batch time heads"]) -> DynamicalSystem:
    """The system of y_i / η_i, whose state is h_i / η_i: Λ_i η_{i−1} / η_i, B_i / η_i, C_i, D_i / η_i.

    With the system of linear attention: normalised attention for an η of the token alone, as exp(⟨w, u_i⟩);
    `normalised_linear_attention` for ``η_i = ε + Σ_{j≤i} ⟨q_i, k_j⟩``, which depends on all tokens up to it.
    """
    before = jnp.concatenate([eta[:, :1], eta[:, :-1]], axis=1)  # of the first token any: it follows a state of zero
    return system._replace(
        decay=system.decay * (before / eta)[..., None],
        input_matrix=system.input_matrix / eta[..., None, None],
        skip=system.skip / eta[..., None, None],
    )


def softmax_attention_system(
    q: Float[Array, "batch time heads key_dim"],
    k: Float[Array, "batch time heads key_dim"],
    value_dim: int,
    *,
    scale: float | None = None,
) -> DynamicalSystem:
    """Of `causal_attention` on this sequence, u = v: a state for each of its keys (and value channel), exact.

    Normalised linear attention with the features ``φ(q_i)_j = exp(s_ij − max_{j≤i} s_ij)`` and ``φ(k_j)`` = e_j.
    """
    time, scale = q.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("bihd,bjhd->bihj", scale * q, k, precision=lax.Precision.HIGHEST)
    # Keys to come multiply states that are zero; left in, their exponentials could overflow.
    scores = jnp.where(jnp.tril(jnp.ones((time, time), bool))[:, None], scores, -jnp.inf)
    queries = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    keys = jnp.broadcast_to(jnp.eye(time, dtype=q.dtype)[:, None], queries.shape)
    return normalised_system(linear_attention_system(queries, keys, value_dim), jnp.sum(queries, axis=-1))


def selective_scan_system(
    dt: Float[Array, "batch time dim"],
    a: Float[Array, "dim n"],
    b: Float[Array, "batch time n"],
    c: Float[Array, "batch time n"],
    d: Float[Array, " dim"] | None = None,
) -> DynamicalSystem:
    """Of `selective_scan` (S6), u = x with a system for each channel: Λ = exp(dt a), B = dt b, C = cᵀ, D = d."""
    shape = (*dt.shape, a.shape[-1])
    skip = jnp.broadcast_to(0 if d is None else d, dt.shape).astype(dt.dtype)
    output_matrix = jnp.broadcast_to(c[:, :, None], shape)[..., None, :]
    decay, input_matrix = jnp.exp(dt[..., None] * a), (dt[..., None] * b[:, :, None])[..., None]
    return DynamicalSystem(decay, input_matrix, output_matrix, skip[..., None, None])


def ssd_system(
    dt: Float[Array, "batch time heads"],
    a: Float[Array, " heads"],
    b: Float[Array, "batch time heads n"],
    c: Float[Array, "batch time heads n"],
    head_dim: int,
    d: Float[Array, " heads"] | None = None,
) -> DynamicalSystem:
    """Of `ssd`, u = x: Λ = exp(dt a) I, B = dt b ⊗ I, C = cᵀ ⊗ I, D = d I: linear attention but for D."""
    system = linear_attention_system(c, dt[..., None] * b, head_dim, (dt * a)[..., None])
    return (
        system if d is None else system._replace(skip=system.skip + d[:, None, None] * jnp.eye(head_dim, dtype=d.dtype))
    )


def gated_rnn_system(
    forget: Float[Array, "batch time dim"],
    input_gate: Float[Array, "batch time dim"],
    output_gate: Float[Array, "batch time dim"] | None = None,
) -> DynamicalSystem:
    """Of gates on `linear_recurrence`, a system for each channel: Λ = forget, B = input_gate, C = output_gate or 1.

    With three sigmoids of the token it is the quasi-LSTM; with ``a_t = exp(−c softplus(λ) r_t)``, ``√(1 − a_t²) i_t``
    and no output gate the RG-LRU (Soham De et al.: Griffin, 2024, arXiv:2402.19427, §2.4).
    """
    output_gate = jnp.ones_like(forget) if output_gate is None else output_gate
    one = (..., None, None)
    return DynamicalSystem(forget[..., None], input_gate[one], output_gate[one], jnp.zeros_like(forget)[one])


def _matvec(matrix, vector):
    return jnp.einsum("...on,...n->...o", matrix, vector, precision=lax.Precision.HIGHEST)


def _check(system):
    decay, b, c, d = system
    contract.check_shapes(
        decay=(decay, "batch time heads n"),
        input_matrix=(b, "batch time heads n inputs"),
        output_matrix=(c, "batch time heads outputs n"),
        skip=(d, "batch time heads outputs inputs"),
    )
    contract.check_floating(decay=decay, input_matrix=b, output_matrix=c, skip=d)
