"""Where the arrays of a model lie on a mesh, and that a split model computes the same."""

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import zoo


def mesh():
    return jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])


def model(key):
    return zoo.create_model(
        "transformer_language_model", rngs=nnx.Rngs(key), vocabulary=10, layers=3, first=["attention"],
        pattern=["gated_linear_attention"], heads=2, scan=True,
    )  # fmt: skip


def test_where_arrays_lie():
    found = zoo.shardings(jax.eval_shape(model, jax.random.key(0)), mesh())
    first, repeated = found.stack.blocks
    assert found.embed.embedding.get_value().spec == PartitionSpec("tensor", "data")
    assert found.head.kernel.get_value().spec == PartitionSpec("data", "tensor")
    assert first.mixer.query_key_value.kernel.get_value().spec == PartitionSpec("data", "tensor")
    assert first.mixer.output.kernel.get_value().spec == PartitionSpec("tensor", "data")
    assert first.mixer.output.bias.get_value().spec == PartitionSpec()
    assert repeated.feed_forward.inner.kernel.get_value().spec == PartitionSpec(None, "data", "tensor")
    assert repeated.feed_forward.outer.kernel.get_value().spec == PartitionSpec(None, "tensor", "data")


def test_sizes_that_do_not_divide_stay_whole():
    odd = jax.eval_shape(lambda: zoo.create_model("aaren_language_model", rngs=nnx.Rngs(0), vocabulary=7))
    assert zoo.shardings(odd, mesh()).head.kernel.get_value().spec == PartitionSpec("data", None)


def test_another_mesh_is_refused():
    with pytest.raises(ValueError, match="mesh: expected an axis 'model'"):
        zoo.shardings(jax.eval_shape(model, jax.random.key(0)), mesh(), tensor="model")


def test_a_split_model_computes_the_same():
    key, tokens = jax.random.key(0), jnp.arange(24).reshape(4, 6) % 10
    where, batch = zoo.shardings(jax.eval_shape(model, key), mesh()), NamedSharding(mesh(), PartitionSpec("data"))

    def loss(model, tokens):
        return jnp.mean(jnp.square(model(tokens)[0]))

    alone = jax.jit(jax.value_and_grad(loss))(jax.jit(model)(key), tokens)
    with jax.set_mesh(mesh()):
        split = jax.jit(model, out_shardings=where)(key)
        assert not split.head.kernel[...].sharding.is_fully_replicated
        together = jax.jit(jax.value_and_grad(loss))(split, jax.device_put(tokens, batch))
    chex.assert_trees_all_close(together, alone, rtol=1e-4, atol=1e-5)
