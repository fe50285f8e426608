import sys
from pathlib import Path

import pytest

from experiments import ExperimentError
from experiments import benchmark_recurrences as benchmark
from experiments.peers import largest_difference

ROOT = Path(__file__).parents[2]
TINY = {"heads": 2, "dim": 4, "times": (5,), "rounds": 2, "repeats": 1}
FAKE = """
from primitives import linear_attention as ours

def linear_attention(kind, q, k, v, *, g):
    assert kind == "simple_gla"
    return {factor} * ours(q, k, v, g)[0], None
"""


@pytest.fixture
def peer(monkeypatch, tmp_path):
    """A function that makes a package `jla`, ours times a factor, for the python that runs the tests."""

    def make(factor):
        (tmp_path / "jla").mkdir()
        (tmp_path / "jla" / "__init__.py").write_text("")
        (tmp_path / "jla" / "ops.py").write_text(FAKE.format(factor=factor))
        return Path(sys.executable)

    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setattr(benchmark, "KINDS", {"simple_gla": benchmark.KINDS["simple_gla"]})
    return make


def measured(peer):
    return benchmark.SECTIONS["peer"].measure(benchmark.Config(peer=peer, **TINY))


def test_a_peer_that_agrees_is_timed(peer):
    section = measured(peer(1.0))
    (row,) = section["rows"]
    assert row["difference"] < 1e-5
    for program in ("forward", "both"):
        ours, theirs = (row[f"{program}, {side} (ms)"] for side in ("ours", "peer"))
        assert row[f"{program}, peer / ours"] == pytest.approx(theirs / ours)
    assert "of 2 ratios are 2 or more" in benchmark.SECTIONS["peer"].show(section)


def test_a_peer_that_differs_is_not_timed(peer):
    with pytest.raises(ExperimentError, match="simple_gla at 5 tokens: expected the same results"):
        measured(peer(1.01))


def test_a_peer_that_fails_is_an_error_of_one_line(peer):
    with pytest.raises(ExperimentError, match="ended without an answer"):
        measured(peer("unknown"))


@pytest.mark.parametrize("python", [sys.executable, "nowhere/bin/python"])
def test_an_environment_without_the_peer_is_refused_with_what_to_do(python):
    with pytest.raises(ExperimentError, match=r"pip install jax-linear-attention==0\.1\.0 jax==0\.11\.2"):
        benchmark.check(benchmark.Config(peer=Path(python)))


def test_the_plain_forms_equal_the_primitives():
    """Of those that are compared in memory alone, which runs nothing."""
    config = benchmark.Config(**TINY)
    for decay in ("none", "constant per head", "per head", "per channel"):
        for ours, plain, beta in (
            (benchmark._attention, benchmark._associative_attention, False),
            (benchmark._delta, benchmark._associative_delta, True),
        ):
            inputs = benchmark._attention_inputs(7, config, decay=decay, beta=beta).values()
            largest_difference(ours(*inputs), plain(*inputs), decay)


def test_a_stream_is_a_multiple_of_its_pieces():
    with pytest.raises(ValueError, match="streamed"):
        benchmark.Config(streamed=1000, piece=64)
