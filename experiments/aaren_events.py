"""Event forecasting of "Attention as an RNN": when the next event comes and which it is, by Aaren and by a Transformer.

The second setting of Leo Feng, Frederick Tung, Hossein Hajimirsadeghi, Mohamed Osama Ahmed, Yoshua Bengio, Greg Mori
(2024, arXiv:2405.13956), on the base of Wonho Bae et al., "Meta Temporal Point Processes" (2023, arXiv:2301.12023): a
causal stack over the events so far, a mixture of log-normals for the next gap and a categorical for the next mark (see
zoo/point_process.py). Measured on test sequences, of every event but the first of each, given all before it:

- the negative log-likelihood in nats, of the gap as a density in the unit of the data set, and of the mark where there
  is more than one; its mean is what is trained, and on validation sequences chooses the learning rate;
- the root mean squared error of the next gap, in the same unit, forecast by the mean of the mixture, as in the base
  code: it has the least expected squared error. Gaps longer than any in training count as that one in this mean, which
  one wide component would decide otherwise;
- the accuracy of the most probable mark.

References, fitted to the training sequences: a homogeneous Poisson process with the frequencies of marks; a renewal
process, a mixture of log-normals of as many components without a history, with those frequencies; the same with
frequencies of marks after each mark; for simulated sets the process itself, whose likelihood is exact. Reaching the
latter is possible where there is one mark; the models' mark does not depend on the gap, that of a Hawkes process does.

Deviations: the paper's tables and sizes are not known to us. The preset "paper" has the sizes of the base code and the
paper's eight sets, whose files you must have; no published number stands beside ours. Sequences longer than a row are
cut into pieces, and a piece knows nothing of those before it, for both models alike; the last event of a sequence is
one like others, not the end of the observation; AdamW with a schedule instead of Adam.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from scipy import special, stats

from experiments.comparison import (
    MODELS,
    ComparisonConfig,
    Measure,
    choose_rate,
    create,
    describe_training,
    draw_cells,
    remember,
    show_cells,
)
from experiments.data import (
    EventData,
    EventSequence,
    check_events,
    event_batches,
    event_evaluation_batches,
    load_events,
    pack_events,
)
from experiments.results import summary, table
from experiments.trainer import fit, schedule
from zoo.point_process import SMALLEST_GAP, Prediction, expected_gap, log_density

MEASURES = (
    Measure("nll", "NLL per event", higher_is_better=False),
    Measure("rmse", "RMSE of the next gap", higher_is_better=False),
    Measure("accuracy", "Accuracy of the next mark", higher_is_better=True),
)
ROWS = 32
"""Rows in a batch of evaluation."""

Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Config(ComparisonConfig):
    """Options of the experiment."""

    dataset: tuple[str, ...] = (
        "SimulatedPoisson", "SimulatedSin", "SimulatedHawkes", "AircraftFlights", "AirportDepartures", "BikeTrips",
    )  # fmt: skip
    """Names of data sets: those that are simulated or that packages ship, or of published ones in `source_folder`."""
    learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    """Every model is trained with each, and reported with the one that is best on validation data."""
    batch_size: int = 8
    """Rows per step and member."""
    width: int = 32
    """Size of an event in the model."""
    hidden: int = 64
    """Inner size of the feed-forwards."""
    length: int = 128
    """Events in a row, of one sequence or several."""
    components: int = 8
    """Of the mixtures."""
    validation_sequences: int = 64
    """Sequences of the validation part that are used, evenly spaced, or all if there are fewer."""
    test_sequences: int = 256
    """Sequences of the test part that are used, evenly spaced, or all if there are fewer."""

    def __post_init__(self):
        super().__post_init__()
        if self.length < 2:
            raise ValueError(f"length: expected at least 2 events, got {self.length}")


PRESETS: dict[str, Config] = {
    "desk": Config(),
    "smoke": Config(
        dataset=("SimulatedSin",), seeds=2, learning_rates=(3e-3,), steps=20, batch_size=4, width=16, layers=1,
        heads=2, hidden=16, length=64, components=4, validation_sequences=16, test_sequences=32,
    ),
    # Sizes of the base code, not confirmed as the paper's; for an accelerator.
    "paper": Config(
        dataset=("MIMIC", "Wiki", "Reddit", "Mooc", "StackOverflow", "Sin", "Uber", "Taxi"),
        learning_rates=(1e-4, 3e-4, 1e-3), steps=20_000, batch_size=16, width=64, heads=1, hidden=64,
        weight_decay=1e-4, length=1024, validation_sequences=2**20, test_sequences=2**20,
    ),
}  # fmt: skip


def check(config: Config) -> None:
    """Raise `ValueError` or `FileNotFoundError` for data sets that are not here."""
    for name in config.dataset:
        check_events(name, config.source_folder)


def run(config: Config, folder: Path) -> dict[str, Any]:
    """Train and test the models on every data set; the results, with the figure in `folder`."""
    cells = []
    for name in config.dataset:
        data = load_events(name, data_dir=config.data_dir, source_folder=config.source_folder)
        cells.append(compare(data, config, folder / name))
    metrics = {"cells": cells}
    draw(metrics, folder)
    print(f"\n{show(metrics)}\n\nfigure: {folder / 'aaren_events.png'}")
    return metrics


def compare(data: EventData, config: Config, folder: Path) -> dict[str, Any]:
    """The cell of a data set; resumed from `folder`."""
    parts = {
        "train": data.splits["train"],
        "validation": spread(data.splits["validation"], config.validation_sequences),
        "test": spread(data.splits["test"], config.test_sequences),
    }
    return {
        "dataset": data.name,
        "unit": data.unit,
        "marks": data.marks,
        "source": data.source,
        "events": {split: sum(len(each.times) for each in sequences) for split, sequences in parts.items()},
        "models": {
            model: remember(
                folder / model / "result.json", functools.partial(train, model, data, parts, config, folder / model)
            )
            for model in config.model
        },
        "references": score_references(data, parts, config.components),
    }


def spread(sequences: Sequence[EventSequence], most: int) -> Sequence[EventSequence]:
    """At most so many of the sequences, evenly spaced."""
    index = np.linspace(0, len(sequences) - 1, min(most, len(sequences))).round().astype(int)
    return [sequences[each] for each in index]


# --- Models ---------------------------------------------------------------------------------------------------------


def train(
    model: str, data: EventData, parts: Mapping[str, Sequence[EventSequence]], config: Config, folder: Path
) -> dict[str, Any]:
    """What a model reaches on the test part with its best learning rate, one number for each seed."""
    seeds, rates = zip(*itertools.product(range(config.seeds), config.learning_rates), strict=True)
    rows = {split: pack_events(sequences, config.length) for split, sequences in parts.items()}
    gaps = following(parts["train"]).gaps
    log_gaps, longest = np.log(gaps), float(gaps.max())
    build = functools.partial(
        create, "point_process", model, config, marks=data.marks, components=config.components,
        mean_log_gap=float(log_gaps.mean()), log_gap_scale=float(log_gaps.std()),
    )  # fmt: skip

    def judge(model, batch, key=None):
        marks = batch["marks"] if data.marks > 1 else None
        return score(model(batch["gaps"], marks, segment_ids=batch["segment_ids"], key=key)[0], batch, longest)

    def loss(model, batch, key):
        found = judge(model, batch, key)
        return found["nll"] / jnp.maximum(found["count"], 1), {}

    @jax.jit
    def total(models, batch):
        return jax.vmap(judge, in_axes=(0, None))(models, batch)

    def evaluate(models, split="validation"):
        return average(*(total(models, batch) for batch in event_evaluation_batches(rows[split], ROWS)))

    batches = event_batches(rows["train"], config.batch_size, seed=seeds)
    fitted = fit(
        build, loss, batches.__getitem__, schedule(config.steps, weight_decay=config.weight_decay), folder,
        seeds=seeds, learning_rates=rates, evaluate=evaluate, label=f"{data.name}, {MODELS[model]}",
    )  # fmt: skip
    by_rate = np.reshape(fitted.history[-1]["evaluate/nll"], (config.seeds, -1))
    best = choose_rate(by_rate, higher_is_better=False)
    tested = evaluate(fitted.models, "test")
    return {
        **{name: summary(np.reshape(values, (config.seeds, -1))[:, best]) for name, values in tested.items()},
        "validation_nll": by_rate.mean(axis=0),
        **describe_training(fitted, config.learning_rates[best], build),
    }


def score(prediction: Prediction, batch: Batch, longest: float | None = None) -> dict[str, Float[Array, ""]]:
    """Sums over the events that follow another one of their sequence, and how many those are; see `expected_gap`."""
    prediction = jax.tree.map(lambda x: x[:, :-1], prediction)
    gaps, marks, ids = batch["gaps"][:, 1:], batch["marks"][:, 1:], batch["segment_ids"]
    counts = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)

    def total(values):
        return jnp.sum(jnp.where(counts, values, 0), dtype=jnp.float32)

    nll = -log_density(prediction, gaps)
    sums = {"squares": total((expected_gap(prediction, longest) - gaps) ** 2), "count": total(1)}
    if (logits := prediction.mark_logits) is not None:
        nll += optax.softmax_cross_entropy_with_integer_labels(logits, marks)
        sums["correct"] = total(jnp.argmax(logits, axis=-1) == marks)
    return sums | {"nll": total(nll)}


def average(*sums: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The measures, from what `score` gives for each batch."""
    totals = jax.tree.map(lambda *parts: np.sum(parts, axis=0, dtype=np.float64), *sums)
    means = {name: value / totals["count"] for name, value in totals.items()}
    measures = {"nll": means["nll"], "rmse": np.sqrt(means["squares"])}
    return measures | ({"accuracy": means["correct"]} if "correct" in means else {})


# --- References -----------------------------------------------------------------------------------------------------


class Following(NamedTuple):
    """All events that follow another one of their sequence."""

    gaps: Float[np.ndarray, " events"]
    last: Int[np.ndarray, " events"]
    marks: Int[np.ndarray, " events"]


def following(sequences: Sequence[EventSequence]) -> Following:
    """Those of sequences, with the marks before them; no gap is below the least that a density takes."""
    gaps = np.concatenate([np.diff(each.times) for each in sequences])
    last = np.concatenate([each.marks[:-1] for each in sequences])
    return Following(np.maximum(gaps, SMALLEST_GAP), last, np.concatenate([each.marks[1:] for each in sequences]))


def score_references(
    data: EventData, parts: Mapping[str, Sequence[EventSequence]], components: int
) -> dict[str, dict[str, float] | None]:
    """What is reached on the test part without a network; `None` for what does not apply."""
    train, test = following(parts["train"]), following(parts["test"])
    mean = train.gaps.mean()
    poisson = np.log(mean) + test.gaps / mean
    renewal = -mixture_log_density(test.gaps, *fit_mixture(np.log(train.gaps), components))
    rmse = float(np.sqrt(np.mean((test.gaps - mean) ** 2)))

    counts = np.zeros((data.marks, data.marks))
    np.add.at(counts, (train.last, train.marks), 1)
    frequencies = (counts.sum(axis=0) + 1) / (counts.sum() + data.marks)
    transitions = (counts + frequencies) / (counts.sum(axis=1, keepdims=True) + 1)

    def judge(times, marks):
        found = {"nll": float(np.mean(times - np.log(marks[np.arange(len(marks)), test.marks]))), "rmse": rmse}
        return found | ({"accuracy": float(np.mean(marks.argmax(axis=1) == test.marks))} if data.marks > 1 else {})

    always, after_last = np.broadcast_to(frequencies, (len(test.marks), data.marks)), transitions[test.last]
    truth = data.process and [data.process.log_densities(each) for each in parts["test"]]
    return {
        "Poisson": judge(poisson, always),
        "renewal": judge(renewal, always),
        "renewal, marks after marks": judge(renewal, after_last) if data.marks > 1 else None,
        "true process": {"nll": -float(np.mean(np.concatenate(truth)))} if truth else None,
    }


def fit_mixture(
    values: Float[np.ndarray, " values"], components: int, *, steps: int = 100, most: int = 20_000
) -> tuple[Float[np.ndarray, " components"], ...]:
    """Weights, means and deviations of a mixture of normals, by expectation and maximisation, from quantiles on."""
    values = values[:: -(-len(values) // most), None]
    weights = np.full(components, 1 / components)
    means, deviations = np.quantile(values, np.cumsum(weights) - weights / 2), np.full(components, values.std())
    for _ in range(steps):
        shares = special.softmax(np.log(weights) + stats.norm.logpdf(values, means, deviations), axis=1)
        totals = shares.sum(axis=0) + 1e-9
        weights, means = totals / totals.sum(), np.sum(shares * values, axis=0) / totals
        deviations = np.sqrt(np.sum(shares * (values - means) ** 2, axis=0) / totals) + 1e-3
    return weights, means, deviations


def mixture_log_density(
    gaps: Float[np.ndarray, " gaps"],
    weights: Float[np.ndarray, " components"],
    means: Float[np.ndarray, " components"],
    deviations: Float[np.ndarray, " components"],
) -> Float[np.ndarray, " gaps"]:
    """Of gaps whose logarithms are a mixture of normals, per unit of time."""
    logs = np.log(gaps)
    return special.logsumexp(stats.norm.logpdf(logs[:, None], means, deviations), b=weights, axis=1) - logs


# --- What is shown --------------------------------------------------------------------------------------------------


def show(metrics: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    facts = [
        {
            "data set": cell["dataset"],
            **{f"{split} events": count for split, count in cell["events"].items()},
            "marks": cell["marks"],
            "unit of time": cell["unit"],
            **{f"rate, {MODELS[model]}": found["learning_rate"] for model, found in cell["models"].items()},
            **{f"parameters, {MODELS[model]}": found["parameters"] for model, found in cell["models"].items()},
        }
        for cell in metrics["cells"]
    ]
    return f"{table(facts)}\n\n{show_cells(metrics['cells'], MEASURES)}"


def draw(metrics: Mapping[str, Any], folder: Path) -> None:
    """How much likelier than under a Poisson process events are, and how much better Aaren is."""
    draw_cells(folder / "aaren_events.png", metrics["cells"], MEASURES[0], above="Poisson")
