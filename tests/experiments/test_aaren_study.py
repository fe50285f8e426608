"""The study as a whole: what it counts, and what it says where runs are missing."""

import dataclasses
import json

import pytest

from experiments import aaren_study
from experiments.results import summary


def cells(module, *advantages):
    """A cell for each advantage of Aaren, in the module's main measure."""
    measure = module.MEASURES[0]
    sign = 1 if measure.higher_is_better else -1
    return [
        {
            "dataset": f"set {number}",
            "models": {
                "aaren": {measure.name: summary([1 + sign * advantage, 1.1 + sign * advantage])},
                "transformer": {measure.name: summary([1, 1.1])},
            },
            "references": {},
        }
        for number, advantage in enumerate(advantages)
    ]


METRICS = {name: {"cells": cells(module, 0.5, 0.0)} for name, module in aaren_study.SETTINGS.items()}
METRICS["events"]["cells"] += cells(aaren_study.SETTINGS["events"], -0.5)


def test_every_setting_counts():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in aaren_study.show(METRICS).splitlines()]
    assert rows[0] == ["setting", "measure", "comparisons", "win", "tie", "loss"]
    found = {row[0]: row[2:] for row in rows[2:]}
    assert found.pop("events") == ["3", "1", "1", "1"]
    assert found.pop("all") == ["9", "4", "4", "1"]
    assert len(found) == 3
    assert all(counts == ["2", "1", "1", "0"] for counts in found.values())


def write_runs(folder, names):
    for name in names:
        path = folder / f"aaren_{name}" / "desk" / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"experiment": f"aaren_{name}", "metrics": METRICS.get(name, {})}))


def test_study_of_all_runs(tmp_path, capsys):
    write_runs(tmp_path, aaren_study.NAMES)
    assert aaren_study.main(["--runs", str(tmp_path)]) == 0
    assert aaren_study.show(METRICS) in capsys.readouterr().out
    assert (tmp_path / "aaren_study.png").stat().st_size > 10_000


def test_missing_runs_are_named(tmp_path, capsys):
    write_runs(tmp_path, ["events"])
    assert aaren_study.main(["--runs", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "python -m experiments aaren_reinforcement --preset desk" in said
    assert "aaren_events" not in said


@pytest.mark.parametrize("name", aaren_study.SETTINGS)
def test_every_setting_has_what_the_study_needs(name):
    module = aaren_study.SETTINGS[name]
    assert {"smoke", "desk", "paper"} <= module.PRESETS.keys()
    assert module.PRESETS["desk"].seeds == 5
    assert set(module.PRESETS["desk"].model) == {"aaren", "transformer"}


def test_all_data_sets_of_the_paper_have_a_name():
    numbers = {name: len(set(module.PRESETS["paper"].dataset)) for name, module in aaren_study.SETTINGS.items()}
    assert numbers == {"reinforcement": 12, "events": 8, "forecasting": 8, "classification": 10}


@pytest.mark.parametrize("name", aaren_study.SETTINGS)
def test_published_data_sets_say_what_they_need(name, tmp_path):
    module = aaren_study.SETTINGS[name]
    for dataset in module.PRESETS["paper"].dataset:
        if dataset != "JapaneseVowels":  # a package ships it
            with pytest.raises(FileNotFoundError, match=rf"{dataset}(?s:.*)source_folder"):
                module.check(dataclasses.replace(module.PRESETS["paper"], dataset=(dataset,), source_folder=tmp_path))
