"""Lightning Attention-2's published algorithm, as it is printed, against `primitives.linear_attention`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primitives import linear_attention
from zoo.token_mixers import lightning_attention, transnormer_llm

TIME = 24
DECAYS = np.exp([-8.0, -0.5, -0.01])


def constants(decay, block):
    i = np.arange(block)
    mask = np.tril(decay ** np.maximum(i[:, None] - i, 0))
    return mask, decay ** (i + 1)[:, None], decay ** (block - 1 - i)[:, None], decay**block


def forward(q, k, v, decay, block):
    """Outputs, the last memory, and the memory that enters each block."""
    mask, to_query, to_key, whole = constants(decay, block)
    memory, outputs, memories = np.zeros((q.shape[1], v.shape[1])), np.zeros_like(v), []
    for t in (slice(start, start + block) for start in range(0, TIME, block)):
        memories.append(memory)
        outputs[t] = ((q[t] @ k[t].T) * mask) @ v[t] + to_query * (q[t] @ memory)
        memory = whole * memory + (to_key * k[t]).T @ v[t]
    return outputs, memory, memories


def backward(q, k, v, do, dmemory, decay, block):
    """The cotangents of q, k and v; `dmemory` is that of the last memory."""
    mask, to_query, to_key, whole = constants(decay, block)
    memories = forward(q, k, v, decay, block)[2]
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for n in reversed(range(TIME // block)):
        t = slice(n * block, (n + 1) * block)
        scores = (do[t] @ v[t].T) * mask
        dq[t] = scores @ k[t] + to_query * (do[t] @ memories[n].T)
        dk[t] = scores.T @ q[t] + to_key * (v[t] @ dmemory.T)
        dv[t] = ((q[t] @ k[t].T) * mask).T @ do[t] + to_key * (k[t] @ dmemory)
        dmemory = whole * dmemory + (to_query * q[t]).T @ do[t]
    return dq, dk, dv


@pytest.fixture(scope="module", params=[4, None])
def ours(request):
    """Inputs, and outputs and cotangents of the primitive in chunks."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        sizes = (4, 4, 5)
        q, k, v, do = (rng.normal(size=(1, TIME, len(DECAYS), size)) for size in (*sizes, 5))
        dmemory = rng.normal(size=(1, len(DECAYS), 4, 5))

        def attend(q, k, v):
            outputs, state = linear_attention(
                q, k, v, jnp.log(DECAYS), scale=1.0, chunk_size=request.param, implementation="chunked"
            )
            return outputs, state.memory

        results, pull = jax.vjp(jax.jit(attend), *map(jnp.asarray, (q, k, v)))
        return (q, k, v, do, dmemory), results, pull((jnp.asarray(do), jnp.asarray(dmemory)))


@pytest.mark.parametrize("block", [1, 3, 8, 24])
def test_blocks(ours, block):
    (*tokens, do, dmemory), (outputs, memory), cotangents = ours
    for head, decay in enumerate(DECAYS):
        q, k, v = (x[0, :, head] for x in tokens)
        expected = forward(q, k, v, decay, block)
        chex.assert_trees_all_close((outputs[0, :, head], memory[0, head]), expected[:2], rtol=0, atol=1e-11)
        expected = backward(q, k, v, do[0, :, head], dmemory[0, head], decay, block)
        chex.assert_trees_all_close(tuple(x[0, :, head] for x in cotangents), expected, rtol=0, atol=1e-11)


def test_presets_are_those_of_transnormer():
    assert next(iter(lightning_attention.PRESETS)) == "tiny"
    assert lightning_attention.PRESETS.items() <= transnormer_llm.PRESETS.items()
