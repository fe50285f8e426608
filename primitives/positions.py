"""What tells tokens their place: rotations, learned phases, decays, biases and shifts of attention's logits.

Pure functions of positions that the caller counts, so that packed documents, caches and windows are the caller's too.
Angles and exponents are computed in float32 or wider, and results have the dtype of the inputs.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int

from primitives import contract


def angles(
    positions: Int[Array, "batch time"], dim: int, dtype: DTypeLike, base: float = 10000.0
) -> Float[Array, "batch time half"]:
    """``position / base^(2i / dim)`` for 0 ≤ i < dim / 2 (Attention Is All You Need, arXiv:1706.03762, §3.5).

    Rounded to the dtype, and so in float32 uncertain by up to 2⁻²⁴ of the position: 0.06 radians at a million.
    """
    return positions[..., None].astype(dtype) * base ** -(jnp.arange(0, dim, 2, dtype=dtype) / dim)


def rotary(
    x: Float[Array, "batch time heads dim"], positions: Int[Array, "batch time"], base: float = 10000.0
) -> Float[Array, "batch time heads dim"]:
    """Turn the pairs (x_i, x_{i + dim/2}) by ``position / base^(2i / dim)``.

    Products of rotated queries and keys depend on differences of positions alone. Jianlin Su et al.: RoFormer, 2021,
    arXiv:2104.09864, equation 34, with halves as pairs, as in GPT-NeoX and Llama; the paper pairs neighbours, which is
    the same up to a permutation of channels.

    Raises:
        ValueError: Shapes that do not fit together, an odd `dim`.
        TypeError: An `x` that is not floating point.
    """
    _check_rotation(x=x, positions=positions)
    phase = angles(positions, x.shape[-1], contract.accumulation_dtype(x), base)[:, :, None]
    return _turn(x, phase, 1).astype(x.dtype)


def xpos(
    q: Float[Array, "batch time heads dim"],
    k: Float[Array, "batch time kv_heads dim"],
    positions: Int[Array, "batch time"],
    base: float = 10000.0,
    scale_base: float = 512.0,
) -> tuple[Float[Array, "batch time heads dim"], Float[Array, "batch time kv_heads dim"]]:
    """Rotated queries and keys whose products also decay with the distance.

        q_i ζ_i^{n / scale_base},  k_i ζ_i^{−m / scale_base},  ζ_i = (2i / dim + 0.4) / 1.4

    for pair i of `rotary` at the positions n and m, so that a product has the factor ζ_i^{(n − m) / scale_base} ≤ 1
    for keys of the past. Yutao Sun et al.: A Length-Extrapolatable Transformer, 2022, arXiv:2212.10554, §2.2.

    Range: the exponents are up to ±1.2528 · |position| / scale_base, those of keys positive, so with the defaults
    float32 and bfloat16 hold the factors for |position| < 35,000, float16 for |position| < 3,900. Positions count from
    anywhere: subtract the middle of the sequence from all. A recurrence of any length gets the same, with no positive
    exponent, from `rotary` and a log decay of ``log ζ_i / scale_base`` per step and channel.

    Raises:
        ValueError: Shapes that do not fit together, an odd `dim`.
        TypeError: A `q` or `k` that is not floating point.
    """
    _check_rotation(q=q, positions=positions)
    contract.check_shapes(q=(q, "batch time heads dim"), k=(k, "batch time kv_heads dim"))
    contract.check_floating(k=k)
    dtype = contract.accumulation_dtype(q, k)
    phase = angles(positions, q.shape[-1], dtype, base)[:, :, None]
    zeta = (jnp.arange(0, q.shape[-1], 2, dtype=dtype) / q.shape[-1] + 0.4) / 1.4
    exponent = (positions[..., None].astype(dtype) / scale_base * jnp.log(zeta))[:, :, None]
    return _turn(q, phase, jnp.exp(exponent)).astype(q.dtype), _turn(k, phase, jnp.exp(-exponent)).astype(k.dtype)


def lrpe(
    x: Float[Array, "batch time heads dim"],
    positions: Int[Array, "batch time"] | Int[Array, "batch time axes"],
    theta: Float[Array, "heads angles"],
) -> Float[Array, "batch time heads twice_dim"]:
    """Linearised relative positions in the cosine form: ``[x cos φ, x sin φ]`` with φ = position · θ.

    Products of two such vectors are Σ_c q_c k_c cos((n − m) θ_c): they depend on differences alone. Zhen Qin et al.:
    Linearized Relative Positional Encoding, 2023, arXiv:2307.09270; for several axes LightNet's MD-LRPE (Zhen Qin et
    al.: You Only Scan Once, 2024, arXiv:2405.21022): the channels are divided among the axes,
    φ = [n_1 θ, n_2 θ, …], cut off at `dim`.

    Args:
        x: Queries or keys, no angle per group: for grouped heads repeat θ.
        positions: Of every token, along each axis if there are several.
        theta: Learned angles per step, ``dim`` of them, or ``⌈dim / axes⌉``.

    Raises:
        ValueError: Shapes that do not fit together.
        TypeError: An `x` or `theta` that is not floating point.
    """
    along = "batch time axes" if len(getattr(positions, "shape", ())) == 3 else "batch time"
    sizes = contract.check_shapes(
        x=(x, "batch time heads dim"), positions=(positions, along), theta=(theta, "heads angles")
    )
    contract.check_floating(x=x, theta=theta)
    if theta.shape[1] != (expected := -(-x.shape[-1] // sizes.get("axes", 1))):
        raise ValueError(f"theta: expected {expected} angles for each head, got {theta.shape[1]}")
    dtype = contract.accumulation_dtype(x, theta)
    positions = positions.reshape(*positions.shape[:2], 1, -1, 1).astype(dtype)
    phase = (positions * theta.astype(dtype)[:, None]).reshape(*x.shape[:3], -1)[..., : x.shape[-1]]
    return jnp.concatenate([x * jnp.cos(phase), x * jnp.sin(phase)], axis=-1).astype(x.dtype)


def alibi_slopes(heads: int) -> Float[Array, " heads"]:
    """Slopes 2^{−8h / heads} for h = 1 … heads, if that is a power of two.

    Otherwise those of the next smaller power p, then every other one of 2p, as in the code of the paper. Ofir Press,
    Noah A. Smith, Mike Lewis: Train Short, Test Long, 2021, arXiv:2108.12409, §3. Float32. Raises `ValueError` for
    fewer heads than one.
    """
    if heads < 1:
        raise ValueError(f"heads: expected a positive number, got {heads}")
    power = 1 << (heads.bit_length() - 1)
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-8 * np.arange(1, 2 * power, 2) / (2 * power))
    return jnp.asarray(np.concatenate([slopes, between])[:heads], jnp.float32)


def alibi_bias(
    slopes: Float[Array, " heads"],
    query_positions: Int[Array, "batch time"],
    key_positions: Int[Array, "batch keys"],
) -> Float[Array, "batch heads time keys"]:
    """``−slope_h · |n − m|``, to be added to logits; never positive (arXiv:2108.12409, §3).

    The paper is causal; the absolute value also serves attention in both directions. In the dtype of the slopes,
    float32 or wider. Raises `ValueError` for shapes that do not fit together, `TypeError` for slopes that are not
    floating point.
    """
    contract.check_shapes(
        slopes=(slopes, "heads"),
        query_positions=(query_positions, "batch time"),
        key_positions=(key_positions, "batch keys"),
    )
    contract.check_floating(slopes=slopes)
    distance = jnp.abs(query_positions[:, :, None] - key_positions[:, None, :])
    dtype = contract.accumulation_dtype(slopes)
    return -slopes.astype(dtype)[:, None, None] * distance[:, None].astype(dtype)


def relative_shift(logits: Float[Array, "*shape time time"]) -> Float[Array, "*shape time time"]:
    """Logits by distance to logits by key, without a gather: "skewing".

        shifted[i, j] = logits[i, time − 1 − i + j] for j ≤ i, else 0

    where column r of `logits`, the product of query i with an embedding, is for the distance time − 1 − r: the last
    column is for the token itself. Cheng-Zhi Anna Huang et al.: Music Transformer, 2018, arXiv:1809.04281, §3.4.1,
    which leaves the part above the diagonal, without meaning, to the mask.

    Raises:
        ValueError: Fewer than two axes, or the last two of different size.
        TypeError: What is no floating point array.
    """
    names = " ".join(f"axis_{i}" for i in range(len(getattr(logits, "shape", ())) - 2))
    contract.check_shapes(logits=(logits, f"{names} time time"))
    contract.check_floating(logits=logits)
    *shape, time, _ = logits.shape
    padded = jnp.concatenate([jnp.zeros_like(logits[..., :1]), logits], axis=-1)
    return jnp.tril(padded.reshape(*shape, time + 1, time)[..., 1:, :])


def _check_rotation(positions, **vectors):
    ((name, x),) = vectors.items()
    contract.check_shapes(**{name: (x, "batch time heads dim")}, positions=(positions, "batch time"))
    contract.check_floating(**vectors)
    if x.shape[-1] % 2:
        raise ValueError(f"{name}: expected an even dim, whose halves are pairs, got {x.shape[-1]}")


def _turn(x, phase, scale):
    cos, sin = scale * jnp.cos(phase), scale * jnp.sin(phase)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
