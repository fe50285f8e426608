"""Models that any stack of mixers plugs into: a classifier, a forecaster, a language model.

``model(inputs, state=None, *, segment_ids=None, key=None) -> (outputs, state)``: the whole at once, or piece by piece
with the state passed on. Every configuration of a stack (`zoo.layers.StackConfig`) says by itself which mixer it has.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from primitives import contract
from zoo.layers import Stack, StackConfig, StackState, check_choice
from zoo.states import init_state, parameter_dtype


class PoolState(NamedTuple):
    """A running sum over tokens."""

    total: Float[Array, "batch width"]
    count: Float[Array, " batch"]
    segment: Int[Array, " batch"]  # the last non-negative segment id


class PooledState(NamedTuple):
    """The state of a model with one output for each row."""

    stack: StackState
    pool: PoolState


jax.export.register_namedtuple_serialization(PoolState, serialized_name="zoo.PoolState")
jax.export.register_namedtuple_serialization(PooledState, serialized_name="zoo.PooledState")


def pool(
    x: Float[Array, "batch time width"],
    state: PoolState | None = None,
    *,
    segment_ids: Int[Array, "batch time"] | None = None,
    pooling: Literal["last", "mean"] = "last",
) -> tuple[Float[Array, "batch width"], PoolState]:
    """The last real token so far, or the mean of those of the present document; zero where there is none.

    Both are means: over what follows the last *start*, which is a document's first token, or, for "last", any token.
    """
    dtype = contract.accumulation_dtype(x)
    if state is None:
        total = contract.fresh_like(x[:, 0], 0, dtype)
        state = PoolState(total, total[:, 0], contract.fresh_counter(segment_ids, x.shape[0]))
    valid, reset, segment = contract.segments(segment_ids, state.segment)
    if valid is None:
        valid, reset = jnp.ones(x.shape[:2], bool), jnp.zeros(x.shape[:2], bool)
    starts = valid if pooling == "last" else reset
    following = jnp.cumsum(starts[:, ::-1], axis=1)[:, ::-1]  # starts from each token on
    kept, carried = valid & (following == starts), following[:, 0] == 0
    total = jnp.where(carried[:, None], state.total, 0) + jnp.sum(jnp.where(kept[..., None], x, 0), axis=1, dtype=dtype)
    count = jnp.where(carried, state.count, 0) + jnp.sum(kept, axis=1, dtype=dtype)
    return (total / jnp.maximum(count, 1)[:, None]).astype(x.dtype), PoolState(total, count, segment)


class Classifier(nnx.Module):
    """Linear embedding, stack, pooling, linear head: series ``[batch, time, channels]`` to logits ``[batch, classes]``.

    Args:
        config: Of the stack.
        channels: Of the series.
        classes: Number of logits, float32 or wider.
        pooling: "last" real token or "mean" of the real tokens, of the document that the row is in.
        rngs: For the initial parameters.
    """

    def __init__(
        self,
        config: StackConfig,
        *,
        channels: int,
        classes: int,
        pooling: Literal["last", "mean"] = "last",
        rngs: nnx.Rngs,
    ):
        check_choice("pooling", pooling, ("last", "mean"))
        self.embed = nnx.Linear(channels, config.width, dtype=config.dtype, rngs=rngs)
        self.stack = Stack(config, rngs=rngs)
        self.head = nnx.Linear(config.width, classes, dtype=config.dtype, rngs=rngs)
        self.channels, self.pooling = channels, pooling

    def __call__(
        self,
        inputs: Float[Array, "batch time channels"],
        state: PooledState | None = None,
        *,
        segment_ids: Int[Array, "batch time"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch classes"], PooledState]:
        """Logits after the last token of each row."""
        contract.check_shapes(inputs=(inputs, "batch time channels"), segment_ids=(segment_ids, "batch time"))
        contract.check_state(state, PooledState)
        stack, pooled = (None, None) if state is None else state
        x, stack = self.stack(self.embed(inputs), stack, segment_ids=segment_ids, key=key)
        x, pooled = pool(x, pooled, segment_ids=segment_ids, pooling=self.pooling)
        return self.head(x).astype(contract.accumulation_dtype(x)), PooledState(stack, pooled)

    def init_state(self, batch: int, capacity: int = 1) -> PooledState:
        """The fresh state, with room for `capacity` tokens where a mixer keeps them."""
        return init_state(self, jnp.zeros((batch, 1, self.channels), parameter_dtype(self)), capacity)


class Forecaster(nnx.Module):
    """The next `horizon` values of a series, linear in what the stack makes of its last token.

    Args:
        config: Of the stack.
        channels: Of the series.
        horizon: Number of values to forecast for each channel.
        normalise: Bring each row to mean 0 and variance 1 per channel, over its real tokens, and the forecast back
            (Non-stationary Transformers, Yong Liu et al., 2022, arXiv:2205.14415, equations 1 and 2). The statistics
            are those of a whole window: one document in each row, and no state to go on from.
        rngs: For the initial parameters.
    """

    def __init__(self, config: StackConfig, *, channels: int, horizon: int, normalise: bool = True, rngs: nnx.Rngs):
        self.readout = Classifier(config, channels=channels, classes=horizon * channels, rngs=rngs)
        self.horizon, self.normalise = horizon, normalise

    def __call__(
        self,
        inputs: Float[Array, "batch time channels"],
        state: PooledState | None = None,
        *,
        segment_ids: Int[Array, "batch time"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch horizon channels"], PooledState]:
        """Forecasts after the last token of each row; `ValueError` for a state where rows are normalised."""
        if not self.normalise:
            outputs, state = self.readout(inputs, state, segment_ids=segment_ids, key=key)
            return outputs.reshape(*outputs.shape[:1], self.horizon, -1), state
        if state is not None:
            raise ValueError("state: expected None where normalise=True, whose statistics need the whole series")
        real = None if segment_ids is None else (segment_ids >= 0)[..., None]
        mean = jnp.nan_to_num(jnp.mean(inputs, axis=1, keepdims=True, where=real))
        deviation = jnp.sqrt(jnp.nan_to_num(jnp.var(inputs, axis=1, keepdims=True, where=real)) + 1e-5)
        outputs, state = self.readout((inputs - mean) / deviation, segment_ids=segment_ids, key=key)
        return outputs.reshape(*outputs.shape[:1], self.horizon, -1) * deviation + mean, state

    def init_state(self, batch: int, capacity: int = 1) -> PooledState:
        """The fresh state, with room for `capacity` tokens where a mixer keeps them."""
        return self.readout.init_state(batch, capacity)


class LanguageModel(nnx.Module):
    """Embedding, stack, linear head: tokens ``[batch, time]`` to logits of the next ones ``[batch, time, vocabulary]``.

    Embeddings are scaled by √width (Attention Is All You Need, §3.4), so that their initial variance is one: for every
    stack, also where its paper does not do so.

    Args:
        config: Of the stack.
        vocabulary: Number of tokens.
        tied: Use the embedding as the head.
        rngs: For the initial parameters.
    """

    def __init__(self, config: StackConfig, *, vocabulary: int, tied: bool = False, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocabulary, config.width, dtype=config.dtype, rngs=rngs)
        self.stack = Stack(config, rngs=rngs)
        self.head = (
            None if tied else nnx.Linear(config.width, vocabulary, use_bias=False, dtype=config.dtype, rngs=rngs)
        )
        self.dtype = config.dtype

    def __call__(
        self,
        inputs: Int[Array, "batch time"],
        state: StackState | None = None,
        *,
        segment_ids: Int[Array, "batch time"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch time vocabulary"], StackState]:
        """Logits, float32 or wider, after every token; arbitrary at padding (any valid token)."""
        contract.check_shapes(inputs=(inputs, "batch time"), segment_ids=(segment_ids, "batch time"))
        embedding = self.embed.embedding[...]  # `nnx.Embed` computes in float32 where no dtype is given
        x = (embedding[inputs] * self.embed.features**0.5).astype(self.dtype or embedding.dtype)
        x, state = self.stack(x, state, segment_ids=segment_ids, key=key)
        logits = x @ embedding.T.astype(x.dtype) if self.head is None else self.head(x)
        return logits.astype(contract.accumulation_dtype(x)), state

    def init_state(self, batch: int, capacity: int = 1) -> StackState:
        """The fresh state, with room for `capacity` tokens where a mixer keeps them."""
        return init_state(self, jnp.zeros((batch, 1), jnp.int32), capacity)
