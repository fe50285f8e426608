"""Every system equals its mixer, token by token and as one map."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primitives import (
    causal_attention,
    causal_map,
    elu_plus_one,
    gated_rnn_system,
    linear_attention,
    linear_attention_system,
    linear_recurrence,
    normalised_linear_attention,
    normalised_system,
    run_system,
    selective_scan,
    selective_scan_system,
    softmax_attention_system,
    ssd,
    ssd_system,
)

BATCH, TIME, HEADS, KEY, VALUE = 2, 7, 2, 3, 4


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(BATCH, TIME, *shape)))


def attention_inputs():
    return normal(HEADS, KEY, seed=1), normal(HEADS, KEY, seed=2), normal(HEADS, VALUE, seed=3)


def linear_case(decay):
    q, k, v = attention_inputs()
    log_decay = {"none": None, "head": -(normal(HEADS) ** 2), "channel": -(normal(HEADS, KEY) ** 2)}[decay]
    system = linear_attention_system(q, k, VALUE, log_decay[..., None] if decay == "head" else log_decay, scale=0.7)
    return linear_attention(q, k, v, log_decay, scale=0.7)[0], system, v


def normalised_case():
    q, k, v = attention_inputs()
    q, k = elu_plus_one(q), elu_plus_one(k)
    eta = 1e-6 + jnp.sum(q * jnp.cumsum(k, axis=1), axis=-1)
    return normalised_linear_attention(q, k, v)[0], normalised_system(linear_attention_system(q, k, VALUE), eta), v


def softmax_case(size=1.0):
    q, k, v = attention_inputs()
    return causal_attention(size * q, k, v)[0], softmax_attention_system(size * q, k, VALUE), v


def selective_case():
    x, dt, b, c = normal(VALUE), jnp.exp(normal(VALUE, seed=1)), normal(KEY, seed=2), normal(KEY, seed=3)
    a, d = -jnp.exp(normal(VALUE, KEY)[0, 0]), normal(VALUE)[0, 0]
    return selective_scan(x, dt, a, b, c, d)[0][..., None], selective_scan_system(dt, a, b, c, d), x[..., None]


def ssd_case():
    c, b, x = attention_inputs()
    dt, a, d = jnp.exp(normal(HEADS)), -jnp.exp(normal(HEADS)[0, 0]), normal(HEADS)[0, 1]
    return ssd(x, dt, a, b, c, d)[0], ssd_system(dt, a, b, c, VALUE, d), x


def quasi_lstm_case():
    forget, input_gate, output_gate = (jax.nn.sigmoid(normal(VALUE, seed=seed)) for seed in (1, 2, 3))
    u = normal(VALUE)
    expected = output_gate * linear_recurrence(forget, input_gate * u)[0]
    return expected[..., None], gated_rnn_system(forget, input_gate, output_gate), u[..., None]


def rg_lru_case():
    r, i = (jax.nn.sigmoid(normal(VALUE, seed=seed)) for seed in (1, 2))
    decay, u = jnp.exp(-8 * jax.nn.softplus(normal(VALUE)[0, 0]) * r), normal(VALUE, seed=3)
    gate = jnp.sqrt(1 - decay**2) * i
    return linear_recurrence(decay, gate * u)[0][..., None], gated_rnn_system(decay, gate), u[..., None]


CASES = {
    "linear": lambda: linear_case("none"),
    "linear, a decay per head": lambda: linear_case("head"),
    "linear, a decay per channel": lambda: linear_case("channel"),
    "normalised": normalised_case,
    "softmax": softmax_case,
    "softmax, large logits": lambda: softmax_case(300.0),
    "selective scan": selective_case,
    "ssd": ssd_case,
    "quasi-LSTM": quasi_lstm_case,
    "RG-LRU": rg_lru_case,
}


@pytest.mark.parametrize("case", CASES)
def test_system_equals_its_mixer(case):
    with jax.enable_x64(True):
        expected, system, u = CASES[case]()
        chex.assert_trees_all_close(run_system(system, u)[0], expected, rtol=1e-12, atol=1e-12)
        phi = causal_map(system)
        chex.assert_trees_all_close(jnp.einsum("bhiojd,bjhd->biho", phi, u), expected, rtol=1e-12, atol=1e-12)


def test_map_of_softmax_attention_is_its_weights():
    with jax.enable_x64(True):
        q, k, _ = attention_inputs()
        scores = jnp.einsum("bihd,bjhd->bhij", q, k) / KEY**0.5
        weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((TIME, TIME), bool)), scores, -jnp.inf))
        expected = jnp.einsum("bhij,od->bhiojd", weights, jnp.eye(VALUE))
        chex.assert_trees_all_close(causal_map(softmax_attention_system(q, k, VALUE)), expected, atol=1e-14)


def test_ssd_without_decay_steps_and_skip_is_linear_attention():
    with jax.enable_x64(True):
        c, b, _ = attention_inputs()
        system = ssd_system(jnp.ones((BATCH, TIME, HEADS)), jnp.zeros(HEADS), b, c, VALUE)
        chex.assert_trees_all_equal(system, linear_attention_system(c, b, VALUE))


def test_normalisation_divides_the_outputs_of_any_system():
    with jax.enable_x64(True):
        expected, system, u = ssd_case()
        eta = jnp.exp(normal(HEADS, seed=5))
        y, hidden = run_system(normalised_system(system, eta), u)
        chex.assert_trees_all_close(y, expected / eta[..., None], rtol=1e-12)
        chex.assert_trees_all_close(hidden, run_system(system, u)[1] / eta[:, -1, :, None], rtol=1e-12)


def test_a_system_goes_on_from_a_hidden_state():
    with jax.enable_x64(True):
        expected, system, u = selective_case()
        parts = [jax.tree.map(lambda x, s=s: x[:, s], (system, u)) for s in (slice(3), slice(3, None))]
        first, hidden = run_system(*parts[0])
        second, _ = run_system(*parts[1], hidden)
        chex.assert_trees_all_close(jnp.concatenate([first, second], axis=1), expected, rtol=1e-12)


def test_refusals():
    _, system, u = ssd_case()
    with pytest.raises(ValueError, match=r"^u: expected shape"):
        run_system(system, u[:, 1:])
    with pytest.raises(ValueError, match=r"^skip: expected shape"):
        causal_map(system._replace(skip=system.skip[..., :1]))
    with pytest.raises(TypeError, match=r"^decay: expected a floating point dtype"):
        causal_map(system._replace(decay=jnp.ones(system.decay.shape, int)))
