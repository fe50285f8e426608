"""Every kernel through the compilers of every TPU generation: what it costs there, against what was recorded."""

import json
import re
from pathlib import Path

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import kernel_costs
from experiments.kernel_costs import KERNELS, Config
from experiments.tpu_compiler import TOPOLOGIES, tpu_devices

BOTH = "forward + backward"
RECORD = Path(__file__).parents[2] / "docs" / "kernel_costs.json"
# Every dtype for some generations is enough: the kernels are the same.
DTYPES = dict(zip(TOPOLOGIES, ("float32", "bfloat16", "float32", "float32", "bfloat16"), strict=True))


@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_costs_have_not_risen(generation):
    """One kernel each way, at most 5 % more bundles than recorded, no more temporaries than documented."""
    record = json.loads(RECORD.read_text())["metrics"]
    recorded = {
        (row["kernel"], row["dtype"], row["program"], row["chip"]): row["bundles per token"]
        for row in record["rows"]
        if "peer" not in row
    }
    config = Config(topologies=(generation,), dtypes=(DTYPES[generation],), programs=(BOTH,), **record["shape"])
    rows = kernel_costs.compiled(config)
    assert [row["kernel"] for row in rows] == list(KERNELS), "a kernel is not there, or does not fit into VMEM"
    for row in rows:
        assert len(row["kernels"]) == 2, row["kernel"]
        bundles = recorded[row["kernel"], row["dtype"], BOTH, row["chip"]]
        assert row["bundles per token"] <= 1.05 * bundles, row["kernel"]
        assert row["temporaries"] <= kernel_costs.most_temporaries(config, row["kernel"], row["dtype"]), row["kernel"]


def test_recorded_costs_are_below_the_peers():
    """In bundles and in temporaries, where products are as precise: the peer can round those of float32 inputs."""
    rows = json.loads(RECORD.read_text())["metrics"]["rows"]
    names = "kernel", "dtype", "program", "chip"
    ours = {tuple(row[name] for name in names): row for row in rows if "peer" not in row}
    precise = {"float32": "deltanet-tpu, fp32", "bfloat16": "deltanet-tpu, bf16"}
    peers = [row for row in rows if row.get("peer") == precise[row["dtype"]]]
    assert len(peers) == 16
    for row in peers:
        our = ours[tuple(row[name] for name in names)]
        assert our["bundles per token"] < row["bundles per token"], row
        assert our["temporaries"] < row["temporaries"], row


@pytest.mark.parametrize("kernel", KERNELS)
def test_explicit_mesh_gathers_nothing(kernel):
    """Batch and heads, or channels, split over 16 chips; `None` takes the kernel."""
    mesh = jax.make_mesh((8, 2), ("batch", "heads"), devices=tpu_devices("v5e:4x4"))
    config = Config(dtypes=("bfloat16",), programs=(BOTH,), batch=8, time=256, heads=4, dim=64)
    ((_, function, types),) = kernel_costs.programs(config, kernel, implementation=None)

    def shard(x):
        shared = x.shape[-1] == 16  # columns of the selective scan
        axes = P("heads") if x.ndim == 2 else P("batch") if shared else P("batch", None, "heads")
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, axes))

    with jax.set_mesh(mesh):
        text = jax.jit(function).lower(*map(shard, types)).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert not re.findall("all-gather|all-to-all|collective-permute", text)
