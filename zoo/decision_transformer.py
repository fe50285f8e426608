"""The Decision Transformer: actions from returns-to-go, observations and actions so far, with any stack of mixers.

Lili Chen, Kevin Lu, Aravind Rajeswaran, Kimin Lee, Aditya Grover, Michael Laskin, Pieter Abbeel, Aravind Srinivas,
Igor Mordatch: Decision Transformer: Reinforcement Learning via Sequence Modeling, 2021, arXiv:2106.01345.

Implemented: the trajectory ``R̂_1 s_1 a_1 R̂_2 s_2 a_2 …`` of §3, where ``R̂_t = Σ_{t'≥t} r_t'`` is the return-to-go and
each time step is three tokens; a linear embedding for each of the three kinds, to which that of the time step is added;
a norm; the stack; the action linear in what comes out at its observation, through tanh where actions are continuous
(the norm and the tanh are those of the paper's code).

So that one time step is one call that ends with the action asked for, its tokens are ``a_{t−1} R̂_t s_t``. The action
before the first step of a document is padding, which leaves exactly the paper's order of real tokens, and that action
``a_{t−1}`` has the embedding of its own time step t − 1.

Deviations: the stack is any of ours. How time steps are embedded is the stack's option `position`, which adds nothing
to the tokens' own order, as in the paper: "learned" is the paper's table (of `max_length` rows), "sinusoidal" the fixed
vectors of Attention Is All You Need, which need no training and so also serve late steps that data hardly reach,
"none" leaves time out. Observations are vectors; there is no encoder of images.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from primitives import angles, contract
from zoo.layers import NORMS, PositionState, Stack, StackConfig, StackState, count_positions, fresh_positions
from zoo.states import grow_state, parameter_dtype


class DecisionState(NamedTuple):
    """The state of a `DecisionModel`."""

    stack: StackState
    steps: PositionState  # counts the time steps of a document


jax.export.register_namedtuple_serialization(DecisionState, serialized_name="zoo.DecisionState")


class DecisionModel(nnx.Module):
    """The next action at every time step, given the return that is wanted from there on.

    Args:
        config: Of the stack; its `position` says how time steps are embedded.
        observation_size: Numbers in an observation.
        action_size: Numbers in an action, or of actions to choose from.
        discrete: Whether actions are chosen: they come in one-hot, and their logits come out.
        rngs: For the initial parameters.
    """

    def __init__(
        self,
        config: StackConfig,
        *,
        observation_size: int,
        action_size: int,
        discrete: bool = False,
        rngs: nnx.Rngs,
    ):
        self.embed_action, self.embed_return, self.embed_observation = (
            config.linear(config.width, inputs=size, bias=True, rngs=rngs)
            for size in (action_size, 1, observation_size)
        )
        shape = (config.max_length, config.width)
        learned = config.position == "learned"
        self.time_steps = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape)) if learned else None
        self.norm = NORMS[config.norm](config.width, dtype=config.dtype, rngs=rngs)
        self.stack = Stack(dataclasses.replace(config, position="none"), rngs=rngs)
        self.head = config.linear(action_size, bias=True, rngs=rngs)
        self.sizes, self.position, self.discrete = (observation_size, action_size), config.position, discrete

    def __call__(
        self,
        returns: Float[Array, "batch time"],
        observations: Float[Array, "batch time observation"],
        previous_actions: Float[Array, "batch time action"],
        timesteps: Int[Array, "batch time"],
        state: DecisionState | None = None,
        *,
        segment_ids: Int[Array, "batch time"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch time action"], DecisionState]:
        """Actions in [-1, 1], or their logits, float32 or wider; arbitrary at padding.

        Args:
            returns: To go from each time step, its own reward included.
            observations: Before each action.
            previous_actions: The ones before; the first of each document is not looked at.
            timesteps: Numbers of the steps in their episodes, from 0 on.
            state: To go on from.
            segment_ids: Of documents, which are episodes or parts of them; negative for padding.
            key: For dropout.
        """
        contract.check_shapes(
            returns=(returns, "batch time"),
            observations=(observations, "batch time observation"),
            previous_actions=(previous_actions, "batch time action"),
            timesteps=(timesteps, "batch time"),
            segment_ids=(segment_ids, "batch time"),
        )
        contract.check_state(state, DecisionState)
        stack, steps = (None, fresh_positions(segment_ids, len(returns))) if state is None else state
        ids = jnp.broadcast_to(steps.segment[:, None], returns.shape) if segment_ids is None else segment_ids
        number, steps = count_positions(ids, steps, *returns.shape)
        tokens = jnp.stack(
            [
                self.embed_action(previous_actions) + self._embed_time(timesteps - 1),
                self.embed_return(returns[..., None]) + self._embed_time(timesteps),
                self.embed_observation(observations) + self._embed_time(timesteps),
            ],
            axis=2,
        )
        ids = jnp.stack([jnp.where(number == 0, -1, ids), ids, ids], axis=2)
        x = self.norm(tokens.reshape(len(tokens), -1, tokens.shape[-1]))
        x, stack = self.stack(x, stack, segment_ids=ids.reshape(len(ids), -1), key=key)
        actions = self.head(x[:, 2::3])
        actions = actions.astype(contract.accumulation_dtype(actions))
        return actions if self.discrete else jnp.tanh(actions), DecisionState(stack, steps)

    def _embed_time(self, timesteps):
        if self.position == "none":
            return 0
        if self.time_steps is not None:
            return self.time_steps[...].at[timesteps].get(mode="fill", fill_value=jnp.nan)
        width = self.stack.width
        phase = angles(timesteps, width, parameter_dtype(self))
        return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)[..., :width]

    def init_state(self, batch: int, capacity: int = 1) -> DecisionState:
        """The fresh state, with room for `capacity` time steps where a mixer keeps their tokens."""
        zeros = jnp.zeros((batch, 1), parameter_dtype(self))
        observations, actions = (jnp.zeros((batch, 1, size), zeros.dtype) for size in self.sizes)
        time = jnp.zeros((batch, 1), jnp.int32)
        _, state = self(zeros, observations, actions, time, segment_ids=time - 1)
        return grow_state(state, 3 * capacity)
