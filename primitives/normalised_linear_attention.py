"""Linear attention whose weights sum to one: a running sum of keys as the denominator.

Angelos Katharopoulos, Apoorv Vyas, Nikolaos Pappas, François Fleuret: Transformers are RNNs, 2020, arXiv:2006.16236;
with second-order Taylor features, Simran Arora and others: Simple Linear Attention Language Models Balance the
Recall-Throughput Tradeoff (Based), 2024, arXiv:2402.18668.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from primitives import contract
from primitives.linear_attention import LinearAttentionState, linear_attention


def normalised_linear_attention(
    q: Float[Array, "batch time heads key_dim"],
    k: Float[Array, "batch time key_heads key_dim"],
    v: Float[Array, "batch time value_heads value_dim"],
    log_decay: Float[Array, "..."] | None = None,
    *,
    epsilon: float = 1e-6,
    state: LinearAttentionState | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch time output_heads value_dim"], LinearAttentionState]:
    """Attention with weights ⟨q_t, k_i⟩ that are divided by their sum (Transformers are RNNs, equations 18–20).

        o_t = Σ_{i≤t} decay_ti ⟨q_t, k_i⟩ v_i / (ε + Σ_{i≤t} decay_ti ⟨q_t, k_i⟩)

    It is `linear_attention` of values with one number more, a one, whose output is the denominator: the last column of
    the state is the running sum of keys. The features must make ⟨q, k⟩ positive, see `primitives.feature_maps`.

    Args:
        q: Features of queries.
        k: Features of keys.
        v: Values.
        log_decay: As of `linear_attention`, and so are the other arguments.
        epsilon: Added to the denominator, > 0.
        state: See there; its memory is ``[batch, state_heads, key_dim, value_dim + 1]``.
        segment_ids: See there.
        chunk_size: See there.
        implementation: See there.

    Returns:
        Outputs in the dtype of `v`, and the state after the last token.

    Raises:
        ValueError: An epsilon that is not positive, and what `linear_attention` refuses.
        TypeError: What `linear_attention` refuses.
    """
    if epsilon <= 0:
        raise ValueError(f"epsilon: expected a positive number, got {epsilon}")
    contract.check_shapes(v=(v, "batch time value_heads value_dim"))
    contract.check_floating(q=q, k=k, v=v)
    values = v.astype(contract.accumulation_dtype(q, k, v))
    values = jnp.concatenate([values, contract.fresh_like(values[..., :1], 1)], axis=-1)
    options = {"segment_ids": segment_ids, "chunk_size": chunk_size, "implementation": implementation}
    sums, state = linear_attention(q, k, values, log_decay, state=state, scale=1.0, **options)
    return (sums[..., :-1] / (sums[..., -1:] + epsilon)).astype(v.dtype), state
