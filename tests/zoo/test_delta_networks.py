"""DeltaNet, Gated DeltaNet, Kimi Delta Attention: against their recurrences token by token, and as special cases."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from zoo.token_mixers import deltanet, gated_deltanet, kimi_delta_attention
from zoo.token_mixers.transformer import SelfAttentionConfig

CONFIGS = {
    "delta": deltanet.DeltaNetConfig(heads=2),
    "gated_delta": gated_deltanet.GatedDeltaNetConfig(heads=2),
    "kimi_delta": kimi_delta_attention.KimiDeltaAttentionConfig(heads=2, head_dim=6),
}


def build(name):
    config = CONFIGS[name]
    mixer = config.mixer(zoo.StackConfig(width=8, pattern=(config,)), 0, rngs=nnx.Rngs(0))
    return jax.tree.map(lambda x: (2 * x + 0.1).astype(jnp.float64), mixer)


@jax.jit
def run(mixer, x):
    return mixer(jnp.asarray(x))


def tokens(time=11):
    return np.random.default_rng(0).normal(size=(2, time, 8))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def kernel(linear):
    return np.asarray(linear.kernel)


def decays_and_gate(name, mixer, x):
    """α for each head and key channel (or one for all), and what the outputs are multiplied with."""
    if name == "delta":
        return np.ones((len(x), 2, 1)), 1.0
    rate, bias = np.exp(np.asarray(mixer.log_rate)), np.asarray(mixer.decay_bias)
    if name == "gated_delta":
        alpha = np.exp(-rate * softplus(x @ kernel(mixer.decay) + bias))
        return alpha[..., None], silu(x @ kernel(mixer.output_gate))
    steps = (x @ kernel(mixer.decay.down) @ kernel(mixer.decay.up)).reshape(len(x), 2, -1)
    gate = x @ kernel(mixer.output_gate.down) @ kernel(mixer.output_gate.up) + np.asarray(mixer.output_gate.up.bias)
    return np.exp(-rate * softplus(steps + bias)), sigmoid(gate)


def token_by_token(name, mixer, x):
    """The equations of one row, with a loop over tokens and heads."""
    projected, taps = x @ kernel(mixer.query_key_value), np.asarray(mixer.convolution.weight)
    padded = np.concatenate([np.zeros((3, projected.shape[1])), projected])
    mixed = silu(np.stack([np.sum(taps * padded[t : t + 4], axis=0) for t in range(len(x))]))
    q, k, v = (y.reshape(len(x), 2, -1) for y in np.split(mixed, mixer.splits, axis=1))
    q, k = (y / np.sqrt(np.sum(y**2, axis=-1, keepdims=True) + 1e-6) for y in (q, k))
    alpha, gate = decays_and_gate(name, mixer, x)
    beta = sigmoid(x @ kernel(mixer.beta))
    memory, outputs = np.zeros((2, k.shape[-1], v.shape[-1])), np.zeros_like(v)
    for t in range(len(x)):
        for h in range(2):
            s = alpha[t, h][:, None] * memory[h]
            s = s - beta[t, h] * np.outer(k[t, h], k[t, h] @ s) + beta[t, h] * np.outer(k[t, h], v[t, h])
            memory[h], outputs[t, h] = s, q[t, h] @ s
    normed = outputs / np.sqrt(np.mean(outputs**2, axis=-1, keepdims=True) + 1e-5) * np.asarray(mixer.norm.scale)
    return (normed.reshape(len(x), -1) * gate) @ kernel(mixer.output), memory


@jax.enable_x64(True)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_recurrence_token_by_token(name):
    mixer, x = build(name), tokens()
    outputs, state = run(mixer, x)
    expected = [token_by_token(name, mixer, row) for row in x]
    chex.assert_trees_all_close(outputs, np.stack([y for y, _ in expected]), atol=1e-10)
    chex.assert_trees_all_close(state.memory.memory, np.stack([memory for _, memory in expected]), atol=1e-10)


def share(mixer, other):
    """Give a mixer the parameters that all three have."""
    for name in ("query_key_value", "convolution", "beta", "norm", "output"):
        setattr(mixer, name, getattr(other, name))
    return mixer


@jax.enable_x64(True)
def test_gated_without_forgetting_is_the_delta_rule():
    gated, x = build("gated_delta"), tokens()
    delta = share(
        deltanet.DeltaNet(zoo.StackConfig(width=8, pattern=(CONFIGS["delta"],)), 2, 3, 6, rngs=nnx.Rngs(1)), gated
    )
    assert float(jnp.max(jnp.abs(run(gated, x)[1].memory.memory - run(delta, x)[1].memory.memory))) > 0.1
    gated.log_rate = nnx.Param(jnp.full(2, -jnp.inf))
    chex.assert_trees_all_close(run(gated, x)[1], run(delta, x)[1], atol=1e-13)


@jax.enable_x64(True)
def test_kimi_with_one_decay_for_all_channels_is_gated():
    kimi, x = build("kimi_delta"), tokens()
    config = gated_deltanet.GatedDeltaNetConfig(heads=2, key_expansion=1.5, value_expansion=1.5)
    gated = share(config.mixer(zoo.StackConfig(width=8, pattern=(config,)), 0, rngs=nnx.Rngs(1)), kimi)
    kimi.decay.up.kernel = nnx.Param(jnp.tile(jnp.repeat(jnp.array([0.3, -0.2]), 6), (6, 1)))
    gated.decay.kernel = nnx.Param(kimi.decay.down.kernel[...] @ kimi.decay.up.kernel[...][:, ::6])
    gated.log_rate = nnx.Param(kimi.log_rate[...][:, 0])
    kimi.decay_bias = nnx.Param(jnp.broadcast_to(jnp.array([[-1.0], [0.5]]), (2, 6)))
    gated.decay_bias = nnx.Param(jnp.array([-1.0, 0.5]))
    chex.assert_trees_all_close(run(kimi, x)[1], run(gated, x)[1], atol=1e-12)


def test_decays_start_where_the_papers_say():
    for name, smallest in (("gated_delta", 1e-3), ("kimi_delta", 1)):
        mixer = dataclasses.replace(CONFIGS[name], heads=8).mixer(
            zoo.StackConfig(width=64, pattern=(CONFIGS["delta"],)), 0, rngs=nnx.Rngs(0)
        )
        rate, step = jnp.exp(mixer.log_rate[...]), jax.nn.softplus(mixer.decay_bias[...])
        assert smallest <= rate.min() < rate.max() <= 16.01
        assert 0.00099 < step.min() < step.max() < 0.101


def count(build):
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(build)))


def test_parameters_of_the_published_model():
    """1.3B: a file of 2.73 GB in bfloat16, with a vocabulary of 32,000 and an embedding that is not tied."""
    config = dataclasses.replace(deltanet.PRESETS["1.3b"], scan=True)
    total = count(lambda: zoo.LanguageModel(config, vocabulary=32_000, tied=False, rngs=nnx.Rngs(0)))
    assert abs(2 * total / 2.73e9 - 1) < 0.002


@pytest.mark.parametrize("preset", ["0.4b", "1.3b"])
def test_six_widths_squared_in_gated_deltanet(preset):
    config = gated_deltanet.PRESETS[preset]
    total = count(lambda: config.pattern[0].mixer(config, 0, rngs=nnx.Rngs(0)))
    assert 0 < total / config.width**2 - 6 < 0.05


def test_full_attention_is_every_fourth_layer_of_kimi_and_the_last():
    config = kimi_delta_attention.PRESETS["48b_a3b"]
    full = [i for i, mixer in enumerate(config.pattern, 1) if isinstance(mixer, SelfAttentionConfig)]
    assert (len(config.pattern), full) == (config.layers, [4, 8, 12, 16, 20, 24, 27])


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"^key_expansion: .* 5 heads, got 12"):
        zoo.StackConfig(width=16, pattern=(gated_deltanet.GatedDeltaNetConfig(heads=5),))
    with pytest.raises(ValueError, match=r"^head_dim: "):
        zoo.StackConfig(width=16, pattern=(kimi_delta_attention.KimiDeltaAttentionConfig(head_dim=0),))
