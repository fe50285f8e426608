"""What every stack of causal mixers shares: dropout, feed-forward, positions, residual blocks, the stack.

A mixer is a module ``mixer(x, state=None, *, segment_ids=None, key=None) -> (y, state)`` and so is everything that is
made of mixers: `x` is ``[batch, time, width]``, `segment_ids` marks packed documents and, below zero, padding, where
`y` is arbitrary but finite. ``state=None`` is a fresh start, ``key=None`` means no dropout. A configuration with a
method ``mixer(rngs=...)`` says which one a stack is made of.
"""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from primitives import angles, contract
from zoo.states import init_state, parameter_dtype


def check_choice(argument: str, value: Any, choices: Iterable[str]) -> None:
    """Raise `ValueError`, with the nearest choices, for a value that is not among them."""
    choices = sorted(choices)
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"{argument}: expected one of {', '.join(choices)}, got {value!r}{hint}")


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """Sizes and options of a stack; a subclass per mixer adds the method ``mixer(rngs=...)`` and its own options.

    Attributes:
        width: Size of a token.
        layers: Number of blocks.
        heads: Number of heads of the mixer.
        hidden: Inner size of the feed-forward.
        norm: Layer norm before each sub-layer (and once at the end), or after each residual sum as in the first papers.
        position: What tells tokens their place: nothing, sinusoids, a learned table of `max_length` rows (both are
            added to the stack's input), or rotations of queries and keys in every mixer that has both.
        max_length: Rows of the learned table; positions beyond give NaN.
        activation: Of the feed-forward.
        dropout: Rate, on the stack's input and on each sub-layer's output (Attention Is All You Need, §5.4).
        dtype: In which a model computes, with parameters in float32; `None`: that of inputs and parameters.
    """

    width: int = 64
    layers: int = 2
    heads: int = 4
    hidden: int = 128
    norm: Literal["pre", "post"] = "pre"
    position: Literal["none", "sinusoidal", "learned", "rotary"] = "none"
    max_length: int = 512
    activation: Literal["relu", "gelu"] = "gelu"
    dropout: float = 0.0
    dtype: DTypeLike | None = None

    def __post_init__(self):
        check_choice("norm", self.norm, ("pre", "post"))
        check_choice("position", self.position, ("none", "sinusoidal", "learned", "rotary"))
        check_choice("activation", self.activation, ("relu", "gelu"))
        for size in ("width", "layers", "heads", "hidden", "max_length"):
            if getattr(self, size) < 1:
                raise ValueError(f"{size}: expected a positive number, got {getattr(self, size)}")
        if self.width % self.heads:
            raise ValueError(f"width: expected a multiple of the {self.heads} heads, got {self.width}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a rate in [0, 1), got {self.dropout}")

    def mixer(self, *, rngs: nnx.Rngs) -> nnx.Module:
        """One mixer of the stack."""
        raise NotImplementedError(f"{type(self).__name__} names no mixer: use the configuration of a paper")


# --- Functions ----------------------------------------------------------------------------------------------------


def dropout(x: Float[Array, "*shape"], rate: float, key: PRNGKeyArray | None) -> Float[Array, "*shape"]:
    """Zero each element with probability `rate` and scale up the rest; the identity where `key` is `None`."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def split_key(key: PRNGKeyArray | None, count: int) -> Iterable[PRNGKeyArray | None]:
    """Independent keys, or as many times `None`."""
    return [None] * count if key is None else jax.random.split(key, count)


class PositionState(NamedTuple):
    """Where each row stands in its document."""

    position: Int[Array, " batch"]  # of the next token
    segment: Int[Array, " batch"]  # the last non-negative segment id


jax.export.register_namedtuple_serialization(PositionState, serialized_name="zoo.PositionState")


def count_positions(
    segment_ids: Int[Array, "batch time"] | None, state: PositionState, time: int
) -> tuple[Int[Array, "batch time"], PositionState]:
    """The position of every token in its document, counted over real tokens (that of padding means nothing)."""
    segments = contract.segments(segment_ids, state.segment)
    number, first = contract.count_tokens(segments, state.position, jnp.zeros_like(state.position), time)
    positions = number - first
    return positions, PositionState(positions[:, -1] + 1, segments.last)


def fresh_positions(segment_ids: Int[Array, "batch time"] | None, batch: int) -> PositionState:
    """Every row at the start of a document."""
    zero = contract.fresh_counter(segment_ids, batch)
    return PositionState(zero, zero)


# --- Modules ------------------------------------------------------------------------------------------------------


class Positions(nnx.Module):
    """Adds a vector to each token that depends on its position: sinusoids (sines first, then cosines) or a table."""

    def __init__(self, config: StackConfig, *, rngs: nnx.Rngs):
        shape = (config.max_length, config.width)
        learned = config.position == "learned"
        self.table = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape)) if learned else None
        self.width, self.max_length = config.width, config.max_length

    def __call__(self, x, state=None, *, segment_ids=None):
        """Tokens with their positions, and a `PositionState`."""
        if self.table is not None and x.shape[1] > self.max_length:
            raise ValueError(f"x: expected at most {self.max_length} tokens (max_length), got {x.shape[1]}")
        state = fresh_positions(segment_ids, x.shape[0]) if state is None else state
        positions, state = count_positions(segment_ids, state, x.shape[1])
        if self.table is None:
            phase = angles(positions, self.width, contract.accumulation_dtype(x))
            vectors = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)[..., : self.width]
        else:
            vectors = self.table[...].at[positions].get(mode="fill", fill_value=jnp.nan)
        return x + vectors.astype(x.dtype), state


class FeedForward(nnx.Module):
    """``W_2 activation(W_1 x + b_1) + b_2`` for each token."""

    def __init__(self, config: StackConfig, *, rngs: nnx.Rngs):
        self.inner = nnx.Linear(config.width, config.hidden, dtype=config.dtype, rngs=rngs)
        self.outer = nnx.Linear(config.hidden, config.width, dtype=config.dtype, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x):
        """``[..., width]`` to the same."""
        return self.outer(getattr(jax.nn, self.activation)(self.inner(x)))


class Block(nnx.Module):
    """A mixer and a feed-forward, each with a layer norm and a residual connection around it."""

    def __init__(self, config: StackConfig, *, rngs: nnx.Rngs):
        self.mixer, self.feed_forward = config.mixer(rngs=rngs), FeedForward(config, rngs=rngs)
        self.mixer_norm = nnx.LayerNorm(config.width, dtype=config.dtype, rngs=rngs)
        self.feed_forward_norm = nnx.LayerNorm(config.width, dtype=config.dtype, rngs=rngs)
        self.norm, self.dropout = config.norm, config.dropout

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens; the state is the mixer's."""
        mixer_key, *keys = split_key(key, 3)
        y, state = self.mixer(self._pre(self.mixer_norm, x), state, segment_ids=segment_ids, key=mixer_key)
        x = self._post(self.mixer_norm, x + dropout(y, self.dropout, keys[0]))
        y = self.feed_forward(self._pre(self.feed_forward_norm, x))
        return self._post(self.feed_forward_norm, x + dropout(y, self.dropout, keys[1])), state

    def _pre(self, norm, x):
        return norm(x) if self.norm == "pre" else x

    def _post(self, norm, x):
        return norm(x) if self.norm == "post" else x


class StackState(NamedTuple):
    """The state of a stack."""

    position: PositionState | None  # `None` where nothing is added to the input
    layers: tuple[Any, ...]  # of each mixer


jax.export.register_namedtuple_serialization(StackState, serialized_name="zoo.StackState")


class Stack(nnx.Module):
    """Positions, blocks, and a last layer norm where the blocks have theirs in front."""

    def __init__(self, config: StackConfig, *, rngs: nnx.Rngs):
        self.positions = Positions(config, rngs=rngs) if config.position in ("sinusoidal", "learned") else None
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(config.width, dtype=config.dtype, rngs=rngs) if config.norm == "pre" else None
        self.width, self.dropout = config.width, config.dropout

    def __call__(
        self,
        x: Float[Array, "batch time width"],
        state: StackState | None = None,
        *,
        segment_ids: Int[Array, "batch time"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch time width"], StackState]:
        """Mix tokens: see the module's docstring."""
        contract.check_shapes(x=(x, "batch time width"), segment_ids=(segment_ids, "batch time"))
        contract.check_state(state, StackState)
        position, layers = (None, [None] * len(self.blocks)) if state is None else state
        if len(layers) != len(self.blocks):
            raise ValueError(f"state: expected the states of {len(self.blocks)} blocks, got {len(layers)}")
        input_key, *keys = split_key(key, 1 + len(self.blocks))
        if self.positions is not None:
            x, position = self.positions(x, position, segment_ids=segment_ids)
        x = dropout(x, self.dropout, input_key)
        after = []
        for block, layer, block_key in zip(self.blocks, layers, keys, strict=True):
            x, layer = block(x, layer, segment_ids=segment_ids, key=block_key)
            after.append(layer)
        return x if self.norm is None else self.norm(x), StackState(position, tuple(after))

    def init_state(self, batch: int, capacity: int = 1) -> StackState:
        """The fresh state, with room for `capacity` tokens where a mixer keeps them."""
        return init_state(self, jnp.zeros((batch, 1, self.width), parameter_dtype(self)), capacity)
