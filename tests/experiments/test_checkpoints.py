import json
import shutil
from pathlib import Path

import chex
import jax
import ml_dtypes
import numpy as np
import pytest

from experiments import ExperimentError
from experiments.checkpoints import Checkpoints

IDENTITY = {"steps": 100, "seeds": (0, 1)}


def arrays(step):
    """Bytes that do not compress and a constant that does, of every kind of leaf."""
    random = np.random.default_rng(step)
    return {
        "params": {"layers": [random.normal(size=(2, 40)).astype(np.float32), np.full((3,), step, np.float32)]},
        "optimizer": (np.int32(step), random.normal(size=7).astype(ml_dtypes.bfloat16), random.integers(0, 2, 5) > 0),
    }


def record(step):
    return {"history": [{"step": step, "loss": [0.1 * step, float("nan")]}]}


def saved(folder, *steps):
    checkpoints = Checkpoints(folder, IDENTITY)
    for step in steps:
        checkpoints.save(step, arrays(step), record(step))
    return folder


def assert_holds(restored, step):
    assert restored is not None
    assert restored[0] == step
    chex.assert_trees_all_equal(restored[1], arrays(step))
    chex.assert_trees_all_equal_dtypes(restored[1], arrays(step))
    assert json.dumps(restored[2]) == json.dumps(record(step))


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_restores_the_newest_and_keeps_the_last_three(tmp_path):
    saved(tmp_path, 9, 10, 20, 30)
    assert_holds(Checkpoints(tmp_path, IDENTITY).restore(arrays(0)), 30)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "20", "30"]


def test_without_a_checkpoint(tmp_path):
    assert Checkpoints(tmp_path / "new", IDENTITY).restore(arrays(0)) is None


def test_the_rest_of_a_write_that_was_cut_short_is_removed(tmp_path):
    saved(tmp_path, 10)
    shutil.copytree(tmp_path / "10", tmp_path / "20.orbax-checkpoint-tmp")
    assert_holds(Checkpoints(tmp_path, IDENTITY).restore(arrays(0)), 10)
    saved(tmp_path, 20)
    assert_holds(Checkpoints(tmp_path, IDENTITY).restore(arrays(0)), 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "20"]


def flips(data):
    """`data` with one byte changed: at the ends, in the middle, and at random."""
    random = np.random.default_rng(len(data))
    for position in {0, len(data) // 2, len(data) - 1, int(random.integers(len(data)))}:
        changed = bytearray(data)
        changed[position] ^= 1 << int(random.integers(8))
        yield bytes(changed)


def test_a_damaged_file_gives_the_saved_values_or_the_checkpoint_before(tmp_path, caplog):
    original = saved(tmp_path / "original", 10, 20)
    fell_back = 0
    for path in files(original / "20"):
        data = path.read_bytes()
        for damage in (None, b"", data[: len(data) // 2], *flips(data)):
            folder = tmp_path / "damaged"
            shutil.copytree(original, folder)
            victim = folder / path.relative_to(original)
            victim.unlink()
            if damage is not None:
                victim.write_bytes(damage)
            caplog.clear()
            restored = Checkpoints(folder, IDENTITY).restore(arrays(0))
            warned = f"{folder / '20'} is damaged" in caplog.text
            assert_holds(restored, 10 if warned else 20)
            fell_back += warned
            shutil.rmtree(folder)
    assert fell_back > 20


def test_values_that_were_not_saved_are_refused_though_all_files_are_sound(tmp_path):
    saved(tmp_path, 10, 20)
    shutil.rmtree(tmp_path / "20" / "arrays")
    shutil.copytree(tmp_path / "10" / "arrays", tmp_path / "20" / "arrays")
    assert_holds(Checkpoints(tmp_path, IDENTITY).restore(arrays(0)), 10)


def test_training_goes_on_after_a_damaged_checkpoint(tmp_path):
    saved(tmp_path, 10, 20)
    for path in files(tmp_path / "20"):
        path.unlink()
    for step in (15, 20):  # lower than and equal to that of the damaged one
        checkpoints = Checkpoints(tmp_path, IDENTITY)
        checkpoints.restore(arrays(0))
        checkpoints.save(step, arrays(step), record(step))
        assert_holds(Checkpoints(tmp_path, IDENTITY).restore(arrays(0)), step)
    assert (tmp_path / "20.damaged").is_dir()


def test_all_damaged(tmp_path, caplog):
    saved(tmp_path, 10, 20)
    for path in files(tmp_path):
        path.write_bytes(b"")
    assert Checkpoints(tmp_path, IDENTITY).restore(arrays(0)) is None
    assert "starting from the beginning" in caplog.text
    saved(tmp_path, 10)
    assert_holds(Checkpoints(tmp_path, IDENTITY).restore(arrays(0)), 10)


@pytest.mark.parametrize(
    ("identity", "template", "message"),
    [
        (IDENTITY | {"steps": 200}, arrays(0), "steps was 100, is 200"),
        (IDENTITY | {"seeds": (0, 2)}, arrays(0), r"seeds was \[0, 1\], is \[0, 2\]"),
        (IDENTITY | {"width": 3}, arrays(0), "width was None, is 3"),
        (IDENTITY, arrays(0) | {"params": {}}, r"params/layers/0 was float32\[2, 40\], is None"),
        (IDENTITY, jax.tree.map(np.float32, arrays(0)), r"optimizer/0 was int32\[\], is float32\[\]"),
    ],
)
def test_refuses_another_run(tmp_path, identity, template, message):
    saved(tmp_path, 10)
    with pytest.raises(ExperimentError, match=f"{message}.*--folder.*--fresh"):
        Checkpoints(tmp_path, identity).restore(template)
    assert_holds(Checkpoints(tmp_path, IDENTITY).restore(arrays(0)), 10)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/below"):
        with pytest.raises(ExperimentError, match=f"cannot write {folder}: "):
            Checkpoints(Path(folder), IDENTITY)
