"""A run's folder belongs to one configuration, and to one process at a time."""

import contextlib
import datetime
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments import ExperimentError, refuse_other_run, writing
from experiments.results import write_json

__all__ = ["claim"]


@contextlib.contextmanager
def claim(folder: Path, identity: Mapping[str, Any], *, fresh: bool = False) -> Iterator[str]:
    """Make `folder` the run with this `identity`, as its `run.json` says, and lock it while the context lasts.

    Args:
      folder: made if it does not exist.
      identity: JSON-able; what the run is.
      fresh: delete the run that is there first; nothing but a run is ever deleted.

    Yields:
      When the run was started, in ISO 8601; before now if it is resumed.

    Raises:
      ExperimentError: `folder` cannot be written, is in use, or holds another run.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    try:
        _lock(lock, folder)
        yield _started(folder, identity, fresh)
    finally:
        os.close(lock)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, however it ends
    except BlockingIOError:
        raise ExperimentError(f"another process is running in {folder}: choose another --folder") from None


def _started(folder: Path, identity: Mapping[str, Any], fresh: bool) -> str:
    marker = folder / "run.json"
    if fresh and marker.exists():
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    if not marker.exists():
        if fresh and any(folder.iterdir()):
            raise ExperimentError(f"--fresh deletes runs only, and {folder} has no run.json: choose another --folder")
        started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        write_json(marker, {"started": started, "identity": identity})
    try:
        saved = json.loads(marker.read_text())
        refuse_other_run(folder, saved["identity"], identity)
        return saved["started"]
    except (ValueError, LookupError, TypeError):
        raise ExperimentError(f"{marker} is damaged: choose another --folder") from None
