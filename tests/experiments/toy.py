"""A toy experiment for the tests: fits a noisy linear map.

Run as a script it is the command line of this experiment; `KILL=EVENT:TEXT:N` in the environment then kills the process
with SIGKILL at the N-th audit event of that name whose first argument contains the text.
"""

import dataclasses
import hashlib
import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import experiments
from experiments.trainer import Fit, TrainConfig, fit


@dataclasses.dataclass(frozen=True)
class Config(TrainConfig):
    """Options of the toy."""

    seeds: tuple[int, ...] = (0, 1, 1)
    """One member each."""
    learning_rates: tuple[float, ...] = (0.01, 0.01, 0.1)
    """One for each seed."""


PRESETS: dict[str, Config] = {
    "demo": Config(steps=50, warmup_steps=5, evaluate_every=20, checkpoint_every=10, steps_per_call=4),
    "smoke": Config(steps=3, warmup_steps=1),
}


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)])
        self.scale = nnx.Variable(jnp.ones(3))  # not trained

    def __call__(self, x):
        return self.layers[1](jnp.tanh(self.layers[0](x * self.scale)))


def create(key):
    return Model(nnx.Rngs(key))


def loss(model, batch, key):
    kept = jax.random.bernoulli(key, 0.9, batch["x"].shape)
    error = jnp.mean((model(batch["x"] * kept) - batch["y"]) ** 2)
    return error, {"draw": jax.random.uniform(key)}


def batches(step, members=3):
    x = np.random.default_rng([7, step]).normal(size=(members, 4, 3)).astype(np.float32)
    return {"x": x, "y": x[..., :2] - x[..., 1:]}


def evaluate(models):
    batch = jax.tree.map(lambda array: array[0], batches(10**6))
    return {"error": jax.vmap(lambda model: jnp.mean((model(batch["x"]) - batch["y"]) ** 2))(models)}


def train(folder: Path, config: Config = PRESETS["demo"], **changes) -> Fit:
    arguments = {
        "create": create,
        "loss": loss,
        "batches": batches,
        "seeds": config.seeds,
        "learning_rates": config.learning_rates,
        "evaluate": evaluate,
    } | changes
    return fit(config=config, folder=folder, **arguments)


def bits(models: nnx.Module) -> str:
    """A digest of the parameters."""
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(models))).hexdigest()


def run(config: Config, folder: Path) -> dict:
    done = train(folder, config)
    return {"history": done.history, "bits": bits(done.models)}


def kill_at(event: str, text: str, count: int) -> None:
    seen = 0

    def hook(name, arguments):
        nonlocal seen
        if name == event and text in str(arguments[0]):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


if __name__ == "__main__":
    if "KILL" in os.environ:
        name, text, count = os.environ["KILL"].split(":")
        kill_at(name, text, int(count))
    experiments.__path__.append(str(Path(__file__).parent))
    experiments.EXPERIMENTS = ("toy",)
    from experiments.__main__ import main

    sys.exit(main(["toy", *sys.argv[1:]]))
