"""What the parts of a memory that learns at test time are for: parts left out, outliers written, decay.

1. *Parts*: memories of Titans (Ali Behrouz, Peilin Zhong, Vahab Mirrokni, 2025, arXiv:2501.00663) with one thing
   changed, on the task of experiments/needle_in_a_haystack.py.
2. *Outliers*: one memory of `primitives.neural_memory`, nothing trained, writes pairs of random keys and values, some
   values ten times as long as the others; the error is that of the other pairs. The biases are those of Miras (Ali
   Behrouz, Meisam Razaviyayn, Peilin Zhong, Vahab Mirrokni, 2025, arXiv:2504.13173), where Huber's is to be robust.
3. *Decay*: the same without outliers, and the error is that of the last pairs after more and more have been written.

For 2 and 3, sizes of steps and decays are those that are best on other pairs, separately for every point of a curve, so
that no bias suffers from one that suits another. An error is ‖prediction − value‖² / ‖value‖²: 1 for a memory that
answers 0. We had the equations of the papers and what they claim, no table of ablations: claims are in words.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import check_text, load_text
from experiments.figures import figure, marker
from experiments.needle_in_a_haystack import Task, compare, fitting_hidden, mixer
from experiments.results import summary, table
from experiments.trainer import DivergedError, progress
from primitives import huber_error, linear_memory, mlp_memory, neural_memory, power_error, squared_error

VARIANTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "memory": ("memory", {}, "every part contributes"),
    "no forgetting": ("memory", {"forgetting": False}, "of all parts, it costs most to leave this out"),
    "no momentum": ("memory", {"momentum": False}, "costs less than no forgetting, more than no persistent tokens"),
    "depth 1": ("memory", {"depth": 1}, "worse than deeper memories, the more so the longer the context"),
    "depth 3": ("memory", {"depth": 3}, "better than depth 2 in long contexts"),
    "memory_as_gate": ("memory_as_gate", {}, "better than the memory alone"),
    "no persistent tokens": ("memory_as_gate", {"persistent": 0}, "of memory_as_gate, costs least"),
}
"""Mixer, options, and what Titans claims."""
BIASES = {
    "squared": squared_error,
    "huber": huber_error,  # with the length of a value for its threshold
    "power 3": power_error(3),
    "dot product": lambda prediction, value: -jnp.sum(prediction * value),  # writes v kᵀ, as linear attention does
}
LONGER = 10.0


@dataclasses.dataclass(frozen=True)
class Config(Task):
    """Options of the experiment."""

    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which memories are trained, by what is changed."""
    dim: int = 32
    """Channels of random keys and values."""
    trials: int = 128
    """Memories that write pairs of their own, for every point; as many choose steps and decays."""
    pairs: int = 20
    """Pairs that are written where some are outliers."""
    shares: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2)
    """Of outliers, rounded to whole pairs; besides none."""
    written: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    """Numbers of pairs that are written where decay is measured; the error is that of the last `recalled`."""
    recalled: int = 8
    """How many of the last pairs are recalled then."""
    step_sizes: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5)
    """Steps of gradient descent, to choose from."""
    decays: tuple[float, ...] = (0.999, 0.99, 0.97, 0.93, 0.85)
    """What is left of weights after each pair, to choose from."""

    def __post_init__(self):
        super().__post_init__()
        unknown = [name for name in self.variants if name not in VARIANTS]
        if unknown:
            raise ValueError(f"variants: expected some of {', '.join(VARIANTS)}, got {', '.join(unknown)}")
        if not max(self.shares) <= 0.5:
            raise ValueError(f"shares: expected at most 0.5, got {self.shares}")
        if not self.recalled <= min(self.written):
            raise ValueError(f"written: expected at least the {self.recalled} that are recalled, got {self.written}")


PRESETS: dict[str, Config] = {
    "demo": Config(),
    "smoke": Config(
        variants=("memory", "no persistent tokens"), steps=3, batch_size=6, sequences=6, multiples=(1, 2), trials=4,
        pairs=10, shares=(0.2,), written=(8, 16), step_sizes=(0.1, 0.3), decays=(0.9,),
    ),
}  # fmt: skip


def check(config: Config) -> None:
    """Raise for a corpus that is not here, and for memories that do not fit."""
    check_text(config.text)
    for name in config.variants:
        fitting_hidden(_variant(name, config), config)


def run(config: Config, folder: Path) -> dict[str, Any]:
    """All three; the results as a dictionary, the figure in `folder`."""
    outliers, retention = _outliers(config), _retention(config)
    text = load_text(config.text, data_dir=config.data_dir)
    parts, diverged = [], []
    for name in config.variants:
        try:
            result = compare(_variant(name, config), config, text, folder / name.replace(" ", "_"))
            parts.append({"variant": name, **result})
        except DivergedError:
            diverged.append(name)
    metrics = {
        "source": text.source,
        "length": config.length,
        "parts": parts,
        "diverged": diverged,
        "outliers": outliers,
        "retention": retention,
        "recalled": config.recalled,
    }
    draw(metrics, folder)
    print(f"\n{show(metrics)}\n\nfigure: {folder / 'memory_ablations.png'}")
    return metrics


def show(metrics: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    rows = [
        {"variant": part["variant"], "claimed": VARIANTS[part["variant"]][2], **_over_kinds(part)}
        | {"parameters": part["parameters"]}
        for part in metrics["parts"]
    ]
    return f"""*Parts.* Share of needles that are recalled, mean over all kinds, against the length of the context; \
trained on {metrics["length"]} tokens. Text: {metrics["source"]}.

{table(rows)}

Diverged: {", ".join(metrics["diverged"]) or "none"}.

*Outliers.* Error of clean pairs, mean ± standard deviation over trials, against the share of pairs whose values are \
{LONGER:g} times as long. Claimed: Huber's bias is robust to them.

{table([_curve_row(curve) for curve in metrics["outliers"]])}

*Decay.* Error of the last {metrics["recalled"]} pairs, mean ± standard deviation over trials, against the number of \
pairs that have been written. Claimed: without retention interference grows with the length.

{table([_curve_row(curve) for curve in metrics["retention"]])}"""


def _variant(name, config):
    base, options, _ = VARIANTS[name]
    return mixer(base, config, **options)


def _over_kinds(part):
    """The mean accuracy at each length."""
    kinds = part["accuracy"].values()
    return {length: float(np.mean([kind[length]["mean"] for kind in kinds])) for length in next(iter(kinds))}


def _curve_row(curve):
    return {name: value for name, value in curve.items() if name not in ("errors", "chosen")} | curve["errors"]


# --- Memories of random pairs -------------------------------------------------------------------------------------


def _outliers(config):
    """For each memory and bias, the errors against the share of outliers."""
    counts = {f"{share:.0%}": round(share * config.pairs) for share in (0, *config.shares)}
    data = {label: [_pairs(config, seed, config.pairs, count) for seed in (0, 1)] for label, count in counts.items()}
    candidates = [(step, None) for step in config.step_sizes]
    return [
        {"memory": memory, "bias": bias} | _curve(memory, bias, data, candidates)
        for memory, bias in itertools.product(("linear", "two layers"), ("squared", "huber", "power 3"))
    ]


def _retention(config):
    """For each memory, without decay and with it, the errors of the last pairs against the number of pairs."""
    data = {str(n): [_pairs(config, seed, n) for seed in (0, 1)] for n in config.written}
    wanted = {n: jnp.arange(int(n)) >= int(n) - config.recalled for n in data}
    data = {n: [(*pairs, wanted[n]) for *pairs, _ in sets] for n, sets in data.items()}
    return [
        {"memory": memory, "bias": bias, "decay": "none" if decays == (None,) else "chosen"}
        | _curve(memory, bias, data, list(itertools.product(config.step_sizes, decays)))
        for memory, bias in (("linear", "dot product"), ("linear", "squared"), ("two layers", "squared"))
        for decays in ((None,), config.decays)
    ]


def _pairs(config, seed, pairs, outliers=0):
    """Keys and values of length 1 in random directions ``[trials, pairs, dim]``; which ones are clean.

    Outliers are at random places, `LONGER` times as long as the other values.
    """
    rng = np.random.default_rng((seed, pairs, outliers))
    keys, values = rng.standard_normal((2, config.trials, pairs, config.dim))
    keys, values = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (keys, values))
    clean = rng.permuted(np.tile(np.arange(pairs), (config.trials, 1)), axis=1) >= outliers
    values = np.where(clean[..., None], values, LONGER * values)
    return *(jnp.asarray(x, jnp.float32) for x in (keys, values)), jnp.asarray(clean)


def _curve(memory, bias, data, candidates):
    """For each point the errors of all trials, with the step and decay that are best on its first set, on its second.

    Where no error is finite or that of the second set is not, it is `None`.
    """
    curve = {"errors": {}, "chosen": {}}
    with progress(f"{memory}, {bias}", 0, len(data), unit="point") as bar:
        for label, (choosing, measured) in data.items():
            errors = [float(jnp.mean(_errors(memory, bias, *choosing, *each))) for each in candidates]
            best = candidates[int(np.argmin(np.nan_to_num(errors, nan=np.inf)))]
            found = summary(_errors(memory, bias, *measured, *best))
            finite = np.isfinite(found["mean"])
            curve["errors"][label] = {name: found[name] if finite else None for name in ("mean", "std")}
            curve["chosen"][label] = dict(zip(("step", "decay"), best, strict=True))
            bar.update(1)
    return curve


def _errors(memory, bias, keys, values, wanted, step, decay):
    """The mean error of the wanted pairs after all have been written, one after the other, for each trial."""
    apply, _ = _memory(memory, keys.shape[-1])
    weights = _write(memory, bias, keys, values, step, decay)
    predictions = jax.vmap(apply)(weights, keys)
    errors = jnp.sum((predictions - values) ** 2, axis=-1) / jnp.sum(values**2, axis=-1)
    return jnp.mean(errors, axis=1, where=wanted)


@partial(jax.jit, static_argnums=(0, 1))
def _write(memory, bias, keys, values, step, decay):
    """The weights after all pairs, for each trial."""
    apply, initial = _memory(memory, keys.shape[-1])
    keys, values = keys[:, :, None], values[:, :, None]
    gates = {"step": step, "decay": decay, "threshold": 1.0 if bias == "huber" else None}
    gates = {name: None if gate is None else jnp.full(keys.shape[:3], gate) for name, gate in gates.items()}
    _, state = neural_memory(keys, keys, values, **gates, apply=apply, initial_weights=initial, loss=BIASES[bias])
    return jax.tree.map(lambda weight: weight[:, 0], state.weights)


def _memory(name, dim):
    """A memory and its weights before the first pair: zero, or for two layers normal and then zero."""
    last = jnp.zeros((1, 4 * dim if name == "two layers" else dim, dim))
    if name == "linear":
        return linear_memory, last
    return mlp_memory, (jax.random.normal(jax.random.key(0), (1, dim, 4 * dim)), last)


# --- The figure ---------------------------------------------------------------------------------------------------


def draw(metrics: Mapping[str, Any], folder: Path) -> None:
    """Accuracy of the variants, errors under outliers, errors with and without decay."""
    with figure(folder / "memory_ablations.png", width=14, height=5, panels=3) as (parts, outliers, retention):
        for number, part in enumerate(metrics["parts"]):
            _plot(parts, _over_kinds(part), part["variant"], marker(number))
        for axis, curves in ((outliers, metrics["outliers"]), (retention, metrics["retention"])):
            for number, curve in enumerate(curves):
                means = {label.rstrip("%"): error["mean"] for label, error in curve["errors"].items()}
                decay = f", decay {curve['decay']}" if "decay" in curve else ""
                _plot(axis, means, f"{curve['memory']}, {curve['bias']}{decay}", marker(number))
            axis.set(ylabel="error of recall", ylim=(0, None))
        for axis in (parts, retention):
            axis.set_xscale("log", base=2)
        parts.set(xlabel="tokens of the context", ylabel="accuracy of recall", ylim=(-0.03, 1.03), title="Parts")
        outliers.set(xlabel="% of pairs that are outliers", title="Outliers: error of clean pairs")
        retention.set(xlabel="pairs written", title=f"Decay: error of the last {metrics['recalled']} pairs")


def _plot(axis, points, label, style):
    axis.plot([*map(float, points)], [*points.values()], ms=4, lw=1, label=label, **style)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
