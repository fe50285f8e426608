"""RetNet: retention, linear attention with rotated queries and keys and one fixed decay for each head.

Yutao Sun, Li Dong, Shaohan Huang, Shuming Ma, Yuqing Xia, Jilong Xue, Jianyong Wang, Furu Wei: Retentive Network: A
Successor to Transformer for Large Language Models, 2023, arXiv:2307.08621.

Implemented: multi-scale retention (§2.1, §2.2, equations 5, 6 and 8). For head h = 0 … H − 1, with Θ_t the rotation by
t · 10000^(−2i/d) of the pairs i of channels,

    q_t = Θ_t W_q x_t   k_t = Θ_t W_k x_t   v_t = W_v x_t
    S_t = γ S_{t−1} + k_t v_tᵀ        γ = 1 − 2^(−5−h)
    y_t = W_o (silu(W_g x_t) ⊙ GroupNorm([S_tᵀ q_t / √d of all heads]))

on `primitives.linear_attention`: the parallel, the recurrent and the chunkwise form are one function there. Values have
twice the width, and `hidden` is twice the width, so that a block has the 8 + 4 width² parameters of §3.1, as many as a
Transformer's.

Deviations and what we had to choose (the paper is quoted from memory, sizes included):

- The group norm is over each head by itself, without weights: a scale would be one with W_o. Since it removes the scale
  of its input, the paper's three normalisations of scores, there for the precision of float16, are left out; what
  remains of a difference is the ε of 1e-6. Sums are float32 or wider instead.
- Pairs of a rotation are the halves of a head, the same as neighbours up to an order of channels.
- The paper's experiments have heads of 256 and, at all sizes, 1 − γ in geometric steps from 1/32 to 1/512 instead of
  equation 8: `longest`. Presets are the three sizes of its table, without vocabulary.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from primitives import LinearAttentionState, contract, linear_attention, rotary
from zoo.layers import (
    MixerConfig,
    PositionState,
    StackConfig,
    count_positions,
    merge_heads,
    split_heads,
)

SHORTEST = 32  # 1 / (1 − γ) of the first head


class RetentionState(NamedTuple):
    """The state of a `Retention`."""

    attention: LinearAttentionState
    position: PositionState


jax.export.register_namedtuple_serialization(RetentionState, serialized_name="zoo.RetentionState")


class Retention(nnx.Module):
    """The mixer. Its state is a `RetentionState`."""

    def __init__(self, config: "RetentionConfig", stack: StackConfig, *, rngs: nnx.Rngs):
        self.query, self.key = (stack.linear(stack.width, rngs=rngs) for _ in range(2))
        self.value, self.gate = (stack.linear(2 * stack.width, rngs=rngs) for _ in range(2))
        self.output = stack.linear(stack.width, inputs=2 * stack.width, rngs=rngs)
        size = 2 * stack.width // config.heads
        self.norm = nnx.LayerNorm(size, use_bias=False, use_scale=False, dtype=stack.dtype, rngs=rngs)
        self.heads, self.longest = config.heads, config.longest

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        contract.check_state(state, RetentionState)
        attention, position = (None, None) if state is None else state
        positions, position = count_positions(segment_ids, position, *x.shape[:2])
        q, k, v = (split_heads(project(x), self.heads) for project in (self.query, self.key, self.value))
        q, k = rotary(q, positions), rotary(k, positions)
        log_decay = jnp.asarray(np.log(decays(self.heads, self.longest)), contract.accumulation_dtype(q))
        outputs, attention = linear_attention(q, k, v, log_decay, state=attention, segment_ids=segment_ids)
        y = self.output(jax.nn.silu(self.gate(x)) * merge_heads(self.norm(outputs)))
        return y, RetentionState(attention, position)


def decays(heads: int, longest: float | None = None) -> np.ndarray:
    """γ of each head: 1 − γ in geometric steps from 1/32 to 1/`longest`, or halved from head to head (equation 8)."""
    longest = SHORTEST * 2.0 ** (heads - 1) if longest is None else longest
    return 1 - np.geomspace(1 / SHORTEST, 1 / longest, heads)


@dataclasses.dataclass(frozen=True)
class RetentionConfig(MixerConfig):
    """Multi-scale retention.

    Attributes:
        heads: Number of heads.
        longest: 1 / (1 − γ) of the last head; `None`: as in equation 8.
    """

    heads: int = 4
    longest: float | None = None

    def check(self, stack: StackConfig) -> None:
        """Raise `ValueError` for heads that do not fit."""
        super().check(stack)
        if stack.width // self.heads % 2:
            raise ValueError(f"heads: expected heads of even size, got {stack.width // self.heads}")
        if self.longest is not None and self.longest < SHORTEST:
            raise ValueError(f"longest: expected at least {SHORTEST}, that of the first head, got {self.longest}")

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> Retention:
        """One retention."""
        return Retention(self, stack, rngs=rngs)


def _stack(width, layers, scan=True, **options):
    return StackConfig(width, layers, (RetentionConfig(**options),), hidden=2 * width, bias=False, scan=scan)


PRESETS = {
    "tiny": _stack(16, 2, scan=False, heads=2),
    "1.3b": _stack(2048, 24, heads=8, longest=512),
    "2.7b": _stack(2560, 32, heads=10, longest=512),
    "6.7b": _stack(4096, 32, heads=16, longest=512),
}
