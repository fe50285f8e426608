"""The Decision Transformer with both stacks: streaming, packing, what an action depends on, numbers of parameters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from zoo.decision_transformer import DecisionModel

TIME, OBSERVATION, ACTION = 10, 4, 3
STACKS = {
    "aaren": {"position": "sinusoidal"},
    "transformer": {"position": "learned", "norm_place": "post", "max_length": TIME + 5},
    "transformer-scan": {"position": "none", "scan": True, "rotary": True},
}
stacks = pytest.mark.parametrize("stack", STACKS)


def create(stack, discrete=False, dtype="float32", **overrides):
    """A model with normal parameters; at its real start all actions are nearly zero."""
    config = zoo.configure(stack.split("-")[0], overrides=STACKS[stack] | overrides)
    sizes = {"observation_size": OBSERVATION, "action_size": ACTION, "discrete": discrete}
    generator = np.random.default_rng(0)

    def fill(leaf):
        fan_in = leaf.shape[-2] if leaf.ndim > 1 else 1
        return jnp.asarray(1.5 * fan_in**-0.5 * generator.normal(size=leaf.shape), dtype)

    return jax.tree.map(fill, jax.eval_shape(lambda: DecisionModel(config, rngs=nnx.Rngs(0), **sizes)))


@jax.jit
def call(model, inputs, state=None, segment_ids=None):
    """Actions, and the state."""
    return model(*inputs, state, segment_ids=segment_ids)


def trajectory(dtype=jnp.float32, batch=2):
    """Returns to go, observations, previous actions, time steps."""
    generator = np.random.default_rng(1)
    shapes = (batch, TIME), (batch, TIME, OBSERVATION), (batch, TIME, ACTION)
    floats = (jnp.asarray(generator.normal(size=shape), dtype) for shape in shapes)
    return *floats, jnp.asarray(generator.integers(0, 5, (batch, 1)) + np.arange(TIME), jnp.int32)


@stacks
def test_streaming_equals_the_whole(stack):
    """Time step by time step in a `lax.scan`, over packed and padded rows, from a state with just enough room."""
    with jax.enable_x64(True):
        model, inputs = create(stack, dtype="float64"), trajectory(jnp.float64)
        ids = jnp.asarray([[0] * 4 + [-1] * 2 + [2] * 4, [-1] * 3 + [1] * 7], jnp.int32)

        @jax.jit
        def stream(model, inputs, ids):
            def step(state, t):
                *each, segment = (jax.lax.dynamic_slice_in_dim(x, t, 1, axis=1) for x in (*inputs, ids))
                actions, state = model(*each, state, segment_ids=segment)
                return state, actions[:, 0]

            return jax.lax.scan(step, model.init_state(2, 8), jnp.arange(TIME))[1].swapaxes(0, 1)

        whole, _ = call(model, inputs, None, ids)
        chex.assert_trees_all_close(stream(model, inputs, ids)[ids >= 0], whole[ids >= 0], rtol=0, atol=1e-12)


@stacks
def test_streaming_without_segments_equals_the_whole(stack):
    with jax.enable_x64(True):
        model, inputs = create(stack, dtype="float64"), trajectory(jnp.float64)
        state, pieces = jax.jit(lambda model: model.init_state(2, TIME))(model), []
        for t in range(TIME):
            actions, state = call(model, [x[:, t : t + 1] for x in inputs], state)
            pieces.append(actions)
        whole, _ = call(model, inputs)
        chex.assert_trees_all_close(jnp.concatenate(pieces, axis=1), whole, rtol=0, atol=1e-12)


@stacks
def test_packed_and_padded_equal_alone(stack):
    with jax.enable_x64(True):
        model, inputs = create(stack, dtype="float64"), trajectory(jnp.float64)
        alone, _ = call(model, [x[:, 6:] for x in inputs])
        for ids in ([3] * 6 + [4] * 4, [-1] * 6 + [4] * 4, [7] * 3 + [-1] * 3 + [0] * 4):
            among, _ = call(model, inputs, None, jnp.asarray([ids] * 2))
            chex.assert_trees_all_close(among[:, 6:], alone, rtol=0, atol=1e-12)


@stacks
def test_an_action_depends_on_its_observation_and_what_was_before(stack):
    """On all returns and observations up to its own and all actions before it; on nothing of later time steps."""
    with jax.enable_x64(True):
        model, (*floats, timesteps) = create(stack, dtype="float64"), trajectory(jnp.float64, batch=1)

        def summed(returns, observations, actions):
            return model(returns, observations, actions, timesteps)[0][0].sum(axis=-1)

        jacobians = jax.jit(jax.jacrev(summed, argnums=(0, 1, 2)))(*floats)
        reached = [np.any(np.reshape(jacobian, (TIME, TIME, -1)), axis=-1) for jacobian in jacobians]
        before = np.tril(np.ones((TIME, TIME), bool))
        np.testing.assert_array_equal(reached[0], before)
        np.testing.assert_array_equal(reached[1], before)
        np.testing.assert_array_equal(
            reached[2], before & (np.arange(TIME) > 0)
        )  # what comes before the first: nothing


@pytest.mark.parametrize("stack", ["aaren", "transformer"])
def test_tokens_are_in_the_order_of_the_paper(stack):
    """``R̂_1 s_1 a_1 R̂_2 s_2 …``, each with the embedding of its own time step; actions come from observations."""
    with jax.enable_x64(True):
        model, inputs = create(stack, dtype="float64"), trajectory(jnp.float64, batch=1)

        def time(step):
            if stack == "transformer":
                return model.time_steps[step]
            rates = 10000.0 ** -(jnp.arange(0, 16, 2) / 16)
            return jnp.concatenate([jnp.sin(step * rates), jnp.cos(step * rates)])

        @jax.jit
        def expect(returns, observations, previous, timesteps):
            tokens = []
            for t in range(TIME):
                if t:
                    tokens.append(model.embed_action(previous[t]) + time(timesteps[t - 1]))
                tokens.append(model.embed_return(returns[t : t + 1]) + time(timesteps[t]))
                tokens.append(model.embed_observation(observations[t]) + time(timesteps[t]))
            mixed, _ = model.stack(model.norm(jnp.stack(tokens))[None])
            return jnp.tanh(model.head(mixed[:, 1::3]))

        expected = expect(*(x[0] for x in inputs))
        assert jnp.std(expected) > 0.01
        chex.assert_trees_all_close(call(model, inputs)[0], expected, rtol=0, atol=1e-12)


def test_time_steps_matter_and_late_ones_have_sinusoids():
    *floats, timesteps = inputs = trajectory()
    late = [*floats, timesteps + 100_000]
    found, moved = (call(create("aaren"), each)[0] for each in (inputs, late))
    assert jnp.all(jnp.isfinite(moved))
    assert not jnp.allclose(found, moved, atol=1e-3)
    without = create("aaren", position="none")
    chex.assert_trees_all_equal(*(call(without, each)[0] for each in (inputs, late)))
    assert jnp.all(jnp.isnan(call(create("transformer"), late)[0]))  # beyond the learned table


def test_choices_come_as_logits():
    (logits, _), (actions, _) = (call(create("aaren", discrete=choice), trajectory()) for choice in (True, False))
    chex.assert_trees_all_close(jnp.tanh(logits), actions, rtol=1e-5)
    assert jnp.max(jnp.abs(logits)) > 1


@pytest.mark.parametrize("scan", [False, True])
def test_numbers_of_parameters_differ_by_a_query_for_each_layer(scan):
    def count(stack):
        config = zoo.configure(stack, overrides={"width": 24, "layers": 3, "position": "sinusoidal", "scan": scan})
        sizes = {"observation_size": OBSERVATION, "action_size": ACTION}
        model = jax.eval_shape(lambda: DecisionModel(config, rngs=nnx.Rngs(0), **sizes))
        return sum(leaf.size for leaf in jax.tree.leaves(model))

    assert count("aaren") - count("transformer") == 3 * 24


def test_models_are_plain_pytrees_and_keys_give_masks():
    def build(key):
        config = zoo.configure("aaren", overrides={"dropout": 0.5, "layers": 1})
        return DecisionModel(config, observation_size=OBSERVATION, action_size=ACTION, rngs=nnx.Rngs(key))

    keys = jax.random.split(jax.random.key(0), 2)
    state = jax.eval_shape(lambda: jax.vmap(lambda model: model.init_state(5, 7))(jax.vmap(build)(keys)))
    masked = jax.jit(jax.vmap(lambda model, key: model(*trajectory(), key=key)[0], in_axes=(None, 0)))
    first, second = masked(create("aaren", dropout=0.5, layers=1), keys)
    assert not jnp.allclose(first, second)
    assert {leaf.shape[:2] for leaf in jax.tree.leaves(state)} == {(2, 5)}


def test_misfits_are_refused():
    model, (returns, observations, actions, timesteps) = create("aaren"), trajectory()
    with pytest.raises(ValueError, match=r"observations: expected shape \[batch=2, time=10, observation\]"):
        model(returns, observations[:, 1:], actions, timesteps)
    with pytest.raises(TypeError, match="state: expected None or DecisionState"):
        model(returns, observations, actions, timesteps, object())
