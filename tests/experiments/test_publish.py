"""The pages of the documentation show the results that are recorded beside them."""

import json
import shutil

import pytest

from experiments import aaren_study
from experiments.publish import DOCS, list_pages, publish

PUBLISHED = {
    path.stem: page
    for path in DOCS.glob("*.json")
    for page in list_pages(DOCS)
    if f"<!-- {path.stem} -->" in page.read_text(encoding="utf-8")
}


def test_every_result_is_published():
    assert set(PUBLISHED) == {
        *aaren_study.NAMES.values(), "benchmark_neural_memory", "benchmark_recurrences", "byte_language_models",
        "byte_language_models_memories", "compile_language_models", "forecasting", "kernel_costs", "memory_ablations",
        "mqar", "needle_in_a_haystack",
    }  # fmt: skip


def copy_page(name, folder):
    shutil.copy(PUBLISHED[name], folder)
    return folder / PUBLISHED[name].name


@pytest.mark.parametrize("name", PUBLISHED)
def test_pages_show_the_recorded_results(name, tmp_path):
    page = copy_page(name, tmp_path)
    assert publish(DOCS / f"{name}.json", tmp_path, name) == page
    assert page.read_text() == PUBLISHED[name].read_text()
    assert (tmp_path / f"{name}.json").read_text() == (DOCS / f"{name}.json").read_text()
    for picture in tmp_path.glob("*.png"):
        assert picture.name in page.read_text(), "a figure that the page does not show"


def test_study_is_that_of_the_recorded_results():
    metrics = {
        name: json.loads((DOCS / f"{aaren_study.NAMES[name]}.json").read_text())["metrics"]
        for name in aaren_study.SETTINGS
    }
    assert aaren_study.show(metrics) in (DOCS.parent / "experiments" / "RESULTS.md").read_text(encoding="utf-8")


def test_pages_show_no_other_results(tmp_path):
    page, result = copy_page("mqar", tmp_path), json.loads((DOCS / "mqar.json").read_text())
    accuracy = result["metrics"]["results"][0]["accuracy"]
    accuracy[next(iter(accuracy))]["mean"] = 0.123456
    (tmp_path / "result.json").write_text(json.dumps(result))
    publish(tmp_path / "result.json", tmp_path)
    assert "0.1235" in page.read_text()
    assert page.read_text() != PUBLISHED["mqar"].read_text()


def test_pages_without_markers_stay_as_they_are(tmp_path):
    (tmp_path / "page.md").write_text("<!-- mqar --> prose")
    with pytest.raises(ValueError, match="expected one page with the markers"):
        publish(DOCS / "mqar.json", tmp_path)
    assert (tmp_path / "page.md").read_text() == "<!-- mqar --> prose"


def test_learning_curves_stay_in_the_run(tmp_path):
    copy_page("mqar", tmp_path)
    result = json.loads((DOCS / "mqar.json").read_text())
    result["metrics"]["results"][0]["history"] = [{"step": 1}]
    (tmp_path / "result.json").write_text(json.dumps(result))
    publish(tmp_path / "result.json", tmp_path)
    assert "history" not in (tmp_path / "mqar.json").read_text()
