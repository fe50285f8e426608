import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import experiments
from experiments.__main__ import main
from experiments.run_folder import claim

SCRIPT = Path(__file__).with_name("toy.py")


@pytest.fixture(autouse=True)
def toy(monkeypatch, tmp_path):
    """An experiment `toy` that runs in no time: `run` doubles the number of steps."""
    spec = importlib.util.spec_from_file_location("experiments.toy", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "experiments.toy", module)
    monkeypatch.setattr("experiments.__main__.EXPERIMENTS", ("toy",))
    monkeypatch.chdir(tmp_path)
    spec.loader.exec_module(module)
    module.run = lambda config, folder: {"steps": 2 * config.steps, "loss": float("nan")}
    return module


def test_list(capsys):
    assert main(["list"]) == 0
    assert capsys.readouterr().out.split(maxsplit=1) == [
        "toy",
        "A toy experiment for the tests: fits a noisy linear map. Presets: demo, smoke.\n",
    ]


def test_usage(capsys):
    assert main([]) == main(["--help"]) == 0
    assert capsys.readouterr().out.count("python -m experiments list") == 2


def test_help_of_an_experiment_explains_its_options(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["toy", "--preset", "smoke", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in (
        "usage: python -m experiments toy",
        "A toy experiment for the tests",
        "Presets: demo, smoke.",
        "--steps INT Steps of the optimiser. (default: 3)",
        "--seeds [INT [INT ...]] One member each. (default: 0 1 1)",
        "(default: runs/toy/smoke)",
        "--fresh Delete the run that is in the folder first.",
    ):
        assert part in text


def test_a_run_writes_its_result(capsys):
    assert main(["toy", "--preset=smoke", "--seeds", "4", "5"]) == 0
    assert capsys.readouterr().out == "result: runs/toy/smoke/result.json\n"
    result = json.loads(Path("runs/toy/smoke/result.json").read_text())
    assert set(result) == {
        *("experiment", "command", "config", "seeds", "started", "finished", "seconds_of_last_process"),
        *("versions", "commit", "machine", "metrics", "not_finite"),
    }
    assert result["command"] == "python -m experiments toy --preset=smoke --seeds 4 5"
    assert result["metrics"] == {"steps": 6, "loss": None}
    assert result["not_finite"] == {"metrics/loss": "nan"}
    assert result["config"]["warmup_steps"] == 1  # of the preset
    assert result["seeds"] == result["config"]["seeds"] == [4, 5]


def test_the_first_preset_is_the_default():
    assert main(["toy", "--folder", "here"]) == 0
    assert json.loads(Path("here/result.json").read_text())["config"]["steps"] == 50


def test_a_folder_belongs_to_one_run(capsys):
    assert main(["toy", "--preset", "smoke", "--folder", "here"]) == 0
    first = json.loads(Path("here/result.json").read_text())
    assert main(["toy", "--preset", "smoke", "--folder", "here"]) == 0
    assert json.loads(Path("here/result.json").read_text())["started"] == first["started"]
    assert main(["toy", "--preset", "smoke", "--folder", "here", "--steps", "4"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: here holds another run (steps was 3, is 4): choose another --folder, or ")
    assert error.count("\n") == 1
    Path("here/more").mkdir()
    Path("here/more/file").write_text("")
    assert main(["toy", "--preset", "smoke", "--folder", "here", "--steps", "4", "--fresh"]) == 0
    assert sorted(path.name for path in Path("here").iterdir()) == ["result.json", "run.json"]
    Path("here/run.json").write_text("{")
    assert main(["toy", "--preset", "smoke", "--folder", "here"]) == 1
    assert "run.json is damaged" in capsys.readouterr().err


def test_fresh_deletes_nothing_but_runs(capsys):
    Path("precious").mkdir()
    Path("precious/file").write_text("work")
    assert main(["toy", "--folder", "precious", "--fresh"]) == 1
    assert "--fresh deletes runs only, and precious has no run.json" in capsys.readouterr().err
    assert [path.name for path in Path("precious").iterdir()] == ["file"]
    assert main(["toy", "--folder", "new", "--fresh"]) == 0


def test_one_process_at_a_time(capsys):
    with claim(Path("here"), {}):
        assert main(["toy", "--folder", "here"]) == 1
    assert capsys.readouterr().err == "error: another process is running in here: choose another --folder\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["toys"],
        ["unheard-of"],
        ["toy", "--preset", "huge"],
        ["toy", "--stepz", "3"],
        ["toy", "--steps", "three"],
        ["toy", "--steps", "3"],  # fewer than the steps of the warm-up
    ],
)
def test_wrong_usage_is_status_2(arguments, capsys):
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    error = capsys.readouterr().err
    assert {"toys": "did you mean toy?", "unheard-of": "experiments list", "toy": "python -m experiments toy"}[
        arguments[0]
    ] in error
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("failure", "status", "message"),
    [
        (experiments.ExperimentError("no data: run X"), 1, "error: no data: run X\n"),
        (FileNotFoundError(2, "No such file or directory", "data/x"), 1, "error: data/x: No such file or directory\n"),
        (
            ModuleNotFoundError("No module", name="grain"),
            1,
            "error: grain is not installed: pip install 'seqzoo[experiments]'\n",
        ),
        (KeyboardInterrupt(), 130, "\ninterrupted; run the same command again to resume\n"),
    ],
)
def test_expected_failures_are_one_line(toy, capsys, failure, status, message):
    def run(config, folder):
        raise failure

    toy.run = run
    assert main(["toy"]) == status
    assert capsys.readouterr().err == message


def test_a_bug_keeps_its_traceback(toy):
    toy.run = lambda config, folder: 1 / 0
    with pytest.raises(ZeroDivisionError):
        main(["toy"])


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/below"])
def test_unwritable_folder(folder, capsys):
    Path("file").write_text("")
    assert main(["toy", "--folder", folder]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot write {folder}: ")
    assert error.count("\n") == 1


def test_list_needs_no_other_package_and_a_run_says_what_is_missing():
    """As in an environment without extras: every package that is not ours or Python's is hidden."""
    code = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in {{*sys.stdlib_module_names, "experiments", "pallas_kernels"}}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
import experiments
experiments.__path__.append({str(SCRIPT.parent)!r})
experiments.EXPERIMENTS = ("toy",)
from experiments.__main__ import main
assert main(["list"]) == 0
sys.exit(main(["toy"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Presets: demo, smoke." in done.stdout
    assert done.stderr == "error: jax is not installed: pip install 'seqzoo[experiments]'\n"
    assert done.returncode == 1


def test_the_registered_experiments_keep_the_conventions(monkeypatch, capsys):
    monkeypatch.setattr("experiments.__main__.EXPERIMENTS", experiments.EXPERIMENTS)
    assert main(["list"]) == 0
    assert capsys.readouterr().out.count("Presets: ") == len(experiments.EXPERIMENTS)
