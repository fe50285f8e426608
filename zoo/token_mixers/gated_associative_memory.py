"""Gated associative memory (GAM): a short filter over tokens, and a learned bank that each token reads by itself.

Rishiraj Acharya: Gated Associative Memory: A Parallel O(N) Architecture for Efficient Sequence Modeling, 2025,
arXiv:2509.00605.

Implemented: what stands in for attention in the GAM block, for normalised tokens x, a bank M of learned slots and a
causal filter h of each channel,

    local_t = Σ_{0≤j<taps} h_j ⊙ x_{t−j} + b
    global_t = Mᵀ softmax(M x_t)
    y_t = σ(G_l x_t + b_l) ⊙ local_t + σ(G_g x_t + b_g) ⊙ global_t

without a scale of the logits and without an output projection. The preset "paper" has the 22.6 million parameters that
the paper counts, with a vocabulary of 10,000 and the embedding as the head.

What follows from the equations, and is tested: **nothing of the context is ever written to the memory**. M is a
parameter, the same for all sequences, and `global_t` is a function of one token, a channel mixer by its reach. Tokens
meet in the filter alone, so L layers see ``L (taps − 1) + 1`` tokens (13 in the preset), and the state is the last
``taps − 1`` tokens of each layer. What is farther back cannot be recalled.

Deviations from the author's public code (we had that and the abstract): dropout also acts on the output of the mixer,
as everywhere in this library, and embeddings are scaled by √width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from primitives import contract
from zoo.layers import MixerConfig, ShortConvolution, StackConfig


class GatedAssociativeMemory(nnx.Module):
    """The mixer. Its state is a `primitives.ShortConvolutionState`: the bank is a parameter, no state."""

    def __init__(self, config: "GatedAssociativeMemoryConfig", stack: StackConfig, *, rngs: nnx.Rngs):
        self.bank = nnx.Param(jax.nn.initializers.glorot_uniform()(rngs.params(), (config.slots, stack.width)))
        self.convolution = ShortConvolution(
            stack.width, config.taps, activation="identity", bias=True, dtype=stack.dtype, rngs=rngs
        )
        self.gates = stack.linear(2 * stack.width, bias=True, rngs=rngs)
        self.dtype = stack.dtype

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        local, state = self.convolution(x, state, segment_ids=segment_ids)
        local_gate, global_gate = jnp.split(jax.nn.sigmoid(self.gates(x)), 2, axis=-1)
        return local_gate * local + global_gate * self.read(x), state

    def read(self, x):
        """``Mᵀ softmax(M x)`` of each token, the softmax in float32 or wider."""
        x, bank = (array.astype(self.dtype or array.dtype) for array in (x, self.bank[...]))
        logits = (x @ bank.T).astype(contract.accumulation_dtype(x))
        return jax.nn.softmax(logits).astype(x.dtype) @ bank


@dataclasses.dataclass(frozen=True)
class GatedAssociativeMemoryConfig(MixerConfig):
    """`slots` of the bank; `taps`: tokens that the filter sees, its own among them."""

    slots: int = 512
    taps: int = 3

    def check(self, stack: StackConfig) -> None:
        """Raise `ValueError` for an empty bank and a filter without taps."""
        for name in ("slots", "taps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> GatedAssociativeMemory:
        """One pair of paths."""
        return GatedAssociativeMemory(self, stack, rngs=rngs)


PRESETS = {
    "tiny": StackConfig(width=16, layers=2, pattern=(GatedAssociativeMemoryConfig(slots=8),), hidden=32),
    "paper": StackConfig(
        width=512,
        layers=6,
        pattern=(GatedAssociativeMemoryConfig(),),
        hidden=2048,
        position="learned",
        max_length=256,
        dropout=0.1,
    ),
}
