"""MoH: attention whose heads are experts; some are shared by all tokens, of the others each token chooses a few.

Peng Jin, Bo Zhu, Li Yuan, Shuicheng Yan: MoH: Multi-Head Attention as Mixture-of-Head Attention, 2024,
arXiv:2410.11842.

Implemented: with H_s shared heads, E routed ones of which K are active, and p = softmax(W_r x) over the routed ones

    [α_1, α_2] = 2 softmax(W_h x)
    g_i = α_1 H_s softmax(W_s x)_i                 for a shared head
    g_i = α_2 K p_i / Σ_{j in the top K} p_j       for a routed head among the top K, else 0
    y = W_o [g_1 head_1 … g_H head_H]

on the heads of `primitives.causal_attention`, and the load balance loss ``E² mean_i(mean_t p_ti · mean_t [i is chosen
by t])``: 1 for each active head where the load is even. The sums over tokens that it needs are in the state, for every
row since the state was fresh; whether `load_balance_loss` of a state is added to a loss, and how weighted, is the
caller's choice.

Deviations and what is open:

- All heads are computed, as in the authors' code, whatever the gates: on dense hardware nothing is saved.
- The factors H_s, K and 2, and the renormalisation over the top K, are those of the authors' code: with routers of zero
  and K = E all gates are 1, and this is plain attention. (With K = 1 the gate of the chosen head is constant, and only
  the load balance loss trains W_r. A single shared head has the gate α_1, without a W_s.)
- Causal, as language models need; the authors' code that we had is that of their image models. Rotary positions as an
  option, no biases in projections, as many heads of keys and values as of queries. Routers compute in float32 or wider.
- The paper's sizes of language models were not in what we had: there is a "tiny" preset only, with 75 % of the heads
  active.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from primitives import AttentionState, cache_positions, causal_attention, contract, rotary
from zoo.layers import MixerConfig, StackConfig, check_rotary, merge_heads, split_heads, widen


class HeadBalance(NamedTuple):
    """Sums over the tokens of a row since the state was fresh, padding left out."""

    probabilities: Float[Array, "batch routed"]
    chosen: Float[Array, "batch routed"]  # how many tokens chose a head
    tokens: Float[Array, " batch"]


class MoHState(NamedTuple):
    """The cache, and what the load balance loss needs."""

    attention: AttentionState
    balance: HeadBalance


jax.export.register_namedtuple_serialization(HeadBalance, serialized_name="zoo.HeadBalance")
jax.export.register_namedtuple_serialization(MoHState, serialized_name="zoo.MoHState")


def load_balance_loss(state: MoHState) -> Float[Array, "*layers"]:
    """How unevenly tokens choose routed heads, over all rows of the state of one mixer, or of several stacked ones.

    Differentiable with respect to the probabilities.
    """
    balance, tokens = state.balance, jnp.maximum(jnp.sum(state.balance.tokens, axis=-1, keepdims=True), 1)
    probabilities, chosen = (jnp.sum(x, axis=-2) / tokens for x in (balance.probabilities, balance.chosen))
    return probabilities.shape[-1] * jnp.sum(probabilities * chosen, axis=-1)


class MixtureOfHeadAttention(nnx.Module):
    """The mixer. Its state is a `MoHState`."""

    def __init__(self, config: "MixtureOfHeadAttentionConfig", stack: StackConfig, *, rngs: nnx.Rngs):
        self.heads, self.shared, self.active = config.heads, config.shared, config.active
        self.rotary = config.rotary

        def router(outputs):
            return nnx.Linear(stack.width, outputs, use_bias=False, rngs=rngs)  # in the dtype of its inputs

        self.query_key_value = stack.linear(3 * stack.width, rngs=rngs)
        self.stage_router, self.routed_router = router(2), router(config.heads - config.shared)
        self.shared_router = router(config.shared) if config.shared > 1 else None
        self.output = stack.linear(stack.width, rngs=rngs)

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        contract.check_state(state, MoHState)
        q, k, v = jnp.split(split_heads(self.query_key_value(x), 3 * self.heads), 3, axis=2)
        cache = None if state is None else state.attention
        if self.rotary:
            positions = cache_positions(segment_ids, cache, *x.shape[:2])
            q, k = rotary(q, positions), rotary(k, positions)
        outputs, cache = causal_attention(q, k, v, state=cache, segment_ids=segment_ids)
        gates, probabilities, chosen = self.gates(x)
        sums = HeadBalance(probabilities, chosen, jnp.ones_like(chosen[..., 0]))
        if segment_ids is not None:
            sums = HeadBalance(*(contract.mask_padding(array, segment_ids >= 0) for array in sums))
        sums = jax.tree.map(lambda array: jnp.sum(array, axis=1), sums)
        balance = sums if state is None else jax.tree.map(jnp.add, state.balance, sums)
        y = self.output(merge_heads(outputs * gates[..., None].astype(outputs.dtype)))
        return y, MoHState(cache, balance)

    def gates(self, x):
        """The gates of all heads, the probabilities of the routed ones, and which of these are chosen, as 0 and 1.

        All float32 or wider: they are counted and summed over tokens, and bfloat16 counts to 256.
        """
        x = widen(x)
        probabilities = jax.nn.softmax(self.routed_router(x))
        _, indices = jax.lax.top_k(probabilities, self.active)
        chosen = jnp.sum(jax.nn.one_hot(indices, probabilities.shape[-1], dtype=probabilities.dtype), axis=-2)
        routed = probabilities * chosen
        routed = self.active * routed / jnp.sum(routed, axis=-1, keepdims=True)
        shared = 1 if self.shared_router is None else self.shared * jax.nn.softmax(self.shared_router(x))
        of_shared, of_routed = jnp.split(2 * jax.nn.softmax(self.stage_router(x)), 2, axis=-1)
        return jnp.concatenate([of_shared * shared, of_routed * routed], axis=-1), probabilities, chosen


@dataclasses.dataclass(frozen=True)
class MixtureOfHeadAttentionConfig(MixerConfig):
    """Mixture-of-head attention.

    Attributes:
        heads: Of queries, keys and values; shared ones and routed ones.
        shared: Heads that every token uses.
        active: Routed heads that each token chooses.
        rotary: Whether queries and keys are turned by their positions.
    """

    heads: int = 8
    shared: int = 2
    active: int = 4
    rotary: bool = True

    def check(self, stack: StackConfig) -> None:
        """Raise `ValueError` for heads that do not fit."""
        super().check(stack)
        if not 1 <= self.shared < self.heads:
            raise ValueError(f"shared: expected a number from 1 to {self.heads - 1}, got {self.shared}")
        if not 1 <= self.active <= self.heads - self.shared:
            raise ValueError(f"active: expected a number from 1 to {self.heads - self.shared}, got {self.active}")
        if self.rotary:
            check_rotary(stack.width // self.heads)

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> MixtureOfHeadAttention:
        """One mixture-of-head attention."""
        return MixtureOfHeadAttention(self, stack, rngs=rngs)


PRESETS = {
    "tiny": StackConfig(
        width=16,
        layers=2,
        pattern=(MixtureOfHeadAttentionConfig(),),
        hidden=32,
        gated=True,
        activation="silu",
        bias=False,
        norm="rms",
    )
}
