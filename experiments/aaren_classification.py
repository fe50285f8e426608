"""Aaren and a causal Transformer on time-series classification, then token by token (Attention as an RNN, Figure 5).

The paper's comparison on sets of the UEA and UCR archives: both models of equal width and depth, with a learning rate
chosen for each by the same search on a stratified part of the training data, then trained on all of it with several
seeds and tested once, at the end. Beside them the majority class of the training data, and the class of the nearest
training series by dynamic time warping, the archives' own baseline. The trained models may then be fed one token at a
time, and the size of their state and the time are measured. The paper's claim: Aaren performs comparably to
Transformers, and streams in constant memory and linear time.

Deviations: the ten sets of the preset "paper" are the paper's, its sizes and schedule the base code's, which are not
confirmed as the paper's; the other presets have sets that packages ship, and smaller models. The rate is searched, not
fixed; the tokens are averaged before the linear head, where the base code flattens them; values are standardised by the
training data. The paper's accuracies were not available to us, so none are shown.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from dtaidistance import dtw_ndim
from flax import nnx
from jaxtyping import Float, Int

import zoo
from experiments import ExperimentError
from experiments.comparison import MODELS, ComparisonConfig, Measure, draw_cells, remember, show_cells
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
from experiments.measure import count_parameters
from experiments.results import summary, table
from experiments.streaming import Stream, stream, summarise
from experiments.trainer import DivergedError, Fit, fit, progress, schedule

MEASURES = (Measure("test_accuracy", "test accuracy", higher_is_better=True),)


@dataclasses.dataclass(frozen=True)
class Config(ComparisonConfig):
    """Options of the comparison."""

    dataset: tuple[str, ...] = ("JapaneseVowels",)
    """Sets of the UEA and UCR archives: those that packages ship, or that `source_folder` holds as NAME/NAME_TRAIN.ts
    and NAME/NAME_TEST.ts (or .tsv)."""
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
    weight_decay: float = 0.05
    """Decoupled weight decay."""
    stream_tokens: int | None = 8192
    """Tokens in the streaming comparison; None: there is none."""
    stream_block: int = 128
    """Tokens between measurements, and the first capacity of the Transformer's cache."""
    stream_repeats: int = 3
    """Times that each block is measured; the fastest counts."""

    def __post_init__(self):
        super().__post_init__()
        tokens, block = self.stream_tokens, self.stream_block
        if tokens is not None and (tokens % block or tokens < 2 * block):
            raise ValueError(f"stream_tokens: expected two or more whole blocks of {block} tokens, got {tokens}")


PRESETS: dict[str, Config] = {
    "demo": Config(),
    "smoke": Config(
        seeds=2, tuning_seeds=1, learning_rates=(1e-3, 1e-2), steps=3, tuning_steps=3, width=16, layers=1, heads=2,
        hidden=16, dropout=0.0, stream_tokens=256, stream_block=64, stream_repeats=1,
    ),
    # What ships in packages (experiments/data/study_packages.txt), short and of many kinds.
    "desk": Config(
        dataset=(
            "BasicMotions", "CBF", "Chinatown", "DistalPhalanxTW", "ECG200", "GunPoint", "ItalyPowerDemand",
            "JapaneseVowels", "MedicalImages", "MelbournePedestrian", "MoteStrain", "Plane",
        ),
        learning_rates=(1e-3, 3e-3, 1e-2), steps=400, tuning_steps=200, width=32, heads=2, hidden=64,
        stream_tokens=None,
    ),
    # The paper's sets. Sizes and schedule of the base code (Time-Series-Library), not confirmed as the paper's.
    "paper": Config(
        dataset=(
            "EthanolConcentration", "FaceDetection", "Handwriting", "Heartbeat", "JapaneseVowels", "PEMS-SF",
            "SelfRegulationSCP1", "SelfRegulationSCP2", "SpokenArabicDigits", "UWaveGestureLibrary",
        ),
        width=128, layers=3, heads=8, hidden=256, steps=1700, tuning_steps=1700, tuning_seeds=5, stream_tokens=None,
    ),
}  # fmt: skip


def check(config: Config) -> None:
    """Raise `ValueError` for an unknown data set, and `FileNotFoundError` that says how to get all that are missing."""
    missing = []
    for name in config.dataset:
        try:
            check_available(name, config.source_folder)
        except FileNotFoundError as error:
            missing.append(str(error))
    if missing:
        raise FileNotFoundError("; ".join(missing))


def run(config: Config, folder: Path) -> dict[str, Any]:
    """Compare the models on every set; the results, with the figures in `folder`."""
    metrics = {"cells": [compare(name, config, folder / name) for name in config.dataset]}
    draw(metrics, folder)
    print(f"\n{show(metrics)}\n\nfigures: {', '.join(map(str, sorted(folder.glob('*.png'))))}")
    return metrics


def compare(name: str, config: Config, folder: Path) -> dict[str, Any]:
    """References and models on a set."""
    where = {"data_dir": config.data_dir, "source_folder": config.source_folder}
    train, test = standardise(*(load_classification(name, split, **where) for split in ("train", "test")))
    _, length, channels = train.series.shape
    facts = {"train": len(train), "test": len(test), "channels": channels, "length": length}
    facts |= {"classes": len(train.class_names)}
    print(f"\n{name}: {', '.join(f'{value:,} {fact}' for fact, value in facts.items())}")
    references = remember(folder / "references.json", lambda: score_references(train, test))
    models = {
        model: remember(folder / model / "result.json", lambda m=model: train_and_test(m, config, train, test, folder))
        for model in config.model
    }
    return {"dataset": name, **facts, "models": models, "references": references}


# --- Models ---------------------------------------------------------------------------------------------------------


def train_and_test(
    model: str, config: Config, train: ClassificationData, test: ClassificationData, folder: Path
) -> dict[str, Any]:
    """Everything about a model on a set: the search, the test for each seed, the stream."""
    search = tune(model, config, train, folder / model / "search")
    seeds, rate = range(config.seeds), search["learning_rate"]
    fitted = train_members(model, config, train, config.steps, seeds, [rate] * config.seeds, folder / model / "test")
    tested = evaluator(test)(fitted.models)
    first = jax.tree.map(lambda x: x[0], fitted.models)
    return {
        "test_accuracy": summary(tested["accuracy"]),
        "test_loss": summary(tested["loss"]),
        "learning_rate": rate,
        "parameters": count_parameters(first),
        "training_seconds": fitted.seconds,
        "diverged": fitted.diverged,
        "history": fitted.history,
        "search": search,
        **({} if config.stream_tokens is None else measure_stream(first, config, test, MODELS[model])),
    }


def tune(model: str, config: Config, train: ClassificationData, folder: Path) -> dict[str, Any]:
    """Every learning rate on held-out training data, and the one with the best accuracy (of equals, least loss)."""
    part, validation = stratified_split(train, config.validation_fraction, seed=0)
    if not len(validation):
        raise ExperimentError(f"{folder}: expected two training examples of some class, to validate with one")
    members = [(100 + seed, rate) for rate in config.learning_rates for seed in range(config.tuning_seeds)]
    seeds, rates = zip(*members, strict=True)
    evaluate = evaluator(validation)
    fitted = train_members(model, config, part, config.tuning_steps, seeds, rates, folder, evaluate)
    accuracy, loss = (
        np.reshape(fitted.history[-1][f"evaluate/{name}"], (-1, config.tuning_seeds)) for name in ("accuracy", "loss")
    )
    by_rate = [
        {"learning rate": rate, "accuracy": summary(right), "loss": summary(losses)}
        for rate, right, losses in zip(config.learning_rates, accuracy, loss, strict=True)
    ]
    finite = [row for row in by_rate if math.isfinite(row["loss"]["mean"])]
    if not finite:
        raise DivergedError(f"{folder}: a seed diverged at every learning rate; give lower ones")
    # Rounded, so that means of as many correct answers are equal.
    best = max(finite, key=lambda row: (round(row["accuracy"]["mean"], 9), -row["loss"]["mean"]))
    chosen = best["learning rate"]
    print(f"\n{MODELS[model]}: on {len(validation)} validation series; learning rate {chosen:g} is chosen")
    print(table(by_rate))
    return {
        "learning_rate": chosen,
        "validation": by_rate,
        "training_seconds": fitted.seconds,
        "diverged": fitted.diverged,
    }


def train_members(
    model: str,
    config: Config,
    data: ClassificationData,
    steps: int,
    seeds: Sequence[int],
    rates: Sequence[float],
    folder: Path,
    evaluate: Callable[[nnx.Module], Mapping[str, Any]] | None = None,
) -> Fit:
    """Classifiers trained on `data`, one per seed and rate; batches depend on seed and step alone."""

    def create(key):
        # Not that of experiments.comparison, whose scanned layers start from other numbers than the recorded demo.
        return zoo.create_model(
            f"{model}_classifier", rngs=nnx.Rngs(key), channels=data.series.shape[-1], classes=len(data.class_names),
            width=config.width, layers=config.layers, heads=config.heads, hidden=config.hidden, dropout=config.dropout,
            position="sinusoidal", pooling="mean",
        )  # fmt: skip

    def loss(model, batch, key):
        losses, correct = judge(model, batch, key)
        return jnp.mean(losses), {"accuracy": jnp.mean(correct)}

    return fit(
        create, loss, batches(data, config.batch_size, seed=seeds).__getitem__,
        schedule(steps, weight_decay=config.weight_decay), folder,
        seeds=seeds, learning_rates=rates, evaluate=evaluate, label=", ".join(folder.parts[-3:]),
    )  # fmt: skip


def judge(model: nnx.Module, batch: Mapping[str, Any], key: Any = None) -> tuple[Any, Any]:
    """Cross-entropy of every example, and whether its class is the likeliest."""
    logits, _ = model(batch["inputs"], segment_ids=batch["segment_ids"], key=key)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return losses, jnp.argmax(logits, axis=-1) == batch["labels"]


def evaluator(data: ClassificationData) -> Callable[[nnx.Module], dict[str, Float[np.ndarray, " members"]]]:
    """Mean `loss` and `accuracy` on `data` of stacked models; both are NaN for a member that diverged."""
    size = min(len(data), 256, max(1, 2**13 // data.series.shape[1]))
    held_out = list(evaluation_batches(data, size))

    @jax.jit
    def total(models, batch):
        losses, correct = jax.vmap(judge, in_axes=(0, None))(models, batch)
        return {"loss": losses @ batch["weight"], "accuracy": correct @ batch["weight"]}

    def evaluate(models):
        sums = [total(models, batch) for batch in held_out]
        mean = jax.tree.map(lambda *parts: np.sum(parts, axis=0, dtype=np.float64) / len(data), *sums)
        return mean | {"accuracy": np.where(np.isfinite(mean["loss"]), mean["accuracy"], np.nan)}

    return evaluate


def measure_stream(model: nnx.Module, config: Config, data: ClassificationData, label: str) -> dict[str, Any]:
    """The series of a set, one after another, again and again, fed to a model one token at a time."""
    real = np.concatenate([series[:length] for series, length in zip(data.series, data.length, strict=True)])
    tokens = np.resize(real, (config.stream_tokens, real.shape[1]))
    measured = stream(model, tokens, block=config.stream_block, repeats=config.stream_repeats, label=label)
    return {"stream": measured._asdict(), "stream_summary": summarise(measured)}


# --- References -----------------------------------------------------------------------------------------------------


def score_references(train: ClassificationData, test: ClassificationData) -> dict[str, dict[str, float]]:
    """The test accuracies of what needs no network."""
    majority = np.bincount(train.label).argmax()
    found = {"1-NN DTW": train.label[nearest(train, test)], "majority class": majority}
    return {name: {"test_accuracy": float(np.mean(labels == test.label))} for name, labels in found.items()}


def nearest(train: ClassificationData, test: ClassificationData) -> Int[np.ndarray, " examples"]:
    """The training series that is nearest to each test series, the first of equals, by dynamic time warping.

    ``D(x, y)² = min over warping paths of Σ_(i,j) ‖x_i − y_j‖²``: any path from the first steps to the last (no
    window), all channels warped as one ("dependent"), padding left out. For one channel this is the "DTW (w=100)" of
    Dau et al., "The UCR time series archive" (arXiv:1810.07758), as shift and scale of all series change nothing; for
    several "DTW_D" of Bagnall et al. (arXiv:1811.00075), of standardised channels.
    """
    known, queries = (
        [series[:length].astype(np.float64) for series, length in zip(data.series, data.length, strict=True)]
        for data in (train, test)
    )
    found = []
    with progress("nearest neighbours", 0, len(queries), unit="series") as bar:
        for query in queries:
            least, best = math.inf, 0
            for index, series in enumerate(known):
                distance = dtw_ndim.distance_fast(query, series, max_dist=least)  # infinite where it exceeds that
                if distance < least:
                    least, best = distance, index
            found.append(best)
            bar.update()
    return np.array(found)


# --- What is shown --------------------------------------------------------------------------------------------------


def show(metrics: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    cells = metrics["cells"]
    facts = ("train", "test", "channels", "length", "classes")
    sets = [
        {"data set": cell["dataset"]}
        | {fact: cell[fact] for fact in facts}
        | {f"rate, {MODELS[model]}": result["learning_rate"] for model, result in cell["models"].items()}
        for cell in cells
    ]
    text = f"{show_cells(cells, MEASURES)}\n\nThe data sets, and the learning rates that were chosen:\n\n{table(sets)}"
    if _streamed(cells):
        text += f"""

One token at a time: bytes of state and time at the end of the stream, where memory and cumulative time grow as the
tokens to the power of these exponents.

{comparison(metrics)}"""
    return text


def comparison(metrics: Mapping[str, Any]) -> str:
    """The table of the streams."""
    rows = []
    for cell in _streamed(metrics["cells"]):
        for model, result in cell["models"].items():
            found = result["stream_summary"]
            rows.append(
                ({"data set": cell["dataset"]} if len(metrics["cells"]) > 1 else {})
                | {
                    "model": MODELS[model],
                    "test accuracy": result["test_accuracy"],
                    "parameters": result["parameters"],
                    "bytes of state": found["bytes"],
                    "allocated": found["allocated"],
                    "µs per token": round(1e6 * found["seconds_per_token"], 1),
                    "memory exponent": round(found["exponent_of_memory"], 2) + 0.0,
                    "time exponent": round(found["exponent_of_time"], 2),
                }
            )
    return table(rows)


def draw(metrics: Mapping[str, Any], folder: Path) -> None:
    """The accuracies, and what the streams cost if there are any, of the first set."""
    draw_cells(folder / "aaren_classification.png", metrics["cells"], MEASURES[0])
    if streamed := _streamed(metrics["cells"]):
        _draw_streams(streamed[0], folder)


def _streamed(cells: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [cell for cell in cells if any("stream" in result for result in cell["models"].values())]


def _draw_streams(cell, folder):
    with figure(folder / "streaming.png", width=9, height=3.2, panels=2) as (memory, seconds):
        for color, (model, result) in enumerate(cell["models"].items()):
            measured = Stream(**result["stream"])
            memory.plot(measured.tokens, measured.used_bytes, color=f"C{color}", label=MODELS[model])
            memory.plot(measured.tokens, measured.allocated_bytes, "--", color=f"C{color}", alpha=0.6)
            seconds.plot(measured.tokens, measured.seconds, color=f"C{color}", label=MODELS[model])
        memory.plot([], [], "--", color="gray", alpha=0.6, label="allocated")
        memory.set(yscale="log", xlabel="tokens", ylabel="bytes", title="Memory of the state")
        seconds.set(xlabel="tokens", ylabel="seconds", title="Cumulative time, one token at a time")
        for axis in (memory, seconds):
            axis.grid(alpha=0.3)
            axis.legend()
