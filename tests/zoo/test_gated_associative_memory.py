"""GAM against its equations; and that it has no memory of the context beyond its filters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from zoo.layers import StackConfig
from zoo.token_mixers.gated_associative_memory import PRESETS, GatedAssociativeMemoryConfig


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_equations():
    with jax.enable_x64(True):
        stack = StackConfig(width=4, pattern=(GatedAssociativeMemoryConfig(slots=5),))
        mixer = stack.pattern[0].mixer(stack, 0, rngs=nnx.Rngs(0))
        mixer = jax.tree.map(lambda x: (2 * x + 0.1).astype(jnp.float64), mixer)
        x = np.random.default_rng(0).normal(size=(2, 7, 4))
        outputs, _ = mixer(jnp.asarray(x))
        bank, weight, bias, kernel, gate_bias = map(
            np.asarray,
            (mixer.bank[...], mixer.convolution.weight[...], mixer.convolution.bias[...],
             mixer.gates.kernel[...], mixer.gates.bias[...]),
        )  # fmt: skip
    for row in range(2):
        for t in range(7):
            local = bias + sum(weight[-1 - j] * x[row, t - j] for j in range(3) if t >= j)
            weights = np.exp(bank @ x[row, t])
            read = weights @ bank / weights.sum()
            gates = sigmoid(x[row, t] @ kernel + gate_bias)
            expected = gates[:4] * local + gates[4:] * read
            chex.assert_trees_all_close(outputs[row, t], expected, rtol=0, atol=1e-13)


def test_parameters_of_the_paper():
    model = jax.eval_shape(lambda: zoo.LanguageModel(PRESETS["paper"], vocabulary=10_000, tied=True, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(model))
    assert count == 22_599_680
    assert round(count / 1e6, 1) == 22.6


@pytest.mark.parametrize(("layers", "taps"), [(1, 3), (3, 3), (2, 4)])
def test_receptive_field(layers, taps):
    """L (taps − 1) + 1 tokens, by the support of the Jacobian: nothing of the context is written to the memory."""
    pattern = (GatedAssociativeMemoryConfig(slots=8, taps=taps),)
    stack = zoo.Stack(StackConfig(width=4, layers=layers, pattern=pattern, hidden=8), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(10, 4)), jnp.float32)
    jacobian = jax.jit(jax.jacobian(lambda x: stack(x[None])[0][0, -1]))(x)
    chex.assert_trees_all_equal(np.any(jacobian, axis=(0, 2)), np.arange(10) >= 10 - (layers * (taps - 1) + 1))


def test_global_path_is_of_one_token():
    """Permuted tokens give permuted readings: the bank knows neither order nor neighbours."""
    stack = StackConfig(width=4, pattern=(GatedAssociativeMemoryConfig(slots=8),))
    mixer = stack.pattern[0].mixer(stack, 0, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 4)), jnp.float32)
    order = np.random.default_rng(1).permutation(6)
    chex.assert_trees_all_close(mixer.read(x[:, order]), mixer.read(x)[:, order], rtol=1e-6)


@pytest.mark.parametrize("option", ["slots", "taps"])
def test_refuses(option):
    with pytest.raises(ValueError, match=f"{option}: expected a positive number"):
        StackConfig(pattern=(GatedAssociativeMemoryConfig(**{option: 0}),))
