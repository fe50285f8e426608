"""From padded arrays to batches. Batch number `step` is a pure function of (seed, step): to resume takes no more."""

import dataclasses
import sys
from collections.abc import Callable, Sequence

import grain
import numpy as np
from jaxtyping import Bool, Int

from experiments.data.classification import ClassificationData

__all__ = ["batches", "evaluation_batches", "stack_members", "standardise", "stratified_split"]


def stack_members(batch: Callable[[int, int], dict[str, np.ndarray]], seed: int | Sequence[int]) -> grain.MapDataset:
    """Endless batches `batch(seed, step)` with random access; a sequence of seeds gives a leading members axis."""

    def stacked(step: int) -> dict[str, np.ndarray]:
        if np.ndim(seed) == 0:
            return batch(seed, step)
        members = [batch(each, step) for each in seed]
        return {name: np.stack([member[name] for member in members]) for name in members[0]}

    return grain.MapDataset.range(sys.maxsize).map(stacked)


def batches(data: ClassificationData, batch_size: int, *, seed: int | Sequence[int]) -> grain.MapDataset:
    """Endless training batches with random access: `batches(...)[step]`.

    The examples are permuted anew in each epoch, epochs follow one another without a gap, and batches are cut from that
    stream: every epoch covers every example once, whatever the batch size.

    Args:
        data: the examples.
        batch_size: examples per batch.
        seed: the order's seed. A sequence of seeds, one per member trained at once, gives batches with a leading axis.

    Returns:
        A dataset of dicts: `inputs [(members) batch time channels]` float32, `segment_ids [(members) batch time]`
        int32, 0 for real steps and -1 for padding, and `labels [(members) batch]` int32.
    """
    _check(data, batch_size)

    # grain's own shuffle draws indices one by one, 70 µs each for a few hundred examples; an epoch at once is faster.
    def member(seed: int, step: int) -> Int[np.ndarray, " batch"]:
        first, last = step * batch_size, (step + 1) * batch_size - 1
        epochs = range(first // len(data), last // len(data) + 1)
        stream = np.concatenate([np.random.default_rng((seed, epoch)).permutation(len(data)) for epoch in epochs])
        return stream[first % len(data) :][:batch_size]

    def batch(step: int) -> dict[str, np.ndarray]:
        index = np.stack([member(each, step) for each in np.ravel(seed)])
        return _gather(data, index.reshape(*np.shape(seed), batch_size))

    return grain.MapDataset.range(sys.maxsize // batch_size).map(batch)


def evaluation_batches(data: ClassificationData, batch_size: int) -> grain.MapDataset:
    """The examples in order, once, in batches of one static shape: as `batches`, plus `weight [batch]` float32.

    The last batch repeats the last example where examples run out; `weight` is 1 for examples and 0 for such repeats.
    """
    _check(data, batch_size)

    def batch(start: int) -> dict[str, np.ndarray]:
        index = np.arange(start, start + batch_size)
        return {
            **_gather(data, np.minimum(index, len(data) - 1)),
            "weight": (index < len(data)).astype(np.float32),
        }

    return grain.MapDataset.range(0, len(data), batch_size).map(batch)


def standardise(train: ClassificationData, *others: ClassificationData) -> tuple[ClassificationData, ...]:
    """Shift and scale every channel by the mean and standard deviation over the real steps of `train`.

    Channels that are constant in `train` are only shifted. Padding stays zero.

    Returns:
        `train` and the `others`, all on the scale of `train`.
    """
    steps = train.series[_is_real(train)].astype(np.float64)
    mean, std = steps.mean(axis=0), steps.std(axis=0)
    std[std == 0] = 1
    return tuple(
        dataclasses.replace(
            data, series=np.where(_is_real(data)[..., None], (data.series - mean) / std, 0).astype(np.float32)
        )
        for data in (train, *others)
    )


def stratified_split(
    data: ClassificationData, fraction: float, *, seed: int
) -> tuple[ClassificationData, ClassificationData]:
    """Split into a training and a validation part; `fraction` of each class, rounded, goes to validation.

    Every class keeps at least one training example, and one with two examples or more gets at least one for validation.
    The order of the examples is kept.

    Raises:
        ValueError: `fraction` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: expected a number between 0 and 1, got {fraction}")
    rng = np.random.default_rng(seed)
    validation = np.zeros(len(data), bool)
    for label in range(len(data.class_names)):
        members = rng.permutation(np.flatnonzero(data.label == label))
        validation[members[: min(max(1, round(fraction * len(members))), len(members) - 1)]] = True
    return data[~validation], data[validation]


def _gather(data: ClassificationData, index: Int[np.ndarray, "*shape"]) -> dict[str, np.ndarray]:
    chosen = data[index]
    return {
        "inputs": chosen.series,
        "segment_ids": np.where(_is_real(chosen), 0, -1).astype(np.int32),
        "labels": chosen.label,
    }


def _is_real(data: ClassificationData) -> Bool[np.ndarray, "*shape time"]:
    return np.arange(data.series.shape[-2]) < data.length[..., None]


def _check(data: ClassificationData, batch_size: int) -> None:
    if not len(data):
        raise ValueError("data: expected at least one example, got none")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
