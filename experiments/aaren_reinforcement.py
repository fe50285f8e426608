"""Reinforcement learning offline, the first setting of "Attention as an RNN": Decision Transformers, with Aaren inside.

A model (`zoo.decision_transformer`) learns to predict the actions of recorded episodes from returns-to-go,
observations and actions before, on windows of `context` steps. In the environment it is given the return that is
wanted, less what it has had, and *streams*: each step is one call of one time step, which carries the state on. Aaren
and the Transformer have the same sizes, batches and starts of episodes; the learning rate is that of the least loss of
actions on episodes held out.

The state starts anew every `context` steps, so that a model never sees more than in training, and costs both the same.
"Without restarts" it never does: Aaren's state stays as small, the Transformer's cache grows with the episode.
(Decision Transformers slide their window instead, and compute all of it anew at each step.)

Scores are ``100 (return − random) / (expert − random)``. For our own data sets (`experiments.data.reinforcement`)
random and expert returns are those of *our* policies: such scores say how near a model comes to our expert, and nothing
about D4RL's. For D4RL's sets they are D4RL's; for its Ant, whose we do not have, there are returns only. The references
are what the data's episodes had, and behaviour cloning: a perceptron that sees the observation alone, trained alike.
(Our policies are linear in the observation, which makes cloning strong on our sets.)

Leo Feng et al., 2024, arXiv:2405.13956, report D4RL scores in a table that we did not have. The preset "paper" has the
sizes of min-decision-transformer, **the base code that we take the paper to build on, not confirmed as its own**, but
for: one rate schedule for all experiments here (warm-up over a twentieth of the steps, then a cosine), norms in front,
sinusoids for time steps, returns divided by the data's largest in place of 1,000, and gradients clipped at 1.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from experiments.comparison import (
    ComparisonConfig,
    Measure,
    choose_rate,
    create,
    describe_training,
    draw_cells,
    remember,
    show_cells,
)
from experiments.data.reinforcement import (
    TrajectoryData,
    check_trajectories,
    list_trajectories,
    load_trajectories,
    make_environment,
    trajectory_batches,
    trajectory_windows,
)
from experiments.results import summary, table
from experiments.trainer import fit, progress, schedule
from zoo.layers import check_choice

MEASURES = (
    Measure("score", "normalised score", higher_is_better=True),
    Measure("return", "return", higher_is_better=True),
    Measure("score_without_restarts", "normalised score without restarts of the state", higher_is_better=True),
)
CLONING = "behaviour cloning"
FIRST_SEED = 10_000
"""Of the environments in which models are tested."""

Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Config(ComparisonConfig):
    """Options of the experiment."""

    dataset: tuple[str, ...] = tuple(name for name in list_trajectories() if "-own-" in name)[:12]
    """Names of data sets: ours, which are made when they are first used, or those of D4RL in `source_folder`."""
    steps: int = 250
    """Training steps."""
    context: int = 20
    """Time steps in a window, and between restarts of the state."""
    target: Literal["expert", "best"] = "expert"
    """The return that a model is asked for: the expert's, if that is known, or the best of the data."""
    episodes: int = 10
    """Episodes that each member is tested in."""
    episodes_without_restarts: int = 2
    """The same with a state that never starts anew."""
    episode_steps: int = 1000
    """Most steps of an episode; our policies' returns, and so the scores, are of 1,000 for MuJoCo's."""
    validation_windows: int = 256
    """Windows of the episodes held out, evenly spaced."""

    def __post_init__(self):
        super().__post_init__()
        check_choice("target", self.target, ("expert", "best"))


PRESETS: dict[str, Config] = {
    "desk": Config(),
    "smoke": Config(
        dataset=("CartPole-own-medium-replay",), seeds=2, learning_rates=(1e-3,), steps=4, batch_size=4, context=8,
        episodes=1, episodes_without_restarts=1, episode_steps=30, validation_windows=8, width=16, layers=1, heads=2,
        hidden=16, dropout=0.0,
    ),
    # Sizes of the base code, for an accelerator.
    "paper": Config(
        dataset=tuple(name for name in list_trajectories() if name.endswith("-v2")), learning_rates=(1e-4,),
        steps=20_000, batch_size=64, width=128, layers=3, heads=1, hidden=512, weight_decay=1e-4,
        episodes_without_restarts=10, validation_windows=1024,
    ),
}  # fmt: skip


def check(config: Config) -> None:
    """Raise `ValueError` or `FileNotFoundError` for data sets or environments that are not here."""
    for name in config.dataset:
        check_trajectories(name, config.source_folder)


def run(config: Config, folder: Path) -> dict[str, Any]:
    """Train and test the models on every data set; the results, with the figure in `folder`."""
    cells = []
    for name in config.dataset:
        data = load_trajectories(name, data_dir=config.data_dir, source_folder=config.source_folder)
        cells.append(compare(data, config, folder / name))
    metrics = {"context": config.context, "cells": cells}
    draw(metrics, folder)
    print(f"\n{show(metrics)}")
    return metrics


def compare(data: TrajectoryData, config: Config, folder: Path) -> dict[str, Any]:
    """A cell: the models and the references on a data set; resumed from `folder`."""
    found = {
        model: remember(folder / model / "result.json", lambda model=model: train(model, data, config, folder / model))
        for model in (*config.model, CLONING)
    }
    cloning = found.pop(CLONING)
    recorded = float(np.mean(data.episode_returns))
    return {
        "dataset": data.name,
        "models": found,
        "references": {
            CLONING: {measure.name: cloning[measure.name]["mean"] for measure in MEASURES if measure.name in cloning},
            "data": _measures("return", "score", recorded, data),
        },
        "episodes": len(data.episode_returns),
        "steps": len(data.returns),
        "best_return": float(data.episode_returns.max()),
        "random_return": data.random_return,
        "expert_return": data.expert_return,
        "target_return": target_return(data, config),
        "source": data.source,
    }


def target_return(data: TrajectoryData, config: Config) -> float:
    """What models are asked for."""
    known = config.target == "expert" and data.expert_return is not None
    return data.expert_return if known else float(data.episode_returns.max())


def score(returns: Any, data: TrajectoryData) -> Any:
    """``100 (return − random) / (expert − random)``."""
    return 100 * (returns - data.random_return) / (data.expert_return - data.random_return)


def _measures(return_name: str, score_name: str, returns: Any, data: TrajectoryData) -> dict[str, Any]:
    """Returns and, where the references for it are known, scores."""
    known = data.expert_return is not None
    return {return_name: returns} | ({score_name: score(returns, data)} if known else {})


# --- Models ---------------------------------------------------------------------------------------------------------


class Cloning(nnx.Module):
    """Behaviour cloning: the action from the observation alone. It is called as a `zoo.DecisionModel` is."""

    def __init__(self, config: Config, *, observation_size: int, action_size: int, discrete: bool, rngs: nnx.Rngs):
        sizes = [observation_size, *config.layers * [config.hidden], action_size]
        self.linears = nnx.List([nnx.Linear(*pair, rngs=rngs) for pair in itertools.pairwise(sizes)])
        self.discrete = discrete

    def __call__(self, returns, observations, previous_actions, timesteps, state=None, *, segment_ids=None, key=None):
        """Actions, or their logits, and no state."""
        *inner, last = self.linears
        x = observations
        for linear in inner:
            x = jax.nn.gelu(linear(x))
        return last(x) if self.discrete else jnp.tanh(last(x)), None

    def init_state(self, batch: int, capacity: int = 1) -> None:
        """None."""


def create_policy(model: str, data: TrajectoryData, config: Config, key: PRNGKeyArray) -> nnx.Module:
    """A model, or behaviour cloning, for a data set."""
    sizes = {"observation_size": data.observations.shape[-1], "action_size": data.actions.shape[-1]}
    if model == CLONING:
        return Cloning(config, discrete=data.discrete, rngs=nnx.Rngs(key), **sizes)
    return create("policy", model, config, key, discrete=data.discrete, **sizes)


def action_loss(model: nnx.Module, batch: Batch, key: PRNGKeyArray | None = None) -> Float[Array, ""]:
    """The squared error of actions, or the cross entropy of choices, over all real steps."""
    inputs = (batch[name] for name in ("returns", "observations", "previous_actions", "timesteps"))
    actions, _ = model(*inputs, segment_ids=batch["segment_ids"], key=key)
    if model.discrete:
        losses = optax.softmax_cross_entropy(actions, batch["actions"])
    else:
        losses = jnp.mean((actions - batch["actions"]) ** 2, axis=-1)
    return jnp.mean(losses, where=batch["segment_ids"] >= 0)


def train(model: str, data: TrajectoryData, config: Config, folder: Path) -> dict[str, Any]:
    """The scores of a model with its best learning rate, one for each seed.

    Batches depend on the seed and the step alone, environments on the seed: two models with the same seeds are a pair.
    """
    seeds, rates = zip(*itertools.product(range(config.seeds), config.learning_rates), strict=True)
    held_out = trajectory_windows(data, "validation", config.validation_windows, context=config.context)

    def build(key):
        return create_policy(model, data, config, key)

    @jax.jit
    def evaluate(models):
        return {"loss": jax.vmap(lambda model: action_loss(model, held_out))(models)}

    batches = trajectory_batches(data, config.batch_size, context=config.context, seed=seeds)
    fitted = fit(
        build, lambda *arguments: (action_loss(*arguments), {}), batches.__getitem__,
        schedule(config.steps, weight_decay=config.weight_decay), folder,
        seeds=seeds, learning_rates=rates, evaluate=evaluate, label=f"{data.name}, {model}",
    )  # fmt: skip
    by_rate = np.reshape(fitted.history[-1]["evaluate/loss"], (config.seeds, -1))
    best = choose_rate(by_rate, higher_is_better=False)
    models = jax.tree.map(lambda leaf: leaf[best :: len(config.learning_rates)], fitted.models)
    label = f"{data.name}, {model}"
    found = play(models, data, config, config.episodes, config.context, label)
    measures = _measures("return", "score", found.mean(axis=1), data)
    if model != CLONING:  # which has no state
        episodes, steps = config.episodes_without_restarts, config.episode_steps
        found = play(models, data, config, episodes, steps, f"{label}, without restarts")
        measures |= _measures("return_without_restarts", "score_without_restarts", found.mean(axis=1), data)
    return {
        **{name: summary(values) for name, values in measures.items()},
        "validation_loss": by_rate.mean(axis=0).tolist(),
        **describe_training(fitted, config.learning_rates[best], build),
    }


# --- Episodes -------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("episodes", "capacity"))
def fresh_states(models, episodes, capacity):
    """Those of all members' episodes, with room for so many time steps."""
    return jax.vmap(lambda model: model.init_state(episodes, capacity))(models)


@functools.partial(jax.jit, donate_argnames="states")
def act(models, states, returns, observations, previous_actions, timestep):
    """One time step of all members' episodes: actions ``[members, episodes, action]``, one-hot for choices."""

    def member(model, state, returns, observations, previous_actions):
        time = jnp.full((len(returns), 1), timestep)
        inputs = returns[:, None], observations[:, None], previous_actions[:, None], time
        actions, state = model(*inputs, state)
        actions = actions[:, 0]
        return jax.nn.one_hot(jnp.argmax(actions, axis=-1), actions.shape[-1]) if model.discrete else actions, state

    return jax.vmap(member)(models, states, returns, observations, previous_actions)


def play(
    models: nnx.Module, data: TrajectoryData, config: Config, episodes: int, restart_every: int, label: str
) -> Float[np.ndarray, "members episodes"]:
    """The returns of episodes in which stacked models stream; their starts depend on member and episode alone.

    Args:
        models: with a leading members axis.
        data: what they were trained on.
        config: has the target and the number of steps.
        episodes: of each member.
        restart_every: steps after which the state starts anew.
        label: what the progress bar shows.
    """
    shape = (config.seeds, episodes)
    environments = [make_environment(data.environment) for _ in range(config.seeds * episodes)]
    starts = [environment.reset(seed=FIRST_SEED + i)[0] for i, environment in enumerate(environments)]
    observations = np.reshape(starts, (*shape, -1))
    returns, running = np.zeros(shape), np.ones(shape, bool)
    actions = np.zeros((*shape, data.actions.shape[-1]), np.float32)
    with progress(label, 0, config.episode_steps) as bar:
        for step in range(config.episode_steps):
            if step % restart_every == 0:
                states = fresh_states(models, episodes, restart_every)
            wanted = ((target_return(data, config) - returns) / data.scale).astype(np.float32)
            actions, states = act(models, states, wanted, data.normalise(observations), actions, step)
            taken = np.asarray(actions)
            for place, environment in zip(np.ndindex(shape), environments, strict=True):
                if running[place]:
                    observations[place], reward, terminal, cut, _ = environment.step(taken[place])
                    returns[place] += reward
                    running[place] = not (terminal or cut)
            bar.update()
            if not running.any():
                break
    return returns


# --- What is shown --------------------------------------------------------------------------------------------------


def show(metrics: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    facts = [
        {
            "data set": cell["dataset"],
            "episodes": cell["episodes"],
            "steps": cell["steps"],
            "random": cell["random_return"],
            "expert": cell["expert_return"],
            "mean of the data": cell["references"]["data"]["return"],
            "best of the data": cell["best_return"],
            "asked for": cell["target_return"],
        }
        for cell in metrics["cells"]
    ]
    sources = "\n".join(f"- {cell['dataset']}: {cell['source']}" for cell in metrics["cells"])
    restarts = f"The state starts anew every {metrics['context']} steps, but in the last table."
    return f"{show_cells(metrics['cells'], MEASURES)}\n\n{restarts}\n\nReturns:\n\n{table(facts)}\n\n{sources}"


def draw(metrics: Mapping[str, Any], folder: Path) -> None:
    """The scores of models and references, and how the models differ; returns where a set has no scores."""
    cells = metrics["cells"]
    scored = all("score" in found for cell in cells for found in cell["models"].values())
    draw_cells(folder / "aaren_reinforcement.png", cells, MEASURES[0] if scored else MEASURES[1])
