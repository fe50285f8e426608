"""What Aaren and the Transformer cost: memory and time of a stream in all four settings, and training on long inputs.

**Streams.** The model of each setting of "Attention as an RNN" (Leo Feng et al., 2024, arXiv:2405.13956), of either
kind and with equal sizes, is fed one step at a time, as in the paper's Figure 5: the bytes of its state, and the
cumulative time. Aaren keeps the same few numbers for each head; the Transformer keeps the keys and values of all
tokens, so that its memory grows linearly and its cumulative time, in the end, quadratically. The inputs are random and
the models are not trained: neither changes what is measured. Sizes of inputs and outputs are those of a set of each
setting (HalfCheetah, StackOverflow, ETTh1 at 96 steps, JapaneseVowels). A step of reinforcement learning is three
tokens. The forecaster does without the normalisation of its window, which a stream does not have.

**Training.** One sequence of growing length goes through the stack that all settings share: ``mean(y²)`` of its outputs
(forward), and that with the gradient of all parameters (forward and backward; no optimiser). The Transformer computes
its weights a block of queries at a time and again in the backward pass (`primitives.causal_attention`), so that its
memory is linear too: an implementation that keeps all weights would need quadratic memory. A block spans all keys, also
those after it, which a kernel would leave out: up to half of its time. Temporaries are the bytes that the compiler
reserves besides inputs and outputs.

Time grows with the tokens to the power of an exponent, the slope in logarithms: over all lengths in training, over the
last seven eighths of a stream. All times are those of one machine in one run: compare the columns of a table.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Shaped

import zoo
from experiments import check_positive
from experiments.comparison import MODELS, remember
from experiments.figures import figure
from experiments.measure import growth_exponent, measure_growth, temporary_bytes
from experiments.results import table
from experiments.streaming import Stream, stream, summarise


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the measurement."""

    setting: tuple[str, ...] = (
        "reinforcement learning", "event forecasting", "time-series forecasting", "time-series classification",
    )  # fmt: skip
    """Whose models are fed a stream."""
    width: int = 64
    """Size of a token in the model."""
    layers: int = 2
    """Blocks."""
    heads: int = 4
    """Heads of the mixers."""
    hidden: int = 128
    """Inner size of the feed-forwards."""
    steps: int = 8192
    """Of a stream."""
    block: int = 256
    """Steps between measurements, and the first capacity of a Transformer's cache."""
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    """Tokens in training."""
    repeats: int = 3
    """Times that everything is measured; the fastest counts."""

    def __post_init__(self):
        check_positive(self)
        if not set(self.setting) <= SETTINGS.keys():
            raise ValueError(f"setting: expected names out of {', '.join(SETTINGS)}, got {', '.join(self.setting)}")
        if self.steps % self.block or self.steps < 2 * self.block:
            raise ValueError(f"steps: expected two or more whole blocks of {self.block} steps, got {self.steps}")
        if len(set(self.lengths)) < 2:
            raise ValueError(f"lengths: expected two or more different ones, got {self.lengths}")
        mixers = (zoo.AarenConfig(self.heads),)
        zoo.StackConfig(self.width, self.layers, mixers, hidden=self.hidden)  # refuses misfits


class Setting(NamedTuple):
    """A model of a setting, and what it is fed."""

    head: str
    arguments: Mapping[str, Any]
    inputs: Callable[[np.random.Generator, int], tuple[Shaped[np.ndarray, "steps ..."], ...]]
    tokens_per_step: int = 1


def _normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.normal(size=shape).astype(np.float32)


SETTINGS = {
    "reinforcement learning": Setting(
        "_policy",
        {"observation_size": 17, "action_size": 6},
        lambda random, steps: (
            _normal(random, steps), _normal(random, steps, 17), _normal(random, steps, 6),
            np.arange(steps, dtype=np.int32),
        ),
        tokens_per_step=3,
    ),
    "event forecasting": Setting(
        "_point_process",
        {"marks": 22},
        lambda random, steps: (np.exp(_normal(random, steps)), random.integers(22, size=steps, dtype=np.int32)),
    ),
    "time-series forecasting": Setting(
        "_forecaster",
        {"channels": 7, "horizon": 96, "normalise": False},
        lambda random, steps: (_normal(random, steps, 7),),
    ),
    "time-series classification": Setting(
        "_classifier",
        {"channels": 12, "classes": 9, "pooling": "mean"},
        lambda random, steps: (_normal(random, steps, 12),),
    ),
}  # fmt: skip

PRESETS: dict[str, Config] = {
    "desk": Config(),
    "smoke": Config(
        setting=("time-series classification",), width=16, layers=1, heads=2, hidden=16, steps=16, block=4,
        lengths=(16, 32), repeats=1,
    ),
    "paper": Config(
        width=512, heads=8, hidden=2048, steps=16384, block=512,
        lengths=(1024, 2048, 4096, 8192, 16384, 32768, 65536), repeats=5,
    ),
}  # fmt: skip


def run(config: Config, folder: Path) -> dict[str, Any]:
    """Measure streams, then training; the results, with the figure in `folder`. What is there is not repeated."""
    metrics = {
        "streams": {
            setting: {
                model: remember(
                    folder / setting.replace(" ", "-") / f"{model}.json",
                    functools.partial(measure_stream, setting, model, config),
                )
                for model in MODELS
            }
            for setting in config.setting
        },
        "training": remember(folder / "training.json", functools.partial(measure_training, config)),
    }
    draw(metrics, folder)
    print(f"\n{show(metrics)}\n\nfigure: {folder / 'aaren_efficiency.png'}")
    return metrics


def create(name: str, config: Config, **arguments: Any) -> nnx.Module:
    """A model with the sizes that both kinds have."""
    return zoo.create_model(
        name, rngs=nnx.Rngs(0), width=config.width, layers=config.layers, heads=config.heads, hidden=config.hidden,
        position="sinusoidal", **arguments,
    )  # fmt: skip


def measure_stream(setting: str, model: str, config: Config) -> dict[str, Any]:
    """State and time of a model of a setting after every block of steps."""
    chosen = SETTINGS[setting]
    measured = stream(
        create(model + chosen.head, config, **chosen.arguments),
        chosen.inputs(np.random.default_rng(0), config.steps),
        block=config.block, repeats=config.repeats, label=f"{setting}, {MODELS[model]}",
        tokens_per_step=chosen.tokens_per_step,
    )  # fmt: skip
    return {"stream": measured._asdict(), **summarise(measured)}


def measure_training(config: Config) -> dict[str, Any]:
    """Seconds and temporary bytes of both stacks at all lengths, forward, and forward and backward."""
    stacks = {model: create(model, config) for model in MODELS}

    def inputs(tokens):
        return stacks, jnp.asarray(_normal(np.random.default_rng(0), 1, tokens, config.width))

    found = {}
    for name, function in {"forward": loss, "forward and backward": jax.value_and_grad(loss)}.items():
        calls = {model: functools.partial(_call, function, model) for model in MODELS}
        temporaries = {
            model: [temporary_bytes(call, jax.eval_shape(lambda n=n: inputs(n))) for n in config.lengths]
            for model, call in calls.items()
        }
        growth = measure_growth(calls, inputs, config.lengths, repeats=config.repeats)
        found[name] = growth | {
            "temporary_bytes": temporaries,
            "exponents_of_memory": {k: growth_exponent(config.lengths, v) for k, v in temporaries.items()},
        }
    return found


def loss(stack: nnx.Module, x: Shaped[jax.Array, "batch time width"]) -> Shaped[jax.Array, ""]:
    """``mean(y²)`` of the outputs of a stack."""
    return jnp.mean(stack(x)[0] ** 2)


def _call(function, model, stacks, x):
    return function(stacks[model], x)


# --- What is shown --------------------------------------------------------------------------------------------------


def show(metrics: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    steps = max(each["stream"]["tokens"][-1] for models in metrics["streams"].values() for each in models.values())
    streams = [
        _stream_row(setting, model, found)
        for setting, models in metrics["streams"].items()
        for model, found in models.items()
    ]
    ratios = [_stream_ratios(setting, models) for setting, models in metrics["streams"].items()]
    training = "\n\n".join(
        f"Training, {name}: time and temporaries of one sequence. Time grows with the tokens to the power of "
        f"{_by_model(found['exponents'])}, temporaries {_by_model(found['exponents_of_memory'])}.\n\n"
        f"{table(_training_rows(found))}"
        for name, found in metrics["training"].items()
    )
    return f"""Streams of {steps:,} steps, one at a time; memory and time grow as steps to the power of exponents:

{table(streams)}

The Transformer's as a multiple of Aaren's, at the end of the stream:

{table(ratios)}

{training}"""


def _by_model(values):
    return " and ".join(f"{value:.2f} ({MODELS[model]})" for model, value in values.items())


def _stream_row(setting, model, found):
    return {
        "setting": setting,
        "model": MODELS[model],
        "bytes of state": found["bytes"],
        "allocated": found["allocated"],
        "memory exponent": round(found["exponent_of_memory"], 2) + 0.0,
        "µs per step, last block": round(1e6 * found["seconds_per_token"], 1),
        "seconds in all": found["seconds"],
        "time exponent": round(found["exponent_of_time"], 2),
    }


def _stream_ratios(setting, models):
    columns = {"bytes of state": "bytes", "time of a step": "seconds_per_token", "time in all": "seconds"}
    aaren, transformer = (models[model] for model in MODELS)
    ratios = {column: transformer[key] / aaren[key] for column, key in columns.items()}
    return {"setting": setting} | {column: round(ratio) if ratio > 100 else ratio for column, ratio in ratios.items()}


def _training_rows(found):
    rows = []
    for number, tokens in enumerate(found["tokens"]):
        seconds, temporaries = (
            {model: found[key][model][number] for model in MODELS} for key in ("seconds", "temporary_bytes")
        )
        rows.append(
            {"tokens": tokens}
            | {f"{MODELS[model]}: tokens per second": round(tokens / value) for model, value in seconds.items()}
            | {"Transformer / Aaren, time": seconds["transformer"] / seconds["aaren"]}
            | {f"{MODELS[model]}: MB": value / 1e6 for model, value in temporaries.items()}
        )
    return rows


def draw(metrics: Mapping[str, Any], folder: Path) -> None:
    """Memory of the state, cumulative time of a stream, throughput of training; all axes are logarithmic."""
    styles = {"aaren": "-", "transformer": "--"}
    with figure(folder / "aaren_efficiency.png", width=13, height=4, panels=3) as (memory, time, training):
        for color, (setting, models) in enumerate(metrics["streams"].items()):
            for model, found in models.items():
                measured, look = Stream(**found["stream"]), {"ls": styles[model], "color": f"C{color}"}
                memory.plot(measured.tokens, measured.used_bytes, label=setting if model == "aaren" else None, **look)
                time.plot(measured.tokens, measured.seconds, **look)
        for model, style in styles.items():
            time.plot([], [], ls=style, color="gray", label=MODELS[model])
        for color, (name, found) in zip(("black", "C5"), metrics["training"].items(), strict=True):
            for model, seconds in found["seconds"].items():
                look = {"ls": styles[model], "marker": "o", "color": color}
                speed = np.divide(found["tokens"], seconds)
                training.plot(found["tokens"], speed, label=name if model == "aaren" else None, **look)
        memory.set(xlabel="steps", ylabel="bytes", title="State of a stream")
        time.set(xlabel="steps", ylabel="seconds", title="Cumulative time, one step at a time")
        training.set(xlabel="tokens", ylabel="tokens per second", title="Training on one sequence")
        for axis in (memory, time, training):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.grid(alpha=0.3, which="both")
            axis.legend(fontsize="x-small")
