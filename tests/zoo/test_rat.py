"""RAT against its paper: attention and a recurrent network as the ends of its range, chunks between, the cache."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from primitives import causal_attention, rotary
from zoo.layers import StackConfig, split_heads
from zoo.states import grow_state, init_state, state_bytes
from zoo.token_mixers.rat import RATConfig, recurrent_chunk_attention

TIME = 11


def inputs_for(dtype=jnp.float64):
    generator = np.random.default_rng(0)
    q, k, v, gate = (jnp.asarray(generator.normal(size=(2, TIME, 2, 4)), dtype) for _ in range(4))
    return q, k, v, jax.nn.sigmoid(gate)


def rotated(x, place):
    return np.asarray(rotary(jnp.asarray(x)[None, None, None], jnp.full((1, 1), place)))[0, 0, 0]


def definition(q, k, v, gate, chunk):
    """One document, token by token, in numpy."""
    outputs, past = np.zeros(v.shape), []
    for t in range(len(q)):
        if t % chunk == 0:
            keys, values = np.zeros(k.shape[1:]), np.zeros(v.shape[1:])
        keys, values = (gate[t] * h + (1 - gate[t]) * x[t] for h, x in ((keys, k), (values, v)))
        for h in range(q.shape[1]):
            seen = [*past, (t // chunk, keys, values)]
            query = rotated(q[t, h], t // chunk)
            s = np.array([rotated(key[h], place) @ query for place, key, _ in seen]) / 2
            p = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
            outputs[t, h] = p @ np.stack([value[h] for _, _, value in seen])
        if t % chunk == chunk - 1:
            past.append((t // chunk, keys, values))
    return outputs


@pytest.mark.parametrize("chunk", [1, 4, 20])
def test_equations(chunk):
    with jax.enable_x64(True):
        inputs = inputs_for()
        outputs, _ = recurrent_chunk_attention(*inputs, chunk=chunk, rotate=True)
        expected = [definition(*(np.asarray(x[b]) for x in inputs), chunk) for b in range(2)]
        chex.assert_trees_all_close(np.asarray(outputs), np.stack(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rotate", [False, True])
def test_chunks_of_one_without_gates_are_attention(rotate):
    with jax.enable_x64(True):
        q, k, v, gate = inputs_for()
        outputs, _ = recurrent_chunk_attention(q, k, v, 0 * gate, chunk=1, rotate=rotate)
        positions = jnp.arange(TIME)[None].repeat(2, 0)
        q, k = (rotary(x, positions) if rotate else x for x in (q, k))
        chex.assert_trees_all_close(outputs, causal_attention(q, k, v)[0], rtol=0, atol=1e-12)


def test_one_chunk_is_a_gated_recurrent_network():
    with jax.enable_x64(True):
        q, k, v, gate = inputs_for()
        outputs, state = recurrent_chunk_attention(q, k, v, gate, chunk=TIME + 1)
        hidden, expected = 0, []
        for t in range(TIME):
            hidden = gate[:, t] * hidden + (1 - gate[:, t]) * v[:, t]
            expected.append(hidden)
        chex.assert_trees_all_close(outputs, jnp.stack(expected, axis=1), rtol=0, atol=1e-12)
        assert not jnp.any(state.ends.index)


@pytest.mark.parametrize("cut", [1, 6])
def test_documents_and_padding(cut):
    """Chunks count from the first token of a document over tokens that are no padding, also in two pieces."""
    with jax.enable_x64(True):
        inputs = inputs_for()
        ids = np.array([[0, 0, 0, 0, 0, -1, 0, 0, 1, 1, 1], [-1, 2, 2, 1, 1, 1, -1, 1, 1, 1, 1]])
        expected = np.zeros((2, TIME, 2, 4))
        for b, row in enumerate(ids):
            for document in range(3):
                tokens = np.flatnonzero(row == document)
                if tokens.size:
                    expected[b, tokens] = definition(*(np.asarray(x[b, tokens]) for x in inputs), 3)
        whole, state = recurrent_chunk_attention(*inputs, chunk=3, rotate=True, segment_ids=jnp.asarray(ids))
        chex.assert_trees_all_close(np.asarray(whole)[ids >= 0], expected[ids >= 0], rtol=0, atol=1e-12)
        assert state.ends.index.tolist() == [3, 2]
        assert state.ends.start.tolist() == [2, 0]
        pieces, state = [], None
        for piece in (slice(0, cut), slice(cut, TIME)):
            tokens, part = (x[:, piece] for x in inputs), jnp.asarray(ids[:, piece])
            outputs, state = recurrent_chunk_attention(*tokens, chunk=3, rotate=True, state=state, segment_ids=part)
            pieces, state = [*pieces, outputs], grow_state(state, 4)
        assert np.all(np.isfinite(np.concatenate(pieces, axis=1)))
        chex.assert_trees_all_close(np.concatenate(pieces, axis=1)[ids >= 0], expected[ids >= 0], rtol=0, atol=1e-12)


def test_the_cache_holds_the_ends_of_chunks_only():
    config = RATConfig(heads=2, chunk=4)
    mixer = config.mixer(StackConfig(width=8, pattern=(config,)), 0, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 10, 8))
    empty = init_state(mixer, x[:, :1], capacity=3)  # of chunks: enough for 12 tokens and a part of one more
    _, state = mixer(x, empty)
    slot = 2 * 8 * 4  # keys and values of all heads in float32
    assert state_bytes(state).used - state_bytes(empty).used == 2 * slot
    _, state = mixer(x[:, :5], state)
    assert state.ends.index.tolist() == [3]
    with pytest.raises(ValueError, match="state: expected a capacity of 4 or more, got 3"):
        mixer(x[:, :1], state)
    refused, full = jax.jit(mixer)(x[:, :2], state)
    assert jnp.all(jnp.isfinite(refused[:, 0]))
    assert jnp.all(jnp.isnan(refused[:, 1]))
    assert full.ends.index.tolist() == [4]


def test_the_module():
    """Gates and groups: queries and keys are repeated over neighbouring heads, biases are in log U(1, C − 1)."""
    with jax.enable_x64(True):
        config = RATConfig(heads=4, groups=2, chunk=4, rotary=False)
        mixer = config.mixer(StackConfig(width=16, pattern=(config,)), 0, rngs=nnx.Rngs(0))
        mixer = jax.tree.map(lambda x: x.astype(jnp.float64), mixer)
        bias = mixer.forget_bias[...]
        assert jnp.all((bias >= 0) & (bias <= np.log(3)))
        assert jnp.std(bias) > 0.1
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, TIME, 16)))
        z, v, g = jnp.split(x @ mixer.gate_value_forget.kernel[...], 3, axis=-1)
        q, k = jnp.split(split_heads(x @ mixer.query_key.kernel[...], 4), 2, axis=2)
        q, k = q[:, :, [0, 0, 1, 1]], k[:, :, [0, 0, 1, 1]]
        heads = q, k, split_heads(v, 4), split_heads(1 / (1 + jnp.exp(-g - bias)), 4)
        outputs = recurrent_chunk_attention(*heads, chunk=4)[0].reshape(x.shape)
        expected = (outputs / (1 + jnp.exp(-z))) @ mixer.output.kernel[...]
        chex.assert_trees_all_close(mixer(x)[0], expected, rtol=0, atol=1e-12)


def test_refusals():
    with pytest.raises(ValueError, match="groups: expected a divisor of the 4 heads, got 3"):
        StackConfig(pattern=(RATConfig(groups=3),))
    with pytest.raises(ValueError, match="chunk: expected a positive number of tokens, got 0"):
        StackConfig(pattern=(RATConfig(chunk=0),))
