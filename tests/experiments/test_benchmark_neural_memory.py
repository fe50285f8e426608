import dataclasses
import functools
import os
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ExperimentError, peers
from experiments import benchmark_neural_memory as benchmark
from experiments.measure import with_gradients

TINY = benchmark.Config(
    width=4,
    expansion=2,
    times=(8,),
    intervals=(4,),
    peer_times=(8,),
    peer_interval=4,
    narrow_width=4,
    rounds=2,
    repeats=1,
)
FAKE = """
import pathlib, shutil, sys, time
import numpy as np

known, folder = map(pathlib.Path, sys.argv[1:])
assert sorted(np.load(folder / "inputs.npz").files) == sorted(set(np.load(known).files) - {"outputs"})
print("ready", flush=True)
for line in sys.stdin:
    program, repeats = line.split()
    if program == "save":
        shutil.copy(known, folder / "results.npz")
    memory = bytearray(2**25 * (program == "both"))
    print(0.25 * int(repeats), flush=True)
"""


@pytest.fixture(scope="module")
def known():
    """Our own results, as the peer writes them."""
    inputs = benchmark._inputs(8, TINY)
    form = functools.partial(benchmark._as_peer, tuple(inputs), "after_token", 4)
    outputs, gradients = jax.jit(with_gradients(form))(*inputs.values())
    return {"outputs": outputs} | dict(zip(inputs, gradients, strict=True))


@pytest.fixture
def peer(known, monkeypatch, tmp_path):
    """A function that puts a process in the place of the peer that knows results: ours times a factor."""

    def make(factor):
        (tmp_path / "peer.py").write_text(FAKE)
        np.savez(tmp_path / "known.npz", **known | {"outputs": factor * known["outputs"]})

        def start(python, script, argument, inputs):
            assert script.exists()
            return peers.start_peer(python, tmp_path / "peer.py", str(tmp_path / "known.npz"), inputs)

        monkeypatch.setattr(benchmark, "start_peer", start)
        return dataclasses.replace(TINY, peer=Path(sys.executable))

    return make


def test_a_peer_that_agrees_is_measured(peer):
    row = benchmark._peer_row("after_token", True, "width", 8, peer(1.0))
    assert row["difference"] < 1e-5
    assert row["peer (s)"] == 0.25
    assert row["time, peer / ours"] == pytest.approx(0.25 / row["ours (s)"])
    assert row["peer (MiB)"] == pytest.approx(32, rel=0.1)
    assert row["memory, peer / ours"] == pytest.approx(row["peer (MiB)"] / row["ours (MiB)"])


def test_a_peer_that_differs_is_not_timed(peer):
    with pytest.raises(ExperimentError, match="after_token at 8 tokens: expected the same results"):
        benchmark._peer_row("after_token", True, "width", 8, peer(1.01))


@pytest.mark.parametrize("script", ["raise ValueError", "print('ready'); raise ValueError"])
def test_a_peer_that_fails_is_an_error_of_one_line(script, tmp_path):
    (tmp_path / "peer.py").write_text(script)
    started = peers.start_peer(Path(sys.executable), tmp_path / "peer.py", "", {})
    with pytest.raises(ExperimentError, match="ended without an answer"), started as peer:
        peer.seconds("both", repeats=1)


@pytest.mark.parametrize("python", [sys.executable, "nowhere/bin/python"])
def test_an_environment_without_the_peer_is_refused_with_what_to_do(python):
    with pytest.raises(ExperimentError, match=r"pip install titans-pytorch==0\.5\.5 torch==2\.13\.0"):
        benchmark.check(benchmark.Config(peer=Path(python)))


def test_a_build_of_a_version_is_that_version(monkeypatch):
    def run(*args, **options):
        return type("Done", (), {"stdout": "titans-pytorch==0.5.5 torch==2.13.0+cpu"})

    monkeypatch.setattr(peers.subprocess, "run", run)
    peers.check_peer(Path("python"), benchmark.PEER)
    with pytest.raises(ExperimentError):
        peers.check_peer(Path("python"), ["titans-pytorch==0.5.5", "torch==2.13.1"])


@pytest.mark.parametrize(("read", "momentum"), [("after_token", True), ("after_interval", False)])
def test_ours_is_given_in_the_terms_of_the_peer(read, momentum):
    """Its chunks and batches as a loop: gradients at the batch's first weights, a decay for every chunk."""
    with jax.enable_x64(True):
        named = {name: x.astype(float) for name, x in benchmark._inputs(8, TINY).items()}
        if not momentum:
            del named["momentum"]
        q, k, v, step, decay = (named[name][0, :, 0] for name in ("q", "k", "v", "step", "decay"))
        weights = begun = [x[0] for name, x in named.items() if name.startswith("weight")]
        speed, expected = [jnp.zeros_like(weight) for weight in weights], []

        def loss(weights, t):
            return jnp.sum((jax.nn.gelu(k[t] @ weights[0], approximate=False) @ weights[1] - v[t]) ** 2)

        for t in range(8):
            complete = (t + 1) % 4 == 0
            gradients = [step[t] * g for g in jax.grad(loss)(begun, t)]
            if read == "after_token":
                speed = [named["momentum"][0, t, 0] * s - g for s, g in zip(speed, gradients, strict=True)]
                weights = [decay[t] * w + s for w, s in zip(weights, speed, strict=True)]
            else:
                speed = [s - g for s, g in zip(speed, gradients, strict=True)]
                if complete:
                    mean = decay[t - 3 : t + 1].mean()
                    weights = [mean * w + s for w, s in zip(weights, speed, strict=True)]
                    speed = [jnp.zeros_like(weight) for weight in weights]
            begun = weights if complete else begun
            expected.append(jax.nn.gelu(q[t] @ weights[0], approximate=False) @ weights[1])

        actual = benchmark._as_peer(tuple(named), read, 4, *named.values())
        chex.assert_trees_all_close(actual[0, :, 0], jnp.stack(expected), rtol=1e-12)


def test_forms_that_differ_are_not_measured(monkeypatch):
    benchmark._compare_forms(TINY)
    plain = benchmark._plain
    monkeypatch.setattr(benchmark, "_plain", lambda *inputs, interval: 1.01 * plain(*inputs, interval=interval))
    with pytest.raises(ExperimentError, match="scan over intervals: expected the same results"):
        benchmark._compare_forms(TINY)


def test_the_peak_of_memory_is_that_of_a_call():
    assert peers.peak_growth(os.getpid(), lambda: bytearray(2**26)) / 2**20 == pytest.approx(64, abs=8)
    assert peers.peak_growth(os.getpid(), lambda: None) / 2**20 < 8


def test_the_fastest_of_all_rounds_counts():
    seconds = {"ours": iter([3.0, 1.0, 2.0]), "peer": iter([4.0, 6.0, 5.0])}
    clocks = {name: lambda *, repeats, name=name: next(seconds[name]) for name in seconds}
    assert peers.time_in_turn(clocks, rounds=3, repeats=1) == {"ours": 1.0, "peer": 4.0}


def test_what_is_shown_says_whether_the_aims_were_reached(tmp_path):
    rows = [
        {"read": "after_token", "momentum": "True", "width": 4, "tokens": time, "difference": 1e-6}
        | {"ours (s)": 1.0, "peer (s)": ratio, "time, peer / ours": ratio}
        | {"ours (MiB)": 1.0, "peer (MiB)": 4 * ratio, "memory, peer / ours": 4 * ratio}
        for time, ratio in ((8, 2.0), (16, 4.0))
    ]
    growth = {"tokens": (8, 16), "seconds": {read: [1.0, 2.0] for read in benchmark.READS}}
    growth |= {"depth": 2, "interval": 4, "exponents": {"after_token": 1.0, "after_interval": 1.25}}
    metrics = {
        "memory": {"weights_mib": 4.5, "rows": [{"tokens": 8, "interval": 4, "after_token": 3.0}]},
        "speed": {"width": 4, "expansion": 2, "growths": [growth]},
        "peer": {"peer": list(benchmark.PEER), "interval": 4, "rows": rows},
    }
    text = benchmark.show(metrics)
    assert "1 of 2 ratios of time are 3 or more, 1 of 2 of memory 10 or more" in text
    assert "the largest is 1.25" in text
    assert [line.split("|")[4:6] for line in text.splitlines() if "| after_interval |" in line] == [[" 8   ", " 8    "]]
    benchmark.draw(metrics, tmp_path)
    assert (tmp_path / benchmark.FIGURE).exists()


def test_intervals_of_the_comparison_are_whole():
    with pytest.raises(ValueError, match="peer_times: expected multiples of 64"):
        benchmark.Config(peer_times=(100,))
