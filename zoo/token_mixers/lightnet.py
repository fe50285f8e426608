"""LightNet: linear attention that adds instead of decaying, so that one scan serves any number of dimensions.

Zhen Qin, Yuxin Mao, Xuyang Shen, Dong Li, Jing Zhang, Yuchao Dai, Yiran Zhong: You Only Scan Once: Efficient
Multi-dimension Sequential Modeling with LightNet, 2024, arXiv:2405.21022.

Implemented: the additive recurrence, on `primitives.normalised_exponential` and `primitives.linear_attention`, of each
head with k = W_k x, v = W_v x,

    z_t = log Σ_{i≤t} exp(k_i)
    S_t = diag(exp(z_{t−1} − z_t)) S_{t−1} + exp(k_t − z_t) v_tᵀ
    o_t = S_tᵀ silu(W_q x_t),  y_t = W_o RMSNorm(o_t ⊙ σ(G_2 G_1 x_t))

so that row c of S_t is ``Σ_{i≤t} softmax_{i≤t}(k_ic) v_i``: attention over the prefix with a score for each channel
that no query enters. Such a sum knows no direction. Without causality the prefix becomes the whole, and a single pass
over the tokens of an image, in any order, tells each token of all others (`NonCausalLightNet`):

    o_t = Sᵀ silu(W_q x_t),  S = softmax_tokens(K)ᵀ V

What it does not know is place, which two encodings add:

- TPE, once in front of the first mixer (`tpe`): for each head an exponential moving average with a learned decay,

      p_t = W_p RMSNorm(⟨q_h, k_h⟩ Σ_{i≤t} λ_h^{t−i} x_i),  λ_h = σ(d_h)

  and MD-TPE (`GridPositions`): the sum of one TPE along each axis of a grid.
- LRPE (`lrpe`): queries and keys become ``[x cos φ, x sin φ]`` with learned angles φ = position · θ, and MD-LRPE
  divides the channels among the axes: φ = [n_1 θ, n_2 θ, …]. Their products depend on differences of coordinates.

Deviations and what is left open. The paper's own code was not available; we had its abstract, an implementation by its
first author, and one by others, which differ:

- The gate is a sigmoid, in front of the norm, of a rank as large as the number of heads (the first author's code; the
  other one has a swish behind the norm). Before a document there is nothing, z_0 = −∞, as in the other one; the first
  author's begins with a phantom token of score 0 and value 0.
- TPE: q, k and the input make a matrix of rank one as state; here the state is the vector that it is made of. The norm,
  of each head, leaves of ⟨q, k⟩ little but its sign; its weights are shared by the heads. The encoding is added in the
  first mixer, to its normalised input and to its output, so that the mixer and the residual stream both have it; in
  that code it stands between embedding and stack, and takes the place of its input.
- MD-TPE runs along each axis in one direction, as in that code: what lies behind a pixel in its row or column reaches
  it by the mixer, not by the encoding. Every token takes part in LRPE: class tokens without a place are not here.
- Angles start as those of rotary positions, the same for all heads: our reading.
- Preset "default" has the sizes that the first author's code has by default. The paper's sizes we did not find.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from primitives import (
    LinearAttentionState,
    LinearRecurrenceState,
    NormaliserState,
    contract,
    linear_attention,
    linear_recurrence,
    lrpe,
    normalised_exponential,
)
from zoo.layers import (
    LLAMA,
    MixerConfig,
    PositionState,
    StackConfig,
    count_positions,
    merge_heads,
    split_heads,
    widen,
)

# --- Positions ------------------------------------------------------------------------------------------------------


class ToeplitzPositions(nnx.Module):
    """TPE: ``[batch, time, width]`` to the same, and a `primitives.LinearRecurrenceState`."""

    def __init__(self, heads: int, stack: StackConfig, *, rngs: nnx.Rngs):
        dim = stack.width // heads
        self.heads = heads
        self.query, self.key = (nnx.Param(jax.random.normal(rngs.params(), (heads, dim))) for _ in range(2))
        self.decay = nnx.Param(jax.random.normal(rngs.params(), (heads, 1)))
        self.norm = nnx.RMSNorm(dim, dtype=stack.dtype, rngs=rngs)
        self.output = stack.linear(stack.width, rngs=rngs)

    def __call__(self, x, state=None, *, segment_ids=None):
        """What to add to tokens."""
        decay, values = jax.nn.sigmoid(self.decay[...]), split_heads(x, self.heads)
        average, state = linear_recurrence(decay, values, state=state, segment_ids=segment_ids)
        weight = jnp.sum(self.query[...] * self.key[...], axis=-1, keepdims=True)
        return self.output(merge_heads(self.norm(weight * average))), state


class GridPositions(nnx.Module):
    """MD-TPE: ``[batch, *grid, width]`` to the same, the sum of a TPE along each axis of the grid."""

    def __init__(self, heads: int, axes: int, stack: StackConfig, *, rngs: nnx.Rngs):
        self.along = nnx.List([ToeplitzPositions(heads, stack, rngs=rngs) for _ in range(axes)])

    def __call__(self, x):
        """What to add to tokens."""
        if x.ndim != len(self.along) + 2:
            raise ValueError(f"x: expected a grid of {len(self.along)} axes between batch and width, got {x.shape}")
        return sum(self._scan(positions, x, axis) for axis, positions in enumerate(self.along, start=1))

    def _scan(self, positions, x, axis):
        rows = jnp.moveaxis(x, axis, -2)
        outputs, _ = positions(rows.reshape(-1, *rows.shape[-2:]))
        return jnp.moveaxis(outputs.reshape(rows.shape), -2, axis)


def grid_positions(batch: int, *sizes: int) -> Int[Array, "batch time axes"]:
    """Coordinates of the tokens of a grid that is flattened row by row."""
    coordinates = jnp.stack(jnp.meshgrid(*map(jnp.arange, sizes), indexing="ij"), axis=-1)
    return jnp.broadcast_to(coordinates.reshape(1, -1, len(sizes)), (batch, coordinates[..., 0].size, len(sizes)))


# --- The mixers -----------------------------------------------------------------------------------------------------


class LightNetState(NamedTuple):
    """The state of one mixer."""

    positions: PositionState | None  # `None` without LRPE
    tpe: LinearRecurrenceState | None  # `None` without TPE
    normaliser: NormaliserState
    memory: LinearAttentionState


jax.export.register_namedtuple_serialization(LightNetState, serialized_name="zoo.LightNetState")


class Projections(nnx.Module):
    """What the causal and the non-causal mixer share: everything but the sum over tokens."""

    def __init__(self, config: "LightNetConfig", stack: StackConfig, axes: int, *, rngs: nnx.Rngs):
        width, self.heads = stack.width, config.heads
        self.query, self.key, self.value = (stack.linear(width, rngs=rngs) for _ in range(3))
        self.gate_in = stack.linear(config.heads, rngs=rngs)
        self.gate_out = stack.linear(width, inputs=config.heads, rngs=rngs)
        self.norm = nnx.RMSNorm(width, dtype=stack.dtype, rngs=rngs)
        self.output = stack.linear(width, rngs=rngs)
        self.theta = nnx.Param(_angles(config.heads, -(-width // config.heads // axes))) if config.lrpe else None

    def inputs(self, x):
        """``silu(W_q x)``, keys and values of each head."""
        q, k, v = (split_heads(project(x), self.heads) for project in (self.query, self.key, self.value))
        return jax.nn.silu(q), k, v

    def rotate(self, x, positions):
        """LRPE of queries or keys, if there is one: twice as many channels."""
        return x if self.theta is None else lrpe(x, positions, self.theta[...])

    def outputs(self, x, o):
        """``W_o RMSNorm(o ⊙ σ(G_2 G_1 x))``."""
        return self.output(self.norm(merge_heads(o) * jax.nn.sigmoid(self.gate_out(self.gate_in(x)))))


def _angles(heads, count):
    return jnp.broadcast_to(10000.0 ** -(jnp.arange(count, dtype=jnp.float32) / count), (heads, count))


class LightNet(nnx.Module):
    """The causal mixer. Its state is a `LightNetState`."""

    def __init__(self, config: "LightNetConfig", stack: StackConfig, *, rngs: nnx.Rngs):
        self.projections = Projections(config, stack, 1, rngs=rngs)
        self.tpe = ToeplitzPositions(config.heads, stack, rngs=rngs) if config.tpe else None
        self.lrpe = config.lrpe

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        contract.check_state(state, LightNetState)
        positions, tpe, normaliser, memory = (None,) * 4 if state is None else state
        if self.tpe is None:
            encoding = 0
        else:
            encoding, tpe = self.tpe(x, tpe, segment_ids=segment_ids)
            x = x + encoding
        places = None
        if self.lrpe:
            places, positions = count_positions(segment_ids, positions, *x.shape[:2])
        q, k, v = self.projections.inputs(x)
        k, log_decay, normaliser = normalised_exponential(k, state=normaliser, segment_ids=segment_ids)
        q, k = self.projections.rotate(q, places), self.projections.rotate(k, places)
        if self.lrpe:
            log_decay = jnp.concatenate([log_decay, log_decay], axis=-1)
        o, memory = linear_attention(q, k, v, log_decay, scale=1.0, state=memory, segment_ids=segment_ids)
        return encoding + self.projections.outputs(x, o), LightNetState(positions, tpe, normaliser, memory)


class NonCausalLightNet(nnx.Module):
    """The mixer without causality: one sum over all tokens of a document, no state.

    ``mixer(x, positions=None, *, segment_ids=None) -> y``. Tokens come in any order: their places along each of the
    `axes` are `positions` ``[batch, time, axes]``, which LRPE needs.
    """

    def __init__(self, config: "LightNetConfig", stack: StackConfig, axes: int = 1, *, rngs: nnx.Rngs):
        self.projections = Projections(config, stack, axes, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch time width"],
        positions: Int[Array, "batch time axes"] | None = None,
        *,
        segment_ids: Int[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch time width"]:
        """Mix the tokens of each document; arbitrary but finite at padding, which nothing else sees."""
        contract.check_shapes(
            x=(x, "batch time width"), positions=(positions, "batch time axes"), segment_ids=(segment_ids, "batch time")
        )
        if positions is None and self.projections.theta is not None:
            raise ValueError("positions: expected the places of tokens, which lrpe=True needs")
        q, k, v = self.projections.inputs(x)
        k = softmax_of_documents(k, segment_ids).astype(k.dtype)
        q, k = self.projections.rotate(q, positions), self.projections.rotate(k, positions)
        return self.projections.outputs(x, sum_of_documents(q, k, v, segment_ids))


class GridLightNet(nnx.Module):
    """The mixer of images and videos, ``[batch, *grid, width]`` to the same: MD-TPE if `tpe`, then one sum."""

    def __init__(self, config: "LightNetConfig", stack: StackConfig, axes: int, *, rngs: nnx.Rngs):
        self.tpe = GridPositions(config.heads, axes, stack, rngs=rngs) if config.tpe else None
        self.mixer = NonCausalLightNet(config, stack, axes, rngs=rngs)

    def __call__(self, x):
        """Mix all tokens of each grid."""
        encoding = 0 if self.tpe is None else self.tpe(x)
        x = x + encoding
        batch, *grid, width = x.shape
        return encoding + self.mixer(x.reshape(batch, -1, width), grid_positions(batch, *grid)).reshape(x.shape)


def softmax_of_documents(
    k: Float[Array, "batch time heads dim"], segment_ids: Int[Array, "batch time"] | None = None
) -> Float[Array, "batch time heads dim"]:
    """Softmax over the tokens of each document, float32 or wider; zero at padding."""
    k = widen(k)
    if segment_ids is None:
        return jax.nn.softmax(k, axis=1)
    valid, reset, _ = contract.segments(segment_ids, contract.fresh_counter(segment_ids, len(k)))
    document, valid = jnp.cumsum(reset, axis=1), valid[..., None, None]

    def over(reduce, x):
        return jax.vmap(lambda x, document: reduce(x, document, k.shape[1] + 1)[document])(x, document)

    largest = over(jax.ops.segment_max, jax.lax.stop_gradient(jnp.where(valid, k, -jnp.inf)))
    weights = jnp.where(valid, jnp.exp(jnp.where(valid, k - largest, 0)), 0)
    total = over(jax.ops.segment_sum, weights)
    return weights / jnp.where(total > 0, total, 1)


def sum_of_documents(q, k, v, segment_ids=None):
    """``Σ_i ⟨q_t, k_i⟩ v_i`` over all tokens of the document of t."""
    if segment_ids is None:
        memory = jnp.einsum("bthk,bthv->bhkv", k, v, preferred_element_type=contract.accumulation_dtype(k, v))
        return jnp.einsum("bthk,bhkv->bthv", q, memory).astype(v.dtype)

    def prefix(*arrays):
        *tokens, segment_ids = arrays
        return linear_attention(*tokens, scale=1.0, segment_ids=segment_ids)[0]

    # A row of several documents has several memories: sums up to each token, from both ends, which meet in the token.
    arrays = (q, k, v, segment_ids)
    after = prefix(*(array[:, ::-1] for array in arrays))[:, ::-1]
    return prefix(*arrays) + after - jnp.sum(q * k, axis=-1, keepdims=True).astype(v.dtype) * v


@dataclasses.dataclass(frozen=True)
class LightNetConfig(MixerConfig):
    """LightNet.

    Attributes:
        heads: Of queries, keys and values; also the rank of the gate.
        tpe: Whether this mixer, the first of its stack, adds TPE to the tokens.
        lrpe: Whether queries and keys are turned by their positions.
    """

    heads: int = 8
    tpe: bool = False
    lrpe: bool = False

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> LightNet:
        """One causal LightNet."""
        return LightNet(self, stack, rngs=rngs)


def _stack(width, layers, heads, hidden):
    first, pattern = (LightNetConfig(heads, tpe=True, lrpe=True),), (LightNetConfig(heads, lrpe=True),)
    return StackConfig(width, layers, pattern, first, hidden, **LLAMA)


PRESETS = {"tiny": _stack(16, 2, 2, 32), "default": _stack(1024, 24, 8, 1024)}
