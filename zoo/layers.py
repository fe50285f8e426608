"""What every stack of causal mixers shares: norms, channel mixers, positions, residual blocks, the stack.

A mixer is a module ``mixer(x, state=None, *, segment_ids=None, key=None) -> (y, state)`` and so is everything that is
made of mixers: `x` is ``[batch, time, width]``, `segment_ids` marks packed documents and, below zero, padding, where
`y` is arbitrary but finite. ``state=None`` is a fresh start, ``key=None`` means no dropout.

A `StackConfig` holds the sizes, and the pattern of `MixerConfig` that its blocks follow: one entry for a stack of one
mixer, several for a hybrid.
"""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from primitives import angles, contract, short_convolution
from zoo.states import init_state, parameter_dtype

# --- Configurations -------------------------------------------------------------------------------------------------


def check_choice(argument: str, value: Any, choices: Iterable[str]) -> None:
    """Raise `ValueError`, with the nearest choices, for a value that is not among them."""
    choices = sorted(choices)
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"{argument}: expected one of {', '.join(choices)}, got {value!r}{hint}")


def check_heads(stack: "StackConfig", heads: int, argument: str = "heads") -> None:
    """Raise `ValueError` unless the width of the stack is a multiple of a number of heads."""
    if not isinstance(heads, int) or heads < 1 or stack.width % heads:
        raise ValueError(f"{argument}: expected a divisor of the width, {stack.width}, got {heads!r}")


def check_rotary(dim: int) -> None:
    """Raise `ValueError` for heads whose channels are no pairs to turn."""
    if dim % 2:
        raise ValueError(f"rotary: expected heads of even size, got {dim}")


@dataclasses.dataclass(frozen=True)
class MixerConfig:
    """Options of a mixer; what it shares with the other blocks of its stack is in the stack's configuration."""

    def check(self, stack: "StackConfig") -> None:
        """Raise `ValueError` for options that do not fit into a stack."""
        if (heads := getattr(self, "heads", None)) is not None:
            check_heads(stack, heads)

    def mixer(self, stack: "StackConfig", layer: int, *, rngs: nnx.Rngs) -> nnx.Module:
        """The mixer of block number `layer`, from 0; a traced number where layers are stacked."""
        raise NotImplementedError(f"{type(self).__name__} names no mixer")


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """Sizes and options of a stack.

    Attributes:
        width: Size of a token.
        layers: Number of blocks.
        pattern: Mixers of the blocks, repeated until there are as many as `layers`.
        first: Mixers of the first blocks, in front of the pattern.
        hidden: Inner size of the channel mixer; 0 for blocks without one.
        gated: Whether the channel mixer is a gated linear unit.
        activation: Of the channel mixer.
        bias: Whether the channel mixer has biases.
        norm: Layer norm, root mean square norm, or that without weights.
        norm_place: Before each sub-layer (and once at the end), or after each residual sum as in the first papers.
        position: What is added to the stack's input to tell tokens their place: nothing, sinusoids, or a learned table.
        max_length: Rows of the learned table; positions beyond give NaN.
        dropout: Rate, on the stack's input and on each sub-layer's output (Attention Is All You Need, §5.4).
        dtype: In which a model computes, with parameters in float32; `None`: that of inputs and parameters.
        scan: Stack the parameters of the pattern's repeats and run them in a `lax.scan`: one repeat is compiled.
        checkpoint: Recompute each block in the backward pass instead of keeping what is inside.
    """

    width: int = 64
    layers: int = 2
    pattern: tuple[MixerConfig, ...] = ()
    first: tuple[MixerConfig, ...] = ()
    hidden: int = 128
    gated: bool = False
    activation: Literal["relu", "gelu", "silu", "identity"] = "gelu"
    bias: bool = True
    norm: Literal["layer", "rms", "simple_rms"] = "layer"
    norm_place: Literal["pre", "post"] = "pre"
    position: Literal["none", "sinusoidal", "learned"] = "none"
    max_length: int = 512
    dropout: float = 0.0
    dtype: DTypeLike | None = None
    scan: bool = False
    checkpoint: bool = False

    def __post_init__(self):
        check_choice("activation", self.activation, ("relu", "gelu", "silu", "identity"))
        check_choice("norm", self.norm, NORMS)
        check_choice("norm_place", self.norm_place, ("pre", "post"))
        check_choice("position", self.position, ("none", "sinusoidal", "learned"))
        for size in ("width", "layers", "max_length"):
            if not isinstance(getattr(self, size), int) or getattr(self, size) < 1:
                raise ValueError(f"{size}: expected a positive integer, got {getattr(self, size)!r}")
        if not isinstance(self.hidden, int) or self.hidden < 0:
            raise ValueError(f"hidden: expected a positive integer, or 0 for no channel mixer, got {self.hidden!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a rate in [0, 1), got {self.dropout}")
        for name in ("pattern", "first"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            for mixer in getattr(self, name):
                if not isinstance(mixer, MixerConfig):
                    raise TypeError(f"{name}: expected configurations of mixers, got {mixer!r}")
                mixer.check(self)
        if not self.pattern:
            raise ValueError("pattern: expected at least one mixer: use the configuration of a paper")
        rest = self.layers - len(self.first)
        if rest < 0 or rest % len(self.pattern):
            raise ValueError(
                f"layers: expected {len(self.first)} first ones and a multiple of the {len(self.pattern)} of the "
                f"pattern, got {self.layers}"
            )

    @property
    def repeats(self) -> int:
        """How often the pattern occurs."""
        return (self.layers - len(self.first)) // len(self.pattern)

    def linear(self, outputs: int, *, inputs: int | None = None, bias: bool = False, rngs: nnx.Rngs) -> nnx.Linear:
        """A projection, of tokens where `inputs` is `None`, in the dtype of the stack."""
        return nnx.Linear(inputs or self.width, outputs, use_bias=bias, dtype=self.dtype, rngs=rngs)


LLAMA = {"gated": True, "activation": "silu", "bias": False, "norm": "rms"}
"""What most blocks have around their mixer since Llama: SwiGLU, root mean square norms, no biases."""


# --- Functions ------------------------------------------------------------------------------------------------------


def dropout(x: Float[Array, "*shape"], rate: float, key: PRNGKeyArray | None) -> Float[Array, "*shape"]:
    """Zero each element with probability `rate` and scale up the rest; the identity where `key` is `None`."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def split_key(key: PRNGKeyArray | None, count: int) -> Iterable[PRNGKeyArray | None]:
    """Independent keys, or as many times `None`."""
    return [None] * count if key is None else jax.random.split(key, count)


def split_heads(x: Float[Array, "batch time width"], heads: int) -> Float[Array, "batch time heads dim"]:
    """The channels of a token in equal parts."""
    return x.reshape(*x.shape[:2], heads, -1)


def merge_heads(x: Float[Array, "batch time heads dim"]) -> Float[Array, "batch time width"]:
    """The inverse of `split_heads`."""
    return x.reshape(*x.shape[:2], -1)


def widen(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The same in float32 or wider."""
    return x.astype(contract.accumulation_dtype(x))


def unit(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Vectors of norm one, or a little less, float32 or wider: ``x / √(Σ x² + 1e-6)``."""
    x = widen(x)
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-6)


def simple_rms_norm(x: Float[Array, "*shape"], epsilon: float = 1e-6) -> Float[Array, "*shape"]:
    """``x / √(mean(x²) + ε)`` over the last axis: a root mean square norm without weights."""
    wide = widen(x)
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + epsilon)).astype(x.dtype)


class PositionState(NamedTuple):
    """Where each row stands in its document."""

    position: Int[Array, " batch"]  # of the next token
    segment: Int[Array, " batch"]  # the last non-negative segment id


jax.export.register_namedtuple_serialization(PositionState, serialized_name="zoo.PositionState")


def count_positions(
    segment_ids: Int[Array, "batch time"] | None, state: PositionState | None, batch: int, time: int
) -> tuple[Int[Array, "batch time"], PositionState]:
    """The position of every token in its document, counted over real tokens (that of padding means nothing)."""
    state = fresh_positions(segment_ids, batch) if state is None else state
    segments = contract.segments(segment_ids, state.segment)
    number, first = contract.count_tokens(segments, state.position, jnp.zeros_like(state.position), time)
    positions = number - first
    return positions, PositionState(positions[:, -1] + 1, segments.last)


def fresh_positions(segment_ids: Int[Array, "batch time"] | None, batch: int) -> PositionState:
    """Every row at the start of a document."""
    zero = contract.fresh_counter(segment_ids, batch)
    return PositionState(zero, zero)


# --- Modules --------------------------------------------------------------------------------------------------------


class SimpleRMSNorm(nnx.Module):
    """`simple_rms_norm` in a dtype."""

    def __init__(self, width: int, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs):
        self.dtype = dtype

    def __call__(self, x):
        """``[..., width]`` to the same."""
        return simple_rms_norm(x).astype(self.dtype or x.dtype)


NORMS = {"layer": nnx.LayerNorm, "rms": nnx.RMSNorm, "simple_rms": SimpleRMSNorm}


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
        positions, state = count_positions(segment_ids, state, *x.shape[:2])
        if self.table is None:
            phase = angles(positions, self.width, contract.accumulation_dtype(x))
            vectors = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)[..., : self.width]
        else:
            vectors = self.table[...].at[positions].get(mode="fill", fill_value=jnp.nan)
        return x + vectors.astype(x.dtype), state


class ShortConvolution(nnx.Module):
    """`primitives.short_convolution` with weights that start as those of PyTorch, uniform up to ``1 / √taps``."""

    def __init__(
        self,
        channels: int,
        taps: int,
        *,
        activation: Literal["silu", "identity"] = "silu",
        bias: bool = False,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        bound = taps**-0.5
        self.weight = nnx.Param(jax.random.uniform(rngs.params(), (taps, channels), minval=-bound, maxval=bound))
        self.bias = nnx.Param(jnp.zeros(channels)) if bias else None
        self.activation, self.dtype = activation, dtype

    def __call__(self, x, state=None, *, segment_ids=None):
        """Filtered ``[batch, time, channels]``, and a `primitives.ShortConvolutionState`."""
        bias = None if self.bias is None else self.bias[...]
        x = x.astype(self.dtype or x.dtype)
        y, state = short_convolution(x, self.weight[...], bias, state=state, segment_ids=segment_ids)
        return getattr(jax.nn, self.activation)(y), state


class FeedForward(nnx.Module):
    """``W_o f(W_i x)`` for each token, or, gated, ``W_o (f(W_g x) ⊙ W_i x)`` (Noam Shazeer, 2020, arXiv:2002.05202)."""

    def __init__(self, config: StackConfig, *, rngs: nnx.Rngs):
        self.inner = config.linear(config.hidden, bias=config.bias, rngs=rngs)
        self.gate = config.linear(config.hidden, bias=config.bias, rngs=rngs) if config.gated else None
        self.outer = config.linear(config.width, inputs=config.hidden, bias=config.bias, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x):
        """``[..., width]`` to the same."""
        activation = getattr(jax.nn, self.activation)
        if self.gate is None:
            return self.outer(activation(self.inner(x)))
        return self.outer(activation(self.gate(x)) * self.inner(x))


class Block(nnx.Module):
    """A mixer and, unless `hidden` is 0, a channel mixer, each with a norm and a residual connection around it."""

    def __init__(self, config: StackConfig, mixer: MixerConfig, layer: int, *, rngs: nnx.Rngs):
        norm = NORMS[config.norm]
        self.mixer = mixer.mixer(config, layer, rngs=rngs)
        self.feed_forward = FeedForward(config, rngs=rngs) if config.hidden else None
        self.mixer_norm = norm(config.width, dtype=config.dtype, rngs=rngs)
        self.feed_forward_norm = norm(config.width, dtype=config.dtype, rngs=rngs) if config.hidden else None
        self.norm_place, self.dropout = config.norm_place, config.dropout

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens; the state is the mixer's."""
        mixer_key, *keys = split_key(key, 3)
        y, state = self.mixer(self._pre(self.mixer_norm, x), state, segment_ids=segment_ids, key=mixer_key)
        x = self._post(self.mixer_norm, x + dropout(y, self.dropout, keys[0]))
        if self.feed_forward is None:
            return x, state
        y = self.feed_forward(self._pre(self.feed_forward_norm, x))
        return self._post(self.feed_forward_norm, x + dropout(y, self.dropout, keys[1])), state

    def _pre(self, norm, x):
        return norm(x) if self.norm_place == "pre" else x

    def _post(self, norm, x):
        return norm(x) if self.norm_place == "post" else x


class StackState(NamedTuple):
    """The state of a stack."""

    position: PositionState | None  # `None` where nothing is added to the input
    layers: tuple[Any, ...]  # of each mixer; with `scan`, of the first ones, then of the pattern's with a leading axis


jax.export.register_namedtuple_serialization(StackState, serialized_name="zoo.StackState")


class Stack(nnx.Module):
    """Positions, blocks, and a last norm where the blocks have theirs in front.

    With `scan`, the last blocks are those of the pattern once, and their arrays have a leading axis of its repeats.
    """

    def __init__(self, config: StackConfig, *, rngs: nnx.Rngs):
        self.positions = None if config.position == "none" else Positions(config, rngs=rngs)
        scan = config.scan and config.repeats > 1
        mixers = config.first if scan else config.first + config.repeats * config.pattern
        blocks = [Block(config, mixer, layer, rngs=rngs) for layer, mixer in enumerate(mixers)]
        self.blocks = nnx.List(blocks + (_repeated_blocks(config, rngs) if scan else []))
        self.repeats, self.period = config.repeats, len(config.pattern) if scan else 0
        pre = config.norm_place == "pre"
        self.norm = NORMS[config.norm](config.width, dtype=config.dtype, rngs=rngs) if pre else None
        self.width, self.dropout, self.dtype, self.checkpoint = (
            config.width, config.dropout, config.dtype, config.checkpoint,
        )  # fmt: skip

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
        position, layers = (None, (None,) * len(self.blocks)) if state is None else state
        if len(layers) != len(self.blocks):
            raise ValueError(f"state: expected the states of {len(self.blocks)} blocks, got {len(layers)}")
        singles = len(self.blocks) - self.period
        input_key, *_ = keys = split_key(key, 1 + singles + self.repeats * self.period)
        if self.positions is not None:
            x, position = self.positions(x, position, segment_ids=segment_ids)
        x = dropout(x.astype(self.dtype or x.dtype), self.dropout, input_key)

        blocks = tuple(self.blocks)
        x, after = self._run(x, blocks[:singles], layers[:singles], keys[1 : 1 + singles], segment_ids)
        if self.period:
            keys = None if key is None else keys[1 + singles :].reshape(self.repeats, self.period, *key.shape)
            repeats = blocks[singles:], layers[singles:], keys
            x, repeated = jax.lax.scan(lambda x, repeat: self._run(x, *repeat, segment_ids, in_scan=True), x, repeats)
            after += repeated
        return x if self.norm is None else self.norm(x), StackState(position, after)

    def _run(self, x, blocks, states, keys, segment_ids, in_scan=False):
        """Blocks one after another."""

        def run(block, x, state, key):
            return block(x, state, segment_ids=segment_ids, key=key)

        if self.checkpoint:
            run = jax.checkpoint(run, prevent_cse=not in_scan)
        after = []
        for block, state, key in zip(blocks, states, [None] * len(blocks) if keys is None else keys, strict=True):
            x, state = run(block, x, state, key)
            after.append(state)
        return x, tuple(after)

    def init_state(self, batch: int, capacity: int = 1) -> StackState:
        """The fresh state, with room for `capacity` tokens where a mixer keeps them."""
        return init_state(self, jnp.zeros((batch, 1, self.width), parameter_dtype(self)), capacity)


def _repeated_blocks(config, rngs):
    """The blocks of the pattern, each with a leading axis of its repeats."""

    def build(key, repeat):
        start = len(config.first) + repeat * len(config.pattern)
        streams = nnx.Rngs(key)
        return [Block(config, mixer, start + i, rngs=streams) for i, mixer in enumerate(config.pattern)]

    keys = jax.random.split(rngs.params(), config.repeats)
    return jax.vmap(build)(keys, jnp.arange(config.repeats))
