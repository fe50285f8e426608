"""Checkpoints that restore exactly what was saved or nothing: Orbax writes them, a digest of each leaf guards them."""

import errno
import hashlib
import json
import logging
import os
import shutil
import textwrap
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from experiments import refuse_other_run, writing

__all__ = ["Checkpoints"]

SPARE = 2**20  # bytes; Orbax itself reports a full disk by tracebacks from several threads, so it is not to meet one

logger = logging.getLogger(__name__)
logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax reports every step of every save


class Checkpoints:
    """The last `keep` checkpoints of one run.

    A checkpoint is a pytree of arrays and a JSON-able record. Orbax restores a flipped byte silently, so a manifest
    with the SHA-256 of every leaf, and of itself, is saved in the same atomic rename and verified on restoring.

    Args:
      folder: where the checkpoints are, each a folder named by its step.
      identity: what must be equal in the run that saves and the run that restores, by name.
      keep: how many checkpoints stay.

    Raises:
      ExperimentError: `folder` cannot be written.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], keep: int = 3):
        self.folder = folder.absolute()
        self.identity = identity
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, arrays: PyTree, record: dict[str, Any]) -> None:
        """Save `arrays` and `record` as the checkpoint of `step`; `ExperimentError` if they cannot be written."""
        leaves = _leaves(arrays)
        manifest = {"identity": self.identity | _shapes(leaves), "record": record, "digests": _digests(leaves)}
        body = json.dumps(manifest, default=str)
        sealed = {"body": body, "sha256": _sha256(body.encode())}
        items = ocp.args.Composite(arrays=ocp.args.PyTreeSave(leaves), manifest=ocp.args.JsonSave(sealed))
        with writing(self.folder / str(step)):
            if shutil.disk_usage(self.folder).free < len(body) + sum(leaf.nbytes for leaf in leaves.values()) + SPARE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._manager.save(step, args=items)

    def restore(self, template: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """`(step, arrays, record)` of the newest undamaged checkpoint, structured as `template`; None without one.

        A damaged checkpoint is reported by a warning and renamed to `STEP.damaged`; the one before it is tried.

        Raises:
          ExperimentError: the checkpoint has another identity, or leaves of other names, shapes or dtypes.
        """
        expected = _leaves(template)
        steps = sorted((int(path.name) for path in self.folder.iterdir() if path.name.isdecimal()), reverse=True)
        for step in steps:
            try:
                leaves, manifest = self._read(step)
            except Exception as error:  # whatever Orbax, TensorStore and JSON raise on damaged files
                self._set_aside(step, error)
                continue
            refuse_other_run(self.folder, manifest["identity"], self.identity | _shapes(expected))
            arrays = jax.tree.unflatten(jax.tree.structure(template), [leaves[path] for path in expected])
            return step, arrays, manifest["record"]
        if steps:
            logger.warning("no checkpoint in %s is undamaged: starting from the beginning", self.folder)
        return None

    def _read(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        sealed = self._manager.restore(step, args=ocp.args.Composite(manifest=ocp.args.JsonRestore())).manifest
        if _sha256(sealed["body"].encode()) != sealed["sha256"]:
            raise ValueError("the manifest does not match its digest")
        manifest, leaves = json.loads(sealed["body"]), {}
        for path in manifest["digests"]:  # one at a time: of several that fail, asyncio reports all but one to stderr
            leaf = ocp.args.PyTreeRestore({path: 0}, partial_restore=True)
            leaves |= self._manager.restore(step, args=ocp.args.Composite(arrays=leaf)).arrays
        if _digests(leaves) != manifest["digests"]:
            raise ValueError("the arrays do not match their digests")
        return leaves, manifest

    def _set_aside(self, step: int, error: Exception) -> None:
        path, aside = self.folder / str(step), self.folder / f"{step}.damaged"
        logger.warning("checkpoint %s is damaged and set aside: %s", path, textwrap.shorten(str(error), 200))
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        self._manager.reload()


def _leaves(tree: PyTree) -> dict[str, np.ndarray]:
    flat, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in flat}


def _shapes(leaves: dict[str, np.ndarray]) -> dict[str, str]:
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves.items()}


def _digests(leaves: dict[str, np.ndarray]) -> dict[str, str]:
    return {path: _sha256(shape.encode() + leaves[path].tobytes()) for path, shape in _shapes(leaves).items()}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
