"""The peer's side of `benchmark_recurrences`: `python -P jla_peer.py KIND FOLDER` in its own environment.

Reads FOLDER/inputs.npz, writes outputs and gradients to FOLDER/results.npz and says `ready`; then answers every line
`PROGRAM REPEATS` with the seconds of the fastest call. It imports nothing of ours, which is not installed there.
"""

import sys
import time
from pathlib import Path

import jax
import numpy as np
from jla.ops import linear_attention


def main(kind: str, folder: Path) -> None:
    """Compile, compute once, then time on request until the input ends."""

    def forward(inputs):
        gates = {name: x for name, x in inputs.items() if name not in ("q", "k", "v")}
        return linear_attention(kind, inputs["q"], inputs["k"], inputs["v"], **gates)[0]

    def both(inputs):
        outputs, pull = jax.vjp(forward, inputs)
        return outputs, pull(outputs)[0]

    inputs = jax.device_put(dict(np.load(folder / "inputs.npz")))
    programs = {
        name: jax.jit(function).lower(inputs).compile() for name, function in (("forward", forward), ("both", both))
    }
    outputs, gradients = programs["both"](inputs)
    jax.block_until_ready(programs["forward"](inputs))
    np.savez(folder / "results.npz", outputs=outputs, **gradients)
    print("ready", flush=True)
    for line in sys.stdin:
        program, repeats = line.split()
        seconds(programs[program], inputs)  # does not count, as in time_call of measure.py
        print(min(seconds(programs[program], inputs) for _ in range(int(repeats))), flush=True)


def seconds(program, inputs):
    """The time of one call."""
    begun = time.perf_counter()
    jax.block_until_ready(program(inputs))
    return time.perf_counter() - begun


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
