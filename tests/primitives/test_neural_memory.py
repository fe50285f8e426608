import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primitives import (
    NeuralMemoryState,
    delta_rule,
    huber_error,
    linear_memory,
    mlp_memory,
    neural_memory,
    power_error,
    power_norm,
    softmax_retention,
)
from primitives.testing import assert_close

residual_mlp = functools.partial(mlp_memory, activation=jax.nn.gelu, residual=True)


def example(time=11, heads=2, dim=4, hidden=5, seed=0):
    generator = np.random.default_rng(seed)
    q, k, v = generator.normal(size=(3, 2, time, heads, dim))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    gates = generator.uniform(size=(4, 2, time, heads))
    names = ("step", "decay", "momentum", "threshold")
    gates = dict(zip(names, gates * np.array([0.05, -0.3, 0.8, 2])[:, None, None, None], strict=True))
    weights = generator.normal(size=(heads, dim, hidden)) / 2, generator.normal(size=(heads, hidden, dim)) / 2
    tokens = {"q": q, "k": k, "v": v} | gates | {"decay": 1 + gates["decay"]}
    return {name: jnp.asarray(x) for name, x in tokens.items()}, jax.tree.map(jnp.asarray, weights)


# --- An independent loop: every row, head and token on its own, in the letters of the papers ------------------------


def normalised(x):
    x = x - x.mean()
    return x / jnp.sqrt(jnp.mean(x**2) + 1e-6)


def silu_mlp(w, x):
    h = w[0].T @ x
    return w[1].T @ (h / (1 + jnp.exp(-h)))


def miras_mlp(w, x):
    return x + normalised(w[1].T @ jax.nn.gelu(w[0].T @ x))


def squares(r, _):
    return r @ r


def cubes(r, _):
    return jnp.sum(r * r * r * jnp.sign(r))


def huber(r, delta):
    norm = jnp.sqrt(r @ r)
    return jnp.where(norm <= delta, norm**2, 2 * delta * norm - delta**2)


def moneta_norm(a):
    return a / jnp.sqrt(jnp.sqrt(jnp.sum(a**4))) ** 2


def memora_softmax(a):
    return 3 * jnp.exp(a) / jnp.sum(jnp.exp(a), axis=0)


MODELS = {
    "Titans": (("decay", "momentum"), silu_mlp, squares, lambda a: a, {"apply": mlp_memory}),
    "TTT": ((), miras_mlp, squares, lambda a: a, {"apply": residual_mlp}),
    "Moneta": (
        ("decay",),
        miras_mlp,
        cubes,
        moneta_norm,
        {"apply": residual_mlp, "loss": power_error(3), "retention": power_norm(4)},
    ),
    "Yaad": (
        ("decay", "threshold"),
        miras_mlp,
        huber,
        lambda a: a,
        {"apply": lambda w, x: residual_mlp(w, x), "loss": huber_error},
    ),
    "Memora": (
        ("decay", "momentum"),
        silu_mlp,
        squares,
        memora_softmax,
        {"apply": mlp_memory, "retention": softmax_retention(3.0)},
    ),
}


def loop(model, interval, read, tokens, initial):
    gates, network, bias, retention, _ = MODELS[model]

    def token(carry, x):
        a, s, begun = carry

        def loss(w):
            return bias(network(w, x["k"]) - x["v"], x["threshold"])

        gradient = jax.grad(loss)([retention(w) for w in begun])
        eta = x["momentum"] if "momentum" in gates else 0.0
        keep = x["decay"] if "decay" in gates else 1.0
        s = [eta * s - x["step"] * g for s, g in zip(s, gradient, strict=True)]
        a = [keep * a + s for a, s in zip(a, s, strict=True)]
        begun = [jnp.where(x["t"] % interval == interval - 1, a, b) for a, b in zip(a, begun, strict=True)]
        return (a, s, begun), network([retention(w) for w in (a if read == "after_token" else begun)], x["q"])

    def memory(tokens, initial):
        a = list(initial)
        (a, s, begun), outputs = jax.lax.scan(token, (a, [0 * w for w in a], a), tokens)
        return outputs, (a, s if "momentum" in gates else None, begun if interval > 1 else None)

    tokens = tokens | {"t": jnp.broadcast_to(jnp.arange(tokens["q"].shape[1])[:, None], tokens["step"].shape)}
    return jax.vmap(jax.vmap(memory, (1, 0), (1, 0)), (0, None))(tokens, initial)


def ours(model, interval, read, tokens, initial, **options):
    gates, *_, choices = MODELS[model]
    tokens = {name: x for name, x in tokens.items() if name in ("q", "k", "v", "step", *gates)}
    outputs, state = neural_memory(
        **tokens, initial_weights=initial, update_interval=interval, read=read, **choices, **options
    )
    return outputs, tuple(None if x is None else list(x) for x in state[:3])


def scalar(results):
    """Some function of everything that is not linear."""
    return sum(jnp.sum(jnp.sin((1 + i) * leaf)) for i, leaf in enumerate(jax.tree.leaves(results)))


LOOPS = [  # the recurrence and the parallel form, both ways to read, intervals longer than the row
    ("Titans", 1, "after_token"),
    ("Titans", 4, "after_token"),
    ("TTT", 4, "after_interval"),
    ("TTT", 16, "after_interval"),
    ("Moneta", 1, "after_token"),
    ("Moneta", 4, "after_interval"),
    ("Yaad", 4, "after_token"),
    ("Memora", 1, "after_token"),
    ("Memora", 4, "after_interval"),
]


@jax.enable_x64(True)
@pytest.mark.parametrize(("model", "interval", "read"), LOOPS)
def test_equals_a_loop_with_autograd(model, interval, read):
    """Outputs, final state and gradients of everything."""
    tokens, initial = example()

    def everything(form):
        results = functools.partial(form, model, interval, read)
        return jax.jit(lambda x: (results(*x), jax.grad(lambda x: scalar(results(*x)))(x)))((tokens, initial))

    _assert_near(everything(ours), everything(loop), ("results", "gradient"))


@jax.enable_x64(True)
@pytest.mark.parametrize(("model", "interval", "read"), LOOPS[1::2])
def test_second_order_equals_that_of_a_loop(model, interval, read):
    """The derivative of all gradients along a direction."""
    tokens, initial = example()
    direction = jax.tree.map(lambda x: jnp.cos(7 * x), (tokens, initial))

    def everything(form):
        gradient = jax.grad(lambda x: scalar(form(model, interval, read, *x)))
        along = jax.grad(lambda x: sum(map(jnp.vdot, *map(jax.tree.leaves, (gradient(x), direction)))))
        return (jax.jit(along)((tokens, initial)),)

    _assert_near(everything(ours), everything(loop), ("second order",))


def _assert_near(actual, expected, names):
    for what, a, b in zip(names, actual, expected, strict=True):
        unit = 0.1 * max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(b))
        assert_close(a, b, "float64", what, floor=1, unit=unit)


# --- Pieces ---------------------------------------------------------------------------------------------------------

IDS = np.array([[0] * 4 + [-1] + [1] * 6 + [2, 3, 3], [-1] + [0] * 12 + [-1]], np.int32)


@jax.enable_x64(True)
@pytest.mark.parametrize("read", ["after_token", "after_interval"])
def test_a_cut_at_every_token(read):
    tokens, initial = example(time=10)
    tokens.pop("threshold")
    options = {"apply": mlp_memory, "initial_weights": initial, "update_interval": 4, "read": read}
    piece = jax.jit(lambda tokens, state: neural_memory(**tokens, **options, state=state))
    whole = piece(tokens, None)
    for cut in range(1, 10):
        first, state = piece(jax.tree.map(lambda x: x[:, :cut], tokens), None)  # noqa: B023
        second, state = piece(jax.tree.map(lambda x: x[:, cut:], tokens), state)  # noqa: B023
        assert_close((jnp.concatenate([first, second], 1), state), whole, "float64", f"cut at {cut}")


@jax.enable_x64(True)
@pytest.mark.parametrize("read", ["after_token", "after_interval"])
def test_a_cut_at_every_token_of_packed_and_padded_rows(read):
    """What is beyond a cut is padding here, so that one program serves all cuts."""
    tokens, initial = example(time=14)
    tokens.pop("threshold")
    options = {"apply": mlp_memory, "initial_weights": initial, "update_interval": 4, "read": read}
    piece = jax.jit(lambda state, ids: neural_memory(**tokens, **options, state=state, segment_ids=ids))
    whole = piece(None, IDS)
    for cut in range(1, 14):
        before = np.arange(14) < cut
        first, state = piece(None, np.where(before, IDS, -1))
        second, state = piece(state, np.where(before, -1, IDS))
        assert_close((first + second, state), whole, "float64", f"cut at {cut}")


@jax.enable_x64(True)
def test_documents_within_a_window_are_those_alone():
    tokens, initial = example(time=14)
    tokens.pop("threshold")
    call = jax.jit(functools.partial(neural_memory, apply=mlp_memory, initial_weights=initial, update_interval=5))
    outputs, _ = call(**tokens, segment_ids=IDS)
    for row in range(2):
        for document in range(4):
            (at,) = np.nonzero(IDS[row] == document)
            if len(at):
                alone, _ = call(**{name: x[row : row + 1, at] for name, x in tokens.items()})
                assert_close(outputs[row : row + 1, at], alone, "float64", f"document {document}")


# --- What it is equal to --------------------------------------------------------------------------------------------


@jax.enable_x64(True)
def test_a_linear_memory_is_the_delta_rule_with_twice_the_step():
    tokens, _ = example(time=70)
    q, k, v, step = (tokens[name] for name in ("q", "k", "v", "step"))
    empty = jnp.zeros((2, 4, 4))
    expected, final = delta_rule(q, k, v, 2 * step, scale=1.0)
    for implementation in ("sequential", "chunked"):
        outputs, state = neural_memory(
            q, k, v, step, apply=linear_memory, initial_weights=empty, implementation=implementation
        )
        assert_close((outputs, state.weights), (expected, final.memory), "float64", implementation)


def test_only_what_is_the_delta_rule_is_computed_by_it():
    tokens, _ = example(time=70)
    tokens = {name: tokens[name] for name in ("q", "k", "v", "step")}
    one = jnp.ones_like(tokens["step"])

    def program(**options):
        call = functools.partial(neural_memory, apply=linear_memory, initial_weights=jnp.zeros((2, 4, 4)))
        return str(jax.make_jaxpr(lambda x: call(**x, **options))(tokens))

    assert "custom_vjp" in program()
    for options in ({"decay": one}, {"momentum": one}, {"loss": power_error(2)}, {"update_interval": 2}):
        assert "custom_vjp" not in program(**options), options


@jax.enable_x64(True)
def test_a_memory_without_dot_is_the_same():
    tokens, initial = example(time=30)
    results = [
        neural_memory(**tokens, apply=apply, loss=huber_error, initial_weights=initial, update_interval=8)
        for apply in (residual_mlp, lambda weights, keys: residual_mlp(weights, keys))
    ]
    assert_close(*results, "float64", "without dot")


@jax.enable_x64(True)
def test_forgetting_everything_leaves_one_step():
    tokens, initial = example()
    tokens = {name: tokens[name] for name in ("q", "k", "v", "step")}
    call = functools.partial(neural_memory, apply=linear_memory, initial_weights=initial[0][..., :4])
    _, state = call(**tokens, decay=jnp.zeros_like(tokens["step"]))
    before = call(**{name: x[:, :-1] for name, x in tokens.items()}, decay=jnp.zeros_like(tokens["step"][:, :-1]))[1]
    k, v, step = (tokens[name][:, -1] for name in ("k", "v", "step"))
    wrong = jnp.einsum("bhk,bhkv->bhv", k, before.weights) - v
    expected = -2 * step[..., None, None] * k[..., None] * wrong[..., None, :]
    assert_close(state.weights, expected, "float64", "one step")


# --- The four choices -----------------------------------------------------------------------------------------------


@jax.enable_x64(True)
def test_the_huber_error_continues_beyond_its_threshold():
    value, direction, delta = jnp.zeros(3), jnp.array([1.0, 2.0, 2.0]) / 3, jnp.array(0.7)
    below, above = ((0.7 + sign * 1e-9) * direction for sign in (-1, 1))
    for derivative in (huber_error, jax.grad(huber_error)):
        np.testing.assert_allclose(derivative(below, value, delta), derivative(above, value, delta), atol=1e-8)
    assert jnp.linalg.norm(jax.grad(huber_error)(1e6 * direction, value, delta)) == pytest.approx(1.4)
    assert np.all(np.isfinite(jax.hessian(huber_error)(value, value, delta)))


@jax.enable_x64(True)
def test_softmax_retention_is_retention_by_the_divergence():
    """W = softmax(log W' − η g) minimises η ⟨W, g⟩ + KL(W ‖ W') where columns sum to one."""
    generator = np.random.default_rng(0)
    a, g = jnp.asarray(generator.normal(size=(2, 5, 3)))
    before, after = softmax_retention()(a), softmax_retention()(a - 0.3 * g)
    slope = 0.3 * g + jnp.log(after / before)  # constant in a column at a minimum on the simplex
    np.testing.assert_allclose(after.sum(0), 1)
    np.testing.assert_allclose(slope - slope[:1], 0, atol=1e-12)


def test_power_norm_is_finite_at_zero():
    retain = power_norm(4)
    w = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_allclose(retain(w), w / np.sum(w**4) ** 0.5, rtol=1e-6)
    for scale in (0, 1e-12, 1e8):
        value, pull = jax.vjp(retain, scale * w)
        assert np.all(np.isfinite(value)) and np.all(np.isfinite(pull(w)[0]))  # noqa: PT018


def test_large_steps_stay_finite_where_gradients_are_bounded():
    tokens, initial = example(time=200)
    tokens = jax.tree.map(lambda x: x.astype(jnp.float32), tokens)
    tokens |= {"step": 0 * tokens["step"] + 100, "threshold": 0 * tokens["threshold"] + 0.1}
    for interval in (1, 16):
        call = functools.partial(
            neural_memory, apply=residual_mlp, loss=huber_error, initial_weights=initial, update_interval=interval
        )
        gradient = jax.jit(jax.value_and_grad(lambda x: jnp.sum(call(**x)[0] ** 2)))(tokens)  # noqa: B023
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))


# --- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"update_interval": 0}, ValueError, "update_interval: expected a positive number"),
        ({"update_interval": 2.0}, ValueError, "update_interval"),
        ({"read": "later"}, ValueError, "read: expected one of after_token, after_interval"),
        ({"apply": lambda w, x: x @ w[0]}, ValueError, "initial_weights: .*got .*5"),
        ({"apply": lambda w, x, dot=None: dot(dot(x, w[0]), w[0])}, ValueError, "initial_weights"),
        ({"initial_weights": ()}, ValueError, "initial_weights"),
    ],
)
def test_refusals(options, error, match):
    tokens, initial = example()
    tokens = {name: tokens[name] for name in ("q", "k", "v", "step")}
    defaults = {"apply": mlp_memory, "initial_weights": initial}
    with pytest.raises(error, match=match):
        neural_memory(**tokens, **(defaults | options))


def test_refuses_the_state_of_other_options():
    tokens, initial = example()
    tokens = {name: tokens[name] for name in ("q", "k", "v", "step")}
    call = functools.partial(neural_memory, **tokens, apply=mlp_memory, initial_weights=initial)
    _, state = call()
    assert isinstance(state, NeuralMemoryState)
    with pytest.raises(TypeError, match=r"state\.interval"):
        call(update_interval=4, state=state)
    with pytest.raises(TypeError, match=r"state\.momentum"):
        call(momentum=tokens["step"], state=state)


def test_dot_wants_each_weight_once():
    tokens, initial = example()
    tokens = {name: tokens[name] for name in ("q", "k", "v", "step")}
    square = initial[0][..., :4]

    def twice(weights, keys, dot=jnp.matmul):
        return dot(dot(keys, weights), weights)

    with pytest.raises(ValueError, match="apply: expected each weight in one product"):
        neural_memory(**tokens, apply=twice, initial_weights=square, update_interval=4)


# --- Memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", ["after_token", "after_interval"])
def test_gradients_keep_few_weights(read):
    """Forward and backward: a few weights, those between intervals, the activations of one; by the compiler."""
    width, hidden, time, interval = 128, 256, 1024, 32
    shape = jax.ShapeDtypeStruct
    tokens = [shape((1, time, 1, width), jnp.float32)] * 3 + [shape((1, time, 1), jnp.float32)] * 3
    weights = shape((1, width, hidden), jnp.float32), shape((1, hidden, width), jnp.float32)
    size = 2 * width * hidden * 4

    def temporaries(time, implementation):
        def loss(tokens, weights):
            options = {"apply": mlp_memory, "update_interval": interval, "read": read}
            return jnp.sum(
                neural_memory(*tokens, **options, initial_weights=weights, implementation=implementation)[0] ** 2
            )

        of_time = [shape((1, time, *x.shape[2:]), x.dtype) for x in tokens]
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(of_time, weights).compile()
        return compiled.memory_analysis().temp_size_in_bytes / size

    intervals = time // interval
    checkpoints = 2 * 2 * intervals**0.5  # of weights and momentum
    assert temporaries(time, "chunked") < 6 + checkpoints + 12 * time * width * 4 / size
    assert temporaries(time, "sequential") > time
