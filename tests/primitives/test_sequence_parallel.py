import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from experiments.tpu_compiler import tpu_devices
from primitives import linear_attention, linear_recurrence, prefix_scan_attention, sequence_parallel
from primitives.testing import assert_close

WHOLE, PIECES = P(), P(None, "time")


def example(mixer, time, dim=8):
    """Inputs of a mixer, and how each is split."""
    keys = jax.random.split(jax.random.key(0), 4)
    rows = 2, time, 2
    q, k, v, noise = (jax.random.normal(key, (*rows, dim)) for key in keys)
    if mixer is linear_recurrence:
        return (jax.nn.sigmoid(2 + noise), v), (PIECES, PIECES)
    if mixer is prefix_scan_attention:
        return (2 * noise[..., 0], v), (PIECES, PIECES)
    return (q, k, v, -0.1 * jax.nn.softplus(noise)), (PIECES,) * 4


CASES = {
    "recurrence": (linear_recurrence, lambda inputs: inputs),
    "recurrence, constant decay": (linear_recurrence, lambda inputs: (inputs[0][0, 0], inputs[1])),
    "no decay": (linear_attention, lambda inputs: inputs[:3]),
    "decay per head": (linear_attention, lambda inputs: (*inputs[:3], inputs[3][0, 0, :, 0])),
    "decay per token": (linear_attention, lambda inputs: (*inputs[:3], inputs[3][..., 0])),
    "decay per channel": (linear_attention, lambda inputs: inputs),
    "softmax": (prefix_scan_attention, lambda inputs: inputs),
}


def packed(time):
    """Documents within and across pieces; pieces of nothing but padding; one document in the second row."""
    ids = np.zeros((2, time), np.int32)
    ids[0, time // 8 - 3 :] = 1
    ids[0, time // 2 : time // 2 + time // 4] = -1
    ids[0, -5:] = 4
    ids[1, :5] = -1
    return jnp.asarray(ids)


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("case", CASES)
@jax.enable_x64(True)
def test_equals_one_device(case, segmented, carried):
    mixer, select = CASES[case]
    time = 8 * 12
    inputs, specs = example(mixer, time)
    inputs = select(inputs)
    specs = tuple(PIECES if x.ndim > 2 else WHOLE for x in inputs)
    ids = packed(time) if segmented else None
    state = mixer(*(x[:, :7] if x.ndim > 2 else x for x in inputs))[1] if carried else None
    mesh = Mesh(np.array(jax.devices("cpu")[:8]), ("time",))

    def pieces(state, ids, *inputs):
        outputs, state = sequence_parallel(mixer, *inputs, axis_name="time", state=state, segment_ids=ids)
        return outputs, jax.tree.map(lambda x: x[None], state)

    split = jax.shard_map(pieces, mesh=mesh, in_specs=(WHOLE, PIECES, *specs), out_specs=(PIECES, P("time")))

    def whole(state, ids, *inputs):
        return mixer(*inputs, state=state, segment_ids=ids)

    def last(state, ids, *inputs):
        outputs, states = split(state, ids, *inputs)
        return outputs, jax.tree.map(lambda x: x[-1], states)

    def loss(function, state, inputs):
        outputs, final = function(state, ids, *inputs)
        return jnp.sum(jnp.sin(outputs)) + jnp.sum(jnp.cos(final[-2])), (outputs, final)

    results = [
        jax.jit(jax.grad(functools.partial(loss, f), argnums=(0, 1), has_aux=True, allow_int=True))(state, inputs)
        for f in (last, whole)
    ]
    for split_leaf, leaf in zip(*map(jax.tree.leaves, results), strict=True):
        if leaf.dtype != jax.dtypes.float0:
            assert_close(split_leaf, leaf, "float64", case, floor=1)


def test_refuses_what_does_not_compose():
    with pytest.raises(ValueError, match="mixer: expected one of linear_recurrence"):
        sequence_parallel(jnp.sin, jnp.ones((1, 2)), axis_name="time")


COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def collective_bytes(text):
    """Bytes of the results of all collectives of a compiled program."""
    sizes = {"f32": 4, "s32": 4, "pred": 1, "u32": 4, "bf16": 2}
    total = 0
    for line in text.splitlines():
        found = re.search(
            r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(", line
        )
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", found[1]) if found else ():
            total += sizes[dtype] * int(np.prod([int(n) for n in shape.split(",") if n]))
    return total


@pytest.mark.parametrize("topology", ["v5e:8x8", "v5p:4x4x4"])
@pytest.mark.parametrize("case", ["recurrence", "decay per token", "softmax"])
def test_traffic_does_not_depend_on_time(topology, case):
    mixer, select = CASES[case]
    mesh = Mesh(np.array(tpu_devices(topology)), ("time",))
    assert mesh.size == 64

    def traffic(time):
        inputs = jax.eval_shape(lambda: select(example(mixer, time, dim=128)[0]))
        pieces = functools.partial(sequence_parallel, mixer, axis_name="time")
        split = jax.shard_map(lambda *x: pieces(*x)[0], mesh=mesh, in_specs=(PIECES,) * len(inputs), out_specs=PIECES)

        def gradients(*inputs):
            outputs, pull = jax.vjp(split, *inputs)
            return pull(outputs)

        sharding = jax.NamedSharding(mesh, PIECES)
        types = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in inputs)
        return collective_bytes(jax.jit(gradients).lower(*types).compile().as_text())

    short, long = traffic(64 * 128), traffic(64 * 512)
    assert short == long
    assert short > 0
