"""The recurrent networks before attention: Elman, Jordan, LSTM, GRU, and two of any mixer for both directions.

Zachary C. Lipton, John Berkowitz, Charles Elkan: A Critical Review of Recurrent Neural Networks for Sequence Learning,
2015, arXiv:1506.00019, a survey of all but the GRU, which is of Kyunghyun Cho, Bart van Merrienboer, Caglar Gulcehre,
Dzmitry Bahdanau, Fethi Bougares, Holger Schwenk, Yoshua Bengio: Learning Phrase Representations using RNN
Encoder-Decoder for Statistical Machine Translation, 2014, arXiv:1406.1078.

Implemented, with a hidden layer as wide as a token:

    Elman:   h_t = tanh(W x_t + U h_{t−1} + b)
    Jordan:  h_t = tanh(W x_t + U y_{t−1} + b),  y_t = V h_t + c
    LSTM:    g = tanh(W_g x_t + U_g h_{t−1} + b_g),  i, f, o = σ(W x_t + U h_{t−1} + b)
             s_t = g ⊙ i + s_{t−1} ⊙ f,  h_t = tanh(s_t) ⊙ o
    GRU:     z, r = σ(W x_t + U h_{t−1} + b),  h̃ = tanh(W_h x_t + U_h (r ⊙ h_{t−1}) + b_h)
             h_t = z ⊙ h_{t−1} + (1 − z) ⊙ h̃
    BRNN:    y_t = W [f(x)_t, b(x)_t] + c, where b reads each document from its end

`peepholes` lets the gates of an LSTM see the memory, each channel its own: i and f add p ⊙ s_{t−1}, o adds p ⊙ s_t.

Deviations: the mixers are hidden layers in a stack with residual connections and norms, what the survey has around them
(outputs by softmax, sequences to sequences, neural Turing machines) is not here. Its Jordan network feeds back what the
network puts out; here it is what the layer does, and linear. The GRU has biases, which its paper leaves out. All
biases, also that of the forget gate, and peepholes start from zero, matrices from LeCun normals. We had no text of the
papers: equations are from memory.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from primitives import contract
from zoo.layers import MixerConfig, StackConfig, split_key

# --- Cells --------------------------------------------------------------------------------------------------------


class RecurrentState(NamedTuple):
    """What a cell keeps, its output first. Float32 or wider."""

    carry: tuple[Float[Array, "batch width"], ...]
    segment: Int[Array, " batch"]  # the last non-negative segment id


jax.export.register_namedtuple_serialization(RecurrentState, serialized_name="zoo.RecurrentState")


class RecurrentNetwork(nnx.Module):
    """A mixer whose tokens wait for each other; a subclass says how one is mixed."""

    gates = 1  # how many times as wide as a token is what a step takes of one
    fed_back = 1  # and what it takes of the output before
    carried = 1  # arrays that are carried on

    def __init__(self, config: MixerConfig, stack: StackConfig, *, rngs: nnx.Rngs):
        self.input = stack.linear(self.gates * stack.width, bias=True, rngs=rngs)
        self.recurrent = stack.linear(self.fed_back * stack.width, rngs=rngs)

    def step(self, inputs, *carry):
        """What is carried on after a token, the output first."""
        raise NotImplementedError

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        contract.check_state(state, RecurrentState)
        inputs = self.input(x.swapaxes(0, 1))  # time first, before it is several times as large
        outputs_dtype, dtype = inputs.dtype, contract.accumulation_dtype(inputs)
        if state is None:
            fresh = contract.fresh_like(x[:, 0], 0, dtype)
            state = RecurrentState((fresh,) * self.carried, contract.fresh_counter(segment_ids, x.shape[0]))
        valid, reset, last = contract.segments(segment_ids, state.segment)

        def token(carry, row):
            inputs, valid, reset = row
            start = carry if reset is None else _select(reset, tuple(jnp.zeros_like(part) for part in carry), carry)
            after = self.step(inputs.astype(dtype), *start)
            carry = after if valid is None else _select(valid, after, carry)
            return carry, carry[0].astype(outputs_dtype)

        carry = tuple(part.astype(dtype) for part in state.carry)
        rows = inputs, *jax.tree.map(lambda array: array.T, (valid, reset))
        if x.shape[1] == 1:
            carry, y = token(carry, jax.tree.map(lambda array: array[0], rows))
            return y[:, None], RecurrentState(carry, last)
        carry, y = lax.scan(token, carry, rows)
        return y.swapaxes(0, 1), RecurrentState(carry, last)


def _select(rows, these, those):
    """For each row of the batch these arrays or those."""
    return jax.tree.map(lambda this, that: jnp.where(rows[:, None], this, that), these, those)


class Elman(RecurrentNetwork):
    """The mixer that feeds back its hidden layer."""

    def step(self, inputs, hidden):
        """One token."""
        return (jnp.tanh(inputs + self.recurrent(hidden)),)


class Jordan(RecurrentNetwork):
    """The mixer that feeds back its outputs."""

    def __init__(self, config: "JordanConfig", stack: StackConfig, *, rngs: nnx.Rngs):
        super().__init__(config, stack, rngs=rngs)
        self.output = stack.linear(stack.width, bias=True, rngs=rngs)

    def step(self, inputs, output):
        """One token."""
        return (self.output(jnp.tanh(inputs + self.recurrent(output))).astype(inputs.dtype),)


class LSTM(RecurrentNetwork):
    """The mixer with a memory that gates open and close."""

    gates, fed_back, carried = 4, 4, 2

    def __init__(self, config: "LSTMConfig", stack: StackConfig, *, rngs: nnx.Rngs):
        super().__init__(config, stack, rngs=rngs)
        self.peepholes = nnx.Param(jnp.zeros((3, stack.width))) if config.peepholes else None

    def step(self, inputs, hidden, memory):
        """One token."""
        candidate, enter, forget, leave = jnp.split(inputs + self.recurrent(hidden), 4, axis=-1)
        peep = (0, 0, 0) if self.peepholes is None else self.peepholes[...]
        enter, forget = jax.nn.sigmoid(enter + peep[0] * memory), jax.nn.sigmoid(forget + peep[1] * memory)
        memory = jnp.tanh(candidate) * enter + memory * forget
        return jnp.tanh(memory) * jax.nn.sigmoid(leave + peep[2] * memory), memory


class GRU(RecurrentNetwork):
    """The mixer whose gates update and reset its hidden layer."""

    gates, fed_back = 3, 2

    def __init__(self, config: "GRUConfig", stack: StackConfig, *, rngs: nnx.Rngs):
        super().__init__(config, stack, rngs=rngs)
        self.recurrent_candidate = stack.linear(stack.width, rngs=rngs)

    def step(self, inputs, hidden):
        """One token."""
        width = hidden.shape[-1]
        gates = jax.nn.sigmoid(inputs[:, : 2 * width] + self.recurrent(hidden))
        update, reset = gates[:, :width], gates[:, width:]
        candidate = jnp.tanh(inputs[:, 2 * width :] + self.recurrent_candidate(reset * hidden))
        return (update * hidden + (1 - update) * candidate,)


# --- Both directions ----------------------------------------------------------------------------------------------


class Bidirectional(nnx.Module):
    """Two mixers, one of which reads each document from its end; not causal, so there is no state.

    A row that is turned around with its segment ids holds the same documents, each turned around.
    """

    def __init__(self, config: MixerConfig, stack: StackConfig, layer: int, *, rngs: nnx.Rngs):
        self.forward, self.backward = (config.mixer(stack, layer, rngs=rngs) for _ in range(2))
        self.output = stack.linear(stack.width, inputs=2 * stack.width, bias=True, rngs=rngs)

    def __call__(self, x, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``, each with all of its document."""
        keys = split_key(key, 2)
        turned = None if segment_ids is None else segment_ids[:, ::-1]
        forward, _ = self.forward(x, segment_ids=segment_ids, key=keys[0])
        backward, _ = self.backward(x[:, ::-1], segment_ids=turned, key=keys[1])
        return self.output(jnp.concatenate([forward, backward[:, ::-1]], axis=-1))


# --- Configurations -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ElmanConfig(MixerConfig):
    """An Elman network."""

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> Elman:
        """One Elman network."""
        return Elman(self, stack, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class JordanConfig(MixerConfig):
    """A Jordan network."""

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> Jordan:
        """One Jordan network."""
        return Jordan(self, stack, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class LSTMConfig(MixerConfig):
    """An LSTM; with `peepholes` its gates see its memory."""

    peepholes: bool = False

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> LSTM:
        """One LSTM."""
        return LSTM(self, stack, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class GRUConfig(MixerConfig):
    """A GRU."""

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> GRU:
        """One GRU."""
        return GRU(self, stack, rngs=rngs)


_CONFIGS = {"elman": ElmanConfig(), "jordan": JordanConfig(), "lstm": LSTMConfig(), "gru": GRUConfig()}
PRESETS = {name: {"tiny": StackConfig(16, 2, (config,), hidden=0)} for name, config in _CONFIGS.items()}
