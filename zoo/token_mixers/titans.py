"""Titans: a memory that learns while it reads, alone or beside attention over a window.

Ali Behrouz, Peilin Zhong, Vahab Mirrokni: Titans: Learning to Memorize at Test Time, 2025, arXiv:2501.00663; numbers
of equations are this paper's. Implemented are its four architectures, on `primitives.neural_memory` and
`primitives.sliding_window_attention`:

- `Memory`, the paper's LMM (equations 8 to 18). For each head, with a short causal convolution `conv` of each channel,
  ``unit(x) = x / √(Σ x² + 1e-6)``, and M a network of which every row keeps weights of its own,

      q_t = unit(silu(conv(W_q x)_t)),  k_t = unit(silu(conv(W_k x)_t)),  v_t = silu(conv(W_v x)_t)
      θ_t = max_step · σ(w_θ x_t + b_θ),  1 − α_t = σ(−w_α x_t − b_α),  η_t = σ(w_η x_t + b_η)
      S_t = η_t S_{t−1} − θ_t ∇ℓ(M_{t'}; k_t, v_t),  M_t = (1 − α_t) M_{t−1} + S_t,  o_t = M_t(q_t)
      y_t = W_o [RMSNorm(o_t) of all heads ⊙ silu(W_g x_t)]

  t' is the beginning of the update interval that t is in. The weights that documents start with are parameters.
- `MemoryAsLayer`, MAL (29–31): ``y = M(x)``, ``o = attention(y)``.
- `MemoryAsGate`, MAG (26–28): ``o = norm(attention(x)) ⊙ silu(norm(M(x)))``, both norms with weights.
- `MemoryAsContext`, MAC (21–25). Segments are the update intervals, M_{t'} the memory where one begins:

      h_t = M_{t'}(unit(silu(W_s x_t))),  y_t = x_t + attention to the persistent tokens, h_i and x_i, t' < i ≤ t
      o_t = norm(y_t) ⊙ silu(norm(M(y)_t)),  where M learns from y

Attention is over the last `window` tokens, with rotary positions, and to `persistent` learned tokens (equation 19).
Streaming is exact: the state holds the memory, the weights of the segment's beginning and its tokens, so that pieces of
any length equal the whole.

Deviations and what is left open (we had the paper's equations and results, not its code, and no sizes):

- The persistent tokens are in front of the attention only. To the memory they would be a few steps on constants, which
  the learned initial weights can contain.
- In MAC the paper's causal attention over [persistent; h; x] lets a token see h of all tokens of its segment, later
  ones included. Here token t sees h and x up to its own: one sequence h_1, x_1, h_2, x_2, …
- One θ, α, η for each head and token. W_s, which asks the memory for h, is a projection of its own, unconvolved.
- Rotary positions turn half of a head's channels; keys of persistent tokens are zero there, so that they look the same
  from everywhere, also beyond the lengths of training. Positions are those in the document, in MAC those in the segment
  of two tokens each: products depend on differences alone.
- Memories are residual by default, ``M(x) = x + LN(network(x))`` with GELU inside, as in Miras and TTT: normalised
  predictions bound gradients. With the paper's plain networks (``residual=False``, SiLU) the recurrence itself diverges
  where the keys of an interval are alike, as those of slow time series, and its steps add up.
- The weights that documents start with begin as normal numbers of variance one over the inputs, in a linear memory too:
  a residual memory of zeros has no gradient of use. Where these are not what gradients are added to (Miras), that is
  such that these weights, or for a softmax others of such a spread, are its image.
- Biases of the gates: steps begin at half of `max_step`, momentum at 1/2, forgetting at σ(−6).
- The non-linearity of the gates of MAG and MAC, which the paper calls σ, is SiLU: behind a sigmoid the memory of MAG
  was not used within the budget of `experiments.needle_in_a_haystack`. The gates have no further projection.
- In MAC a token passes by attention too (x_t in y_t), as by every attention between residual connections.
- Presets: depths and widths of 170M, 340M and 760M are those of our notes on the Miras paper, 400M is our reading. The
  channel mixer is 8/3 widths wide, with attention beside the memory 4/3, in MAC 1, so that the four of a size are as
  large as each other: with a vocabulary of 32,000 and the embedding as the head, 6 to 10 % above their names, but for
  "170m", which counts 121 million. 16 heads are our choice: weights of a layer's memory are
  ``2 · expansion · width² / heads`` numbers.
"""

import dataclasses
import functools
import itertools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from primitives import (
    NeuralMemoryState,
    ShortConvolutionState,
    SlidingWindowState,
    contract,
    huber_error,
    keep,
    linear_memory,
    mlp_memory,
    neural_memory,
    power_error,
    power_norm,
    rotary,
    sliding_window_attention,
    softmax_retention,
    squared_error,
)
from zoo.layers import (
    LLAMA,
    MixerConfig,
    PositionState,
    ShortConvolution,
    StackConfig,
    check_choice,
    count_positions,
    merge_heads,
    split_heads,
    unit,
    widen,
)

# --- The memory -----------------------------------------------------------------------------------------------------

LOSSES = {"squared": squared_error, "power": power_error(3), "huber": huber_error}
RETENTIONS = {"keep": lambda scale: keep, "power_norm": lambda scale: power_norm(4), "softmax": softmax_retention}
READS = ("after_token", "after_interval")
FORGET_BIAS, THRESHOLD_BIAS = -6.0, 1.0

residual_memory = functools.partial(mlp_memory, activation=jax.nn.gelu, residual=True)


@dataclasses.dataclass(frozen=True)
class MemoryConfig(MixerConfig):
    """A memory.

    Attributes:
        heads: Of queries, keys and values, each with a memory.
        depth: Matrices of a memory; 1 is a linear one.
        expansion: Inner size of a memory, in units of its head's.
        update_interval: Tokens whose gradients are taken at the same weights; 1 is the recurrence.
        read: Whether a query meets the weights after its own token or after the last complete interval.
        loss: The attentional bias: squared error, its third power's, or Huber's with a threshold for each token.
        retention: What else happens to weights besides decay: nothing, division by the square of their 4-norm, softmax.
        momentum: Whether updates go on, by a gate.
        forgetting: Whether weights decay, by a gate.
        residual: Whether a memory is its key plus the normalised network.
        max_step: Of gradient descent, an upper bound.
    """

    heads: int = 4
    depth: int = 2
    expansion: int = 4
    update_interval: int = 16
    read: Literal["after_token", "after_interval"] = "after_token"
    loss: Literal["squared", "power", "huber"] = "squared"
    retention: Literal["keep", "power_norm", "softmax"] = "keep"
    momentum: bool = True
    forgetting: bool = True
    residual: bool = True
    max_step: float = 0.1

    def check(self, stack: StackConfig) -> None:
        """Raise `ValueError` for options that do not fit."""
        super().check(stack)
        check_choice("read", self.read, READS)
        check_choice("loss", self.loss, LOSSES)
        check_choice("retention", self.retention, RETENTIONS)
        for name in ("depth", "expansion", "update_interval"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive integer, got {getattr(self, name)!r}")
        if not self.max_step > 0:
            raise ValueError(f"max_step: expected a positive number, got {self.max_step!r}")

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> nnx.Module:
        """One memory."""
        return Memory(self, stack, rngs=rngs)


class MemoryState(NamedTuple):
    """The last tokens of the convolution, and the memory."""

    convolution: ShortConvolutionState
    memory: NeuralMemoryState


jax.export.register_namedtuple_serialization(MemoryState, serialized_name="zoo.MemoryState")


class Memory(nnx.Module):
    """The mixer LMM. Its state is a `MemoryState`."""

    def __init__(self, config: MemoryConfig, stack: StackConfig, *, rngs: nnx.Rngs):
        def gate(start=0.0):
            start = nnx.initializers.constant(start)
            return nnx.Linear(stack.width, config.heads, bias_init=start, dtype=stack.dtype, rngs=rngs)

        self.config, self.head_dim = config, stack.width // config.heads
        self.query_key_value = stack.linear(3 * stack.width, rngs=rngs)
        self.convolution = ShortConvolution(3 * stack.width, 4, dtype=stack.dtype, rngs=rngs)
        self.step = gate()
        self.forget = gate(FORGET_BIAS) if config.forgetting else None
        self.momentum = gate() if config.momentum else None
        self.threshold = gate(THRESHOLD_BIAS) if config.loss == "huber" else None
        sizes = [self.head_dim] + [config.expansion * self.head_dim] * (config.depth - 1) + [self.head_dim]
        self.initial = nnx.List([nnx.Param(self._first(shape, rngs)) for shape in itertools.pairwise(sizes)])
        self.norm = nnx.RMSNorm(self.head_dim, epsilon=1e-5, dtype=stack.dtype, rngs=rngs)
        self.gate, self.output = (stack.linear(stack.width, rngs=rngs) for _ in range(2))

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        contract.check_state(state, MemoryState)
        convolution, memory = (None, None) if state is None else state
        mixed, convolution = self.convolution(self.query_key_value(x), convolution, segment_ids=segment_ids)
        q, k, v = (split_heads(y, self.config.heads) for y in jnp.split(mixed, 3, axis=-1))
        o, memory = neural_memory(
            unit(q),
            unit(k),
            v,
            self.config.max_step * jax.nn.sigmoid(widen(self.step(x))),
            None if self.forget is None else jax.nn.sigmoid(-widen(self.forget(x))),
            None if self.momentum is None else jax.nn.sigmoid(widen(self.momentum(x))),
            None if self.threshold is None else jax.nn.softplus(widen(self.threshold(x))),
            apply=self.apply,
            initial_weights=self.initial_weights(),
            loss=LOSSES[self.config.loss],
            retention=self.retention,
            update_interval=self.config.update_interval,
            read=self.config.read,
            state=memory,
            segment_ids=segment_ids,
        )
        y = merge_heads(self.norm(o)) * jax.nn.silu(self.gate(x))
        return self.output(y), MemoryState(convolution, memory)

    @property
    def apply(self):
        """The memory, as a function of its weights and of keys."""
        if self.config.residual:
            return residual_memory
        return mlp_memory if self.config.depth > 1 else linear_memory

    @property
    def retention(self):
        """From what gradients are added to, to the weights; columns of a softmax have sums that suit their size."""
        return RETENTIONS[self.config.retention](self.head_dim**0.5)

    def initial_weights(self):
        """What gradients are added to, before a document."""
        weights = tuple(weight[...] for weight in self.initial)
        return weights[0] if self.apply is linear_memory else weights

    def recall(self, weights, q):
        """Read weights ``[batch, heads, ...]`` that stay as they are."""
        read = jax.vmap(lambda weights, q: self.apply(self.retention(weights), q), in_axes=(0, 1), out_axes=1)
        return jax.vmap(read)(weights, q)

    def _first(self, shape, rngs):
        noise = jax.random.normal(rngs.params(), (self.config.heads, *shape))
        if self.config.retention == "softmax":
            return noise
        return jax.vmap(self.retention)(noise / shape[0] ** 0.5)  # dividing by ‖·‖² twice leads back


# --- Memory and attention -------------------------------------------------------------------------------------------


class PersistentAttention(nnx.Module):
    """Attention over a window and to learned tokens. Its state is a `primitives.SlidingWindowState`."""

    def __init__(self, stack: StackConfig, heads: int, window: int, persistent: int, *, rngs: nnx.Rngs):
        self.heads, self.window = heads, window
        self.query_key_value = stack.linear(3 * stack.width, rngs=rngs)
        self.output = stack.linear(stack.width, rngs=rngs)
        tokens = jax.random.normal(rngs.params(), (1, persistent, stack.width))
        self.persistent = nnx.Param(tokens) if persistent else None

    def __call__(self, x, state=None, *, segment_ids=None):
        """Mix tokens ``[batch, time, width]``."""
        contract.check_state(state, SlidingWindowState)
        before = None if state is None else PositionState(state.position, state.segment)
        positions, _ = count_positions(segment_ids, before, *x.shape[:2])
        q, k, v = self._heads(x)
        outputs, state = sliding_window_attention(
            _turn(q, positions),
            _turn(k, positions),
            v,
            window=self.window,
            prefix=self._prefix(x.dtype),
            state=state,
            segment_ids=segment_ids,
        )
        return self.output(merge_heads(outputs)), state

    def _heads(self, x):
        return (split_heads(y, self.heads) for y in jnp.split(self.query_key_value(x), 3, axis=-1))

    def _prefix(self, dtype):
        if self.persistent is None:
            return None
        _, k, v = self._heads(self.persistent[...].astype(dtype))
        turned = jnp.arange(k.shape[-1]) < k.shape[-1] // 2
        return jnp.where(turned, 0, k)[0], v[0]


def _turn(x, positions):
    """The first half of the channels by rotary positions."""
    turned, rest = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([rotary(turned, positions), rest], axis=-1)


class Gate(nnx.Module):
    """``norm(y) ⊙ silu(norm(m))``."""

    def __init__(self, stack: StackConfig, *, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.RMSNorm(stack.width, dtype=stack.dtype, rngs=rngs) for _ in range(2)])

    def __call__(self, y, m):
        """Two ``[..., width]`` to one."""
        return self.norms[0](y) * jax.nn.silu(self.norms[1](m))


@dataclasses.dataclass(frozen=True)
class MemoryAsContextConfig(MemoryConfig):
    """A memory that is asked before, and learns after, attention in each segment, which is its update interval.

    Attributes:
        persistent: Number of learned tokens that all tokens see.
    """

    persistent: int = 4

    def check(self, stack: StackConfig) -> None:
        """Raise `ValueError` for options that do not fit."""
        super().check(stack)
        if not isinstance(self.persistent, int) or self.persistent < 0:
            raise ValueError(f"persistent: expected a number of tokens, got {self.persistent!r}")
        if stack.width // self.heads % 4:
            raise ValueError(f"heads: expected heads of a multiple of 4 channels, got {stack.width // self.heads}")

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> nnx.Module:
        """One memory with its attention."""
        return MemoryAsContext(self, stack, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class MemoryAsGateConfig(MemoryAsContextConfig):
    """A memory beside attention over a window.

    Attributes:
        window: Tokens that a token sees, itself included.
    """

    window: int = 64

    def check(self, stack: StackConfig) -> None:
        """Raise `ValueError` for options that do not fit."""
        super().check(stack)
        if not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window: expected a positive number, got {self.window!r}")

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> nnx.Module:
        """One memory with its attention."""
        return MemoryAsGate(self, stack, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class MemoryAsLayerConfig(MemoryAsGateConfig):
    """A memory in front of attention over a window."""

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> nnx.Module:
        """One memory with its attention."""
        return MemoryAsLayer(self, stack, rngs=rngs)


class MemoryAttentionState(NamedTuple):
    """Of a memory with attention."""

    memory: MemoryState
    attention: SlidingWindowState


jax.export.register_namedtuple_serialization(MemoryAttentionState, serialized_name="zoo.MemoryAttentionState")


class MemoryAsGate(nnx.Module):
    """The mixer MAG. Its state is a `MemoryAttentionState`."""

    def __init__(self, config: MemoryAsGateConfig, stack: StackConfig, *, rngs: nnx.Rngs):
        self.memory = Memory(config, stack, rngs=rngs)
        self.attention = PersistentAttention(stack, config.heads, config.window, config.persistent, rngs=rngs)
        self.gate = Gate(stack, rngs=rngs)

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        contract.check_state(state, MemoryAttentionState)
        memory, attention = (None, None) if state is None else state
        y, attention = self.attention(x, attention, segment_ids=segment_ids)
        m, memory = self.memory(x, memory, segment_ids=segment_ids)
        return self.gate(y, m), MemoryAttentionState(memory, attention)


class MemoryAsLayer(nnx.Module):
    """The mixer MAL. Its state is a `MemoryAttentionState`."""

    def __init__(self, config: MemoryAsLayerConfig, stack: StackConfig, *, rngs: nnx.Rngs):
        self.memory = Memory(config, stack, rngs=rngs)
        self.attention = PersistentAttention(stack, config.heads, config.window, config.persistent, rngs=rngs)

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        contract.check_state(state, MemoryAttentionState)
        memory, attention = (None, None) if state is None else state
        y, memory = self.memory(x, memory, segment_ids=segment_ids)
        y, attention = self.attention(y, attention, segment_ids=segment_ids)
        return y, MemoryAttentionState(memory, attention)


class MemoryAsContext(nnx.Module):
    """The mixer MAC. Its state is a `MemoryAttentionState`.

    The memory learns from what attention gives, and attention asks the memory: one segment after the other.
    """

    def __init__(self, config: MemoryAsContextConfig, stack: StackConfig, *, rngs: nnx.Rngs):
        self.memory = Memory(config, stack, rngs=rngs)
        window = 2 * config.update_interval
        self.attention = PersistentAttention(stack, config.heads, window, config.persistent, rngs=rngs)
        self.search = stack.linear(stack.width, rngs=rngs)
        self.norm = nnx.RMSNorm(stack.width // config.heads, epsilon=1e-5, dtype=stack.dtype, rngs=rngs)
        self.gate = Gate(stack, rngs=rngs)
        self.heads, self.segment, self.dtype = config.heads, config.update_interval, stack.dtype

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        contract.check_state(state, MemoryAttentionState)
        x = x.astype(self.dtype or x.dtype)
        if state is None:
            state = self._fresh_state(x)
            if segment_ids is None and x.shape[1] > 1:
                return self._aligned(x, state)
        return self._ragged(x, state, segment_ids)

    def _fresh_state(self, x):
        """What padding leaves."""
        token, padding = x[:, :1], contract.fresh_like(x[:, :1, 0], -1, jnp.int32)
        memory, attention = (mixer(token, segment_ids=padding)[1] for mixer in (self.memory, self.attention))
        return MemoryAttentionState(memory, attention)

    def _segment(self, x, state, begun, documents=None, segments=None):
        """Tokens of one segment, or the first of several documents, given the weights at its beginning.

        Others have negative ids and leave the state as it is.
        """
        q = unit(split_heads(jax.nn.silu(self.search(x)), self.heads))
        h = merge_heads(self.norm(self.memory.recall(begun, q))).astype(x.dtype)
        pairs = jnp.stack([h, x], axis=2).reshape(x.shape[0], -1, x.shape[-1])
        ids = None if segments is None else jnp.repeat(segments, 2, axis=1)
        y, attention = self.attention(pairs, state.attention, segment_ids=ids)
        y = x + y[:, 1::2].astype(x.dtype)
        m, memory = self.memory(y, state.memory, segment_ids=documents)
        return self.gate(y, m).astype(x.dtype), MemoryAttentionState(memory, attention)

    def _aligned(self, x, state):
        """Whole segments, one after the other, and what is left or the last one."""
        time = x.shape[1]
        whole = (time - 1) // self.segment * self.segment

        def segment(memory, x):
            state = MemoryAttentionState(memory, None)
            y, state = self._segment(x, state, _begun(memory))
            return state.memory, y

        outputs, memory = [], state.memory
        if whole:
            segments = contract.chunk_time(x[:, :whole], self.segment)
            memory, y = lax.scan(jax.checkpoint(segment, prevent_cse=False), memory, segments)
            outputs.append(contract.unchunk_time(y, whole))
        y, state = self._segment(x[:, whole:], MemoryAttentionState(memory, None), _begun(memory))
        return jnp.concatenate([*outputs, y], axis=1), state

    def _ragged(self, x, state, segment_ids):
        """Where rows differ in where segments begin: windows of time, with parts of up to three segments in each."""
        initial, time = self.memory.initial_weights(), x.shape[1]
        rows = self._places(x, state, segment_ids)
        if time == 1:
            begun = _choose(rows.reset[:, 0], initial, _begun(state.memory))
            return self._segment(x, state, begun, rows.documents, rows.segments)
        size = min(self.segment, time)
        rows = jax.tree.map(lambda row: contract.chunk_time(contract.pad_time(row, size, 0), size), rows)
        window = functools.partial(self._window, initial, jnp.arange(2 if segment_ids is None else 3))
        state, outputs = lax.scan(jax.checkpoint(window, prevent_cse=False), state, rows)
        return contract.unchunk_time(outputs, time), state

    def _places(self, x, state, segment_ids):
        memory = state.memory.memory
        documents = segment_ids
        if segment_ids is None:
            documents = memory.segment[:, None] + contract.fresh_like(x[..., 0], 0, jnp.int32)
        segments = contract.segments(documents, memory.segment)
        number, first = contract.count_tokens(
            segments, memory.offset, contract.fresh_like(memory.offset, 0), x.shape[1]
        )
        valid, place = segments.valid, (number - first) % self.segment
        # What tells a segment from the one before it.
        parity = (state.attention.segment[:, None] + jnp.cumsum(valid & (place == 0), axis=1)) % 2
        ids = (jnp.where(valid, ids, -1) for ids in (documents, parity))
        return _Rows(x, *ids, valid, segments.reset, valid & (place == self.segment - 1))

    def _window(self, initial, parts, state, rows):
        """Tokens that complete a segment, those after them, and those from a document's beginning on, if one begins.

        Of the last, whatever their document, all see the initial weights.
        """
        part = jnp.cumsum(rows.completes, axis=1) - rows.completes > 0
        part = jnp.where(jnp.cumsum(rows.reset, axis=1) > 0, 2, part)

        def run(carry, i):
            inside = rows.valid & (part == i)

            def mix(state):
                begun = _choose(jnp.broadcast_to(i == 2, inside.shape[:1]), initial, _begun(state.memory))
                ids = (jnp.where(inside, ids, -1) for ids in (rows.documents, rows.segments))
                y, state = self._segment(rows.x, state, begun, *ids)
                return state, contract.mask_padding(y, inside)

            state, outputs = carry
            state, y = lax.cond(jnp.any(inside), mix, lambda state: (state, contract.fresh_like(rows.x, 0)), state)
            return (state, outputs + y), None

        (state, outputs), _ = lax.scan(run, (state, contract.fresh_like(rows.x, 0)), parts)
        return state, outputs


class _Rows(NamedTuple):
    """Tokens, and where they stand."""

    x: Float[Array, "batch time width"]
    documents: Int[Array, "batch time"]  # ids, as those of segments negative for padding
    segments: Int[Array, "batch time"]
    valid: Bool[Array, "batch time"]
    reset: Bool[Array, "batch time"]  # begins a document
    completes: Bool[Array, "batch time"]  # a segment


def _begun(state: MemoryState) -> Any:
    """The memory where the segment began."""
    return state.memory.weights if state.memory.interval is None else state.memory.interval


def _choose(rows, initial, weights):
    """The initial weights in some rows."""

    def choose(new, old):
        return jnp.where(rows.reshape(-1, *[1] * new.ndim), new.astype(old.dtype), old)

    return jax.tree.map(choose, initial, weights)


# --- Stacks ---------------------------------------------------------------------------------------------------------

SIZES = {"170m": (768, 12), "340m": (1024, 24), "400m": (1024, 28), "760m": (1536, 24)}


def presets(
    config: MemoryConfig, thirds: int = 8, sizes: dict[str, tuple[int, int]] = SIZES, **tiny: Any
) -> dict[str, StackConfig]:
    """A tiny stack, with options of its own, and stacks of the given widths and depths.

    The channel mixer is as many thirds of a width wide, in multiples of 128.
    """
    small = dataclasses.replace(config, heads=2, expansion=2, update_interval=4, **tiny)
    large = dataclasses.replace(config, heads=16)
    stacks = {
        name: StackConfig(width, layers, (large,), hidden=thirds * width // 3 // 128 * 128, **LLAMA)
        for name, (width, layers) in sizes.items()
    }
    return {"tiny": StackConfig(16, 2, (small,), hidden=32, **LLAMA)} | stacks


PRESETS = {
    "titans_lmm": presets(MemoryConfig()),
    "titans_mac": presets(MemoryAsContextConfig(), 3, persistent=2),
    "titans_mag": presets(MemoryAsGateConfig(), 4, persistent=2, window=8),
    "titans_mal": presets(MemoryAsLayerConfig(), 4, persistent=2, window=8),
}
