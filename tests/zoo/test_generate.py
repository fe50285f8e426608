"""Generation: greedy and sampled, any prompt, batched, within the state that it asks for."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from zoo.generate import restrict

VOCABULARY, LENGTH = 11, 6


def model_and_prompt(name="transformer_language_model", **options):
    model = zoo.create_model(name, rngs=nnx.Rngs(0), **{"vocabulary": VOCABULARY, "layers": 1} | options)
    model = jax.tree.map(lambda x: 4 * x, model)
    return model, jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (3, 7)), jnp.int32)


HYBRID = {  # each mixer twice in the repeats of a scan
    "pattern": ["window", "taylor", "rat", "conv"], "layers": 8, "scan": True,
    "heads": 2, "feature_dim": 4, "window": 4, "chunk": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"),
    [("transformer_language_model", {}), ("aaren_language_model", {}), ("based_language_model", HYBRID)],
)
def test_greedy_equals_asking_again_with_the_whole_text(name, options):
    model, prompt = model_and_prompt(name, **options)
    tokens = jax.jit(zoo.generate, static_argnames="length")(model, prompt, length=LENGTH)
    chex.assert_shape(tokens, (3, LENGTH))
    assert tokens.dtype == prompt.dtype
    text = jnp.concatenate([prompt, tokens], axis=1)
    chex.assert_trees_all_equal(tokens, jnp.argmax(model(text)[0], axis=-1)[:, 6:-1])


def test_dtypes_do_not_come_from_the_prompt():
    model, prompt = model_and_prompt(vocabulary=600)
    expected = zoo.generate(model, prompt, LENGTH)
    assert jnp.any(expected > 255)
    for dtype in (jnp.uint8, jnp.int16):
        tokens = zoo.generate(model, prompt.astype(dtype), LENGTH)
        assert tokens.dtype == jnp.int32
        chex.assert_trees_all_equal(tokens, expected)
    with pytest.raises(TypeError, match="prompt: expected an integer dtype, got float32"):
        zoo.generate(model, prompt.astype(jnp.float32), LENGTH)


def test_a_learned_table_has_an_end():
    model, prompt = model_and_prompt(position="learned", max_length=7 + LENGTH)
    text = jnp.concatenate([prompt, tokens := zoo.generate(model, prompt, LENGTH)], axis=1)
    chex.assert_trees_all_equal(tokens, jnp.argmax(model(text)[0], axis=-1)[:, 6:-1])
    with pytest.raises(ValueError, match=r"length: expected at most 13 tokens with the prompt \(max_length\), got 14"):
        zoo.generate(model, prompt, LENGTH + 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_continue_as_alone(side):
    model, prompt = model_and_prompt(position="sinusoidal")
    alone = zoo.generate(model, prompt[:1, :4], LENGTH)
    padding = jnp.full((1, 3), 5)
    parts = [(padding, -1), (prompt[:1, :4], 2)]
    rows, ids = zip(*(parts if side == "left" else parts[::-1]), strict=True)
    ids = jnp.concatenate([jnp.full_like(row, i) for row, i in zip(rows, ids, strict=True)], axis=1)
    chex.assert_trees_all_equal(zoo.generate(model, jnp.concatenate(rows, axis=1), LENGTH, segment_ids=ids), alone)


def test_samples_follow_the_distribution():
    model, prompt = model_and_prompt("aaren_language_model")
    logits = 0.5 * model(prompt[:1])[0][:, -1]
    rows = jnp.repeat(prompt[:1], 4000, axis=0)
    sample = jax.jit(lambda key: zoo.generate(model, rows, 1, key=key, temperature=2.0)[:, 0])
    first = sample(jax.random.key(0))
    frequency = jnp.bincount(first, length=VOCABULARY) / 4000
    np.testing.assert_allclose(frequency, jax.nn.softmax(logits)[0], atol=0.03)
    chex.assert_trees_all_equal(first, sample(jax.random.key(0)))
    assert jnp.any(first != sample(jax.random.key(1)))
    chex.assert_trees_all_equal(
        zoo.generate(model, prompt, LENGTH, key=jax.random.key(0), top_k=1), zoo.generate(model, prompt, LENGTH)
    )


def test_a_traced_temperature_without_a_key():
    model, prompt = model_and_prompt()
    tokens = jax.jit(lambda temperature: zoo.generate(model, prompt, LENGTH, temperature=temperature))(0.5)
    chex.assert_trees_all_equal(tokens, zoo.generate(model, prompt, LENGTH))


def test_restrict():
    logits = jnp.log(jnp.asarray([[0.4, 0.05, 0.3, 0.25], [0.1, 0.2, 0.3, 0.4]]))

    def kept(**options):
        return jnp.isfinite(restrict(logits, **options)).astype(int).tolist()

    assert kept() == [[1, 1, 1, 1]] * 2
    assert kept(top_k=2) == [[1, 0, 1, 0], [0, 0, 1, 1]]
    assert kept(top_k=9) == [[1, 1, 1, 1]] * 2
    assert kept(top_p=0.5) == [[1, 0, 1, 0], [0, 0, 1, 1]]
    assert kept(top_p=1e-6) == [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert kept(top_p=1.0) == [[1, 1, 1, 1]] * 2
    assert kept(top_k=3, top_p=0.7) == [[1, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length: expected at least 1"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_k": 0}, "top_k: expected at least 1"),
        ({"top_p": 1.5}, "top_p"),
        ({"key": None, "top_k": 3}, "key: expected one"),
        ({"segment_ids": jnp.zeros((3, 6), jnp.int32)}, "segment_ids: expected shape"),
        ({"segment_ids": jnp.asarray([[0] * 7, [-1] * 7, [0] * 7])}, "segment_ids: expected a token"),
    ],
)
def test_wrong_options(options, message):
    model, prompt = model_and_prompt()
    with pytest.raises(ValueError, match=message):
        zoo.generate(model, prompt, **{"length": 2, "key": jax.random.key(0)} | options)
