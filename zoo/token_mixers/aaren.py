"""Aaren: attention with a learned query, as a recurrence over tokens.

Leo Feng, Frederick Tung, Hossein Hajimirsadeghi, Mohamed Osama Ahmed, Yoshua Bengio, Greg Mori:
Attention as an RNN, 2024, arXiv:2405.13956.

Implemented: the module of §3.3, ``[h_1 … h_N] ↦ Aaren(q, [h_1 … h_N])`` with one learned query q per layer, on the
many-to-many attention of §3.1 and §3.2 (`primitives.prefix_scan_attention`). For head h and token i

    s_i = ⟨(W_q q + b_q)_h, (W_k x_i + b_k)_h⟩ / √d_h
    o_t = Σ_{i≤t} exp(s_i) (W_v x_i + b_v)_h / Σ_{i≤t} exp(s_i)
    y_t = W_o [o_t of all heads] + b_o

The paper counts 3,152,896 parameters where its Transformer has 3,152,384: one vector q of 512 more than a layer of
width 512 with feed-forward 2048, which the block here meets exactly.

Deviations and what the paper (its text; we had neither its appendix nor code) leaves open:

- The query is the same for all tokens, so it is folded into the key projection: a logit costs a product of `width`
  numbers for each head, and no key is ever formed. The numbers are those of the equations up to rounding. (b_k moves
  all logits of a head alike: as in every softmax attention it has no effect, and its gradient is zero.)
- The scale 1/√d_h is that of the Transformer; q starts from N(0, 0.02²), the projections from LeCun normals with zero
  biases; dropout acts on residual branches only, since Aaren forms no weights that could be dropped.
- Norm before or after, and positions, are options of the stack. There is no query per token that could be rotated.
- Presets: "paper" is the layer whose parameters the paper counts, with the heads of its forecasting base code. The
  settings' presets are **defaults of the base codes that the paper builds on, not confirmed as its own**; what a base
  code adds around the stack (embeddings by convolution, an encoder-decoder for forecasting) is not here.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from primitives import prefix_scan_attention
from zoo.layers import MixerConfig, StackConfig, merge_heads, split_heads, widen


class Aaren(nnx.Module):
    """The mixer: parameters of self-attention and one learned query. Its state is a `primitives.PrefixState`."""

    def __init__(self, config: "AarenConfig", stack: StackConfig, *, rngs: nnx.Rngs):
        self.heads = config.heads
        self.learned_query = nnx.Param(0.02 * jax.random.normal(rngs.params(), (stack.width,)))
        self.query, self.key, self.value, self.output = (
            stack.linear(stack.width, bias=True, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        values = split_heads(self.value(x), self.heads)
        outputs, state = prefix_scan_attention(self.logits(x), values, state=state, segment_ids=segment_ids)
        return self.output(merge_heads(outputs)), state

    def logits(self, x):
        """``s = ⟨x, W_k q_h⟩ + ⟨b_k, q_h⟩`` with ``q_h = (W_q q + b_q)_h / √d_h``, float32 or wider."""
        query = self.query(self.learned_query[...]).reshape(self.heads, -1)
        query = query * query.shape[-1] ** -0.5
        kernel, bias = (p.reshape(*p.shape[:-1], *query.shape) for p in (self.key.kernel, self.key.bias))
        x = widen(x)
        return x @ jnp.sum(kernel * query, axis=-1) + jnp.sum(bias * query, axis=-1)


@dataclasses.dataclass(frozen=True)
class AarenConfig(MixerConfig):
    """Aaren with a number of heads."""

    heads: int = 4

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> Aaren:
        """One Aaren."""
        return Aaren(self, stack, rngs=rngs)


def presets(mixer: Callable[..., MixerConfig]) -> dict[str, StackConfig]:
    """The same sizes for Aaren and the Transformer that it is compared with."""
    one, two, eight = ((mixer(heads=heads),) for heads in (1, 2, 8))
    post = {"norm_place": "post", "position": "sinusoidal", "dropout": 0.1}
    return {
        "tiny": StackConfig(16, 2, two, hidden=32),
        "paper": StackConfig(512, 1, eight, hidden=2048),
        # Base-code defaults: min-decision-transformer (feed-forward: 4 × width, our reading), meta-tpp, twice TSLib.
        "reinforcement_learning": StackConfig(128, 3, one, hidden=512, **post | {"position": "learned"}),
        "event_forecasting": StackConfig(64, 2, one, hidden=64, dropout=0.1),
        "time_series_forecasting": StackConfig(512, 2, eight, hidden=2048, **post),
        "time_series_classification": StackConfig(128, 3, eight, hidden=256, **post),
    }


PRESETS = presets(AarenConfig)
