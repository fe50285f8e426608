"""A training step of language models at their papers' sizes, compiled for a TPU mesh, without a TPU: memory per chip.

Parameters are split over data and tensors (`zoo.shardings`), batches over data; activations are recomputed block by
block. Nothing runs: bytes and collectives are the compiler's. It needs libtpu, which the `dev` extra brings.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import zoo
from experiments import ExperimentError, check_positive
from experiments.measure import count_parameters
from experiments.results import table
from experiments.tpu_compiler import tpu_devices
from experiments.trainer import progress

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compiled, and for what."""

    models: tuple[str, ...] = ("aaren:paper", "based:360m", "based:1.3b", "transnormer_llm:385m", "transnormer_llm:7b")
    """Stacks and their presets."""
    topology: str = "v5e:4x4"
    """The chips, by the name of their arrangement."""
    tensor: int = 4
    """Chips along the tensor axis; the others are along the data axis."""
    batch: int = 16
    """Sequences in a batch."""
    time: int = 2048
    """Tokens in a sequence."""
    vocabulary: int = 50304
    """Tokens of the vocabulary, for all models the same; the embedding is the head too."""

    def __post_init__(self):
        check_positive(self)
        for model in self.models:
            name, _, preset = model.partition(":")
            zoo.configure(f"{name}_language_model", preset)


PRESETS: dict[str, Config] = {
    "papers": Config(),
    "smoke": Config(models=("aaren:tiny", "based:tiny", "transnormer_llm:tiny"), batch=4, time=128, vocabulary=512),
}


def run(config: Config, folder: Path) -> dict[str, Any]:
    """Compile; the results as a dictionary."""
    devices = np.asarray(tpu_devices(config.topology))
    if len(devices) % config.tensor:
        raise ExperimentError(f"tensor: expected a divisor of the {len(devices)} chips, got {config.tensor}")
    devices = devices.reshape(-1, config.tensor)
    mesh = Mesh(devices, ("data", "tensor"))
    rows = []
    with progress("compiling", 0, len(config.models), unit="model") as bar:
        for model in config.models:
            rows.append(_compile(model, mesh, config))
            bar.update()
    chips = f"{config.topology}: {mesh.shape['data']} for data times {mesh.shape['tensor']} for tensors"
    metrics = {"chips": chips, "batch": config.batch, "time": config.time, "rows": rows}
    print(f"\n{show(metrics)}")
    return metrics


def show(metrics: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    return f"""{metrics["chips"]}; batches of {metrics["batch"]} x {metrics["time"]:,} tokens. GiB are on each chip.

{table(metrics["rows"])}"""


def _compile(model, mesh, config):
    """A sharded initialisation and a training step of one model."""
    name, _, preset = model.partition(":")

    def create(key):
        return zoo.create_model(
            f"{name}_language_model", rngs=nnx.Rngs(key), preset=preset, vocabulary=config.vocabulary,
            tied=True, dtype="bfloat16", scan=True, checkpoint=True,
        )  # fmt: skip

    optimizer = optax.adamw(1e-3)
    abstract = jax.eval_shape(create, jax.random.key(0))
    graph, params, _ = nnx.split(abstract, nnx.Param, ...)
    shardings = nnx.split(zoo.shardings(abstract, mesh), nnx.Param, ...)[1:]

    def init(key):
        params, constants = nnx.split(create(key), nnx.Param, ...)[1:]
        return params, constants, optimizer.init(params)

    def step(params, constants, moments, tokens):
        def loss(params):
            logits, _ = nnx.merge(graph, params, constants)(tokens[:, :-1])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

        value, gradients = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, value

    everywhere = NamedSharding(mesh, PartitionSpec())
    moments = optax.tree.map_params(
        optimizer, lambda _, sharding: sharding, jax.eval_shape(optimizer.init, params), shardings[0],
        transform_non_params=lambda _: everywhere,
    )  # fmt: skip
    batch = NamedSharding(mesh, PartitionSpec("data"))
    key = jax.eval_shape(lambda: jax.random.key(0)).update(sharding=everywhere)
    tokens = jax.ShapeDtypeStruct((config.batch, config.time + 1), jnp.int32, sharding=batch)
    inputs = [
        jax.tree.map(lambda x, sharding: x.update(sharding=sharding), types, where)
        for types, where in zip(jax.eval_shape(init, key), (*shardings, moments), strict=True)
    ]
    trained = jax.jit(step, out_shardings=(shardings[0], moments, everywhere), donate_argnums=(0, 2))
    initialised = jax.jit(init, in_shardings=everywhere, out_shardings=(*shardings, moments))
    with jax.set_mesh(mesh):  # which tells a mixer that XLA splits it
        initial, compiled = initialised.lower(key).compile(), trained.lower(*inputs, tokens).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    found = Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text))
    return {
        "model": model,
        "parameters": count_parameters(abstract),
        "parameters, moments (GiB)": memory.argument_size_in_bytes / 2**30,
        "temporaries (GiB)": memory.temp_size_in_bytes / 2**30,
        "peak (GiB)": memory.peak_memory_in_bytes / 2**30,
        "of initialisation (GiB)": initial.memory_analysis().temp_size_in_bytes / 2**30,
        "kernels": text.count("tpu_custom_call"),
        **{name: found[name] for name in COLLECTIVES},
    }
