"""What `linear_recurrence` is, beside the laws of all mixers: independent oracles, broadcasting, dtypes, memory."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from primitives import dispatch, linear_recurrence
from primitives.linear_recurrence import IMPLEMENTATIONS, compose

EVERY = (None, *(name for name in IMPLEMENTATIONS if name != "pallas"))  # which tests/pallas_kernels interpret


def looped(decay, inputs):
    """The recurrence in NumPy."""
    decay, hidden, states = np.broadcast_to(decay, inputs.shape), 0, []
    for t in range(inputs.shape[1]):
        hidden = decay[:, t] * hidden + inputs[:, t]
        states.append(hidden)
    return np.stack(states, axis=1)


def random_numbers(*shape, seed=0, imaginary=False):
    generator = np.random.default_rng(seed)
    numbers = generator.uniform(0.5, 1, size=shape)
    return numbers * np.exp(1j * generator.normal(size=shape)) if imaginary else numbers


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("complex_decay", [False, True])
@pytest.mark.parametrize("complex_inputs", [False, True])
def test_equals_a_loop(implementation, complex_decay, complex_inputs):
    decay = random_numbers(2, 70, 3, imaginary=complex_decay)
    inputs = random_numbers(2, 70, 3, seed=1, imaginary=complex_inputs)
    with jax.enable_x64(True):
        outputs, state = linear_recurrence(jnp.asarray(decay), jnp.asarray(inputs), implementation=implementation)
        assert outputs.dtype == state.hidden.dtype == (decay * inputs).dtype
        chex.assert_trees_all_close(np.asarray(outputs), looped(decay, inputs), rtol=1e-12)
        chex.assert_trees_all_equal(state.hidden, outputs[:, -1])


SHAPES = ((), (3,), (70, 1, 3), (2, 1, 4, 1), (2, 70, 4, 1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decay_broadcasts(shape):
    """Values and gradients; the latter are sums over what a decay is broadcast over."""
    decay, inputs = random_numbers(*shape), random_numbers(2, 70, 4, 3, seed=1)
    cotangent = random_numbers(2, 70, 4, 3, seed=2)
    with jax.enable_x64(True):
        decay, full, inputs = jnp.asarray(decay), jnp.broadcast_to(decay, inputs.shape), jnp.asarray(inputs)
        expected, pull = jax.vjp(lambda *x: linear_recurrence(*x, implementation="sequential")[0], full, inputs)
        ddecay, dinputs = pull(jnp.asarray(cotangent))
        _, reduce = jax.vjp(lambda decay: jnp.broadcast_to(decay, inputs.shape), decay)
        for implementation in ("associative", "loop"):
            outputs, pull = jax.vjp(
                lambda *x, i=implementation: linear_recurrence(*x, implementation=i)[0], decay, inputs
            )
            expectations = expected, (*reduce(ddecay), dinputs)
            chex.assert_trees_all_close((outputs, pull(jnp.asarray(cotangent))), expectations, rtol=1e-11)


@pytest.mark.parametrize("implementation", EVERY)
def test_inputs_of_rank_two_and_four(implementation):
    for shape in ((2, 70), (2, 70, 2, 3, 2)):
        decay, inputs = random_numbers(*shape), random_numbers(*shape, seed=1)
        outputs, state = linear_recurrence(jnp.float32(decay), jnp.float32(inputs), implementation=implementation)
        chex.assert_trees_all_close(outputs, np.float32(looped(decay, inputs)), rtol=1e-5)
        assert state.hidden.shape == (shape[0], *shape[2:])


@pytest.mark.parametrize(
    ("decay", "inputs", "outputs", "hidden"),
    [
        ("bfloat16", "bfloat16", "bfloat16", "float32"),
        ("float32", "bfloat16", "bfloat16", "float32"),
        ("complex64", "bfloat16", "complex64", "complex64"),
        ("float32", "complex64", "complex64", "complex64"),
    ],
)
def test_dtypes(decay, inputs, outputs, hidden):
    for time in (1, 3):
        results, state = linear_recurrence(jnp.ones(2, decay), jnp.ones((1, time, 2), inputs))
        assert (results.dtype, state.hidden.dtype) == (outputs, hidden)


def test_is_a_filter_of_scipy():
    inputs = random_numbers(2, 200, 3)
    for decay in (0.9, 0.9 * np.exp(0.3j)):
        with jax.enable_x64(True):
            outputs, _ = linear_recurrence(jnp.asarray(decay), jnp.asarray(inputs))
        chex.assert_trees_all_close(
            np.asarray(outputs), scipy.signal.lfilter([1], [1, -decay], inputs, axis=1), rtol=1e-12
        )


def test_padding_may_hold_anything():
    """A decay of NaN at padding too: neither values nor gradients see it."""
    decay, inputs = (jnp.float32(random_numbers(1, 5, 3, seed=seed)) for seed in (0, 1))
    ids = jnp.asarray([[0, 0, -1, 0, -1]])
    tokens = ids[0] >= 0

    def loss(decay, inputs, ids=None):
        return jnp.sum(linear_recurrence(decay, inputs, segment_ids=ids)[0] ** 2)

    padded = (jnp.where(tokens[:, None], x, jnp.nan) for x in (decay, inputs))
    gradients = jax.grad(loss, (0, 1))(*padded, ids)
    expected = jax.grad(loss, (0, 1))(decay[:, tokens], inputs[:, tokens])
    for gradient, reference in zip(gradients, expected, strict=True):
        chex.assert_trees_all_close(gradient[:, tokens], reference, rtol=1e-6)
        assert not jnp.any(gradient[:, ~tokens])


def plain_associative(decay, inputs):
    return jax.lax.associative_scan(compose, (jnp.broadcast_to(decay, inputs.shape), inputs), axis=1)[1]


def backward_memory(function, decay, inputs):
    def gradients(decay, inputs, cotangent):
        return jax.vjp(function, decay, inputs)[1](cotangent)

    return jax.jit(gradients).lower(decay, inputs, inputs).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("shape", [(64,), (2, 8192, 64)])
def test_backward_keeps_the_states_and_nothing_else(shape):
    """And no copies of a decay that is constant in time; `lax.associative_scan` over all of time keeps many."""
    decay, inputs = jnp.float32(random_numbers(*shape)), jnp.float32(random_numbers(2, 8192, 64))
    memory = backward_memory(lambda *x: linear_recurrence(*x, implementation="loop")[0], decay, inputs)
    assert memory < 1.1 * inputs.nbytes
    assert memory < backward_memory(plain_associative, decay, inputs) / 3


@pytest.mark.parametrize("shape", [(3,), (2, 70, 1)])
@pytest.mark.parametrize("imaginary", [False, True])
def test_the_choice_for_accelerators_on_a_cpu(monkeypatch, shape, imaginary):
    """Their reverse rule is the associative form from the end, which no name stands for."""
    decay = jnp.asarray(random_numbers(*shape, imaginary=imaginary), jnp.result_type(1j * imaginary, jnp.float32))
    inputs = jnp.float32(random_numbers(2, 70, 3, seed=1)) * (1j if imaginary else 1)
    _, state = linear_recurrence(decay[..., :5, :] if decay.ndim == 3 else decay, inputs[:, :5])
    ids = jnp.asarray(np.repeat([[0, -1, 1], [0, 0, -1]], [30, 10, 30], axis=1))

    def gradients(implementation):
        def loss(decay, inputs, hidden):
            before = state._replace(hidden=hidden)
            results = linear_recurrence(decay, inputs, state=before, segment_ids=ids, implementation=implementation)
            return sum(jnp.sum(jnp.abs(x) ** 2) for x in (results[0], results[1].hidden))

        return jax.jit(jax.grad(loss, (0, 1, 2)))(decay, inputs, state.hidden)

    table = dispatch.read_table()["linear_recurrence"]
    monkeypatch.setattr(dispatch, "read_table", lambda: {"linear_recurrence": table | {"cpu": table["cuda"]}})
    chex.assert_trees_all_close(gradients(None), gradients("sequential"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", [None, "loop"])
def test_second_derivatives(implementation):
    decay, inputs = (jnp.float32(random_numbers(1, 6, 2, seed=seed)) for seed in (0, 1))

    def loss(decay):
        return jnp.sum(linear_recurrence(decay, inputs, implementation=implementation)[0] ** 2)

    with jax.default_matmul_precision("highest"):
        jax.test_util.check_grads(loss, (decay,), order=2, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_any_length_at_once():
    """`None` serves a symbolic length on every platform, with gradients."""
    batch, time = jax.export.symbolic_shape("batch, time")

    @jax.jit
    def gradients(decay, inputs, ids):
        return jax.grad(lambda *x: jnp.sum(linear_recurrence(*x, segment_ids=ids)[0] ** 2), (0, 1))(decay, inputs)

    types = ((3,), jnp.float32), ((batch, time, 3), jnp.float32), ((batch, time), jnp.int32)
    arguments = (jax.ShapeDtypeStruct(*of) for of in types)
    exported = jax.export.export(gradients, platforms=("cpu", "tpu", "cuda"))(*arguments)
    for length in (2, 70):
        decay, inputs = jnp.float32(random_numbers(3)), jnp.float32(random_numbers(2, length, 3, seed=1))
        ids = jnp.zeros((2, length), jnp.int32).at[:, length // 2 :].set(1)
        chex.assert_trees_all_close(exported.call(decay, inputs, ids), gradients(decay, inputs, ids), rtol=1e-4)


def test_refuses_a_complex_state_of_a_real_recurrence():
    _, state = linear_recurrence(jnp.ones(3, jnp.complex64), jnp.ones((2, 4, 3)))
    with pytest.raises(TypeError, match=r"state\.hidden"):
        linear_recurrence(jnp.ones(3), jnp.ones((2, 4, 3)), state=state)


@pytest.mark.parametrize("shape", [(4,), (2, 4), (1, 2, 4, 3), (2, 5, 3)])
def test_refuses_a_decay_that_does_not_broadcast(shape):
    with pytest.raises(ValueError, match="decay"):
        linear_recurrence(jnp.ones(shape), jnp.ones((2, 4, 3)))
