"""The laws of primitives/testing.py over every mixer: a new mixer is one entry of `MIXERS`.

`make test` runs tables in which every value of every axis and every pair of values occurs, `make test-all` the product.
"""

import importlib
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primitives import (
    attention,
    causal_attention,
    causal_flow_attention,
    contract,
    decays,
    delta_rule,
    huber_error,
    init_attention_state,
    linear_attention,
    linear_memory,
    linear_recurrence,
    mlp_memory,
    neural_memory,
    prefix_scan,
    prefix_scan_attention,
    selective_scan,
    short_convolution,
    sigmoid_attention,
    sliding_window,
    sliding_window_attention,
    testing,
)
from primitives.testing import Case, Mixer

# Modules whose names their functions have.
linear_attention_module, linear_recurrence_module, selective_scan_module = (
    importlib.import_module(f"primitives.{name}")
    for name in ("linear_attention", "linear_recurrence", "selective_scan")
)


def _ramp(inputs, start, stop):
    shape = inputs["logits"].shape
    return inputs | {"logits": np.broadcast_to(np.linspace(start, stop, shape[1])[:, None], shape)}


def _sigmoid(noise):
    return 1 / (1 + np.exp(-noise))


def _decays(scale):
    """Extreme decays of a recurrence whose valid ones are `scale` times numbers in (0, 1)."""
    return {
        "to zero": lambda x: x | {"decay": 1e-6 * x["decay"]},
        "one": lambda x: x | {"decay": scale(x["decay"])},
        "mixed": lambda x: x | {"decay": np.where(x["decay"].real > 0.5, scale(x["decay"]), 0)},
        "all equal": lambda x: {name: np.full_like(array, 0.75) for name, array in x.items()},
    }


def _softplus(noise):
    return np.log1p(np.exp(noise))


def _log_decays(function):
    """Inputs whose log decays, where there are any, are a function of what they were."""
    return lambda x: {name: function(array) if name == "log_decay" else array for name, array in x.items()}


def _matrix_memory(function, log_decay, queries="heads", keys="heads", values="heads", **gates):
    """A mixer whose state is a matrix for each head, with log decays of the given axes."""
    axes = {"q": f"batch time {queries} dim", "k": f"batch time {keys} dim", "v": f"batch time {values} value_dim"}
    axes |= dict.fromkeys(gates, "batch time state_heads") | ({"log_decay": log_decay} if log_decay else {})
    heads = {"heads": 2, "one_head": 1, "four_heads": 4}
    return Mixer(
        function,
        axes=axes,
        state_axes=("batch state_heads dim value_dim", "batch"),
        implementations=linear_attention_module.IMPLEMENTATIONS,
        default="chunked",
        sizes=heads | {"value_dim": 24, "state_heads": max(heads[keys], heads[values])},
        transforms={"k": lambda noise: noise / np.linalg.norm(noise, axis=-1, keepdims=True)}
        | {"log_decay": lambda noise: -0.3 * _softplus(noise)}
        | gates,
        extremes={
            "forgetting everything": _log_decays(lambda g: g - 1e4),
            "forgetting nothing": _log_decays(lambda g: 0 * g),
            "forgetting now and then": _log_decays(lambda g: np.where(np.sin(1e6 * g) > 0.7, -1e4, 0)),
            "resetting now and then": _log_decays(lambda g: np.where(np.sin(1e6 * g) > 0.7, -np.inf, 0)),
            "all equal": lambda x: x | {name: np.full_like(x[name], 0.25) for name in ("q", "k", "v", *gates)},
        },
    )


def _with_decays(function, **gates):
    """The same with log decays of all shapes, and all ways to share heads."""
    return {
        "no decay": _matrix_memory(function, None, queries="four_heads", **gates),
        "decay per head": _matrix_memory(function, "state_heads", keys="one_head", **gates),
        "decay per token": _matrix_memory(
            function, "batch time state_heads", queries="one_head", keys="one_head", **gates
        ),
        "decay per channel": _matrix_memory(function, "batch time state_heads dim", **gates),
    }


def _attention(function, heads, **parameters):
    """A mixer whose state is a cache of keys and values, with parameters for each head of queries."""
    return Mixer(
        function,
        axes={"q": "batch time heads dim", "k": "batch time key_heads dim", "v": "batch time value_heads value_dim"}
        | dict.fromkeys(parameters, "heads"),
        state_axes=("batch capacity key_heads dim", "batch capacity value_heads value_dim", "batch", "batch", "batch"),
        implementations=attention.IMPLEMENTATIONS,
        sizes={"heads": 4, "value_dim": 24} | heads,
        transforms={"q": lambda noise: noise / 2} | parameters,
        extremes={
            # Integers, so that the logits are exact in float32.
            "large": lambda x: x | {name: np.round(8 * x[name]) for name in "qk"},
            "all equal": lambda x: x | {name: np.full_like(x[name], 0.75) for name in "qk"},
        },
        initial_state=lambda x, capacity: init_attention_state(
            x["k"].shape[0], capacity, *x["k"].shape[2:], x["v"].shape[-1], x["k"].dtype, x["v"].shape[2]
        ),
    )


def _windowed(function):
    """A mixer whose cache rolls."""
    return _attention(partial(function, window=8), {"key_heads": 1, "value_heads": 2})._replace(
        state_axes=("batch past key_heads dim", "batch past value_heads value_dim", "batch", "batch"),
        implementations=sliding_window.IMPLEMENTATIONS,
        default="banded",
        initial_state=None,
    )


def _with_prefix():
    def function(prefix_keys, prefix_values, **arguments):
        return sliding_window_attention(prefix=(prefix_keys, prefix_values), **arguments)

    mixer = _windowed(function)
    axes = {"prefix_keys": "prefix key_heads dim", "prefix_values": "prefix value_heads value_dim"}
    return mixer._replace(axes=mixer.axes | axes, sizes=mixer.sizes | {"prefix": 3})


MLP = {"w_in": "heads dim hidden", "w_out": "heads hidden dim"}


def _test_time_memory(weights, gates=("decay",), queries="heads", **options):
    """A mixer whose state is the weights of a network, with those that documents start with as inputs."""
    one = len(weights) == 1

    def function(**arguments):
        trees = {name: arguments.pop(name) for name in weights}
        return neural_memory(**arguments, initial_weights=trees["w"] if one else trees, **options)

    def change(**changes):
        return lambda x: {name: changes.get(name, lambda array: array)(array) for name, array in x.items()}

    axes = {name: f"batch {axes}" for name, axes in weights.items()}
    axes = axes["w"] if one else axes
    return Mixer(
        function,
        axes={"q": f"batch time {queries} dim", "k": "batch time heads dim", "v": "batch time heads dim"}
        | dict.fromkeys(("step", *gates), "batch time heads")
        | weights,
        state_axes=(
            axes,
            axes if "momentum" in gates else None,
            axes if options.get("update_interval", 1) > 1 else None,
            "batch",
            "batch",
        ),
        implementations=("sequential", "chunked"),
        default="chunked",
        starts_from_inputs=True,
        sizes={"hidden": 8, "query_heads": 4},
        transforms={
            "k": lambda noise: noise / np.linalg.norm(noise, axis=-1, keepdims=True),
            "step": lambda noise: 0.1 * _sigmoid(noise),
            "decay": lambda noise: 1 - 0.3 * _sigmoid(noise),
            "momentum": lambda noise: 0.8 * _sigmoid(noise),
            "threshold": _softplus,
        }
        | dict.fromkeys(weights, lambda noise: noise / 2),
        extremes={
            "forgetting everything": change(decay=np.zeros_like),
            "forgetting nothing": change(decay=np.ones_like, step=lambda x: x / 8),
            "forgetting now and then": change(
                decay=lambda x: np.round(np.sin(1e6 * x) < 0.7), momentum=lambda x: np.round(np.sin(1e6 * x) < 0.7) / 2
            ),
            "no steps": change(step=np.zeros_like),
            "no keys": change(k=np.zeros_like),
            "one key": change(k=lambda k: np.broadcast_to(k[:, :1], k.shape)),
            "all equal": change(**dict.fromkeys("qkv", lambda x: np.full_like(x, 0.25))),
        },
    )


# A mixer, or several variants of one by name.
MIXERS: dict[str, Mixer | dict[str, Mixer]] = {
    "prefix_scan_attention": Mixer(
        prefix_scan_attention,
        axes={"logits": "batch time heads", "values": "batch time heads dim"},
        state_axes=("batch heads", "batch heads", "batch heads dim", "batch"),
        implementations=prefix_scan.IMPLEMENTATIONS,
        default="loop",
        transforms={"logits": lambda noise: 3 * noise},
        extremes={
            "ramp up": lambda x: _ramp(x, -1e4, 1e4),
            "ramp down": lambda x: _ramp(x, 1e4, -1e4),
            "far below zero": lambda x: x | {"logits": x["logits"] - 1e4},
            "alternating": lambda x: x | {"logits": 1e4 * np.sign(x["logits"])},
            "all equal": lambda x: {name: np.full_like(array, 0.75) for name, array in x.items()},
            "no weight at first": lambda x: (
                x | {"logits": np.concatenate([0 * x["logits"][:, :70] - np.inf, x["logits"][:, 70:]], 1)}
            ),
        },
    ),
    "causal_attention": {
        "softmax": _attention(causal_attention, {"key_heads": 2, "value_heads": 4}),
        "sigmoid": _attention(
            sigmoid_attention, {"key_heads": 2, "value_heads": 2}, bias=lambda noise: noise - np.log(131)
        ),
    },
    "sliding_window_attention": {"window": _windowed(sliding_window_attention), "prefix": _with_prefix()},
    "causal_flow_attention": Mixer(
        causal_flow_attention,
        axes={"q": "batch time heads dim", "k": "batch time heads dim", "v": "batch time heads value_dim"},
        state_axes=(
            *["batch heads dim"] * 4,
            "batch heads one",
            "batch heads dim value_dim",
            "batch",
            "batch",
        ),
        implementations=("sequential", "chunked"),
        default="chunked",
        sizes={"value_dim": 24, "one": 1},
        extremes={
            "saturated": lambda x: x | {name: 1e4 * np.sign(x[name]) for name in "qk"},
            "small capacities": lambda x: x | {name: x[name] - 7 for name in "qk"},
            "all equal": lambda x: {name: np.full_like(array, 0.75) for name, array in x.items()},
        },
    ),
    "linear_attention": _with_decays(linear_attention),
    "delta_rule": _with_decays(delta_rule, beta=lambda noise: 2 / (1 + np.exp(-noise))),
    "neural_memory": {
        "Titans": _test_time_memory(
            MLP, ("decay", "momentum"), queries="query_heads", apply=mlp_memory, update_interval=8
        ),
        "token by token": _test_time_memory(MLP, ("decay", "momentum"), apply=mlp_memory),
        "Huber, without dot": _test_time_memory(
            MLP,
            ("decay", "momentum", "threshold"),
            apply=lambda weights, keys: mlp_memory(weights, keys),
            loss=huber_error,
            update_interval=24,
            read="after_interval",
        ),
        "delta rule": _test_time_memory({"w": "heads dim dim"}, (), queries="query_heads", apply=linear_memory),
    },
    "short_convolution": Mixer(
        short_convolution,
        axes={"x": "batch time dim", "weight": "width dim", "bias": "dim"},
        state_axes=("batch past dim", "batch"),
        implementations=("sequential", "parallel"),
        default="parallel",
        sizes={"width": 3},
        extremes={
            "large": lambda x: x | {"x": 100 * np.sign(x["x"])},
            "all equal": lambda x: {name: np.full_like(array, 0.75) for name, array in x.items()},
        },
    ),
    "linear_recurrence": {
        "real": Mixer(
            linear_recurrence,
            axes={"decay": "batch time heads dim", "inputs": "batch time heads dim"},
            state_axes=("batch heads dim", "batch"),
            implementations=linear_recurrence_module.IMPLEMENTATIONS,
            default="loop",
            transforms={"decay": lambda noise: _sigmoid(1 + 2 * noise)},
            extremes=_decays(np.ones_like),
        ),
        "complex": Mixer(
            linear_recurrence,
            axes={"decay": "heads dim", "inputs": "batch time heads dim"},
            state_axes=("batch heads dim", "batch"),
            implementations=linear_recurrence_module.IMPLEMENTATIONS,
            default="loop",
            transforms={
                "decay": lambda noise: _sigmoid(1 + 2 * noise) * np.exp(3j * noise[::-1]),
                "inputs": lambda noise: noise + 1j * noise[:, ::-1],
            },
            extremes=_decays(lambda decay: decay / np.abs(decay)),
        ),
    },
    "selective_scan": Mixer(
        selective_scan,
        axes={
            "x": "batch time dim",
            "dt": "batch time dim",
            "a": "dim n",
            "b": "batch time n",
            "c": "batch time n",
            "d": "dim",
        },
        state_axes=("batch dim n", "batch"),
        implementations=selective_scan_module.IMPLEMENTATIONS,
        default="loop",
        sizes={"n": 4},
        transforms={"dt": lambda noise: np.logaddexp(0, noise - 1), "a": lambda noise: -np.exp(noise)},
        extremes={
            "forget all": lambda x: x | {"dt": 1 + x["dt"], "a": 1e3 * x["a"]},
            "forget nothing": lambda x: x | {"a": 1e-6 * x["a"]},
            "tiny steps": lambda x: x | {"dt": 1e-4 * x["dt"]},
            "mixed": lambda x: x | {"dt": np.where(x["x"] > 0, x["dt"], 0), "a": 1e3 * x["a"]},
            "all equal": lambda x: {name: np.full_like(x[name], 0.75) for name in x} | {"a": x["a"]},
        },
    ),
}
HALF = ("float16", "bfloat16")
FORWARD_MODE = ("sequential", "associative", "banded", "dense", "parallel")


def _implementations(mixer):
    """`None`, and the names of what it is not."""
    return (None, *(name for name in mixer.implementations if name != mixer.default))


IMPLEMENTATIONS = {"implementation": _implementations}
STRUCTURES = IMPLEMENTATIONS | {"layout": testing.LAYOUTS, "carried": (False, True)}


def over(**axes):
    """Run a test over all mixers and the given axes; an axis is a tuple, or a function from a mixer to one."""

    def mark(test):
        test.axes = axes
        return test

    return mark


def _possible(mixer, row):
    """Kernels take float32 and bfloat16. Token by token, the gradient of a half-precision cache is summed up in it.

    The interpreter of kernels has effects that `jax.checkpoint` refuses: tests/pallas_kernels compiles this for a TPU.
    """
    if row.get("implementation") == "pallas":
        return row.get("dtype") not in ("float64", "float16") and row.get("law") != "layers"
    return not (mixer.initial_state and row.get("implementation") == "sequential" and row.get("dtype") in HALF)


def _telling(mixer, row):
    """Lengths matter to forms that work in chunks, and the widest dtype of a form shows whether it is right.

    To a kernel no decay and one per head are decays per token; more than two chunks are in other tests.
    """
    time, implementation = row.get("time", 100), row.get("implementation")
    variant = row.get("variant", "") if implementation == "pallas" else ""
    if variant in ("no decay", "decay per head") or ("decay" in variant and time == 1000):
        return False
    if implementation == "sequential" and time not in (2, 100):
        return False
    simple = row.get("layout") in ("one document", "packed and padded")
    widest = "float32" if implementation == "pallas" else "float64"
    return time >= 100 or (simple and (time > 64 or row["dtype"] == widest))


def _pairs(rows):
    """Some of the rows, such that any two values that occur together in one still do: greedily the fewest."""
    numbers = {}
    pairs = [itertools.combinations(enumerate(row), 2) for row in rows]
    pairs = np.array([[numbers.setdefault(pair, len(numbers)) for pair in row] for row in pairs])
    missing = np.ones(len(numbers), bool)
    while missing.any():
        best = np.argmax(missing[pairs].sum(1))
        missing[pairs[best]] = False
        yield rows[best]


def pytest_generate_tests(metafunc):
    """Spread a test over its axes: all pairs of values, or with `--full` their product."""
    if not hasattr(metafunc.function, "axes"):
        return
    rows, full = [], metafunc.config.getoption("full")
    for name, mixer in MIXERS.items():
        variants = mixer if isinstance(mixer, dict) else {"": mixer}
        mixer = next(iter(variants.values()))
        axes = {axis: values(mixer) if callable(values) else values for axis, values in metafunc.function.axes.items()}
        axes |= {"variant": tuple(variants)} if len(variants) > 1 else {}
        points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
        points = [tuple(row.values()) for row in points if _possible(mixer, row) and (full or _telling(mixer, row))]
        points = points if full or len(axes) < 3 else list(_pairs(points))
        for point in points:
            values = dict(zip(axes, point, strict=True))
            mixer = variants[values.pop("variant", "")]
            case = Case(**{axis: values.pop(axis) for axis in axes if axis in Case._fields})
            rows.append(pytest.param(mixer, case, *values.values(), id="-".join(map(str, (name, *point)))))
    metafunc.parametrize(
        ("mixer", "case", *(axis for axis in metafunc.function.axes if axis not in Case._fields)), rows
    )


@over(**IMPLEMENTATIONS, dtype=testing.DTYPES, time=testing.LENGTHS, layout=testing.LAYOUTS, carried=(False, True))
def test_definition(mixer, case):
    testing.check_definition(mixer, case)


# Around the boundaries of documents at 43 and 87, and at the ends; all are pieces of 1, 42 and 88 tokens.
@over(**STRUCTURES, cuts=((42, 43), (88, 130), (1, 89)))
def test_splitting(mixer, case, cuts):
    testing.check_splitting(mixer, case, cuts)


@over(**STRUCTURES)
def test_steps(mixer, case):
    testing.check_steps(mixer, case)


@over(**STRUCTURES)
def test_causality(mixer, case):
    testing.check_causality(mixer, case, cuts=(1, 64, 130))


@over(**STRUCTURES | {"layout": ("packed", "packed and padded")})
def test_segments(mixer, case):
    testing.check_segments(mixer, case)


@over(**IMPLEMENTATIONS)
def test_padding_only(mixer, case):
    testing.check_padding_only(mixer, case.implementation)


@over(**STRUCTURES, extreme=lambda mixer: tuple(mixer.extremes), dtype=("float32", "bfloat16", "float16"))
def test_extremes(mixer, case, extreme):
    testing.check_extreme(mixer, case, extreme)


@over()
def test_finite_differences(mixer, case):
    testing.check_finite_differences(mixer)


@over(implementation=lambda mixer: tuple(name for name in FORWARD_MODE if name in mixer.implementations))
def test_forward_mode(mixer, case):
    testing.check_forward_mode(mixer, case.implementation)


@over(**IMPLEMENTATIONS, law=("vmap", "layers", "export", "x64"))
def test_transformations(mixer, case, law):
    getattr(testing, f"check_{law}")(mixer, case.implementation)


@over(**IMPLEMENTATIONS, carried=(False, True), law=("shard_map", "explicit_mesh"))
def test_meshes(mixer, case, law):
    getattr(testing, f"check_{law}")(mixer, case.implementation, case.carried)


@over()
def test_constant_memory(mixer, case):
    if mixer.initial_state is None:  # a cache is the named exception
        testing.check_constant_memory(mixer)


@over()
def test_distinct(mixer, case):
    testing.check_distinct(mixer)


@over()
def test_refusals(mixer, case):
    testing.check_refusals(mixer)


# --- The laws can fail ----------------------------------------------------------------------------------------------

PACKED = Case("chunked", layout="packed", carried=True)


def _dropped_carry(**arguments):
    return prefix_scan_attention(**arguments | {"state": None})


def _dropped_state_gradient(state=None, **arguments):
    return prefix_scan_attention(state=jax.lax.stop_gradient(state), **arguments)


def _future_mask(s, reset):
    visible, first = prefix_scan_chunk_masks(s, reset)
    return visible | jnp.eye(s.shape[1], k=1, dtype=bool), first


def _swapped_segments(segment_ids, carried):
    valid, reset, last = contract_segments(segment_ids, carried)
    return contract.Segments(valid, None if reset is None else valid & ~reset, last)


def _forgotten_segment(segment_ids, carried):
    return contract_segments(segment_ids, carried)._replace(last=carried)


def _dropped_decay(gate, decay, *rest):
    return prefix_scan_chunked_backward(gate, jnp.ones_like(decay), *rest)


def _nothing_carried(past, beyond, carried, g):
    return decay_gradient(past, beyond, 0 * carried, g)


def _future_scores(q, k, decays):
    return decays_scores(q, k, decays) + 0.1 * jnp.eye(k.shape[-2], k=1)


def _first_order(lower):
    return jnp.eye(lower.shape[-1]) - lower


decay_gradient = linear_attention_module.decay_gradient
decays_scores = decays.decayed_scores
prefix_scan_chunk_masks, prefix_scan_chunked_backward = prefix_scan._chunk_masks, prefix_scan._chunked_backward
contract_segments = contract.segments


@pytest.mark.parametrize("mutant", [_dropped_carry, _dropped_state_gradient])
@pytest.mark.parametrize("law", [partial(testing.check_splitting, cuts=(50,)), testing.check_steps])
def test_mutants_of_a_call_are_caught(mutant, law):
    with pytest.raises(AssertionError):
        law(MIXERS["prefix_scan_attention"]._replace(function=mutant), PACKED)


@pytest.mark.parametrize(
    ("module", "name", "mutant", "law"),
    [
        (prefix_scan, "_chunk_masks", _future_mask, partial(testing.check_causality, cuts=(50,))),
        (prefix_scan, "_chunk_masks", _future_mask, testing.check_definition),
        (prefix_scan, "_chunked_backward", _dropped_decay, testing.check_definition),
        (contract, "segments", _swapped_segments, testing.check_segments),
        (contract, "segments", _forgotten_segment, testing.check_steps),
    ],
)
def test_mutants_of_the_code_are_caught(monkeypatch, module, name, mutant, law):
    _check_mutant(monkeypatch, MIXERS["prefix_scan_attention"], module, name, mutant, law)


@pytest.mark.parametrize(
    ("mixer", "variant", "name", "mutant"),
    [
        ("linear_attention", "decay per token", "decay_gradient", _nothing_carried),
        ("linear_attention", "decay per channel", "decayed_scores", _future_scores),
        ("delta_rule", "no decay", "invert_unit_triangular", _first_order),
        ("delta_rule", "decay per channel", "decay_gradient", _nothing_carried),
    ],
)
def test_mutants_of_chunks_are_caught(monkeypatch, mixer, variant, name, mutant):
    module = importlib.import_module(f"primitives.{mixer}")
    _check_mutant(monkeypatch, MIXERS[mixer][variant], module, name, mutant, testing.check_definition)


def _check_mutant(monkeypatch, mixer, module, name, mutant, law):
    """A law holds, and no longer does with the mutant; a new function each time, so that it is traced again."""

    def again():
        return mixer._replace(function=lambda **arguments: mixer.function(**arguments))

    law(again(), PACKED)
    monkeypatch.setattr(module, name, mutant)
    with pytest.raises(AssertionError):
        law(again(), PACKED)
