"""Trajectories: our searches and tiers, sets of D4RL in the published format, windows, environments."""

import dataclasses
import sys

import gymnasium
import numpy as np
import pytest

from experiments.data import reinforcement
from experiments.data.reinforcement import (
    Episode,
    Policy,
    Search,
    check_trajectories,
    list_trajectories,
    load_trajectories,
    make_environment,
    roll_out,
    search,
    trajectory_batches,
    trajectory_windows,
)

SMALL = Search(0.02, 0.1, directions=2, top=2, steps=3000, size=1200, action_noise=0.0)
h5py = pytest.importorskip("h5py")


def total(episode):
    return float(episode.rewards.sum())


def toy(lengths=(3, 5, 2, 4, 6, 1, 3, 2, 5, 4, 3, 2)):
    """Observations count time steps over all episodes, actions their negatives."""
    generator, episodes, start = np.random.default_rng(0), [], 0
    for length in lengths:
        observations = np.float32(start) + np.arange(length, dtype=np.float32)[:, None]
        episodes.append(Episode(observations, -observations, generator.normal(size=length).astype(np.float32), True))
        start += length
    facts = {"discrete": False, "random_return": -1.0, "expert_return": 3.0, "source": "nowhere"}
    return episodes, reinforcement._flatten("Toy", "MountainCar", episodes, **facts)


# Windows


def test_returns_are_to_go_and_a_tenth_is_held_out():
    episodes, data = toy()
    expected = np.concatenate(
        [[episode.rewards[t:].sum() for t in range(len(episode.rewards))] for episode in episodes]
    )
    np.testing.assert_allclose(data.returns, expected, atol=1e-5)
    np.testing.assert_allclose(data.episode_returns, [total(episode) for episode in episodes], atol=1e-5)
    assert data.scale == pytest.approx(max(abs(total(episode)) for episode in episodes), rel=1e-5)
    held_out = episodes[9].observations[:, 0]  # the tenth of twelve
    np.testing.assert_array_equal(data.observations[data.splits["validation"]][:, 0], held_out)
    np.testing.assert_array_equal(np.sort(np.concatenate([*data.splits.values()])), np.arange(len(data.returns)))
    few = toy((3, 2))[1]
    assert [len(few.splits[split]) for split in ("train", "validation")] == [3, 2]
    with pytest.raises(ValueError, match="at least two episodes"):
        toy((3,))


def test_windows_stay_within_their_episode():
    _, data = toy()
    batch = trajectory_batches(data, 64, context=4, seed=[0, 1])[5]
    again = trajectory_batches(data, 64, context=4, seed=1)[5]
    for name, values in batch.items():
        assert values.shape[:3] == (2, 64, 4), name
        assert values.dtype == (np.int32 if name in ("timesteps", "segment_ids") else np.float32), name
        np.testing.assert_array_equal(values[1], again[name])
    assert np.any(batch["returns"][0] != batch["returns"][1])
    real, index = batch["segment_ids"] == 0, -batch["actions"][..., 0].astype(int)  # actions tell where they are
    np.testing.assert_array_equal(real[..., 0], True)
    assert np.isin(index[real], data.splits["train"]).all()
    np.testing.assert_array_equal(batch["timesteps"][real], data.timesteps[index[real]])
    np.testing.assert_allclose(batch["returns"][real], data.returns[index[real]] / data.scale, rtol=1e-6)
    np.testing.assert_array_equal(batch["observations"][real], data.normalise(data.observations[index[real]]))
    np.testing.assert_array_equal(batch["previous_actions"][..., 0, :], 0)
    later = real[..., 1:]
    np.testing.assert_array_equal(np.diff(index)[later], 1)
    np.testing.assert_array_equal(np.diff(batch["timesteps"])[later], 1)
    np.testing.assert_array_equal(batch["previous_actions"][..., 1:, :][later], batch["actions"][..., :-1, :][later])
    shorter = data.ends[index[..., 0]] - index[..., 0]
    np.testing.assert_array_equal(real.sum(axis=-1), np.minimum(shorter, 4))  # no step is padded away


def test_validation_windows_are_spaced_evenly():
    _, data = toy((20,) * 10)
    windows = trajectory_windows(data, "validation", 5, context=3)
    np.testing.assert_array_equal(windows["timesteps"][:, 0], [0, 5, 10, 14, 19])
    assert len(trajectory_windows(data, "validation", 500, context=3)["returns"]) == 20


def test_observations_are_normalised_over_the_training_steps():
    _, data = toy()
    seen = data.normalise(data.observations[data.splits["train"]])
    np.testing.assert_allclose([seen.mean(), seen.std()], [0, 1], atol=1e-5)
    constant = dataclasses.replace(data, observations=np.full_like(data.observations, 7))
    np.testing.assert_array_equal(constant.normalise(constant.observations), 0)


# Our sets


def test_search_learns_and_an_episode_comes_back():
    environment = make_environment("CartPole")
    trials = search(environment, SMALL, "test")
    stations = [trial.total for trial in trials if not trial.perturbed]
    assert np.mean(stations[-3:]) > 2 * stations[0]
    assert sum(trial.length for trial in trials) >= SMALL.steps
    assert len(trials) % (1 + 2 * SMALL.directions) == 0
    for trial in trials[:: len(trials) // 5]:
        episode, _ = roll_out(environment, trial.policy.act(), trial.seed)
        assert (total(episode), len(episode.rewards)) == (trial.total, trial.length)
    again = search(environment, SMALL, "test")
    np.testing.assert_array_equal([trial.total for trial in trials], [trial.total for trial in again])


def test_a_step_of_the_search_is_that_of_the_paper(monkeypatch):
    """On scores that are linear in the weights, whatever the environment."""
    slope = np.random.default_rng(1).normal(size=(2, 4))

    def roll(environment, act, seed):
        columns = (act(unit) - act(np.zeros(4)) for unit in np.eye(4))
        reward = float(np.sum(slope * np.stack([*columns], axis=1)))
        return Episode(np.zeros((1, 4), np.float32), np.zeros((1, 2)), np.array([reward + 5.0]), True), 5.0

    monkeypatch.setattr(reinforcement, "roll_out", roll)
    options = Search(0.5, 0.1, directions=4, top=2, steps=10)
    trials = search(make_environment("CartPole"), options, "test")
    assert len(trials) == 2 * 9
    center, later = trials[0].policy.weights, trials[9].policy.weights
    np.testing.assert_array_equal(center, 0)
    up = np.array([trial.total for trial in trials[1:5]]) - 5
    directions = np.stack([trial.policy.weights for trial in trials[1:5]]) / 0.1
    np.testing.assert_allclose([-trial.total + 5 for trial in trials[5:9]], up, rtol=1e-6)
    best = np.argsort(-np.abs(up))[:2]
    expected = 0.5 / (2 * np.std([up[best], -up[best]])) * np.einsum("k,kij->ij", 2 * up[best], directions[best])
    np.testing.assert_allclose(later, expected, rtol=1e-5)


def test_our_sets_are_made_once_and_read_without_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setitem(reinforcement._SEARCHES, "CartPole", SMALL)
    sets = {tier: load_trajectories(f"CartPole-own-{tier}", data_dir=tmp_path) for tier in reinforcement.TIERS}
    assert "tensorflow" not in sys.modules
    for tier, data in sets.items():
        assert data.discrete
        np.testing.assert_array_equal(data.actions.sum(axis=1), 1)
        assert (data.observations.shape[1], data.actions.shape[1]) == (4, 2), tier
        assert len(data.returns) >= 100, tier
        assert data.random_return < data.expert_return
        np.testing.assert_array_equal(data.episode_returns, np.diff(np.flatnonzero(np.append(data.timesteps, 0) == 0)))
    assert sets["medium-replay"].episode_returns.mean() < sets["medium"].episode_returns.mean()
    assert sets["medium-expert"].episode_returns.mean() >= sets["medium"].episode_returns.mean()
    monkeypatch.setattr(reinforcement, "make_trajectories", lambda *_: pytest.fail("was made again"))
    again = load_trajectories("CartPole-own-medium", data_dir=tmp_path)
    np.testing.assert_array_equal(again.observations, sets["medium"].observations)
    digest = reinforcement._digest("CartPole")
    monkeypatch.setitem(reinforcement._SEARCHES, "CartPole", SMALL._replace(seed=1))
    assert reinforcement._digest("CartPole") != digest


# Environments


def test_actions_are_vectors_in_the_unit_box():
    for name, size in {"CartPole": 2, "MountainCar": 1, "Hopper": 3}.items():
        if name in reinforcement._MUJOCO:
            pytest.importorskip("mujoco")
        environment = make_environment(name)
        assert environment.action_space.shape == (size,)
        assert (environment.action_space.low.min(), environment.action_space.high.max()) == (-1, 1)
    cart = make_environment("CartPole")
    velocity = [cart.reset(seed=0) and cart.step(np.eye(2)[choice])[0][1] for choice in (0, 1)]
    assert velocity[0] < velocity[1]
    assert isinstance(cart.unwrapped.action_space, gymnasium.spaces.Discrete)


def test_mujoco_runs_without_a_display_and_leaves_no_file(tmp_path, monkeypatch):
    pytest.importorskip("mujoco")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.chdir(tmp_path)
    cheetah = make_environment("HalfCheetah")
    act = Policy(np.ones((6, 17)), np.zeros(17), np.ones(17)).act()
    episodes = [roll_out(cheetah, act, 3)[0] for _ in range(2)]
    np.testing.assert_array_equal(episodes[0].rewards, episodes[1].rewards)
    assert len(episodes[0].rewards) == 1000
    assert not episodes[0].terminal
    episode, survival = roll_out(make_environment("Hopper"), lambda _: np.ones(3), 0)
    assert episode.terminal
    assert survival == pytest.approx(len(episode.rewards), abs=1)
    ant = make_environment("Ant")
    assert ant.observation_space.shape == make_environment("ant").observation_space.shape == (27,)
    assert not list(tmp_path.iterdir())


# Sets of D4RL


def write_published(folder, *, name="hopper_medium_replay-v2", observation=11, action=3, **changes):
    steps = 9
    arrays = {
        "observations": np.arange(steps * observation, dtype=np.float32).reshape(steps, observation),
        "actions": np.zeros((steps, action), np.float32),
        "rewards": np.arange(steps, dtype=np.float32),
        "terminals": np.isin(np.arange(steps), [2]),
        "timeouts": np.isin(np.arange(steps), [6]),
    } | changes
    with h5py.File(folder / f"{name}.hdf5", "w") as file:
        for key, values in arrays.items():
            if values is not None:
                file[key] = values


@pytest.fixture
def small(monkeypatch):
    """Files of a few steps count as whole."""
    monkeypatch.setattr(reinforcement, "_D4RL_LEAST", dict.fromkeys(reinforcement.TIERS, 9))


def load_published(name, folder):
    return load_trajectories(name, source_folder=folder, data_dir=folder / "data")


@pytest.mark.usefixtures("small")
def test_published_sets_are_read(tmp_path):
    write_published(tmp_path)
    data = load_published("hopper-medium-replay-v2", tmp_path)
    assert data.episode_returns.tolist() == [0 + 1 + 2, 3 + 4 + 5 + 6]  # the last has no end
    assert data.timesteps.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert (data.random_return, data.expert_return) == (-20.27, 3234.3)
    assert data.environment == "hopper"
    write_published(tmp_path, name="ant_medium-v2", observation=111, action=8)
    ant = load_published("ant-medium-v2", tmp_path)
    assert ant.observations.shape == (7, 27)
    np.testing.assert_array_equal(ant.observations[1], 111 + np.arange(27))
    assert ant.random_return is None
    write_published(tmp_path, rewards=np.ones(9, np.float32))  # another file of the same name
    assert load_published("hopper-medium-replay-v2", tmp_path).episode_returns.tolist() == [3, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timeouts": None}, "timeouts are missing"),
        ({"actions": np.zeros((9, 4))}, r"expected arrays of shapes \(\(9, 11\), \(9, 3\)"),
        ({"terminals": np.zeros(9, bool)}, "at least two episodes"),
    ],
)
@pytest.mark.usefixtures("small")
def test_other_files_are_refused(tmp_path, changes, message):
    write_published(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_published("hopper-medium-replay-v2", tmp_path)
    assert not (tmp_path / "data").exists()


def test_parts_of_files_are_refused(tmp_path):
    write_published(tmp_path)
    with pytest.raises(ValueError, match="expected at least 200,000 steps, got 9"):
        load_published("hopper-medium-replay-v2", tmp_path)


def test_names(tmp_path):
    names = list_trajectories()
    assert len([name for name in names if name.endswith("-v2")]) == 12
    assert not {name for name in names if "own" in name} & {name for name in names if name.endswith("-v2")}
    with pytest.raises(ValueError, match="did you mean Hopper-own-medium"):
        check_trajectories("Hopper-own-mediun")
    with pytest.raises(FileNotFoundError, match=r"put its published file, walker2d_medium_expert-v2\.hdf5"):
        check_trajectories("walker2d-medium-expert-v2")
    with pytest.raises(FileNotFoundError, match="it is not in"):
        check_trajectories("walker2d-medium-expert-v2", tmp_path)
    with pytest.raises(ValueError, match="source_folder: expected a folder"):
        check_trajectories("walker2d-medium-expert-v2", tmp_path / "none")
