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
Presets: "base" and "big" are the rows of the paper's table 3; the others are those of `zoo.token_mixers.aaren`.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from primitives import causal_attention, rotary
from zoo.layers import PositionState, StackConfig, count_positions, fresh_positions
from zoo.token_mixers import aaren


class SelfAttention(nnx.Module):
    """The mixer. Its state is a `primitives.AttentionState`."""

    def __init__(self, config: "TransformerConfig", *, rngs: nnx.Rngs):
        width, self.heads, self.kv_heads = config.width, config.heads, config.kv_heads or config.heads
        self.rotary = config.position == "rotary"
        kv_width = width // self.heads * self.kv_heads
        self.query_key_value = nnx.Linear(width, width + 2 * kv_width, dtype=config.dtype, rngs=rngs)
        self.output = nnx.Linear(width, width, dtype=config.dtype, rngs=rngs)

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        heads = self.query_key_value(x).reshape(*x.shape[:2], self.heads + 2 * self.kv_heads, -1)
        q, k, v = jnp.split(heads, (self.heads, self.heads + self.kv_heads), axis=2)
        if self.rotary:
            before = fresh_positions(segment_ids, x.shape[0])
            if state is not None:
                before = PositionState(state.index - state.start, state.segment)
            positions, _ = count_positions(segment_ids, before, x.shape[1])
            q, k = rotary(q, positions), rotary(k, positions)
        outputs, state = causal_attention(q, k, v, state=state, segment_ids=segment_ids)
        return self.output(outputs.reshape(x.shape)), state


@dataclasses.dataclass(frozen=True)
class TransformerConfig(StackConfig):
    """A stack of Transformer blocks; `kv_heads` divides `heads` (`None`: as many)."""

    kv_heads: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"kv_heads: expected a divisor of the {self.heads} heads, got {self.kv_heads}")
        if self.position == "rotary" and self.width // self.heads % 2:
            raise ValueError(f"position: rotary needs heads of even size, got {self.width // self.heads}")

    def mixer(self, *, rngs: nnx.Rngs) -> SelfAttention:
        """One self-attention."""
        return SelfAttention(self, rngs=rngs)


PRESETS = {
    **{name: TransformerConfig(**dataclasses.asdict(config)) for name, config in aaren.PRESETS.items()},
    "base": TransformerConfig(512, 6, 8, 2048, norm="post", position="sinusoidal", activation="relu", dropout=0.1),
    "big": TransformerConfig(1024, 6, 16, 4096, norm="post", position="sinusoidal", activation="relu", dropout=0.3),
}
