"""Linear attention with decay: forward and its reverse rule, each in one pass over queries, keys and values.

Equations and letters are those of `primitives.linear_attention`, whose ``_chunked_forward`` and ``_chunked_backward``
compute the same, in chunks of 128 tokens. The memory that a chunk of time leaves for the next, and its cotangent, stay
in VMEM, and so do scores and decays; for the reverse rule the memory before each chunk is written, once.

Rounding, for bfloat16 inputs: memories and sums are float32, and what is added to a memory takes three passes of the
matrix unit, which are exact. Outputs are held to the rounding of the inputs, so products that lead to them take two or
three passes; what leads to gradients is rounded, one pass. Scores of bfloat16 inputs alone are one exact pass.

Roofline for 128 tokens, 8 heads of 128, bfloat16: µs for the bytes and for the passes of the matrix unit at the
published rates of v5e and v6e:

    decay      pass       MiB    bytes       passes, µs
    scalar     forward    1.5    1.9, 1.0     9   1.5, 0.3
    scalar     backward   2.2    2.9, 1.4    12   2.0, 0.4
    channels   forward    2.0    2.6, 1.3    25   4.3, 1.0
    channels   backward   3.2    4.2, 2.1    25   4.3, 1.0

So memory binds with a scalar, and the matrix unit of v5e as much with channels; ../README.md has the bundles.
"""

import functools

import jax
from jax.experimental import pallas as pl

from pallas_kernels.tpu.common import (
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
    write_decay_gradient,
)

TOKEN_BYTES = 2048  # of a token in a block of heads, at most, where more than one head is in it


def refusal(q, k, v, g):
    """Why the kernel cannot serve these inputs, or `None`."""
    if reason := memory_refusal(q, k, v, g):
        return reason
    if head_block(q.shape[2], *_lanes(q, v)) is None:
        return f"it needs heads side by side to fill 128 lanes or a multiple, got {memory_sizes(q, v)}"
    return None


def forward(scale, q, k, v, g, memory, *, save=True):
    """Outputs and the memory after the last token; the memory before each chunk, or `None` without `save`."""
    kernel = vmap_into_batch(functools.partial(_forward, scale, save))
    results = "bthrv bhkv bchkv" if save else "bthrv bhkv"
    outputs, memory, *memories = per_device(kernel, v, "bth", "bthrk bthk bthv bthc bhkv", results)(q, k, v, g, memory)
    return (outputs, memory), memories[0] if save else None


def backward(scale, q, k, v, g, memories, do, dmemory):
    """The cotangents of q, k, v, g and of the memory that came in."""
    kernel = vmap_into_batch(functools.partial(_backward, scale))
    arguments, results = "bthrk bthk bthv bthc bchkv bthrv bhkv", "bthrk bthk bthv bthc bhkv"
    return per_device(kernel, v, "bth", arguments, results)(q, k, v, g, memories, do, dmemory)


def _lanes(q, v):
    """How many lanes a block of heads has at most, and those of a head in q, k, v and the outputs."""
    queries, key_dim, value_dim = *q.shape[3:], v.shape[-1]
    dims = queries * key_dim, key_dim, value_dim, queries * value_dim
    return max(TOKEN_BYTES // v.dtype.itemsize, *dims), *dims


# --- Arrays as the kernels see them --------------------------------------------------------------------------------


def _forward(scale, save, q, k, v, g, memory):
    outputs = jax.ShapeDtypeStruct((*q.shape[:4], v.shape[-1]), v.dtype)
    grid = ChunkGrid.over(_lanes(q, v)[0], q, k, v, outputs)
    most = side_by_side("linear_attention_forward", g.shape[-1], v.dtype)
    kernel = functools.partial(_forward_kernel, scale, grid.time, q.shape[3], most)
    operands = [*map(grid.lanes, (q, k, v)), decay_operand(grid, g), grid.states(memory)]
    results = [grid.lanes(outputs), grid.states(memory)]
    if save:
        memories = jax.ShapeDtypeStruct((grid.batch, grid.chunks, *memory.shape[1:]), memory.dtype)
        results.append(grid.chunk_states(memories))
    outputs, *memories = grid.call("linear_attention_forward", kernel, operands, results)
    return outputs.reshape(*q.shape[:4], v.shape[-1]), *memories


def _backward(scale, q, k, v, g, memories, do, dmemory):
    grid = ChunkGrid.over(_lanes(q, v)[0], q, k, v, do, reverse=True)
    most = side_by_side("linear_attention_backward", g.shape[-1], v.dtype)
    kernel = functools.partial(_backward_kernel, scale, grid.time, q.shape[3], most)
    values = [*map(grid.lanes, (q, k, v)), decay_operand(grid, g)]
    states = grid.chunk_states(memories), grid.lanes(do), grid.states(dmemory)
    results = [*values, grid.states(dmemory)]
    dq, dk, dv, dg, dmemory = grid.call("linear_attention_backward", kernel, [*values, *states], results)
    dg = operand_decays(grid, dg, g)
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape), dg, dmemory


# --- The kernels: a chunk of a block of heads ----------------------------------------------------------------------


def _forward_kernel(scale, time, queries, most, *refs):
    q_ref, k_ref, v_ref, g_ref, memory_ref, o_ref, memory_after_ref, *memories_ref = refs
    chunk = pl.program_id(2)

    @pl.when(chunk == 0)
    def _():
        memory_after_ref[...] = memory_ref[...]

    for ref in memories_ref:
        ref[...] = memory_after_ref[...]
    heads, key_dim, value_dim = memory_ref.shape
    head_decays = block_decays(g_ref, heads, chunk, time)
    for group, readers in group_heads(heads, queries, most):
        k, v = load_heads(k_ref, group, key_dim, chunk, time), load_heads(v_ref, group, value_dim, chunk, time)
        q = [load_heads(q_ref, r, key_dim, chunk, time) for r in readers]
        at = slice(group.start, group.stop)
        outputs, memory_after_ref[at] = _forward_head(
            scale, q, k, v, stack_heads(map(head_decays, group)), memory_after_ref[at]
        )
        for r, o in zip(readers, outputs, strict=True):
            store_heads(o_ref, r, o)


def _backward_kernel(scale, time, queries, most, *refs):
    q_ref, k_ref, v_ref, g_ref, memories_ref, do_ref, dmemory_ref, *refs = refs
    dq_ref, dk_ref, dv_ref, dg_ref, dmemory_before_ref = refs
    chunk = pl.num_programs(2) - 1 - pl.program_id(2)

    @pl.when(pl.program_id(2) == 0)
    def _():
        dmemory_before_ref[...] = dmemory_ref[...]

    heads, key_dim, value_dim = memories_ref.shape
    head_decays = block_decays(g_ref, heads, chunk, time)
    for group, readers in group_heads(heads, queries, most):
        k, v = load_heads(k_ref, group, key_dim, chunk, time), load_heads(v_ref, group, value_dim, chunk, time)
        q = [load_heads(q_ref, r, key_dim, chunk, time) for r in readers]
        do = [load_heads(do_ref, r, value_dim, chunk, time) for r in readers]
        at = slice(group.start, group.stop)
        states = memories_ref[at], dmemory_before_ref[at]
        dq, dk, dv, dg, dmemory_before_ref[at] = _backward_head(
            scale, q, k, v, do, stack_heads(map(head_decays, group)), *states
        )
        store_heads(dk_ref, group, dk)
        store_heads(dv_ref, group, dv)
        for r, x in zip(readers, dq, strict=True):
            store_heads(dq_ref, r, x)
        for h, x in zip(group, dg, strict=True):
            write_decay_gradient(dg_ref, g_ref, h, x)


# --- A chunk of a head ---------------------------------------------------------------------------------------------


def _forward_head(scale, q, k, v, decays, memory):
    dtype = k.dtype
    outputs = [
        dot(decayed_scores(reader, k, decays), v) + dot(reader * decays.from_start, memory, precision=enough_for(dtype))
        for reader in q
    ]
    return [scale * x for x in outputs], decays.memory * memory + dot(k * decays.to_end, v, (0, 0), parts=3)


def _backward_head(scale, q, k, v, do, decays, memory, dmemory):
    dtype = k.dtype
    read = scale * decays.from_start
    dk = dk_beyond = decays.to_end * dot(v, dmemory.astype(dtype), (1, 1))
    dv = dot((k * decays.to_end).astype(dtype), dmemory.astype(dtype))
    flow = past = 0
    dmemory_before, dq = decays.memory * dmemory, []
    for reader, dread in zip(q, do, strict=True):
        dq_memory = read * dot(dread, memory.astype(dtype), (1, 1))
        dmemory_before += dot((reader * read).astype(dtype), dread, (0, 0))
        dscores = scale * dot(dread, v, (1, 1))
        scores, dq_within, dk_within, flow_within = decayed_scores_and_gradient(dscores, reader, k, decays)
        dv += dot((scale * scores).astype(dtype), dread, (0, 0))
        dk, flow, past = dk + dk_within, flow + flow_within, past + reader * dq_memory
        dq.append(dq_within + dq_memory)
    dg = decay_gradient(flow, past, k * dk_beyond, memory * dmemory, decays, dtype)
    return dq, dk, dv, dg, dmemory_before
