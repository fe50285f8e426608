"""Temporal point processes: when the next event comes, and which, given the events so far.

The head is that of Oleksandr Shchur, Marin Biloš, Stephan Günnemann, "Intensity-Free Learning of Temporal Point
Processes" (2020, arXiv:1909.12127, section 3). From the history ``h`` that a stack makes of the events so far, the gap
``τ`` until the next one is a mixture of log-normals, and its mark a categorical that does not depend on the gap::

    w = softmax(W_w h + b_w)    μ = W_μ h + b_μ    log σ = W_σ h + b_σ
    p(τ | h) = Σ_k w_k N(log τ; μ_k, σ_k²) / τ     p(mark | h) = softmax(W_m h + b_m)

Logarithms of gaps are normalised by constants, as there; a `Prediction` is in the unit of the gaps that were given.
Wonho Bae, Mohamed Osama Ahmed, Frederick Tung, Gabriel L. Oliveira, "Meta Temporal Point Processes" (2023,
arXiv:2301.12023) put this head on a causal Transformer. Deviations from their code: the head is linear, without a
hidden layer; ``σ = exp(·)``, as in the first paper, instead of softplus; an event is embedded by the logarithm of the
gap before it instead of by sinusoids; the last event of a sequence is one like others, not the end of the observation.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from primitives import contract
from zoo.layers import Stack, StackConfig, StackState

__all__ = ["SMALLEST_GAP", "PointProcess", "Prediction", "expected_gap", "log_density"]

SMALLEST_GAP = 1e-12
"""What a gap of zero counts as, in any unit, as in the code of Meta Temporal Point Processes."""


class Prediction(NamedTuple):
    """The next event after each event, float32 or wider: a mixture for the logarithm of the gap, logits of the mark."""

    log_weights: Float[Array, "batch time components"]
    means: Float[Array, "batch time components"]
    log_deviations: Float[Array, "batch time components"]
    mark_logits: Float[Array, "batch time marks"] | None  # `None` where there is one mark


def log_density(prediction: Prediction, gap: Float[Array, "batch time"]) -> Float[Array, "batch time"]:
    """``log Σ_k w_k N(log τ; μ_k, σ_k²) − log τ``, the logarithm of the density of a gap ``τ``, per unit of time."""
    log_gap = _log(gap)[..., None]
    normal = jax.scipy.stats.norm.logpdf(log_gap, prediction.means, jnp.exp(prediction.log_deviations))
    return jax.nn.logsumexp(prediction.log_weights + normal, axis=-1) - log_gap[..., 0]


def expected_gap(prediction: Prediction, longest: float | None = None) -> Float[Array, "batch time"]:
    """``E[τ] = Σ_k w_k exp(μ_k + σ_k² / 2)``, the forecast with the least expected squared error.

    Where a `longest` gap ``c`` is given, ``E[min(τ, c)]``, with ``a_k = (log c − μ_k) / σ_k`` and the distribution
    function of a normal ``Φ``::

        Σ_k w_k (exp(μ_k + σ_k² / 2) Φ(a_k − σ_k) + c Φ(−a_k))

    The mean of a log-normal is exponential in ``σ²``, so that one wide component of little weight would decide it.
    """
    weights, means, deviations = prediction.log_weights, prediction.means, jnp.exp(prediction.log_deviations)
    log_means = means + deviations**2 / 2
    if longest is not None:
        a = (math.log(longest) - means) / deviations
        below, above = (jax.scipy.special.log_ndtr(x) for x in (a - deviations, -a))
        log_means = jnp.logaddexp(log_means + below, math.log(longest) + above)
    return jnp.exp(jax.nn.logsumexp(weights + log_means, axis=-1))


def _log(gap):
    return jnp.log(jnp.maximum(gap, SMALLEST_GAP))


class PointProcess(nnx.Module):
    """Events, embedded by the gaps before them and their marks, to the distribution of the next one.

    Args:
        config: Of the stack.
        marks: Number of kinds of events.
        components: Of the mixture.
        mean_log_gap: About the mean of the logarithms of gaps, a constant.
        log_gap_scale: About their standard deviation, a constant.
        rngs: For the initial parameters.

    Raises:
        ValueError: Fewer than one mark or component, or a scale that is not positive.
    """

    def __init__(
        self,
        config: StackConfig,
        *,
        marks: int,
        components: int = 8,
        mean_log_gap: float = 0.0,
        log_gap_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        for name, value in {"marks": marks, "components": components}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if not log_gap_scale > 0:
            raise ValueError(f"log_gap_scale: expected a positive number, got {log_gap_scale}")
        self.embed_gap = nnx.Linear(2, config.width, dtype=config.dtype, rngs=rngs)
        self.embed_mark = nnx.Embed(marks, config.width, rngs=rngs) if marks > 1 else None
        self.stack = Stack(config, rngs=rngs)
        # Small, so that the mixture starts near what the constants say of all gaps; its mean is exponential in σ².
        small = nnx.initializers.normal(0.02)
        self.mixture = nnx.Linear(config.width, 3 * components, dtype=config.dtype, kernel_init=small, rngs=rngs)
        self.mark_head = nnx.Linear(config.width, marks, dtype=config.dtype, rngs=rngs) if marks > 1 else None
        self.mean_log_gap, self.log_gap_scale = float(mean_log_gap), float(log_gap_scale)

    def __call__(
        self,
        gaps: Float[Array, "batch time"],
        marks: Int[Array, "batch time"] | None = None,
        state: StackState | None = None,
        *,
        segment_ids: Int[Array, "batch time"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Prediction, StackState]:
        """The next event after each event, arbitrary at padding (any mark); a gap of zero says that none is known.

        `marks` are numbers from 0 on, and `None` where there is one kind of event.
        """
        contract.check_shapes(
            gaps=(gaps, "batch time"), marks=(marks, "batch time"), segment_ids=(segment_ids, "batch time")
        )
        contract.check_floating(gaps=gaps)
        if (marks is None) != (self.embed_mark is None):
            expected = "None, as there is one kind of event" if self.embed_mark is None else "the marks of the events"
            raise ValueError(f"marks: expected {expected}, got {'None' if marks is None else 'an array'}")
        known = gaps > 0
        normalised = jnp.where(known, (_log(gaps) - self.mean_log_gap) / self.log_gap_scale, 0)
        x = self.embed_gap(jnp.stack([normalised, known.astype(gaps.dtype)], axis=-1))
        if self.embed_mark is not None:
            x = x + self.embed_mark.embedding[...].astype(x.dtype)[marks]
        x, state = self.stack(x, state, segment_ids=segment_ids, key=key)
        wide = contract.accumulation_dtype(x)
        logits, means, log_deviations = jnp.split(self.mixture(x).astype(wide), 3, axis=-1)
        return Prediction(
            jax.nn.log_softmax(logits),
            self.mean_log_gap + self.log_gap_scale * means,
            math.log(self.log_gap_scale) + log_deviations,
            None if self.mark_head is None else self.mark_head(x).astype(wide),
        ), state

    def init_state(self, batch: int, capacity: int = 1) -> StackState:
        """The fresh state, with room for `capacity` events where a mixer keeps them."""
        return self.stack.init_state(batch, capacity)
