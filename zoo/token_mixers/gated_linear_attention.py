"""Gated linear attention: linear attention whose every key channel forgets at a rate that the token decides.

Songlin Yang, Bailin Wang, Yikang Shen, Rameswar Panda, Yoon Kim: Gated Linear Attention Transformers with
Hardware-Efficient Training, 2023, arXiv:2312.06635.

Implemented: the recurrence of §4.1 and the layer of §4.4. For each head, with keys and queries of half the width,

    q_t = W_q x_t   k_t = W_k x_t   v_t = W_v x_t
    α_t = σ(W_2 W_1 x_t + b)^{1/16}         W_1 to 16 channels
    S_t = diag(α_t) S_{t−1} + k_t v_tᵀ
    y_t = W_o (silu(W_r x_t + b_r) ⊙ [RMSNorm(S_tᵀ q_t / √d_k) of all heads])

on `primitives.linear_attention` with a decay for each key channel.

Deviations: the norm of each head is a root mean square norm with one weight vector for all heads, as in released code,
where the paper writes a layer norm; it removes the scale 1/√d_k but for its ε of 1e-6. The chunked form is that of
`primitives`, not the paper's with secondary chunks. Projections start from LeCun normals. Presets are the paper's two
sizes, with four heads, from memory; `hidden` is 8/3 · width rounded up to a multiple of 256, our reading, which gives
the counts in their names with its 32,000 tokens embedded once.
"""

import dataclasses

import jax
from flax import nnx

from primitives import linear_attention
from zoo.layers import LLAMA, MixerConfig, StackConfig, check_heads, merge_heads, split_heads, widen


class GatedLinearAttention(nnx.Module):
    """The mixer. Its state is a `primitives.LinearAttentionState`."""

    def __init__(self, config: "GatedLinearAttentionConfig", stack: StackConfig, *, rngs: nnx.Rngs):
        self.query, self.key = (stack.linear(stack.width // 2, rngs=rngs) for _ in range(2))
        self.value = stack.linear(stack.width, rngs=rngs)
        self.decay_in = stack.linear(config.rank, rngs=rngs)
        self.decay_out = stack.linear(stack.width // 2, inputs=config.rank, bias=True, rngs=rngs)
        self.gate = stack.linear(stack.width, bias=True, rngs=rngs)
        self.norm = nnx.RMSNorm(stack.width // config.heads, dtype=stack.dtype, rngs=rngs)
        self.output = stack.linear(stack.width, rngs=rngs)
        self.heads, self.temperature = config.heads, config.temperature

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        tokens = self.query(x), self.key(x), self.value(x), self.log_decay(x)
        q, k, v, log_decay = (split_heads(y, self.heads) for y in tokens)
        outputs, state = linear_attention(q, k, v, log_decay, state=state, segment_ids=segment_ids)
        return self.output(jax.nn.silu(self.gate(x)) * merge_heads(self.norm(outputs))), state

    def log_decay(self, x):
        """``log α`` of every key channel, float32 or wider."""
        logits = self.decay_out(self.decay_in(x))
        return jax.nn.log_sigmoid(widen(logits)) / self.temperature


@dataclasses.dataclass(frozen=True)
class GatedLinearAttentionConfig(MixerConfig):
    """Gated linear attention.

    Attributes:
        heads: Number of heads.
        rank: Of the projection to decays.
        temperature: The root that is drawn of decays, which brings them near 1.
    """

    heads: int = 4
    rank: int = 16
    temperature: float = 16.0

    def check(self, stack: StackConfig) -> None:
        """Raise `ValueError` for heads that do not fit, and a rank or a temperature that is not positive."""
        check_heads(stack, 2 * self.heads, "2 · heads")
        if self.rank < 1:
            raise ValueError(f"rank: expected a positive number, got {self.rank}")
        if self.temperature <= 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> GatedLinearAttention:
        """One gated linear attention."""
        return GatedLinearAttention(self, stack, rngs=rngs)


def _stack(width, layers, hidden, scan=True, **options):
    pattern = (GatedLinearAttentionConfig(**options),)
    return StackConfig(width, layers, pattern, hidden=hidden, scan=scan, **LLAMA)


PRESETS = {
    "tiny": _stack(16, 2, 32, scan=False, heads=2),
    "340m": _stack(1024, 24, 2816),
    "1.3b": _stack(2048, 24, 5632),
}
