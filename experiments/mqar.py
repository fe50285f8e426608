"""Multi-query associative recall: how much of what it has read a mixer can look up, against the size of its state.

The task and the published points are those of Zoology (Simran Arora and others, 2023, arXiv:2312.04927) and of Based
(Simran Arora and others, 2024, arXiv:2402.18668): see experiments/data/mqar.py for the task and what differs. A model
is the same for all mixers, as in Based's configurations: a short convolution's block (`base_convolution`), which lets
a token see the one before it, then the mixer's; both with a channel mixer. Accuracy is that of the queries, in the size
that is hardest of those tested. Where there are several learning rates, each mixer has the one that is best on other
sequences than those that are tested. The preset "demo" is small and for a CPU: its
vocabulary, sequences and models are not the paper's, so that only the order of mixers can be compared.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import zoo
from experiments import check_positive
from experiments.data import MQAR_TEST, MQAR_TRAIN, MQARSize, mqar, mqar_batches
from experiments.figures import figure, marker
from experiments.measure import count_parameters
from experiments.results import summary, table
from experiments.trainer import DivergedError, fit, schedule

PUBLISHED = {
    "attention": 1.0,
    "gated_delta": 0.989,
    "delta": 0.964,
    "mamba2": 0.833,
    "gated_linear_attention": 0.772,
    "window": 0.515,
}
"""Accuracies read off a published plot, ± 0.005, of the authors' sizes of these mixers at a vocabulary of 8,192.

Based, 0.913 there, is a hybrid with windows: no mixer alone, and so not compared here.
"""

SIZES: dict[str, tuple[dict[str, Any], ...]] = {
    "delta": ({"heads": 4}, {"heads": 2}, {"heads": 1}),
    "gated_delta": ({"heads": 4}, {"heads": 2}, {"heads": 1}),
    "gated_linear_attention": ({"heads": 4}, {"heads": 2}, {"heads": 1}),
    "rat": tuple({"chunk": n} for n in (1, 4, 16, 64)),
    "moh": ({"heads": 4, "shared": 1, "active": 2},),
    "mamba2": tuple({"state_size": n} for n in (8, 32, 128)),
    "taylor": tuple({"feature_dim": n} for n in (4, 8, 16)),
    "window": tuple({"window": n} for n in (8, 16, 32)),
}
"""Options that change the size of a mixer's state; other mixers have one size, most of them without options."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    mixers: tuple[str, ...] = tuple(zoo.list_mixers())
    """Names of `zoo.list_mixers()`."""
    sweep: bool = True
    """Train some mixers at several sizes of their state, else at the first of `SIZES`."""
    vocabulary: int = 128
    """Number of tokens: half of them keys, half of them values."""
    train: tuple[tuple[int, int, int], ...] = ((64, 4, 1), (64, 8, 1), (64, 16, 1))
    """Length, pairs and share of the training sequences."""
    test: tuple[tuple[int, int, int], ...] = ((64, 4, 512), (64, 8, 512), (64, 16, 512))
    """Length, pairs and number of the test sequences; the last is the one that mixers are compared at."""
    width: int = 32
    """Size of a token in the model."""
    heads: int = 2
    """Heads of mixers that have them, where a sweep does not say otherwise."""
    seeds: int = 1
    """Members per learning rate, with seeds 0, 1, …"""
    learning_rates: tuple[float, ...] = (3e-3,)
    """Every mixer is trained with each, and reported with its best."""
    steps: int = 1500
    """Training steps."""
    batch_size: int = 64
    """Sequences per step and member."""

    def __post_init__(self):
        check_positive(self, except_for=("train", "test"))
        for size in self.train + self.test:
            mqar(0, 0, batch_size=1, length=size[0], pairs=size[1], vocabulary=self.vocabulary)  # refuses misfits


PRESETS: dict[str, Config] = {
    "demo": Config(),
    "smoke": Config(mixers=("delta", "attention"), sweep=False, steps=3, batch_size=8, learning_rates=(1e-3,)),
    # Sequences, steps (32 epochs of 180,000) and rates of Based's configurations; for an accelerator.
    "paper": Config(
        vocabulary=8192,
        train=tuple(map(tuple, MQAR_TRAIN)),
        test=tuple(map(tuple, MQAR_TEST)),
        width=128,
        steps=22_500,
        batch_size=256,
        learning_rates=(1e-3, 10**-2.5, 10**-2, 10**-1.5),
    ),
}


def check(config: Config) -> None:
    """Raise `ValueError` for mixers that do not fit."""
    for name, options in _points(config):
        jax.eval_shape(lambda name=name, options=options: _model(name, options, config, jax.random.key(0)))


def run(config: Config, folder: Path) -> dict[str, Any]:
    """Train and test every mixer; the results as a dictionary, the figure in `folder`."""
    sizes = [MQARSize(*size) for size in config.test]
    test = [_sequences(config, size, seed=10**6) for size in sizes]
    chosen_by = _sequences(config, sizes[-1], seed=10**7)
    results, diverged = [], []
    for name, options in _points(config):
        label = "-".join([name, *(f"{key}{value}" for key, value in options.items())])
        try:
            results.append(_train(name, options, config, chosen_by, test, folder / label))
        except DivergedError:
            diverged.append(label)
    references = {"any value": 2 / config.vocabulary, "any value of the sequence": 1 / config.test[-1][1]}
    metrics = {"references": references, "results": results, "diverged": diverged}
    draw(metrics, folder)
    print(f"\n{show(metrics)}\n\nfigure: {folder / 'mqar.png'}")
    return metrics


def show(metrics: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    results, references = metrics["results"], metrics["references"]
    rows, (agree, ties, pairs) = _published(results)
    return f"""Accuracy of recall, and bytes of the mixer's state after a whole sequence:

{table([_row(result) for result in sorted(results, key=_score, reverse=True)])}

Answering with any value is right in {references["any value"]:.4g} of queries, with any value of the sequence in \
{references["any value of the sequence"]:.4g}.

The published points, of other sizes than those here, beside the best of each mixer here:

{table(rows)}

Of {pairs} pairs of mixers, {agree} have the order that was published, and {ties} are equal.

Diverged: {", ".join(metrics["diverged"]) or "none"}."""


def _points(config: Config) -> list[tuple[str, dict[str, Any]]]:
    """What is trained: mixers and their options."""
    points = []
    for name in config.mixers:
        sizes = SIZES.get(name, ({},))
        sizes = sizes if config.sweep else sizes[:1]
        points += [(name, options) for options in sizes]
    return points


def _model(name: str, options: Mapping[str, Any], config: Config, key: Any) -> nnx.Module:
    """A short convolution's block and the mixer's."""
    fields = {field.name for field in dataclasses.fields(zoo.mixer_config(name))}
    shared = {"heads": config.heads, "head_dim": config.width // config.heads, "context": config.train[-1][0]}
    options = {field: value for field, value in shared.items() if field in fields} | dict(options)
    return zoo.create_model(
        "base_convolution_language_model", rngs=nnx.Rngs(key), vocabulary=config.vocabulary, width=config.width,
        layers=2, pattern=("base_convolution", zoo.mixer_config(name, **options)), hidden=2 * config.width,
    )  # fmt: skip


def _sequences(config: Config, size: MQARSize, seed: int) -> dict[str, np.ndarray]:
    """The sequences of a size, in one batch."""
    options = {"vocabulary": config.vocabulary, "sizes": (size,), "seed": seed}
    return mqar_batches(size.examples, **options)[0]


def _train(name, options, config, chosen_by, test, folder):
    """The accuracies of a mixer with its best learning rate, and the size of its state."""
    seeds, rates = zip(*itertools.product(range(config.seeds), config.learning_rates), strict=True)

    def create(key):
        return _model(name, options, config, key)

    def loss(model, batch, key):
        value, accuracy = judge(model, batch)
        return value, {"accuracy": accuracy}

    @jax.jit
    def accuracies(models, batch):
        return jax.vmap(lambda model: _in_parts(lambda part: judge(model, part)[1], batch))(models)

    def evaluate(models):
        found = {_label(size): accuracies(models, batch) for size, batch in zip(config.test, test, strict=True)}
        return found | {"chosen by": accuracies(models, chosen_by)}

    training = schedule(config.steps)
    batches = mqar_batches(
        config.batch_size, seed=seeds, sizes=[MQARSize(*size) for size in config.train], vocabulary=config.vocabulary,
        steps_per_size=training.steps_per_call,
    )  # fmt: skip
    fitted = fit(
        create, loss, batches.__getitem__, training, folder, seeds=seeds, learning_rates=rates, evaluate=evaluate,
        label=folder.name,
    )  # fmt: skip
    last = fitted.history[-1]
    by_rate = np.reshape(last["evaluate/chosen by"], (config.seeds, -1))
    best = int(np.argmax(by_rate.mean(axis=0)))

    def chosen(values):
        return summary(np.reshape(values, (config.seeds, -1))[:, best])

    model = jax.eval_shape(create, jax.random.key(0))
    longest = config.test[-1][0]
    state = jax.eval_shape(lambda model: model(jnp.zeros((1, longest), jnp.int32))[1], model)
    return {
        "mixer": name,
        "options": dict(options),
        "accuracy": {_label(size): chosen(last[f"evaluate/{_label(size)}"]) for size in config.test},
        "learning_rate": config.learning_rates[best],
        "bytes_of_state": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.layers[-1])),
        "parameters": count_parameters(model),
        "training_seconds": fitted.seconds,
        "diverged": fitted.diverged,
        "history": fitted.history,
    }


def judge(model: nnx.Module, batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """Mean loss and accuracy over the queries, where targets are not negative."""
    logits, _ = model(batch["tokens"])
    asked = batch["targets"] >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch["targets"], 0))
    right = jnp.argmax(logits, axis=-1) == batch["targets"]
    return jnp.mean(losses, where=asked), jnp.mean(right, where=asked)


def _in_parts(function, batch, most=32):
    """The mean over sequences, so many at a time: logits of a large vocabulary are large."""
    part = max(n for n in range(1, most + 1) if len(batch["tokens"]) % n == 0)
    parts = jax.tree.map(lambda x: x.reshape(-1, part, *x.shape[1:]), dict(batch))
    return jnp.mean(jax.lax.map(function, parts))


def _label(size: tuple[int, int, int]) -> str:
    length, pairs, _ = size
    return f"{pairs} pairs in {length}"


def _score(result: Mapping[str, Any]) -> float:
    return list(result["accuracy"].values())[-1]["mean"]


def _row(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "mixer": result["mixer"],
        "options": ", ".join(f"{name} {value}" for name, value in result["options"].items()),
        **result["accuracy"],
        "bytes of state": result["bytes_of_state"],
        "parameters": result["parameters"],
        "rate": result["learning_rate"],
    }


def _published(results: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], tuple[int, int, int]]:
    """The published points beside the best of each mixer here; pairs in the same order, equal pairs, all pairs."""
    best = {name: max(_score(r) for r in results if r["mixer"] == name) for name in {r["mixer"] for r in results}}
    common = [name for name in PUBLISHED if name in best]  # in falling order
    pairs = list(itertools.combinations(common, 2))
    rows = [{"mixer": name, "published": PUBLISHED[name], "here": best[name]} for name in common]
    return rows, (sum(best[a] > best[b] for a, b in pairs), sum(best[a] == best[b] for a, b in pairs), len(pairs))


def draw(metrics: Mapping[str, Any], folder: Path) -> None:
    """Accuracy against bytes of state, a line for each mixer."""
    results = metrics["results"]
    with figure(folder / "mqar.png", width=9.5, height=5.5) as (axis,):
        for number, name in enumerate(dict.fromkeys(result["mixer"] for result in results)):
            points = sorted((r["bytes_of_state"], _score(r)) for r in results if r["mixer"] == name)
            axis.plot(*zip(*points, strict=True), ms=5, lw=1, label=name, **marker(number))
        for style, (name, accuracy) in zip((":", "--"), metrics["references"].items(), strict=True):
            axis.axhline(accuracy, color="gray", ls=style, lw=1, label=name)
        axis.set(xscale="log", xlabel="bytes of the mixer's state", ylabel="accuracy of recall", ylim=(0, 1.03))
        axis.set_title("Associative recall against the size of the state")
        axis.grid(alpha=0.3)
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7)
