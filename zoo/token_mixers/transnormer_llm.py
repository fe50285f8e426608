"""TransNormerLLM: linear attention with a fixed decay per head and layer, normed instead of normalised, and gated.

Zhen Qin, Dong Li, Weigao Sun, Weixuan Sun, Xuyang Shen, Xiaodong Han, Yunshen Wei, Baohong Lv, Fei Yuan, Xiao Luo,
Yu Qiao, Yiran Zhong: Scaling TransNormer to 175 Billion Parameters, 2023, arXiv:2307.14995.

Implemented: gated linear attention (GLA), and the stack around it: SRMSNorm in front of each sub-layer, SGLU (a gated
linear unit without activation) as channel mixer, no biases. For head h = 1 … H of layer l

    q_t = silu(W_q x_t)   k_t = silu(W_k x_t)   v_t = W_v x_t   u_t = W_u x_t
    M_t = λ M_{t−1} + k_t v_tᵀ       λ = exp(−(8 h / H) (1 − l / L))
    y_t = W_o (SRMSNorm([M_tᵀ q_t of all heads]) ⊙ u_t)      SRMSNorm(x) = x √d / |x|

on `primitives.linear_attention`. Positions: in the first layer also LRPE-d, that is, queries and keys become
``[x cos φ, x sin φ]`` with φ = t θ and learned angles θ, so that channel c of a product has the factor
λ^{t−s} cos((t−s) θ_c); the other layers only have the decay. The paper's robust inference is this recurrence, which
never forms λ^{−t}.

Deviations and what we had to read into the paper (we had notes of its text, and the defaults of released code):

- l counts from 0, so that the first layer forgets fastest, λ = e⁻⁸ for the last head, and none remembers for ever. The
  decay is not learned: it is a constant among the arrays of a module, through which no gradient flows.
- LRPE-d in its real form with an angle for each channel of each head, which start as 10000^(−2j/d) for j = 0 … d − 1
  over all heads. The norm is over all heads together, with an ε of 1e-6, and there is no scale 1/√d in front of it.
- Released variants differ: ALiBi's slopes in place of 8 h / H, silu on values too, a gate of low rank. They are not
  here, nor are model parallelism and the kernel (for what that computes see `zoo.token_mixers.lightning_attention`).
- Presets: rows of the paper's table of variants, from memory, with heads of 128 and `hidden` = 8/3 · width rounded up
  to a multiple of 256. The table's counts (1B: 992,165,888 … 175B: 173,356,498,944) are exactly those of such a stack
  if each layer has width / 2 angles, where we have `width` in the first one alone, and 50,272 tokens are embedded once;
  "385m" then lacks 36,864 of 384,974,848.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from primitives import LinearAttentionState, contract, linear_attention, lrpe
from zoo.layers import (
    MixerConfig,
    PositionState,
    StackConfig,
    count_positions,
    merge_heads,
    simple_rms_norm,
    split_heads,
)


class TransNormerState(NamedTuple):
    """The state of a `TransNormer`."""

    attention: LinearAttentionState
    position: PositionState | None  # `None` without LRPE


jax.export.register_namedtuple_serialization(TransNormerState, serialized_name="zoo.TransNormerState")


class TransNormer(nnx.Module):
    """The mixer. Its state is a `TransNormerState`."""

    def __init__(self, config: "TransNormerConfig", stack: StackConfig, layer: int, *, rngs: nnx.Rngs):
        self.query, self.key, self.value, self.gate, self.output = (
            stack.linear(stack.width, rngs=rngs) for _ in range(5)
        )
        slopes = 8 * jnp.arange(1, config.heads + 1, dtype=jnp.float32) / config.heads
        self.log_decay = nnx.Variable(jnp.asarray(-slopes * (1 - layer / stack.layers), jnp.float32))
        angles = 10000.0 ** (-2 * jnp.arange(stack.width, dtype=jnp.float32) / stack.width)
        self.theta = nnx.Param(angles.reshape(config.heads, -1)) if config.lrpe else None
        self.heads = config.heads

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        contract.check_state(state, TransNormerState)
        attention, position = (None, None) if state is None else state
        tokens = jax.nn.silu(self.query(x)), jax.nn.silu(self.key(x)), self.value(x)
        q, k, v = (split_heads(y, self.heads) for y in tokens)
        if self.theta is not None:
            positions, position = count_positions(segment_ids, position, *x.shape[:2])
            q, k = lrpe(q, positions, self.theta[...]), lrpe(k, positions, self.theta[...])
        log_decay = jax.lax.stop_gradient(self.log_decay[...])
        outputs, attention = linear_attention(q, k, v, log_decay, state=attention, scale=1.0, segment_ids=segment_ids)
        y = self.output(simple_rms_norm(merge_heads(outputs)) * self.gate(x))
        return y, TransNormerState(attention, position)


@dataclasses.dataclass(frozen=True)
class TransNormerConfig(MixerConfig):
    """The gated linear attention of TransNormerLLM.

    Attributes:
        heads: Number of heads.
        lrpe: Whether queries and keys are turned by learned angles: in the paper in the first layer.
    """

    heads: int = 4
    lrpe: bool = False

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> TransNormer:
        """One gated linear attention."""
        return TransNormer(self, stack, layer, rngs=rngs)


def _stack(width, layers, heads, hidden, scan=True):
    first, rest = (TransNormerConfig(heads, lrpe=True),), (TransNormerConfig(heads),)
    return StackConfig(
        width, layers, rest, first, hidden, gated=True, activation="identity", bias=False, norm="simple_rms", scan=scan
    )


PRESETS = {
    "tiny": _stack(16, 2, 2, 32, scan=False),
    "385m": _stack(1024, 24, 8, 2816),
    "1b": _stack(2048, 16, 16, 5632),
    "3b": _stack(2560, 32, 20, 6912),
    "7b": _stack(4096, 30, 32, 11008),
    "13b": _stack(5120, 36, 40, 13824),
    "65b": _stack(8192, 72, 64, 22016),
    "175b": _stack(12288, 88, 96, 32768),
}
