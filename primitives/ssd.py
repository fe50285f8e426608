"""State-space duality: Mamba-2's layer as linear attention with a decay for each head and token.

Tri Dao, Albert Gu: Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space
Duality, 2024, arXiv:2405.21060.
"""

from jaxtyping import Array, Float, Int

from primitives import contract
from primitives.linear_attention import LinearAttentionState, linear_attention


def ssd(
    x: Float[Array, "batch time heads dim"],
    dt: Float[Array, "batch time heads"],
    a: Float[Array, " heads"],
    b: Float[Array, "batch time groups n"],
    c: Float[Array, "batch time groups n"],
    d: Float[Array, " heads"] | None = None,
    *,
    state: LinearAttentionState | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch time heads dim"], LinearAttentionState]:
    """A state space with a scalar decay, as `linear_attention` of c (queries), b (keys) and dt x (values).

        S_t = exp(dt_t a) S_{t−1} + b_t (dt_t x_t)ᵀ
        y_t = S_tᵀ c_t + d x_t

    Args:
        x: Inputs.
        dt: Steps, > 0.
        a: Rates, < 0.
        b: How inputs enter the state; a group of neighbouring heads shares one.
        c: How outputs are read from it, likewise.
        d: What passes by, or `None`.
        state: As of `linear_attention`, and so are `segment_ids`, `chunk_size` and `implementation`.
        segment_ids: See there.
        chunk_size: See there.
        implementation: See there.

    Returns:
        Outputs in the dtype of `x`, and the state after the last token.

    Raises:
        ValueError: Shapes that do not fit together, and what `linear_attention` refuses.
        TypeError: Dtypes that are not floating point, and what `linear_attention` refuses.
    """
    contract.check_shapes(
        x=(x, "batch time heads dim"),
        dt=(dt, "batch time heads"),
        a=(a, "heads"),
        b=(b, "batch time groups n"),
        c=(c, "batch time groups n"),
        d=(d, "heads"),
        segment_ids=(segment_ids, "batch time"),
    )
    contract.check_floating(x=x, dt=dt, a=a, b=b, c=c, d=d)
    if x.shape[2] % b.shape[2]:
        raise ValueError(f"b: expected a number of groups that divides the {x.shape[2]} heads of x, got {b.shape[2]}")
    contract.check_segment_ids(segment_ids)
    valid = None if segment_ids is None else segment_ids >= 0
    x, dt = contract.mask_padding(x, valid), contract.mask_padding(dt, valid)
    dtype = contract.accumulation_dtype(x, dt, a)
    options = {"segment_ids": segment_ids, "chunk_size": chunk_size, "implementation": implementation}
    wide, dt = x.astype(dtype), dt.astype(dtype)
    y, state = linear_attention(c, b, dt[..., None] * wide, dt * a, state=state, scale=1.0, **options)
    return (y if d is None else y + d[:, None] * wide).astype(x.dtype), state
