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

from pallas_kernels.tpu import linear_attention as tpu_kernel
from primitives import contract, dispatch
from primitives.decays import (
    FLOOR,
    chunk_decays,
    decayed_scores,
    decayed_scores_gradient,
    join_queries,
    matmul,
    transposed,
)

IMPLEMENTATIONS = ("sequential", "chunked", "pallas")
BLOCK = 512  # tokens whose chunks are computed at once; changes rounding only
KEPT = 128  # tokens, or one chunk if that is longer, for which reverse rules keep one memory; as the kernels do


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
            in chunks), ``"pallas"`` (the TPU kernel), or `None`: what is fastest on the platform that the call is
            lowered for, see `primitives.dispatch`, and sequential where the length is symbolic. All but the first have
            a reverse rule of their own that keeps inputs and a memory for every `KEPT` tokens. One time step is one
            step of the recurrence under every name.

    Returns:
        Outputs in the dtype of `v` with the largest number of heads, and the state after the last token.

    Raises:
        ValueError: Shapes that do not fit together, a length of zero, a chunk that is no power of two, an unknown
            implementation, or ``"pallas"`` for inputs that the kernel cannot serve; the message says why.
        TypeError: Dtypes that are not floating point (q, k, v, log_decay) or not integer (segment ids), a foreign
            state.
    """
    sizes = check_heads(q, k, v, log_decay, state, LinearAttentionState, segment_ids)
    contract.check_implementation(implementation, IMPLEMENTATIONS)
    chunk_size = check_chunk_size(chunk_size, sizes["time"], 64 if log_decay is None or log_decay.ndim < 4 else 32)
    tokens, state, segments = prepare(q, k, v, log_decay, state, LinearAttentionState, segment_ids)
    options = Options(q.shape[-1] ** -0.5 if scale is None else scale, chunk_size, implementation)
    return run_tokens(_step, _scan, options, tokens, state, segments)


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


class Options(NamedTuple):
    """What is static in a call."""

    scale: float
    chunk_size: int
    implementation: str | None


def prepare(q, k, v, log_decay, state, kind, segment_ids, *gates):
    """Tokens ``(q, k, v, g, *gates)`` with the heads of the state; the state; the segments.

    Queries are ``[batch, time, state_heads, queries, key_dim]``; q, k and v keep their dtypes, in which kernels read
    them. g is ``[batch, time, state_heads, channels]``, and so are gates, with one channel, all in the precision of
    sums. A reset is a decay of zero, and padding a token that adds nothing and decays nothing: no solver has to know.
    """
    heads, most = max(k.shape[2], v.shape[2]), max(q.shape[2], k.shape[2], v.shape[2])
    inputs = (q, k, v, *gates, *(() if log_decay is None else [log_decay]), *(state or ())[:1])
    dtype = contract.accumulation_dtype(*inputs)
    q, k, v = (repeat_heads(x, n) for x, n in ((q, most), (k, heads), (v, heads)))
    q = q.reshape(*q.shape[:2], heads, most // heads, -1)
    if state is None:
        empty = contract.empty_memory(k[:, 0, :, :, None] * v[:, 0, :, None, :], dtype)
        state = kind(empty, contract.fresh_counter(segment_ids, k.shape[0]))
    if log_decay is None:
        g = contract.fresh_like(k[..., :1], 0, dtype)
    elif log_decay.ndim == 1:
        g = log_decay[:, None].astype(dtype) + contract.fresh_like(k[..., :1], 0, dtype)
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


def run_tokens(step, scan, options, tokens, state, segments):
    """One step, all of them in a scan, or all in chunks: outputs ``[batch, time, heads, value_dim]`` and the state."""
    time, dtype = tokens[0].shape[1], tokens[2].dtype
    step = functools.partial(step, options.scale)
    if time == 1:
        memory, outputs = step(state.memory, widened(jax.tree.map(lambda x: x[:, 0], tokens), state.memory))
        outputs = outputs[:, None]
    elif options.implementation == "chunked" and not isinstance(time, int):
        raise ValueError(f"time: expected a static length for implementation 'chunked', got {time}")
    elif options.implementation == "sequential" or (options.implementation is None and not isinstance(time, int)):
        tokens = widened(jax.tree.map(lambda x: x.swapaxes(0, 1), tokens), state.memory)
        memory, outputs = lax.scan(step, state.memory, tokens)
        outputs = outputs.swapaxes(0, 1)
    else:
        outputs, memory = scan(options, *contract.vary_together(*tokens, state.memory))
    outputs = outputs.reshape(*outputs.shape[:2], -1, outputs.shape[-1]).astype(dtype)
    return contract.mask_padding(outputs, segments.valid), state._replace(memory=memory, segment=segments.last)


def widened(tokens, memory):
    """Tokens in the precision of the memory."""
    return tuple(x.astype(memory.dtype) for x in tokens)


def differentiable_scan(primitive, kernel, *forms):
    """``(options, *inputs) -> (outputs, memory)`` in chunks or by the kernel, with its reverse rule."""
    pair = functools.partial(choose, primitive, kernel, forms)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def scan(options, *inputs):
        return pair(options, inputs, keep=False)[0](*inputs)[0]

    def forward(options, *inputs):
        results, memories = pair(options, inputs)[0](*inputs)
        return results, (*inputs[:-1], memories)

    def backward(options, residuals, cotangents):
        return pair(options, residuals)[1](*residuals, *cotangents)

    scan.defvjp(forward, backward)
    return scan


def choose(primitive, kernel, forms, options, tokens, keep=True):
    """The (forward, backward) pair to run; for `None` each chooses when it is lowered.

    Forward functions return outputs and memory, and the memories that backward ones need, or `None` without `keep`.

    Raises:
        ValueError: ``"pallas"`` for what the kernel refuses.
    """
    forward, backward = (functools.partial(form, options) for form in forms)
    kernels = functools.partial(kernel.forward, options.scale), functools.partial(kernel.backward, options.scale)
    if keep:
        pairs = {"pallas": tuple(map(dispatch.differentiate_as, (forward, backward), kernels))}
    else:
        pairs = {"pallas": (functools.partial(kernels[0], save=False), None)}
        forward = _without_memories(forward)
    pairs["chunked"] = forward, backward
    if options.implementation == "chunked":
        return pairs["chunked"]
    reason = refusal(kernel, options, *tokens)
    if options.implementation == "pallas":
        if reason:
            raise ValueError(f"implementation: 'pallas' cannot serve these inputs: {reason}")
        return pairs["pallas"]
    guard = {"tpu": "chunked"} if reason or is_narrow(*tokens) else {}
    return tuple(
        dispatch.by_platform(primitive, {name: pair[i] for name, pair in pairs.items()}, **guard) for i in (0, 1)
    )


def _without_memories(forward):
    return lambda *inputs: (forward(*inputs)[0], None)


def refusal(kernel, options, q, k, v, g, *_):
    """Why a kernel cannot serve these inputs, or `None`."""
    if options.chunk_size > KEPT:
        return f"its chunks have {KEPT} tokens, got chunk_size={options.chunk_size}"
    return kernel.refusal(q, k, v, g)


def is_narrow(q, k, v, *_):
    """Whether heads leave most of a TPU's lanes empty, so that XLA, which may transpose them, serves them better."""
    return bool(k.shape[-1] % 32 or v.shape[-1] % 32)


# --- The recurrence -----------------------------------------------------------------------------------------------


def _step(scale, memory, token):
    q, k, v, g = token
    memory = jnp.exp(g)[..., None] * memory + k[..., None] * v[..., None, :]
    return memory, matmul("bhrk,bhkv->bhrv", scale * q, memory)


# --- Chunks -------------------------------------------------------------------------------------------------------
#
# In a chunk that starts with memory S, with A_ij = q_iᵀ (decay from j to i) k_j for j ≤ i,
#
#     o_i = Σ_j A_ij v_j + (decay to i · q_i)ᵀ S
#     next S = decay through the chunk · S + Σ_j (decay from j to the end · k_j) v_jᵀ
#
# Everything but the step from S to S is done for all chunks of a block at once. The reverse rule is the same with time
# reversed; the gradient of a log decay g_t is what flows past t: that of all queries from t on less that of keys there.


def _chunked_forward(options, q, k, v, g, memory):
    def block(memory, tokens):
        q, k, v, g = (to_chunks(x, chunk) for x in widened(tokens, memory))
        q, decays = options.scale * q, chunk_decays(g)
        added = matmul("...kc,...cv->...kv", transposed(k * decays.to_end), v)
        memory, memories = over_chunks(_pass_on, memory, (decays.total, added))
        outputs = matmul("...rij,...jv->...riv", decayed_scores(q, k, decays), v)
        outputs += matmul("...rik,...kv->...riv", q * decays.from_start[..., None, :, :], memories)
        return memory, (from_chunks(outputs).astype(dtype), memories[:: kept // chunk])

    chunk, kept, dtype = options.chunk_size, max(options.chunk_size, KEPT), v.dtype
    memory, (outputs, memories) = lax.scan(block, memory, in_blocks((q, k, v, g), chunk))
    return (contract.unchunk_time(outputs, q.shape[1]), memory), join_kept(memories, q.shape[1], kept)


def _chunked_backward(options, q, k, v, g, memories, do, dmemory):
    def block(dmemory, inputs):
        tokens, kept = inputs
        q, k, v, g, do = (to_chunks(x, chunk) for x in widened(tokens, dmemory))
        q, decays = scale * q, chunk_decays(g)
        from_start, to_end = decays.from_start[..., None, :, :], decays.to_end
        added = matmul("...kc,...cv->...kv", transposed(k * to_end), v)
        memories = between_kept(_pass_on, kept, (decays.total, added))
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
        gradients = scale * dq, dk_within + dk_beyond, dv, dg
        return dmemory, tuple(from_chunks(x).astype(y.dtype) for x, y in zip(gradients, tokens, strict=False))

    scale, chunk = options.scale, options.chunk_size
    blocks = in_blocks((q, k, v, g, do), chunk)
    dmemory, gradients = lax.scan(block, dmemory, (blocks, split_kept(memories, len(blocks[0]))), reverse=True)
    return *(contract.unchunk_time(x, do.shape[1]) for x in gradients), dmemory


_scan = differentiable_scan("linear_attention", tpu_kernel, _chunked_forward, _chunked_backward)


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
    time = tokens[0].shape[1]
    unit = chunk if time <= KEPT else max(chunk, KEPT)
    blocks = -(-time // BLOCK)
    block = -(-time // (blocks * unit)) * unit
    return tuple(contract.chunk_time(contract.pad_time(x, block, 0), block) for x in tokens)


def join_kept(memories, time, kept):
    """Memories of blocks, ``[blocks, memories, batch, ...]``, as ``[batch, memories, ...]``, one for `kept` tokens."""
    memories = jnp.moveaxis(memories, 2, 0)
    return memories.reshape(len(memories), -1, *memories.shape[3:])[:, : -(-time // kept)]


def split_kept(memories, blocks):
    """The inverse of `join_kept`; nothing reads a memory behind the last token."""
    padding = [(0, 0), (0, -memories.shape[1] % blocks)] + [(0, 0)] * (memories.ndim - 2)
    memories = jnp.pad(memories, padding)
    return jnp.moveaxis(memories.reshape(len(memories), blocks, -1, *memories.shape[2:]), 0, 2)


def between_kept(pass_on, kept, chunks):
    """The memory before each chunk of a block, from those that were kept."""
    chunks = (x.reshape(len(kept), -1, *x.shape[1:]).swapaxes(0, 1) for x in chunks)
    _, memories = over_chunks(pass_on, kept, tuple(chunks))
    return memories.swapaxes(0, 1).reshape(-1, *kept.shape[1:])


def to_chunks(x, chunk):
    """``[batch, block, *heads, dim]`` to ``[chunks, batch, *heads, chunk, dim]``."""
    x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
    return jnp.moveaxis(jnp.moveaxis(x, 2, -2), 1, 0)


def from_chunks(x):
    """The inverse of `to_chunks`."""
    x = jnp.moveaxis(jnp.moveaxis(x, 0, 1), -2, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
