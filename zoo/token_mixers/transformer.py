"""The causal Transformer: softmax self-attention whose cache of keys and values is its state.

Ashish Vaswani, Noam Shazeer, Niki Parmar, Jakob Uszkoreit, Llion Jones, Aidan N. Gomez, Łukasz Kaiser, Illia
Polosukhin: Attention Is All You Need, 2017, arXiv:1706.03762.

Implemented: multi-head attention (§3.2.2) with the mask of the decoder (§3.2.3), on `primitives.causal_attention`:

    head_h = softmax_{j≤t}(⟨(W_q x_t)_h, (W_k x_j)_h⟩ / √d_h) (W_v x_j)_h
    y_t = W_o [head_1 … head_H] + b_o

in the same block and stack as every other mixer: the baseline of the papers here.

Deviations: only the decoder's self-attention, no encoder and no cross-attention. Projections have biases (a layer of
width 512 with feed-forward 2048 has the 3,152,384 parameters that "Attention as an RNN" counts for its Transformer) and
start from LeCun normals. Sinusoids come as sines first, then cosines, not interleaved. No dropout of weights, no label
smoothing. Two options are newer: rotary positions (Jianlin Su et al.: RoFormer, 2021, arXiv:2104.09864, equation 34,
with the halves of a head as pairs) and fewer key/value heads (Joshua Ainslie et al.: GQA, 2023, arXiv:2305.13245).
Presets: "base" and "big" are the rows of the paper's table 3; "plus_plus" is the recipe that papers on recurrences call
Transformer++ (rotary positions, RMS norms, SwiGLU, no biases) in our choice of sizes; the others are those of
`zoo.token_mixers.aaren`.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from primitives import cache_positions, causal_attention, rotary
from zoo.layers import LLAMA, MixerConfig, StackConfig, check_rotary, merge_heads, split_heads
from zoo.token_mixers import aaren


class SelfAttention(nnx.Module):
    """The mixer. Its state is a `primitives.AttentionState`."""

    def __init__(self, config: "SelfAttentionConfig", stack: StackConfig, *, rngs: nnx.Rngs):
        self.heads, self.kv_heads, self.rotary = config.heads, config.kv_heads or config.heads, config.rotary
        heads = self.heads + 2 * self.kv_heads
        self.query_key_value = stack.linear(stack.width // self.heads * heads, bias=config.biases, rngs=rngs)
        self.output = stack.linear(stack.width, bias=config.biases, rngs=rngs)

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        heads = split_heads(self.query_key_value(x), self.heads + 2 * self.kv_heads)
        q, k, v = jnp.split(heads, (self.heads, self.heads + self.kv_heads), axis=2)
        if self.rotary:
            positions = cache_positions(segment_ids, state, *x.shape[:2])
            q, k = rotary(q, positions), rotary(k, positions)
        outputs, state = causal_attention(q, k, v, state=state, segment_ids=segment_ids)
        return self.output(merge_heads(outputs)), state


@dataclasses.dataclass(frozen=True)
class SelfAttentionConfig(MixerConfig):
    """Self-attention.

    Attributes:
        heads: Of queries.
        kv_heads: Of keys and values, a divisor of `heads`; `None`: as many.
        rotary: Whether queries and keys are turned by their positions.
        biases: Whether projections have biases.
    """

    heads: int = 4
    kv_heads: int | None = None
    rotary: bool = False
    biases: bool = True

    def check(self, stack: StackConfig) -> None:
        """Raise `ValueError` for heads that do not fit."""
        super().check(stack)
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"kv_heads: expected a divisor of the {self.heads} heads, got {self.kv_heads}")
        if self.rotary:
            check_rotary(stack.width // self.heads)

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> SelfAttention:
        """One self-attention."""
        return SelfAttention(self, stack, rngs=rngs)


_HEADS = {heads: (SelfAttentionConfig(heads),) for heads in (8, 16)}
_PAPER = {"norm_place": "post", "position": "sinusoidal", "activation": "relu"}
_PLUS = (SelfAttentionConfig(16, rotary=True, biases=False),)
PRESETS = {
    **aaren.presets(SelfAttentionConfig),
    "base": StackConfig(512, 6, _HEADS[8], hidden=2048, dropout=0.1, **_PAPER),
    "big": StackConfig(1024, 6, _HEADS[16], hidden=4096, dropout=0.3, **_PAPER),
    "plus_plus": StackConfig(1024, 24, _PLUS, hidden=2816, scan=True, **LLAMA),
}
