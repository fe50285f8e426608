import dataclasses
import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorboardX
from flax import nnx
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments import ExperimentError, checkpoints
from experiments.trainer import TrainConfig

SCRIPT = Path(__file__).with_name("toy.py")
SPEC = importlib.util.spec_from_file_location("experiments.toy", SCRIPT)
toy = sys.modules["experiments.toy"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(toy)
CONFIG = toy.PRESETS["demo"]  # 50 steps, 4 in a dispatch, a checkpoint every 10, an evaluation every 20


class InterruptionError(Exception):
    pass


def batches_until(stop):
    def batches(step):
        if step == stop:
            raise InterruptionError
        return toy.batches(step)

    return batches


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    """The same few functions are compiled by every run here."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield options
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return toy.train(folder), folder


def assert_same_bits(fit, other):
    assert toy.bits(fit.models) == toy.bits(other.models)
    assert json.dumps(fit.history) == json.dumps(other.history)


def scalars(folder):
    """What TensorBoard's reader sees: for each member and name the (step, value) pairs; purging nothing."""
    found = {}
    for member in sorted((folder / "tensorboard").iterdir()):
        reader = EventAccumulator(str(member), purge_orphaned_data=False).Reload()
        for name in reader.Tags()["scalars"]:
            found[member.name, name] = [(event.step, event.value) for event in reader.Scalars(name)]
    return found


def test_learns_and_records(whole):
    fit, _ = whole
    assert [row["step"] for row in fit.history] == [20, 40, 50]
    assert set(fit.history[0]) == {"step", "train/loss", "train/draw", "evaluate/error"}
    first, last = (np.array(row["evaluate/error"]) for row in (fit.history[0], fit.history[-1]))
    assert last[2] < 0.5 * first[2]  # the member with the high learning rate
    assert len(set(last)) == 3
    assert fit.diverged == [None] * 3
    assert fit.seconds > 0
    chex.assert_trees_all_close(toy.evaluate(fit.models)["error"], last, rtol=1e-5)
    chex.assert_shape(fit.models.scale[...], (3, 3))


def test_a_member_is_a_plain_optax_loop(whole):
    """Member 2 alone, step by step, without vmap and scan."""
    seed, learning_rate = CONFIG.seeds[2], CONFIG.learning_rates[2]
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, CONFIG.warmup_steps, CONFIG.steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(CONFIG.clip_norm), optax.adamw(schedule, weight_decay=CONFIG.weight_decay)
    )
    create_key, key = jax.random.split(jax.random.key(seed))
    graph, params, rest = nnx.split(toy.create(create_key), nnx.Param, ...)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch, key):
        gradients = jax.grad(lambda params: toy.loss(nnx.merge(graph, params, rest), batch, key)[0])(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for index in range(CONFIG.steps):
        batch = jax.tree.map(lambda array: array[2], toy.batches(index))
        params, state = step(params, state, batch, jax.random.fold_in(key, index))
    trained = jax.tree.map(lambda array: array[2], nnx.state(whole[0].models, nnx.Param))
    chex.assert_trees_all_close(nnx.to_pure_dict(params), nnx.to_pure_dict(trained), rtol=1e-4, atol=1e-5)


def test_same_seed_same_bits(whole, tmp_path):
    assert_same_bits(toy.train(tmp_path), whole[0])
    other = toy.train(tmp_path / "other", dataclasses.replace(CONFIG, seeds=(0, 1, 2)))
    assert toy.bits(other.models) != toy.bits(whole[0].models)


def test_keys_are_of_the_seed_and_the_step(tmp_path):
    fit = toy.train(tmp_path, dataclasses.replace(CONFIG, steps=6, evaluate_every=1))
    draws = np.array([row["train/draw"] for row in fit.history])
    assert np.array_equal(draws[:, 1], draws[:, 2])
    assert len(np.unique(draws)) == 12


def test_interrupted_at_any_step_ends_with_the_same_bits(whole, tmp_path):
    for stop in (0, 10, 23, 49):
        with pytest.raises(InterruptionError):
            toy.train(tmp_path, batches=batches_until(stop))
    assert_same_bits(toy.train(tmp_path), whole[0])
    assert scalars(tmp_path) == scalars(whole[1])
    done = toy.train(tmp_path, batches=batches_until(0))  # nothing is left to train
    assert_same_bits(done, whole[0])


def test_killed_at_any_moment_ends_with_the_same_bits(tmp_path, compilation_cache):
    moments = {
        "events": "open:000000020:2",  # events of one member of three are written
        "write": "os.rename:30.orbax-checkpoint-tmp/:1",  # a part of the checkpoint is there
        "commit": "os.rename:30.orbax-checkpoint-tmp:3",  # all of it is there, under its temporary name
    }

    def start(folder, **environment):
        command = [sys.executable, str(SCRIPT), "--folder", str(folder)]
        cache = {name.upper(): str(value) for name, value in compilation_cache.items()}
        environment = os.environ | {"JAX_PLATFORMS": "cpu"} | cache | environment
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)

    def finish(process):
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        return json.loads(Path(output.split("result: ")[1].strip()).read_text())["metrics"]

    reference = start(tmp_path / "whole")
    for name, moment in moments.items():
        process = start(tmp_path / "killed", KILL=moment)
        assert process.wait(120) == -signal.SIGKILL, (name, process.communicate())
        process.communicate()
        rest = list((tmp_path / "killed" / "checkpoints").glob("*tmp"))
        assert bool(rest) == (name in ("write", "commit"))
    assert finish(start(tmp_path / "killed")) == finish(reference)
    assert scalars(tmp_path / "killed") == scalars(tmp_path / "whole")


def test_scalars_are_seen_once_and_in_order(whole):
    fit, folder = whole
    seen = scalars(folder)
    assert len(seen) == 3 * 3
    for index, member in enumerate(("0-seed0-rate0.01", "1-seed1-rate0.01", "2-seed1-rate0.1")):
        assert [step for step, _ in seen[member, "train/loss"]] == [
            *(4, 8, 10, 12, 16, 20, 24, 28, 30, 32, 36, 40, 44, 48, 50)
        ]
        expected = [(row["step"], np.float32(row["evaluate/error"][index])) for row in fit.history]
        assert seen[member, "evaluate/error"] == expected


def newest_values(folder):
    """The largest file of the newest checkpoint's arrays: one with values."""
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    return max((newest / "arrays" / "d").iterdir(), key=lambda path: path.stat().st_size)


def test_a_damaged_checkpoint_changes_nothing_but_the_time(whole, tmp_path, caplog):
    with pytest.raises(InterruptionError):
        toy.train(tmp_path, batches=batches_until(48))
    path = newest_values(tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InterruptionError):
        toy.train(tmp_path, batches=batches_until(30))
    assert "checkpoints/40 is damaged" in caplog.text
    assert {pairs[-1][0] for (_, name), pairs in scalars(tmp_path).items() if name == "train/loss"} == {30}
    assert_same_bits(toy.train(tmp_path), whole[0])
    assert scalars(tmp_path) == scalars(whole[1])


def test_all_checkpoints_damaged_starts_again(whole, tmp_path, caplog):
    with pytest.raises(InterruptionError):
        toy.train(tmp_path, batches=batches_until(48))
    for path in (tmp_path / "checkpoints").glob("*/manifest/metadata"):
        path.write_text("{}")
    assert_same_bits(toy.train(tmp_path), whole[0])
    assert "starting from the beginning" in caplog.text
    assert scalars(tmp_path) == scalars(whole[1])


def test_another_run_in_the_folder_is_refused(whole):
    _, folder = whole
    for message, changes in {
        "steps was 50, is 60": {"config": dataclasses.replace(CONFIG, steps=60)},
        "learning_rates was": {"learning_rates": (0.1, 0.1, 0.1)},
        r"seeds was \[0, 1, 1\], is \[0, 1\]": {"seeds": (0, 1), "learning_rates": (0.1, 0.1)},
        r"params/layers/0/kernel was float32\[3, 3, 8\], is": {
            "create": lambda key: nnx.Linear(3, 2, rngs=nnx.Rngs(key))
        },
    }.items():
        with pytest.raises(ExperimentError, match=f"{message}.*another --folder.*--fresh"):
            toy.train(folder, **{"config": CONFIG} | changes)


def test_a_member_that_diverges_is_named_and_the_others_go_on(whole, tmp_path, caplog):
    def batches(step):
        batch = toy.batches(step)
        batch["y"][1] += np.nan if step == 17 else 0
        return batch

    with pytest.raises(InterruptionError):
        toy.train(tmp_path, batches=lambda step: batches(step) if step < 33 else batches_until(step)(step))
    assert "1-seed1-rate0.01 diverged: its loss is not finite at step 17" in caplog.text
    caplog.clear()
    fit = toy.train(tmp_path, batches=batches)
    assert caplog.text == ""  # said once, remembered
    assert fit.diverged == [None, 17, None]
    error, expected = (np.array(each.history[-1]["evaluate/error"]) for each in (fit, whole[0]))
    np.testing.assert_array_equal(error, [expected[0], np.nan, expected[2]])


def test_every_member_diverging_is_an_error(tmp_path):
    with pytest.raises(ExperimentError, match="every member diverged by step 3; lower the learning rates"):
        toy.train(tmp_path, loss=lambda model, batch, key: (jnp.nan * jnp.sum(model(batch["x"])), {}))


def test_misuse(tmp_path):
    with pytest.raises(ValueError, match="one seed and one learning rate per member"):
        toy.train(tmp_path, seeds=(1, 2), learning_rates=(0.1,))
    with pytest.raises(ValueError, match="one seed and one learning rate per member"):
        toy.train(tmp_path, seeds=(), learning_rates=())
    with pytest.raises(ValueError, match=r"evaluate metric 'error': expected shape \(3,\), got \(\)"):
        toy.train(tmp_path, evaluate=lambda models: {"error": 0.5})
    with pytest.raises(ValueError, match="steps_per_call must be at least 1, got 0"):
        TrainConfig(steps_per_call=0)
    with pytest.raises(ValueError, match=r"warmup_steps must be in \[0, steps\), got 50 with steps=3"):
        TrainConfig(steps=3)


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/below"])
def test_unwritable_folder(tmp_path, where):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExperimentError, match=f"^cannot write .*{where}.*: .*(exists|directory)") as error:
        toy.train(tmp_path / where)
    assert "\n" not in str(error.value)


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from Orbax's threads
@pytest.mark.parametrize("spare", [checkpoints.SPARE, 0])  # without spare space Orbax meets the full disk itself
def test_full_disk(whole, small_disk, monkeypatch, spare):
    def evaluate(models):  # at step 20, between the checkpoints of 10 and 20
        if not filler.exists():
            filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 2**15))
        return toy.evaluate(models)

    filler = small_disk / "filler"
    monkeypatch.setattr(checkpoints, "SPARE", spare)
    for _ in range(2):
        with pytest.raises(ExperimentError, match=rf"^cannot write {small_disk}/\S*20: No space left on device$"):
            toy.train(small_disk, evaluate=evaluate)
    filler.unlink()
    assert_same_bits(toy.train(small_disk), whole[0])
    assert scalars(small_disk) == scalars(whole[1])


@pytest.mark.parametrize("writer", [(tensorboardX.RecordWriter, "write"), (checkpoints.ocp.CheckpointManager, "save")])
def test_full_disk_wherever_it_shows(whole, tmp_path, monkeypatch, writer):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(InterruptionError):
        toy.train(tmp_path, batches=batches_until(22))
    with monkeypatch.context() as patch:
        patch.setattr(*writer, full)
        with pytest.raises(ExperimentError, match=rf"^cannot write {tmp_path}/\S*30: No space left on device$"):
            toy.train(tmp_path)
    assert_same_bits(toy.train(tmp_path), whole[0])


def test_progress_in_a_log_is_a_few_lines(tmp_path, capfd):
    toy.train(tmp_path, label="toys")
    lines = [line for line in capfd.readouterr().err.splitlines() if "toys" in line]
    assert lines[-1].startswith("toys: step 50 of 50, ")
    assert "loss=" in lines[-1]
    assert len(lines) <= 3
