"""The delta rule: a matrix for each head, in which every token replaces what its key retrieves by its value.

Imanol Schlag, Kazuki Irie, Jürgen Schmidhuber: Linear Transformers Are Secretly Fast Weight Programmers, 2021,
arXiv:2102.11174; Songlin Yang, Bailin Wang, Yu Zhang, Yikang Shen, Yoon Kim: Parallelizing Linear Transformers with the
Delta Rule, 2024, arXiv:2406.06484; Songlin Yang, Jan Kautz, Ali Hatamizadeh: Gated Delta Networks, 2024,
arXiv:2412.06464 (a decay for each head and token); Kimi Team: Kimi Linear, 2025, arXiv:2510.26692 (for each key channel
too). Letters: S memory, g log decay, u what a token really writes; ``dx`` is the cotangent of x.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.tpu import delta_rule as tpu_kernel
from primitives import contract
from primitives.decays import (
    chunk_decays,
    decayed_scores,
    decayed_scores_gradient,
    invert_unit_triangular,
    join_queries,
    matmul,
    transposed,
)
from primitives.linear_attention import (
    KEPT,
    Options,
    between_kept,
    check_chunk_size,
    check_heads,
    decay_gradient,
    differentiable_scan,
    from_chunks,
    in_blocks,
    join_kept,
    over_chunks,
    prepare,
    run_tokens,
    split_kept,
    to_chunks,
    widened,
)

IMPLEMENTATIONS = ("sequential", "chunked", "pallas")


class DeltaRuleState(NamedTuple):
    """What the tokens so far have written. Float32 or wider."""

    memory: Float[Array, "batch state_heads key_dim value_dim"]
    segment: Int[Array, " batch"]  # the last non-negative segment id


jax.export.register_namedtuple_serialization(DeltaRuleState, serialized_name="primitives.DeltaRuleState")


def delta_rule(
    q: Float[Array, "batch time heads key_dim"],
    k: Float[Array, "batch time key_heads key_dim"],
    v: Float[Array, "batch time value_heads value_dim"],
    beta: Float[Array, "batch time state_heads"],
    log_decay: Float[Array, "..."] | None = None,
    *,
    state: DeltaRuleState | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch time output_heads value_dim"], DeltaRuleState]:
    """A memory that corrects itself (Gated Delta Networks; with a decay for each key channel, Kimi Linear).

        S_t = exp(g_t) S_{t−1} + k_t u_tᵀ,  u_t = β_t (v_t − (exp(g_t) S_{t−1})ᵀ k_t)
        o_t = scale · S_tᵀ q_t

    With β ‖k‖² between 0 and 2 no step makes the memory grow but by what it writes; keys of norm 1 and β up to 2 are
    safe for any length. Beyond, the recurrence itself diverges exponentially, in every implementation: normalise keys.

    Args:
        q: Queries. Heads are shared as in grouped attention: of the numbers of heads of `q`, `k` and `v` each must
            divide the largest, and neighbouring heads share one.
        k: Keys, of norm about 1.
        v: Values.
        beta: How much of what a key retrieves is replaced, with the larger number of heads of `k` and `v`.
        log_decay: g ≤ 0 (−inf forgets everything): `None` (no decay), ``[state_heads]``, ``[batch, time, state_heads]``
            or, for a decay of each row of the memory, ``[batch, time, state_heads, key_dim]``.
        state: What came before, or `None` for an empty memory.
        scale: Of the outputs; ``1 / √key_dim`` where `None`.
        segment_ids: Documents packed in a row; memory does not cross a change of id. Negative ids are padding, with
            zero outputs and zero gradients. `None`: the carried document goes on, no padding.
        chunk_size: Tokens whose corrections are solved for together in the chunked form, a power of two; by default 32.
            It changes rounding only.
        implementation: ``"sequential"`` (the definition, a scan over time; also forward mode), ``"chunked"`` (matmuls
            in chunks), ``"pallas"`` (the TPU kernel), or `None`: what is fastest on the platform that the call is
            lowered for, see `primitives.dispatch`, and sequential where the length is symbolic. All but the first have
            a reverse rule of their own that keeps inputs and a memory for every 128 tokens. One time step is one step
            of the recurrence under every name.

    Returns:
        Outputs in the dtype of `v` with the largest number of heads, and the state after the last token.

    Raises:
        ValueError: Shapes that do not fit together, a length of zero, a chunk that is no power of two, an unknown
            implementation, or ``"pallas"`` for inputs that the kernel cannot serve; the message says why.
        TypeError: Dtypes that are not floating point (q, k, v, beta, log_decay) or not integer (segment ids), a foreign
            state.
    """
    sizes = check_heads(q, k, v, log_decay, state, DeltaRuleState, segment_ids, beta=beta)
    contract.check_implementation(implementation, IMPLEMENTATIONS)
    chunk_size = check_chunk_size(chunk_size, sizes["time"], 32)
    tokens, state, segments = prepare(q, k, v, log_decay, state, DeltaRuleState, segment_ids, beta)
    options = Options(q.shape[-1] ** -0.5 if scale is None else scale, chunk_size, implementation)
    return run_tokens(_step, _scan, options, tokens, state, segments)


def _step(scale, memory, token):
    q, k, v, g, beta = token
    memory = jnp.exp(g)[..., None] * memory
    written = beta * (v - matmul("bhk,bhkv->bhv", k, memory))
    memory = memory + k[..., None] * written[..., None, :]
    return memory, matmul("bhrk,bhkv->bhrv", scale * q, memory)


# --- Chunks -------------------------------------------------------------------------------------------------------
#
# In a chunk that starts with memory S, what a token writes depends on what those before it wrote: with
# P_ij = k_iᵀ (decay from j to i) k_j for j < i,
#
#     u_i = β_i (v_i − (decay to i · k_i)ᵀ S − Σ_{j<i} P_ij u_j),  so  u = T β v − (T β k̃) S,  T = (1 + β P)⁻¹
#
# and the rest is linear attention with u for v. From chunk to chunk memory is multiplied by one matrix:
# next S = (decay through the chunk − k̂ᵀ T β k̃) S + k̂ᵀ T β v, k̂ the keys that have decayed to the end.


class _Terms(NamedTuple):
    """What a chunk needs in both directions."""

    scores: Array  # of queries
    overlaps: Array  # P, of keys
    solution: Array  # T
    erase: Array  # T β k̃
    write: Array  # T β v
    transition: Array  # from one memory to the next
    added: Array  # k̂ᵀ T β v


def _terms(q, k, v, beta, decays):
    scores = decayed_scores(_readers(q, k), k, decays)
    scores, overlaps = scores[..., :-1, :, :], jnp.tril(scores[..., -1, :, :], -1)
    solution = invert_unit_triangular(beta * overlaps)
    right = beta * jnp.concatenate([k * decays.from_start, v], axis=-1)
    solved = matmul("...ij,...jc->...ic", solution, right)
    passed = matmul("...kj,...jc->...kc", transposed(k * decays.to_end), solved)
    dim = k.shape[-1]
    transition = decays.total[..., None] * np.eye(dim, dtype=k.dtype) - passed[..., :dim]
    return _Terms(scores, overlaps, solution, solved[..., :dim], solved[..., dim:], transition, passed[..., dim:])


def _readers(q, k):
    """Queries, and keys as one query more: they read what keys before them wrote."""
    return jnp.concatenate([q, k[..., None, :, :]], axis=-3)


def _pass_on(memory, chunk):
    """From the memory before a chunk to that after it, and the former; the same, backwards, for cotangents."""
    transition, added = chunk
    return matmul("...kl,...lv->...kv", transition, memory) + added, memory


def _chunked_forward(options, q, k, v, g, beta, memory):
    def block(memory, tokens):
        q, k, v, g, beta = (to_chunks(x, chunk) for x in widened(tokens, memory))
        q, decays = options.scale * q, chunk_decays(g)
        terms = _terms(q, k, v, beta, decays)
        memory, memories = over_chunks(_pass_on, memory, (terms.transition, terms.added))
        written = terms.write - matmul("...ck,...kv->...cv", terms.erase, memories)
        outputs = matmul("...rij,...jv->...riv", terms.scores, written)
        outputs += matmul("...rik,...kv->...riv", q * decays.from_start[..., None, :, :], memories)
        return memory, (from_chunks(outputs).astype(dtype), memories[:: kept // chunk])

    chunk, kept, dtype = options.chunk_size, max(options.chunk_size, KEPT), v.dtype
    memory, (outputs, memories) = lax.scan(block, memory, in_blocks((q, k, v, g, beta), chunk))
    return (contract.unchunk_time(outputs, q.shape[1]), memory), join_kept(memories, q.shape[1], kept)


def _chunked_backward(options, q, k, v, g, beta, memories, do, dmemory):
    def block(dmemory, inputs):
        tokens, kept = inputs
        q, k, v, g, beta, do = (to_chunks(x, chunk) for x in widened(tokens, dmemory))
        q, decays = scale * q, chunk_decays(g)
        terms = _terms(q, k, v, beta, decays)
        memories = between_kept(_pass_on, kept, (terms.transition, terms.added))
        from_start, to_end = decays.from_start, decays.to_end
        missing = v - matmul("...ck,...kv->...cv", k * from_start, memories)
        written = terms.write - matmul("...ck,...kv->...cv", terms.erase, memories)

        dwritten = matmul("...jc,...cv->...jv", transposed(join_queries(terms.scores)), join_queries(do))
        q_start = join_queries(q * from_start[..., None, :, :])
        read = matmul("...kc,...cv->...kv", transposed(q_start), join_queries(do))
        read -= matmul("...kc,...cv->...kv", transposed(terms.erase), dwritten)
        dmemory, dmemories = over_chunks(_pass_on, dmemory, (transposed(terms.transition), read), reverse=True)

        dwritten += matmul("...ck,...kv->...cv", k * to_end, dmemories)
        dright = matmul("...ji,...iv->...jv", transposed(terms.solution), dwritten)
        dsolved = jnp.tril(-matmul("...iv,...jv->...ij", dright, written), -1)
        dscores = _readers(matmul("...riv,...jv->...rij", do, written), beta * dsolved)
        dreaders, dk_within = decayed_scores_gradient(dscores, _readers(q, k), k, decays)
        dq, dk_reads = dreaders[..., :-1, :, :], dreaders[..., -1, :, :]
        dq += from_start[..., None, :, :] * matmul("...riv,...kv->...rik", do, memories)
        dk_reads -= from_start * beta * matmul("...cv,...kv->...ck", dright, memories)
        dk_beyond = to_end * matmul("...cv,...kv->...ck", written, dmemories)

        dbeta = jnp.sum(missing * dright, axis=-1) + jnp.sum(dsolved * terms.overlaps, axis=-1)
        past = jnp.sum(q * dq, axis=-3) + k * (dk_reads - dk_within)
        dg = decay_gradient(past, k * dk_beyond, decays.total * jnp.sum(memories * dmemories, axis=-1), g)
        gradients = scale * dq, dk_reads + dk_within + dk_beyond, beta * dright, dg, dbeta[..., None]
        return dmemory, tuple(from_chunks(x).astype(y.dtype) for x, y in zip(gradients, tokens, strict=False))

    scale, chunk = options.scale, options.chunk_size
    blocks = in_blocks((q, k, v, g, beta, do), chunk)
    dmemory, gradients = lax.scan(block, dmemory, (blocks, split_kept(memories, len(blocks[0]))), reverse=True)
    return *(contract.unchunk_time(x, do.shape[1]) for x in gradients), dmemory


_scan = differentiable_scan("delta_rule", tpu_kernel, _chunked_forward, _chunked_backward)
