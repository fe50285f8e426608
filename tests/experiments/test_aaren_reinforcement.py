"""The setting of reinforcement learning: episodes that stream, losses, scores, the choice of a rate, what is shown."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import aaren_reinforcement
from experiments.aaren_reinforcement import CLONING, Config
from experiments.comparison import name_of
from experiments.data import reinforcement
from experiments.data.reinforcement import Episode
from experiments.measure import count_parameters
from experiments.results import summary, write_json

TINY = Config(
    dataset=("MountainCar-own-medium",), seeds=2, learning_rates=(1e-3, 1e30), steps=2, batch_size=4, context=4,
    episodes=2, episodes_without_restarts=1, episode_steps=10, validation_windows=6, width=8, layers=1, heads=2,
    hidden=8, dropout=0.0,
)  # fmt: skip


def trajectories(discrete=False, lengths=(12, 9, 14, 10)):
    generator, episodes = np.random.default_rng(0), []
    for length in lengths:
        actions = generator.uniform(-1, 1, (length, 3))
        actions = np.eye(3)[actions.argmax(axis=1)] if discrete else actions
        columns = generator.normal(size=(length, 2)), actions, generator.normal(size=length) + 1
        episodes.append(Episode(*(np.asarray(column, np.float32) for column in columns), terminal=True))
    facts = {"discrete": discrete, "random_return": -10.0, "expert_return": 30.0, "source": "nowhere"}
    return reinforcement._flatten("Toy", "Toy", episodes, **facts)


class Script:
    """An environment with written observations and rewards, which notes the actions."""

    def __init__(self, length):
        self.length, self.actions = length, []

    def reset(self, *, seed):
        generator = np.random.default_rng(seed)
        self.observations = generator.normal(size=(self.length + 1, 2)).astype(np.float32)
        self.rewards = generator.normal(size=self.length)
        return self.observations[0], {}

    def step(self, action):
        assert len(self.actions) < self.length, "went on after its end"
        self.actions.append(action)
        step = len(self.actions)
        return self.observations[step], self.rewards[step - 1], step == self.length, False, {}


def models_of(model, data):
    """Two members whose actions are far from zero."""

    def build(key):
        return aaren_reinforcement.create_policy(model, data, TINY, key)

    generator = np.random.default_rng(3)

    def fill(leaf):
        return jnp.asarray(generator.normal(size=(2, *leaf.shape)), jnp.float32)

    return jax.tree.map(fill, jax.eval_shape(build, jax.random.key(0)))


# Episodes


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("model", ["aaren", "transformer"])
def test_streamed_actions_are_those_of_the_whole_sequence(model, discrete, monkeypatch):
    """Of each stretch between restarts of the state, which is a window as in training; and of a whole episode."""
    data, lengths = trajectories(discrete), (10, 7, 10, 5)
    models = models_of(model, data)
    whole = jax.jit(jax.vmap(lambda model, *inputs: model(*inputs)[0]))
    for restart_every in (4, 10) if not discrete else (4,):
        scripts = [Script(length) for length in lengths]
        waiting = iter(scripts)
        monkeypatch.setattr(aaren_reinforcement, "make_environment", lambda _, waiting=waiting: next(waiting))
        found = aaren_reinforcement.play(models, data, TINY, 2, restart_every, "test")
        np.testing.assert_allclose(np.ravel(found), [script.rewards.sum() for script in scripts], rtol=1e-6)

        def padded(column):
            return np.reshape([np.resize(row, (10, *np.shape(row)[1:])) for row in column], (2, 2, 10, -1))

        taken = padded([np.array(script.actions, np.float32) for script in scripts])
        observations = data.normalise(padded([script.observations[:-1] for script in scripts]))
        had = np.cumsum(padded([script.rewards for script in scripts])[..., 0], axis=-1)
        wanted = (30 - np.concatenate([np.zeros((2, 2, 1)), had[..., :-1]], axis=-1)) / data.scale
        for start in range(0, 10, restart_every):
            part = np.s_[:, :, start : start + restart_every]
            previous = np.concatenate([np.zeros_like(taken[:, :, :1]), taken[part][:, :, :-1]], axis=2)
            timesteps = np.broadcast_to(np.arange(10)[start : start + restart_every], wanted[part].shape)
            inputs = wanted[part].astype(np.float32), observations[part], previous, timesteps
            expected = np.asarray(whole(models, *inputs))
            if discrete:
                expected = np.eye(3)[expected.argmax(axis=-1)]
            else:
                assert np.std(expected) > 0.1
            for place, length in zip(np.ndindex(2, 2), lengths, strict=True):
                real = max(0, length - start)
                np.testing.assert_allclose(taken[part][place][:real], expected[place][:real], atol=1e-4)


def test_models_play_from_the_same_starts_in_different_seeds(monkeypatch):
    seeds = []

    class Noting(Script):
        def reset(self, *, seed):
            seeds.append(seed)
            return super().reset(seed=seed)

    monkeypatch.setattr(aaren_reinforcement, "make_environment", lambda _: Noting(3))
    data = trajectories()
    returns = [aaren_reinforcement.play(models_of(CLONING, data), data, TINY, 2, 4, "test") for _ in range(2)]
    np.testing.assert_array_equal(*returns)
    assert seeds[:4] == seeds[4:]
    assert len(set(seeds)) == 4


# Losses and scores


def test_loss_is_the_mean_over_real_steps():
    data = trajectories()
    batch = reinforcement.trajectory_windows(data, "validation", 8, context=6)
    model = jax.tree.map(lambda x: x[0], models_of(CLONING, data))
    actions, _ = model(None, batch["observations"], None, None)
    real = batch["segment_ids"] == 0
    assert 0 < real.mean() < 1
    expected = np.mean((np.asarray(actions) - batch["actions"])[real] ** 2)
    assert float(aaren_reinforcement.action_loss(model, batch)) == pytest.approx(expected, rel=1e-5)
    choices = trajectories(discrete=True)
    even = jax.tree.map(jnp.zeros_like, jax.tree.map(lambda x: x[0], models_of(CLONING, choices)))
    batch = reinforcement.trajectory_windows(choices, "validation", 8, context=6)
    assert float(aaren_reinforcement.action_loss(even, batch)) == pytest.approx(math.log(3), rel=1e-5)


def test_scores_and_targets():
    data = trajectories()
    assert aaren_reinforcement.score(np.array([-10, 10, 30]), data).tolist() == [0, 50, 100]
    best = data.episode_returns.max()
    assert aaren_reinforcement.target_return(data, TINY) == 30
    assert aaren_reinforcement.target_return(data, dataclasses.replace(TINY, target="best")) == best
    unknown = dataclasses.replace(data, random_return=None, expert_return=None)
    assert aaren_reinforcement.target_return(unknown, TINY) == best


# Training


def test_rate_is_chosen_on_held_out_episodes_and_a_run_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(aaren_reinforcement, "make_environment", lambda _: Script(6))
    data = trajectories()
    found = aaren_reinforcement.train(CLONING, data, TINY, tmp_path / "run")
    assert found["learning_rate"] == 1e-3
    assert not found["validation_loss"][1] < found["validation_loss"][0]
    assert len(found["return"]["values"]) == 2
    assert "score_without_restarts" not in found  # there is no state
    np.testing.assert_allclose(found["score"]["values"], 2.5 * (np.array(found["return"]["values"]) + 10))
    monkeypatch.setattr(aaren_reinforcement, "trajectory_batches", lambda *_, **__: {})  # nothing is left to train
    again = aaren_reinforcement.train(CLONING, data, TINY, tmp_path / "run")
    assert again["return"] == found["return"]


def test_all_learn_from_the_same_batches_and_differ_by_a_query(tmp_path, monkeypatch):
    """What `fit` is given, for either model; their numbers of parameters."""
    given = {}

    def fit(create, loss, batches, *_, seeds, learning_rates, **__):
        given[len(given)] = batches(3), seeds, learning_rates, jax.eval_shape(create, jax.random.key(0))
        raise InterruptedError

    monkeypatch.setattr(aaren_reinforcement, "fit", fit)
    for model in ("aaren", "transformer"):
        with pytest.raises(InterruptedError):
            aaren_reinforcement.train(model, trajectories(), TINY, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, given[0][:3], given[1][:3])
    counts = [count_parameters(found[3]) for found in given.values()]
    assert counts[0] - counts[1] == TINY.layers * TINY.width


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dataset": ("hopper-medium-v2",)}, FileNotFoundError, r"put its published file, hopper_medium-v2\.hdf5"),
        ({"dataset": ("Hopper-own-mediun",)}, ValueError, "did you mean Hopper-own-medium"),
        ({"target": "bets"}, ValueError, "target"),
        ({"context": 0}, ValueError, "context: expected positive"),
        ({"heads": 3}, ValueError, "heads: expected a divisor"),
    ],
)
def test_misfits_are_refused_before_a_run(options, error, message):
    with pytest.raises(error, match=message):
        aaren_reinforcement.check(dataclasses.replace(TINY, **options))


def test_presets():
    assert len(aaren_reinforcement.PRESETS["desk"].dataset) == len(aaren_reinforcement.PRESETS["paper"].dataset) == 12
    assert Config() == aaren_reinforcement.PRESETS["desk"]
    aaren_reinforcement.check(aaren_reinforcement.PRESETS["smoke"])


# What is shown


def test_results_are_shown_and_drawn_from_json(tmp_path, monkeypatch):
    values = {"aaren": [10.0, 12.0], "transformer": [20.0, 21.0], CLONING: [5.0, 5.0]}

    def train(model, data, config, folder):
        names = (
            ("return",) if data.expert_return is None else [measure.name for measure in aaren_reinforcement.MEASURES]
        )
        return {name: summary(values[model]) for name in names} | {"learning_rate": 1e-3, "parameters": 12}

    def load(name, **_):
        data = dataclasses.replace(trajectories(), name=name)
        unknown = {"random_return": None, "expert_return": None}
        return dataclasses.replace(data, **unknown) if name == "ant-medium-v2" else data

    monkeypatch.setattr(aaren_reinforcement, "train", train)
    monkeypatch.setattr(aaren_reinforcement, "load_trajectories", load)
    config = dataclasses.replace(TINY, dataset=("Hopper-own-medium", "ant-medium-v2"))
    found = aaren_reinforcement.run(config, tmp_path)
    write_json(tmp_path / "result.json", found)
    (tmp_path / "aaren_reinforcement.png").unlink()
    recorded = json.loads((tmp_path / "result.json").read_text())
    shown = aaren_reinforcement.show(recorded)
    aaren_reinforcement.draw(recorded, tmp_path)
    assert (tmp_path / "aaren_reinforcement.png").stat().st_size > 1000
    assert [name_of(cell) for cell in recorded["cells"]] == ["Hopper-own-medium", "ant-medium-v2"]
    scores, returns, unbroken, facts = (part for part in shown.split("\n\n") if part.startswith("|"))
    assert "ant-medium-v2" not in scores
    assert "ant-medium-v2" in returns
    assert "ant-medium-v2" not in unbroken
    assert "| 11.0 ± 1.4 | 20.50 ± 0.71 |" in returns
    assert "ant-medium-v2" in facts
    monkeypatch.setattr(aaren_reinforcement, "train", lambda *_: pytest.fail("was trained again"))
    assert aaren_reinforcement.run(config, tmp_path)["cells"] == recorded["cells"]
