"""Flowformer: attention in linear time whose weights come from a conserved flow between sources and sinks.

Haixu Wu, Jialong Wu, Jiehui Xu, Jianmin Wang, Mingsheng Long: Flowformer: Linearizing Transformers with Conservation
Flows, 2022, arXiv:2202.06258.

Implemented: Flow-Attention as multi-head attention, ``y = W_o [flow(W_q x, W_k x, W_v x) of all heads] + b_o``, on
`primitives.flow_attention` (where the equations are) for tokens that see all others, and on
`primitives.causal_flow_attention` for language models and everything else that is a stack here.

The causal form is an approximation in the authors' own words ("approximate normal conservation"): sums over all tokens
become means over those so far, a source knows of no later sink, and so its outgoing flow is not one, as it is in the
other form.

Deviations: the causal form does not clamp Ô before the softmax over sources, which needs no such precaution here; the
authors' code clamps it to ±1, ±5 (language modelling) or ±10. No dropout inside the mixer. Projections start from LeCun
normals. We had the paper's abstract and the authors' code. The preset "wikitext103" is that of the command in its
README: `transformer_lm` of fairseq, whose sizes are from general knowledge, with dropout 0.1 and positions of 512
tokens; the embedding is the head there (`tied=True`).
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from primitives import causal_flow_attention, flow_attention
from zoo.layers import MixerConfig, StackConfig, merge_heads, split_heads


class FlowAttention(nnx.Module):
    """Flow-Attention among all tokens of a document: no causal mixer, but ``f(x, *, segment_ids=None) -> y``."""

    def __init__(self, config: "CausalFlowAttentionConfig", stack: StackConfig, *, rngs: nnx.Rngs):
        self.query_key_value = stack.linear(3 * stack.width, bias=True, rngs=rngs)
        self.output = stack.linear(stack.width, bias=True, rngs=rngs)
        self.heads = config.heads

    def __call__(self, x, *, segment_ids=None):
        """Mix tokens ``[batch, time, width]``."""
        return self.output(merge_heads(flow_attention(*self.project(x), segment_ids=segment_ids)))

    def project(self, x):
        """Queries, keys and values, ``[batch, time, heads, dim]``."""
        return jnp.split(split_heads(self.query_key_value(x), 3 * self.heads), 3, axis=2)


class CausalFlowAttention(FlowAttention):
    """The mixer. Its state is a `primitives.FlowAttentionState`."""

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        outputs, state = causal_flow_attention(*self.project(x), state=state, segment_ids=segment_ids)
        return self.output(merge_heads(outputs)), state


@dataclasses.dataclass(frozen=True)
class CausalFlowAttentionConfig(MixerConfig):
    """Causal Flow-Attention.

    Attributes:
        heads: Of queries, keys and values.
    """

    heads: int = 4

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> CausalFlowAttention:
        """One causal Flow-Attention."""
        return CausalFlowAttention(self, stack, rngs=rngs)


PRESETS = {
    "tiny": StackConfig(width=16, pattern=(CausalFlowAttentionConfig(heads=2),), hidden=32, position="sinusoidal"),
    "wikitext103": StackConfig(
        width=512,
        layers=6,
        pattern=(CausalFlowAttentionConfig(heads=8),),
        hidden=2048,
        activation="relu",
        position="sinusoidal",
        dropout=0.1,
    ),
}
