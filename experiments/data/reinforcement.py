"""Trajectories to learn behaviour from: array_record files on disk, flat arrays in memory, windows as batches.

Ours are of linear policies that we search for here, in gymnasium's environments (HalfCheetah, Hopper, Walker2d and Ant
of MuJoCo; CartPole and MountainCar, the continuous one), in the tiers of D4RL (Justin Fu, Aviral Kumar, Ofir Nachum,
George Tucker, Sergey Levine, 2020, arXiv:2004.07219): `HalfCheetah-own-medium` and so on.

- medium: episodes of the first policy that is half the way from random actions to the best policy, on average over it
  and the four before it in the search;
- medium-replay: of what the search itself went through until then, episodes evenly spaced in time;
- medium-expert: half of the medium ones, and about as many steps of the best policy, *our* expert.

Medium and expert policies act with Gaussian noise, so that what they do differs from time to time, as in D4RL. The
search is Augmented Random Search, V2-t (Horia Mania, Aurelia Guy, Benjamin Recht, 2018, arXiv:1803.07055, algorithm 2),
for a fixed number of steps: a minute or two, which makes no strong policies. Rewards for not having fallen are left
out of what is searched on, as there, and are in the data. Ant's observations lack the contact forces. How good the
policies are is stored with the data: scores of our sets are ``100 (return − random) / (expert − random)`` with *our*
random and expert returns, and cannot be set against D4RL's.

`halfcheetah-medium-v2` and so on are the twelve sets of D4RL. No package ships them: their published HDF5 files are
read from a folder of the user's. Their scores use D4RL's returns, which we have for all environments but Ant. They are
from gym's v2 environments, whose rewards and observations gymnasium's v4 ones have; the 84 contact forces of Ant are
left out, as they are there.

A tenth of the episodes, evenly spaced, is held out for validation.
"""

import dataclasses
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import gymnasium
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float, Float32, Int

from experiments.data.pipelines import stack_members
from experiments.data.prepared import prepare, read_prepared
from experiments.trainer import progress

__all__ = [
    "Episode",
    "Trajectories",
    "TrajectoryData",
    "check_trajectories",
    "list_trajectories",
    "load_trajectories",
    "make_environment",
    "trajectory_batches",
    "trajectory_windows",
]

logger = logging.getLogger(__name__)

TIERS = ("medium", "medium-replay", "medium-expert")
_HOLD_OUT = 10  # every tenth episode
_RANDOM_EPISODES = 20
_TRIED_AGAIN = 5  # policies, and episodes of each
_LASTING = 5  # policies of a search in a row


class Episode(NamedTuple):
    """A time step is an observation, the action then taken (one-hot where it was a choice) and its reward."""

    observations: Float32[np.ndarray, "time observation"]
    actions: Float32[np.ndarray, "time action"]
    rewards: Float32[np.ndarray, " time"]
    terminal: bool  # ended, not cut


@dataclasses.dataclass(frozen=True)
class TrajectoryData:
    """All time steps of a data set, episode after episode.

    Attributes:
        name: of the data set.
        environment: its name for `make_environment`.
        observations: as they are.
        actions: in [-1, 1], or one-hot.
        returns: to go: the sum of the step's and all later rewards of its episode.
        timesteps: of each step in its episode.
        ends: the end of each step's episode.
        splits: the steps of the "train" and the "validation" episodes.
        discrete: whether actions are one-hot.
        random_return: the mean return of random actions, or `None` where it is not known.
        expert_return: that of the reference policy, or `None`.
        source: where the set is from.
    """

    name: str
    environment: str
    observations: Float32[np.ndarray, "steps observation"]
    actions: Float32[np.ndarray, "steps action"]
    returns: Float32[np.ndarray, " steps"]
    timesteps: Int[np.ndarray, " steps"]
    ends: Int[np.ndarray, " steps"]
    splits: Mapping[str, Int[np.ndarray, " chosen"]]
    discrete: bool
    random_return: float | None
    expert_return: float | None
    source: str

    @functools.cached_property
    def episode_returns(self) -> Float32[np.ndarray, " episodes"]:
        """The return of every episode."""
        return self.returns[self.timesteps == 0]

    @functools.cached_property
    def scale(self) -> float:
        """The largest absolute return, by which returns-to-go are divided."""
        return float(np.max(np.abs(self.episode_returns)))

    def normalise(self, observations: Float[np.ndarray, "*shape observation"]) -> Float32[np.ndarray, "*shape"]:
        """Observations with mean 0 and variance 1 over the training steps; those that never change are only shifted."""
        mean, deviation = self._statistics
        return ((observations - mean) / deviation).astype(np.float32)

    @functools.cached_property
    def _statistics(self):
        seen = self.observations[self.splits["train"]].astype(np.float64)
        deviation = seen.std(axis=0)
        return seen.mean(axis=0), np.where(deviation < 1e-6, 1, deviation)


def list_trajectories() -> list[str]:
    """The names of all sets, ours first."""
    return [*_OWN, *_PUBLISHED]


def check_trajectories(name: str, source_folder: str | Path | None = None) -> None:
    """Raise `ValueError` or `FileNotFoundError` for an unknown set, or where its file or a package is not here."""
    if name not in list_trajectories():
        close = difflib.get_close_matches(name, list_trajectories())
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"name: expected one of {', '.join(list_trajectories())}, got {name!r}{hint}")
    mujoco = (_OWN | _PUBLISHED)[name][0] in _MUJOCO
    for package, needed in {"mujoco": mujoco, "h5py": name in _PUBLISHED}.items():
        if needed and importlib.util.find_spec(package) is None:
            raise FileNotFoundError(f"{name} needs {package}: pip install 'gymnasium[mujoco]' h5py")
    if name in _PUBLISHED:
        _locate(name, source_folder)


def load_trajectories(
    name: str, *, data_dir: str | Path = "data", source_folder: str | Path | None = None
) -> TrajectoryData:
    """Load a set; ours is made first where that has not been done, which takes minutes.

    Args:
        name: a name of `list_trajectories`.
        data_dir: where our sets live; safe to share between processes.
        source_folder: a folder that holds the published file of a set of D4RL.

    Raises:
        ValueError: an unknown name or folder, or a file whose arrays are not as published.
        FileNotFoundError: the set is known but its file, or a package, is not here; the message says how to get it.
        RuntimeError: a prepared file is damaged, or there is no space to write one.
    """
    check_trajectories(name, source_folder)
    environment, tier = (_OWN | _PUBLISHED)[name]
    if name in _OWN:
        make = functools.partial(make_trajectories, environment, _SEARCHES[environment])
        directory = Path(data_dir) / Trajectories.name / environment / _digest(environment)
        parts = {"medium": ["medium"], "medium-replay": ["medium_replay"], "medium-expert": ["medium", "expert"]}[tier]
        source = f"a search of {_SEARCHES[environment].steps:,} steps with {_versions(environment)}"
    else:
        file = _locate(name, source_folder)
        make = functools.partial(_read_published, name, file)
        directory = Path(data_dir) / Trajectories.name / name / _digest_file(file)
        parts, source = ["published"], str(source_folder)
    if not directory.exists():
        prepare(functools.partial(Trajectories, *make()), directory)
    episodes = []
    for part in parts:
        info, examples = read_prepared(directory, part)
        episodes += [_episode(example) for example in examples[: -(-len(examples) // len(parts))]]
    return _flatten(name, environment, episodes, source=source, **info.metadata)


def _episode(example: Mapping[str, Any]) -> Episode:
    steps = list(example["steps"])
    columns = (np.stack([step[key] for step in steps]) for key in ("observation", "action", "reward"))
    return Episode(*columns, terminal=bool(steps[-1]["is_terminal"]))


def _check_number(name: str, episodes: Sequence[Episode]) -> None:
    if len(episodes) < 2:
        raise ValueError(f"{name}: expected at least two episodes, one of them to hold out, got {len(episodes)}")


def _flatten(name: str, environment: str, episodes: Sequence[Episode], **facts: Any) -> TrajectoryData:
    _check_number(name, episodes)
    lengths = np.array([len(episode.rewards) for episode in episodes])
    number = np.repeat(np.arange(len(episodes)), lengths)
    held_out = number % _HOLD_OUT == min(_HOLD_OUT, len(episodes)) - 1
    to_go = [np.cumsum(episode.rewards[::-1], dtype=np.float64)[::-1] for episode in episodes]
    return TrajectoryData(
        name=name,
        environment=environment,
        observations=np.concatenate([episode.observations for episode in episodes]),
        actions=np.concatenate([episode.actions for episode in episodes]),
        returns=np.concatenate(to_go).astype(np.float32),
        timesteps=np.concatenate([np.arange(length) for length in lengths]),
        ends=np.repeat(np.cumsum(lengths), lengths),
        splits={"train": np.flatnonzero(~held_out), "validation": np.flatnonzero(held_out)},
        **facts,
    )


# Windows


def trajectory_batches(
    data: TrajectoryData, batch_size: int, *, context: int, seed: int | Sequence[int]
) -> grain.MapDataset:
    """Endless training batches with random access: windows that start at any step, all alike, as in the paper's code.

    Returns:
        A dataset of dicts of float32 `returns [(members) batch context]`, scaled, `observations [… context
        observation]`, normalised, `previous_actions` and `actions [… context action]`; and of int32 `timesteps` and
        `segment_ids [… context]`, 0 for steps and -1 for padding behind the end of an episode.
    """

    def batch(seed: int, step: int) -> dict[str, np.ndarray]:
        return _gather(data, np.random.default_rng((seed, step)).choice(data.splits["train"], batch_size), context)

    return stack_members(batch, seed)


def trajectory_windows(data: TrajectoryData, split: str, windows: int, *, context: int) -> dict[str, np.ndarray]:
    """A batch of windows of a split, which start at evenly spaced steps; of fewer steps, each once."""
    steps = data.splits[split]
    chosen = np.linspace(0, len(steps) - 1, min(windows, len(steps))).round().astype(int)
    return _gather(data, steps[chosen], context)


def _gather(data: TrajectoryData, first: Int[np.ndarray, " batch"], context: int) -> dict[str, np.ndarray]:
    wanted = first[:, None] + np.arange(context)
    real = wanted < data.ends[first][:, None]
    index = np.where(real, wanted, first[:, None])
    actions = data.actions[index]
    return {
        "returns": data.returns[index] / np.float32(data.scale),
        "observations": data.normalise(data.observations[index]),
        "previous_actions": np.concatenate([np.zeros_like(actions[:, :1]), actions[:, :-1]], axis=1),
        "timesteps": data.timesteps[index].astype(np.int32),
        "actions": actions,
        "segment_ids": np.where(real, 0, -1).astype(np.int32),
    }


# Environments


def make_environment(name: str) -> gymnasium.Env:
    """An environment whose actions are vectors in [-1, 1]; where one of several is chosen, it is the largest entry's.

    Runs without a display.
    """
    if name in _MUJOCO:
        import mujoco  # here: only these environments need it

        # By default it writes them to a file MUJOCO_LOG.TXT wherever it runs.
        mujoco.set_mju_user_warning(lambda message: logger.info("MuJoCo: %s", message))
    identity, options = _ENVIRONMENTS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the v4 that D4RL's sets need
        environment = gymnasium.make(identity, disable_env_checker=True, **options)
    space = environment.action_space
    if is_discrete(environment):
        box = gymnasium.spaces.Box(-1, 1, (int(space.n),))
        return gymnasium.wrappers.TransformAction(environment, lambda action: int(np.argmax(action)), box)
    if np.all(space.low == -1) and np.all(space.high == 1):
        return environment
    return gymnasium.wrappers.RescaleAction(environment, np.float32(-1), np.float32(1))


def is_discrete(environment: gymnasium.Env) -> bool:
    """Whether an action is a choice."""
    return isinstance(environment.unwrapped.action_space, gymnasium.spaces.Discrete)


def roll_out(environment: gymnasium.Env, act: Callable[[np.ndarray], np.ndarray], seed: int) -> tuple[Episode, float]:
    """An episode of ``action = act(observation)``, and what of its return was for not having fallen."""
    discrete = is_discrete(environment)
    observation, _ = environment.reset(seed=seed)
    steps, survival, over = [], 0.0, False
    while not over:
        action = act(observation)
        action = np.eye(len(action))[np.argmax(action)] if discrete else np.clip(action, -1, 1)
        following, reward, terminal, cut, info = environment.step(action)
        steps.append((observation, action, reward))
        survival += info.get("reward_survive", 0.0)
        observation, over = following, terminal or cut
    columns = (np.asarray(column, np.float32) for column in zip(*steps, strict=True))
    return Episode(*columns, terminal=bool(terminal)), survival


# Our policies


class Policy(NamedTuple):
    """``π(s) = M (s − μ) / σ``."""

    weights: Float[np.ndarray, "action observation"]
    mean: Float[np.ndarray, " observation"]
    deviation: Float[np.ndarray, " observation"]

    def act(self, noise: Callable[[], np.ndarray | float] = lambda: 0.0) -> Callable[[np.ndarray], np.ndarray]:
        """The function of observations, to which noise is added."""
        gain = self.weights / self.deviation
        return lambda observation: gain @ (observation - self.mean) + noise()


class Trial(NamedTuple):
    """An episode of a search, which its policy and seed bring back."""

    policy: Policy
    seed: int
    length: int
    total: float  # its return
    perturbed: bool  # or of the policy that the search stands at


class Search(NamedTuple):
    """The sizes of a search, those of each tier of data, and the seed of all."""

    step_size: float  # α of the paper
    noise: float  # ν
    directions: int  # N
    top: int  # b
    steps: int  # of the environment
    size: int = 50_000  # steps in a tier
    action_noise: float = 0.1  # of medium and expert policies: a standard deviation
    seed: int = 0


def search(environment: gymnasium.Env, options: Search, label: str) -> list[Trial]:
    """Every episode of Augmented Random Search V2-t (algorithm 2).

    ``M ← M + α / (b σ_R) Σ_k (r(M + νδ_k) − r(M − νδ_k)) δ_k`` over the b best of N directions δ_k, on observations
    normalised by the mean and the variance of all so far; r is the return without what is paid for not having fallen.
    """
    generator = np.random.default_rng(options.seed)
    actions, observations = environment.action_space.shape[0], environment.observation_space.shape[0]
    weights, moments, trials = np.zeros((actions, observations)), np.zeros((3, observations)), []
    with progress(label, 0, options.steps) as bar:
        while (count := moments[0, 0]) < options.steps:
            mean, square = moments[1:] / max(count, 1)
            deviation = np.sqrt(np.maximum(square - mean**2, 0)) if count else np.ones(observations)
            deviation[deviation < 1e-6] = np.inf  # what never changes has no say
            directions = generator.normal(size=(options.directions, *weights.shape))
            offsets = options.noise * np.concatenate([np.zeros((1, *weights.shape)), directions, -directions])
            seeds = generator.integers(2**31, size=1 + options.directions).tolist()
            scores = []
            for offset, seed in zip(offsets, seeds + seeds[1:], strict=True):
                policy = Policy(weights + offset, mean, deviation)
                episode, survival = roll_out(environment, policy.act(), seed)
                total, seen = float(np.sum(episode.rewards, dtype=np.float64)), episode.observations.astype(np.float64)
                trials.append(Trial(policy, seed, len(seen), total, perturbed=bool(scores)))
                scores.append(total - survival)
                moments += [np.full(observations, len(seen)), seen.sum(axis=0), (seen**2).sum(axis=0)]
                bar.update(min(len(seen), options.steps - bar.n))
            bar.set_postfix({"return": f"{trials[-len(scores)].total:.0f}"}, refresh=False)
            up, down = np.reshape(scores[1:], (2, -1))
            best = np.argsort(-np.maximum(up, down), kind="stable")[: options.top]
            deviation_of_scores = max(np.std([up[best], down[best]]), 1e-8)
            step = options.step_size / (options.top * deviation_of_scores)
            weights = weights + step * np.tensordot(up[best] - down[best], directions[best], axes=1)
    return trials


def make_trajectories(name: str, options: Search) -> tuple[dict[str, list[Episode]], dict[str, Any]]:
    """The episodes of our tiers of an environment, and the returns of random actions and our expert."""
    environment = make_environment(name)
    generator, actions = np.random.default_rng((options.seed, 1)), environment.action_space.shape

    def roll(act) -> Episode:
        return roll_out(environment, act, int(generator.integers(2**31)))[0]

    def noisily(trial: Trial):
        return trial.policy.act(lambda: options.action_noise * generator.normal(size=actions))

    def collect(trial: Trial) -> list[Episode]:
        episodes = []
        while sum(len(episode.rewards) for episode in episodes) < options.size:
            episodes.append(roll(noisily(trial)))
        return episodes

    random = mean_return([roll(lambda _: generator.uniform(-1, 1, actions)) for _ in range(_RANDOM_EPISODES)])
    trials = search(environment, options, f"search, {name}")
    stations = [number for number, trial in enumerate(trials) if not trial.perturbed]
    # One episode says little: the best are tried again, and half the way counts when a few have come so far.
    promising = sorted(stations, key=lambda number: trials[number].total)[-_TRIED_AGAIN:]
    again = {number: mean_return([roll(noisily(trials[number])) for _ in range(_TRIED_AGAIN)]) for number in promising}
    expert = max(again, key=again.__getitem__)
    totals = np.array([trials[number].total for number in stations])
    lasting = np.convolve(totals, np.ones(_LASTING) / _LASTING, "valid")
    half = min((random + again[expert]) / 2, lasting.max())
    medium = stations[_LASTING - 1 + int(np.argmax(lasting >= half))]
    before = trials[: medium + 1]
    share = min(1, options.size / sum(trial.length for trial in before))
    chosen = np.linspace(0, medium, max(2, round(share * len(before)))).round().astype(int)
    tiers = {
        "medium": collect(trials[medium]),
        "medium_replay": [roll_out(environment, before[i].policy.act(), before[i].seed)[0] for i in chosen],
        "expert": collect(trials[expert]),
    }
    returns = {"random_return": random, "expert_return": mean_return(tiers["expert"])}
    return tiers, returns | {"discrete": is_discrete(environment)}


def mean_return(episodes: Sequence[Episode]) -> float:
    """Of episodes."""
    return float(np.mean([np.sum(episode.rewards, dtype=np.float64) for episode in episodes]))


# Not registered: the episodes are handed over, so `tfds.load` could not build a set by its name.
class Trajectories(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builder of the parts of a set, episodes of steps, as in RLDS; and of what else is known of it."""

    VERSION = tfds.core.Version("1.0.0")  # names the content too: raise it where anything here changes

    def __init__(self, parts: Mapping[str, Sequence[Episode]], facts: Mapping[str, Any], **kwargs):
        self._parts, self._facts = parts, facts
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        example = next(iter(self._parts.values()))[0]
        scalar, vector = tfds.features.Scalar, functools.partial(tfds.features.Tensor, dtype=np.float32)
        steps = {
            "observation": vector(shape=example.observations.shape[1:]),
            "action": vector(shape=example.actions.shape[1:]),
            "reward": scalar(np.float32),
            **{flag: scalar(np.bool_) for flag in ("is_first", "is_last", "is_terminal")},
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"steps": tfds.features.Dataset(steps)}),
            metadata=tfds.core.MetadataDict(self._facts),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {part: self._generate_examples(episodes) for part, episodes in self._parts.items()}

    def _generate_examples(self, episodes: Sequence[Episode]):
        for number, episode in enumerate(episodes):
            place = np.arange(len(episode.rewards))
            last = place == place[-1]
            yield (
                number,
                {
                    "steps": {
                        "observation": episode.observations,
                        "action": episode.actions,
                        "reward": episode.rewards,
                        "is_first": place == 0,
                        "is_last": last,
                        "is_terminal": last & episode.terminal,
                    }
                },
            )


def _versions(environment: str) -> str:
    packages = ("gymnasium", "mujoco") if environment in _MUJOCO else ("gymnasium",)
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)


def _digest(environment: str) -> str:
    """Names all that the content depends on."""
    facts = (
        _ENVIRONMENTS[environment], _SEARCHES[environment],
        str(Trajectories.VERSION), _versions(environment),
    )  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:8]


_ENVIRONMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "HalfCheetah": ("HalfCheetah-v5", {}),
    "Hopper": ("Hopper-v5", {}),
    "Walker2d": ("Walker2d-v5", {}),
    "Ant": ("Ant-v5", {"include_cfrc_ext_in_observation": False}),
    "CartPole": ("CartPole-v1", {}),
    "MountainCar": ("MountainCarContinuous-v0", {}),
    **{name: (f"{kind}-v4", {}) for name, kind in {
        "halfcheetah": "HalfCheetah", "hopper": "Hopper", "walker2d": "Walker2d", "ant": "Ant",
    }.items()},
}  # fmt: skip
_MUJOCO = _ENVIRONMENTS.keys() - {"CartPole", "MountainCar"}
_SEARCHES = {
    "HalfCheetah": Search(0.02, 0.03, directions=8, top=4, steps=600_000),
    "Hopper": Search(0.01, 0.025, directions=8, top=4, steps=300_000),
    "Walker2d": Search(0.03, 0.025, directions=16, top=8, steps=500_000, action_noise=0.03),
    "Ant": Search(0.015, 0.025, directions=16, top=8, steps=450_000),
    "CartPole": Search(0.02, 0.1, directions=4, top=2, steps=20_000, size=5000, action_noise=0.0),
    "MountainCar": Search(0.1, 0.1, directions=8, top=4, steps=50_000, size=5000),
}
_OWN = {f"{environment}-own-{tier}": (environment, tier) for environment in _SEARCHES for tier in TIERS}


# Sets of D4RL whose published files a user has

_D4RL_RETURNS: dict[str, tuple[float | None, float | None]] = {  # random, expert
    "halfcheetah": (-280.18, 12135.0),
    "hopper": (-20.27, 3234.3),
    "walker2d": (1.63, 4592.3),
    "ant": (None, None),
}
_D4RL_SIZES = {"halfcheetah": (17, 6), "hopper": (11, 3), "walker2d": (17, 6), "ant": (111, 8)}  # observation, action
_ANT_WITHOUT_FORCES = 27
_D4RL_LEAST = {"medium": 990_000, "medium-replay": 200_000, "medium-expert": 1_980_000}  # steps, rounded down
_PUBLISHED = {f"{environment}-{tier}-v2": (environment, tier) for environment in _D4RL_RETURNS for tier in TIERS}


def _locate(name: str, source_folder: str | Path | None) -> Path:
    """The published file of a set of D4RL."""
    environment, tier = _PUBLISHED[name]
    file = f"{environment}_{tier.replace('-', '_')}-v2.hdf5"
    if source_folder is not None:
        if not Path(source_folder).is_dir():
            raise ValueError(f"source_folder: expected a folder, got {source_folder}")
        if (found := Path(source_folder, file)).is_file():
            return found
    raise FileNotFoundError(
        f"{name} ships in no package: put its published file, {file} of D4RL (gym_mujoco_v2), into a folder and give "
        f"that as source_folder{f' (it is not in {source_folder})' if source_folder is not None else ''}"
    )


def _digest_file(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.sha256(str(Trajectories.VERSION).encode())).hexdigest()[:8]


def _read_published(name: str, file: Path) -> tuple[dict[str, list[Episode]], dict[str, Any]]:
    """The episodes of a set, without an end that is missing, and the returns of D4RL's policies."""
    import h5py  # here: only these files need it

    columns = ("observations", "actions", "rewards", "terminals", "timeouts")
    with h5py.File(file) as content:
        if missing := [column for column in columns if column not in content]:
            raise ValueError(f"{file}: expected the arrays {', '.join(columns)}; {', '.join(missing)} are missing")
        observations, actions, rewards, terminals, timeouts = (content[column][()] for column in columns)
    environment, tier = _PUBLISHED[name]
    steps, (observation_size, action_size) = len(rewards), _D4RL_SIZES[environment]
    expected = ((steps, observation_size), (steps, action_size), (steps,), (steps,), (steps,))
    found = tuple(array.shape for array in (observations, actions, rewards, terminals, timeouts))
    if found != expected:
        raise ValueError(f"{file}: expected arrays of shapes {expected}, got {found}")
    if steps < _D4RL_LEAST[tier]:
        raise ValueError(f"{file}: expected at least {_D4RL_LEAST[tier]:,} steps, got {steps:,}: a part of the file?")
    if environment == "ant":
        observations = observations[:, :_ANT_WITHOUT_FORCES]
    ends = np.flatnonzero(terminals.astype(bool) | timeouts.astype(bool)) + 1
    starts = [0, *ends[:-1]]
    arrays = [np.asarray(array, np.float32) for array in (observations, actions, rewards)]
    episodes = [
        Episode(*(array[start:end] for array in arrays), terminal=bool(terminals[end - 1]))
        for start, end in zip(starts, ends, strict=True)
    ]
    _check_number(name, episodes)
    random_return, expert_return = _D4RL_RETURNS[environment]
    return {"published": episodes}, {
        "discrete": False,
        "random_return": random_return,
        "expert_return": expert_return,
    }
