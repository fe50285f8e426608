"""Forecasts of real series by test-time memories, recurrences and attention, against forecasts that need no network.

A model reads a window of a multivariate series, normalised by its own mean and variance for each channel, and
forecasts all channels at all steps of the horizon at once, linearly from what its stack makes of the last step. All
stacks have the same width, layers, heads and inner size of the channel mixers; what is around a mixer is as in its
paper, so that numbers of parameters differ: they are in the table. Every stack is trained on the same windows for as
many steps, with each learning rate; the rate of the least squared error on the validation part is reported. MSE and MAE
are those of the standardised values of the test part, as in the field; missing values do not count.

The references: the last value repeated; the last season repeated, where it is within the context; and a linear model in
closed form, ridge regression for each channel from its own context, both less the channel's last value there, with the
penalty of the least squared error on the validation part (missing values are filled in its training).

Papers report such errors on ETT, ECL, Traffic, Weather and Exchange, of larger models that were searched for longer.
The preset "paper" has the horizons, the context and the parts of the field, and those sets if you have their files; its
models are not the papers', so no published number stands beside ours. Titans (Ali Behrouz, Peilin Zhong, Vahab
Mirrokni, 2024, arXiv:2501.00663) claims that its neural memory forecasts better than Transformers, state-space models
and linear models: the last table shows whether it does here.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

import zoo
from experiments import check_positive
from experiments.comparison import choose_rate, describe_training
from experiments.data import (
    SeriesData,
    check_series,
    list_series,
    load_series,
    series_batches,
    series_evaluation_batches,
    series_windows,
)
from experiments.figures import figure, marker
from experiments.results import summary, table
from experiments.trainer import DivergedError, fit, schedule

MEMORIES = ("titans_lmm", "titans_mac", "titans_mag", "titans_mal", "moneta", "yaad", "memora")
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the linear model, per window."""
REFERENCES = ("last value", "seasonal naive", "linear")

Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    dataset: tuple[str, ...] = ("ElectricityPrices", "MetroTraffic")
    """Names of series: those that packages ship, or of published files in `source_folder`."""
    source_folder: Path | None = None
    """Holds the published files (ETTh1.csv, electricity.csv, …) of series that no package ships."""
    data_dir: Path = Path("data")
    """Where prepared series are kept."""
    models: tuple[str, ...] = ("aaren", "transformer", *MEMORIES, "gated_deltanet")
    """Names of stacks, as in `zoo.create_model("NAME_forecaster")`."""
    context: int = 96
    """Steps that a model reads."""
    horizon: tuple[int, ...] = (96,)
    """Steps to forecast: a model for each."""
    seeds: int = 2
    """Members per learning rate, with seeds 0, 1, …"""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    """Every model is trained with each, and reported with its best."""
    steps: int = 200
    """Training steps."""
    batch_size: int = 16
    """Windows per step and member."""
    validation_windows: int = 256
    """Windows of the validation part that are forecast, evenly spaced, or all if there are fewer."""
    test_windows: int = 1024
    """Windows of the test part that are forecast, evenly spaced, or all if there are fewer."""
    width: int = 32
    """Size of a token in the model."""
    layers: int = 2
    """Blocks."""
    heads: int = 4
    """Heads of the mixers."""
    hidden: int = 64
    """Inner size of the channel mixers."""
    window: int = 32
    """Steps that the attention beside a memory sees."""
    dropout: float = 0.1
    """Rate, on the residual branches."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""

    def __post_init__(self):
        check_positive(self, except_for=("dropout", "weight_decay"))


PRESETS: dict[str, Config] = {
    "demo": Config(),
    "smoke": Config(
        dataset=("TechStocks",), models=("aaren", "transformer"), seeds=1, learning_rates=(1e-3,), steps=3,
        batch_size=4, validation_windows=8, test_windows=8, width=16, layers=1, heads=2, hidden=16,
    ),
    # Horizons and windows of the field, on every series that has room for them; sizes for an accelerator.
    "paper": Config(
        dataset=tuple(name for name in list_series() if name != "TechStocks"),
        horizon=(96, 192, 336, 720), seeds=5, learning_rates=(1e-4, 3e-4, 1e-3), steps=5000,
        validation_windows=2**16, test_windows=2**16, width=128, layers=2, heads=8, hidden=256,
    ),
}  # fmt: skip


def check(config: Config) -> None:
    """Raise `ValueError` or `FileNotFoundError` for series that are not here, and for sizes that do not fit."""
    for name in config.dataset:
        check_series(name, config.source_folder, context=config.context, horizon=config.horizon)
    for stack in config.models:
        jax.eval_shape(lambda stack=stack: create(stack, config, 1, 1, jax.random.key(0)))


def run(config: Config, folder: Path) -> dict[str, Any]:
    """Train and test every model on every series at every horizon; the results, with the figure in `folder`."""
    metrics = {"context": config.context, "series": {}, "cells": []}
    for name in config.dataset:
        data = load_series(name, data_dir=config.data_dir, source_folder=config.source_folder)
        metrics["series"][name] = describe(data)
        metrics["cells"] += [compare(data, horizon, config, folder / name) for horizon in config.horizon]
    draw(metrics, folder)
    print(f"\n{show(metrics)}\n\nfigure: {folder / 'forecasting.png'}")
    return metrics


def describe(data: SeriesData) -> dict[str, Any]:
    """What a table says about a series."""
    return {
        "steps": len(data.values),
        "channels": len(data.channels),
        "missing": float(1 - data.observed.mean()),
        "season": data.season,
        "source": data.source,
    }


def compare(data: SeriesData, horizon: int, config: Config, folder: Path) -> dict[str, Any]:
    """The errors of all references and models on a series at a horizon; resumed from `folder`."""
    references = score_references(data, horizon, config)
    results, diverged = [], []
    for stack in config.models:
        try:
            results.append(train(stack, data, horizon, config, folder / f"{horizon}-{stack}"))
        except DivergedError:
            diverged.append(stack)
    return {
        "series": data.name,
        "horizon": horizon,
        "windows": count_windows(data, "test", horizon, config),
        "references": references,
        "results": results,
        "diverged": diverged,
    }


# --- Models ---------------------------------------------------------------------------------------------------------


def create(stack: str, config: Config, channels: int, horizon: int, key: Any) -> nnx.Module:
    """The forecaster of a stack, with the sizes that all share."""
    name = f"{stack}_forecaster"
    mixers = zoo.configure(name).pattern
    shared = ("heads", "window")
    options = {field: getattr(config, field) for field in shared if any(hasattr(mixer, field) for mixer in mixers)}
    return zoo.create_model(
        name, rngs=nnx.Rngs(key), channels=channels, horizon=horizon, width=config.width, layers=config.layers,
        hidden=config.hidden, dropout=config.dropout, position="sinusoidal", scan=config.layers > 1, **options,
    )  # fmt: skip


def train(stack: str, data: SeriesData, horizon: int, config: Config, folder: Path) -> dict[str, Any]:
    """The test errors of a stack with its best learning rate, one for each seed.

    Windows depend on the seed and the step alone, so that two stacks with the same seeds are a pair.
    """
    seeds, rates = zip(*itertools.product(range(config.seeds), config.learning_rates), strict=True)

    def build(key):
        return create(stack, config, len(data.channels), horizon, key)

    def loss(model, batch, key):
        found = errors(model(batch["inputs"], key=key)[0], batch)
        count = jnp.maximum(found["count"], 1)
        return found["mse"] / count, {"mae": found["mae"] / count}

    @jax.jit
    def total(models, batch):
        return jax.vmap(lambda model: errors(model(batch["inputs"])[0], batch))(models)

    def evaluate(models, split="validation"):
        return score(lambda batch: total(models, batch), evaluation_batches(data, split, horizon, config))

    batches = series_batches(data, config.batch_size, context=config.context, horizon=horizon, seed=seeds)
    fitted = fit(
        build, loss, batches.__getitem__, schedule(config.steps, weight_decay=config.weight_decay), folder,
        seeds=seeds, learning_rates=rates, evaluate=evaluate, label=f"{data.name}, {folder.name}",
    )  # fmt: skip
    by_rate = np.reshape(fitted.history[-1]["evaluate/mse"], (config.seeds, -1))
    best = choose_rate(by_rate, higher_is_better=False)
    tested = evaluate(fitted.models, "test")
    return {
        "model": stack,
        **{name: summary(np.reshape(values, (config.seeds, -1))[:, best]) for name, values in tested.items()},
        "validation_mse": by_rate.mean(axis=0).tolist(),
        **describe_training(fitted, config.learning_rates[best], build),
    }


# --- Errors ---------------------------------------------------------------------------------------------------------


def errors(forecast: Float[Array, "batch horizon channels"], batch: Batch) -> dict[str, Float[Array, ""]]:
    """Sums over what is observed: squared errors, absolute errors, how many."""
    difference = jnp.where(batch["observed"], forecast - batch["targets"], 0)
    return {
        "mse": jnp.sum(difference**2),
        "mae": jnp.sum(jnp.abs(difference)),
        "count": jnp.sum(batch["observed"], dtype=jnp.float32),
    }


def score(total: Callable[[Batch], Mapping[str, Any]], batches: Iterable[Batch]) -> dict[str, Any]:
    """Means of the `errors` that `total` gives for each batch."""
    sums = jax.tree.map(lambda *parts: np.sum(parts, axis=0, dtype=np.float64), *map(total, batches))
    return {name: sums[name] / sums["count"] for name in ("mse", "mae")}


def evaluation_batches(data: SeriesData, split: str, horizon: int, config: Config) -> Sequence[Batch]:
    """The windows of a part that are forecast, in batches of at most 128."""
    most = {"validation": config.validation_windows, "test": config.test_windows}[split]
    size = min(128, count_windows(data, split, horizon, config), max(1, 2**24 // (horizon * len(data.channels))))
    return series_evaluation_batches(data, split, size, context=config.context, horizon=horizon, most=most)


def count_windows(data: SeriesData, split: str, horizon: int, config: Config) -> int:
    """How many windows of a part are forecast."""
    most = {"validation": config.validation_windows, "test": config.test_windows}[split]
    return min(most, len(series_windows(data, split, context=config.context, horizon=horizon)))


# --- References -----------------------------------------------------------------------------------------------------


def score_references(data: SeriesData, horizon: int, config: Config) -> dict[str, Any]:
    """The test errors of the forecasts that need no network; `None` where a season is not within the context."""

    def test(forecast, split="test"):
        total = jax.jit(lambda batch: errors(forecast(batch["inputs"]), batch))
        return {k: float(v) for k, v in score(total, evaluation_batches(data, split, horizon, config)).items()}

    candidates = [
        lambda inputs, weights=weights: linear(inputs, weights)
        for weights in fit_linear(data, config.context, horizon, PENALTIES)
    ]
    validation = [test(candidate, "validation")["mse"] for candidate in candidates]
    best = int(np.argmin(validation))
    seasonal = data.season is not None and data.season <= config.context
    return {
        "last value": test(lambda inputs: seasonal_naive(inputs, horizon, 1)),
        "seasonal naive": test(lambda inputs: seasonal_naive(inputs, horizon, data.season)) if seasonal else None,
        "linear": test(candidates[best]) | {
            "penalty": PENALTIES[best],
            "validation_mse": validation,
            "parameters": len(data.channels) * (config.context + 1) * horizon,
        },
    }  # fmt: skip


def seasonal_naive(
    inputs: Float[Array, "batch context channels"], horizon: int, season: int
) -> Float[Array, "batch horizon channels"]:
    """The last `season` steps again and again; the last value for a season of 1."""
    return inputs[:, -season:][:, np.arange(horizon) % season]


def linear(
    inputs: Float[Array, "batch context channels"], weights: Float[np.ndarray, "channels context+1 horizon"]
) -> Float[Array, "batch horizon channels"]:
    """``y = x_T + (x − x_T) W + b`` for each channel."""
    last = inputs[:, -1:]
    return last + jnp.einsum("btc,cth->bhc", inputs - last, weights[:, :-1]) + weights[:, -1].T


def fit_linear(
    data: SeriesData, context: int, horizon: int, penalties: Sequence[float]
) -> list[Float[np.ndarray, "channels context+1 horizon"]]:
    """The weights of `linear`, bias last, by ridge regression on all training windows, for each penalty.

    ``argmin_W mean ‖y − x_T − [x − x_T, 1] W‖² + penalty ‖W‖²``.
    """
    part = data.splits["train"]
    views = np.lib.stride_tricks.sliding_window_view(data.values[part.start : part.stop], context + horizon, axis=0)
    gram, cross = 0, 0
    size = max(1, 2**14 // len(data.channels))
    for start in range(0, len(views), size):
        windows = views[start : start + size].transpose(1, 0, 2).astype(np.float64)  # channels first
        windows -= windows[..., context - 1 : context].copy()
        past, future = windows[..., :context], windows[..., context:]
        past = np.concatenate([past, np.ones_like(past[..., :1])], axis=-1)
        gram += past.mT @ past / len(views)
        cross += past.mT @ future / len(views)
    return [np.linalg.solve(gram + penalty * np.eye(context + 1), cross).astype(np.float32) for penalty in penalties]


# --- What is shown --------------------------------------------------------------------------------------------------


def show(metrics: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    return f"""{show_series(metrics)}

{"".join(map(_show_cell, metrics["cells"]))}The least MSE of each kind:

{table([_verdict(cell) for cell in metrics["cells"]])}"""


def show_series(metrics: Mapping[str, Any]) -> str:
    """What is forecast, and from what."""
    series = [
        {"series": name, **facts, "missing": f"{facts['missing']:.1%}"} for name, facts in metrics["series"].items()
    ]
    return f"Errors of the standardised values, from the {metrics['context']} steps before:\n\n{table(series)}"


def _show_cell(cell):
    rows = [
        {
            "forecast by": result["model"],
            "MSE": result["mse"],
            "MAE": result["mae"],
            "parameters": result["parameters"],
            "rate": result["learning_rate"],
        }
        for result in sorted(cell["results"], key=_mse)
    ] + [
        {"forecast by": name, "MSE": found["mse"], "MAE": found["mae"], "parameters": found.get("parameters", 0)}
        for name, found in cell["references"].items()
        if found is not None
    ]
    diverged = f"Diverged: {', '.join(cell['diverged'])}.\n\n" if cell["diverged"] else ""
    return f"""{cell["series"]}, {cell["horizon"]} steps ahead, {cell["windows"]:,} windows:

{table(rows)}

{diverged}"""


def _mse(result: Mapping[str, Any]) -> float:
    return result["mse"]["mean"]


def _verdict(cell: Mapping[str, Any]) -> dict[str, Any]:
    """The best of a cell, by kind."""
    memories = [(_mse(r), r["model"]) for r in cell["results"] if r["model"] in MEMORIES]
    others = [(_mse(r), r["model"]) for r in cell["results"] if r["model"] not in MEMORIES]
    references = [(found["mse"], name) for name, found in cell["references"].items() if found is not None]
    kinds = {"test-time memory": memories, "other model": others, "without a network": references}
    best = {kind: "{1}, {0:.4f}".format(*min(found)) if found else None for kind, found in kinds.items()}
    return {"series": cell["series"], "horizon": cell["horizon"], **best}


def draw(metrics: Mapping[str, Any], folder: Path) -> None:
    """MSE of every model and reference, a panel for each series."""
    names = list(metrics["series"])
    models = list(dict.fromkeys(r["model"] for cell in metrics["cells"] for r in cell["results"]))
    rows = [*REFERENCES, *reversed(models)]
    with figure(folder / "forecasting.png", width=4.6 * len(names), height=4.2, panels=len(names)) as axes:
        for axis, name in zip(axes, names, strict=True):
            for number, cell in enumerate(cell for cell in metrics["cells"] if cell["series"] == name):
                found = {r["model"]: (r["mse"]["mean"], r["mse"]["std"] or 0) for r in cell["results"]}
                found |= {k: (v["mse"], 0) for k, v in cell["references"].items() if v is not None}
                points = [(mean, rows.index(row), std) for row, (mean, std) in found.items()]
                x, y, spread = zip(*points, strict=True)
                axis.errorbar(
                    x, y, xerr=spread, ls="none", ms=5, capsize=3, label=f"{cell['horizon']} steps", **marker(number)
                )
            axis.set(yticks=range(len(rows)), yticklabels=rows, xlabel="MSE", title=name)
            axis.axhline(len(REFERENCES) - 0.5, color="gray", lw=0.8)
            axis.grid(alpha=0.3)
            axis.legend()
