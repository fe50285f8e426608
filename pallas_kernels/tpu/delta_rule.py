"""The delta rule, forward and its reverse rule, each in one pass over queries, keys and values.

Equations and letters are those of `primitives.delta_rule`, whose ``_chunked_forward`` and ``_chunked_backward`` compute
the same, in chunks of 128 tokens. What the tokens of a chunk write is ``u = T β (v − k̃ S)`` with T = (1 + β P)⁻¹. As
the chunks come in order, T meets one right-hand side, and the matrices that XLA's form needs to pass a memory on to
many chunks at once (T β k̃, and from memory to memory) are not there. The memory, scores, decays, T and u stay in VMEM;
for the reverse rule the memory before each chunk is written, once, and the rest is computed again.

The chain of products that makes T is long. So the functions of one head run for several side by side, by `jax.vmap`:
the compiler mixes their instructions, but not those of heads that come one after another.

Rounding, for bfloat16 inputs: what is written to the memory is computed in float32, six passes of the matrix unit or
three beside a key as it came in, because where keys are alike they find nearly all of their values, and nothing
corrects later what is left. Outputs and gradients are held to the rounding of the inputs: three passes.

Roofline for a token and a head of 128, bfloat16, forward and backward: 1.5 and 2.6 KB with a scalar decay, 2.0 and 3.6
with channels, of which 512 bytes are the memories: at 819 GB/s (v5e) 1.9 and 3.1 ns or 2.5 and 4.4, at 1640 (v6e) half.
Products in a chunk bind: ../README.md has the bundles and how busy they keep the matrix unit.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.tpu.common import (
    LANES,
    ChunkGrid,
    dot,
    enough_for,
    group_heads,
    head_block,
    load_heads,
    memory_refusal,
    memory_sizes,
    per_device,
    side_by_side,
    stack_heads,
    store_heads,
    vmap_into_batch,
)
from pallas_kernels.tpu.decays import (
    block_decays,
    decay_gradient,
    decay_operand,
    decayed_scores,
    decayed_scores_and_gradient,
    operand_decays,
    row_sums,
    token_pairs,
    write_decay_gradient,
)
from pallas_kernels.tpu.triangular import invert_unit_triangular

HEADS = 8  # of a block, at most, where one head for each would leave lanes empty


def refusal(q, k, v, g):
    """Why the kernel cannot serve these inputs, or `None`."""
    if reason := memory_refusal(q, k, v, g):
        return reason
    if _width(q, v, g) is None:
        return f"it needs at most {HEADS} heads side by side to fill 128 lanes or a multiple, got {memory_sizes(q, v)}"
    return None


def forward(scale, q, k, v, g, beta, memory, *, save=True):
    """Outputs and the memory after the last token; the memory before each chunk, or `None` without `save`."""
    kernel = vmap_into_batch(functools.partial(_forward, scale, save))
    arguments, results = "bthrk bthk bthv bthc bthc bhkv", "bthrv bhkv bchkv" if save else "bthrv bhkv"
    outputs, memory, *memories = per_device(kernel, v, "bth", arguments, results)(q, k, v, g, beta, memory)
    return (outputs, memory), memories[0] if save else None


def backward(scale, q, k, v, g, beta, memories, do, dmemory):
    """The cotangents of q, k, v, g, beta and of the memory that came in."""
    kernel = vmap_into_batch(functools.partial(_backward, scale))
    arguments, results = "bthrk bthk bthv bthc bthc bchkv bthrv bhkv", "bthrk bthk bthv bthc bthc bhkv"
    return per_device(kernel, v, "bth", arguments, results)(q, k, v, g, beta, memories, do, dmemory)


# --- Arrays as the kernels see them --------------------------------------------------------------------------------


def _side_by_side(kernel, q, v, g):
    """How many heads a kernel computes side by side: each fills the latencies of the others."""
    most = side_by_side(kernel, g.shape[-1], v.dtype)
    return max(most // (q.shape[3] * pl.cdiv(max(q.shape[4], v.shape[-1]), LANES)), 1)


def _width(q, v, g):
    """Lanes of a block of heads, at most, or `None` if there is none."""
    (heads, queries, key_dim), value_dim = q.shape[2:], v.shape[-1]
    dims = key_dim, value_dim, queries * key_dim, queries * value_dim
    widths = (n * max(*dims, 32) for n in range(_side_by_side("delta_rule_forward", q, v, g), HEADS + 1))
    return next((width for width in widths if head_block(heads, width, *dims)), None)


def _forward(scale, save, q, k, v, g, beta, memory):
    outputs = jax.ShapeDtypeStruct((*q.shape[:4], v.shape[-1]), v.dtype)
    grid = ChunkGrid.over(_width(q, v, g), q, k, v, outputs)
    most = _side_by_side("delta_rule_forward", q, v, g)
    kernel = functools.partial(_forward_kernel, scale, grid.time, q.shape[3], most)
    gates = decay_operand(grid, g), grid.rows(beta[..., 0])
    operands = [*map(grid.lanes, (q, k, v)), *gates, grid.states(memory)]
    results = [grid.lanes(outputs), grid.states(memory)]
    if save:
        memories = jax.ShapeDtypeStruct((grid.batch, grid.chunks, *memory.shape[1:]), memory.dtype)
        results.append(grid.chunk_states(memories))
    outputs, *memories = grid.call("delta_rule_forward", kernel, operands, results)
    return outputs.reshape(*q.shape[:4], v.shape[-1]), *memories


def _backward(scale, q, k, v, g, beta, memories, do, dmemory):
    grid = ChunkGrid.over(_width(q, v, g), q, k, v, do, reverse=True)
    most = _side_by_side("delta_rule_backward", q, v, g)
    kernel = functools.partial(_backward_kernel, scale, grid.time, q.shape[3], most)
    inputs = [*map(grid.lanes, (q, k, v)), decay_operand(grid, g), grid.rows(beta[..., 0])]
    states = grid.chunk_states(memories), grid.lanes(do), grid.states(dmemory)
    gradients = grid.call("delta_rule_backward", kernel, [*inputs, *states], [*inputs, grid.states(dmemory)])
    dq, dk, dv, dg, dbeta, dmemory = gradients
    dg = operand_decays(grid, dg, g)
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape), dg, grid.unrows(dbeta)[..., None], dmemory


# --- The kernels: a chunk of a block of heads ----------------------------------------------------------------------


def _forward_kernel(scale, time, queries, most, *refs):
    q_ref, k_ref, v_ref, g_ref, beta_ref, memory_ref, o_ref, memory_after_ref, *memories_ref = refs
    chunk = pl.program_id(2)

    @pl.when(chunk == 0)
    def _():
        memory_after_ref[...] = memory_ref[...]

    for ref in memories_ref:
        ref[...] = memory_after_ref[...]
    heads, key_dim, value_dim = memory_ref.shape
    head_decays, beta = block_decays(g_ref, heads, chunk, time), beta_ref[...].T
    head = jax.vmap(functools.partial(_forward_head, scale))
    for group, readers in group_heads(heads, queries, most):
        k, v = load_heads(k_ref, group, key_dim, chunk, time), load_heads(v_ref, group, value_dim, chunk, time)
        q = [load_heads(q_ref, r, key_dim, chunk, time) for r in readers]
        gates = stack_heads([(beta[:, h : h + 1], head_decays(h)) for h in group])
        at = slice(group.start, group.stop)
        outputs, memory_after_ref[at] = head(q, k, v, *gates, memory_after_ref[at])
        for r, o in zip(readers, outputs, strict=True):
            store_heads(o_ref, r, o)


def _backward_kernel(scale, time, queries, most, *refs):
    q_ref, k_ref, v_ref, g_ref, beta_ref, memories_ref, do_ref, dmemory_ref, *refs = refs
    dq_ref, dk_ref, dv_ref, dg_ref, dbeta_ref, dmemory_before_ref = refs
    chunk = pl.num_programs(2) - 1 - pl.program_id(2)

    @pl.when(pl.program_id(2) == 0)
    def _():
        dmemory_before_ref[...] = dmemory_ref[...]

    heads, key_dim, value_dim = memories_ref.shape
    head_decays, beta = block_decays(g_ref, heads, chunk, time), beta_ref[...].T
    head = jax.vmap(functools.partial(_backward_head, scale))
    for group, readers in group_heads(heads, queries, most):
        k, v = load_heads(k_ref, group, key_dim, chunk, time), load_heads(v_ref, group, value_dim, chunk, time)
        q = [load_heads(q_ref, r, key_dim, chunk, time) for r in readers]
        do = [load_heads(do_ref, r, value_dim, chunk, time) for r in readers]
        gates = stack_heads([(beta[:, h : h + 1], head_decays(h)) for h in group])
        at = slice(group.start, group.stop)
        states = memories_ref[at], dmemory_before_ref[at]
        dq, dk, dv, dg, dbeta, dmemory_before_ref[at] = head(q, k, v, do, *gates, *states)
        store_heads(dk_ref, group, dk)
        store_heads(dv_ref, group, dv)
        for r, x in zip(readers, dq, strict=True):
            store_heads(dq_ref, r, x)
        for h, x, y in zip(group, dg, dbeta, strict=True):
            write_decay_gradient(dg_ref, g_ref, h, x)
            dbeta_ref[h : h + 1] = y


# --- A chunk of a head ---------------------------------------------------------------------------------------------


class _Writing(NamedTuple):
    """How the tokens of a chunk write."""

    overlaps: Float[Array, "chunk chunk"]  # P, of keys
    solution: Float[Array, "chunk chunk"]  # T − 1
    missing: Float[Array, "chunk value_dim"]  # what the memory before the chunk lacks of the values
    written: Float[Array, "chunk value_dim"]  # u


def _forward_head(scale, q, k, v, beta, decays, memory):
    dtype = k.dtype
    written = _writing(k, v, beta, decays, memory).written
    outputs = []
    for reader in q:
        o = dot(decayed_scores(reader, k, decays), written, precision=enough_for(dtype))
        outputs.append(scale * (o + _read(reader, memory.astype(dtype), decays)))
    return outputs, decays.memory * memory + _added(k, written, decays)


def _backward_head(scale, q, k, v, do, beta, decays, memory, dmemory):
    dtype = k.dtype
    overlaps, solution, missing, written = _writing(k, v, beta, decays, memory)
    do = [(scale * dread).astype(dtype) for dread in do]
    dwritten = dot(k * decays.to_end, dmemory, precision=enough_for(dtype))
    dk = dk_beyond = decays.to_end * dot(written, dmemory, (1, 1), enough_for(dtype))
    passing, dmemory, dreaders = memory * dmemory, decays.memory * dmemory, []
    flow = past = 0

    def read(reader, dread, dscores):
        scores, dreader, dk, flow = _scores_and_gradient(dscores, reader, k, decays)
        beyond = decays.from_start * dot(dread, memory, (1, 1), enough_for(dtype))
        dmemory = dot(reader * decays.from_start, dread, (0, 0), enough_for(dtype))
        return scores, dreader + beyond, dk, flow, reader * beyond, dmemory

    for reader, dread in zip(q, do, strict=True):
        scores, dreader, *terms = read(reader, dread, dot(dread, written, (1, 1)))
        dk, flow, past, dmemory = (x + y for x, y in zip((dk, flow, past, dmemory), terms, strict=True))
        dwritten += dot(scores, dread, (0, 0), enough_for(dtype))
        dreaders.append(dreader)

    dright = dwritten + dot(solution, dwritten, (0, 0), enough_for(dtype))
    dv = beta * dright
    dsolved = _below(-dot(dright, written, (1, 1), enough_for(dtype)))
    dbeta = row_sums(dsolved * overlaps, dtype) + row_sums(missing * dright, dtype)
    # Keys read too, before they write: what they find is taken out of the values.
    _, dk_reads, *terms = read(k, -dv, beta * dsolved)
    dk, flow, past, dmemory = (x + y for x, y in zip((dk, flow, past, dmemory), terms, strict=True))
    dg = decay_gradient(flow, past, k * dk_beyond, passing, decays, dtype)
    return dreaders, dk + dk_reads, dv, dg, dbeta[:1], dmemory


def _scores_and_gradient(dscores, reader, k, decays):
    """`decayed_scores_and_gradient`, nothing rounded: where keys are alike, sums of many dscores nearly cancel."""
    if decays.halves is not None:
        wide = (x.astype(jnp.float32) for x in (reader, k))
        return decayed_scores_and_gradient(dscores, *wide, decays, enough_for(k.dtype))
    scores, flow = decayed_scores(reader, k, decays), dscores
    dscores *= decays.between
    return scores, dot(dscores, k), dot(dscores, reader, (0, 0)), scores * flow


def _writing(k, v, beta, decays, memory):
    """All in float32: what is written stays, and where keys are alike what they find is nearly all of their values."""
    overlaps = _below(decayed_scores(k, k, decays))
    solution = _below(invert_unit_triangular(beta * overlaps, lax.Precision.HIGHEST))
    missing = v - _read(k, memory, decays)
    right = beta * missing
    return _Writing(overlaps, solution, missing, right + dot(solution, right))


def _read(reader, memory, decays):
    """What readers find in the memory before the chunk."""
    if decays.halves is None:
        return decays.from_start * dot(reader, memory, parts=3)
    return dot(reader * decays.from_start, memory, precision=enough_for(memory.dtype))


def _added(k, written, decays):
    """What a chunk adds to the memory, to the last bit of float32: nothing corrects it later."""
    if decays.halves is not None:
        return dot(k * decays.to_end, written, (0, 0))
    return dot(k, decays.to_end * written, (0, 0), parts=3)


def _below(x):
    """What is below the diagonal."""
    i, j = token_pairs()
    return jnp.where(j < i, x, 0)
