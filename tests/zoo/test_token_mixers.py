"""What every mixer of the zoo must keep, by the names that patterns are made of; their equations have own tests."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from primitives import AttentionState
from zoo.create import MIXERS
from zoo.states import StateBytes

TIME = 12
IDS = np.asarray([[0] * 5 + [-1] * 2 + [2] * 5, [-1] * 3 + [1] * 9], np.int32)
SMALL = {  # for the mixers that have these options
    "heads": 2, "head_dim": 8, "feature_dim": 4, "slots": 8, "state_size": 8, "blocks": 2,
    "window": 4, "chunk": 4, "update_interval": 4, "persistent": 2, "expansion": 2,
}  # fmt: skip
CASES = {name: (name, {}) for name in MIXERS} | {  # and what presets use, but defaults do not
    "attention rotary": ("attention", {"rotary": True, "kv_heads": 1}),
    "diff_qkv augmented": ("diff_qkv", {"key_dim": 4, "query_hidden": 24}),
    "depth 1": ("memory", {"depth": 1, "read": "after_interval"}),
    "depth 3": (
        "memory",
        {"depth": 3, "residual": False, "update_interval": 1, "momentum": False, "forgetting": False},
    ),
    "context": ("memory_as_context", {"depth": 1, "read": "after_interval", "momentum": False, "persistent": 0}),
    "context token by token": ("memory_as_context", {"update_interval": 1, "forgetting": False}),
    "lightnet tpe": ("lightnet", {"tpe": True, "lrpe": True}),
    "min_gru taps": ("min_gru", {"taps": 4, "expand": 2, "positive": True}),
    "moh": ("moh", {"heads": 4, "shared": 1, "active": 2}),
    "sigmoid norms": ("sigmoid", {"rotary": True, "query_key_norm": True, "output_norm": True}),
}
mixers = pytest.mark.parametrize("name", CASES)


def create(name, parameters=jnp.float64, **options):
    """A mixer as of the second of two layers, whose number is traced, with larger parameters than at the start."""
    mixer, more = CASES[name]
    names = {field.name for field in dataclasses.fields(MIXERS[mixer])}
    small = {field: value for field, value in SMALL.items() if field in names}
    config = zoo.mixer_config(mixer, **small | more)
    stack = zoo.StackConfig(16, 2, (config,), **options)
    mixer = jax.jit(lambda layer: config.mixer(stack, layer, rngs=nnx.Rngs(0)))(1)
    graph, trained, constant = nnx.split(mixer, nnx.Param, ...)
    trained = jax.tree.map(lambda x: 1.5 * x + 0.01, trained)
    return jax.tree.map(lambda x: x.astype(parameters), nnx.merge(graph, trained, constant))


def inputs(dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, TIME, 16)), dtype)


@mixers
def test_steps_documents_and_states(name):
    """Tokens one by one, over packed and padded rows, equal the whole; documents equal themselves alone."""
    with jax.enable_x64(True):
        mixer, x, ids = create(name), inputs(), jnp.asarray(IDS)
        assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(mixer))
        fresh = jax.jit(lambda mixer: zoo.init_state(mixer, x[:, :1], TIME))(mixer)

        @jax.jit
        def run(mixer, x, ids):
            def step(state, token):
                outputs, state = mixer(token[0][:, None], state, segment_ids=token[1][:, None])
                return state, outputs[:, 0]

            whole, _ = mixer(x, segment_ids=ids)
            state, steps = jax.lax.scan(step, fresh, (x.swapaxes(0, 1), ids.T))
            return whole, steps.swapaxes(0, 1), mixer(x[:1, 7:])[0], state

        whole, steps, alone, state = run(mixer, x, ids)
        chex.assert_tree_all_finite(whole)
        chex.assert_trees_all_close(steps[ids >= 0], whole[ids >= 0], rtol=0, atol=1e-11)
        chex.assert_trees_all_close(alone[0], whole[0, 7:], rtol=0, atol=1e-11)
        chex.assert_trees_all_equal_shapes(state, fresh)
        wide = {leaf.dtype.name for leaf in jax.tree.leaves(fresh)} <= {"float64", "complex128", "int32"}
        assert wide, "a state is narrower than its inputs"
        step = jax.jit(lambda x, state: mixer(x, state))
        assert jax.export.export(step)(x[:, :1], state).serialize()


# The module of these is that of "memory" or "memory_as_context", and the laws run over the primitive's own choices.
ALIKE = {"moneta", "yaad", "memora", "ttt_linear", "ttt_mlp", "depth 1", "depth 3", "context", "context token by token"}


@pytest.mark.parametrize("name", [name for name in CASES if name not in ALIKE])
def test_gradients_pass_through_the_state(name):
    """Two pieces equal the whole in every gradient, and every parameter has one."""
    with jax.enable_x64(True):
        mixer, x, ids = create(name), inputs(), jnp.asarray(IDS)

        def whole(mixer, x):
            y, _ = mixer(x, segment_ids=ids)
            return jnp.sum(jnp.where((ids >= 0)[..., None], y, 0) ** 2)

        def pieces(mixer, x):
            state = zoo.grow_state(zoo.init_state(mixer, x[:, :1]), TIME)
            first, state = mixer(x[:, :8], state, segment_ids=ids[:, :8])
            second, _ = mixer(x[:, 8:], state, segment_ids=ids[:, 8:])
            y = jnp.concatenate([first, second], axis=1)
            return jnp.sum(jnp.where((ids >= 0)[..., None], y, 0) ** 2)

        both = jax.jit(lambda *args: [jax.grad(loss, argnums=(0, 1))(*args) for loss in (whole, pieces)])
        expected, found = both(mixer, x)
        chex.assert_trees_all_close(found, expected, rtol=1e-8, atol=1e-9)
        chex.assert_tree_all_finite(expected)
        parameters = nnx.state(expected[0], nnx.Param)
        unused = {
            jax.tree_util.keystr(path)
            for path, leaf in jax.tree.leaves_with_path(parameters)
            if not jnp.any(jnp.abs(leaf) > 1e-14)
        }
        assert not unused - ALLOWED.get(name, set()), f"no gradient reaches {unused}"


# A constant added to all logits of a softmax has no effect.
ALLOWED = {"aaren": {"['key']['bias'].value"}}


@mixers
def test_precision(name):
    """In bfloat16 outputs are near those in float32, of which they have the parameters, and gradients are finite."""
    exact, rough = (create(name, jnp.float32, dtype=dtype) for dtype in (None, jnp.bfloat16))
    x = inputs(jnp.float32)

    def loss(mixer, x):
        y, _ = mixer(x)
        return jnp.mean(jnp.square(y.astype(jnp.float32))), y

    expected = jax.jit(lambda mixer, x: mixer(x)[0])(exact, x)
    gradients, found = jax.jit(jax.grad(loss, has_aux=True))(rough, x.astype(jnp.bfloat16))
    chex.assert_tree_all_finite(gradients)
    assert {leaf.dtype for leaf in jax.tree.leaves(rough)} == {jnp.dtype("float32")}
    assert found.dtype == jnp.bfloat16
    # Of most rows: a norm behind a sum that nearly cancels out, as in a retention's first token, amplifies rounding.
    error, size = (jnp.linalg.norm(x.astype(jnp.float32), axis=-1) for x in (found - expected, expected))
    assert 1e-4 < jnp.median(error / size) < 5e-2


@mixers
def test_narrow_parameters(name):
    """With everything in bfloat16 outputs are too, states but for caches are wider, and a scan can carry them."""
    mixer, x = jax.eval_shape(lambda: create(name, jnp.bfloat16)), inputs(jnp.bfloat16)
    y, state = jax.eval_shape(lambda mixer: mixer(x), mixer)
    assert y.dtype == jnp.bfloat16
    again, after = jax.eval_shape(lambda mixer, state: mixer(x, state), mixer, state)
    assert again.dtype == jnp.bfloat16
    chex.assert_trees_all_equal_dtypes(after, state)
    parts = jax.tree.leaves(state, is_leaf=lambda part: isinstance(part, AttentionState))
    assert all(isinstance(part, AttentionState) or part.dtype.itemsize >= 4 for part in parts)


@mixers
def test_foreign_state(name):
    mixer = jax.eval_shape(lambda: create(name, jnp.float32))
    with pytest.raises(TypeError, match="state"):
        jax.eval_shape(lambda mixer: mixer(inputs(jnp.float32), StateBytes(0, 0)), mixer)
