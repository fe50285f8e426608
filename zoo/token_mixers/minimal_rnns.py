"""minGRU and minLSTM: gated recurrences whose gates see the token only, so that they are linear in the state.

Leo Feng, Frederick Tung, Mohamed Osama Ahmed, Yoshua Bengio, Hossein Hajimirsadeghi: Were RNNs All We Needed?, 2024,
arXiv:2410.01201.

Implemented: both cells, the minLSTM with its gates divided by their sum (`primitives.linear_recurrence`).

    minGRU:   z_t = σ(W_z x_t),  h_t = (1 − z_t) ⊙ h_{t−1} + z_t ⊙ h̃_t,  h̃_t = W_h x_t
    minLSTM:  f_t = σ(W_f x_t),  i_t = σ(W_i x_t),  h_t = f_t / (f_t + i_t) ⊙ h_{t−1} + i_t / (f_t + i_t) ⊙ h̃_t

The two weights of either cell are σ(−l) and σ(l), with l = W_z x for the minGRU and l = log i − log f for the minLSTM:
so they are computed, and never a quotient. With `positive`, h̃ goes through ``g(a) = a + ½ for a ≥ 0, σ(a) else``, which
the paper's forms in log space need. Biases are in all projections. An expansion α makes states α times as wide as
tokens; a projection leads back.

Deviations and what is our reading: no form in log space is here, since products of decays in (0, 1) are taken as they
are. We had the abstract, not the text: the convolution in front (`taps`), the sizes of the preset "language" and biases
are our reading of the paper's language model. The state starts from zero.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from primitives import LinearRecurrenceState, ShortConvolutionState, contract, linear_recurrence
from zoo.layers import MixerConfig, ShortConvolution, StackConfig


class MinimalRNNState(NamedTuple):
    """What a `MinGRU` or a `MinLSTM` keeps."""

    convolution: ShortConvolutionState | None  # `None` where there is no convolution
    recurrence: LinearRecurrenceState


jax.export.register_namedtuple_serialization(MinimalRNNState, serialized_name="zoo.MinimalRNNState")


class MinGRU(nnx.Module):
    """The mixer."""

    gates = 1

    def __init__(self, config: "MinGRUConfig", stack: StackConfig, *, rngs: nnx.Rngs):
        inner = config.expand * stack.width
        convolution = {"activation": "identity", "bias": True, "dtype": stack.dtype, "rngs": rngs}
        self.convolution = ShortConvolution(stack.width, config.taps, **convolution) if config.taps else None
        self.candidate = stack.linear(inner, bias=True, rngs=rngs)
        self.gate = stack.linear(self.gates * inner, bias=True, rngs=rngs)
        self.output = stack.linear(stack.width, inputs=inner, bias=True, rngs=rngs) if config.expand > 1 else None
        self.positive = config.positive

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        contract.check_state(state, MinimalRNNState)
        convolution, recurrence = (None, None) if state is None else state
        if self.convolution is not None:
            x, convolution = self.convolution(x, convolution, segment_ids=segment_ids)
        candidate, gate = self.candidate(x), self.gate(x)
        dtype = contract.accumulation_dtype(candidate)
        logits, wide = self.logits(gate.astype(dtype)), candidate.astype(dtype)
        if self.positive:
            wide = jnp.where(wide >= 0, wide + 0.5, jax.nn.sigmoid(wide))
        h, recurrence = linear_recurrence(
            jax.nn.sigmoid(-logits), jax.nn.sigmoid(logits) * wide, state=recurrence, segment_ids=segment_ids
        )
        h = h.astype(candidate.dtype)
        return h if self.output is None else self.output(h), MinimalRNNState(convolution, recurrence)

    def logits(self, gate):
        """l, where ``σ(l)`` is the weight of the token and ``σ(−l)`` that of the state."""
        return gate


class MinLSTM(MinGRU):
    """The mixer with two gates."""

    gates = 2

    def logits(self, gate):
        """``log σ(i) − log σ(f)``."""
        forget, enter = jnp.split(gate, 2, axis=-1)
        return jax.nn.softplus(-forget) - jax.nn.softplus(-enter)


@dataclasses.dataclass(frozen=True)
class MinGRUConfig(MixerConfig):
    """A minGRU.

    Attributes:
        expand: α, how many times as wide as a token the state is; above 1 a projection leads back.
        taps: Of a convolution in front, 0 for none.
        positive: Whether candidates are made positive.
    """

    expand: int = 1
    taps: int = 0
    positive: bool = False

    def check(self, stack: StackConfig) -> None:
        """Raise `ValueError` for sizes that make no sense."""
        if self.expand < 1:
            raise ValueError(f"expand: expected a positive number, got {self.expand}")
        if self.taps < 0:
            raise ValueError(f"taps: expected a positive number, or 0 for no convolution, got {self.taps}")

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> MinGRU:
        """One minGRU."""
        return MinGRU(self, stack, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class MinLSTMConfig(MinGRUConfig):
    """A minLSTM, with the options of a minGRU."""

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> MinLSTM:
        """One minLSTM."""
        return MinLSTM(self, stack, rngs=rngs)


PRESETS = {
    name: {
        "tiny": StackConfig(16, 2, (config(expand=2, taps=4),), hidden=32),
        "language": StackConfig(384, 3, (config(taps=4, positive=True),), hidden=4 * 384, dropout=0.2),
    }
    for name, config in {"min_gru": MinGRUConfig, "min_lstm": MinLSTMConfig}.items()
}
