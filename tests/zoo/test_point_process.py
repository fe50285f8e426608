"""`zoo.point_process`: the distribution of the next event, and that a model is causal, streams and packs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from zoo.point_process import PointProcess, Prediction, expected_gap, log_density

MARKS, TIME = 3, 10
SIZES = {"width": 16, "layers": 2, "hidden": 16, "heads": 2}
stacks = pytest.mark.parametrize("stack", ["aaren", "transformer"])


def build(stack="aaren", marks=MARKS, dtype=jnp.float32, position="sinusoidal", **arguments):
    config = zoo.configure(stack, overrides=SIZES | {"position": position})
    model = PointProcess(config, marks=marks, rngs=nnx.Rngs(0), **arguments)
    return jax.tree.map(lambda x: (3 * x).astype(dtype), model)  # at the start all predictions are nearly equal


def events(dtype=jnp.float32):
    generator = np.random.default_rng(1)
    gaps = generator.exponential(size=(2, TIME)) * (generator.uniform(size=(2, TIME)) < 0.8)
    return jnp.asarray(gaps, dtype), jnp.asarray(generator.integers(0, MARKS, (2, TIME)), jnp.int32)


def random_prediction(generator):
    shape = (2, 3, 4)
    weights, means, log_deviations = (jnp.asarray(generator.normal(size=shape)) for _ in range(3))
    return Prediction(jax.nn.log_softmax(weights), means, 0.5 * log_deviations, None)


# Distribution


def test_density_integrates_to_one_and_to_its_mean():
    with jax.enable_x64(True):
        prediction = random_prediction(np.random.default_rng(0))
        logs, step = np.linspace(-40, 60, 20_001, retstep=True)
        density = jnp.exp(jax.vmap(lambda gap: log_density(prediction, jnp.full((2, 3), gap)))(np.exp(logs)))
        per_log = density * np.exp(logs)[:, None, None]
        shown = logs > np.log(1e-12)  # what is below counts as that
        np.testing.assert_allclose(step * per_log[shown].sum(axis=0), 1, rtol=1e-9)
        mean = step * (per_log * np.exp(logs)[:, None, None])[shown].sum(axis=0)
        np.testing.assert_allclose(mean, expected_gap(prediction), rtol=1e-9)
        for longest in (1e-3, 0.5, 20.0):
            mean = step * (per_log * np.minimum(np.exp(logs), longest)[:, None, None])[shown].sum(axis=0)
            np.testing.assert_allclose(mean, expected_gap(prediction, longest), rtol=1e-5)  # there is a kink


def test_one_wide_component_does_not_decide_the_mean_of_gaps_that_have_a_longest():
    prediction = Prediction(*(jnp.asarray([[x]]) for x in ([-1e-4, -9.0], [0.0, 0.0], [-1.0, 3.0])), None)
    assert expected_gap(prediction) > 1e38
    assert 1 < expected_gap(prediction, 100.0) < 1.2


def test_density_is_a_mixture_of_log_normals():
    from scipy.stats import lognorm

    with jax.enable_x64(True):
        prediction, gap = random_prediction(np.random.default_rng(1)), jnp.full((2, 3), 0.7)
        single = lognorm.pdf(0.7, s=np.exp(prediction.log_deviations), scale=np.exp(prediction.means))
        expected = np.log((np.exp(prediction.log_weights) * single).sum(axis=-1))
        np.testing.assert_allclose(log_density(prediction, gap), expected, rtol=1e-10)


def test_another_unit_of_time_shifts_the_density():
    """Minutes instead of hours, with constants to match: the same distribution."""
    with jax.enable_x64(True):
        gaps, marks = events(jnp.float64)
        hours = build(dtype=jnp.float64, mean_log_gap=0.3, log_gap_scale=1.7)
        minutes = build(dtype=jnp.float64, mean_log_gap=0.3 + np.log(60), log_gap_scale=1.7)
        (of_hours, _), (of_minutes, _) = jax.jit(hours)(gaps, marks), jax.jit(minutes)(60 * gaps, marks)
        expected = log_density(of_hours, gaps + 0.1) - np.log(60)
        np.testing.assert_allclose(log_density(of_minutes, 60 * (gaps + 0.1)), expected, rtol=1e-9)
        np.testing.assert_allclose(expected_gap(of_minutes), 60 * expected_gap(of_hours), rtol=1e-9)


def test_logarithms_of_gaps_are_normalised_by_the_constants():
    with jax.enable_x64(True):
        gaps, marks = events(jnp.float64)
        normalised = jnp.where(gaps > 0, jnp.exp((jnp.log(gaps) - 0.3) / 1.7), 0)
        found, _ = jax.jit(build(dtype=jnp.float64, mean_log_gap=0.3, log_gap_scale=1.7))(gaps, marks)
        plain, _ = jax.jit(build(dtype=jnp.float64))(normalised, marks)
        np.testing.assert_allclose(found.means, 0.3 + 1.7 * plain.means, rtol=1e-9)
        np.testing.assert_allclose(found.log_deviations, np.log(1.7) + plain.log_deviations, rtol=1e-9)


# Model


@stacks
def test_streaming_equals_the_whole_and_packed_equals_alone(stack):
    with jax.enable_x64(True):
        model, (gaps, marks) = build(stack, dtype=jnp.float64), events(jnp.float64)
        ids = jnp.asarray([[0] * 4 + [-1] * 2 + [2] * 4, [-1] * 3 + [1] * 7], jnp.int32)

        @jax.jit
        def stream(gaps, marks, ids):
            def step(state, t):
                gap, mark, segment = (jax.lax.dynamic_slice_in_dim(x, t, 1, axis=1) for x in (gaps, marks, ids))
                prediction, state = model(gap, mark, state, segment_ids=segment)
                return state, prediction

            pieces = jax.lax.scan(step, model.init_state(2, TIME), jnp.arange(TIME))[1]
            return jax.tree.map(lambda x: x[:, :, 0].swapaxes(0, 1), pieces)

        whole, pieces = (
            jax.jit(lambda g, m, ids: model(g, m, segment_ids=ids)[0])(gaps, marks, ids),
            stream(gaps, marks, ids),
        )
        chex.assert_trees_all_close(*(jax.tree.map(lambda x: x[ids >= 0], x) for x in (whole, pieces)), rtol=1e-10)
        alone, _ = jax.jit(model)(gaps[:1, 6:], marks[:1, 6:])
        chex.assert_trees_all_close(jax.tree.map(lambda x: x[:1, 6:], whole), alone, rtol=1e-10)


@stacks
def test_the_future_changes_nothing_before(stack):
    model, (gaps, marks) = build(stack), events()
    call = jax.jit(lambda gaps, marks: model(gaps, marks)[0])
    before, after = call(gaps, marks), call(gaps.at[:, 6:].add(1.0), (marks.at[:, 6:].add(1)) % MARKS)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x[:, :6], y[:, :6])
        assert (x[:, 6:] != y[:, 6:]).any()


@pytest.mark.parametrize("place", [0, 1])
def test_each_part_of_an_event_tells(place):
    """Its gap, its mark; a gap that is not known is not a gap of the mean."""
    call, inputs = jax.jit(build()), list(events())
    before, _ = call(*inputs)
    inputs[place] = (inputs[place] + 1) % MARKS
    after, _ = call(*inputs)
    assert not np.allclose(before.mark_logits[:, 0], after.mark_logits[:, 0])
    ones = jnp.ones((1, 1))
    unknown, mean = (build(marks=1)(gap)[0].means for gap in (0 * ones, ones))
    assert not np.allclose(unknown, mean)


def test_gradients_are_finite_at_extreme_gaps():
    gaps = jnp.asarray([[0.0, 1e-38, 1e-12, 1.0, 1e12, 1e38, 0.0]])

    def loss(model):
        prediction, _ = model(gaps)
        return -jnp.mean(log_density(jax.tree.map(lambda x: x[:, :-1], prediction), gaps[:, 1:]))

    value, gradients = jax.jit(jax.value_and_grad(loss))(build(marks=1))
    assert np.isfinite(value)
    chex.assert_tree_all_finite(gradients)
    assert all(jnp.any(x) for x in (gradients.mixture.kernel[...], gradients.embed_gap.kernel[...]))


def test_one_mark_is_no_mark():
    model, (gaps, marks) = build(marks=1), events()
    prediction, _ = model(gaps)
    assert prediction.mark_logits is None
    assert prediction.means.shape == (2, TIME, 8)
    with pytest.raises(ValueError, match="marks: expected None, as there is one kind of event, got an array"):
        model(gaps, marks)


def test_a_fresh_model_says_what_the_constants_say():
    """About a log-normal of that mean and deviation, whatever the events."""
    config = zoo.configure("aaren", overrides=SIZES)
    model = PointProcess(config, marks=MARKS, mean_log_gap=-2.0, log_gap_scale=3.0, rngs=nnx.Rngs(0))
    prediction, _ = model(*events())
    np.testing.assert_allclose(prediction.means, -2, atol=1)
    np.testing.assert_allclose(np.exp(prediction.log_deviations), 3, rtol=0.4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"marks": 0}, "marks: expected a positive integer, got 0"),
        ({"marks": 2, "components": 1.5}, "components: expected a positive integer, got 1.5"),
        ({"marks": 2, "log_gap_scale": 0.0}, "log_gap_scale: expected a positive number, got 0.0"),
    ],
)
def test_wrong_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        PointProcess(zoo.configure("aaren"), rngs=nnx.Rngs(0), **arguments)


def test_wrong_inputs():
    model, (gaps, marks) = build(), events()
    with pytest.raises(ValueError, match="marks: expected the marks of the events, got None"):
        model(gaps)
    with pytest.raises(ValueError, match="marks: expected shape"):
        model(gaps, marks[:, 1:])
    with pytest.raises(TypeError, match="gaps: expected a floating point dtype"):
        model(marks, marks)
    with pytest.raises(TypeError, match="state: expected None or StackState"):
        model(gaps, marks, (1, 2))
