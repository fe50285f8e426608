"""Language models on the bytes of a real corpus, every mixer with the same number of parameters.

For each mixer: bits per byte on the test split, tokens per second in training, bytes of state, microseconds per
generated token, and a sample. Models differ in the mixer alone; the inner size of their channel mixers makes up for its
parameters. No paper reports these numbers: the sizes here are for a CPU, and papers compare at far larger ones. What
papers claim is the order of mixers in quality, and that the time and memory of a generated token do not grow for
recurrences: the table has both, at two lengths, and the last lines say whether it holds. A window of the test split is
as long as a training sequence, and starts without context.
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
from experiments import ExperimentError, check_positive
from experiments.data import check_text, load_text, text_batches, text_evaluation_batches
from experiments.figures import figure, marker
from experiments.measure import compile_call, count_parameters, fitting_size, time_call
from experiments.results import summary, table
from experiments.trainer import DivergedError, fit, schedule

VOCABULARY = 256


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    text: str = "wikipedia"
    """A corpus out of a package, or a folder of .txt files."""
    mixers: tuple[str, ...] = tuple(zoo.list_mixers())
    """Names of `zoo.list_mixers()`."""
    width: int = 128
    """Size of a token in the model."""
    layers: int = 2
    """Blocks."""
    heads: int = 4
    """Heads of mixers that have them."""
    hidden: int = 256
    """Inner size of the channel mixers beside attention; that of others gives their models as many parameters."""
    length: int = 128
    """Bytes of a training sequence."""
    batch_size: int = 16
    """Sequences per step."""
    steps: int = 400
    """Training steps."""
    seeds: int = 1
    """Members, with seeds 0, 1, …"""
    learning_rate: float = 3e-3
    """Peak learning rate, for all mixers the same."""
    test_windows: int = 512
    """Windows of the test split, of that length, that are tested, from its beginning; a multiple of 32, or fewer."""
    prompts: tuple[int, ...] = (64, 1024)
    """Bytes before those whose generation is timed."""
    generated: int = 64
    """Bytes that are generated."""
    data_dir: str = "data"
    """Where the prepared corpus is kept."""

    def __post_init__(self):
        check_positive(self)
        if self.test_windows % min(32, self.test_windows):
            raise ValueError(f"test_windows: expected a multiple of 32, or fewer, got {self.test_windows}")


PRESETS: dict[str, Config] = {
    "demo": Config(),
    "smoke": Config(
        mixers=("delta",), steps=3, batch_size=4, width=32, hidden=64, test_windows=4, prompts=(8,),
        generated=8,
    ),
}  # fmt: skip


def check(config: Config) -> None:
    """Raise for a corpus that is not here, and for mixers that do not fit."""
    check_text(config.text)
    for name in config.mixers:
        _parameters(name, config, config.hidden)


def run(config: Config, folder: Path) -> dict[str, Any]:
    """Train, test and generate; the results as a dictionary, the figure in `folder`."""
    text = load_text(config.text, data_dir=config.data_dir)
    print(f"{text.source}: {len(text.train):,} bytes to train on, {len(text.test):,} to test on")
    budget = _parameters("attention", config, config.hidden)
    tested = text.test[: config.test_windows * config.length + 1]
    if len(tested) < max(config.prompts):
        raise ExperimentError(
            f"{config.text}: expected {max(config.prompts)} bytes or more to test on: shorten --prompts"
        )
    results, diverged = [], []
    for name in config.mixers:
        try:
            results.append(_compare(name, config, text.train, tested, budget, folder / name))
        except DivergedError:
            diverged.append(name)
    results.sort(key=lambda result: result["bits_per_byte"]["mean"])
    metrics = {
        "source": text.source,
        "parameters": budget,
        "windows": f"{config.test_windows} windows of {config.length} bytes",
        "references": {order: _entropy(text.train, tested, order) for order in range(3)},
        "results": results,
        "diverged": diverged,
    }
    draw(metrics, folder)
    print(f"\n{show(metrics)}\n\nfigure: {folder / 'byte_language_models.png'}")
    return metrics


def show(metrics: Mapping[str, Any]) -> str:
    """The table and the samples as Markdown."""
    counts = ", ".join(f"{bits:.3f} for {order} bytes before" for order, bits in metrics["references"].items())
    samples = "\n".join(f"{result['mixer']:>24}  {result['sample']!r}" for result in metrics["results"])
    return f"""{metrics["source"]}; {metrics["windows"]} of the test split; beside attention a model has \
{metrics["parameters"]:,} parameters.

{table([_row(result) for result in metrics["results"]])}

Diverged: {", ".join(metrics["diverged"]) or "none"}.

Bits per byte of the counts of the training split, each plus 0.01: {counts}.

{_growth(metrics["results"])} Papers on recurrences claim a state and a time that stay.

What each writes after the beginning of the test split, at temperature 0.8, `top_p` 0.95, with the same key:

```
{samples}
```"""


def _create(name: str, config: Config, hidden: int, key: Any) -> nnx.Module:
    fields = {field.name for field in dataclasses.fields(zoo.mixer_config(name))}
    shared = {"heads": config.heads, "head_dim": config.width // config.heads, "context": config.length, "rotary": True}
    shared |= {"shared": config.heads // 4, "active": config.heads // 2}  # of a mixture of heads
    mixer = zoo.mixer_config(name, **{field: value for field, value in shared.items() if field in fields})
    return zoo.create_model(
        "transformer_language_model", rngs=nnx.Rngs(key), vocabulary=VOCABULARY, width=config.width,
        layers=config.layers, pattern=(mixer,), hidden=hidden, gated=True, activation="silu", bias=False, norm="rms",
        tied=True,
    )  # fmt: skip


def _parameters(name: str, config: Config, hidden: int) -> int:
    return count_parameters(jax.eval_shape(lambda: _create(name, config, hidden, jax.random.key(0))))


def _fitting_hidden(name: str, config: Config, budget: int) -> int:
    """The inner size with which a model comes nearest to a number of parameters, at least 8."""
    return max(8, fitting_size(lambda hidden: _parameters(name, config, hidden), budget, start=8))


def _compare(name, config, train, tested, budget, folder):
    """Everything about one mixer."""
    hidden = _fitting_hidden(name, config, budget)

    training = schedule(config.steps)
    seeds = range(config.seeds)
    fitted = fit(
        lambda key: _create(name, config, hidden, key), lambda model, batch, key: (_loss(model, batch), {}),
        text_batches(train, config.batch_size, length=config.length, seed=list(seeds)).__getitem__, training,
        folder, seeds=seeds, learning_rates=[config.learning_rate] * config.seeds, label=name,
    )  # fmt: skip
    model = jax.tree.map(lambda x: x[0], fitted.models)
    return {
        "mixer": name,
        "bits_per_byte": summary(_bits_per_byte(fitted.models, tested, config)),
        "parameters": _parameters(name, config, hidden),
        "hidden": hidden,
        "training_tokens_per_second": _training_speed(name, config, hidden, train),
        "generation": [_generation(model, tested, prompt, config) for prompt in config.prompts],
        "sample": _sample(model, tested, config),
        "training_seconds": fitted.seconds,
        "diverged": fitted.diverged,
        "history": fitted.history,
    }


def _loss(model, batch):
    """Mean nats of the next byte."""
    logits, _ = model(batch["tokens"])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]))


def _bits_per_byte(models, text, config):
    """Of every member, on windows one after another."""
    batches = text_evaluation_batches(text, min(32, config.test_windows), length=config.length)

    @jax.jit
    def total(models, batch):
        def one(model):
            logits, _ = model(batch["tokens"])
            real = batch["targets"] >= 0
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch["targets"], 0))
            return jnp.sum(losses, where=real), jnp.sum(real)

        return jax.vmap(one)(models)

    sums = [total(models, batches[i]) for i in range(len(batches))]
    nats, count = (np.sum(np.asarray(x, float), axis=0) for x in zip(*sums, strict=True))
    return nats / count / np.log(2)


def _training_speed(name, config, hidden, text):
    """Tokens per second of loss and gradients, of one model alone, after compilation; the fastest of five."""
    model = _create(name, config, hidden, jax.random.key(0))
    batch = text_batches(text, config.batch_size, length=config.length, seed=0)[0]

    compiled = compile_call(jax.value_and_grad(_loss), (model, batch))
    return config.batch_size * config.length / time_call(compiled, (model, batch), repeats=5)


def _generation(model, text, prompt, config):
    """Microseconds of a greedy token in a `lax.scan` after a prompt, and the bytes of the state there."""
    tokens = jnp.asarray(text[None, :prompt], jnp.int32)
    _, state = model(tokens, model.init_state(1, prompt + config.generated))

    def decode(model, state, token):
        def step(carry, _):
            token, state = carry
            logits, state = model(token, state)
            return (jnp.argmax(logits[:, -1:], axis=-1).astype(token.dtype), state), None

        return jax.lax.scan(step, (token, state), length=config.generated)[0]

    inputs = model, state, tokens[:, -1:]
    seconds = time_call(compile_call(decode, inputs), inputs, repeats=5)
    return {
        "prompt": prompt,
        "microseconds_per_token": 1e6 * seconds / config.generated,
        "bytes_of_state": zoo.state_bytes(state).used,
    }


def _sample(model, text, config):
    """Text that a model writes after the first bytes of the test split."""
    prompt = jnp.asarray(text[None, : config.prompts[0]], jnp.int32)
    write = jax.jit(zoo.generate, static_argnames=("length", "temperature", "top_p"))
    key = jax.random.key(0)
    tokens = write(model, prompt, length=config.generated, key=key, temperature=0.8, top_p=0.95)
    return bytes(np.asarray(tokens[0], np.uint8)).decode("utf-8", errors="replace")


def _entropy(train, tested, order):
    """Bits per byte of the counts of `order` + 1 bytes in the training split, plus 0.01 each, on what is tested."""

    def contexts(data):
        data = data.astype(np.int64)
        return sum(data[i : len(data) - order + i] * 256 ** (order - 1 - i) for i in range(order)), data[order:]

    counts = np.zeros((256**order, 256)) + 0.01
    np.add.at(counts, contexts(train), 1)
    where = contexts(tested)
    return float(-np.mean(np.log2(counts[where] / counts.sum(axis=1)[where[0]])))


def _growth(results):
    """How the time of a token changes with the prompt, where the state grows and where it does not, as a line."""
    ratios = {"stays": [], "grows": []}
    for result in results:
        first, last = result["generation"][0], result["generation"][-1]
        how = "grows" if last["bytes_of_state"] > first["bytes_of_state"] else "stays"
        ratios[how].append(last["microseconds_per_token"] / first["microseconds_per_token"])
    parts = [
        f"{np.median(group):.2f} times as long for the {len(group)} models whose state {how}"
        for how, group in ratios.items()
        if group
    ]
    return f"After the longest prompt a token takes, in the median, {', '.join(parts)}."


def _row(result):
    first, last = result["generation"][0], result["generation"][-1]
    return {
        "mixer": result["mixer"],
        "bits per byte": result["bits_per_byte"],
        "parameters": result["parameters"],
        "tokens/s in training": int(result["training_tokens_per_second"]),
        f"bytes of state at {first['prompt']}": first["bytes_of_state"],
        f"at {last['prompt']}": last["bytes_of_state"],
        f"µs per token at {first['prompt']}": first["microseconds_per_token"],
        f"µs at {last['prompt']}": last["microseconds_per_token"],
    }


def draw(metrics: Mapping[str, Any], folder: Path) -> None:
    """Bits per byte against bytes of state, and against the speed of training."""
    results = metrics["results"]
    with figure(folder / "byte_language_models.png", width=12, height=5.5, panels=2) as axes:
        values = {
            "bytes of state after the longest prompt": [r["generation"][-1]["bytes_of_state"] for r in results],
            "tokens per second in training": [r["training_tokens_per_second"] for r in results],
        }
        for axis, (label, xs) in zip(axes, values.items(), strict=True):
            for number, (result, x) in enumerate(zip(results, xs, strict=True)):
                style = {"ms": 6, "ls": "none", **marker(number)}
                axis.plot(x, result["bits_per_byte"]["mean"], label=result["mixer"], **style)
            axis.set(xscale="log", xlabel=label, ylabel="bits per byte (test)")
            axis.grid(alpha=0.3)
        axes[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7)
