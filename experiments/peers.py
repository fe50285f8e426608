"""Another implementation, in a process and an environment of its own: its results, time and memory beside ours.

The process runs a script that reads ``FOLDER/inputs.npz``, says ``ready``, and answers every line ``PROGRAM REPEATS``
with the seconds of the fastest call; its results are in ``FOLDER/results.npz``. It imports nothing of ours.
"""

import contextlib
import dataclasses
import subprocess
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, PyTree

from experiments import ExperimentError
from primitives.testing import row_errors

__all__ = ["Peer", "check_peer", "largest_difference", "peak_growth", "start_peer", "time_in_turn"]

TOLERANCE = 1e-3  # of the results that are compared before they are timed


def check_peer(python: Path, requirements: Sequence[str]) -> None:
    """Refuse an environment that has other versions than ``NAME==VERSION``; a build, as ``+cpu``, does not count."""
    names = [requirement.partition("==")[0] for requirement in requirements]
    script = f"import importlib.metadata as m; print(*(f'{{n}}=={{m.version(n)}}' for n in {names}))"
    try:
        command = [python, "-P", "-c", script]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        found = []
    if [version.partition("+")[0] for version in found] != list(requirements):
        make = f"python -m venv .venv-peer && .venv-peer/bin/pip install {' '.join(requirements)}"
        raise ExperimentError(f"--peer {python} has no {' and '.join(requirements)}: {make}")


@dataclasses.dataclass(frozen=True)
class Peer:
    """A process that answers."""

    process: subprocess.Popen
    folder: Path

    def seconds(self, program: str, *, repeats: int) -> float:
        """Of the fastest call."""
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            print(program, repeats, file=self.process.stdin, flush=True)
        return float(self.answer())

    def answer(self) -> str:
        """The next line."""
        line = self.process.stdout.readline().strip()
        if not line:
            raise ExperimentError(f"the peer {self.process.args[0]} ended without an answer; its error is above")
        return line

    def results(self) -> dict[str, np.ndarray]:
        """What it wrote."""
        return dict(np.load(self.folder / "results.npz"))


@contextlib.contextmanager
def start_peer(python: Path, script: Path, argument: str, inputs: Mapping[str, Array]) -> Iterator[Peer]:
    """The process, as soon as it is ready; it is called with the argument and the folder."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder, "inputs.npz"), **inputs)
        # -P: the script's folder holds modules of ours, which are not to stand in for others
        with subprocess.Popen([python, "-P", script, argument, folder], **pipes) as process:
            peer = Peer(process, Path(folder))
            peer.answer()
            yield peer


def largest_difference(actual: PyTree[Array], expected: PyTree[Array], what: str) -> float:
    """Of outputs or gradients, relative to the root mean square of a row; an `ExperimentError` if it is too large."""
    if jax.tree.structure(actual) != jax.tree.structure(expected):
        raise ExperimentError(f"{what}: the results are of different kinds")
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    error = float(np.max([row_errors(*pair)[0] for pair in pairs]))
    if not error <= TOLERANCE:
        raise ExperimentError(f"{what}: expected the same results to {TOLERANCE}, they differ by {error:.2g}")
    return error


def time_in_turn[T: Hashable](clocks: Mapping[T, Callable[..., float]], *, rounds: int, repeats: int) -> dict[T, float]:
    """Seconds of the fastest call of each clock, a function of `repeats`; one after another in every round."""
    seconds = [{name: clock(repeats=repeats) for name, clock in clocks.items()} for _ in range(rounds)]
    return {name: min(now[name] for now in seconds) for name in clocks}


def peak_growth(process: int, call: Callable[[], object]) -> int:
    """Bytes by which the resident memory of a process grows at most while `call` runs; on Linux."""
    folder = Path("/proc", str(process))

    def resident(name):
        line = next(line for line in (folder / "status").read_text().splitlines() if line.startswith(name))
        return 1024 * int(line.split()[1])

    (folder / "clear_refs").write_text("5")  # the peak is now what is resident
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before
