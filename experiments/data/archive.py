"""The published text formats of the UEA and UCR time-series classification archives: `.ts` and `.tsv`.

A `.ts` file has a header of `@tag value` lines, then after `@data` one example a line: channels separated by colons,
their values by commas, the label last. A `.tsv` file has one example of one channel a line: the label, then the values.
Missing values are `?` or `NaN`; files of equal lengths also fill the end of shorter series with them.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float

__all__ = ["Row", "find_files", "read_rows"]

Row = tuple[Float[np.ndarray, "time channels"], str]


def find_files(folder: Path, name: str) -> tuple[Path, Path] | None:
    """The training and test file of a set in a folder: `name/name_TRAIN.ts` and `name/name_TEST.ts`, or `.tsv`."""
    for suffix in (".ts", ".tsv"):
        train, test = (folder / name / f"{name}_{split}{suffix}" for split in ("TRAIN", "TEST"))
        if train.is_file() and test.is_file():
            return train, test
    return None


def read_rows(path: Path) -> list[Row]:
    """Read the examples of a `.ts` or `.tsv` file, in the file's order.

    Returns:
        Per example a series, float32 `[time, channels]`, and the name of its class. Steps at the end of a series at
        which every channel is missing are cut off; other missing values are NaN.

    Raises:
        ValueError: the file is malformed, is not a classification set, or has time stamps; the file and line are named.
    """
    parse = {".ts": _ts_rows, ".tsv": _tsv_rows}[path.suffix]
    rows = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, channels, label in parse(path, lines):
            try:
                series = np.stack([np.array(channel, np.float32) for channel in channels], axis=-1)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}: expected channels of equally many numbers, got {error}"
                ) from error
            present = np.flatnonzero(~np.isnan(series).all(axis=1))
            if not present.size:
                raise ValueError(f"{path}, line {number}: expected at least one value, got missing values only")
            if rows and series.shape[1] != rows[0][0].shape[1]:
                raise ValueError(
                    f"{path}, line {number}: expected {rows[0][0].shape[1]} channels as in the lines before, "
                    f"got {series.shape[1]}"
                )
            rows.append((series[: present[-1] + 1], label))
    if not rows:
        raise ValueError(f"{path}: expected one example a line{' after @data' * (path.suffix == '.ts')}, got none")
    return rows


def _ts_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, list[list[str]], str]]:
    header: dict[str, list[str]] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line.startswith("@"):
            tag, _, values = line[1:].partition(" ")
            header[tag.lower()] = values.split()
            if tag.lower() == "data":
                declared = _class_names(path, header)
        elif line and "data" in header:
            *channels, label = line.split(":")
            if not channels or label.strip() not in declared:
                raise ValueError(
                    f"{path}, line {number}: expected channels and, after the last colon, one of the labels "
                    f"{', '.join(declared)}; got {label[:40]!r}"
                )
            yield number, [channel.replace("?", "nan").split(",") for channel in channels], label.strip()


def _class_names(path: Path, header: dict[str, list[str]]) -> list[str]:
    if "true" in map(str.lower, header.get("timestamps", [])):
        raise ValueError(f"{path}: expected evenly spaced values, got a file with @timeStamps true")
    labelled, *names = header.get("classlabel") or ["false"]
    if labelled.lower() != "true" or not names:
        raise ValueError(f"{path}: expected a classification set with '@classLabel true NAME NAME ...' before @data")
    return names


def _tsv_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, list[list[str]], str]]:
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line:
            label, *values = line.split("\t")
            yield number, [values], label
