"""Memories that learn at test time: the state is the weights of a small network, and tokens are its training set.

Ali Behrouz, Peilin Zhong, Vahab Mirrokni: Titans: Learning to Memorize at Test Time, 2025, arXiv:2501.00663 (numbers of
equations below are this paper's); Ali Behrouz, Meisam Razaviyayn, Peilin Zhong, Vahab Mirrokni: It's All Connected,
2025, arXiv:2504.13173 (Miras: Moneta, Yaad, Memora; its equations here are from secondary notes); Yu Sun and others:
Learning to (Learn at Test Time), 2024, arXiv:2407.04620 (TTT). Miras' four choices are four values:

    ==========  ========================================  ==================  =============================  ==========
    model       memory (`apply`)                          bias (`loss`)       retention (besides `decay`)    `momentum`
    ==========  ========================================  ==================  =============================  ==========
    Titans      `mlp_memory`, SiLU                        `squared_error`     `keep`                         η
    TTT         `linear_memory`; `mlp_memory`, residual   `squared_error`     `keep`; no decay               no
    Moneta      `mlp_memory`, residual, GELU              `power_error(3)`    `power_norm(4)`                no
    Yaad        the same                                  `huber_error`, δ    `keep`                         no
    Memora      the same                                  `squared_error`     `softmax_retention`            no
    ==========  ========================================  ==================  =============================  ==========

Letters: A what gradients are added to, W the weights that keys and queries meet, S momentum.
"""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from primitives import contract
from primitives.decays import matmul
from primitives.delta_rule import DeltaRuleState, delta_rule

IMPLEMENTATIONS = ("sequential", "chunked")
READS = ("after_token", "after_interval")


class NeuralMemoryState(NamedTuple):
    """What continuing at any token needs. Trees have the structure of the initial weights, float32 or wider."""

    weights: PyTree[Float[Array, "batch heads ..."]]  # A
    momentum: PyTree[Float[Array, "batch heads ..."]] | None  # S; `None` without momentum
    interval: PyTree[Float[Array, "batch heads ..."]] | None  # A where the interval began; `None` for intervals of 1
    offset: Int[Array, " batch"]  # tokens of the interval so far
    segment: Int[Array, " batch"]  # the last non-negative segment id


jax.export.register_namedtuple_serialization(NeuralMemoryState, serialized_name="primitives.NeuralMemoryState")


# --- The four choices ---------------------------------------------------------------------------------------------


def multiply(x: Float[Array, "tokens n"], weight: Float[Array, "n m"]) -> Float[Array, "tokens m"]:
    """A product with a weight."""
    return matmul("...n,nm->...m", x, weight)


def linear_memory(weights: Float[Array, "n m"], keys: Float[Array, "tokens n"], dot: Callable = multiply) -> Array:
    """One matrix; with `squared_error`, no momentum and no decay, `neural_memory` is the delta rule with β = 2 step."""
    return dot(keys, weights)


def mlp_memory(
    weights: PyTree[Float[Array, "n m"]],
    keys: Float[Array, "tokens n"],
    dot: Callable = multiply,
    *,
    activation: Callable[[Array], Array] = jax.nn.silu,
    residual: bool = False,
) -> Float[Array, "tokens m"]:
    """Matrices, the leaves of `weights` in their order, with activations between: as deep as there are matrices.

    With `residual` it is ``keys + normalised(mlp(keys))``, as in Miras, with mean 0 and variance 1, not scaled.
    """
    *first, last = jax.tree.leaves(weights)
    x = keys
    for weight in first:
        x = activation(dot(x, weight))
    x = dot(x, last)
    return keys + jax.nn.standardize(x, epsilon=1e-6) if residual else x


def squared_error(prediction: Float[Array, " n"], value: Float[Array, " n"]) -> Float[Array, ""]:
    """‖prediction − value‖² (equation 12)."""
    return jnp.sum((prediction - value) ** 2)


def power_error(p: float) -> Callable:
    """‖prediction − value‖ₚᵖ; Moneta has p = 3. A p below 2 has no second derivative at 0, which training needs."""
    return lambda prediction, value: jnp.sum(jnp.abs(prediction - value) ** p)


def huber_error(
    prediction: Float[Array, " n"], value: Float[Array, " n"], threshold: Float[Array, ""]
) -> Float[Array, ""]:
    """r² for r = ‖prediction − value‖ up to the threshold δ, and δ (2r − δ) beyond: gradients no longer than 2δ."""
    square = jnp.sum((prediction - value) ** 2)
    beyond = square > threshold**2
    distance = jnp.sqrt(jnp.where(beyond, square, 1))
    return jnp.where(beyond, threshold * (2 * distance - threshold), square)


def keep(weights: PyTree) -> PyTree:
    """W = A: nothing but the decay forgets."""
    return weights


def power_norm(q: float) -> Callable[[PyTree], PyTree]:
    """W = A / ‖A‖_q^(q−2) for each matrix; Moneta has q = 4. Where ‖A‖_q < 1e-3 it counts as that, so 0 stays 0."""

    def retain(weight):
        power = jnp.maximum(jnp.sum(jnp.abs(weight) ** q), 1e-3**q)
        return weight * power ** ((2 - q) / q)

    return functools.partial(jax.tree.map, retain)


def softmax_retention(scale: float = 1.0) -> Callable[[PyTree], PyTree]:
    """W = scale · softmax(A) over the inputs of each output: with decay α, retention by the KL divergence (Memora).

    ``W_t = softmax(α log W_{t−1} − η ∇ℓ)`` is this, as softmax does not see what a constant adds to A. Initial weights
    are logarithms.
    """
    return functools.partial(jax.tree.map, lambda weight: scale * jax.nn.softmax(weight, axis=-2))


# --- The mixer ----------------------------------------------------------------------------------------------------


class _Rule(NamedTuple):
    """What does not depend on the tokens."""

    apply: Callable
    loss: Callable
    retention: Callable
    update_interval: int
    after_token: bool

    @property
    def low_rank(self) -> bool:
        """Whether gradients can be kept as factors: the memory multiplies by its weights with `dot`, and only so."""
        return "dot" in inspect.signature(self.apply).parameters


def neural_memory(
    q: Float[Array, "batch time query_heads key_dim"],
    k: Float[Array, "batch time heads key_dim"],
    v: Float[Array, "batch time heads value_dim"],
    step: Float[Array, "batch time heads"],
    decay: Float[Array, "batch time heads"] | None = None,
    momentum: Float[Array, "batch time heads"] | None = None,
    threshold: Float[Array, "batch time heads"] | None = None,
    *,
    apply: Callable[..., Array],
    initial_weights: PyTree[Float[Array, "heads ..."]],
    loss: Callable[..., Array] = squared_error,
    retention: Callable[[PyTree], PyTree] = keep,
    update_interval: int = 1,
    read: str = "after_token",
    state: NeuralMemoryState | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch time query_heads value_dim"], NeuralMemoryState]:
    """A network for each row and head that is trained on pairs of keys and values, a token at a time.

        S_t = momentum_t S_{t−1} − step_t ∇ℓ(W_{t'}; k_t, v_t)      (equation 14)
        A_t = decay_t A_{t−1} + S_t,  W_t = retention(A_t)          (equation 13; decay = 1 − α)
        o_t = apply(W_t, q_t)                                       (equation 15)

    W_{t'} are the weights at the beginning of the update interval that t is in: for intervals of 1, the recurrence of
    the papers, those of the token before; for longer ones their parallel form (equations 16–18). Intervals are counted
    from the beginning of a document.

    A step above the reciprocal of the curvature, as 1 / ‖k‖² for `linear_memory`, makes the recurrence itself diverge,
    in every implementation: normalise keys, or bound gradients with `huber_error`. Sums of an interval's gradients are
    steps of as many tokens.

    Coefficients are those of tokens. Where an interval has one, its tokens share it; a decay of the interval is its
    first token's, with 1 for the others.

    Args:
        q: Queries, of a multiple of the heads of `k`; neighbouring ones read the same memory.
        k: Keys.
        v: Values.
        step: θ, the size of a step.
        decay: 1 − α, between 0 (forgets everything) and 1; `None` for 1.
        momentum: η, how much of the last update goes on, or `None` for plain gradient descent, without that state.
        threshold: A third argument to the loss, or `None`.
        apply: The memory: a pure function ``apply(weights, keys)`` of weights of one head and of keys
            ``[tokens, key_dim]`` to predictions ``[tokens, value_dim]``, token by token. One with a third argument,
            ``apply(weights, keys, dot)``, promises to use each weight, a matrix, once, as ``dot(x, weight)``: its
            gradients are outer products, which is what lets an interval be read after every token without weights for
            every token. `linear_memory` and `mlp_memory` are such.
        initial_weights: A tree of arrays ``[heads, ...]``, A before the first token of every document.
        loss: The attentional bias: ``loss(prediction, value)`` or ``loss(prediction, value, threshold)`` of one token.
        retention: From A to W, of one head.
        update_interval: Tokens whose gradients are taken at the same weights. It changes what is computed.
        read: ``"after_token"``: a query meets the weights after its own token. ``"after_interval"``: those after the
            last interval that is complete, with its own token.
        state: What came before, or `None`.
        segment_ids: Documents packed in a row; each starts with the initial weights and an interval. Negative ids are
            padding, with zero outputs and zero gradients. `None`: the carried document goes on, no padding.
        implementation: ``"sequential"`` (the definition, a scan over time that for gradients keeps weights for every
            token), ``"chunked"`` (intervals in matmuls, of which gradients keep no more than about 2 √intervals weights
            and compute the rest again; token by token, with the same memory, where an interval that is read after every
            token has a memory without `dot` or a retention other than `keep`; the delta rule where it is that), or
            `None`: chunked where the length is static. One time step is one step of the recurrence under every name.

    Returns:
        Outputs in the dtype of `v`, and the state after the last token.

    Raises:
        ValueError: Shapes that do not fit together or that the memory refuses, a length of zero, an interval that is
            not a positive number, an unknown read-out or implementation.
        TypeError: Dtypes that are not floating point or, of segment ids, not integer; a foreign state.
    """
    rule = _Rule(apply, loss, retention, update_interval, read == "after_token" or update_interval == 1)
    arrays = {"q": q, "k": k, "v": v, "step": step, "decay": decay, "momentum": momentum, "threshold": threshold}
    _check(arrays, initial_weights, state, segment_ids, rule, read, implementation)
    floating = [x for x in jax.tree.leaves((arrays, initial_weights, state)) if jnp.issubdtype(x.dtype, jnp.floating)]
    dtype = contract.accumulation_dtype(*floating)
    initial = jax.tree.map(lambda x: x.astype(dtype), initial_weights)
    fresh = state is None and segment_ids is None
    state = _fresh_state(k, momentum, initial, segment_ids, rule, dtype) if state is None else _widen(state, dtype)

    segments = contract.segments(segment_ids, state.segment)
    arrays["q"] = q.reshape(*k.shape[:3], -1, k.shape[-1])
    tokens = _Tokens(
        **{
            name: None if x is None else contract.mask_padding(x.astype(dtype), segments.valid)
            for name, x in arrays.items()
        }
    )
    run = functools.partial(_run, rule, implementation, fresh)
    outputs, state = run(tokens, initial, state, segments, segment_ids)
    outputs = contract.mask_padding(outputs.reshape(*q.shape[:3], -1), segments.valid)
    return outputs.astype(v.dtype), state


class _Tokens(NamedTuple):
    """Of all tokens, of an interval or of one; without batch and heads where one memory is meant."""

    q: Float[Array, "batch time heads queries key_dim"]
    k: Float[Array, "batch time heads key_dim"]
    v: Float[Array, "batch time heads value_dim"]
    step: Float[Array, "batch time heads"]
    decay: Float[Array, "batch time heads"] | None
    momentum: Float[Array, "batch time heads"] | None
    threshold: Float[Array, "batch time heads"] | None


class _Places(NamedTuple):
    """What tokens are to documents and intervals; the first two are `None` where all tokens are of one document."""

    valid: Bool[Array, "batch time"] | None
    reset: Bool[Array, "batch time"] | None
    completes: Bool[Array, "batch time"]  # an interval


class _Carry(NamedTuple):
    """The trees of the state; `interval` is `None` where it is the weights."""

    weights: PyTree
    momentum: PyTree | None
    interval: PyTree | None


def _check(arrays, initial_weights, state, segment_ids, rule, read, implementation):
    gates = {name: (arrays[name], "batch time heads") for name in ("step", "decay", "momentum", "threshold")}
    trees = ("weights", "momentum", "interval")
    sizes = contract.check_shapes(
        k=(arrays["k"], "batch time heads key_dim"),
        q=(arrays["q"], "batch time query_heads key_dim"),
        v=(arrays["v"], "batch time heads value_dim"),
        **gates,
        segment_ids=(segment_ids, "batch time"),
        **contract.check_state(state, NeuralMemoryState, offset="batch", segment="batch"),
    )
    if sizes["query_heads"] % sizes["heads"]:
        raise ValueError(f"q: expected a multiple of the {sizes['heads']} heads of k, got {sizes['query_heads']}")
    contract.check_floating(**arrays)
    contract.check_segment_ids(segment_ids)
    contract.check_implementation(implementation, IMPLEMENTATIONS)
    if read not in READS:
        raise ValueError(f"read: expected one of {', '.join(READS)}, got {read!r}")
    if not isinstance(rule.update_interval, int) or rule.update_interval < 1:
        raise ValueError(f"update_interval: expected a positive number of tokens, got {rule.update_interval!r}")
    _check_tree("initial_weights", initial_weights, lambda x: (sizes["heads"], *x.shape[1:]), initial_weights)
    _check_memory(rule, arrays, initial_weights)
    absent = {"momentum": arrays["momentum"] is None, "interval": rule.update_interval == 1}
    for name in trees if state is not None else ():
        expected = None if absent.get(name) else initial_weights
        _check_tree(f"state.{name}", getattr(state, name), lambda x: (sizes["batch"], *x.shape), expected)


def _check_tree(name, tree, shape, like):
    """Check the structure, the shapes and the dtypes of weights."""
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise TypeError(f"{name}: expected {jax.tree.structure(like)}, got {jax.tree.structure(tree)}")
    for (path, leaf), expected in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(like), strict=True):
        where = name + jax.tree_util.keystr(path)
        if not hasattr(leaf, "shape"):
            raise TypeError(f"{where}: expected an array, got {type(leaf).__name__}")
        if leaf.shape != shape(expected):
            raise ValueError(f"{where}: expected shape {shape(expected)}, got {leaf.shape}")
        contract.check_floating(**{where: leaf})


def _check_memory(rule, arrays, initial_weights):
    """Whether the memory takes such weights and keys, and gives predictions for values."""
    k, v = arrays["k"], arrays["v"]
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), initial_weights)
    paths = jax.tree.leaves_with_path(initial_weights)
    given = ", ".join(f"{jax.tree_util.keystr(path)} {leaf.shape}" for path, leaf in paths)
    expected = f"expected weights {given} of heads with which apply maps keys [3, {k.shape[-1]}] to [3, {v.shape[-1]}]"
    try:
        predictions = jax.eval_shape(rule.apply, weights, jax.ShapeDtypeStruct((3, k.shape[-1]), k.dtype))
    except (TypeError, ValueError) as error:
        raise ValueError(f"initial_weights: {expected}, got {error}") from error
    if predictions.shape != (3, v.shape[-1]):
        raise ValueError(f"initial_weights: {expected}, got {predictions.shape}")


def _fresh_state(k, momentum, initial, segment_ids, rule, dtype):
    empty = contract.empty_memory(k[:, 0, :, 0], dtype)
    weights = jax.tree.map(lambda x: x + empty.reshape(*empty.shape, *(1,) * (x.ndim - 1)), initial)
    return NeuralMemoryState(
        weights,
        None if momentum is None else jax.tree.map(contract.empty_memory, weights),
        None if rule.update_interval == 1 else weights,
        contract.fresh_counter(segment_ids, k.shape[0]),
        contract.fresh_counter(segment_ids, k.shape[0]),
    )


def _widen(state, dtype):
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)


def _run(rule, implementation, fresh, tokens, initial, state, segments, segment_ids):
    """All tokens in the form that fits: outputs ``[batch, time, heads, queries, value_dim]`` and the state."""
    time, interval = tokens.k.shape[1], rule.update_interval
    number, first = contract.count_tokens(segments, state.offset, contract.fresh_like(state.offset, 0), time)
    position = (number - first) % interval
    places = _Places(segments.valid, segments.reset, position == interval - 1)
    carry = _Carry(*state[:3])
    step = functools.partial(_step, rule, initial)
    if time == 1:
        carry, outputs = step(carry, jax.tree.map(lambda x: x[:, 0], (tokens, places)))
        outputs = outputs[:, None]
    elif implementation == "chunked" and not isinstance(time, int):
        raise ValueError(f"time: expected a static length for implementation 'chunked', got {time}")
    elif implementation == "sequential" or not isinstance(time, int):
        carry, outputs = lax.scan(step, carry, jax.tree.map(lambda x: x.swapaxes(0, 1), (tokens, places)))
        outputs = outputs.swapaxes(0, 1)
    elif _is_delta_rule(rule, tokens):
        carry, outputs = _delta_rule(tokens, initial, state, segment_ids)
    elif interval == 1 or (rule.after_token and not (rule.low_rank and rule.retention is keep)):
        tokens_first = jax.tree.map(lambda x: x.swapaxes(0, 1), (tokens, places))
        carry, outputs = _recomputed_scan(step, carry, tokens_first)
        outputs = outputs.swapaxes(0, 1)
    elif fresh:
        carry, outputs = _aligned(rule, carry, tokens, places)
    else:
        carry, outputs = _ragged(rule, initial, carry, tokens, places)
    offset = (number[:, -1] - first[:, -1] + 1) % interval
    return outputs, NeuralMemoryState(*carry, offset, segments.last)


# --- The recurrence -----------------------------------------------------------------------------------------------


def _step(rule, initial, carry, token):
    """One token of every row and head."""
    memories = jax.vmap(functools.partial(_token, rule), in_axes=(0, 0, 0, None))
    return jax.vmap(memories, in_axes=(0, None, 0, 0))(carry, initial, *token)


def _token(rule, carry, initial, token, place):
    """The equations, for one memory."""
    before = carry
    if place.reset is not None:
        carry = _Carry(
            *(_select(place.reset, new, old) for new, old in zip(_start(carry, initial), carry, strict=True))
        )
    weights, momentum, interval = carry
    at = rule.retention(weights if interval is None else interval)
    gradient = jax.grad(lambda weights: _total_loss(rule, rule.apply(weights, token.k[None]), token, single=True))(at)
    update = jax.tree.map(lambda g: -token.step * g, gradient)
    if momentum is not None:
        momentum = update = jax.tree.map(lambda s, u: token.momentum * s + u, momentum, update)
    weights = jax.tree.map(lambda a, s: (a if token.decay is None else token.decay * a) + s, weights, update)
    interval = None if interval is None else _select(place.completes, weights, interval)
    outputs = rule.apply(rule.retention(weights if rule.after_token else interval), token.q)
    carry = _Carry(weights, momentum, interval)
    return carry if place.valid is None else _select(place.valid, carry, before), outputs


def _start(carry, initial):
    """The carry before a document."""
    zero = None if carry.momentum is None else jax.tree.map(jnp.zeros_like, carry.momentum)
    return _Carry(initial, zero, None if carry.interval is None else initial)


def _select(condition, new, old):
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


def _total_loss(rule, predictions, tokens, single=False):
    values = [x if not single else x[None] for x in (tokens.v, tokens.threshold) if x is not None]
    return jnp.sum(jax.vmap(rule.loss)(predictions, *values))


def _is_delta_rule(rule, tokens):
    simple = rule.apply is linear_memory and rule.loss is squared_error and rule.retention is keep
    return simple and rule.update_interval == 1 and tokens.momentum is None and tokens.decay is None


def _delta_rule(tokens, initial, state, segment_ids):
    """What the matrix differs from the initial one by follows the delta rule, for values less those predicted first."""
    q = tokens.q.reshape(*tokens.q.shape[:2], -1, tokens.q.shape[-1])
    missing = tokens.v - matmul("bthk,hkv->bthv", tokens.k, initial)
    written = DeltaRuleState(state.weights - initial, state.segment)
    outputs, written = delta_rule(
        q, tokens.k, missing, 2 * tokens.step, state=written, scale=1.0, segment_ids=segment_ids
    )
    outputs = outputs.reshape(*tokens.q.shape[:-1], -1) + matmul("bthrk,hkv->bthrv", tokens.q, initial)
    weights = written.memory + initial
    if segment_ids is not None:  # padding passes the weights as they are, not rounded
        weights = jnp.where(jnp.any(segment_ids >= 0, axis=1)[:, None, None, None], weights, state.weights)
    return _Carry(weights, None, None), outputs


def _recomputed_scan(body, carry, xs):
    """A `lax.scan` of which gradients keep about 2 √count carries: those between groups, and those within one."""
    count = jax.tree.leaves(xs)[0].shape[0]
    size = min(range(1, count + 1), key=lambda size: (size + -(-count // size) + (count % size > 0), size))
    whole = count - count % size
    body = jax.checkpoint(body, prevent_cse=False)
    group = jax.checkpoint(functools.partial(lax.scan, body), prevent_cse=False)
    groups = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), xs)
    carry, ys = lax.scan(group, carry, groups)
    ys = ys.reshape(-1, *ys.shape[2:])
    if whole < count:
        carry, rest = group(carry, jax.tree.map(lambda x: x[whole:], xs))
        ys = jnp.concatenate([ys, rest])
    return carry, ys


# --- Intervals ----------------------------------------------------------------------------------------------------
#
# A stretch is a run of tokens whose gradients g_i are taken at the same weights. What follows is linear in them: with
# κ_ti = momentum_{i+1} … momentum_t and δ_ti = decay_{i+1} … decay_t for i ≤ t,
#
#     S_t = κ_t0 S_0 − Σ_i κ_ti step_i g_i
#     A_t = δ_t0 A_0 + Σ_j δ_tj κ_j0 S_0 − Σ_i (Σ_j δ_tj κ_ji) step_i g_i
#
# All products are formed by multiplication, so nothing is divided by one that vanished. The sum over tokens is one
# gradient, of a weighted loss. For a memory with `dot`, g_i = x_i e_iᵀ with the inputs x of a weight and the errors e
# behind it, and then x A_t needs no A_t: it is δ_t0 x A_0 + … − Σ_i (…) step_i (x · x_i) e_i.


class _Influence(NamedTuple):
    """On A after each token of a stretch, and on S after the last."""

    weights: Float[Array, " time"]  # of A_0
    momentum: Float[Array, " time"] | None  # of S_0
    gradients: Float[Array, "time time"]
    momentum_on_last: Float[Array, ""] | None
    gradients_on_last: Float[Array, " time"] | None


def _influence(tokens, places):
    """Tokens that are not valid pass everything on; where documents begin, A_0 is put in and what was before is not."""
    ones = jnp.ones_like(tokens.step)
    valid, reset, _ = places
    step, write, decay, momentum = (
        ones if x is None else x if valid is None else jnp.where(valid, x, other)
        for x, other in ((tokens.step, 0), (ones, 0), (tokens.decay, 1), (tokens.momentum, 1))
    )
    decays = _products(decay, reset)
    weights = decays[:, 0] if reset is None else decays[:, 0] + matmul("ti,i->t", decays[:, 1:], reset * decay)
    decays = decays[:, 1:] * write
    if tokens.momentum is None:
        return _Influence(weights, None, -decays * step, None, None)
    products = _products(momentum, reset)
    on_weights = matmul("tj,ji->ti", decays, products)
    gradients, last = -on_weights[:, 1:] * step, -products[-1, 1:] * step
    return _Influence(weights, on_weights[:, 0], gradients, products[-1, 0], last)


def _products(factors, reset):
    """``[time, 1 + time]``: the products from the start and from after each token through each, zero before a reset."""
    time = factors.shape[0]
    factors = factors if reset is None else jnp.where(reset, 0, factors)
    t, i = jnp.arange(time)[:, None], jnp.arange(time + 1)
    return jnp.where(t >= i - 1, jnp.cumprod(jnp.where(t >= i, factors[:, None], 1), axis=0), 0)


class _Handle:
    """A weight that only `dot` can use."""

    def __init__(self, index):
        self.index = index


class _Factors(NamedTuple):
    """Gradients of tokens as outer products, for each weight."""

    inputs: list[Float[Array, "time n"]]
    errors: list[Float[Array, "time m"]]


def _factors(rule, weights, tokens):
    leaves, tree = jax.tree.flatten(weights)

    def loss(probes):
        inputs = [None] * len(leaves)

        def dot(x, weight):
            if inputs[weight.index] is not None:
                raise ValueError("apply: expected each weight in one product, got two")
            inputs[weight.index] = x
            return multiply(x, leaves[weight.index]) + probes[weight.index]

        predictions = rule.apply(tree.unflatten(map(_Handle, range(len(leaves)))), tokens.k, dot=dot)
        return _total_loss(rule, predictions, tokens), inputs

    probes = [contract.fresh_like(multiply(contract.fresh_like(tokens.k[:, :1], 0), leaf[:1]), 0) for leaf in leaves]
    errors, inputs = jax.grad(loss, has_aux=True)(probes)
    return _Factors(inputs, errors)


def _gradients(rule, weights, tokens):
    """A function from coefficients of tokens to the sum of their gradients, and these as factors where they are."""
    if rule.low_rank:
        factors, tree = _factors(rule, weights, tokens), jax.tree.structure(weights)
        return lambda c: tree.unflatten(multiply(x.T, c[:, None] * e) for x, e in zip(*factors, strict=True)), factors
    predictions, pull = jax.vjp(lambda weights: rule.apply(weights, tokens.k), weights)
    errors = jax.grad(lambda predictions: _total_loss(rule, predictions, tokens))(predictions)
    return lambda c: pull(c[:, None] * errors)[0], None


def _stretch(rule, carry, initial, tokens, places):
    """The tokens of a stretch, for one memory; documents begin in it where there are initial weights."""
    weights, momentum, interval = carry
    begun = weights if interval is None else interval
    if initial is not None:
        weights, begun = (_select(jnp.any(places.reset), initial, tree) for tree in (weights, begun))
    total, factors = _gradients(rule, rule.retention(begun), tokens)
    influence = _influence(tokens, places)
    after = jax.tree.map(lambda a, g: influence.weights[-1] * a + g, weights, total(influence.gradients[-1]))
    speed = None
    if momentum is not None:
        after = jax.tree.map(lambda a, s: a + influence.momentum[-1] * s, after, momentum)
        speed = total(influence.gradients_on_last)
        speed = jax.tree.map(lambda s, g: influence.momentum_on_last * s + g, momentum, speed)
    if rule.after_token:
        outputs = _read_tokens(rule, weights, momentum, factors, influence, tokens.q)
    else:
        outputs = _read_interval(rule, begun, after, places.completes, tokens.q)
    interval = None if interval is None else _select(jnp.any(places.completes), after, begun)
    return _Carry(after, speed, interval), outputs


def _read_tokens(rule, weights, momentum, factors, influence, q):
    """``apply(W_t, q_t)`` from the factors, without W_t."""
    leaves, tree = jax.tree.flatten(weights)
    speeds, queries = jax.tree.leaves(momentum), q.shape[1]
    on_weights, on_momentum, on_gradients = (
        None if x is None else jnp.repeat(x, queries, axis=0).reshape(q.shape[0] * queries, -1) for x in influence[:3]
    )

    def dot(x, weight):
        i = weight.index
        scores = on_gradients * multiply(x, factors.inputs[i].T)
        y = on_weights * multiply(x, leaves[i]) + multiply(scores, factors.errors[i])
        return y + on_momentum * multiply(x, speeds[i]) if speeds else y

    handles = tree.unflatten(map(_Handle, range(len(leaves))))
    return rule.apply(handles, q.reshape(-1, q.shape[-1]), dot=dot).reshape(*q.shape[:2], -1)


def _read_interval(rule, begun, after, completes, q):
    """Reads the weights before the interval; the token that completes it, those after."""
    outputs = rule.apply(rule.retention(begun), q.reshape(-1, q.shape[-1])).reshape(*q.shape[:2], -1)
    last = lax.dynamic_index_in_dim(q, jnp.argmax(completes), keepdims=False)
    return jnp.where(completes[:, None, None], rule.apply(rule.retention(after), last), outputs)


def _over_memories(rule):
    stretch = jax.vmap(functools.partial(_stretch, rule), in_axes=(0, 0, 1, None), out_axes=(0, 1))
    return jax.vmap(stretch, in_axes=(0, None, 0, 0))


def _aligned(rule, carry, tokens, places):
    """Interval after interval, from the beginning of one; the weights at its beginning are those carried."""
    interval, time = rule.update_interval, tokens.k.shape[1]
    whole, rows = time - time % interval, (tokens, places)
    carry, outputs = carry._replace(interval=None), []

    def window(carry, rows):
        return _over_memories(rule)(carry, None, *rows)

    if whole:
        chunks = jax.tree.map(lambda x: contract.chunk_time(x[:, :whole], interval), rows)
        carry, windows = _recomputed_scan(window, carry, chunks)
        outputs.append(contract.unchunk_time(windows, whole))
    begun = carry.weights
    if whole < time:
        carry, rest = jax.checkpoint(window)(carry, jax.tree.map(lambda x: x[:, whole:], rows))
        outputs.append(rest)
    return carry._replace(interval=begun), jnp.concatenate(outputs, axis=1)


# Where rows differ in where their intervals begin, time is cut into windows as long as an interval. In a window there
# are up to three stretches: tokens that complete an interval, those after them, and those from the first beginning of a
# document on, all of which see the initial weights.


def _ragged(rule, initial, carry, tokens, places):
    size, time = min(rule.update_interval, tokens.k.shape[1]), tokens.k.shape[1]
    documents = places.valid is not None
    valid = places.valid if documents else contract.fresh_like(tokens.k[:, :, 0, 0], 1, bool)
    rows = tokens, places._replace(valid=valid, completes=places.completes & valid)
    chunks = jax.tree.map(lambda x: contract.chunk_time(contract.pad_time(x, size, 0), size), rows)
    window = functools.partial(_window, rule, initial if documents else None)
    carry, outputs = _recomputed_scan(window, carry, chunks)
    return carry, contract.unchunk_time(outputs, time)


def _window(rule, initial, carry, rows):
    tokens, (valid, reset, completes) = rows
    number = jnp.cumsum(completes, axis=1) - completes > 0
    if reset is not None:
        number = jnp.where(jnp.cumsum(reset, axis=1) > 0, 2, number)
    outputs = contract.fresh_like(tokens.q[..., :1] * tokens.v[..., None, :], 0)
    for i in range(2 if reset is None else 3):
        inside = valid & (number == i)
        places = _Places(inside, reset if i == 2 else None, completes & inside)
        arguments = initial if i == 2 else None, tokens, places

        def run(carry, arguments=arguments):
            carry, outputs = _over_memories(rule)(carry, *arguments)
            return carry, contract.mask_padding(outputs, arguments[-1].valid)

        def skip(carry, outputs=outputs):
            return carry, contract.fresh_like(outputs, 0)

        carry, more = lax.cond(jnp.any(inside), run, skip, carry)
        outputs += more
    return carry, outputs
