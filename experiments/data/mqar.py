"""Multi-query associative recall (MQAR): key-value pairs, then queries for every key among filler.

Simran Arora, Sabri Eyuboglu, Aman Timalsina, Isys Johnson, Michael Poli, James Zou, Atri Rudra, Christopher Ré,
"Zoology: Measuring and Improving Recall in Efficient Language Models" (2023, arXiv:2312.04927): the task. The sizes
`MQAR_TRAIN` and `MQAR_TEST` are those of its successor, Simran Arora, Sabri Eyuboglu, Michael Zhang, Aman Timalsina,
Silas Alberti, Dylan Zinsley, James Zou, Atri Rudra, Christopher Ré, "Simple linear attention language models balance
the recall-throughput tradeoff" (2024, arXiv:2402.18668), as in the authors' published configurations. Those of Zoology
train one model per size, (64, 4), (128, 8) or (256, 16), on 100,000 sequences with blanks for filler
(`random_filler=False`), and test on 3,000.

As published: the tokens of a sequence, their distribution, the order of the queries, the targets. Deviations:

- A batch is a pure function of (seed, index). The published generator seeds a global one, and takes the filler from the
  global generator of another library, which that seed does not set.
- Random filler is never a key of its sequence. The published one is any token: now and then a key, with no target there
  and another token than its value next. (Filler may be a value, or the blank, as published.)
- Training sequences are fresh at every step. Published are 100,000 + 4 × 20,000 of them, seen in every epoch.
- Sizes are mixed step by step in the published proportions. The published epoch shows one size after the other, always
  in the same order. Published batches that end a size are smaller; here all are equal.
- A length may be odd, and exceed the vocabulary. Repeated pairs (`num_passes`, a later addition) are left out.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Float, Int

from experiments.data.pipelines import stack_members

__all__ = ["MQAR_TEST", "MQAR_TRAIN", "MQARSize", "mqar", "mqar_batches"]


class MQARSize(NamedTuple):
    """Tokens and pairs of a sequence; how many such sequences there are, which is their share in a mixture."""

    length: int
    pairs: int
    examples: int = 1


MQAR_TRAIN = (
    MQARSize(64, 4, 100_000),
    MQARSize(128, 8, 20_000),
    MQARSize(256, 16, 20_000),
    MQARSize(256, 32, 20_000),
    MQARSize(256, 64, 20_000),
)
MQAR_TEST = (
    MQARSize(64, 4, 1_000),
    MQARSize(64, 8, 1_000),
    MQARSize(64, 16, 1_000),
    MQARSize(128, 32, 1_000),
    MQARSize(256, 64, 1_000),
    MQARSize(512, 128, 1_000),
    MQARSize(1024, 256, 1_000),
)


def mqar(
    seed: int,
    index: int,
    *,
    batch_size: int,
    length: int,
    pairs: int,
    vocabulary: int = 8192,
    power: float = 0.01,
    random_filler: bool = True,
) -> dict[str, np.ndarray]:
    """Batch number `index`: `k1 v1 k2 v2 ...`, then every key once more, as a query whose target is its value.

    Token 0 is the blank, keys are below `vocabulary // 2`, values from there on; both are distinct within a sequence.
    The query of a key is `2 * gap` tokens after the pairs. Gaps are drawn one key after another, without replacement,
    `gap` in proportion to `(gap + 1) ** (power - 1)`. The token after a query is filler, not the value.

    Args:
        seed: seed of the whole stream.
        index: which batch; a pure function of (seed, index).
        batch_size: sequences per batch.
        length: tokens per sequence, at least `4 * pairs`.
        pairs: pairs per sequence, less than `vocabulary // 2`.
        vocabulary: number of tokens.
        power: of the power law; 1 is uniform, and the smaller, the sooner are the queries.
        random_filler: fill with any tokens but the sequence's keys; otherwise with blanks.

    Returns:
        `tokens` and `targets`, both int32 `[batch, length]`; targets are -1 except at queries.

    Raises:
        ValueError: a size is out of its range.
    """
    _check(batch_size, length, pairs, vocabulary, power)
    half, shown = vocabulary // 2, 2 * pairs
    rng = np.random.default_rng((seed, index))
    keys = 1 + _distinct(rng, half - 1, (batch_size, pairs))
    values = half + _distinct(rng, vocabulary - half, (batch_size, pairs))
    weights = np.arange(1.0, (length - shown) // 2 + 1) ** (power - 1)
    position = shown + 2 * _distinct_weighted(rng, weights, (batch_size, pairs))

    tokens = np.zeros((batch_size, length), np.int32)
    if random_filler:
        tokens[:, shown:] = _skip(rng.integers(0, vocabulary - pairs, (batch_size, length - shown)), keys, vocabulary)
    tokens[:, 0:shown:2] = keys
    tokens[:, 1:shown:2] = values
    np.put_along_axis(tokens, position, keys, axis=1)
    targets = np.full_like(tokens, -1)
    np.put_along_axis(targets, position, values, axis=1)
    return {"tokens": tokens, "targets": targets}


def mqar_batches(
    batch_size: int,
    *,
    seed: int | Sequence[int],
    sizes: Sequence[MQARSize] = MQAR_TRAIN,
    steps_per_size: int = 1,
    vocabulary: int = 8192,
    power: float = 0.01,
    random_filler: bool = True,
) -> grain.MapDataset:
    """Endless batches of `mqar` with random access; a sequence of seeds gives a leading members axis.

    All sequences of a batch have one size. Sizes are shuffled in cycles, in each of which every size has its share: of
    9 steps with `MQAR_TRAIN`, 5 have the shortest, and every other size has one. Which size a step has depends on the
    step alone, so that members can be stacked.

    Args:
        batch_size: sequences per batch.
        seed: seed of the stream, or one per member.
        sizes: the mixture.
        steps_per_size: the size changes only at multiples of so many steps, for a trainer that stacks their batches.
        vocabulary: as of `mqar`.
        power: as of `mqar`.
        random_filler: as of `mqar`.

    Raises:
        ValueError: a size is out of its range.
    """
    options = {"batch_size": batch_size, "vocabulary": vocabulary, "power": power, "random_filler": random_filler}
    examples = np.array([size.examples for size in sizes], int)
    if not len(sizes) or examples.min() < 1:
        raise ValueError(f"sizes: expected sizes with one example or more each, got {sizes}")
    if steps_per_size < 1:
        raise ValueError(f"steps_per_size: expected at least 1, got {steps_per_size}")
    for size in sizes:
        _check(batch_size, size.length, size.pairs, vocabulary, power)
    cycle = np.repeat(np.arange(len(sizes)), examples // np.gcd.reduce(examples))

    def batch(seed: int, step: int) -> dict[str, np.ndarray]:
        number, place = divmod(step // steps_per_size, len(cycle))
        size = sizes[np.random.default_rng(number).permutation(cycle)[place]]
        return mqar(seed, step, length=size.length, pairs=size.pairs, **options)

    return stack_members(batch, seed)


def _check(batch_size: int, length: int, pairs: int, vocabulary: int, power: float) -> None:
    for name, value, low, high in (
        ("batch_size", batch_size, 1, sys.maxsize),
        ("vocabulary", vocabulary, 4, sys.maxsize),
        ("pairs", pairs, 1, vocabulary // 2 - 1),
        ("length", length, 4 * pairs, sys.maxsize),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name}: expected a number from {low} to {high}, got {value}")
    if not 0 < power < np.inf:
        raise ValueError(f"power: expected a positive number, got {power}")


def _distinct(rng: np.random.Generator, population: int, shape: tuple[int, int]) -> Int[np.ndarray, "batch count"]:
    """Numbers below `population`, distinct within a row: the first of a Fisher-Yates shuffle of every row."""
    rows, chosen = np.arange(shape[0]), rng.integers(np.arange(shape[1]), population, shape)
    table = np.tile(np.arange(population, dtype=np.int32), (shape[0], 1))
    for place, other in enumerate(chosen.T):
        table[rows, other], table[:, place] = table[:, place], table[rows, other]
    return table[:, : shape[1]]


def _distinct_weighted(
    rng: np.random.Generator, weights: Float[np.ndarray, " population"], shape: tuple[int, int]
) -> Int[np.ndarray, "batch count"]:
    """Draws one after another in proportion to their weights, without replacement within a row."""
    # The order in which exponential clocks with these rates ring is the order of such draws.
    times = rng.standard_exponential((shape[0], len(weights))) / weights
    return np.argsort(times, axis=1)[:, : shape[1]]


def _skip(
    rank: Int[np.ndarray, "batch time"], keys: Int[np.ndarray, "batch pairs"], vocabulary: int
) -> Int[np.ndarray, "batch time"]:
    """The tokens with these ranks among those that are not keys of their row."""
    batch_size, pairs = keys.shape
    row = np.arange(batch_size)[:, None]
    # As many free tokens are below a row's i-th smallest key as its number less i. Rows one after another are sorted.
    free_below = np.sort(keys, axis=1) - np.arange(pairs) + row * vocabulary
    keys_below = np.searchsorted(free_below.ravel(), rank + row * vocabulary, side="right") - row * pairs
    return rank + keys_below
