"""Linear attention with decay: a matrix for each head, to which each token adds the outer product of its key and value.

Angelos Katharopoulos, Apoorv Vyas, Nikolaos Pappas, François Fleuret: Transformers are RNNs, 2020, arXiv:2006.16236
(no decay); Yutao Sun and others: Retentive Network, 2023, arXiv:2307.08621 (a decay for each head); Tri Dao, Albert Gu:
Transformers are SSMs, 2024, arXiv:2405.21060 (for each head and token); Songlin Yang, Bailin Wang, Yikang Shen,
Rameswar Panda, Yoon Kim: Gated Linear Attention, 2023, arXiv:2312.06635 (for each key channel too). Letters: S memory,
g log decay; ``dx`` is the cotangent of x.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from primitives import contract
from primitives.decays import (
    FLOOR,
    chunk_decays,
    decayed_scores,
    decayed_scores_gradient,
    join_queries,
    matmul,
    transposed,
)

IMPLEMENTATIONS = ("sequential", "chunked")
BLOCK = 512  # tokens whose chunks are computed at once; changes rounding only


class LinearAttentionState(NamedTuple):
    """``Σ_i decay_i k_i v_iᵀ`` over the tokens so far. Float32 or wider."""

    memory: Float[Array, "batch state_heads key_dim value_dim"]
    segment: Int[Array, " batch"]  # the last non-negative segment id


jax.export.register_namedtuple_serialization(LinearAttentionState, serialized_name="primitives.LinearAttentionState")


def linear_attention(
    q: Float[Array, "batch time heads key_dim"],
    k: Float[Array, "batch time key_heads key_dim"],
    v: Float[Array, "batch time value_heads value_dim"],
    log_decay: Float[Array, "..."] | None = None,
    *,
    state: LinearAttentionState | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch time output_heads value_dim"], LinearAttentionState]:
    """Attention without softmax, whose past is one matrix (Transformers are RNNs, equations 16–20; GLA, equation 3).

        S_t = exp(g_t) S_{t−1} + k_t v_tᵀ
        o_t = scale · S_tᵀ q_t

    Args:
        q: Queries. Heads are shared as in grouped attention: of the numbers of heads of `q`, `k` and `v` each must
            divide the largest, and neighbouring heads share one.
        k: Keys.
        v: Values.
        log_decay: g ≤ 0 (−inf forgets everything): `None` (no decay), ``[state_heads]``, ``[batch, time, state_heads]``
            or, for a decay of each row of the memory, ``[batch, time, state_heads, key_dim]``; `state_heads` is the
            larger number of heads of `k` and `v`.
        state: What came before, or `None` for an empty memory.
        scale: Of the outputs; ``1 / √key_dim`` where `None`.
        segment_ids: Documents packed in a row; memory does not cross a change of id. Negative ids are padding, with
            zero outputs and zero gradients. `None`: the carried document goes on, no padding.
        chunk_size: Tokens that see each other through one matrix of scores in the chunked form, a power of two; by
            default 64, or 32 with a decay for each key channel. It changes rounding only.
        implementation: ``"sequential"`` (the definition, a scan over time; also forward mode), ``"chunked"`` (matmuls
            in chunks, with a reverse rule of its own that keeps inputs and a memory for each chunk), or `None`:
            chunked where the length is static. One time step is one step of the recurrence under every name.

    Returns:
        Outputs in the dtype of `v` with the largest number of heads, and the state after the last token.

    Raises:
        ValueError: Shapes that do not fit together, a length of zero, a chunk that is no power of two, an unknown
            implementation.
        TypeError: Dtypes that are not floating point (q, k, v, log_decay) or not integer (segment ids), a foreign
            state.
    """
    sizes = check_heads(q, k, v, log_decay, state, LinearAttentionState, segment_ids)
    contract.check_implementation(implementation, IMPLEMENTATIONS)
    chunk_size = check_chunk_size(chunk_size, sizes["time"], 64 if log_decay is None or log_decay.ndim < 4 else 32)
    tokens, state, segments = prepare(q, k, v, log_decay, state, LinearAttentionState, segment_ids, scale)
    chunked = functools.partial(_chunked, chunk_size)
    outputs, state = run_tokens(_step, chunked, implementation, tokens, state, segments)
    return outputs.astype(v.dtype), state


# --- What the delta rule shares -----------------------------------------------------------------------------------


def check_heads(q, k, v, log_decay, state, kind, segment_ids, **gates) -> dict[str, int]:
    """Check the arguments of a mixer with a memory for each head; gates are ``[batch, time, state_heads]``."""
    sizes = contract.check_shapes(
        q=(q, "batch time heads key_dim"),
        k=(k, "batch time key_heads key_dim"),
        v=(v, "batch time value_heads value_dim"),
    )
    most, heads = max(q.shape[2], k.shape[2], v.shape[2]), max(k.shape[2], v.shape[2])
    for name, array in (("q", q), ("k", k), ("v", v)):
        if most % array.shape[2]:
            raise ValueError(
                f"{name}: expected a number of heads that divides {most}, the largest, got {array.shape[2]}"
            )
    axes = {1: "state_heads", 3: "batch time state_heads", 4: "batch time state_heads key_dim"}
    if log_decay is not None and hasattr(log_decay, "shape") and len(log_decay.shape) not in axes:
        expected = "], [".join(axes.values())
        raise ValueError(f"log_decay: expected None or shape [{expected}], got {tuple(log_decay.shape)}")
    contract.check_shapes(
        state_heads=(jax.ShapeDtypeStruct((heads,), q.dtype), "state_heads"),
        q=(q, "batch time heads key_dim"),
        v=(v, "batch time value_heads value_dim"),
        log_decay=(log_decay, axes[len(getattr(log_decay, "shape", (0,)))]),
        segment_ids=(segment_ids, "batch time"),
        **{name: (gate, "batch time state_heads") for name, gate in gates.items()},
        **contract.check_state(state, kind, memory="batch state_heads key_dim value_dim", segment="batch"),
    )
    contract.check_floating(q=q, k=k, v=v, log_decay=log_decay, **gates)
    contract.check_segment_ids(segment_ids)
    return sizes


def check_chunk_size(chunk_size: int | None, time: Any, default: int) -> int:
    """The chunk size to use: no longer than the time needs. Raises `ValueError` for what is no power of two."""
    if chunk_size is None:
        return min(default, 1 << max(time - 1, 0).bit_length()) if isinstance(time, int) else default
    if not isinstance(chunk_size, int) or chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size: expected None or a power of two, got {chunk_size!r}")
    return chunk_size


def prepare(q, k, v, log_decay, state, kind, segment_ids, scale, *gates):
    """Tokens ``(q, k, v, g, *gates)`` in the precision of sums, with the heads of the state; the state; the segments.

    Queries are scaled and ``[batch, time, state_heads, queries, key_dim]``; g is ``[batch, time, state_heads,
    channels]``, and so are gates, with one channel. A reset is a decay of zero, and padding a token that adds nothing
    and decays nothing: no solver has to know.
    """
    heads, most = max(k.shape[2], v.shape[2]), max(q.shape[2], k.shape[2], v.shape[2])
    inputs = (q, k, v, *gates, *(() if log_decay is None else [log_decay]), *(state or ())[:1])
    dtype = contract.accumulation_dtype(*inputs)
    q, k, v = (repeat_heads(x, n).astype(dtype) for x, n in ((q, most), (k, heads), (v, heads)))
    q = (q * (q.shape[-1] ** -0.5 if scale is None else scale)).reshape(*q.shape[:2], heads, most // heads, -1)
    if state is None:
        empty = contract.empty_memory(k[:, 0, :, :, None] * v[:, 0, :, None, :])
        state = kind(empty, contract.fresh_counter(segment_ids, k.shape[0]))
    if log_decay is None:
        g = contract.fresh_like(k[..., :1], 0)
    elif log_decay.ndim == 1:
        g = log_decay[:, None].astype(dtype) + contract.fresh_like(k[..., :1], 0)
    else:
        g = log_decay.astype(dtype).reshape(*k.shape[:3], -1)
    segments = contract.segments(segment_ids, state.segment)
    gates = (gate[..., None].astype(dtype) for gate in gates)
    q, k, v, g, *gates = (contract.mask_padding(x, segments.valid) for x in (q, k, v, g, *gates))
    if segments.reset is not None:
        g = jnp.where(segments.reset[..., None, None], -jnp.inf, g)
    return (q, k, v, g, *gates), state._replace(memory=state.memory.astype(dtype)), segments


def repeat_heads(x, heads):
    """Each head as often as is needed for so many."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)


def run_tokens(step, chunked, implementation, tokens, state, segments):
    """One step, all of them in a scan, or all in chunks: outputs ``[batch, time, heads, value_dim]`` and the state."""
    time = tokens[0].shape[1]
    if time == 1:
        memory, outputs = step(state.memory, jax.tree.map(lambda x: x[:, 0], tokens))
        outputs = outputs[:, None]
    elif implementation == "chunked" and not isinstance(time, int):
        raise ValueError(f"time: expected a static length for implementation 'chunked', got {time}")
    elif implementation == "sequential" or not isinstance(time, int):
        memory, outputs = lax.scan(step, state.memory, jax.tree.map(lambda x: x.swapaxes(0, 1), tokens))
        outputs = outputs.swapaxes(0, 1)
    else:
        outputs, memory = chunked(*contract.vary_together(*tokens, state.memory))
    outputs = outputs.reshape(*outputs.shape[:2], -1, outputs.shape[-1])
    return contract.mask_padding(outputs, segments.valid), state._replace(memory=memory, segment=segments.last)


# --- The recurrence -----------------------------------------------------------------------------------------------


def _step(memory, token):
    q, k, v, g = token
    memory = jnp.exp(g)[..., None] * memory + k[..., None] * v[..., None, :]
    return memory, matmul("bhrk,bhkv->bhrv", q, memory)


# --- Chunks -------------------------------------------------------------------------------------------------------
#
# In a chunk that starts with memory S, with A_ij = q_iᵀ (decay from j to i) k_j for j ≤ i,
#
#     o_i = Σ_j A_ij v_j + (decay to i · q_i)ᵀ S
#     next S = decay through the chunk · S + Σ_j (decay from j to the end · k_j) v_jᵀ
#
# Everything but the step from S to S is done for all chunks of a block at once. The reverse rule is the same with time
# reversed; the gradient of a log decay g_t is what flows past t: that of all queries from t on less that of keys there.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(chunk, q, k, v, g, memory):
    return _chunked_forward(chunk, q, k, v, g, memory)[0]


def _chunked_forward(chunk, q, k, v, g, memory):
    def block(memory, tokens):
        q, k, v, g = (to_chunks(x, chunk) for x in tokens)
        decays = chunk_decays(g)
        added = matmul("...kc,...cv->...kv", transposed(k * decays.to_end), v)
        memory, memories = over_chunks(_pass_on, memory, (decays.total, added))
        outputs = matmul("...rij,...jv->...riv", decayed_scores(q, k, decays), v)
        outputs += matmul("...rik,...kv->...riv", q * decays.from_start[..., None, :, :], memories)
        return memory, (from_chunks(outputs), memories)

    tokens = in_blocks((q, k, v, g), chunk)
    memory, (outputs, memories) = lax.scan(block, memory, tokens)
    return (contract.unchunk_time(outputs, q.shape[1]), memory), (q, k, v, g, memories)


def _chunked_backward(chunk, residuals, cotangents):
    *tokens, memories = residuals
    do, dmemory = cotangents

    def block(dmemory, inputs):
        (*tokens, do), memories = inputs
        q, k, v, g, do = (to_chunks(x, chunk) for x in (*tokens, do))
        decays = chunk_decays(g)
        from_start, to_end = decays.from_start[..., None, :, :], decays.to_end
        scores = decayed_scores(q, k, decays)
        read = matmul("...kc,...cv->...kv", transposed(join_queries(q * from_start)), join_queries(do))
        dmemory, dmemories = over_chunks(_pass_on, dmemory, (decays.total, read), reverse=True)

        dq, dk_within = decayed_scores_gradient(matmul("...riv,...jv->...rij", do, v), q, k, decays)
        dq += from_start * matmul("...riv,...kv->...rik", do, memories)
        dk_beyond = to_end * matmul("...jv,...kv->...jk", v, dmemories)
        dv = matmul("...jc,...cv->...jv", transposed(join_queries(scores)), join_queries(do))
        dv += matmul("...jk,...kv->...jv", k * to_end, dmemories)
        past = jnp.sum(q * dq, axis=-3) - k * dk_within
        dg = decay_gradient(past, k * dk_beyond, decays.total * jnp.sum(memories * dmemories, axis=-1), g)
        return dmemory, tuple(map(from_chunks, (dq, dk_within + dk_beyond, dv, dg)))

    blocks = in_blocks((*tokens, do), chunk)
    dmemory, gradients = lax.scan(block, dmemory, (blocks, memories), reverse=True)
    return *(contract.unchunk_time(x, do.shape[1]) for x in gradients), dmemory


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _pass_on(memory, chunk):
    """From the memory before a chunk to that after it, and the former; the same, backwards, for cotangents."""
    total, added = chunk
    return total[..., None] * memory + added, memory


# From chunk to chunk of a block. Little work for each: unrolled, a quarter of the time of the whole is saved on a CPU.
over_chunks = functools.partial(lax.scan, unroll=16)


def decay_gradient(past, beyond, carried, g):
    """dg of a chunk: Σ_{i≥t} past_i + Σ_{j<t} beyond_j + carried.

    `past` are queries less keys that meet within the chunk, `beyond` keys that are read behind it, `carried` what
    passes through all of it. Nothing that passes t is counted twice and subtracted again, except within the chunk.
    Nothing passes a decay of zero: there the sums cancel, and what rounding leaves of them is dropped.
    """
    if g.shape[-1] == 1:
        past, beyond, carried = (jnp.sum(x, axis=-1, keepdims=True) for x in (past, beyond, carried))
    t, i = np.indices((g.shape[-2],) * 2)
    after, before = (jnp.asarray(x, g.dtype) for x in (i >= t, i < t))
    passing = matmul("ti,...ic->...tc", after, past) + matmul("ti,...ic->...tc", before, beyond)
    return jnp.where(g > FLOOR, passing + carried[..., None, :], 0)


def in_blocks(tokens, chunk):
    """Tokens as blocks of whole chunks, ``[blocks, batch, block, ...]``, with empty tokens at the end."""
    chunks = -(-tokens[0].shape[1] // chunk)
    blocks = -(-chunks * chunk // BLOCK)
    block = -(-chunks // blocks) * chunk
    return tuple(contract.chunk_time(contract.pad_time(x, block, 0), block) for x in tokens)


def to_chunks(x, chunk):
    """``[batch, block, *heads, dim]`` to ``[chunks, batch, *heads, chunk, dim]``."""
    x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
    return jnp.moveaxis(jnp.moveaxis(x, 2, -2), 1, 0)


def from_chunks(x):
    """The inverse of `to_chunks`."""
    x = jnp.moveaxis(jnp.moveaxis(x, 0, 1), -2, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
