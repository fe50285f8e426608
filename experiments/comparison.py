"""Aaren against the Transformer, alike in everything else: what the settings of "Attention as an RNN" share.

A setting trains both models with the same sizes, optimiser, learning rates, steps and seeds; the same seed and step
mean the same batch for both, so that their results are pairs. What it measures are *cells*, one for each data set::

    {"dataset": NAME, "models": {"aaren": {MEASURE: summary over seeds, ...}, "transformer": {...}},
     "references": {NAME: {MEASURE: number} or None}, ...}
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, PRNGKeyArray
from matplotlib.axes import Axes
from scipy import stats

import zoo
from experiments import check_positive, writing
from experiments.figures import figure
from experiments.measure import count_parameters
from experiments.results import table
from experiments.trainer import DivergedError, Fit

__all__ = [
    "MODELS",
    "ComparisonConfig",
    "Measure",
    "choose_rate",
    "count_verdicts",
    "create",
    "describe_training",
    "draw_cells",
    "draw_differences",
    "name_of",
    "paired_difference",
    "remember",
    "show_cells",
]

MODELS = {"aaren": "Aaren", "transformer": "Transformer"}
CONFIDENCE = 0.95
VERDICTS = ("win", "tie", "loss")


@dataclasses.dataclass(frozen=True)
class ComparisonConfig:
    """Options that all settings have."""

    dataset: tuple[str, ...] = ()
    """Names of data sets: those that packages ship or that are simulated, or of published ones in `source_folder`."""
    model: tuple[str, ...] = tuple(MODELS)
    """What is trained: aaren, transformer, or both, which are compared then."""
    source_folder: Path | None = None
    """Holds the published files of data sets that no package ships."""
    data_dir: Path = Path("data")
    """Where prepared data sets are kept."""
    seeds: int = 5
    """Members, with seeds 0, 1, …"""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    """Every model is trained with each, and reported with the one that is best on validation data."""
    steps: int = 300
    """Training steps."""
    batch_size: int = 16
    """Examples per step and member."""
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
    weight_decay: float = 0.01
    """Decoupled weight decay."""

    def __post_init__(self):
        check_positive(self, except_for=("dropout", "weight_decay"))
        for name in ("dataset", "model"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: expected each name once, got {', '.join(values)}")
        if not set(self.model) <= MODELS.keys():
            raise ValueError(f"model: expected names out of {', '.join(MODELS)}, got {', '.join(self.model)}")
        mixers = (zoo.AarenConfig(self.heads),)
        zoo.StackConfig(self.width, self.layers, mixers, hidden=self.hidden, dropout=self.dropout)  # refuses misfits


class Measure(NamedTuple):
    """Something that a setting measures."""

    name: str
    """Its key in what is kept of a model."""
    label: str
    """How tables call it."""
    higher_is_better: bool


def create(kind: str, model: str, config: ComparisonConfig, key: PRNGKeyArray, **arguments: Any) -> nnx.Module:
    """The model of a `kind`, such as "forecaster", with the sizes that both have."""
    return zoo.create_model(
        f"{model}_{kind}", rngs=nnx.Rngs(key), width=config.width, layers=config.layers, heads=config.heads,
        hidden=config.hidden, dropout=config.dropout, position="sinusoidal", scan=config.layers > 1, **arguments,
    )  # fmt: skip


def remember(path: Path, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """What `compute` gives, as JSON in `path`: a run that was killed does not compute it again.

    The run's folder belongs to one configuration (`experiments.run_folder`), so that a path means one computation.
    """
    if not path.exists():
        text = json.dumps(compute(), default=lambda value: value.tolist())
        temporary = path.with_name(f".{path.name}.tmp")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text)
            temporary.replace(path)
    return json.loads(path.read_text())


def choose_rate(by_rate: Float[np.ndarray, "seeds rates"], *, higher_is_better: bool) -> int:
    """The learning rate with the best mean over seeds; `DivergedError` where a seed has diverged at every rate."""
    means = np.mean(by_rate, axis=0) * (1 if higher_is_better else -1)
    if not np.isfinite(means).any():
        raise DivergedError("a seed diverged at every learning rate; give lower ones")
    return int(np.argmax(np.where(np.isfinite(means), means, -np.inf)))


def describe_training(fitted: Fit, learning_rate: float, build: Callable[[PRNGKeyArray], nnx.Module]) -> dict[str, Any]:
    """What is kept of a training beside its measures, with the learning rate that is reported."""
    return {
        "learning_rate": learning_rate,
        "parameters": count_parameters(jax.eval_shape(build, jax.random.key(0))),
        "training_seconds": fitted.seconds,
        "diverged": fitted.diverged,
        "history": fitted.history,
    }


# --- Pairs ----------------------------------------------------------------------------------------------------------


def paired_difference(
    aaren: Sequence[float], transformer: Sequence[float], *, higher_is_better: bool
) -> dict[str, float | str | None]:
    """Aaren minus Transformer with the same seeds: the mean, and its interval from Student's distribution.

    ``d̄ ± t_{n−1} s_d / √n`` covers the true mean with a probability of 95 % where differences are normal. The verdict
    on Aaren is a tie where the interval holds zero; there is none for a single seed or numbers that are not finite.
    """
    differences = np.asarray(aaren, float) - np.asarray(transformer, float)
    mean = float(np.mean(differences))
    if len(differences) < 2 or not math.isfinite(mean):
        return {"mean": mean, "low": None, "high": None, "verdict": None}
    deviation = np.std(differences, ddof=1) / math.sqrt(len(differences))
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1) * deviation)
    low, high = mean - margin, mean + margin
    verdict = "tie" if low <= 0 <= high else "win" if (mean > 0) == higher_is_better else "loss"
    return {"mean": mean, "low": low, "high": high, "verdict": verdict}


def _difference(cell: Mapping[str, Any], measure: Measure) -> dict[str, Any] | None:
    """That of a cell; `None` where it does not have both models, or the measure."""
    found = [cell["models"].get(model, {}).get(measure.name) for model in MODELS]
    if None in found:
        return None
    return paired_difference(*(each["values"] for each in found), higher_is_better=measure.higher_is_better)


def count_verdicts(cells: Sequence[Mapping[str, Any]], measure: Measure) -> dict[str, int]:
    """Over how many cells Aaren wins, ties and loses."""
    differences = (_difference(cell, measure) for cell in cells)
    counts = Counter(difference["verdict"] for difference in differences if difference)
    return {verdict: counts[verdict] for verdict in VERDICTS}


# --- What is shown --------------------------------------------------------------------------------------------------


def show_cells(cells: Sequence[Mapping[str, Any]], measures: Sequence[Measure]) -> str:
    """For each measure a Markdown table: a row for each cell, with both models, their difference and references."""
    return "\n\n".join(text for measure in measures if (text := _show_measure(cells, measure)))


def _show_measure(cells, measure):
    rows = [_row(cell, measure) for cell in cells if any(measure.name in found for found in cell["models"].values())]
    if not rows:
        return ""
    direction = "higher" if measure.higher_is_better else "lower"
    counts = count_verdicts(cells, measure)
    verdicts = f" Aaren: {_count(counts)}." if any(counts.values()) else ""
    return f"**{measure.label}**, {direction} is better.{verdicts}\n\n{table(rows)}"


def _count(counts):
    plural = {"win": "wins", "tie": "ties", "loss": "losses"}
    return ", ".join(f"{count} {verdict if count == 1 else plural[verdict]}" for verdict, count in counts.items())


def _row(cell, measure):
    row = {"data set": name_of(cell)}
    row |= {MODELS[model]: found.get(measure.name) for model, found in cell["models"].items()}
    if difference := _difference(cell, measure):
        row |= {"Aaren less Transformer": _interval(difference), "verdict": difference["verdict"]}
    references = {name: (found or {}).get(measure.name) for name, found in cell.get("references", {}).items()}
    return row | {name: value for name, value in references.items() if value is not None}


def name_of(cell: Mapping[str, Any]) -> str:
    """The data set of a cell, with the horizon where there is one."""
    return f"{cell['dataset']}, {cell['horizon']}" if "horizon" in cell else cell["dataset"]


def _interval(difference):
    mean, low, high = (difference[name] for name in ("mean", "low", "high"))
    if low is None or mean is None:
        return "-" if mean is None or not math.isfinite(mean) else f"{mean:+.4g}"
    digits = max(0, 1 - math.floor(math.log10(high - low))) if high > low else 4
    mean, low, high = (f"{round(value, digits) + 0.0:+.{digits}f}" for value in (mean, low, high))  # no -0
    return f"{mean} [{low}, {high}]"


def draw_cells(path: Path, cells: Sequence[Mapping[str, Any]], measure: Measure, *, above: str | None = None) -> None:
    """What models and references reach in each cell; beside it, of two models, how much better Aaren is.

    Where the name of a reference is given, `above` it, in the direction that is better: for cells of different scales.
    """
    pairs = all(MODELS.keys() <= cell["models"].keys() for cell in cells)
    with figure(path, width=10 if pairs else 6, height=1.6 + 0.26 * len(cells), panels=1 + pairs) as (axis, *rest):
        _draw_values(axis, cells, measure, above)
        for differences in rest:
            draw_differences(differences, cells, measure, title="Pairs of seeds, with 95 % intervals")


def _draw_values(axis, cells, measure, above):
    sign = 1 if measure.higher_is_better or above is None else -1
    for place, cell in enumerate(cells):
        found = {MODELS[model]: result[measure.name] for model, result in cell["models"].items()}
        known = {name: values for name, values in cell["references"].items() if values and measure.name in values}
        found |= {name: {"mean": values[measure.name], "std": None} for name, values in known.items()}
        base = 0 if above is None else found.pop(above)["mean"]
        names = [*MODELS.values(), *cell["references"]]
        for name, value in found.items():
            number = names.index(name)
            axis.errorbar(
                sign * (value["mean"] - base), place, xerr=value["std"], fmt="osx|^v"[number], ms=6, capsize=3,
                color=f"C{number}" if number < len(MODELS) else "0.4", alpha=0.7, label=name,
            )  # fmt: skip
    label = measure.label if above is None else f"{measure.label}: better than {above} →"
    axis.set(xlabel=label, yticks=range(len(cells)), yticklabels=[name_of(cell) for cell in cells])
    axis.tick_params(axis="y", labelsize="small")
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    once = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axis.legend(once.values(), once.keys(), fontsize="small")


def draw_differences(axis: Axes, cells: Sequence[Mapping[str, Any]], measure: Measure, *, title: str) -> None:
    """How much better Aaren is in each cell, whichever direction is better, with its interval."""
    sign = 1 if measure.higher_is_better else -1
    colors = {"win": "C2", "tie": "0.4", "loss": "C3", None: "0.7"}
    known = [(name_of(cell), difference) for cell in cells if (difference := _difference(cell, measure))]
    for place, (_, difference) in enumerate(known):
        color, mean = colors[difference["verdict"]], sign * difference["mean"]
        margin = 0 if difference["low"] is None else (difference["high"] - difference["low"]) / 2
        axis.errorbar(mean, place, xerr=margin, fmt="o", ms=4, capsize=3, color=color)
    axis.axvline(0, color="black", lw=0.8)
    axis.set(yticks=range(len(known)), yticklabels=[name for name, _ in known], title=title)
    axis.set_xlabel(f"{measure.label}: Aaren better →")
    axis.locator_params(axis="x", nbins=6)
    axis.tick_params(axis="y", labelsize="small")
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
