"""HGRN: a complex gated linear recurrence whose forget gates have a lower bound that rises from layer to layer.

Zhen Qin, Songlin Yang, Yiran Zhong: Hierarchically Gated Recurrent Neural Network for Sequence Modeling, 2023,
arXiv:2311.04823.

Implemented: the token mixer HGRU, on `primitives.linear_recurrence`. In each channel, σ the logistic sigmoid,

    c_t = silu(W_r x_t + b_r) + i silu(W_i x_t + b_i)
    λ_t = γ + (1 − γ) σ(W_μ x_t + b_μ)
    h_t = λ_t e^{iθ} h_{t−1} + (1 − λ_t) c_t
    y_t = W_o LayerNorm(σ(W_g x_t + b_g) ⊙ [Re h_t, Im h_t]) + b_o

with angles θ that are learned, do not depend on the token, and start as 10000^(−2j/d).

Deviations:

- The bound of layer l = 0 … L − 1. In the paper γ = Σ_{0<j≤l} softmax(Γ)_j for one table Γ of all layers, so that the
  bounds rise whatever is learned. A block here knows its own layer alone: it has the same sum for a table whose rows
  1 … l are its own vector a and whose others are zero,

      γ = l e^a / (l e^a + L − l)

  It starts as the paper's, l / L, is 0 in the first layer (there a has no effect, and no gradient), and stays in
  [0, 1); but that the bounds go on to rise from layer to layer is up to training.
- We had no text of the paper: equations are from released code and a review.
- Projections start from LeCun normals; W_g has full rank. The variants for both directions and for images are not here.
- Presets: sizes of the paper's models were not in what we had. In "tiny" norm and channel mixer are our choice: layer
  norms, and a gated linear unit with silu.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from primitives import linear_recurrence
from zoo.layers import MixerConfig, StackConfig, widen


class HGRN(nnx.Module):
    """The mixer. Its state is a complex `primitives.LinearRecurrenceState`."""

    def __init__(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs):
        width = stack.width
        self.inputs, self.gate = (stack.linear(2 * width, bias=True, rngs=rngs) for _ in range(2))
        self.forget = stack.linear(width, bias=True, rngs=rngs)
        self.theta = nnx.Param(10000.0 ** (-2 * jnp.arange(width, dtype=jnp.float32) / width))
        self.bound = nnx.Param(jnp.zeros(width, jnp.float32))
        self.depth = nnx.Variable(jnp.asarray(layer / stack.layers, jnp.float32))  # l / L
        self.norm = nnx.LayerNorm(2 * width, dtype=stack.dtype, rngs=rngs)
        self.output = stack.linear(width, inputs=2 * width, bias=True, rngs=rngs)

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        keep, write = self.forget_gate(x)
        candidate = jax.lax.complex(*jnp.split(jax.nn.silu(self.inputs(x)).astype(keep.dtype), 2, axis=-1))
        rotation = jnp.exp(1j * self.theta[...])
        hidden, state = linear_recurrence(keep * rotation, write * candidate, state=state, segment_ids=segment_ids)
        y = jnp.concatenate([hidden.real, hidden.imag], axis=-1)
        gate = jax.nn.sigmoid(self.gate(x))
        return self.output(self.norm(gate * y).astype(gate.dtype)), state

    def forget_gate(self, x):
        """λ and 1 − λ, float32 or wider."""
        logits, bound = widen(self.forget(x)), self.lower_bound()
        return bound + (1 - bound) * jax.nn.sigmoid(logits), (1 - bound) * jax.nn.sigmoid(-logits)

    def lower_bound(self):
        """γ of every channel, float32 or wider: l e^a / (l e^a + L − l)."""
        depth, bound = jax.lax.stop_gradient(widen(self.depth[...])), widen(self.bound[...])
        return depth / (depth + (1 - depth) * jnp.exp(-bound))


@dataclasses.dataclass(frozen=True)
class HGRNConfig(MixerConfig):
    """A hierarchically gated recurrence; it has no options."""

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> HGRN:
        """One recurrence."""
        return HGRN(stack, layer, rngs=rngs)


PRESETS = {"tiny": StackConfig(16, 2, (HGRNConfig(),), hidden=32, gated=True, activation="silu")}
