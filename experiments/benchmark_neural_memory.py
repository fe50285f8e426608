"""Test-time memory on this machine: what gradients keep, tokens per second, and both against titans-pytorch.

What gradients keep is the compiler's figure, which needs no run, beside plain scans: over intervals with gradients for
every token, which are weights for every token, and the recurrence over tokens. Results are compared before anything is
timed, and the two sides of a ratio are timed in turn. Nothing here is a test: run it on a quiet machine. The peer is
written in PyTorch, of which a build for CPUs is enough, and has an environment of its own:

    python -m venv .venv-titans && .venv-titans/bin/pip install titans-pytorch==0.5.5 torch==2.13.0
    python -m experiments benchmark_neural_memory --peer .venv-titans/bin/python

`python -m experiments.publish RESULT.json` puts a result into docs/test_time_memory.md.
"""

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments import check_positive
from experiments.figures import figure, marker
from experiments.measure import compile_call, measure_growth, temporary_bytes, time_call, with_gradients
from experiments.peers import check_peer, largest_difference, peak_growth, start_peer, time_in_turn
from experiments.results import table
from experiments.trainer import progress
from primitives import mlp_memory, neural_memory

__all__ = ["PRESETS", "Config", "check", "draw", "run", "show"]

PEER = ("titans-pytorch==0.5.5", "torch==2.13.0")
READS = ("after_token", "after_interval")


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the benchmark."""

    peer: Path | None = None
    """The python of an environment with titans-pytorch 0.5.5 and torch 2.13.0, made by `python -m venv X &&
    X/bin/pip install titans-pytorch==0.5.5 torch==2.13.0`. Without it only our own numbers are measured."""
    width: int = 384
    """Size of a key and of a value."""
    expansion: int = 4
    """Hidden units of a memory in widths."""
    times: tuple[int, ...] = (512, 2048, 8192)
    """Tokens of the table of temporaries, whose memory has depth 2."""
    intervals: tuple[int, ...] = (16, 64, 256)
    """Tokens of an interval, of temporaries and of speed."""
    depths: tuple[int, ...] = (1, 2, 3)
    """Matrices of a memory, of speed."""
    timed: tuple[int, ...] = (512, 1024, 2048, 4096)
    """Tokens of speed."""
    repeats: int = 3
    """The fastest counts."""
    peer_times: tuple[int, ...] = (512, 1024, 2048, 4096)
    """Tokens of the comparison with the peer, whole intervals."""
    peer_interval: int = 64
    """Tokens of an interval of that comparison."""
    narrow_width: int = 64
    """Size of a key of narrow memories there. Read after every token the peer has weights for each, and is only so."""
    rounds: int = 3
    """The two sides of that comparison are timed in turn so many times, `repeats` calls each."""

    def __post_init__(self):
        check_positive(self)
        if any(time % self.peer_interval for time in self.peer_times):
            raise ValueError(f"peer_times: expected multiples of {self.peer_interval}, got {self.peer_times}")


PRESETS: dict[str, Config] = {
    "full": Config(),
    "smoke": Config(
        width=8,
        expansion=2,
        times=(16,),
        intervals=(4,),
        depths=(1,),
        timed=(8, 16),
        repeats=1,
        peer_times=(8,),
        peer_interval=4,
        narrow_width=4,
        rounds=1,
    ),
}


def check(config: Config) -> None:
    """Refuse a peer that cannot serve before a run is claimed."""
    if config.peer is not None:
        check_peer(config.peer, PEER)


def run(config: Config, folder: Path) -> dict[str, Any]:
    """Measure; the results as a dictionary, a figure in `folder`."""
    results = {}
    for name, section in SECTIONS.items():
        results[name] = section.measure(config)
        print(f"\n{section.show(results[name])}")
    draw(results, folder)
    print(f"\nfigure: {folder / FIGURE}")
    return results


class Section(NamedTuple):
    """A part of the results."""

    measure: Callable[[Config], Any]
    show: Callable[[Any], str]
    """What `measure` returned, or its JSON, as Markdown."""


def _inputs(time, config, *, width=None, depth=2):
    """In the order of arguments; the weights of the memory come last."""
    generator = np.random.default_rng(0)
    width = width or config.width
    sizes = width, *[width * config.expansion] * (depth - 1), width

    def noise(*shape):
        return jnp.asarray(generator.normal(size=shape), jnp.float32)

    q, k, v = (noise(1, time, 1, width) for _ in range(3))
    k /= jnp.linalg.norm(k, axis=-1, keepdims=True)
    step, forget, momentum = (jax.nn.sigmoid(noise(1, time, 1)) for _ in range(3))
    gates = {"step": 0.01 * step, "decay": 1 - 0.1 * forget, "momentum": 0.9 * momentum}
    weights = {f"weight{i}": noise(1, *shape) / shape[0] ** 0.5 for i, shape in enumerate(itertools.pairwise(sizes))}
    return {"q": q, "k": k, "v": v} | gates | weights


def _arguments(time, config, **options):
    return tuple(_inputs(time, config, **options).values())


def _outputs(q, k, v, step, decay, momentum, *weights, interval, apply=mlp_memory, **options):
    tokens = (q, k, v, step, decay, momentum)
    return neural_memory(*tokens, apply=apply, initial_weights=weights, update_interval=interval, **options)[0]


# Temporaries


def _measure_memory(config):
    """In copies of the weights; programs are compiled for mere shapes."""
    _compare_forms(config)
    size = 2 * config.width**2 * config.expansion * 4
    rows = []
    for time, interval in _each("temporaries", itertools.product(config.times, config.intervals)):
        inputs = jax.eval_shape(functools.partial(_arguments, time, config))
        row = {"tokens": time, "interval": interval}
        for name, form in _forms(interval).items():
            row[name] = temporary_bytes(with_gradients(form), inputs) / size
        rows.append(row | {"checkpoints": 4 * (time / interval) ** 0.5})
    return {"weights_mib": size / 2**20, "rows": rows}


def _forms(interval):
    """Name to function of `_arguments` to outputs."""
    return {
        **{read: functools.partial(_outputs, interval=interval, read=read) for read in READS},
        "scan over intervals": functools.partial(_plain, interval=interval),
        "scan over tokens": functools.partial(
            _outputs, interval=interval, read="after_token", implementation="sequential"
        ),
    }


def _plain(q, k, v, step, decay, momentum, *weights, interval):
    """The parallel form as it is usually written: a gradient for every token, scans over them, read after each."""

    def loss(weights, k, v):
        return jnp.sum((mlp_memory(weights, k[None])[0] - v) ** 2)

    def update(carry, token):
        gradient, (step, decay, momentum) = token
        weights, speed = carry
        speed = jax.tree.map(lambda s, g: momentum * s - step * g, speed, gradient)
        weights = jax.tree.map(lambda w, s: decay * w + s, weights, speed)
        return (weights, speed), weights

    def window(carry, tokens):
        q, k, v, *gates = tokens
        gradients = jax.vmap(jax.grad(loss), (None, 0, 0))(carry[0], k, v)
        carry, after = lax.scan(update, carry, (gradients, gates))
        return carry, jax.vmap(lambda w, q: mlp_memory(w, q[None])[0])(after, q)

    tokens = jax.tree.map(lambda x: x[0, :, 0].reshape(-1, interval, *x.shape[3:]), [q, k, v, step, decay, momentum])
    weights = jax.tree.map(lambda w: w[0], weights)
    _, outputs = lax.scan(window, (weights, jax.tree.map(jnp.zeros_like, weights)), tokens)
    return outputs.reshape(q.shape)


def _compare_forms(config):
    """Those that read after every token agree, in outputs and gradients."""
    interval = config.intervals[0]
    inputs, forms = _arguments(2 * interval, config), _forms(interval)
    names = "scan over tokens", "after_token", "scan over intervals"
    expected, *others = (compile_call(with_gradients(forms[name]), inputs)(*inputs) for name in names)
    for name, actual in zip(names[1:], others, strict=True):
        largest_difference(actual, expected, name)


def _show_memory(section):
    return (
        f"## Temporaries\n\nOf forward and backward, as the compiler reports them, in copies of the fast weights "
        f"({section['weights_mib']:.1f} MiB), one row, one head; beside them what the checkpoints between intervals "
        f"are, weights and momentum.\n\n{table(section['rows'])}"
    )


# Speed


def _measure_speed(config):
    """Seconds of forward and backward over tokens, for each depth and interval and both read-outs."""
    cases = list(itertools.product(config.depths, config.intervals))
    growths = []
    for depth, interval in _each("speed", cases):
        functions = {read: with_gradients(functools.partial(_outputs, interval=interval, read=read)) for read in READS}
        inputs = functools.partial(_arguments, config=config, depth=depth)
        growth = measure_growth(functions, inputs, config.timed, repeats=config.repeats)
        growths.append({"depth": depth, "interval": interval} | growth)
    return {"width": config.width, "expansion": config.expansion, "growths": growths}


def _show_speed(section):
    rows = []
    for growth in section["growths"]:
        for read, seconds in growth["seconds"].items():
            row = {"depth": growth["depth"], "interval": growth["interval"], "read": read}
            speeds = {f"T {time:,}": round(time / now) for time, now in zip(growth["tokens"], seconds, strict=True)}
            rows.append(row | speeds | {"exponent": growth["exponents"][read]})
    largest = max(row["exponent"] for row in rows)
    return (
        f"## Speed\n\nTokens per second, forward and backward, of {section['width']} channels with "
        f"{section['expansion']} times as many hidden units, and the exponent with which seconds grow with tokens. The "
        f"aim was an exponent of at most 1.1; the largest is {largest:.2f}.\n\n{table(rows)}"
    )


# Against the peer

PEER_CASES = (
    ("after_token", True, "narrow_width"),
    ("after_interval", False, "narrow_width"),
    ("after_interval", False, "width"),
    ("after_interval", True, "width"),
)
"""How memories are read, whether they have momentum, and which option is the size of a key."""


def _measure_peer(config):
    cases = itertools.product(PEER_CASES, config.peer_times)
    rows = [_peer_row(*case, time, config) for case, time in _each("against the peer", cases)]
    return {"peer": config.peer and list(PEER), "interval": config.peer_interval, "rows": rows}


def _peer_row(read, momentum, width, time, config):
    """Seconds and bytes of forward and backward on both sides, after a comparison of outputs and all gradients."""
    width, interval = getattr(config, width), config.peer_interval
    named = _inputs(time, config, width=width)
    if not momentum:
        del named["momentum"]
    inputs = tuple(named.values())
    program = compile_call(with_gradients(functools.partial(_as_peer, tuple(named), read, interval)), inputs)
    row = {"read": read, "momentum": str(momentum), "width": width, "tokens": time}
    clock = functools.partial(time_call, program, inputs)
    memory = _bytes(program, inputs) / 2**20
    if config.peer is None:
        return row | {"ours (s)": clock(repeats=config.repeats), "ours (MiB)": memory}
    options = json.dumps({"interval": interval, "read": read, "threads": os.cpu_count()})
    script = Path(__file__).with_name("titans_peer.py")
    with start_peer(config.peer, script, options, named) as peer:
        peer_memory = peak_growth(peer.process.pid, lambda: peer.seconds("both", repeats=1)) / 2**20
        difference = None
        if read == "after_token" or not momentum:
            peer.seconds("save", repeats=1)
            outputs, gradients = program(*inputs)
            actual = {"outputs": outputs} | dict(zip(named, gradients, strict=True))
            difference = largest_difference(actual, peer.results(), f"{read} at {time} tokens")
        clocks = {"ours": clock, "peer": functools.partial(peer.seconds, "both")}
        seconds = time_in_turn(clocks, rounds=config.rounds, repeats=config.repeats)
    row |= {"difference": difference} | {f"{side} (s)": now for side, now in seconds.items()}
    row |= {"time, peer / ours": seconds["peer"] / seconds["ours"], "ours (MiB)": memory, "peer (MiB)": peer_memory}
    return row | {"memory, peer / ours": peer_memory / memory}


def _as_peer(names, read, interval, *inputs):
    """Ours in the peer's terms: GELU; where it reads after intervals, their decay is the mean of their tokens'."""
    named = dict(zip(names, inputs, strict=True))
    weights = [named.pop(name) for name in names if name.startswith("weight")]
    if read == "after_interval":
        shape = named["decay"].shape
        decay = jnp.mean(named["decay"].reshape(shape[0], -1, interval, shape[-1]), axis=2, keepdims=True)
        rest = jnp.ones((*decay.shape[:2], interval - 1, shape[-1]), decay.dtype)
        named["decay"] = jnp.concatenate([decay, rest], axis=2).reshape(shape)
    apply = functools.partial(mlp_memory, activation=functools.partial(jax.nn.gelu, approximate=False))
    return neural_memory(**named, apply=apply, initial_weights=weights, update_interval=interval, read=read)[0]


def _bytes(program, inputs):
    """What a call needs besides its inputs: as the compiler reports it, or as it grows, whichever is more."""
    analysis = program.memory_analysis()
    grown = peak_growth(os.getpid(), lambda: jax.block_until_ready(program(*inputs)))
    return max(analysis.temp_size_in_bytes + analysis.output_size_in_bytes, grown)


def _show_peer(section):
    rows = section["rows"]
    if section["peer"]:
        faster = sum(row["time, peer / ours"] >= 3 for row in rows)
        smaller = sum(row["memory, peer / ours"] >= 10 for row in rows)
        note = (
            f"The peer is {' with '.join(section['peer'])}, given the same inputs; `difference` is the largest between "
            "outputs or gradients, relative to the root mean square of their row. With momentum and a read-out after "
            "intervals it takes one step of momentum for each interval, which is another recurrence: there only what "
            f"is spent is compared. The aim was to be 3 times as fast at a tenth of the memory: {faster} of "
            f"{len(rows)} ratios of time are 3 or more, {smaller} of {len(rows)} of memory 10 or more."
        )
    else:
        note = f"Ours alone: --peer, with the python of an environment that has {' and '.join(PEER)}, adds the peer."
    return (
        f"## Against titans-pytorch\n\nForward and backward of a memory of depth 2, one row, one head, intervals of "
        f"{section['interval']} tokens. {note} Memory is by how much the process grew at most, for ours no less than "
        f"what the compiler reserves.\n\n{table(rows)}"
    )


def _each(label: str, items: Iterable) -> Iterator:
    """The items, with a progress bar."""
    items = list(items)
    with progress(label, 0, len(items)) as bar:
        for item in items:
            yield item
            bar.update()


SECTIONS = {
    "memory": Section(_measure_memory, _show_memory),
    "speed": Section(_measure_speed, _show_speed),
    "peer": Section(_measure_peer, _show_peer),
}
FIGURE = "test_time_memory_speed.png"


def show(metrics: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    return "\n\n".join(section.show(metrics[name]) for name, section in SECTIONS.items())


def draw(metrics: Mapping[str, Any], folder: Path) -> None:
    """Seconds over tokens for every depth and interval, and seconds and MiB on both sides of the comparison."""
    with figure(folder / FIGURE, width=14, height=5.5, panels=3) as (speed, time, memory):
        for number, growth in enumerate(metrics["speed"]["growths"]):
            label = f"depth {growth['depth']}, interval {growth['interval']}"
            speed.loglog(growth["tokens"], growth["seconds"]["after_token"], label=label, **marker(number))
        speed.set(title="Read after every token", ylabel="seconds")
        rows = metrics["peer"]["rows"]
        cases = list(dict.fromkeys(map(_case, rows)))
        for axis, unit in ((time, "s"), (memory, "MiB")):
            for number, case in enumerate(cases):
                points = [row for row in rows if _case(row) == case]
                tokens = [row["tokens"] for row in points]
                for side, line in (("ours", "-"), ("peer", "--")):
                    if f"{side} ({unit})" in points[0]:
                        values = [row[f"{side} ({unit})"] for row in points]
                        axis.loglog(tokens, values, line, label=f"{side}, {case}", **marker(number))
        time.set(title="Against titans-pytorch", ylabel="seconds")
        memory.set(title="Against titans-pytorch", ylabel="MiB")
        for axis in (speed, time, memory):
            axis.set(xlabel="tokens")
            axis.grid(alpha=0.3, which="both")
            axis.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _case(row):
    """A curve of the comparison."""
    return f"{row['read']}, width {row['width']}{', momentum' * (row['momentum'] == 'True')}"
