"""Titans, Miras, TTT: against loops over tokens in numpy, with gradients written out, and special cases of Titans."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from zoo.token_mixers import miras, titans, ttt
from zoo.token_mixers.deltanet import DeltaNet, DeltaNetConfig

SMALL = {"heads": 2, "expansion": 2, "update_interval": 4}
WIDTH, TIME = 16, 11


def build(config, scale=1.5):
    mixer = config.mixer(zoo.StackConfig(WIDTH, pattern=(config,)), 0, rngs=nnx.Rngs(0))
    return jax.tree.map(lambda x: (scale * x + 0.01).astype(jnp.float64), mixer)


def tokens(time=TIME):
    return np.random.default_rng(0).normal(size=(time, WIDTH))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def silu_slope(x):
    return sigmoid(x) * (1 + x * (1 - sigmoid(x)))


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_slope(x):
    t = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    return (1 + t) / 2 + x / 2 * (1 - t**2) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)


def array(parameter):
    return np.asarray(parameter[...])


def linear(layer, x):
    return x @ array(layer.kernel) + (0 if layer.bias is None else array(layer.bias))


def unit(x):
    return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6)


def rms(norm, x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + norm.epsilon) * array(norm.scale)


def forward(weights, x, residual):
    """A memory's prediction, what enters and leaves each matrix, and the deviation that a residual one divides by."""
    key, inputs, products = x, [], []
    for weight in weights:
        inputs.append(x)
        products.append(x @ weight)
        x = (gelu if residual else silu)(products[-1])
    x, deviation = products[-1], np.sqrt(np.var(products[-1]) + 1e-6)
    return (key + (x - x.mean()) / deviation if residual else x), inputs, products, deviation


def gradients(weights, key, slope, residual):
    """Of a loss with the given slope at the prediction, by back-propagation."""
    prediction, inputs, products, deviation = forward(weights, key, residual)
    g = slope(prediction)
    if residual:
        y = prediction - key
        g = (g - g.mean() - y * np.mean(g * y)) / deviation
    found = []
    for i in reversed(range(len(weights))):
        found.append(np.outer(inputs[i], g))
        if i:
            g = (weights[i] @ g) * (gelu_slope if residual else silu_slope)(products[i - 1])
    return found[::-1]


def slope_of(config, value, threshold):
    def slope(prediction):
        error = prediction - value
        if config.loss == "power":
            return 3 * np.sign(error) * error**2
        distance = np.sqrt(np.sum(error**2))
        if config.loss == "huber" and distance > threshold:
            return 2 * threshold * error / distance
        return 2 * error

    return slope


def retained(config, weight):
    if config.retention == "power_norm":
        return weight / np.sqrt(np.sum(weight**4))
    if config.retention == "softmax":
        exponentials = np.exp(weight)
        return np.sqrt(WIDTH / config.heads) * exponentials / exponentials.sum(axis=0)
    return weight


class Reference:
    """A memory of one row, which takes a token at a time."""

    def __init__(self, memory):
        self.memory, self.config, self.count = memory, memory.config, 0
        self.past = np.zeros((3, 3 * WIDTH))
        self.weights = [[array(weight)[h] for weight in memory.initial] for h in range(self.config.heads)]
        self.momentum = [[np.zeros_like(weight) for weight in weights] for weights in self.weights]
        self.begun = [list(weights) for weights in self.weights]

    def recall(self, h, q, weights):
        return forward([retained(self.config, w) for w in weights[h]], q, self.config.residual)[0]

    def __call__(self, x):
        memory, config = self.memory, self.config
        self.past = np.concatenate([self.past, linear(memory.query_key_value, x)[None]])[-4:]
        mixed = silu(np.sum(array(memory.convolution.weight) * self.past, axis=0))
        q, k, v = mixed.reshape(3, config.heads, -1)
        q, k = unit(q), unit(k)
        step = config.max_step * sigmoid(linear(memory.step, x))
        decay = sigmoid(-linear(memory.forget, x)) if config.forgetting else np.ones(config.heads)
        momentum = sigmoid(linear(memory.momentum, x)) if config.momentum else np.zeros(config.heads)
        threshold = np.log1p(np.exp(linear(memory.threshold, x))) if config.loss == "huber" else np.zeros(config.heads)
        for h in range(config.heads):
            at = [retained(config, weight) for weight in self.begun[h]]
            found = gradients(at, k[h], slope_of(config, v[h], threshold[h]), config.residual)
            for i, gradient in enumerate(found):
                self.momentum[h][i] = momentum[h] * self.momentum[h][i] - step[h] * gradient
                self.weights[h][i] = decay[h] * self.weights[h][i] + self.momentum[h][i]
        self.count += 1
        if self.count % config.update_interval == 0:
            self.begun = [list(weights) for weights in self.weights]
        weights = self.weights if config.read == "after_token" else self.begun
        o = np.stack([self.recall(h, q[h], weights) for h in range(config.heads)])
        self.past = self.past[1:]
        return linear(memory.output, rms(memory.norm, o).reshape(-1) * silu(linear(memory.gate, x)))


def turned(x, position):
    """The first half of the channels of each head, in pairs from its two halves."""
    quarter = x.shape[-1] // 4
    angle = position * 10000.0 ** (-np.arange(quarter) / quarter)
    a, b, rest = x[..., :quarter], x[..., quarter : 2 * quarter], x[..., 2 * quarter :]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle), rest], axis=-1)


def attend(attention, xs):
    """The last token of some attends to the persistent ones, to those of its window and to itself."""
    first = max(0, len(xs) - attention.window)
    persistent = [] if attention.persistent is None else array(attention.persistent)[0]
    keys, values = [], []
    for position, x in [(None, x) for x in persistent] + list(enumerate(xs))[first:]:
        q, k, v = linear(attention.query_key_value, x).reshape(3, attention.heads, -1)
        if position is None:
            k = np.where(np.arange(k.shape[-1]) < k.shape[-1] // 2, 0, k)
        else:
            q, k = turned(q, position), turned(k, position)
        keys.append(k)
        values.append(v)
    weights = np.exp(np.einsum("hd,jhd->hj", q, np.stack(keys)) / np.sqrt(q.shape[-1]))
    weights /= weights.sum(axis=1, keepdims=True)
    return linear(attention.output, np.einsum("hj,jhd->hd", weights, np.stack(values)).reshape(-1))


def gated(gate, y, m):
    return rms(gate.norms[0], y) * silu(rms(gate.norms[1], m))


def memory_alone(mixer, xs):
    return [*map(Reference(mixer), xs)]


def memory_as_gate(mixer, xs):
    memory = Reference(mixer.memory)
    return [gated(mixer.gate, attend(mixer.attention, xs[: t + 1]), memory(x)) for t, x in enumerate(xs)]


def memory_as_layer(mixer, xs):
    ys = [*map(Reference(mixer.memory), xs)]
    return [attend(mixer.attention, ys[: t + 1]) for t in range(len(ys))]


def memory_as_context(mixer, xs):
    memory, outputs = Reference(mixer.memory), []
    size, heads = memory.config.update_interval, memory.config.heads
    for start in range(0, len(xs), size):
        pairs, ys = [], []
        for x in xs[start : start + size]:
            q = unit(silu(linear(mixer.search, x)).reshape(heads, -1))
            h = np.stack([memory.recall(i, q[i], memory.begun) for i in range(heads)])
            pairs += [rms(mixer.norm, h).reshape(-1), x]
            ys.append(x + attend(mixer.attention, pairs))
        outputs += [gated(mixer.gate, y, memory(y)) for y in ys]
    return outputs


CASES = {
    "memory": (titans.MemoryConfig(**SMALL), memory_alone),
    "memory, plain": (titans.MemoryConfig(**SMALL, residual=False), memory_alone),
    "memory, three matrices, read after intervals": (
        titans.MemoryConfig(**SMALL, depth=3, momentum=False, read="after_interval", residual=False),
        memory_alone,
    ),
    "memory_as_context": (titans.MemoryAsContextConfig(**SMALL, persistent=3), memory_as_context),
    "memory_as_gate": (titans.MemoryAsGateConfig(**SMALL, persistent=2, window=4), memory_as_gate),
    "memory_as_layer": (titans.MemoryAsLayerConfig(**SMALL, persistent=2, window=4), memory_as_layer),
    "moneta": (dataclasses.replace(miras.MONETA, **SMALL), memory_alone),
    "yaad": (dataclasses.replace(miras.YAAD, **SMALL), memory_alone),
    "memora": (dataclasses.replace(miras.MEMORA, **SMALL, read="after_interval"), memory_alone),
    "ttt_linear": (dataclasses.replace(ttt.TTT_LINEAR, **SMALL), memory_alone),
    "ttt_mlp": (dataclasses.replace(ttt.TTT_MLP, **SMALL), memory_alone),
}


@pytest.mark.parametrize("name", CASES)
@jax.enable_x64(True)
def test_equals_the_equations_token_by_token(name):
    config, reference = CASES[name]
    mixer, x = build(config), tokens()
    outputs, _ = jax.jit(lambda mixer, x: mixer(x))(mixer, jnp.asarray(x[None]))
    chex.assert_trees_all_close(outputs[0], np.stack(reference(mixer, x)), rtol=0, atol=1e-10)


class GatedDeltaRule(DeltaNet):
    """A DeltaNet with the output gate of a memory."""

    def gate(self, x, y):
        """What of the outputs passes."""
        return y * jax.nn.silu(self.output_gate(x))


@jax.enable_x64(True)
def test_a_linear_memory_without_forgetting_is_a_deltanet():
    """The gradient of the squared error has a factor 2, so that steps up to 1/2 are the β of the delta rule."""
    config = titans.MemoryConfig(
        heads=2, depth=1, update_interval=1, momentum=False, forgetting=False, residual=False, max_step=0.5
    )  # fmt: skip
    memory, x = build(config), jnp.asarray(tokens()[None])
    memory.initial[0] = nnx.Param(jnp.zeros((2, WIDTH // 2, WIDTH // 2)))
    stack = zoo.StackConfig(WIDTH, pattern=(DeltaNetConfig(heads=2),))
    delta = GatedDeltaRule(stack, 2, WIDTH // 2, WIDTH // 2, rngs=nnx.Rngs(1))
    for name in ("query_key_value", "convolution", "norm", "output"):
        setattr(delta, name, getattr(memory, name))
    delta.beta, delta.output_gate = memory.step, memory.gate
    chex.assert_trees_all_close(memory(x)[0], delta(x)[0], rtol=0, atol=1e-12)


@jax.enable_x64(True)
def test_persistent_tokens_look_the_same_from_everywhere():
    """Equal tokens in a window of one, wherever they stand."""
    stack = zoo.StackConfig(WIDTH, pattern=(CASES["memory"][0],))
    attention = titans.PersistentAttention(stack, 2, 1, 3, rngs=nnx.Rngs(0))
    outputs, _ = attention(jnp.ones((1, 50, WIDTH)))
    chex.assert_trees_all_close(outputs, jnp.broadcast_to(outputs[:, :1], outputs.shape), atol=1e-12)
    alone, _ = titans.PersistentAttention(stack, 2, 1, 0, rngs=nnx.Rngs(0))(jnp.ones((1, 1, WIDTH)))
    assert jnp.max(jnp.abs(alone - outputs[:, :1])) > 0.01


@jax.enable_x64(True)
def test_segments_of_documents():
    """MAC where a window of tokens holds parts of several documents and segments, and rows differ in that."""
    config, reference = CASES["memory_as_context"]
    mixer, x = build(config), np.random.default_rng(1).normal(size=(3, 14, WIDTH))
    ids = np.asarray([[0, 1, 1, 2, 3, 3, 3, 3, 3, 3, 4, -1, 4, 5], [0] * 6 + [1] * 8, [-1] * 2 + [7] * 12])
    outputs, _ = jax.jit(lambda mixer, x: mixer(x, segment_ids=jnp.asarray(ids)))(mixer, jnp.asarray(x))
    for b, row in enumerate(ids):
        for document in set(row[row >= 0]):
            expected = np.stack(reference(mixer, x[b, row == document]))
            chex.assert_trees_all_close(outputs[b, row == document], expected, rtol=0, atol=1e-10)


@jax.enable_x64(True)
def test_pieces_of_any_length_equal_the_whole():
    """MAC, without segment ids: pieces end within segments, and one is longer than two."""
    mixer, x, state, pieces = build(CASES["memory_as_context"][0]), jnp.asarray(tokens(18)[None]), None, []
    run = jax.jit(lambda mixer, x, state: mixer(x, state))
    for start, stop in ((0, 9), (9, 18)):
        piece, state = run(mixer, x[:, start:stop], state)
        pieces.append(piece)
    whole, after = run(mixer, x, None)
    chex.assert_trees_all_close(jnp.concatenate(pieces, axis=1), whole, rtol=0, atol=1e-11)
    chex.assert_trees_all_close(state.memory, after.memory, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("memory", {"depth": 0}, "depth: expected a positive integer, got 0"),
        ("memory", {"update_interval": 2.0}, r"update_interval: expected a positive integer, got 2\.0"),
        ("memory", {"loss": "hubert"}, "loss: expected one of .* did you mean huber"),
        ("memory", {"retention": "kept"}, "retention: expected one of .* did you mean keep"),
        ("memory", {"read": "before"}, "read: expected one of"),
        ("memory", {"max_step": 0.0}, "max_step: expected a positive number"),
        ("memory", {"heads": 3}, "heads: expected a divisor of the width"),
        ("memory_as_context", {"persistent": -1}, "persistent: expected a number of tokens, got -1"),
        ("memory_as_gate", {"heads": 8}, "heads: expected heads of a multiple of 4 channels, got 2"),
        ("memory_as_layer", {"window": 0}, "window: expected a positive number, got 0"),
    ],
)
def test_refusals(name, options, message):
    with pytest.raises(ValueError, match=message):
        zoo.StackConfig(16, pattern=(zoo.mixer_config(name, **options),))


def count(stack, preset):
    """Parameters with a vocabulary of 32,000, the embedding as the head."""
    config = dataclasses.replace(zoo.create.STACKS[stack][preset], scan=True)
    model = jax.eval_shape(lambda: zoo.LanguageModel(config, vocabulary=32_000, tied=True, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(model))


@pytest.mark.parametrize("preset", titans.SIZES)
def test_parameters_of_presets(preset):
    """The four of a size are as large as each other, and near its name where its depth and width give that."""
    counts = np.asarray([count(stack, preset) for stack in titans.PRESETS]) / 1e6
    assert counts.max() / counts.min() < 1.02
    if preset != "170m":
        assert 1.05 < counts.min() / int(preset[:-1]) < counts.max() / int(preset[:-1]) < 1.11
