"""Recurrent cells against their equations, and both directions of any mixer."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo.layers import StackConfig
from zoo.token_mixers import minimal_rnns, recurrent_networks

WIDTH = 5
CELLS = {
    "elman": recurrent_networks.ElmanConfig(),
    "jordan": recurrent_networks.JordanConfig(),
    "lstm": recurrent_networks.LSTMConfig(),
    "lstm with peepholes": recurrent_networks.LSTMConfig(peepholes=True),
    "gru": recurrent_networks.GRUConfig(),
}


def shifted(module):
    """Parameters away from their start, in float64."""
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda x: x.astype(float) + 0.1 * generator.normal(size=x.shape), module)


def build(config):
    return shifted(config.mixer(StackConfig(WIDTH, 1, (config,)), 0, rngs=nnx.Rngs(0)))


def normal(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference(name, mixer, x):
    """Hidden layers of one row, with one matrix for each letter of the equations."""
    p = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(mixer)))
    columns = {name: slice(i * WIDTH, (i + 1) * WIDTH) for i, name in enumerate("0123")}
    w, b = ({k: p["input"][part][..., s] for k, s in columns.items()} for part in ("kernel", "bias"))
    u = {k: p["recurrent"]["kernel"][:, s] for k, s in columns.items()}
    h, s, outputs = np.zeros(WIDTH), np.zeros(WIDTH), []
    for token in x:

        def linear(k, h, token=token):
            return token @ w[k] + h @ u[k] + b[k]

        if name == "elman":
            h = np.tanh(linear("0", h))
        elif name == "jordan":
            h = np.tanh(linear("0", h)) @ p["output"]["kernel"] + p["output"]["bias"]
        elif name == "gru":
            z, r = sigmoid(linear("0", h)), sigmoid(linear("1", h))
            candidate = np.tanh(token @ w["2"] + (r * h) @ p["recurrent_candidate"]["kernel"] + b["2"])
            h = z * h + (1 - z) * candidate
        else:
            pi, pf, po = p["peepholes"] if "peepholes" in name else np.zeros(3)
            g, i, f = np.tanh(linear("0", h)), sigmoid(linear("1", h) + pi * s), sigmoid(linear("2", h) + pf * s)
            s = g * i + s * f
            h = np.tanh(s) * sigmoid(linear("3", h) + po * s)
        outputs.append(h)
    return np.stack(outputs)


@pytest.mark.parametrize("name", CELLS)
def test_equations(name):
    with jax.enable_x64(True):
        mixer, x = build(CELLS[name]), normal(2, 7, WIDTH)
        y, state = mixer(jnp.asarray(x))
        chex.assert_trees_all_close(y, np.stack([reference(name, mixer, row) for row in x]), rtol=1e-12, atol=1e-14)
        chex.assert_trees_all_equal(state.carry[0], y[:, -1])


def test_packed_and_padded_rows_of_a_cell():
    """Each document starts from zero, padding within one is passed over, a carried document goes on."""
    with jax.enable_x64(True):
        mixer, x = build(CELLS["lstm with peepholes"]), normal(1, 9, WIDTH)
        ids = jnp.asarray([[-1, 3, 3, -1, 3, 5, 5, 5, -1]])
        y, state = mixer(jnp.asarray(x), segment_ids=ids)
        first, second = x[0, [1, 2, 4]], x[0, 5:8]
        expected = np.concatenate([reference("lstm with peepholes", mixer, rows) for rows in (first, second)])
        chex.assert_trees_all_close(y[0, jnp.asarray([1, 2, 4, 5, 6, 7])], expected, rtol=1e-12)
        more, _ = mixer(jnp.asarray(x[:, :1]), state, segment_ids=jnp.asarray([[5]]))
        longer = reference("lstm with peepholes", mixer, np.concatenate([second, x[0, :1]]))
        chex.assert_trees_all_close(more[0, 0], longer[-1], rtol=1e-12)


def test_a_closed_memory_keeps_its_content_and_its_gradient():
    """The constant error carousel: i = 0 and f = 1 carry s and ds unchanged over any lag; the Elman network forgets."""
    with jax.enable_x64(True):
        lstm, elman, x = build(CELLS["lstm"]), build(CELLS["elman"]), jnp.asarray(normal(1, 50, WIDTH))
        large = jnp.full(WIDTH, 1e3)
        lstm.input.bias[...] = jnp.concatenate([0 * large, -large, large, 0 * large])
        _, state = elman(x)
        memory = jnp.asarray(normal(1, WIDTH, seed=2))
        carry = (state.carry[0], memory)
        state = recurrent_networks.RecurrentState(carry, state.segment)

        def last(module, state):
            return jnp.sum(module(x, state)[1].carry[-1])

        chex.assert_trees_all_close(lstm(x, state)[1].carry[1], memory, rtol=1e-14)
        gradient = jax.grad(last, argnums=1, allow_int=True)(lstm, state).carry[1]
        chex.assert_trees_all_close(gradient, jnp.ones((1, WIDTH)), rtol=1e-14)
        forgetful = jax.grad(last, argnums=1, allow_int=True)(elman, state._replace(carry=carry[:1])).carry[0]
        assert jnp.abs(forgetful).max() < 1e-2


MIXERS = {
    "gru": CELLS["gru"],
    "min_lstm": minimal_rnns.MinLSTMConfig(taps=3),
}


def build_both(name):
    config = MIXERS[name]
    return shifted(recurrent_networks.Bidirectional(config, StackConfig(WIDTH, 1, (config,)), 0, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("name", MIXERS)
def test_both_directions(name):
    """Packed documents equal separate ones, wherever padding is, and each is read from both ends."""
    with jax.enable_x64(True):
        mixer, x = build_both(name), jnp.asarray(normal(1, 10, WIDTH))
        ids = jnp.asarray([[-1, -1, 4, 4, 4, 2, 2, 2, 2, -1]])
        packed = mixer(x, segment_ids=ids)
        chex.assert_tree_all_finite(packed)
        for document in (slice(2, 5), slice(5, 9)):
            alone = x[:, document]
            forward, backward = mixer.forward(alone)[0], mixer.backward(alone[:, ::-1])[0][:, ::-1]
            expected = mixer.output(jnp.concatenate([forward, backward], axis=-1))
            chex.assert_trees_all_close(mixer(alone), expected, rtol=1e-12)
            chex.assert_trees_all_close(packed[:, document], expected, rtol=1e-11, atol=1e-13)


def test_both_directions_see_all_of_a_document_and_no_other():
    with jax.enable_x64(True):
        mixer, x, ids = build_both("gru"), jnp.asarray(normal(1, 6, WIDTH)), jnp.asarray([[1, 1, 1, 2, 2, 2]])
        jacobian = jax.jacobian(lambda x: mixer(x, segment_ids=ids)[0])(x)[:, :, 0]
        seen = jnp.abs(jacobian).max(axis=(1, 3)) > 0
        chex.assert_trees_all_equal(seen, ids[0][:, None] == ids[0])


def test_turning_a_row_around_swaps_the_directions():
    with jax.enable_x64(True):
        mixer, x = build_both("gru"), jnp.asarray(normal(1, 6, WIDTH))
        turned = mixer(x[:, ::-1])[:, ::-1]
        mixer.forward, mixer.backward = mixer.backward, mixer.forward
        mixer.output.kernel[...] = jnp.roll(mixer.output.kernel[...], WIDTH, axis=0)
        chex.assert_trees_all_close(mixer(x), turned, rtol=1e-12)
