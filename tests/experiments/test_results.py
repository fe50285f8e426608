import errno
import json
import os
import pathlib
import statistics

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ExperimentError
from experiments.results import environment, summary, table, write_json


def strict(path):
    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_summary_is_mean_and_sample_deviation():
    values = [0.9, 0.8, 0.95]
    found = summary(jnp.asarray(values))
    assert found["values"] == pytest.approx(values)
    assert found["mean"] == pytest.approx(statistics.mean(values))
    assert found["std"] == pytest.approx(statistics.stdev(values))
    assert summary([0.5]) == {"values": [0.5], "mean": 0.5, "std": None}


def test_json_is_strict_and_names_what_is_not_finite(tmp_path):
    content = {
        "accuracy": summary([0.5, np.nan]),
        "loss": [np.float32(0.5), jnp.inf, {"deep": -np.inf}],
        "count": np.int64(3),
        "array": jnp.arange(3, dtype=jnp.bfloat16),
        "folder": pathlib.Path("a/b"),
        "options": {"seeds": (1, 2), "flag": True, "none": None},
    }
    write_json(tmp_path / "new" / "result.json", content)
    assert strict(tmp_path / "new" / "result.json") == {
        "accuracy": {"values": [0.5, None], "mean": None, "std": None},
        "loss": [0.5, None, {"deep": None}],
        "count": 3,
        "array": [0, 1, 2],
        "folder": "a/b",
        "options": {"seeds": [1, 2], "flag": True, "none": None},
        "not_finite": {
            "accuracy/values/1": "nan",
            "accuracy/mean": "nan",
            "accuracy/std": "nan",
            "loss/1": "inf",
            "loss/2/deep": "-inf",
        },
    }


def test_json_refuses_what_it_cannot_say(tmp_path):
    with pytest.raises(TypeError, match=r"metrics/model: .*got object"):
        write_json(tmp_path / "result.json", {"metrics": {"model": object()}})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExperimentError, match=f"^cannot write {path}: No space left on device$"):
        write_json(path, {"a": 2})
    assert strict(path) == {"a": 1}


def test_a_write_into_a_file_as_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExperimentError, match=r"cannot write .*/file/result.json: (File exists|Not a directory)"):
        write_json(tmp_path / "file" / "result.json", {})


def test_environment_is_complete(tmp_path):
    found = environment()
    write_json(tmp_path / "environment.json", found)
    assert set(found["versions"]) == {
        *(
            "seqzoo",
            "python",
            "jax",
            "jaxlib",
            "flax",
            "optax",
            "orbax-checkpoint",
            "grain",
            "tensorflow-datasets",
            "numpy",
        )
    }
    assert found["machine"]["cores"] == os.cpu_count()
    assert found["machine"]["memory_bytes"] > 1e8
    assert found["machine"]["cpu"]
    assert found["machine"]["jax_devices"]
    assert found["commit"] is None or len(found["commit"].removesuffix("-dirty")) == 40


def test_table_aligns_and_rounds_to_the_deviation():
    rows = [
        {"model": "Aaren", "accuracy": {"mean": 0.96344, "std": 0.0042}, "parameters": 3152896, "µs": 12.3456},
        {"model": "Transformer", "accuracy": {"mean": 0.95, "std": None}, "parameters": 3152384},
        {"model": "diverged", "accuracy": {"mean": None, "std": None}, "µs": 123456.0},
        {"model": "large", "accuracy": {"mean": 1234.5, "std": 99.6}, "parameters": 0},
        {"model": "constant", "accuracy": {"mean": 1.0, "std": 0.0}},
    ]
    assert table(rows).splitlines() == [
        "| model       | accuracy        | parameters | µs        |",
        "|-------------|-----------------|------------|-----------|",
        "| Aaren       | 0.9634 ± 0.0042 | 3,152,896  | 12.35     |",
        "| Transformer | 0.95            | 3,152,384  | -         |",
        "| diverged    | not finite      | -          | 1.235e+05 |",
        "| large       | 1234 ± 100      | 0          | -         |",
        "| constant    | 1 ± 0           | -          | -         |",
    ]


def test_table_from_the_file(tmp_path):
    write_json(tmp_path / "result.json", {"rows": [{"a": summary([1, 2, 3]), "b": summary([1, np.inf])}]})
    assert table(strict(tmp_path / "result.json")["rows"]).splitlines()[-1] == "| 2.0 ± 1.0 | not finite |"
    assert table([{"rate": {"mean": float("nan"), "std": float("nan")}}]).splitlines()[-1] == "| not finite |"
