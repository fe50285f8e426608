"""A needle in a haystack: accuracy of recall in contexts up to 32 times as long as those that models are trained on.

The kinds of needle are those that Titans (Ali Behrouz, Peilin Zhong, Vahab Mirrokni, 2025, arXiv:2501.00663, table 2)
reports out of RULER: see experiments/data/needle.py for the task and what differs. A model is the same for all mixers:
a short convolution's block (`base_convolution`), which lets a token see the two before it, then the mixer's; both with
a channel mixer, whose inner size makes up for the parameters of the mixer. Models learn all kinds at once, from the
answer alone, and see the true symbols of a value before the one that they are asked for. The published numbers are of
language models of hundreds of millions of parameters, trained on other text in contexts of 4,096 tokens, and asked in
contexts of 16,384: only the order of mixers can be compared.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import zoo
from experiments import check_positive
from experiments.data import NEEDLE_KINDS, check_text, load_text, needle, needle_batches
from experiments.figures import figure, marker
from experiments.measure import count_parameters, fitting_size
from experiments.results import summary, table
from experiments.trainer import DivergedError, fit, schedule

PUBLISHED = {
    "memory_as_context": (0.984, 0.974, 0.952),
    "memory": (0.962, 0.802, 0.806),
    "TTT": (0.884, 0.044, 0.0),
    "delta": (0.714, 0.054, 0.0),
    "mamba2": (0.054, 0.0, 0.0),
}
"""Accuracies in contexts of 16,384 tokens, in the order of `NEEDLE_KINDS`. Which TTT it is we do not know."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learned, by which models, and how: what this experiment shares with `memory_ablations`."""

    text: str = "wikipedia"
    """The haystack of numbers and words: a corpus out of a package, or a folder of .txt files."""
    length: int = 64
    """Tokens of a training sequence."""
    multiples: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Lengths of test sequences, in lengths of training sequences."""
    symbols: int = 3
    """Symbols of a value."""
    sequences: int = 256
    """Test sequences of each kind and length; a multiple of 64, or fewer."""
    width: int = 32
    """Size of a token in the model."""
    heads: int = 2
    """Heads of mixers that have them."""
    window: int = 16
    """Tokens of the windows of attention; memories have their own update intervals."""
    parameters: int = 44_000
    """Parameters of a model, as nearly as the inner size of its channel mixers can meet."""
    seeds: int = 1
    """Members, with seeds 0, 1, …"""
    learning_rate: float = 3e-3
    """Peak learning rate, for all models the same."""
    steps: int = 1000
    """Training steps."""
    batch_size: int = 64
    """Sequences per step and member."""
    data_dir: str = "data"
    """Where the prepared corpus is kept."""

    def __post_init__(self):
        check_positive(self)
        if self.sequences % min(64, self.sequences):
            raise ValueError(f"sequences: expected a multiple of 64, or fewer, got {self.sequences}")
        needle(0, 0, batch_size=1, length=self.length, symbols=self.symbols, text=np.zeros(self.length, np.uint8))


@dataclasses.dataclass(frozen=True)
class Config(Task):
    """Options of the experiment."""

    mixers: tuple[str, ...] = (
        "memory", "memory_as_context", "memory_as_gate", "memory_as_layer", "moneta", "yaad", "memora", "ttt_linear",
        "ttt_mlp", "delta", "gated_delta", "mamba2", "window", "attention",
    )  # fmt: skip
    """Names of `zoo.list_mixers()`."""


PRESETS: dict[str, Config] = {
    "demo": Config(),
    "smoke": Config(mixers=("memory", "window"), steps=3, batch_size=6, sequences=6, multiples=(1, 2)),
    # Lengths as in the paper, values as long as the benchmark's numbers; for an accelerator.
    "paper": Config(
        length=4096, multiples=(1, 2, 4), symbols=7, width=256, heads=4, window=64, parameters=1_200_000, seeds=3,
        learning_rate=1e-3, steps=20_000,
    ),
}  # fmt: skip


def check(config: Config) -> None:
    """Raise for a corpus that is not here, and for mixers that do not fit."""
    check_text(config.text)
    for name in config.mixers:
        fitting_hidden(mixer(name, config), config)


def run(config: Config, folder: Path) -> dict[str, Any]:
    """Train and test every mixer; the results as a dictionary, the figure in `folder`."""
    text = load_text(config.text, data_dir=config.data_dir)
    results, diverged = [], []
    for name in config.mixers:
        try:
            results.append({"mixer": name} | compare(mixer(name, config), config, text, folder / name))
        except DivergedError:
            diverged.append(name)
    metrics = {
        "source": text.source,
        "length": config.length,
        "references": {kind: len(symbols) ** -config.symbols for kind, symbols in NEEDLE_KINDS.items()},
        "results": sorted(results, key=score, reverse=True),
        "diverged": diverged,
    }
    draw(metrics, folder)
    print(f"\n{show(metrics)}\n\nfigure: {folder / 'needle_in_a_haystack.png'}")
    return metrics


def show(metrics: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    results, references = metrics["results"], metrics["references"]
    kinds = "\n\n".join(
        f"Kind *{kind}*; a guess is right in {references[kind]:.2g} of sequences:\n\n"
        + table([{"mixer": result["mixer"], **result["accuracy"][kind]} for result in results])
        for kind in references
    )
    return f"""Share of sequences whose value is recalled as a whole, against the length of the context in tokens. \
Trained on {metrics["length"]}; text: {metrics["source"]}.

{kinds}

{table([model_row(result) for result in results])}

Diverged: {", ".join(metrics["diverged"]) or "none"}.

The published accuracies at 16,384 tokens beside those here at the longest context. Models, training, lengths and \
needles differ, so that only the order of mixers can be compared:

{table(_published(results))}"""


def mixer(name: str, task: Task, **options: Any) -> zoo.MixerConfig:
    """A mixer in the sizes of the task, with further options."""
    fields = {field.name for field in dataclasses.fields(zoo.mixer_config(name))}
    sizes = {"heads": task.heads, "head_dim": task.width // task.heads, "window": task.window, "rotary": True}
    return zoo.mixer_config(name, **{field: size for field, size in sizes.items() if field in fields} | options)


def _model(mixer, task, hidden, key):
    """A short convolution's block and the mixer's."""
    return zoo.create_model(
        "base_convolution_language_model", rngs=nnx.Rngs(key), vocabulary=256, width=task.width, layers=2,
        pattern=("base_convolution", mixer), hidden=hidden,
    )  # fmt: skip


def fitting_hidden(mixer: zoo.MixerConfig, task: Task) -> int:
    """The inner size of channel mixers that meets the number of parameters; `ValueError` where none does."""

    def count(hidden):
        return count_parameters(jax.eval_shape(lambda: _model(mixer, task, hidden, jax.random.key(0))))

    hidden = fitting_size(count, task.parameters, start=1)
    if hidden < 1:
        raise ValueError(f"parameters: expected at least {count(1):,} for {mixer}, got {task.parameters:,}")
    return hidden


def compare(mixer: zoo.MixerConfig, task: Task, text: Any, folder: Path) -> dict[str, Any]:
    """Train a mixer's models, and test them on every kind and length."""
    hidden, seeds = fitting_hidden(mixer, task), range(task.seeds)

    def create(key):
        return _model(mixer, task, hidden, key)

    def loss(model, batch, key):
        value, right = _judge(model, batch)
        return value, {"accuracy": jnp.mean(right)}

    batches = needle_batches(
        task.batch_size, seed=list(seeds), length=task.length, symbols=task.symbols, text=text.train
    )
    fitted = fit(
        create, loss, batches.__getitem__, schedule(task.steps), folder, seeds=seeds,
        learning_rates=[task.learning_rate] * task.seeds, label=folder.name,
    )  # fmt: skip
    _, state = jax.eval_shape(lambda: create(jax.random.key(0))(jnp.zeros((1, task.length), jnp.int32)))
    return {
        "accuracy": _test(fitted.models, task, text.test),
        "parameters": count_parameters(fitted.models) // task.seeds,
        "hidden": hidden,
        "bytes_of_state": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.layers[-1])),
        "training_seconds": fitted.seconds,
        "diverged": fitted.diverged,
        "history": fitted.history,
    }


def _judge(model, batch):
    """The mean loss of the symbols of values; for each sequence, whether all of them are right."""
    asked = batch["targets"] >= 0
    logits, _ = model(batch["tokens"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch["targets"], 0))
    right = jnp.argmax(logits, axis=-1) == batch["targets"]
    return jnp.mean(losses, where=asked), jnp.all(right, axis=1, where=asked)


def _test(models, task, text):
    """Accuracies by kind and length, over all members; sequences are others than those of training."""
    part = min(64, task.sequences)

    @jax.jit
    def right(models, batch):
        return jnp.mean(jax.vmap(lambda model: _judge(model, batch)[1])(models), axis=1)

    def accuracy(kind, length):
        parts = (
            needle(10**6 + length, i, batch_size=part, length=length, symbols=task.symbols, text=text, kinds=(kind,))
            for i in range(task.sequences // part)
        )
        return summary(np.mean([right(models, batch) for batch in parts], axis=0))

    lengths = [multiple * task.length for multiple in task.multiples]
    return {kind: {str(length): accuracy(kind, length) for length in lengths} for kind in NEEDLE_KINDS}


def score(result: Mapping[str, Any]) -> float:
    """The mean accuracy over all kinds and lengths."""
    return float(np.mean([found["mean"] for kind in result["accuracy"].values() for found in kind.values()]))


def model_row(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a model costs."""
    return {
        "mixer": result["mixer"],
        "parameters": result["parameters"],
        "inner size of channel mixers": result["hidden"],
        "bytes of the mixer's state": result["bytes_of_state"],
        "seconds of training": round(result["training_seconds"]),
    }


def _published(results):
    """The published accuracies, from the best mixer down, beside those of the longest context here."""
    longest = {r["mixer"]: [list(kind.values())[-1]["mean"] for kind in r["accuracy"].values()] for r in results}
    rows = []
    for name, published in PUBLISHED.items():
        for label in ("ttt_linear", "ttt_mlp") if name == "TTT" else (name,):
            row = {"mixer": label}
            for kind, theirs, ours in zip(NEEDLE_KINDS, published, longest.get(label, (None,) * 3), strict=True):
                row |= {f"{kind}, published": theirs, f"{kind}, here": ours}
            rows.append(row)
    return rows


def draw(metrics: Mapping[str, Any], folder: Path) -> None:
    """Accuracy against length, a panel for each kind."""
    kinds = list(metrics["references"])
    with figure(folder / "needle_in_a_haystack.png", width=12, height=4, panels=len(kinds)) as axes:
        for axis, kind in zip(axes, kinds, strict=True):
            for number, result in enumerate(metrics["results"]):
                found = result["accuracy"][kind]
                means = [each["mean"] for each in found.values()]
                axis.plot([*map(int, found)], means, ms=4, lw=1, label=result["mixer"], **marker(number))
            axis.axhline(metrics["references"][kind], color="gray", ls=":", lw=1, label="guess")
            axis.axvline(metrics["length"], color="gray", ls="--", lw=1, label="trained on")
            axis.set_xscale("log", base=2)
            axis.set(xlabel="tokens of the context", ylim=(-0.03, 1.03), title=kind)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("accuracy of recall")
        axes[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7)
