"""The trainer of all experiments: several members (seeds, learning rates) at once, resumed bit for bit."""

import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from tqdm import tqdm

from experiments import ExperimentError
from experiments.checkpoints import Checkpoints
from experiments.events import drop_events, write_events

__all__ = ["DivergedError", "Fit", "TrainConfig", "fit", "progress", "schedule"]

logger = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """AdamW on clipped gradients; the learning rate warms up linearly, then decays to zero along a cosine."""

    steps: int = 1000
    """Steps of the optimiser."""
    warmup_steps: int = 50
    """Steps until the learning rate is at its peak."""
    weight_decay: float = 0.01
    """Decoupled weight decay, of all parameters."""
    clip_norm: float = 1.0
    """Global norm to which larger gradients are scaled down."""
    evaluate_every: int = 100
    """Steps between evaluations; the last step is evaluated too."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step is saved too."""
    steps_per_call: int = 10
    """Steps in one dispatch to the device."""

    def __post_init__(self):
        for name in ("steps", "evaluate_every", "checkpoint_every", "steps_per_call"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(f"warmup_steps must be in [0, steps), got {self.warmup_steps} with steps={self.steps}")


def schedule(steps: int, **options: Any) -> TrainConfig:
    """A configuration that warms up over a twentieth of the steps, and evaluates and saves after every tenth."""
    tenth = max(1, steps // 10)
    return TrainConfig(steps=steps, warmup_steps=steps // 20, evaluate_every=tenth, checkpoint_every=tenth, **options)


class DivergedError(ExperimentError):
    """No member is left whose loss is finite."""


class State(NamedTuple):
    """What a step changes, of all members."""

    params: PyTree
    optimizer: optax.OptState


@dataclasses.dataclass(frozen=True)
class Fit:
    """What training gives."""

    models: nnx.Module
    """The trained models, stacked: every array has a leading member axis, for `jax.vmap` over the module."""
    history: list[dict[str, Any]]
    """A row per evaluation: `step`, `train/NAME` (mean over the last dispatch) and `evaluate/NAME`, lists by member."""
    diverged: list[int | None]
    """For each member, the first step whose loss was not finite."""
    seconds: float
    """Wall time from the call to the last checkpoint, compilation included, summed over the pieces of a resumed run."""


def fit(
    create: Callable[[PRNGKeyArray], nnx.Module],
    loss: Callable[[nnx.Module, Batch, PRNGKeyArray], tuple[Float[Array, ""], dict[str, Float[Array, ""]]]],
    batches: Callable[[int], Batch],
    config: TrainConfig,
    folder: Path,
    *,
    seeds: Sequence[int],
    learning_rates: Sequence[float],
    evaluate: Callable[[nnx.Module], dict[str, Float[Array, " members"]]] | None = None,
    label: str = "training",
) -> Fit:
    """Train one member per seed, resuming from `folder` if it holds checkpoints of the same configuration.

    A step depends on the configuration, the step and the state alone, so a run that was killed at any moment and is
    started again ends with the same bits as one that was not.

    Args:
      create: a model from a key, vmapped over the members; its `nnx.Param`s are trained.
      loss: scalar and further scalar metrics of one member's model and batch; the key is for dropout.
      batches: the batch of a step, arrays `[members, batch, ...]`; pure, called ahead of time in a thread.
      config: may be a subclass with an experiment's own options; a run is resumed only with an equal one.
      folder: gets `checkpoints/` and `tensorboard/`.
      seeds: one per member, for the keys of `create` and `loss`.
      learning_rates: the peak learning rate of each member.
      evaluate: metrics of the stacked models.
      label: what the progress bar shows.

    Raises:
      ValueError: `seeds` and `learning_rates` differ in length; a metric is not one number per member.
      ExperimentError: `folder` cannot be written or holds another run; a `DivergedError` if every member has diverged.
    """
    if len(seeds) != len(learning_rates) or not len(seeds):
        raise ValueError(f"expected one seed and one learning rate per member, got {seeds=} and {learning_rates=}")
    started = time.perf_counter()
    seeds, learning_rates = [*map(int, seeds)], [*map(float, learning_rates)]
    members = [f"{i}-seed{s}-rate{r:g}" for i, (s, r) in enumerate(zip(seeds, learning_rates, strict=True))]
    keys = jax.vmap(jax.random.split)(jnp.stack([jax.random.key(seed) for seed in seeds]))
    graph, params, rest = nnx.split(jax.jit(jax.vmap(create))(keys[:, 0]), nnx.Param, ...)
    params = nnx.to_pure_dict(params)
    state = State(params, jax.vmap(_optimizer(config, 0.0).init)(params))
    record = {"history": [], "diverged": [None] * len(seeds), "seconds": 0.0}

    identity = dataclasses.asdict(config) | {"seeds": seeds, "learning_rates": learning_rates}
    checkpoints = Checkpoints(folder / "checkpoints", identity)
    step, state, record = checkpoints.restore(state) or (0, state, record)
    drop_events(folder / "tensorboard", step)
    started -= record["seconds"]

    def stacked(steps: range) -> Batch:
        return jax.tree.map(lambda *arrays: np.stack(arrays), *map(batches, steps))

    run = jax.jit(_run(graph, loss, config), donate_argnums=0)
    rates, rows = np.asarray(learning_rates, np.float32), []
    with progress(label, step, config.steps) as bar:
        for steps, batch in _ahead(stacked, _calls(step, config)):
            state, metrics = run(state, rest, keys[:, 1], rates, np.asarray(steps), batch)
            metrics, step = jax.device_get(metrics), steps.stop
            _note_divergence(record["diverged"], steps, metrics["loss"], members)
            row = _row("train", {name: value.mean(0) for name, value in metrics.items()}, members)
            if step % config.evaluate_every == 0 or step == config.steps:
                if evaluate is not None:
                    row |= _row("evaluate", evaluate(nnx.merge(graph, state.params, rest)), members)
                record["history"].append({"step": step, **row})
            rows.append((step, time.time(), row))
            if step % config.checkpoint_every == 0 or step == config.steps:
                write_events(folder / "tensorboard", members, rows)
                rows.clear()
                record["seconds"] = time.perf_counter() - started
                checkpoints.save(step, state, record)
            bar.set_postfix(loss=f"{np.mean(row['train/loss']):.4g}", refresh=False)
            bar.update(len(steps))
    return Fit(nnx.merge(graph, state.params, rest), **record)


def _optimizer(config: TrainConfig, learning_rate: Float[Array, ""] | float) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, config.warmup_steps, config.steps)
    adamw = optax.adamw(lambda step: learning_rate * schedule(step), weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def _run(graph: nnx.GraphDef, loss: Callable, config: TrainConfig) -> Callable:
    """Several steps of all members: a scan over the steps of a vmap over the members."""

    def member_step(state, rest, key, learning_rate, step, batch):
        def objective(params):
            return loss(nnx.merge(graph, params, rest), batch, jax.random.fold_in(key, step))

        (value, metrics), gradients = jax.value_and_grad(objective, has_aux=True)(state.params)
        updates, optimizer = _optimizer(config, learning_rate).update(gradients, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, updates), optimizer), metrics | {"loss": value}

    def run(state, rest, keys, learning_rates, steps, batches):
        step_all = jax.vmap(member_step, in_axes=(0, 0, 0, 0, None, 0))
        return jax.lax.scan(
            lambda state, each: step_all(state, rest, keys, learning_rates, *each), state, (steps, batches)
        )

    return run


def _calls(step: int, config: TrainConfig) -> Iterator[range]:
    """The steps of each dispatch from `step` on, cut by `config` alone: another length could mean another rounding."""
    periods = (config.steps_per_call, config.evaluate_every, config.checkpoint_every)
    while step < config.steps:
        stop = min(config.steps, *((step // period + 1) * period for period in periods))
        yield range(step, stop)
        step = stop


def _ahead[T](produce: Callable[[range], T], calls: Iterable[range]) -> Iterator[tuple[range, T]]:
    """Each call with what `produce` makes of it, made in a thread while the call before is used."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = ((call, pool.submit(produce, call)) for call in calls)
        ready = next(pending, None)
        while ready is not None:
            following = next(pending, None)
            yield ready[0], ready[1].result()
            ready = following


def _row(kind: str, metrics: dict[str, Any], members: Sequence[str]) -> dict[str, list[float]]:
    for name, value in metrics.items():
        if np.shape(value) != (len(members),):
            raise ValueError(f"{kind} metric {name!r}: expected shape ({len(members)},), got {np.shape(value)}")
    return {f"{kind}/{name}": np.asarray(value, float).tolist() for name, value in metrics.items()}


def _note_divergence(diverged: list[int | None], steps: range, losses: np.ndarray, members: Sequence[str]) -> None:
    for index, finite in enumerate(np.isfinite(losses).T):
        if diverged[index] is None and not finite.all():
            diverged[index] = steps[int(np.argmin(finite))]
            logger.warning("%s diverged: its loss is not finite at step %d", members[index], diverged[index])
    if None not in diverged:
        raise DivergedError(
            f"every member diverged by step {steps[-1]}; lower the learning rates: {', '.join(members)}"
        )


def progress(label: str, done: int, total: int, unit: str = "step") -> tqdm:
    """A bar on a terminal, a line every ten seconds elsewhere."""
    line = "{desc}: {unit} {n_fmt} of {total_fmt}, {elapsed} elapsed, {remaining} to go{postfix}\n"
    style = {} if sys.stderr.isatty() else {"mininterval": 10, "bar_format": line}
    return tqdm(desc=label, initial=done, total=total, unit=unit, **style)
