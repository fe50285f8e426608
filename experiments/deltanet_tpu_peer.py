"""What `kernel_costs` runs in the environment of its peer: gated delta and KDA of deltanet-tpu, for one TPU topology.

Off a TPU the peer would trace its kernels for an interpreter; here it is told that it is on one.
"""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from deltanet_tpu import chunk_gdn, chunk_kda, gdn2


class _OnTpu:
    """`jax` as the peer sees it on a TPU."""

    def __getattr__(self, name):
        return getattr(jax, name)

    def default_backend(self):
        return "tpu"


def programs(batch, time, heads, dim, dtypes):
    """Forward alone and with the reverse pass, in both precisions that the peer has for products."""
    for name, function, decay in (
        ("delta_rule", chunk_gdn, (batch, time, heads)),
        ("delta_rule, per channel", chunk_kda, (batch, time, heads, dim)),
    ):
        for dtype in dtypes:
            values = jax.ShapeDtypeStruct((batch, time, heads, dim), dtype)
            gates = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (decay, (batch, time, heads)))
            types = [values] * 3 + list(gates)
            for precision in ("bf16",) if dtype == "bfloat16" else ("bf16", "fp32"):
                label = {"kernel": name, "dtype": dtype, "peer": f"deltanet-tpu, {precision}"}

                def forward(*inputs, function=function, precision=precision, inference=True):
                    return function(*inputs, precision=precision, is_inference=inference)

                def both(*inputs, forward=forward):
                    outputs, pull = jax.vjp(lambda *x: forward(*x, inference=False), *inputs[:-1])
                    return outputs, pull(inputs[-1])

                yield label | {"program": "forward"}, forward, types
                yield label | {"program": "forward + backward"}, both, [*types, values]


if __name__ == "__main__":
    topology, options = sys.argv[1], json.loads(sys.argv[2])
    specification = importlib.util.spec_from_file_location("compiler", Path(__file__).with_name("tpu_compiler.py"))
    compiler = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(compiler)
    gdn2.jax = _OnTpu()
    sizes = [options[name] for name in ("batch", "time", "heads", "dim")]
    compiler.report(topology, sizes[0] * sizes[1], programs(*sizes, options["dtypes"]))
