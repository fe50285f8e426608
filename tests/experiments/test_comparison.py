"""What the settings of "Attention as an RNN" share: pairs, their verdicts, tables, and what a kill does not lose."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import comparison
from experiments.comparison import ComparisonConfig, Measure
from experiments.measure import count_parameters
from experiments.results import summary
from experiments.trainer import DivergedError

ACCURACY, ERROR = Measure("accuracy", "accuracy", True), Measure("error", "error", False)


def cell(name, aaren, transformer, measure=ACCURACY, **facts):
    models = {"aaren": {measure.name: summary(aaren)}, "transformer": {measure.name: summary(transformer)}}
    return {"dataset": name, "models": models, "references": {}} | facts


# Pairs


def test_interval_is_that_of_students_distribution():
    found = comparison.paired_difference([1, 2, 3, 4, 6], [0, 1, 2, 3, 4], higher_is_better=True)
    margin = 2.7764451 * math.sqrt(0.2) / math.sqrt(5)  # the 97.5 % quantile with four degrees of freedom
    assert found["mean"] == pytest.approx(1.2)
    assert [found["low"], found["high"]] == pytest.approx([1.2 - margin, 1.2 + margin])


def test_interval_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(0.3, 1, size=(2000, 5))
    found = [comparison.paired_difference(draw, np.zeros(5), higher_is_better=True) for draw in draws]
    covered = np.mean([each["low"] <= 0.3 <= each["high"] for each in found])
    assert covered == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(
    ("differences", "higher", "lower"),
    [([1, 1.1, 0.9], "win", "loss"), ([-1, -1.1, -0.9], "loss", "win"), ([1, -1, 0.1], "tie", "tie"),
     ([0, 0, 0], "tie", "tie"), ([1, 1, 1], "win", "loss"), ([1], None, None), ([1, math.nan, 1], None, None)],
)  # fmt: skip
def test_verdicts(differences, higher, lower):
    zeros = [0.0] * len(differences)
    assert comparison.paired_difference(differences, zeros, higher_is_better=True)["verdict"] == higher
    assert comparison.paired_difference(differences, zeros, higher_is_better=False)["verdict"] == lower


def test_pairs_matter():
    """Seeds move both models alike: the difference is certain though the spread is large."""
    aaren, transformer = [1.1, 5.15, 9.1], [1.0, 5.0, 9.0]
    paired, shuffled = (
        comparison.paired_difference(aaren, other, higher_is_better=True)
        for other in (transformer, [transformer[i] for i in (1, 2, 0)])
    )
    assert paired["mean"] == pytest.approx(shuffled["mean"])
    assert (paired["verdict"], shuffled["verdict"]) == ("win", "tie")


def test_verdicts_are_counted():
    cells = [cell("a", [1, 1.1], [0, 0]), cell("b", [0, 0], [1, 1.1]), cell("c", [0, 1], [1, 0])]
    assert comparison.count_verdicts(cells, ACCURACY) == {"win": 1, "tie": 1, "loss": 1}
    assert comparison.count_verdicts(cells, ERROR) == {"win": 0, "tie": 0, "loss": 0}


# The learning rate


def test_best_rate():
    by_rate = np.array([[1.0, 3.0, math.nan], [2.0, 1.0, 9.0]])
    assert comparison.choose_rate(by_rate, higher_is_better=True) == 1
    assert comparison.choose_rate(by_rate, higher_is_better=False) == 0
    with pytest.raises(DivergedError, match="every learning rate"):
        comparison.choose_rate(by_rate[:, 2:], higher_is_better=True)


# Tables and figures


def test_tables_show_pairs_and_references():
    first = cell("Steps", [0.5, 0.7], [0.1, 0.1], horizon=96) | {"references": {"chance": {"accuracy": 0.25}}}
    shown = comparison.show_cells([first, cell("Jumps", [0.5], [0.25])], [ACCURACY, ERROR])
    assert "**accuracy**, higher is better. Aaren: 0 wins, 1 tie, 0 losses." in shown
    assert "Steps, 96" in shown
    assert "+0.5 [-0.8, +1.8]" in shown
    assert "0.25" in shown.split("chance")[1]
    assert "error" not in shown


def test_a_model_alone_is_shown_without_a_difference():
    alone = {"dataset": "Steps", "models": {"aaren": {"accuracy": summary([0.5, 0.7])}}, "references": {}}
    shown = comparison.show_cells([alone], [ACCURACY])
    assert "0.60 ± 0.14" in shown
    assert "Transformer" not in shown


def test_numbers_that_are_not_finite_are_shown_as_such():
    shown = comparison.show_cells([cell("Steps", [0.5, None], [0.1, 0.1])], [ACCURACY])
    assert "not finite" in shown
    assert "| - " in shown


@pytest.mark.parametrize(("measure", "side"), [(ACCURACY, 1), (ERROR, -1)])
def test_figure_puts_what_is_better_to_the_right(measure, side):
    axis = Figure().subplots()
    comparison.draw_differences(axis, [cell("a", [2, 2.2], [1, 1], measure)], measure, title="")
    assert np.sign(axis.lines[0].get_xdata()) == side


def test_figure_shows_models_and_references(tmp_path, monkeypatch):
    canvases = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda canvas, *_, **__: canvases.append(canvas))
    references = {"chance": {"error": 3.0}, "unknown": None}
    cells = [cell("a", [2, 2.2], [1, 1], ERROR) | {"references": references}]
    comparison.draw_cells(tmp_path / "a.png", cells, ERROR)
    comparison.draw_cells(tmp_path / "b.png", cells, ERROR, above="chance")
    comparison.draw_cells(tmp_path / "c.png", [cells[0] | {"models": {"aaren": cells[0]["models"]["aaren"]}}], ERROR)
    shown = [
        {container.get_label(): container.lines[0].get_xdata()[0] for container in canvas.axes[0].containers}
        for canvas in canvases
    ]
    assert shown[0] == pytest.approx({"Aaren": 2.1, "Transformer": 1.0, "chance": 3.0})
    assert shown[1] == pytest.approx({"Aaren": 0.9, "Transformer": 2.0})
    assert [len(canvas.axes) for canvas in canvases] == [2, 2, 1]


# What is kept


def test_nothing_is_computed_twice(tmp_path):
    path = tmp_path / "deep" / "result.json"
    found = comparison.remember(path, lambda: {"a": np.arange(2), "b": math.nan})
    again = comparison.remember(path, lambda: pytest.fail("computed again"))
    assert found["a"] == again["a"] == [0, 1]
    assert math.isnan(again["b"])


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        comparison.remember(tmp_path / "result.json", lambda: {"a": 1 / 0})
    assert not list(tmp_path.iterdir())


# Options


@pytest.mark.parametrize(
    "options", [{"width": 65}, {"model": ("lstm",)}, {"model": ()}, {"dataset": ("a", "a")}, {"seeds": 0}]
)
def test_options_that_do_not_fit(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ComparisonConfig(**{"dataset": ("a",)} | options)


def test_models_differ_by_their_queries_only():
    config = dataclasses.replace(ComparisonConfig(dataset=("a",)), width=16, layers=3, heads=2)
    counts = {
        name: count_parameters(
            jax.eval_shape(
                lambda key, name=name: comparison.create("classifier", name, config, key, channels=2, classes=3),
                jax.random.key(0),
            )
        )
        for name in comparison.MODELS
    }
    assert counts["aaren"] - counts["transformer"] == config.layers * config.width
