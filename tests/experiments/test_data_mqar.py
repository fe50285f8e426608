import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import data as zoo_data
from experiments.data import MQAR_TEST, MQAR_TRAIN, MQARSize

SMALL = {"batch_size": 2, "length": 16, "pairs": 3, "vocabulary": 16}


def mqar(seed=0, index=0, **change):
    return zoo_data.mqar(seed, index, **SMALL | change)


@st.composite
def mqar_sizes(draw):
    pairs = draw(st.integers(1, 6))
    return {
        "pairs": pairs,
        "length": 4 * pairs + draw(st.integers(0, 9)),
        "vocabulary": 2 * (pairs + 1) + draw(st.integers(0, 9)),
        "power": draw(st.sampled_from([0.01, 0.5, 1.0, 2.0])),
        "random_filler": draw(st.booleans()),
    }


@given(mqar_sizes(), st.integers(0, 2**31), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_invariants(sizes, seed, index):
    batch = zoo_data.mqar(seed, index, batch_size=4, **sizes)
    np.testing.assert_equal(zoo_data.mqar(seed, index, batch_size=4, **sizes), batch)
    half, shown = sizes["vocabulary"] // 2, 2 * sizes["pairs"]
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        assert tokens.dtype == targets.dtype == np.int32
        assert len(tokens) == len(targets) == sizes["length"]
        keys, values = tokens[:shown].reshape(-1, 2).T
        assert len(set(keys)) == len(set(values)) == sizes["pairs"]
        assert ((keys > 0) & (keys < half)).all()
        assert ((values >= half) & (values < sizes["vocabulary"])).all()
        memory = dict(zip(keys, values, strict=True))
        # A key is never filler: wherever one stands after the pairs, it is asked for.
        assert (targets[:shown] == -1).all()
        assert [memory.get(token, -1) for token in tokens[shown:]] == list(targets[shown:])
        assert sorted(tokens[targets >= 0]) == sorted(keys)
        filler = tokens[shown:][targets[shown:] < 0]
        assert ((filler >= 0) & (filler < (sizes["vocabulary"] if sizes["random_filler"] else 1))).all()
        (places,) = np.nonzero(targets >= 0)
        assert (places % 2 == 0).all()


def test_example_of_the_published_generator():
    """The layout that its documentation shows: `2 8 4 7 | 0 0 4 0 0 0 0 0 2 0 0`, with 7 due at 4 and 8 due at 2."""
    sizes = {"length": 15, "pairs": 2, "vocabulary": 12, "power": 1.0, "random_filler": False}
    tokens, targets = zoo_data.mqar(0, 0, batch_size=200_000, **sizes).values()
    shown = (tokens == [2, 8, 4, 7, 0, 0, 4, 0, 0, 0, 0, 0, 2, 0, 0]).all(axis=1)
    assert shown.any()
    assert (targets[shown] == [-1] * 6 + [7] + [-1] * 5 + [8] + [-1] * 2).all()


def assert_frequencies(drawn, expected):
    """The counts of `drawn` are within five standard deviations of those expected."""
    counts = np.bincount(drawn, minlength=len(expected))
    assert len(counts) == len(expected)
    deviation = np.sqrt(len(drawn) * expected * (1 - expected))
    assert (np.abs(counts - len(drawn) * expected) <= 5 * deviation).all()


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_gaps_follow_the_power_law(power):
    pairs, length = 3, 46
    batch = zoo_data.mqar(1, 2, batch_size=40_000, length=length, pairs=pairs, vocabulary=64, power=power)
    keys = batch["tokens"][:, 0 : 2 * pairs : 2]
    asked = np.argmax(batch["tokens"][:, None, 2 * pairs :] == keys[..., None], axis=-1)
    first, second, _ = (asked // 2).T
    law = np.arange(1.0, 21) ** (power - 1)
    law /= law.sum()
    assert_frequencies(first, law)
    # The second draw leaves out the first: the sum over i of p_i p_j / (1 - p_i), i != j.
    other = law / (1 - law)
    assert_frequencies(second, law * (other.sum() - other))


def test_keys_values_and_filler_are_uniform():
    tokens = zoo_data.mqar(3, 0, batch_size=20_000, length=16, pairs=3, vocabulary=15)["tokens"]
    for column in (0, 4):  # keys 1 … 6
        assert_frequencies(tokens[:, column] - 1, np.full(6, 1 / 6))
        assert_frequencies(tokens[:, column + 1] - 7, np.full(8, 1 / 8))
    assert_frequencies(6 * (tokens[:, 0] - 1) + tokens[:, 2] - 1, (1 - np.eye(6)).ravel() / 30)
    # Filler beside the blank and the values: three of the six keys are left, equally often.
    assert_frequencies(tokens[:, 7], np.array([1 / 12] + [1 / 24] * 6 + [1 / 12] * 8))


def test_batches_vary_and_stack_members():
    options = {"sizes": [MQARSize(16, 3)], "vocabulary": 16}
    stacked = zoo_data.mqar_batches(2, seed=[1, 2], **options)
    assert stacked[0]["tokens"].shape == (2, 2, 16)
    for member, seed in enumerate((1, 2)):
        np.testing.assert_equal({name: value[member] for name, value in stacked[7].items()}, mqar(seed, 7))
        np.testing.assert_equal(zoo_data.mqar_batches(2, seed=seed, **options)[7], mqar(seed, 7))
    rows = np.concatenate([stacked[step]["tokens"].reshape(4, 16) for step in range(20)])
    assert len(np.unique(rows, axis=0)) == 80


def test_sizes_are_mixed_as_published():
    batches = zoo_data.mqar_batches(2, seed=[0, 1])
    sizes = [(batch["tokens"].shape[-1], int((batch["targets"][0, 0] >= 0).sum())) for batch in batches[:36]]
    for cycle in np.reshape(sizes, (4, 9, 2)).tolist():
        assert sorted(map(tuple, cycle)) == [(64, 4)] * 5 + [(128, 8), (256, 16), (256, 32), (256, 64)]
    assert len({tuple(sizes[i : i + 9]) for i in range(0, 36, 9)}) > 1
    assert batches[35]["tokens"].shape == (2, 2, sizes[35][0])  # the same whenever it is asked for
    held = zoo_data.mqar_batches(2, seed=5, steps_per_size=3)
    assert [held[step]["tokens"].shape[-1] for step in range(27)] == [sizes[i // 3][0] for i in range(27)]


def test_published_sizes():
    assert sum(size.examples for size in MQAR_TRAIN) == 180_000
    assert [size[:2] for size in MQAR_TEST[-2:]] == [(512, 128), (1024, 256)]
    for size in MQAR_TRAIN + MQAR_TEST:
        batch = zoo_data.mqar(0, 0, batch_size=1, length=size.length, pairs=size.pairs)
        assert (batch["targets"] >= 0).sum() == size.pairs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary": 3}, "vocabulary: expected"),
        ({"pairs": 8, "length": 32}, "pairs: expected a number from 1 to 7, got 8"),
        ({"pairs": 0}, "pairs: expected"),
        ({"length": 11}, "length: expected a number from 12"),
        ({"batch_size": 0}, "batch_size: expected"),
        ({"power": 0.0}, r"power: expected a positive number, got 0\.0"),
        ({"power": np.nan}, "power: expected a positive number, got nan"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        mqar(**change)
    batch_size, length, pairs, *_ = (SMALL | change).values()
    options = {name: value for name, value in (SMALL | change).items() if name in ("vocabulary", "power")}
    with pytest.raises(ValueError, match=message):
        zoo_data.mqar_batches(batch_size, seed=0, sizes=[MQARSize(length, pairs)], **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": []}, "sizes: expected sizes with one example or more"),
        ({"sizes": [MQARSize(64, 4, 0)]}, "sizes: expected sizes with one example or more"),
        ({"steps_per_size": 0}, "steps_per_size: expected at least 1, got 0"),
    ],
)
def test_refusals_of_mixtures(change, message):
    with pytest.raises(ValueError, match=message):
        zoo_data.mqar_batches(2, seed=0, **change)
