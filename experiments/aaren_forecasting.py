"""Aaren against the Transformer as forecasters of real series (Attention as an RNN, §4.3: time-series forecasting).

Both read a window of a multivariate series, normalised by its own mean and variance for each channel (Non-stationary
Transformers, Yong Liu et al., 2022, arXiv:2205.14415), and forecast all channels at all steps of the horizon at once,
linearly from what their stack makes of the last step. The same seed and step mean the same windows for both. Each
learning rate is tried with every seed; the rate of the least squared error on the validation part is reported, with
the MSE and MAE of the standardised values of the test part, where missing values do not count. Beside them stand the
references of `experiments.forecasting`, which need no network; it is that experiment which does the work here.

The paper (Leo Feng et al., 2024, arXiv:2405.13956) compares them on Weather, Exchange, Traffic, ECL and four ETT sets,
96, 192, 336 and 720 steps ahead, and finds them comparable. Its tables and appendix were not available to us: none of
its numbers are here.

**Deviations.** The preset "desk" has the paper's horizons, but small models that are trained briefly, and the real
series that packages ship, under their own names: they are not the paper's. "paper" has the paper's sets, which need
their published files, and the sizes, the batch size and the learning rate of the code that the paper builds on
(Time-Series-Library), not confirmed as its own: width 512, two layers, eight heads, feed-forwards of 2,048. There, an
encoder and a decoder that reads half of the context again; here, one causal stack and a linear readout. There, Adam for
ten epochs, halving its rate after each, stopped early; here, AdamW along a cosine, for ten epochs of ETTh1, and also
three times the learning rate. The last 20 % of a series are the test part (of ETT, months 17 to 20), the 10 % before
are for validation. A readout for the 862 channels of Traffic, 720 steps ahead, has 318 million weights at that width,
for every member: train fewer `seeds` at once where they do not fit.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import forecasting
from experiments.comparison import (
    MODELS,
    ComparisonConfig,
    Measure,
    draw_cells,
    name_of,
    remember,
    show_cells,
)
from experiments.data import SeriesData, load_series
from experiments.results import table

MEASURES = (Measure("mse", "MSE", False), Measure("mae", "MAE", False))


@dataclasses.dataclass(frozen=True)
class Config(ComparisonConfig):
    """Options of the experiment."""

    dataset: tuple[str, ...] = (
        "AirportFlights", "AirportWeather", "ElectricityPrices", "MetroTraffic", "Pedestrians", "VicElec",
    )  # fmt: skip
    """Names of series: those that packages ship, or of published files in `source_folder`."""
    learning_rates: tuple[float, ...] = (3e-3, 1e-2)
    """Every model is trained with each, and reported with the one that is best on validation data."""
    width: int = 32
    """Size of a token in the model."""
    hidden: int = 64
    """Inner size of the feed-forwards."""
    dropout: float = 0.0
    """Rate, on the residual branches."""
    context: int = 96
    """Steps that a model reads."""
    horizon: tuple[int, ...] = (96, 192, 336, 720)
    """Steps to forecast: a model for each."""
    validation_windows: int = 128
    """Windows of the validation part that are forecast, evenly spaced, or all if there are fewer."""
    test_windows: int = 512
    """Windows of the test part that are forecast, evenly spaced, or all if there are fewer."""


PRESETS: dict[str, Config] = {
    "desk": Config(),
    "smoke": Config(
        dataset=("TechStocks",), horizon=(96,), seeds=2, learning_rates=(1e-3,), steps=3, batch_size=4,
        validation_windows=8, test_windows=8, width=16, layers=1, heads=2, hidden=16,
    ),
    "paper": Config(
        dataset=("Weather", "Exchange", "Traffic", "ECL", "ETTh1", "ETTh2", "ETTm1", "ETTm2"),
        learning_rates=(1e-4, 3e-4), steps=2670, batch_size=32, validation_windows=2**16, test_windows=2**16,
        width=512, layers=2, heads=8, hidden=2048, dropout=0.1, weight_decay=0.0,
    ),
}  # fmt: skip


def check(config: Config) -> None:
    """Raise `ValueError` or `FileNotFoundError` for series that are not here or have no room for a window."""
    forecasting.check(shared(config))


def run(config: Config, folder: Path) -> dict[str, Any]:
    """Train and test both models on every series at every horizon; the results, with the figure in `folder`."""
    metrics = {"context": config.context, "series": {}, "cells": []}
    for name in config.dataset:
        data = load_series(name, data_dir=config.data_dir, source_folder=config.source_folder)
        metrics["series"][name] = forecasting.describe(data)
        metrics["cells"] += [compare(data, horizon, shared(config), folder / name) for horizon in config.horizon]
    draw(metrics, folder)
    print(f"\n{show(metrics)}\n\nfigure: {folder / 'aaren_forecasting.png'}")
    return metrics


def shared(config: Config) -> forecasting.Config:
    """The same as a configuration of `experiments.forecasting`."""
    names = {field.name for field in dataclasses.fields(forecasting.Config)} & vars(config).keys()
    return forecasting.Config(models=config.model, **{name: getattr(config, name) for name in names})


def compare(data: SeriesData, horizon: int, config: forecasting.Config, folder: Path) -> dict[str, Any]:
    """A cell: the errors of the models and of the references; resumed from `folder`."""

    def train(model):
        place = folder / f"{horizon}-{model}"
        return remember(
            place / "result.json", functools.partial(forecasting.train, model, data, horizon, config, place)
        )

    return {
        "dataset": data.name,
        "horizon": horizon,
        "windows": forecasting.count_windows(data, "test", horizon, config),
        "models": {model: train(model) for model in config.models},
        "references": remember(
            folder / f"{horizon}-references.json",
            functools.partial(forecasting.score_references, data, horizon, config),
        ),
    }


# --- What is shown --------------------------------------------------------------------------------------------------


def show(metrics: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    cells = metrics["cells"]
    return f"""{forecasting.show_series(metrics)}

{show_cells(cells, MEASURES)}

How many times the MSE of another forecast, geometric mean over the series:

{table(_ratios(cells))}

What was trained, with the learning rate that was best on the validation part:

{table(list(map(_trained, cells)))}"""


def _mse(cell: Mapping[str, Any]) -> dict[str, float]:
    """Of everything that forecasts, by name."""
    models = {MODELS[model]: found["mse"]["mean"] for model, found in cell["models"].items()}
    return models | {name: found["mse"] for name, found in cell["references"].items() if found is not None}


def _ratios(cells):
    """A row for each horizon, of what all of its cells have."""
    pairs = [(model, other) for model in MODELS.values() for other in ("Transformer", "linear", "last value")]
    rows = []
    for horizon in dict.fromkeys(cell["horizon"] for cell in cells):
        errors = [_mse(cell) for cell in cells if cell["horizon"] == horizon]
        rows.append({"steps ahead": horizon, "series": len(errors)})
        for model, other in pairs:
            if model != other and all({model, other} <= found.keys() for found in errors):
                logarithms = [np.log(found[model] / found[other]) for found in errors]
                rows[-1][f"{model} / {other}"] = float(np.exp(np.mean(logarithms)))
    return rows


def _trained(cell):
    row = {"data set": name_of(cell), "windows of the test": cell["windows"]}
    for model, found in cell["models"].items():
        row |= {
            f"{MODELS[model]}: parameters": found["parameters"],
            f"{MODELS[model]}: rate": found["learning_rate"],
            f"{MODELS[model]}: seconds": round(found["training_seconds"], 1),
        }
    return row


def draw(metrics: Mapping[str, Any], folder: Path) -> None:
    """MSE of models and references; beside it how much better Aaren is."""
    draw_cells(folder / "aaren_forecasting.png", metrics["cells"], MEASURES[0])
