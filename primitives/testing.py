"""The laws of a causal mixer (CONTRIBUTING.md), as functions that raise `AssertionError` where one is broken.

Describe a mixer of your own as a `Mixer` and call them, or look at tests/test_laws.py, which runs them over every
mixer of this package. Rows are vectors along the last axis; every comparison asserts the largest and the
root-mean-square error of each row. References are sequential, in float64.
"""

import contextlib
import functools
import io
import itertools
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

LENGTHS = (1, 2, 63, 64, 65, 100, 1000)
DTYPES = ("float64", "float32", "bfloat16", "float16")
LAYOUTS = ("one document", "packed", "padded", "packed and padded")
# Largest error in a row, relative. In half precision six halves of a unit in the last place: results are rounded once,
# gradients are computed from rounded outputs. The root mean square may be half of it, that of outputs a fifth, and in
# short rows three quarters.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2.4e-2, "float16": 3e-3}


class Mixer(NamedTuple):
    """What the laws have to know about a causal mixer ``function(**inputs, state, segment_ids, implementation)``.

    `axes` names the axes of each input (``"batch time heads dim"``), `state_axes` those of each field of the state: a
    string, or a tree of strings where the field is a tree.
    `transforms` make valid inputs from normal noise, `extremes` make the extreme inputs of law 7 from valid ones.
    `initial_state` makes the fresh state of a given capacity, for mixers whose state is a cache. `starts_from_inputs`:
    documents start from inputs that have no time, so that gradients of these pass through `None` for a state. `default`
    names the implementation that `None` stands for here, if it is always the same: there is no need to run both.
    """

    function: Callable[..., tuple[Any, Any]]
    axes: Mapping[str, str]
    state_axes: tuple[Any, ...]
    implementations: tuple[str, ...]
    default: str | None = None
    transforms: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {}
    extremes: Mapping[str, Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]] = {}
    starts_from_inputs: bool = False
    initial_state: Callable[[dict[str, Any], int], Any] | None = None
    sizes: Mapping[str, int] = {}

    def __hash__(self) -> int:
        """By identity: a mixer is a value of a table."""
        return id(self)


class Case(NamedTuple):
    """One point of the product over which laws are run."""

    implementation: str | None = None
    dtype: str = "float32"
    time: int = 131  # two chunks and a bit
    layout: str = "one document"
    carried: bool = False


# --- Inputs ---------------------------------------------------------------------------------------------------------

SIZES = {"batch": 2, "heads": 2, "dim": 16}


def inputs_for(mixer: Mixer, time: int, dtype: str, seed: int = 0, **sizes: int) -> dict[str, np.ndarray]:
    """Random inputs of a mixer, rounded to a dtype; float64 in the end, so that every precision sees the same."""
    generator = np.random.default_rng(seed)
    sizes = {**SIZES, **mixer.sizes, "time": time, **sizes}
    arrays = {}
    for name, axes in mixer.axes.items():
        noise = generator.normal(size=[sizes[axis] for axis in axes.split()])
        arrays[name] = _round(mixer.transforms.get(name, lambda x: x)(noise), dtype)
    return arrays


def segment_ids_for(layout: str, time: int, batch: int = 2) -> np.ndarray | None:
    """Segment ids of a layout: boundaries at thirds; padding left, right, in the middle, and (row 1) on both sides."""
    if layout == "one document":
        return None
    ids = np.tile(np.searchsorted([time // 3, 2 * time // 3], np.arange(time), side="right"), (batch, 1))
    ids = np.array([3, 1, 3], np.int32)[ids] if "packed" in layout else np.full_like(ids, 3, np.int32)
    if "padded" in layout:
        pad = time // 5
        ids[0, :pad] = -1
        ids[1:, time - pad :] = -7
        ids[1:, : pad // 2] = -1
        if "packed" in layout:
            ids[:, time // 2 : time // 2 + pad // 2] = -1
    return ids


def carried_state_for(mixer: Mixer, dtype: str, capacity: int) -> Any:
    """The state after some tokens of document 3 in every row but the last, where it is of document 2."""
    return _state_after((3, 2), mixer, dtype, capacity)


def fresh_state_for(mixer: Mixer, dtype: str, capacity: int) -> Any:
    """What `state=None` stands for: the state after nothing but padding."""
    return _state_after((-1, -1), mixer, dtype, capacity)


@functools.cache
def _state_after(documents, mixer, dtype, capacity):
    inputs = _cast(inputs_for(mixer, 5, dtype, seed=7), dtype)
    ids = np.repeat(np.array(documents, np.int32)[:, None], 5, axis=1)
    with jax.enable_x64(dtype == "float64"):
        return jax.device_get(_forward(mixer, "sequential")(inputs, _fresh_state(mixer, inputs, capacity), ids)[1])


def _fresh_state(mixer, inputs, capacity):
    return None if mixer.initial_state is None else mixer.initial_state(inputs, capacity)


def _round(array, dtype):
    if np.iscomplexobj(array):
        return _round(array.real, dtype) + 1j * _round(array.imag, dtype)
    return np.asarray(array, jnp.dtype(dtype)).astype(np.float64)


def _cast(tree, dtype):
    """Arrays in a dtype; complex ones in the complex dtype that holds it."""
    return jax.tree.map(
        lambda x: np.asarray(x, jnp.promote_types(dtype, jnp.complex64) if np.iscomplexobj(x) else jnp.dtype(dtype)),
        tree,
    )


# --- Running --------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What a mixer computes: outputs, final state, and the gradients of a random linear function of both."""

    outputs: Any
    state: Any
    gradients: dict[str, Any]
    state_gradients: Any


@functools.cache
def _program(mixer: Mixer, variant: Callable, implementation: str | None):
    """A jitted ``(inputs, state, segment_ids) -> Result`` of one way to call a mixer."""
    return jax.jit(_differentiated(_call(mixer, variant, implementation)))


def _call(mixer, variant, implementation):
    """``(inputs, state, segment_ids) -> (outputs, state)`` of one way to call a mixer."""
    function = functools.partial(mixer.function, implementation=implementation)

    def call(inputs, state, segment_ids):
        outputs, final = variant(mixer, function, inputs, state, segment_ids)
        return outputs, _meaning(mixer, final, outputs.dtype)

    return call


def _differentiated(call):
    """``(inputs, state, segment_ids) -> (outputs, state)`` with the gradients: the same arguments to a `Result`."""

    def evaluate(inputs, state, segment_ids):
        def loss(inputs, state):
            results = call(inputs, state, segment_ids)
            return _linear(results), results

        gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True, allow_int=True)
        (_, (outputs, final)), (gradients, state_gradients) = gradient(inputs, state)
        return Result(outputs, final, gradients, _floating(state_gradients))

    return evaluate


@functools.cache
def _forward(mixer: Mixer, implementation: str | None):
    """A jitted ``(inputs, state, segment_ids) -> (outputs, state)``."""
    return jax.jit(functools.partial(_whole, mixer, functools.partial(mixer.function, implementation=implementation)))


@jax.jit
def _linear(results):
    """Σ result · cotangent over the floating point leaves; infinite entries (an empty maximum) do not count.

    The cotangents, of real and of imaginary parts, are fixed noise, rounded so that every dtype represents it. The
    second axis is drawn first: noise of more time begins with that of less.
    """
    total = 0
    for seed, leaf in enumerate(itertools.chain.from_iterable(map(_parts, _floating(results)))):
        noise = np.random.default_rng((3, seed)).normal(size=np.zeros(leaf.shape).swapaxes(0, 1).shape).swapaxes(0, 1)
        cotangent = jnp.asarray(np.round(8 * noise) / 8, leaf.dtype)
        total += jnp.sum(jnp.where(jnp.isfinite(leaf), leaf, 0) * cotangent)
    return total


def _meaning(mixer, state, dtype):
    """A state, or for a cache what it stands for: caches that hold the same need not be equal."""
    return state if mixer.initial_state is None else _continue(mixer, state, dtype)


def _continue(mixer, state, dtype):
    """The outputs of three more tokens."""
    inputs = _cast(inputs_for(mixer, 3, "bfloat16", seed=11), dtype)
    return mixer.function(**inputs, state=state, implementation="sequential")[0]


def _parts(leaf):
    return (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,)


def _floating(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def _whole(mixer, function, inputs, state, segment_ids):
    return function(**inputs, state=state, segment_ids=segment_ids)


def evaluate(
    mixer: Mixer, case: Case, inputs: dict | None = None, *, variant: Callable = _whole, dtype: str | None = None
) -> Result:
    """Run one way to call a mixer forward and backward on the inputs of a case (or on the given ones).

    `dtype` is that of the computation where it differs from the case's, which rounds the inputs: the float64
    reference of a bfloat16 case sees bfloat16 inputs and cotangents. Variants begin with a state, even if it is fresh.
    """
    inputs = inputs_for(mixer, case.time, case.dtype) if inputs is None else inputs
    dtype = dtype or case.dtype
    state = _state_for(mixer, case, dtype)
    if variant is _whole and not _has_state(mixer, case):
        state = None
    with jax.enable_x64(dtype == "float64"), _kernels(case.implementation):
        program = _program(mixer, variant, case.implementation)
        result = program(_cast(inputs, dtype), state, segment_ids_for(case.layout, case.time))
        return _widened(mixer, case, result)


def reference(mixer: Mixer, case: Case, inputs: dict | None = None) -> Result:
    """What the definition says of a case: sequential, in float64, with a state and with segment ids.

    Padded at the end to one of few lengths, each of which is compiled once.
    """
    inputs = inputs_for(mixer, case.time, case.dtype) if inputs is None else inputs
    state, ids = _state_and_ids(mixer, case, "float64")
    padding = max(Case().time - case.time, 0)
    ids = np.pad(ids, ((0, 0), (0, padding)), constant_values=-1)
    padded = _time(mixer, inputs, lambda x: np.concatenate([x, np.repeat(x[:, -1:], padding, axis=1)], axis=1))
    with jax.enable_x64(True):
        result = _widened(mixer, case, _program(mixer, _whole, "sequential")(_cast(padded, "float64"), state, ids))
    gradients = _time(mixer, result.gradients, lambda x: x[:, : case.time])
    return result._replace(outputs=result.outputs[:, : case.time], gradients=gradients)


def _has_state(mixer, case):
    return case.carried or mixer.initial_state is not None


def _state_for(mixer, case, dtype):
    """The state that a case begins with, computed in its dtype; of one capacity where time is padded to one length."""
    if mixer.starts_from_inputs and not case.carried:
        return None
    state = (carried_state_for if case.carried else fresh_state_for)(mixer, case.dtype, max(case.time, Case().time) + 8)
    return jax.tree.map(lambda x: x if np.issubdtype(x.dtype, np.integer) else _widen(x, dtype), state)


def _state_and_ids(mixer, case, dtype):
    """The state and the segment ids of a case, also where it has none: those of the document that goes on."""
    state, ids = _state_for(mixer, case, dtype), segment_ids_for(case.layout, case.time)
    segment = np.zeros(SIZES["batch"], np.int32) if state is None else state.segment
    return state, np.repeat(segment[:, None], case.time, axis=1) if ids is None else ids


def _widened(mixer, case, result):
    """A result in float64; gradients of a state that was not there are left out."""
    result = jax.tree.map(lambda x: np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64), result)
    return result if _has_state(mixer, case) else result._replace(state_gradients=[])


def _widen(array, dtype):
    return array.astype(jnp.promote_types(array.dtype, dtype))


@contextlib.contextmanager
def interpreted_kernels():
    """Pallas TPU kernels on a CPU: fresh memory is full of NaN, a race between them is an `AssertionError`."""
    parameters = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with contextlib.redirect_stdout(io.StringIO()) as printed, pltpu.force_tpu_interpret_mode(parameters):
        yield
    assert "RACE DETECTED" not in printed.getvalue(), printed.getvalue()  # the interpreter only prints it


def _kernels(implementation: str | None):
    return interpreted_kernels() if implementation == "pallas" else contextlib.nullcontext()


# --- Comparing ------------------------------------------------------------------------------------------------------


def row_errors(actual: np.ndarray, expected: np.ndarray, floor: float = 0.1, unit: float = 0.02) -> tuple[float, float]:
    """The largest over all rows of a row's maximal and of its root-mean-square error.

    Relative to the root mean square of the expected row, but to no less than `floor` times that of the whole array and
    to no less than `unit`: in a row that nearly cancels out only the absolute error has a meaning, and inputs and
    cotangents are of size 1.
    """
    actual, expected = (
        np.atleast_1d(x.astype(np.promote_types(x.dtype, np.float64))) for x in map(np.asarray, (actual, expected))
    )
    if actual.shape != expected.shape:
        raise AssertionError(f"expected shape {expected.shape}, got {actual.shape}")
    same = actual == expected  # equal infinities too
    error = np.abs(np.where(same, 0, actual - np.where(same, actual, expected)))
    magnitude = np.abs(np.where(np.isfinite(expected), expected, 0))
    rms = np.sqrt(np.mean(magnitude**2, axis=-1))
    scale = np.maximum(np.maximum(rms, floor * np.sqrt(np.mean(magnitude**2))), unit)
    with np.errstate(invalid="ignore"):
        worst, mean = error.max(axis=-1) / scale, np.sqrt(np.mean(error**2, axis=-1)) / scale
    return float(np.max(worst)), float(np.max(mean))


def assert_close(
    actual: Any,
    expected: Any,
    dtype: str,
    what: str,
    floor: float = 0.1,
    unit: float = 0.02,
    share: float = 0.5,
) -> None:
    """Assert that every row of every array is within the tolerance of a dtype; NaN is never close."""
    pairs = zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, leaf), reference in pairs:
        worst, rms = row_errors(leaf, reference, floor, unit)
        where = f"{what}{jax.tree_util.keystr(path)}"
        assert worst <= TOLERANCE[dtype], f"{where}: largest error {worst:.2e} > {TOLERANCE[dtype]:.2e}"
        bound = (share if np.shape(reference)[-1:] >= (16,) else 0.75) * TOLERANCE[dtype]
        assert rms <= bound, f"{where}: root mean square {rms:.2e} > {bound:.2e}"


# Gradients are sums that cancel: their errors count relative to the whole of an array.
_assert_sums_close = functools.partial(assert_close, floor=1, unit=0.2)


def assert_same(mixer: Mixer, actual: Result, expected: Result, dtype: str, what: str, unit: float = 0.2) -> None:
    """Assert that two results agree: outputs and gradients as closely as their dtype, states as float32 or wider.

    Gradients are sums that cancel: their errors count relative to the whole gradient of an input, or to `unit`.
    """
    state_dtype = dtype if mixer.initial_state or dtype == "float64" else "float32"  # a cache stands for outputs
    assert_close(actual.outputs, expected.outputs, dtype, f"{what}: outputs", share=0.2)
    assert_close(actual.state, expected.state, state_dtype, f"{what}: state")
    _assert_sums_close(actual.gradients, expected.gradients, dtype, f"{what}: gradient", unit=unit)
    _assert_sums_close(
        actual.state_gradients, expected.state_gradients, dtype, f"{what}: gradient of the state", unit=unit
    )


# --- The laws -------------------------------------------------------------------------------------------------------


def check_definition(mixer: Mixer, case: Case) -> None:
    """Laws 1 and 6: outputs, final state and all gradients equal those of the sequential form in float64."""
    assert_same(mixer, evaluate(mixer, case), reference(mixer, case), case.dtype, "definition")


def check_finite_differences(mixer: Mixer) -> None:
    """Law 6: the gradients of the sequential form are those of finite differences, in float64."""
    with jax.enable_x64(True):
        inputs = _cast(inputs_for(mixer, 5, "float64"), "float64")
        state = carried_state_for(mixer, "float64", 13)
        ids = jnp.asarray(segment_ids_for("packed and padded", 5))

        @jax.jit
        def outputs(inputs, floating):
            # Two tokens more: a gradient through what the final state means, not through how it is represented.
            leaves, tree = jax.tree.flatten(state)
            new = iter(floating)
            carried = tree.unflatten([next(new) if jnp.issubdtype(x.dtype, jnp.inexact) else x for x in leaves])
            first, final = mixer.function(**inputs, state=carried, segment_ids=ids, implementation="sequential")
            return first, _continue(mixer, final, "float64")

        jax.test_util.check_grads(outputs, (inputs, _floating(state)), order=1, atol=1e-6, rtol=1e-6, eps=1e-5)


def check_splitting(mixer: Mixer, case: Case, cuts: tuple[int, ...]) -> None:
    """Law 2: pieces one after another equal the whole: outputs, final state, and gradients through the state."""
    assert_same(mixer, _in_pieces(mixer, case, cuts), evaluate(mixer, case), case.dtype, f"split at {cuts}")


def _in_pieces(mixer, case, cuts):
    """Every piece is a call of its own, with a state and with segment ids: those of one length are compiled once."""
    forward, join, bounds = _forward(mixer, case.implementation), _join(mixer), [0, *cuts, case.time]

    def call(pieces, state, segment_ids):
        outputs = [None] * len(pieces)
        for i, (piece, ids) in enumerate(zip(pieces, segment_ids, strict=True)):
            outputs[i], state = forward(piece, state, ids)
        return join(outputs, state)

    def cut(array):
        return [array[:, start:stop] for start, stop in itertools.pairwise(bounds)]

    inputs, (state, ids) = inputs_for(mixer, case.time, case.dtype), _state_and_ids(mixer, case, case.dtype)
    pieces = [_time(mixer, _cast(inputs, case.dtype), lambda x, i=i: cut(x)[i]) for i in range(len(cuts) + 1)]
    with jax.enable_x64(case.dtype == "float64"), _kernels(case.implementation):
        result = _widened(mixer, case, _differentiated(call)(pieces, state, cut(ids)))
    parts = {name: [piece[name] for piece in result.gradients] for name in inputs}
    parameters = {name: sum(parts[name]) for name in inputs if name not in _timed(mixer)}
    return result._replace(gradients=_time(mixer, parts, lambda x: np.concatenate(x, axis=1)) | parameters)


@functools.cache
def _join(mixer):
    """Outputs of pieces as those of the whole, and what the last state means."""
    return jax.jit(lambda outputs, state: (jnp.concatenate(outputs, 1), _meaning(mixer, state, outputs[0].dtype)))


def _time(mixer, inputs, function):
    """Apply a function to the inputs that have a time axis; the others are parameters."""
    return inputs | {name: function(inputs[name]) for name in _timed(mixer)}


def _timed(mixer):
    return [name for name, axes in mixer.axes.items() if "time" in axes.split()]


def check_steps(mixer: Mixer, case: Case) -> None:
    """Law 3: calls with one token, in a `lax.scan`, equal the whole; and such a call is no loop and no kernel."""
    assert_same(mixer, evaluate(mixer, case, variant=_steps), evaluate(mixer, case), case.dtype, "steps")
    inputs = _cast(inputs_for(mixer, 1, case.dtype), case.dtype)
    state = carried_state_for(mixer, case.dtype, 9)
    step = functools.partial(mixer.function, implementation=case.implementation)
    program = str(jax.make_jaxpr(step)(**inputs, state=state, segment_ids=jnp.zeros((SIZES["batch"], 1), jnp.int32)))
    for forbidden in ("scan[", "while[", "pallas_call[", "pad["):
        assert forbidden not in program, f"one step contains {forbidden[:-1]}"


def _steps(mixer, function, inputs, state, segment_ids):
    def step(state, t):
        at = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=t, slice_size=1, axis=1)
        ids = None if segment_ids is None else at(segment_ids)
        outputs, state = function(**_time(mixer, inputs, at), state=state, segment_ids=ids)
        return state, outputs[:, 0]

    if state is None:
        padding = jnp.full((SIZES["batch"], 1), -1, jnp.int32)
        _, state = function(**_time(mixer, inputs, lambda x: x[:, :1]), segment_ids=padding)
    state, outputs = jax.lax.scan(step, state, jnp.arange(inputs[_timed(mixer)[0]].shape[1]))
    return outputs.swapaxes(0, 1), state


def check_causality(mixer: Mixer, case: Case, cuts: tuple[int, ...]) -> None:
    """Law 4: changing the future changes no past output, bit for bit."""
    inputs, other = (inputs_for(mixer, case.time, case.dtype, seed) for seed in (0, 1))
    outputs = evaluate(mixer, case, inputs).outputs
    for cut in cuts:
        changed = inputs | {
            name: np.concatenate([inputs[name][:, :cut], other[name][:, cut:]], axis=1) for name in _timed(mixer)
        }
        past = evaluate(mixer, case, changed).outputs[:, :cut]
        assert np.array_equal(past, outputs[:, :cut]), f"outputs before {cut} depend on what comes after"


def check_segments(mixer: Mixer, case: Case) -> None:
    """Law 5: packed and padded rows equal their documents run one by one: outputs, states, gradients."""
    alone = evaluate(
        mixer,
        case._replace(implementation="sequential"),
        variant=_documents(case.layout, case.time, case.carried),
        dtype="float64",
    )
    result = evaluate(mixer, case)
    assert_same(mixer, result, alone, case.dtype, "documents")
    ids = segment_ids_for(case.layout, case.time)
    if ids is not None:
        assert not np.any(result.outputs[ids < 0]), "outputs at padding are not zero"


@functools.cache
def _documents(layout, time, carried):
    """Run every document of every row alone, without segment ids, and put the outputs where its tokens were."""

    def variant(mixer, function, inputs, state, segment_ids):
        layout_ids = segment_ids_for(layout, time)
        ids = np.zeros((SIZES["batch"], time), np.int32) + 3 * carried if layout_ids is None else layout_ids
        outputs, states = None, []
        for row, row_ids in enumerate(ids):
            before = jax.tree.map(lambda x, row=row: x[row : row + 1], state)
            segment = (3 if row < len(ids) - 1 else 2) if carried else 0
            if layout_ids is None:
                segment = 3 * carried  # without ids the carried document goes on, whatever its id
            tokens = np.flatnonzero(row_ids >= 0)
            boundaries = np.flatnonzero(np.diff(row_ids[tokens])) + 1
            for run in np.split(tokens, boundaries):
                if row_ids[run[0]] != segment:
                    before = _fresh_state(mixer, jax.tree.map(lambda x: x[:1], inputs), time + 8)
                segment = row_ids[run[0]]
                document = _time(mixer, inputs, lambda x, row=row, run=run: x[row : row + 1, run])
                results, before = function(**document, state=before)
                outputs = jnp.zeros((len(ids), time, *results.shape[2:]), results.dtype) if outputs is None else outputs
                outputs = outputs.at[row, run].set(results[0])
            states.append(before if layout_ids is None else before._replace(segment=jnp.full((1,), segment, jnp.int32)))
        return outputs, jax.tree.map(lambda *rows: jnp.concatenate(rows), *states)

    return variant


def check_padding_only(mixer: Mixer, implementation: str | None) -> None:
    """Law 5: a call with nothing but padding, whatever it holds, returns zeros and the state that it was given."""
    with _kernels(implementation):
        inputs = _time(mixer, _cast(inputs_for(mixer, 3, "float32"), "float32"), lambda x: x * jnp.nan)
        state = carried_state_for(mixer, "float32", 8)
        ids = jnp.full((SIZES["batch"], 3), -1, jnp.int32)
        outputs, final = _forward(mixer, implementation)(inputs, state, ids)
        assert not jnp.any(outputs), "outputs at padding are not zero"
        pairs = zip(jax.tree.leaves_with_path(state), jax.tree.leaves(final), strict=True)
        for (path, before), after in pairs:
            assert np.array_equal(before, after), f"padding changes state{jax.tree_util.keystr(path)}"


def check_extreme(mixer: Mixer, case: Case, extreme: str) -> None:
    """Law 7: on extreme inputs everything is finite and equals the definition."""
    inputs = mixer.extremes[extreme](inputs_for(mixer, case.time, case.dtype))
    inputs = {name: _round(x, case.dtype) for name, x in inputs.items()}
    result = evaluate(mixer, case, inputs)
    for name, leaf in (("outputs", result.outputs), *result.gradients.items()):
        assert np.all(np.isfinite(leaf)), f"{extreme}: {name} not finite"
    assert_same(
        mixer, result, reference(mixer, case, inputs), case.dtype, extreme, unit=1
    )  # gradients of nearly zero, of terms of size 1


def check_constant_memory(mixer: Mixer) -> None:
    """Law 8: the size of the state depends on neither the time nor the position."""

    def state_of(time, state):
        inputs = _cast(inputs_for(mixer, time, "float32"), "float32")
        return jax.eval_shape(mixer.function, **inputs, state=state)[1]

    first = state_of(1, None)
    for time, state in ((10, None), (1000, None), (7, first)):
        assert state_of(time, state) == first, f"the state changes its shape at time {time}"


def _carried(mixer, seeds):
    """Inputs for seeds and a state to continue, in float32: what laws 9 share, so that they share a program."""
    case = Case(carried=True)
    inputs = [_cast(inputs_for(mixer, case.time, case.dtype, seed), case.dtype) for seed in seeds]
    return inputs, _state_for(mixer, case, case.dtype)


def check_vmap(mixer: Mixer, implementation: str | None) -> None:
    """Law 9: `vmap` over a new axis equals a loop over it, and `vmap` of gradients too."""
    with _kernels(implementation):
        inputs, state = _carried(mixer, (0, 1))
        program = _program(mixer, _whole, implementation)
        alone = [program(x, state, None) for x in inputs]
        together = jax.vmap(lambda x: program(x, state, None))(_stack(inputs))
        assert_same(mixer, together, _stack(alone), "float32", "vmap")


def _stack(trees):
    return jax.tree.map(lambda *x: np.stack(x), *trees)


def check_layers(mixer: Mixer, implementation: str | None) -> None:
    """Law 9: rematerialised in a scan over layers equals plain calls, with gradients."""
    with _kernels(implementation):
        layers, state = _carried(mixer, (0, 1))
        alone = _stack([_program(mixer, _whole, implementation)(inputs, state, None) for inputs in layers])
        expected = [leaf.sum(0) for leaf in _floating((alone.outputs, alone.state))]
        call = _call(mixer, _whole, implementation)

        @jax.jit
        def gradient(layers, state):
            def layer(total, inputs):
                return jax.tree.map(operator.add, total, _floating(call(inputs, state, None))), None

            def loss(layers):
                total = jax.lax.scan(jax.checkpoint(layer), jax.tree.map(jnp.zeros_like, expected), layers)[0]
                return _linear(total), total

            return jax.grad(loss, has_aux=True)(layers)

        _assert_sums_close(gradient(_stack(layers), state), (alone.gradients, expected), "float32", "layers")


def check_export(mixer: Mixer, implementation: str | None) -> None:
    """Law 9: a call with a state survives serialisation, with its gradient; kernels for the TPU, others for here."""
    case = Case(implementation, layout="packed", carried=True)
    (inputs,), state = _carried(mixer, (0,))
    arguments = inputs, state, segment_ids_for(case.layout, case.time)
    platform = "tpu" if implementation == "pallas" else "cpu"
    exported = jax.export.export(jax.jit(_call(mixer, _whole, implementation)), platforms=[platform])(*arguments)
    exported = jax.export.deserialize(exported.serialize(vjp_order=1))
    if platform == "cpu":
        result = jax.jit(_differentiated(exported.call))(*arguments)
        assert_same(mixer, result, evaluate(mixer, case), "float32", "export")


def check_shard_map(mixer: Mixer, implementation: str | None, carried: bool) -> None:
    """Law 9: inside a `shard_map` over batch and heads (or dim) a call equals one outside, with gradients."""

    def wrap(program, mesh, in_specs, out_specs):
        return jax.shard_map(program, mesh=mesh, in_specs=in_specs, out_specs=out_specs)

    _check_sharded(mixer, implementation, carried, AxisType.Auto, wrap)


def check_explicit_mesh(mixer: Mixer, implementation: str | None, carried: bool) -> None:
    """Law 9: a call on arrays sharded over batch and heads of an Explicit mesh equals one without, with gradients."""
    _check_sharded(mixer, implementation, carried, AxisType.Explicit, lambda program, *_: program)


def _check_sharded(mixer, implementation, carried, axis_type, wrap):
    every_axis = {axis for axes in jax.tree.leaves((mixer.axes, mixer.state_axes)) for axis in axes.split()}
    heads = {axis for axis in every_axis if axis.endswith(("head", "heads"))} or {"dim"}
    sizes, mesh_axes = dict.fromkeys({"batch", *heads}, 4), dict.fromkeys(heads, "heads") | {"batch": "batch"}
    mesh = Mesh(np.array(jax.devices("cpu")[:8]).reshape(4, 2), ("batch", "heads"), axis_types=(axis_type,) * 2)

    def spec(axes):
        return PartitionSpec(*map(mesh_axes.get, axes.split()))

    inputs, before = (_cast(inputs_for(mixer, t, "float32", **sizes), "float32") for t in (70, 5))
    ids = jnp.asarray(segment_ids_for("packed", 70, batch=4))
    state = _fresh_state(mixer, before, 83)
    forward = _forward(mixer, "sequential")
    state_specs = type(jax.eval_shape(forward, before, state, None)[1])(*jax.tree.map(spec, mixer.state_axes))
    state = forward(before, state, None)[1] if carried else state
    in_specs = ({name: spec(axes) for name, axes in mixer.axes.items()}, state and state_specs, spec("batch"))
    out_specs = (spec(f"batch time {min(heads)}"), state_specs)

    program = functools.partial(_whole, mixer, functools.partial(mixer.function, implementation=implementation))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x if np.issubdtype(x.dtype, np.integer) else _widen(x, "float64"), state)
        alone = _definition(mixer)(_cast(inputs, "float64"), wide, ids)
    with _kernels(implementation), jax.set_mesh(mesh):
        placed = jax.tree.map(
            lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), (inputs, state, ids), in_specs
        )
        sharded = jax.jit(_differentiated(wrap(program, mesh, in_specs, out_specs)))(*placed)
    _assert_sums_close(sharded, alone, "float32", "sharded")


@functools.cache
def _definition(mixer):
    """A jitted ``(inputs, state, segment_ids) -> Result`` of the sequential form."""
    return jax.jit(_differentiated(_forward(mixer, "sequential")))


def check_x64(mixer: Mixer, implementation: str | None) -> None:
    """Law 9: float32 inputs give the same with x64 on."""
    (inputs,), state = _carried(mixer, (0,))
    results = []
    for x64 in (False, True):
        with jax.enable_x64(x64), _kernels(implementation):
            results.append(_program(mixer, _whole, implementation)(inputs, state, None))
    for leaf, other in zip(*map(jax.tree.leaves, results), strict=True):
        assert leaf.dtype == other.dtype, f"x64 changes a dtype from {leaf.dtype} to {other.dtype}"
    _assert_sums_close(*results, "float32", "x64")


def check_forward_mode(mixer: Mixer, implementation: str) -> None:
    """`jvp` is the transpose of `vjp`: ⟨c, J t⟩ = ⟨Jᵀ c, t⟩, for the implementations that promise forward mode."""
    case = Case(implementation, "float64", carried=True)
    inputs, tangents = (_cast(inputs_for(mixer, case.time, case.dtype, seed), case.dtype) for seed in (0, 5))
    state, call = _state_for(mixer, case, case.dtype), _call(mixer, _whole, implementation)
    with jax.enable_x64(True):
        loss = jax.jit(lambda x, t: jax.jvp(lambda x: _linear(call(x, state, None)), (x,), (t,))[1])
        forward = loss(inputs, tangents)
    gradients = reference(mixer, case).gradients
    reverse = sum(np.sum(gradients[name] * tangents[name]).real for name in inputs)
    np.testing.assert_allclose(forward, reverse, rtol=1e-10)


def check_distinct(mixer: Mixer) -> None:
    """Differently named implementations are different programs, and the kernel is a kernel."""
    inputs = _cast(inputs_for(mixer, 130, "float32"), "float32")
    state = fresh_state_for(mixer, "float32", 138)
    programs = {
        name: str(jax.make_jaxpr(functools.partial(mixer.function, implementation=name))(**inputs, state=state))
        for name in mixer.implementations
    }
    for name, program in programs.items():
        assert ("pallas_call" in program) == (name == "pallas"), f"{name}: pallas_call where none should be, or none"
        for other in programs:
            assert other == name or programs[other] != program, f"{name} and {other} are the same program"


def check_refusals(mixer: Mixer) -> None:
    """Law 10: bad input raises `ValueError` or `TypeError` at trace time and names the argument."""
    good = _cast(inputs_for(mixer, 4, "float32"), "float32")
    state = carried_state_for(mixer, "float32", 12)

    def refuses(error, argument, **changes):
        message = None
        try:
            jax.eval_shape(functools.partial(mixer.function, **{"state": None, **good, **changes}))
        except error as raised:
            message = str(raised)
        assert message is not None, f"{argument}: {error.__name__} expected"
        assert argument in message, f"{argument}: not named in {message!r}"

    for name, array in good.items():
        refuses(ValueError, name, **{name: array[..., None]})
        refuses(TypeError, name, **{name: jnp.zeros_like(array, jnp.int32)})
        refuses(TypeError, name, **{name: "array"})
        if name in _timed(mixer) and len(_timed(mixer)) > 1:
            refuses(ValueError, "time", **{name: array[:, :3]})
    refuses(ValueError, "time", **_time(mixer, good, lambda x: x[:, :0]))
    ids = jnp.zeros((SIZES["batch"], 4), jnp.int32)
    refuses(TypeError, "segment_ids", segment_ids=ids.astype(jnp.float32))
    refuses(ValueError, "segment_ids", segment_ids=ids[:, :3])
    refuses(ValueError, "segment_ids", segment_ids=ids[0])
    refuses(ValueError, "implementation", implementation="quickest")
    refuses(TypeError, "state", state=(1, 2, 3))
    refuses(TypeError, "segment_ids", segment_ids=ids.astype(jnp.uint32))

    def wrong(array):
        return jnp.zeros_like(array, jnp.int32 if jnp.iscomplexobj(array) else jnp.complex64)

    for field, tree in state._asdict().items():
        if tree is not None:
            refuses(ValueError, f"state.{field}", state=state._replace(**{field: jax.tree.map(lambda x: x[:1], tree)}))
            refuses(TypeError, f"state.{field}", state=state._replace(**{field: jax.tree.map(wrong, tree)}))
            refuses(TypeError, f"state.{field}", state=state._replace(**{field: None}))
