"""Feature maps φ of linear attention, whose products φ(q)·φ(k) stand for a kernel of q and k.

They work on the last axis of arrays of any rank and keep the dtype; sums are float32 or wider. One of them has a
memory: LightNet's exponential, which is normalised over the past.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from primitives import contract


def elu_plus_one(x: Float[Array, "*shape dim"]) -> Float[Array, "*shape dim"]:
    """``elu(x) + 1``: x + 1 where x > 0, exp(x) elsewhere; positive.

    Angelos Katharopoulos, Apoorv Vyas, Nikolaos Pappas, François Fleuret: Transformers are RNNs, 2020,
    arXiv:2006.16236, equation 7. Not computed as a sum, which is zero below −17 in float32.

    Raises `TypeError` for what is no floating point array.
    """
    _check(x)
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def relu(x: Float[Array, "*shape dim"]) -> Float[Array, "*shape dim"]:
    """``max(x, 0)`` (Jungo Kasai et al.: Finetuning Pretrained Transformers into RNNs, 2021, arXiv:2103.13076, §2.2).

    All features of a token can be zero, and then a denominator made of them is.

    Raises `TypeError` for what is no floating point array.
    """
    _check(x)
    return jax.nn.relu(x)


def taylor_features(x: Float[Array, "*shape dim"]) -> Float[Array, "*shape features"]:
    """The exponential to second order: ``φ(q)·φ(k) = 1 + a + a²/2`` with a = q·k / √dim, which is at least 1/2.

        φ(x) = [1, x / dim^¼, (x_i x_j / √dim)_{i<j}, (x_i² / √(2 dim))_i]

    Simran Arora, Sabri Eyuboglu, Michael Zhang, Aman Timalsina, Silas Alberti, Dylan Zinsley, James Zou, Atri Rudra,
    Christopher Ré: Simple linear attention language models balance the recall-throughput tradeoff (Based), 2024,
    arXiv:2402.18668, §4.1. The paper keeps x_i x_j and x_j x_i; here they are one feature, so that a state has
    1 + dim + dim (dim + 1) / 2 rows, not 1 + dim + dim², and products are the same.

    Raises `ValueError` or `TypeError` for what is no floating point array with an axis of features.
    """
    _check(x)
    dim, wide = x.shape[-1], x.astype(contract.accumulation_dtype(x)) / x.shape[-1] ** 0.25
    i, j = np.triu_indices(dim)
    squares = wide[..., i] * wide[..., j] * jnp.asarray(np.where(i == j, 0.5**0.5, 1), wide.dtype)
    return jnp.concatenate([jnp.ones_like(wide[..., :1]), wide, squares], axis=-1).astype(x.dtype)


def positive_random_features(
    x: Float[Array, "*shape dim"], projection: Float[Array, "features dim"]
) -> tuple[Float[Array, "*shape features"], Float[Array, "*shape"]]:
    """Random features of the softmax kernel, ``E[φ(q)·φ(k)] = exp(q·k)``, as features and the logarithm of a scale.

        e_i = w_i·x − ‖x‖²/2,  c = max_i e_i,  φ_i(x) = exp(c) · exp(e_i − c) / √features

    Krzysztof Choromanski et al.: Rethinking Attention with Performers, 2020, arXiv:2009.14794, lemma 1 and §2.3. For
    exp(q·k / √dim) scale both by dim^−¼ first.

    Returned are exp(e_i − c) / √features and c, so that no exponent is positive and the largest feature of a token is
    1 / √features. What attention divides keeps its ratio: exp(c) of a *query* is in numerator and denominator alike and
    may be dropped. That of a *key* is the key's weight: `normalised_exponential` of ``c[..., None]`` gives the factor
    of each key and the decay that keep a recurrence within range. (The paper's code subtracts the largest exponent of
    all keys, which looks ahead.)

    Args:
        x: Queries or keys.
        projection: The vectors w_i, of standard normal distribution; see `orthogonal_projection`.

    Returns:
        Features in the dtype of `x`, and c in float32 or wider. c is a reference point, without a gradient: gradients
        are right for whatever does not depend on how exp(e) is divided among the two.

    Raises:
        ValueError: Shapes that do not fit together.
        TypeError: What is no floating point array.
    """
    contract.check_shapes(x=_named(x), projection=(projection, "features dim"))
    contract.check_floating(x=x, projection=projection)
    dtype = contract.accumulation_dtype(x, projection)
    wide = x.astype(dtype)
    products = jnp.einsum("...d,fd->...f", wide, projection.astype(dtype), precision=lax.Precision.HIGHEST)
    exponents = products - jnp.sum(jnp.square(wide), axis=-1, keepdims=True) / 2
    scale = lax.stop_gradient(jnp.max(exponents, axis=-1, keepdims=True))
    return (jnp.exp(exponents - scale) / len(projection) ** 0.5).astype(x.dtype), scale[..., 0]


def orthogonal_projection(key: PRNGKeyArray, features: int, dim: int) -> Float[Array, "features dim"]:
    """Standard normal vectors, orthogonal to each other within every `dim` of them: a smaller variance (§2.4, ibid.).

    Directions are rows of uniformly distributed orthogonal matrices, lengths those of independent normal vectors.
    Float32. Raises `ValueError` for sizes below one.
    """
    for name, size in (("features", features), ("dim", dim)):
        if size < 1:
            raise ValueError(f"{name}: expected a positive number, got {size}")
    directions, lengths = jax.random.split(key)
    blocks = jax.random.orthogonal(directions, dim, (-(-features // dim),)).reshape(-1, dim)[:features]
    return blocks * jnp.linalg.norm(jax.random.normal(lengths, (features, dim)), axis=-1, keepdims=True)


class NormaliserState(NamedTuple):
    """The logarithm of the sum of all exponentials so far; −inf where there are none. Float32 or wider."""

    log_sum: Float[Array, "batch heads key_dim"]
    segment: Int[Array, " batch"]  # the last non-negative segment id


jax.export.register_namedtuple_serialization(NormaliserState, serialized_name="primitives.NormaliserState")


def normalised_exponential(
    k: Float[Array, "batch time heads key_dim"],
    *,
    state: NormaliserState | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
) -> tuple[Float[Array, "batch time heads key_dim"], Float[Array, "batch time heads key_dim"], NormaliserState]:
    """Exponentials over their running sum, and the decay that renormalises the past: LightNet's keys.

        z_t = log Σ_{i≤t} exp(k_i)
        key_t = exp(k_t − z_t) = σ(k_t − z_{t−1})
        log_decay_t = z_{t−1} − z_t = −softplus(k_t − z_{t−1})

    so that row c of S_t = exp(log_decay_t) S_{t−1} + key_t v_tᵀ is Σ_{i≤t} softmax_{i≤t}(k_ic) v_i, one head of
    `prefix_scan_attention`. The right-hand forms are what is computed: no exponent is positive, whatever the rounding
    of z, and key_t + exp(log_decay_t) = 1.

    Zhen Qin, Yuxin Mao, Xuyang Shen, Dong Li, Jing Zhang, Yuchao Dai, Yiran Zhong: You Only Scan Once (LightNet), 2024,
    arXiv:2405.21022, §3.2.

    Before the first token of a document z is −inf and the decay would be 0. There is nothing to decay there: S starts
    at zero with z, or is reset by the same `segment_ids`. So log_decay is 0 there, and everything stays finite.

    Args:
        k: Logits of each channel. −inf gives a token no weight.
        state: The sum over what came before, or `None` for a fresh start. It goes together with the state of S.
        segment_ids: Documents packed in a row; sums do not cross a change of id. Negative ids are padding: key and
            log_decay are zero, the state passes. `None`: the carried document goes on, no padding.

    Returns:
        Keys in the dtype of `k`, log decays ≤ 0 in float32 or wider, and the state. One time step is elementwise;
        otherwise z is a `lax.associative_scan` over time. Forward mode is supported.

    Raises:
        ValueError: Shapes that do not fit together, a length of zero.
        TypeError: Dtypes that are not floating point (k) or not integer (segment ids), a foreign state.
    """
    contract.check_shapes(
        k=(k, "batch time heads key_dim"),
        segment_ids=(segment_ids, "batch time"),
        **contract.check_state(state, NormaliserState, log_sum="batch heads key_dim", segment="batch"),
    )
    contract.check_floating(k=k)
    contract.check_segment_ids(segment_ids)

    dtype = contract.accumulation_dtype(k, *(() if state is None else state[:1]))
    if state is None:
        empty = contract.fresh_like(k[:, 0], -jnp.inf, dtype)
        state = NormaliserState(empty, contract.fresh_counter(segment_ids, k.shape[0]))
    valid, reset, last = contract.segments(segment_ids, state.segment)
    logits = k.astype(dtype) if valid is None else jnp.where(valid[..., None, None], k.astype(dtype), -jnp.inf)
    before, after = _running_log_sum(logits, reset, state.log_sum.astype(dtype))

    first, weightless = before == -jnp.inf, logits == -jnp.inf
    # σ and softplus are evaluated at finite points alone: at ±inf they have values, but derivatives of NaN.
    excess = jnp.where(first | weightless, 0, logits) - jnp.where(first | weightless, 0, before)
    keys = jnp.where(weightless, 0, jnp.where(first, 1, jax.nn.sigmoid(excess)))
    log_decay = jnp.where(first | weightless, 0, -jax.nn.softplus(excess))
    return keys.astype(k.dtype), log_decay, NormaliserState(after, last)


def _running_log_sum(logits, reset, carried):
    """z_{t−1} of every token, within its document, and z after the last."""
    crossed = jnp.zeros_like(logits, bool)
    if reset is not None:
        crossed |= reset[..., None, None]

    def combine(earlier, later):
        return _log_add(jnp.where(later[1], -jnp.inf, earlier[0]), later[0]), earlier[1] | later[1]

    z, seen = lax.associative_scan(combine, (logits, crossed), axis=1)
    z, _ = combine((carried[:, None], False), (z, seen))
    before = jnp.concatenate([carried[:, None], z[:, :-1]], axis=1)
    return jnp.where(crossed, -jnp.inf, before), z[:, -1]


def _log_add(a, b):
    """log(exp(a) + exp(b)); unlike that of `jnp.logaddexp`, the derivative at (−inf, −inf) is zero, not NaN."""
    m = lax.stop_gradient(jnp.maximum(a, b))
    m = jnp.where(m == -jnp.inf, 0, m)
    total = jnp.exp(a - m) + jnp.exp(b - m)
    return jnp.where(total > 0, m + jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf)


def _named(x):
    """An array of any rank with names for its axes."""
    names = [f"axis_{i}" for i in range(len(getattr(x, "shape", ())) - 1)]
    return x, " ".join([*names, "dim"])


def _check(x):
    contract.check_shapes(x=_named(x))
    contract.check_floating(x=x)
