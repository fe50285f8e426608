"""A negative control: associative recall, where Aaren should fail and the Transformer succeed.

Aaren's query does not depend on the input, so that a token's weight in every later average is its own, whatever is
asked: a layer cannot look anything up (nothing in the paper says that it can). Sequences show pairs of a key and a
value and then ask for the values of some keys (after multi-query associative recall, Arora et al., Zoology, 2023,
arXiv:2312.04927). The best that can be done without looking anything up is to answer with the value that was shown most
often; that, and a guess among all values, are shown beside the models.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import zoo
from experiments import check_positive
from experiments.data import associative_recall, recall_batches
from experiments.figures import figure
from experiments.mqar import judge
from experiments.results import summary, table
from experiments.trainer import fit, schedule

MODELS = {"aaren": "Aaren", "transformer": "Transformer"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the control."""

    pairs: int = 8
    """Pairs of a key and a value in a sequence."""
    queries: int = 8
    """Keys that are asked for again."""
    vocabulary: int = 64
    """Number of tokens: half of them keys, half of them values."""
    length: int = 32
    """Tokens of a sequence."""
    seeds: int = 2
    """Members per learning rate, with seeds 0, 1, …"""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    """Both models are trained with each, and reported with their best."""
    steps: int = 900
    """Training steps."""
    batch_size: int = 64
    """Sequences per step and member."""
    test_batches: int = 8
    """Batches of fresh sequences that are tested."""
    width: int = 64
    """Size of a token in the model."""
    layers: int = 2
    """Blocks."""
    heads: int = 2
    """Heads of the mixers."""

    def __post_init__(self):
        check_positive(self)
        zoo.StackConfig(self.width, self.layers, (zoo.AarenConfig(self.heads),))  # refuses what does not fit
        associative_recall(0, 0, batch_size=1, **self.sizes())

    def sizes(self) -> dict[str, int]:
        """Those of a sequence."""
        return {field: getattr(self, field) for field in ("pairs", "queries", "vocabulary", "length")}


PRESETS: dict[str, Config] = {
    "demo": Config(),
    "smoke": Config(steps=3, seeds=1, test_batches=1, batch_size=8),
}


def run(config: Config, folder: Path) -> dict[str, Any]:
    """Train and test both models; the results as a dictionary, learning curves in `folder`."""
    sizes = config.sizes()
    test = [recall_batches(config.batch_size, seed=10**6, **sizes)[i] for i in range(config.test_batches)]
    test = jax.tree.map(lambda *x: np.concatenate(x), *test)
    results = {name: _train(name, config, sizes, test, folder / name) for name in MODELS}
    references = {
        "the commonest value of the sequence": _accuracy_of_commonest(test, config.pairs),
        "any value": 2 / config.vocabulary,
    }
    _draw(results, references, folder)
    print("\nAccuracy of recall:\n")
    rows = [{"model": MODELS[name], **best} for name, (best, _) in results.items()]
    print(table(rows + [{"model": f"answering with {name}", "accuracy": x} for name, x in references.items()]))
    print(f"\nfigure: {folder / 'recall.png'}")
    return {
        "references": references,
        "models": {name: best | training for name, (best, training) in results.items()},
    }


def _accuracy_of_commonest(test, pairs):
    """How often the value that a sequence shows most often (of equals, the first) is the one that is asked for."""
    values = test["tokens"][:, 1 : 2 * pairs : 2]
    counts = np.sum(values[:, :, None] == values[:, None, :], axis=2)
    commonest = np.take_along_axis(values, np.argmax(counts, axis=1)[:, None], axis=1)
    return float(np.mean((test["targets"] == commonest)[test["targets"] >= 0]))


def _train(name, config, sizes, test, folder):
    """The best learning rate's accuracy on fresh sequences; how training went, for all members."""
    members = [(seed, rate) for rate in config.learning_rates for seed in range(config.seeds)]
    seeds, rates = zip(*members, strict=True)

    def create(key):
        return zoo.create_model(
            f"{name}_language_model", rngs=nnx.Rngs(key), vocabulary=config.vocabulary, width=config.width,
            layers=config.layers, heads=config.heads, hidden=2 * config.width, position="sinusoidal",
        )  # fmt: skip

    def loss(model, batch, key):
        value, accuracy = judge(model, batch)
        return value, {"accuracy": accuracy}

    @jax.jit
    def evaluate(models):
        return {"accuracy": jax.vmap(judge, in_axes=(0, None))(models, test)[1]}

    fitted = fit(
        create, loss, recall_batches(config.batch_size, seed=seeds, **sizes).__getitem__, schedule(config.steps),
        folder, seeds=seeds, learning_rates=rates, evaluate=evaluate, label=MODELS[name],
    )  # fmt: skip
    accuracy = np.reshape(fitted.history[-1]["evaluate/accuracy"], (-1, config.seeds))
    best = int(np.argmax(accuracy.mean(axis=1)))
    training = {"training_seconds": fitted.seconds, "diverged": fitted.diverged, "history": fitted.history}
    return {"learning rate": config.learning_rates[best], "accuracy": summary(accuracy[best])}, training


def _draw(results, references, folder):
    with figure(folder / "recall.png", width=5.5, height=3.4) as (axis,):
        for color, (name, (_, training)) in enumerate(results.items()):
            history = training["history"]
            steps = [row["step"] for row in history]
            for member, curve in enumerate(zip(*(row["evaluate/accuracy"] for row in history), strict=True)):
                axis.plot(steps, curve, color=f"C{color}", alpha=0.7, label=None if member else MODELS[name])
        for style, (name, accuracy) in zip(("--", ":"), references.items(), strict=True):
            axis.axhline(accuracy, color="gray", ls=style, lw=1, label=name)
        axis.set(xlabel="step", ylabel="accuracy of recall", ylim=(0, 1.02))
        axis.set_title("Associative recall, every seed and rate")
        axis.grid(alpha=0.3)
        axis.legend(loc="center right")
