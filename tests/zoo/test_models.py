"""Every model, with either mixer: streaming, packing, padding, dropout, precision, and being a plain pytree."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from zoo.layers import dropout

TIME = 12
STACKS = {  # every value of every option
    "aaren": {"position": "none", "norm_place": "pre", "activation": "relu", "norm": "rms", "checkpoint": True},
    "aaren-post": {"position": "sinusoidal", "norm_place": "post", "gated": True, "activation": "silu", "bias": False},
    "transformer": {"rotary": True, "norm_place": "pre", "norm": "simple_rms", "activation": "identity"},
    "transformer-post": {"position": "learned", "norm_place": "post", "kv_heads": 1, "max_length": TIME},
    "aaren-hybrid": {
        "first": ["attention"],
        "pattern": ["aaren", "attention"],
        "layers": 5,
        "heads": 2,
        "scan": True,
        "hidden": 0,
        "checkpoint": True,
    },
}
HEADS = {
    "classifier": {"channels": 3, "classes": 5, "pooling": "mean"},
    "forecaster": {"channels": 3, "horizon": 4, "normalise": False},
    "language_model": {"vocabulary": 11, "tied": True},
}
stacks = pytest.mark.parametrize("stack", STACKS)
heads = pytest.mark.parametrize("head", HEADS)


def create(stack, head, parameters=jnp.float32, **overrides):
    options = {**STACKS[stack], **HEADS[head], **overrides}
    model = zoo.create_model(f"{stack.split('-')[0]}_{head}", rngs=nnx.Rngs(0), **options)
    # Larger than at the start, where all logits are nearly equal.
    return jax.tree.map(lambda x: (3 * x).astype(parameters), model)


def inputs_for(head, dtype=jnp.float32, time=TIME):
    generator = np.random.default_rng(1)
    if head == "language_model":
        return jnp.asarray(generator.integers(0, 11, (2, time)), jnp.int32)
    return jnp.asarray(generator.normal(size=(2, time, 3)), dtype)


def last(head, outputs):
    """The outputs after the last token."""
    return outputs[:, -1] if head == "language_model" else outputs


@stacks
@pytest.mark.parametrize(
    ("head", "dtype", "tolerance"),
    [*((head, "float64", 1e-12) for head in HEADS), ("language_model", "float32", 1e-4)],
)
def test_streaming_equals_the_whole(stack, head, dtype, tolerance):
    """Token by token in a `lax.scan`, over packed and padded rows, from `init_state` with just enough capacity."""
    with jax.enable_x64(dtype == "float64"):
        model, inputs = create(stack, head, dtype), inputs_for(head, dtype)
        ids = jnp.asarray([[0] * 5 + [-1] * 2 + [2] * 5, [-1] * 3 + [1] * 9], jnp.int32)

        @jax.jit
        def stream(model, inputs, ids):
            def step(state, t):
                def at(x):
                    return jax.lax.dynamic_slice_in_dim(x, t, 1, axis=1)

                outputs, state = model(at(inputs), state, segment_ids=at(ids))
                return state, outputs

            return jax.lax.scan(step, model.init_state(2, 10), jnp.arange(TIME))[1]

        call, pieces = jax.jit(lambda ids: model(inputs, segment_ids=ids)[0]), stream(model, inputs, ids)
        if head == "language_model":
            pieces, whole = pieces[:, :, 0].swapaxes(0, 1)[ids >= 0], call(ids)[ids >= 0]
        else:  # the outputs after t tokens are those of a row with padding behind them
            whole = jnp.stack([call(jnp.where(jnp.arange(TIME) <= t, ids, -1)) for t in range(TIME)])
        assert whole.dtype == dtype
        chex.assert_trees_all_close(pieces, whole, rtol=0, atol=tolerance)


@pytest.mark.parametrize("head", ["classifier", "language_model"])
@stacks
def test_padded_and_packed_equal_alone(stack, head):
    with jax.enable_x64(True):
        model, inputs = create(stack, head, jnp.float64), inputs_for(head, jnp.float64)
        call = jax.jit(lambda x, ids: last(head, model(x, segment_ids=ids)[0]))
        alone = call(inputs[:, 7:], None)
        packed = call(inputs, jnp.asarray([[3] * 7 + [4] * 5] * 2))
        padded = call(inputs, jnp.asarray([[-1] * 7 + [4] * 5] * 2))
        right = jnp.concatenate([inputs[:, 7:], inputs[:, :2]], axis=1)
        chex.assert_trees_all_close(packed, alone, rtol=0, atol=1e-12)
        chex.assert_trees_all_close(padded, alone, rtol=0, atol=1e-12)
        if head != "language_model":  # whose last outputs are those of the padding here
            chex.assert_trees_all_close(call(right, jnp.asarray([[0] * 5 + [-1] * 2] * 2)), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stack", ["aaren", "transformer"])
def test_blocks_of_tokens_and_gradients_through_the_state(stack):
    with jax.enable_x64(True):
        model, inputs = create(stack, "classifier", jnp.float64, layers=1), inputs_for("classifier", jnp.float64)

        def whole(model):
            return jnp.sum(model(inputs)[0] ** 2)

        def pieces(model):
            state = model.init_state(2, TIME)
            for block in jnp.split(inputs, (1, 6), axis=1):
                outputs, state = model(block, state)
            return jnp.sum(outputs**2)

        gradients = [jax.jit(jax.grad(loss))(model) for loss in (pieces, whole)]
        chex.assert_trees_all_close(*gradients, rtol=1e-9, atol=1e-9)


@stacks
def test_two_keys_give_two_masks(stack):
    model, inputs = create(stack, "classifier", dropout=0.5), inputs_for("classifier")
    call = jax.jit(lambda key: model(inputs, key=key)[0])
    first, second = (call(jax.random.key(seed)) for seed in (0, 1))
    chex.assert_trees_all_equal(first, call(jax.random.key(0)))
    assert not jnp.allclose(first, second)
    chex.assert_trees_all_close(call(None), create(stack, "classifier", dropout=0.0)(inputs)[0], rtol=1e-4)


def test_dropout_keeps_the_mean():
    x = dropout(jnp.ones((1000, 100)), 0.25, jax.random.key(0))
    np.testing.assert_allclose(x.mean(), 1, atol=0.01)
    assert set(np.unique(x).tolist()) == {0, np.float32(1 / 0.75)}


@heads
@pytest.mark.parametrize("stack", ["aaren", "transformer"])
def test_models_are_plain_pytrees(stack, head):
    """Abstract, several at once, and under the transformations of JAX; no random number generator is left inside."""

    def build(key):
        return zoo.create_model(f"{stack}_{head}", rngs=nnx.Rngs(key), layers=1, **HEADS[head])

    abstract = jax.eval_shape(build, jax.random.key(0))
    models = jax.vmap(build)(jax.random.split(jax.random.key(0), 3))
    chex.assert_trees_all_equal_shapes(jax.tree.map(lambda x: x[0], models), abstract)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(models))
    inputs = inputs_for(head)

    def loss(model):
        return jnp.mean(jnp.square(model(inputs)[0]))

    gradients = jax.jit(jax.vmap(jax.grad(loss)))(models)
    first = jax.jit(jax.grad(loss))(jax.tree.map(lambda x: x[0], models))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], gradients), first, rtol=1e-4, atol=1e-6)
    used = jax.tree.map(lambda x: bool(jnp.any(x)), gradients)
    unused = {jax.tree_util.keystr(path) for path, reached in jax.tree.leaves_with_path(used) if not reached}
    assert all("key" in path and "bias" in path for path in unused), f"no gradient reaches {unused}"


@pytest.mark.parametrize("stack", ["aaren", "transformer"])
def test_bfloat16(stack):
    """Parameters, logits and sums in float32; what is large, the cache for one, in bfloat16."""
    model, exact = create(stack, "classifier", dtype="bfloat16"), create(stack, "classifier")
    inputs = inputs_for("classifier")
    (outputs, state), (expected, _) = model(inputs), exact(inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    assert outputs.dtype == jnp.float32
    assert state.stack.layers[0][0].dtype == ("bfloat16" if stack == "transformer" else "float32")
    error = jnp.linalg.norm(outputs - expected) / jnp.linalg.norm(expected)
    assert 1e-4 < error < 5e-2


@pytest.mark.parametrize("stack", ["aaren", "transformer"])
def test_growing_and_counting_bytes(stack):
    model, inputs = create(stack, "language_model", layers=1), inputs_for("language_model")
    call = jax.jit(type(model).__call__)
    whole, _ = call(model, inputs)
    state, outputs = model.init_state(2, 4), []
    for t in range(TIME):
        if t in (4, 8):
            state = zoo.grow_state(state, 2 * t)
        output, state = call(model, inputs[:, t : t + 1], state)
        outputs.append(output)
    chex.assert_trees_all_close(jnp.concatenate(outputs, axis=1), whole, atol=1e-4)
    used, allocated = zoo.state_bytes(state)
    if stack == "aaren":  # for each row: two statistics a head, a weighted sum, a segment id
        assert used == allocated == 2 * 4 * (2 * 2 + 16 + 1)
    else:  # for each row: keys and values of 12 of 16 slots, three counters
        assert (used, allocated) == tuple(2 * 4 * (2 * 16 * slots + 3) for slots in (12, 16))
        with pytest.raises(ValueError, match="capacity"):
            zoo.grow_state(state, 8)
    several = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    assert zoo.state_bytes(several) == (2 * used, 2 * allocated)


def test_pooling_sees_the_present_document_only():
    inputs = inputs_for("classifier")
    ids = jnp.asarray([[0] * 6 + [1] * 4 + [-1] * 2, [-1] * TIME])
    for pooling in ("last", "mean"):
        pooled, _ = zoo.models.pool(inputs, segment_ids=ids, pooling=pooling)
        expected = inputs[0, 9] if pooling == "last" else inputs[0, 6:10].mean(axis=0)
        chex.assert_trees_all_close(pooled[0], expected, atol=1e-6)
        assert not jnp.any(pooled[1])


def test_forecaster_normalises_each_row():
    """Scaling and shifting a row's series scales and shifts its forecast; padding has no say."""
    model = create("aaren", "forecaster", normalise=True)
    inputs = inputs_for("forecaster")
    outputs, state = model(inputs)
    assert outputs.shape == (2, 4, 3)
    factor, shift = jnp.asarray([100.0, 0.5, 3.0]), jnp.asarray([-7.0, 0.0, 1e3])
    chex.assert_trees_all_close(model(factor * inputs + shift)[0], factor * outputs + shift, rtol=2e-3)
    padded = jnp.concatenate([inputs, jnp.full((2, 3, 3), 9.0)], axis=1)
    ids = jnp.asarray([[0] * TIME + [-1] * 3] * 2)
    chex.assert_trees_all_close(model(padded, segment_ids=ids)[0], outputs, atol=1e-4)
    assert jnp.all(jnp.isfinite(model(padded, segment_ids=jnp.full_like(ids, -1))[0]))
    with pytest.raises(ValueError, match="state: expected None where normalise=True"):
        model(inputs, state)


def test_learned_positions_end():
    model = create("transformer-post", "language_model")
    with pytest.raises(ValueError, match="at most 12 tokens"):
        model(jnp.zeros((1, 13), jnp.int32))
    _, state = model(jnp.zeros((1, TIME), jnp.int32))
    outputs, _ = model(jnp.zeros((1, 1), jnp.int32), zoo.grow_state(state, 16))
    assert jnp.all(jnp.isnan(outputs))


def test_states_survive_export():
    model = create("transformer", "classifier", position="sinusoidal")
    step = jax.jit(lambda x, state: model(x, state))
    state, token = model.init_state(2, 4), inputs_for("classifier", time=1)
    exported = jax.export.deserialize(jax.export.export(step)(token, state).serialize())
    chex.assert_trees_all_close(exported.call(token, state), step(token, state), atol=1e-6)


def test_wrong_inputs():
    model, config = create("aaren", "classifier"), zoo.StackConfig(pattern=(zoo.AarenConfig(),))
    with pytest.raises(ValueError, match="inputs: expected shape"):
        model(jnp.zeros((2, 5)))
    with pytest.raises(TypeError, match="state: expected None or PooledState"):
        model(jnp.zeros((2, 5, 3)), (1, 2))
    for change, message in (
        ({"norm_place": "middle"}, "norm_place: expected one of post, pre"),
        ({"norm": "rsm"}, "norm: expected one of .* did you mean rms"),
        ({"activation": "tanh"}, "activation"),
        ({"pattern": (zoo.AarenConfig(heads=3),)}, "heads: expected a divisor of the width, 64, got 3"),
        ({"pattern": (zoo.SelfAttentionConfig(kv_heads=3),)}, "kv_heads: expected a divisor of the 4 heads, got 3"),
        ({"pattern": (zoo.SelfAttentionConfig(heads=64, rotary=True),)}, "rotary: expected heads of even size, got 1"),
        ({"pattern": ()}, "pattern: expected at least one mixer"),
        ({"layers": 3, "pattern": (zoo.AarenConfig(),) * 2}, "layers: expected 0 first ones and a multiple of the 2"),
        ({"hidden": -1}, "hidden"),
        ({"width": 64.0}, "width: expected a positive integer, got 64.0"),
        ({"pattern": (zoo.AarenConfig(heads=2.0),)}, "heads: expected a divisor of the width, 64, got 2.0"),
        ({"dropout": 1.0}, "dropout"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, **change)
    with pytest.raises(TypeError, match="pattern: expected configurations of mixers, got 'aaren'"):
        dataclasses.replace(config, pattern=("aaren",))
    with pytest.raises(ValueError, match=r"pattern: expected one of .* did you mean attention"):
        zoo.create_model("aaren", rngs=nnx.Rngs(0), pattern=["atention"])
    with pytest.raises(NotImplementedError, match="names no mixer"):
        zoo.Stack(dataclasses.replace(config, pattern=(zoo.MixerConfig(),)), rngs=nnx.Rngs(0))


def test_scanned_layers_equal_listed_ones():
    """The same parameters, stacked or not: the same numbers, with dropout too."""
    options = {"first": ["attention"], "pattern": ["aaren", "attention"], "layers": 5, "dropout": 0.2}
    scanned, listed = (create("aaren", "classifier", scan=scan, **options) for scan in (True, False))
    first, *period = scanned.stack.blocks
    for i in range(2):
        for j in range(2):
            listed.stack.blocks[1 + 2 * i + j] = jax.tree.map(lambda x, i=i: x[i], period[j])
    listed.stack.blocks[0] = first
    for name in ("embed", "head"):
        setattr(listed, name, getattr(scanned, name))
    inputs, key = inputs_for("classifier"), jax.random.key(3)
    call = jax.jit(lambda model: model(inputs, key=key)[0])
    chex.assert_trees_all_close(call(scanned), call(listed), rtol=1e-4, atol=1e-5)
    assert len(scanned.init_state(2).stack.layers) == 3
    assert len(listed.init_state(2).stack.layers) == 5
