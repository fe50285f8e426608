import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import data as zoo_data
from experiments.data import NEEDLE_KINDS

MARKER = 1
TEXT = np.random.default_rng(0).permutation(np.arange(2, 256)).astype(np.uint8)  # a byte tells its place
PASSAGE = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
SMALL = {"batch_size": 3, "length": 30, "symbols": 2, "text": TEXT}


def needle(seed=0, index=0, **change):
    return zoo_data.needle(seed, index, **SMALL | change)


def take_apart(tokens, targets, symbols):
    """Haystack, the needle's depth in it, key and value."""
    first, second = np.flatnonzero(tokens == MARKER)
    value = targets[-symbols:]
    assert list(tokens[first + 2 : first + 2 + symbols]) == list(value)
    assert second == len(tokens) - symbols - 1
    assert tokens[second + 1] == tokens[first + 1]
    assert list(tokens[second + 2 :]) == list(value[:-1])
    return np.concatenate([tokens[:first], tokens[first + 2 + symbols : second]]), first, tokens[first + 1], value


@given(st.integers(1, 5), st.integers(0, 50), st.integers(0, 2**31), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_invariants(symbols, hay, seed, index):
    options = {"symbols": symbols, "length": 2 * symbols + 3 + hay, "batch_size": 4}
    batch = needle(seed, index, **options)
    np.testing.assert_equal(needle(seed, index, **options), batch)
    for row, (tokens, targets) in enumerate(zip(batch["tokens"], batch["targets"], strict=True)):
        assert tokens.dtype == targets.dtype == np.int32
        assert len(tokens) == len(targets) == options["length"]
        assert (targets[:-symbols] == -1).all()
        hay, _, key, value = take_apart(tokens, targets, symbols)
        assert chr(key).isalpha()
        kind = list(NEEDLE_KINDS)[row % 3]
        assert set(map(chr, value)) <= set(NEEDLE_KINDS[kind])
        source = PASSAGE * 2 if kind == "pass key" else bytes(TEXT)
        assert bytes(hay.astype(np.uint8)) in source


def assert_uniform(drawn, choices):
    """Counts are within five standard deviations of those expected."""
    counts = np.array([np.sum(np.asarray(drawn) == choice) for choice in choices])
    share = 1 / len(choices)
    assert counts.sum() == len(drawn)
    assert (np.abs(counts - len(drawn) * share) <= 5 * np.sqrt(len(drawn) * share * (1 - share))).all()


@pytest.mark.parametrize("kind", NEEDLE_KINDS)
def test_everything_is_uniform(kind):
    text = TEXT[:40]
    batch = needle(batch_size=4000, kinds=(kind,), text=text)
    parts = [take_apart(*row, 2) for row in zip(batch["tokens"], batch["targets"], strict=True)]
    hay, depth, key, value = (np.array(part) for part in zip(*parts, strict=True))
    assert_uniform(depth, range(24))  # 23 bytes of hay
    assert_uniform(key, [*range(ord("A"), ord("Z") + 1), *range(ord("a"), ord("z") + 1)])
    for symbol in value.T:
        assert_uniform(symbol, [*map(ord, NEEDLE_KINDS[kind])])
    if kind != "pass key":
        assert_uniform([list(text).index(first) for first in hay[:, 0]], range(18))


def test_passages_start_anywhere():
    hay = needle(batch_size=2000, kinds=("pass key",))
    starts = {bytes(take_apart(*row, 2)[0][:12].astype(np.uint8)) for row in zip(*hay.values(), strict=True)}
    assert starts == {(PASSAGE * 2)[start:][:12] for start in range(len(PASSAGE))}


def test_batches_vary_and_stack_members():
    options = {name: value for name, value in SMALL.items() if name != "batch_size"}
    stacked = zoo_data.needle_batches(3, seed=[1, 2], **options)
    assert stacked[0]["tokens"].shape == (2, 3, 30)
    for member, seed in enumerate((1, 2)):
        np.testing.assert_equal({name: value[member] for name, value in stacked[7].items()}, needle(seed, 7))
        np.testing.assert_equal(zoo_data.needle_batches(3, seed=seed, **options)[7], needle(seed, 7))
    rows = np.concatenate([stacked[step]["tokens"].reshape(6, 30) for step in range(20)])
    assert len(np.unique(rows, axis=0)) == 120


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected a number from 1"),
        ({"symbols": 0}, "symbols: expected a number from 1"),
        ({"length": 6}, "length: expected a number from 7 to"),
        ({"kinds": ("number", "uuid")}, "kinds: expected some of pass key, number, word, got uuid"),
        ({"kinds": ()}, "kinds: expected some of pass key, number, word, got none"),
        ({"text": TEXT[:22]}, "text: expected at least 23 bytes, got 22"),
        ({"text": np.arange(256, dtype=np.uint8)}, "text: expected no byte 1, which marks a needle"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        needle(**change)
    if "batch_size" not in change:
        options = {name: value for name, value in (SMALL | change).items() if name != "batch_size"}
        with pytest.raises(ValueError, match=re.escape(message)):
            zoo_data.needle_batches(2, seed=0, **options)


def test_wikipedia_has_no_marker(tmp_path_factory):
    text = zoo_data.load_text("wikipedia", data_dir=tmp_path_factory.mktemp("data"))
    for split in (text.train, text.test):
        assert needle(text=split)["tokens"].shape == (3, 30)
