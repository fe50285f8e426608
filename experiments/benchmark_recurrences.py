"""The recurrence algebras on this machine: time against jax-linear-attention and plain scans, memory, growth, drift.

Results are compared before anything is timed, and the two sides of a ratio are timed in turn. Nothing here is a test:
run it on a quiet machine. The tables against jax-linear-attention need an environment with that package, because it
takes another version of JAX than this one:

    python -m venv .venv-peer && .venv-peer/bin/pip install jax-linear-attention==0.1.0 jax==0.11.2
    python -m experiments benchmark_recurrences --peer .venv-peer/bin/python

`python -m experiments.publish RESULT.json` puts a result into docs/recurrences.md.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from experiments import check_positive
from experiments.figures import draw_growth, figure
from experiments.measure import compile_call, measure_growth, temporary_bytes, time_call, with_gradients
from experiments.peers import check_peer, largest_difference, start_peer, time_in_turn
from experiments.results import table
from experiments.trainer import progress
from primitives import delta_rule, linear_attention, linear_recurrence, selective_scan
from primitives.testing import row_errors

PEER = ("jax-linear-attention==0.1.0", "jax==0.11.2")
CHUNK = 64  # tokens of a call in the stream


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the benchmark."""

    peer: Path | None = None
    """The python of an environment with jax-linear-attention 0.1.0 and jax 0.11.2, made by `python -m venv X &&
    X/bin/pip install jax-linear-attention==0.1.0 jax==0.11.2`. Without it only our own times are measured."""
    batch: int = 1
    """Rows."""
    heads: int = 4
    """Heads of linear_attention and delta_rule."""
    dim: int = 64
    """Size of a key and of a value."""
    times: tuple[int, ...] = (2048, 8192)
    """Tokens of the comparison with the peer."""
    channels: int = 1024
    """Channels of linear_recurrence and selective_scan."""
    states: int = 16
    """States of a channel of selective_scan."""
    scan_time: int = 1024
    """Tokens of the comparison with plain scans."""
    memory_time: int = 8192
    """Tokens of the comparison of memory."""
    growth: tuple[int, ...] = (1024, 4096, 16384, 65536, 131072)
    """Tokens of the growth of time."""
    streamed: int = 1_000_000
    """Tokens of the stream, a multiple of those of a piece."""
    piece: int = 40_000
    """Tokens of the stream that are in memory at once, a multiple of 64."""
    stream_dim: int = 16
    """Size of a key and of a value of the stream, which has one head."""
    rounds: int = 5
    """The two sides of a ratio are timed in turn so many times."""
    repeats: int = 3
    """Calls in a round; the fastest of all rounds counts."""

    def __post_init__(self):
        check_positive(self)
        if self.streamed % self.piece or self.piece % CHUNK:
            raise ValueError(f"streamed: expected a multiple of piece, and piece one of {CHUNK}, got {self}")


PRESETS: dict[str, Config] = {
    "table": Config(),
    "smoke": Config(
        heads=2,
        dim=8,
        times=(100,),
        channels=8,
        states=2,
        scan_time=32,
        memory_time=16,
        growth=(128, 256),
        streamed=512,
        piece=256,
        stream_dim=4,
        rounds=1,
        repeats=1,
    ),
}


def check(config: Config) -> None:
    """Refuse a peer that cannot serve before a run is claimed."""
    if config.peer is not None:
        check_peer(config.peer, PEER)


def run(config: Config, folder: Path) -> dict[str, Any]:
    """Measure; the results as a dictionary, a figure of the growth in `folder`."""
    results = {}
    for name, section in SECTIONS.items():
        results[name] = section.measure(config)
        print(f"\n{section.show(results[name])}")
    draw(results, folder)
    print(f"\nfigure: {folder / 'recurrences_growth.png'}")
    return results


class Section(NamedTuple):
    """A part of the results."""

    measure: Callable[[Config], Any]
    show: Callable[[Any], str]
    """What `measure` returned, or its JSON, as Markdown."""


# Inputs, and ours in the form in which everything here is measured: positional arrays to outputs


def _attention(q, k, v, g=None):
    return linear_attention(q, k, v, g)[0]


def _delta(q, k, v, beta, g=None):
    return delta_rule(q, k, v, beta, g)[0]


def _recurrence(decay, inputs):
    return linear_recurrence(decay, inputs)[0]


def _selective(x, dt, a, b, c, d):
    return selective_scan(x, dt, a, b, c, d)[0]


def _attention_inputs(time, config, *, decay, beta=False, seed=0):
    """In the order of arguments; the names are those of the peer."""
    shape = config.batch, time, config.heads
    keys = jax.random.split(jax.random.key(seed), 5)
    q, k, v = (jax.random.normal(key, (*shape, config.dim)) for key in keys[:3])
    inputs = {"q": q, "k": k / jnp.linalg.norm(k, axis=-1, keepdims=True), "v": v}
    if beta:
        inputs["beta"] = jax.nn.sigmoid(jax.random.normal(keys[3], shape))
    if decay != "none":
        gate = {"constant per head": shape[2:], "per head": shape, "per channel": q.shape}[decay]
        inputs["g"] = -0.3 * jax.nn.softplus(jax.random.normal(keys[4], gate))
    return inputs


def _recurrence_inputs(time, channels, config):
    keys = jax.random.split(jax.random.key(1))
    decay, inputs = (jax.random.normal(key, (config.batch, time, channels)) for key in keys)
    return jax.nn.sigmoid(decay + 2), inputs


def _selective_inputs(time, config):
    """As Mamba starts: a = −1, −2, …, and small steps."""
    keys = jax.random.split(jax.random.key(2), 4)
    x, dt = (jax.random.normal(key, (config.batch, time, config.channels)) for key in keys[:2])
    b, c = (jax.random.normal(key, (config.batch, time, config.states)) for key in keys[2:])
    a = jnp.broadcast_to(-jnp.arange(1.0, config.states + 1), (config.channels, config.states))
    return x, jax.nn.softplus(dt - 4), a, b, c, jnp.ones(config.channels)


# The plain forms: over the whole time at once, differentiated by JAX


def _associative(decay, inputs):
    """The states of h = decay h + inputs, every one of them in memory."""

    def combine(earlier, later):
        return earlier[0] * later[0], earlier[1] * later[0] + later[1]

    return lax.associative_scan(combine, (decay, inputs), axis=1)[1]


def _scan(step, state, inputs):
    """A time-major `lax.scan`, as it is usually written."""
    outputs = lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs))[1]
    return jnp.moveaxis(outputs, 0, 1)


def _scanned_recurrence(decay, inputs):
    def step(h, now):
        h = now[0] * h + now[1]
        return h, h

    return _scan(step, jnp.zeros_like(inputs[:, 0]), (decay, inputs))


def _associative_selective(x, dt, a, b, c, d):
    states = _associative(jnp.exp(dt[..., None] * a), (dt * x)[..., None] * b[:, :, None])
    return jnp.einsum("btdn,btn->btd", states, c) + d * x


def _scanned_selective(x, dt, a, b, c, d):
    def step(h, now):
        x, dt, b, c = now
        h = jnp.exp(dt[..., None] * a) * h + (dt * x)[..., None] * b[:, None]
        return h, jnp.einsum("bdn,bn->bd", h, c) + d * x

    return _scan(step, jnp.zeros((x.shape[0], *a.shape)), (x, dt, b, c))


def _associative_attention(q, k, v, g=None):
    states = _associative(_decay(g, k), k[..., None] * v[..., None, :])
    return q.shape[-1] ** -0.5 * jnp.einsum("bthk,bthkv->bthv", q, states)


def _associative_delta(q, k, v, beta, g=None):
    """S = (1 − beta k kᵀ) exp(g) S + beta k vᵀ: products of matrices."""

    def combine(earlier, later):
        return later[0] @ earlier[0], later[0] @ earlier[1] + later[1]

    keys = (beta[..., None] * k)[..., None]
    transitions = (jnp.eye(k.shape[-1]) - keys * k[..., None, :]) * jnp.swapaxes(_decay(g, k), -1, -2)
    states = lax.associative_scan(combine, (transitions, keys * v[..., None, :]), axis=1)[1]
    return q.shape[-1] ** -0.5 * jnp.einsum("bthk,bthkv->bthv", q, states)


def _decay(g, k):
    """exp(g) to multiply states [batch, time, heads, key, value] with."""
    if g is None:
        g = jnp.zeros(k.shape[2])
    g = jnp.broadcast_to(g, k.shape[:3]) if g.ndim < 4 else g
    return jnp.exp(g.reshape(*k.shape[:3], -1, 1))


# Against the peer

KINDS = {
    "simple_gla": ("linear_attention", _attention, {"decay": "per head"}),
    "gla": ("linear_attention", _attention, {"decay": "per channel"}),
    "gated_deltanet": ("delta_rule", _delta, {"decay": "per head", "beta": True}),
    "kda": ("delta_rule", _delta, {"decay": "per channel", "beta": True}),
}


def _measure_peer(config):
    cases = [(kind, time) for time in config.times for kind in KINDS]
    rows = [_peer_row(kind, time, config) for kind, time in _each("against the peer", cases)]
    shape = f"batch {config.batch}, heads {config.heads}, dim {config.dim}"
    return {"shape": shape, "peer": config.peer and list(PEER), "rows": rows}


def _peer_row(kind, time, config):
    """Milliseconds of both, after a comparison of outputs and all gradients."""
    name, form, options = KINDS[kind]
    named = _attention_inputs(time, config, **options)
    inputs = tuple(named.values())
    programs = _programs(form, inputs)
    row = {"primitive": name, "log decay": options["decay"], "tokens": time}
    if config.peer is None:
        return row | _milliseconds({"ours": _clocks(programs, inputs)}, config)
    with start_peer(config.peer, Path(__file__).with_name("jla_peer.py"), kind, named) as peer:
        outputs, gradients = programs["both"](*inputs)
        actual = {"outputs": outputs} | dict(zip(named, gradients, strict=True))
        row |= {"peer": kind, "difference": largest_difference(actual, peer.results(), f"{kind} at {time} tokens")}
        clocks = {program: functools.partial(peer.seconds, program) for program in programs}
        return row | _milliseconds({"ours": _clocks(programs, inputs), "peer": clocks}, config)


def _programs(form, inputs):
    return {"forward": compile_call(form, inputs), "both": compile_call(with_gradients(form), inputs)}


def _clocks(programs, inputs):
    """Name of a program to a function of `repeats` that gives the seconds of its fastest call."""
    return {name: functools.partial(time_call, program, inputs) for name, program in programs.items()}


def _milliseconds(sides, config):
    """Of the programs of every side, timed in turn; each that is not ours as a ratio to ours too."""
    clocks = {(program, side): clock for side, clocks in sides.items() for program, clock in clocks.items()}
    seconds = time_in_turn(clocks, rounds=config.rounds, repeats=config.repeats)
    row = {}
    for program in ("forward", "both"):
        row |= {f"{program}, {side} (ms)": 1e3 * seconds[program, side] for side in sides}
        others = [side for side in sides if side != "ours"]
        row |= {f"{program}, {side} / ours": seconds[program, side] / seconds[program, "ours"] for side in others}
    return row


def _show_peer(section):
    if section["peer"]:
        ratios = [value for row in section["rows"] for name, value in row.items() if name.endswith("peer / ours")]
        reached = sum(ratio >= 2 for ratio in ratios)
        note = (
            f"The peer is {' with '.join(section['peer'])}, given the same inputs; `difference` is the largest between "
            "outputs or gradients, relative to the root mean square of their row. The aim was to be twice as fast "
            f"everywhere: {reached} of {len(ratios)} ratios are 2 or more."
        )
    else:
        note = f"Ours alone: --peer, with the python of an environment that has {' and '.join(PEER)}, adds the peer."
    head = f"## Against jax-linear-attention\n\n{section['shape']}; `both` is forward and backward.\n{note}"
    return f"{head}\n\n{table(section['rows'])}"


# Against plain scans


def _measure_scans(config):
    recurrence = _recurrence_inputs(config.scan_time, config.channels, config)
    selective = _selective_inputs(config.scan_time, config)
    cases = [
        ("linear_recurrence", "associative_scan", _recurrence, _associative, recurrence),
        ("linear_recurrence", "scan", _recurrence, _scanned_recurrence, recurrence),
        ("selective_scan", "associative_scan", _selective, _associative_selective, selective),
        ("selective_scan", "scan", _selective, _scanned_selective, selective),
    ]
    rows = []
    for name, plain, *forms, inputs in _each("against plain scans", cases):
        programs = [_programs(form, inputs) for form in forms]
        difference = largest_difference(*(each["both"](*inputs) for each in programs), f"{name} and {plain}")
        clocks = [_clocks(each, inputs) for each in programs]
        row = {"primitive": name, "plain": plain, "difference": difference}
        rows.append(row | _milliseconds(dict(zip(("ours", "plain"), clocks, strict=True)), config))
    shape = f"batch {config.batch}, {config.scan_time} tokens, {config.channels} channels, {config.states} states"
    return {"shape": shape, "rows": rows}


def _show_scans(section):
    return (
        f"## Against plain scans\n\n{section['shape']}; one `lax.associative_scan` over the whole time, and a "
        f"time-major `lax.scan`, both differentiated by JAX.\n\n{table(section['rows'])}"
    )


# Memory


def _measure_memory(config):
    """Multiples of the bytes of the inputs; programs are compiled for shapes, nothing runs."""
    time, decays = config.memory_time, ("none", "constant per head", "per head", "per channel")

    def attention(**options):
        return jax.eval_shape(lambda: tuple(_attention_inputs(time, config, **options).values()))

    recurrence = jax.eval_shape(lambda: _recurrence_inputs(time, config.channels, config))
    selective = jax.eval_shape(lambda: _selective_inputs(time, config))
    cases = [
        ("linear_recurrence", None, _recurrence, _associative, recurrence),
        *(("linear_attention", name, _attention, _associative_attention, attention(decay=name)) for name in decays),
        *(("delta_rule", name, _delta, _associative_delta, attention(decay=name, beta=True)) for name in decays),
        ("selective_scan", None, _selective, _associative_selective, selective),
    ]
    rows = []
    for name, decay, ours, plain, inputs in _each("memory", cases):
        size = sum(x.size * x.dtype.itemsize for x in inputs)
        row = {"primitive": name, "log decay": decay, "inputs (MiB)": size / 2**20}
        forms = {"ours": ours, "associative_scan": plain}
        multiples = {side: temporary_bytes(with_gradients(form), inputs) / size for side, form in forms.items()}
        rows.append(row | {f"{side} / inputs": multiple for side, multiple in multiples.items()})
    return {"tokens": time, "rows": rows}


def _show_memory(section):
    return (
        f"## Memory\n\nTemporaries of forward and backward at {section['tokens']:,} tokens as the compiler reports "
        f"them, beside those of one `lax.associative_scan` over the states.\n\n{table(section['rows'])}"
    )


# Growth


def _copy(*inputs):
    """What growth is compared with: beyond the caches of a CPU memory is slower, also for this."""
    return [x + 1 for x in inputs]


def _measure_growth(config):
    """Seconds against time, with a decay per head and one channel of linear_recurrence for every value."""

    def attention(time, **options):
        return tuple(_attention_inputs(time, config, decay="per head", **options).values())

    cases = {
        "linear_attention": (_attention, attention),
        "delta_rule": (_delta, functools.partial(attention, beta=True)),
        "linear_recurrence": (
            _recurrence,
            lambda time: _recurrence_inputs(time, config.heads * config.dim, config),
        ),
    }
    growth = {}
    for name, (form, inputs) in _each("growth", cases.items()):
        functions = {"copy of the inputs": _copy, "forward": form, "forward + backward": with_gradients(form)}
        growth[name] = measure_growth(functions, inputs, config.growth, repeats=config.repeats)
    return growth


def _show_growth(section):
    rows = [{"primitive": name, **growth["exponents"]} for name, growth in section.items()]
    tokens = next(iter(section.values()))["tokens"]
    head = f"## Growth\n\nTime grows from {tokens[0]:,} to {tokens[-1]:,} tokens with the exponent:"
    return f"{head}\n\n{table(rows)}"


def draw(metrics: Mapping[str, Any], folder: Path) -> None:
    """The growth of time, a panel for each primitive."""
    growth = metrics["growth"]
    with figure(folder / "recurrences_growth.png", width=12, height=3.4, panels=len(growth)) as axes:
        for axis, (name, measured) in zip(axes, growth.items(), strict=True):
            draw_growth(axis, measured, title=name)


# Drift


def _measure_drift(config):
    """Errors of the outputs of a carried float32 state, against the definition in float64 on the same inputs."""
    config = dataclasses.replace(config, batch=1, heads=1, dim=config.stream_dim)
    return {"dim": config.dim, "rows": [row for decay in ("none", "per head") for row in _drift_rows(decay, config)]}


def _drift_rows(decay, config):
    @jax.jit
    def make(index):  # from the number of the piece alone: the whole is never in memory
        return tuple(_attention_inputs(config.piece, config, decay=decay, seed=index).values())

    exact = _stream(CHUNK, implementation="sequential")
    forms = {"1 token": _stream(1), f"{CHUNK} tokens": _stream(CHUNK)}
    states, wide, errors = dict.fromkeys(forms), None, {name: [] for name in forms}
    for index in _each(f"stream, log decay {decay}", range(config.streamed // config.piece)):
        inputs = make(index)
        with jax.enable_x64(True):
            wide, expected = exact(wide, tuple(x.astype(jnp.float64) for x in inputs))
        for name, form in forms.items():
            states[name], outputs = form(states[name], inputs)
            errors[name].append(row_errors(outputs, expected)[0])
    columns = [f"error after {tokens:,} tokens" for tokens in (config.piece, config.streamed)]
    return [
        {"log decay": decay, "in one call": name} | dict(zip(columns, (found[0], found[-1]), strict=True))
        for name, found in errors.items()
    ]


def _stream(size, **options):
    """A function of (state, inputs) to the next state and the last outputs: a `lax.scan` of calls of `size` tokens."""

    def step(state, call):
        outputs, state = linear_attention(*call, state=state, **options)
        return state, outputs

    @jax.jit
    def advance(state, inputs):
        calls = [x[0].reshape(-1, 1, size, *x.shape[2:]) for x in inputs]
        if state is None:  # zeros of the right kind; the shapes do not depend on the call
            fresh = jax.eval_shape(lambda: linear_attention(*inputs)[1])
            state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), fresh)
        state, outputs = lax.scan(step, state, calls)
        return state, outputs.reshape(inputs[2].shape)[:, -CHUNK:]

    return advance


def _show_drift(section):
    return (
        "## Drift\n\nlinear_attention as a `lax.scan` of calls that pass the float32 state on, one head of size "
        f"{section['dim']}: the largest error of the last {CHUNK} outputs, relative to the root mean square of their "
        f"row, against the definition in float64.\n\n{table(section['rows'])}"
    )


def _each(label: str, items: Iterable) -> Iterator:
    """The items, with a progress bar."""
    items = list(items)
    with progress(label, 0, len(items)) as bar:
        for item in items:
            yield item
            bar.update()


SECTIONS = {
    "peer": Section(_measure_peer, _show_peer),
    "scans": Section(_measure_scans, _show_scans),
    "memory": Section(_measure_memory, _show_memory),
    "growth": Section(_measure_growth, _show_growth),
    "drift": Section(_measure_drift, _show_drift),
}


def show(metrics: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    return "\n\n".join(section.show(metrics[name]) for name, section in SECTIONS.items())
