"""Aaren and a causal Transformer on time-series classification, then token by token (Attention as an RNN, Figure 5).

The paper's comparison on one of its data sets: both models of equal width and depth, with a learning rate chosen for
each by the same search on validation data, then trained on all training data with several seeds and tested at the end
(the test accuracies along the way, in TensorBoard, choose nothing). The trained models are then fed one token at a
time, and the size of their state and the time are measured. The paper's claim: Aaren performs comparably to
Transformers, and streams in constant memory and linear time. (Its accuracies were not available to us, so none are
shown.)
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import zoo
from experiments import check_positive
from experiments.data import (
    ClassificationData,
    batches,
    check_available,
    evaluation_batches,
    load_classification,
    standardise,
    stratified_split,
)
from experiments.figures import figure
from experiments.measure import count_parameters, growth_exponent
from experiments.results import summary, table
from experiments.streaming import Stream, stream
from experiments.trainer import fit, schedule

MODELS = {"aaren": "Aaren", "transformer": "Transformer"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the comparison."""

    dataset: str = "JapaneseVowels"
    """A set of the UEA/UCR archive: one that a package ships, or one in `source_folder`."""
    source_folder: Path | None = None
    """Holds published files, NAME/NAME_TRAIN.ts and NAME/NAME_TEST.ts, of sets that no package ships."""
    data_dir: Path = Path("data")
    """Where prepared data sets are kept."""
    seeds: int = 5
    """Members trained for the test, with seeds 0, 1, …"""
    tuning_seeds: int = 2
    """Members per learning rate in the search, with seeds 100, 101, …"""
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    """What the search tries, for either model."""
    validation_fraction: float = 0.25
    """Of the training examples, held out in the search."""
    steps: int = 800
    """Training steps."""
    tuning_steps: int = 400
    """Training steps of the search."""
    batch_size: int = 16
    """Series per step and member."""
    width: int = 64
    """Size of a token in the model."""
    layers: int = 2
    """Blocks."""
    heads: int = 4
    """Heads of the mixers."""
    hidden: int = 128
    """Inner size of the feed-forwards."""
    dropout: float = 0.1
    """Rate, on the residual branches."""
    weight_decay: float = 0.05
    """Decoupled weight decay."""
    stream_tokens: int = 8192
    """Tokens in the streaming comparison."""
    stream_block: int = 128
    """Tokens between measurements, and the first capacity of the Transformer's cache."""
    stream_repeats: int = 3
    """Times that each block is measured; the fastest counts."""

    def __post_init__(self):
        check_positive(self, except_for=("dropout", "weight_decay"))
        if self.stream_tokens % self.stream_block or self.stream_tokens < 2 * self.stream_block:
            raise ValueError(f"stream_tokens: expected two or more whole blocks of {self.stream_block} tokens")
        mixers = (zoo.AarenConfig(self.heads),)
        zoo.StackConfig(self.width, self.layers, mixers, hidden=self.hidden, dropout=self.dropout)  # refuses misfits


PRESETS: dict[str, Config] = {
    "demo": Config(),
    "smoke": Config(
        seeds=2, tuning_seeds=1, steps=3, tuning_steps=3, stream_tokens=256, stream_block=64, stream_repeats=1
    ),
    # Sizes and schedule of the base code (Time-Series-Library), not confirmed as the paper's.
    "paper": Config(width=128, layers=3, heads=8, hidden=256, steps=1700, tuning_steps=1700, tuning_seeds=5),
}


def check(config: Config) -> None:
    """Raise `ValueError` or `FileNotFoundError` for a data set that is not here."""
    check_available(config.dataset, config.source_folder)


def run(config: Config, folder: Path) -> dict[str, Any]:
    """Search, train, test, stream; the results as a dictionary, figures in `folder`."""
    where = {"data_dir": config.data_dir, "source_folder": config.source_folder}
    train, test = (load_classification(config.dataset, split, **where) for split in ("train", "test"))
    train, test = standardise(train, test)
    print(f"{config.dataset}: {len(train)} series to train, {len(test)} to test, {len(train.class_names)} classes")
    results = {name: _compare(name, config, train, test, folder / name) for name in MODELS}
    _draw_accuracy({MODELS[name]: result["test_accuracy"] for name, result in results.items()}, config, folder)
    _draw_streams({MODELS[name]: Stream(**result["stream"]) for name, result in results.items()}, folder)
    print(
        f"\nAccuracy over {config.seeds} seeds; bytes of state and time at token {config.stream_tokens:,} of a stream,"
    )
    print("where memory and cumulative time grow as the tokens to the power of these exponents:\n")
    print(comparison(results) + "\n")
    print(f"figures: {folder / 'accuracy.png'}, {folder / 'streaming.png'}")
    return results


def _compare(name, config, train, test, folder):
    """Everything about one model."""
    seeds = range(config.seeds)
    tuning = _tune(name, config, train, folder / "tuning")
    models, tested, training = _train(
        name, config, train, test, config.steps, seeds, [tuning["chosen"]] * config.seeds, folder / "test"
    )
    model = jax.tree.map(lambda x: x[0], models)
    result = stream(
        model, _endless(test, config.stream_tokens), block=config.stream_block, repeats=config.stream_repeats,
        label=MODELS[name],
    )  # fmt: skip
    late = config.stream_tokens // 8
    return {
        "tuning": tuning,
        "test_accuracy": summary(tested["accuracy"]),
        "test_loss": summary(tested["loss"]),
        **training,
        "parameters": count_parameters(model),
        "stream": result._asdict(),
        "exponent_of_time": growth_exponent(result.tokens, result.seconds, first=late),
        "exponent_of_memory": growth_exponent(result.tokens, result.used_bytes, first=late),
    }


def _tune(name, config, train, folder):
    """Every learning rate on held-out training data, and the one with the best accuracy (of equals, least loss)."""
    part, validation = stratified_split(train, config.validation_fraction, seed=0)
    members = [(100 + seed, rate) for rate in config.learning_rates for seed in range(config.tuning_seeds)]
    seeds, rates = zip(*members, strict=True)
    _, held_out, training = _train(name, config, part, validation, config.tuning_steps, seeds, rates, folder)
    accuracy, loss = (np.reshape(held_out[name], (-1, config.tuning_seeds)) for name in ("accuracy", "loss"))
    by_rate = [
        {"learning rate": rate, "accuracy": summary(right), "loss": summary(losses)}
        for rate, right, losses in zip(config.learning_rates, accuracy, loss, strict=True)
    ]
    chosen = max(by_rate, key=lambda row: (row["accuracy"]["mean"], -row["loss"]["mean"]))["learning rate"]
    print(f"\n{MODELS[name]}: on {len(validation)} validation series; learning rate {chosen:g} is chosen")
    print(table(by_rate))
    return {"validation": by_rate, "chosen": chosen, **training}


def _train(name, config, train, held_out, steps, seeds, rates, folder):
    """Models trained on `train`, one per seed; their `loss` and `accuracy` on `held_out`; how training went."""

    def create(key):
        return zoo.create_model(
            f"{name}_classifier", rngs=nnx.Rngs(key), channels=train.series.shape[-1], classes=len(train.class_names),
            width=config.width, layers=config.layers, heads=config.heads, hidden=config.hidden, dropout=config.dropout,
            position="sinusoidal", pooling="mean",
        )  # fmt: skip

    def judge(model, batch, key=None):
        logits, _ = model(batch["inputs"], segment_ids=batch["segment_ids"], key=key)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return losses, jnp.argmax(logits, axis=-1) == batch["labels"]

    def loss(model, batch, key):
        losses, correct = judge(model, batch, key)
        return jnp.mean(losses), {"accuracy": jnp.mean(correct)}

    @jax.jit
    def evaluate(models):
        def total(model, batch):
            losses, correct = judge(model, batch)
            return {"loss": batch["weight"] @ losses, "accuracy": batch["weight"] @ correct}

        sums = [jax.vmap(total, in_axes=(0, None))(models, batch) for batch in held_out_batches]
        return jax.tree.map(lambda *x: sum(x) / len(held_out), *sums)

    held_out_batches = list(evaluation_batches(held_out, min(len(held_out), 256)))
    fitted = fit(
        create, loss, batches(train, config.batch_size, seed=seeds).__getitem__,
        schedule(steps, weight_decay=config.weight_decay), folder,
        seeds=seeds, learning_rates=rates, evaluate=evaluate, label=f"{MODELS[name]}, {folder.name}",
    )  # fmt: skip
    last = {name: fitted.history[-1][f"evaluate/{name}"] for name in ("loss", "accuracy")}
    return fitted.models, last, {"training_seconds": fitted.seconds, "diverged": fitted.diverged}


def _endless(data: ClassificationData, tokens: int) -> np.ndarray:
    """The first tokens of the series of a data set, one series after another, again and again."""
    real = np.concatenate([series[:length] for series, length in zip(data.series, data.length, strict=True)])
    return np.resize(real, (tokens, real.shape[1]))


def comparison(results: dict[str, Any]) -> str:
    """The final table, from what `run` returns or a result's `metrics`."""
    rows = []
    for name, result in results.items():
        measured = Stream(**result["stream"])
        tokens, seconds = (series[-1] - series[-2] for series in (measured.tokens, measured.seconds))
        row = {
            "model": MODELS[name],
            "test accuracy": result["test_accuracy"],
            "parameters": result["parameters"],
            "bytes of state": measured.used_bytes[-1],
            "allocated": measured.allocated_bytes[-1],
            "µs per token": round(1e6 * seconds / tokens, 1),
            "memory exponent": round(result["exponent_of_memory"], 2) + 0.0,
            "time exponent": round(result["exponent_of_time"], 2),
        }
        rows.append(row)
    return table(rows)


def _draw_accuracy(accuracies, config, folder):
    with figure(folder / "accuracy.png", width=4.5, height=3.2) as (axis,):
        for place, accuracy in enumerate(accuracies.values()):
            axis.errorbar(place, accuracy["mean"], accuracy["std"], fmt="_", ms=30, mew=2, capsize=6, color=f"C{place}")
            spread = np.linspace(-0.15, 0.15, len(accuracy["values"]))
            axis.plot(place + spread, accuracy["values"], "o", ms=5, alpha=0.6, color=f"C{place}")
        axis.set(xticks=range(len(accuracies)), xticklabels=accuracies, xlim=(-0.6, len(accuracies) - 0.4))
        axis.set(ylabel="test accuracy", title=f"{config.dataset}: {config.seeds} seeds, mean ± std")
        axis.grid(axis="y", alpha=0.3)


def _draw_streams(streams, folder):
    with figure(folder / "streaming.png", width=9, height=3.2, panels=2) as (memory, seconds):
        for color, (name, measured) in enumerate(streams.items()):
            memory.plot(measured.tokens, measured.used_bytes, color=f"C{color}", label=name)
            memory.plot(measured.tokens, measured.allocated_bytes, "--", color=f"C{color}", alpha=0.6)
            seconds.plot(measured.tokens, measured.seconds, color=f"C{color}", label=name)
        memory.plot([], [], "--", color="gray", alpha=0.6, label="allocated")
        memory.set(yscale="log", xlabel="tokens", ylabel="bytes", title="Memory of the state")
        seconds.set(xlabel="tokens", ylabel="seconds", title="Cumulative time, one token at a time")
        for axis in (memory, seconds):
            axis.grid(alpha=0.3)
            axis.legend()
