"""Data sets prepared once: array_record files of tensorflow-datasets in a directory named by their content."""

import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

__all__ = ["prepare", "read_prepared"]


def prepare(create: Callable[..., tfds.core.DatasetBuilder], directory: Path) -> None:
    """Write what the builder `create(data_dir=...)` generates; `directory` appears whole or not at all, and only once.

    Safe to call from several processes.
    """
    # In a scratch folder: in place, the builder leaves empty download folders and fails if another was first.
    directory.parent.mkdir(parents=True, exist_ok=True)
    tfds.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix="incomplete.") as scratch:
        builder = create(data_dir=scratch)
        with contextlib.redirect_stdout(io.StringIO()):  # it announces a download, and there is none
            builder.download_and_prepare(file_format="array_record")
        try:
            builder.data_path.rename(directory)
        except OSError:
            if not directory.exists():  # otherwise another process was first, with the same content
                raise


def read_prepared(directory: Path, split: str) -> tuple[tfds.core.DatasetInfo, list[dict[str, Any]]]:
    """The data set's description and the examples of a split, in their order.

    Raises:
        ValueError: an unknown split.
        RuntimeError: a file is damaged.
    """
    builder = tfds.builder_from_directory(directory)
    try:
        return builder.info, list(builder.as_data_source(split))
    except RuntimeError as error:
        raise RuntimeError(f"{directory} is damaged: delete it, and the set is prepared again") from error
