"""Synthetic associative recall: a negative control for mixers whose query does not depend on the input.

After multi-query associative recall (MQAR) of Arora et al., "Zoology: Measuring and Improving Recall in Efficient
Language Models" (arXiv:2312.04927), which is in `mqar`. Here queries are spread uniformly over all places, keys may be
left unasked, and values may repeat, so that answering with the commonest one is a baseline.
"""

import sys
from collections.abc import Sequence
from functools import partial

import grain
import numpy as np

from experiments.data.pipelines import stack_members

__all__ = ["associative_recall", "recall_batches"]


def associative_recall(
    seed: int, index: int, *, batch_size: int, vocabulary: int, pairs: int, queries: int, length: int
) -> dict[str, np.ndarray]:
    """Batch number `index`: key-value pairs `k1 v1 k2 v2 ...`, then some of the keys again, among blanks.

    Token 0 is the blank, keys are below `vocabulary // 2`, values from there on. Keys are distinct within a sequence: a
    queried key occurs exactly twice, in its pair and as the query, where the target is its value.

    Args:
        seed: seed of the whole stream.
        index: which batch; a pure function of (seed, index).
        batch_size: sequences per batch.
        vocabulary: number of tokens.
        pairs: pairs per sequence, at most `vocabulary // 2 - 1`.
        queries: queries per sequence, at most `pairs`.
        length: tokens per sequence, at least `2 * pairs + queries`.

    Returns:
        `tokens` and `targets`, both int32 `[batch, length]`; targets are -1 except at queries.

    Raises:
        ValueError: a size is out of its range.
    """
    half = vocabulary // 2
    for name, value, low, high in (
        ("batch_size", batch_size, 1, sys.maxsize),
        ("vocabulary", vocabulary, 4, sys.maxsize),
        ("pairs", pairs, 1, half - 1),
        ("queries", queries, 1, pairs),
        ("length", length, 2 * pairs + queries, sys.maxsize),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name}: expected a number from {low} to {high}, got {value}")

    rng = np.random.default_rng((seed, index))

    def distinct(population: int, count: int) -> np.ndarray:
        return rng.permuted(np.tile(np.arange(population), (batch_size, 1)), axis=1)[:, :count]

    keys = 1 + distinct(half - 1, pairs)
    values = rng.integers(half, vocabulary, (batch_size, pairs))
    asked = distinct(pairs, queries)
    position = 2 * pairs + distinct(length - 2 * pairs, queries)

    tokens = np.zeros((batch_size, length), np.int32)
    tokens[:, 0 : 2 * pairs : 2] = keys
    tokens[:, 1 : 2 * pairs : 2] = values
    np.put_along_axis(tokens, position, np.take_along_axis(keys, asked, axis=1), axis=1)
    targets = np.full_like(tokens, -1)
    np.put_along_axis(targets, position, np.take_along_axis(values, asked, axis=1), axis=1)
    return {"tokens": tokens, "targets": targets}


def recall_batches(batch_size: int, *, seed: int | Sequence[int], **sizes: int) -> grain.MapDataset:
    """Endless batches of `associative_recall` with random access; a sequence of seeds gives a leading members axis."""
    return stack_members(partial(associative_recall, batch_size=batch_size, **sizes), seed)
