"""Models by name, and the table of papers."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import pytest
from flax import nnx

import zoo
from experiments import EXPERIMENTS
from zoo import create, registry

ROOT = pathlib.Path(__file__).parents[2]


def test_every_name_builds():
    arguments = {"classifier": {"channels": 2, "classes": 3}, "forecaster": {"channels": 2, "horizon": 3}}
    arguments["language_model"] = {"vocabulary": 5}
    arguments |= {"policy": {"observation_size": 3, "action_size": 2}, "point_process": {"marks": 4}}
    assert {"aaren", "aaren_classifier", "transformer_language_model"} <= set(zoo.list_models())
    for name in zoo.list_models():
        head = next((head for head in arguments if name.endswith("_" + head)), "")
        model = jax.eval_shape(lambda n=name, h=head: zoo.create_model(n, rngs=nnx.Rngs(0), **arguments.get(h, {})))
        assert isinstance(model, create.MODELS[name].build)


def test_every_preset_builds():
    """The papers' sizes too, as shapes only; options of mixers are no names of a stack's or a model's."""
    taken = {field.name for field in dataclasses.fields(zoo.StackConfig)}
    taken |= {"channels", "classes", "pooling", "horizon", "normalise", "vocabulary", "tied", "marks", "components"}
    taken |= {"mean_log_gap", "log_gap_scale", "observation_size", "action_size", "discrete"}
    for name, presets in create.STACKS.items():
        assert next(iter(presets)) == "tiny"
        for preset in presets:
            stack = jax.eval_shape(lambda n=name, p=preset: zoo.create_model(n, preset=p, rngs=nnx.Rngs(0), scan=True))
            assert jax.tree.leaves(stack)
    for mixer in create.MIXERS.values():
        assert not taken & {field.name for field in dataclasses.fields(mixer)}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("aarn_classifier", {}, "name: expected one of aaren, .* did you mean aaren_classifier"),
        ("aaren", {"preset": "papers"}, "preset: expected one of .* did you mean paper"),
        ("aaren", {"widht": 3}, "override: expected one of .* did you mean width"),
        ("aaren", {"rngs_": 3}, "override"),
    ],
)
def test_unknown_names(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        zoo.create_model(name, rngs=nnx.Rngs(0), **arguments)


def test_papers_exist():
    assert {stack for paper in registry.PAPERS for stack in paper.models} == set(create.STACKS)
    benchmarks = {name for name in EXPERIMENTS if name.startswith("benchmark_")} | {"kernel_costs"}
    assert {name for paper in registry.PAPERS for name in paper.experiments} == set(EXPERIMENTS) - benchmarks
    for paper in registry.PAPERS:
        text = " ".join((ROOT / paper.file).read_text(encoding="utf-8").split())
        assert paper.title in text
        assert paper.arxiv in text
        assert str(paper.year) in text
        assert all(author in text for author in paper.authors.removesuffix(" and others").split(", "))
        assert paper.file in registry.render()


def test_table_of_the_readme(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("# A\n<!-- papers -->\nold\n<!-- /papers -->\nend\n", encoding="utf-8")
    assert registry.main(["--check", str(readme)]) == 1
    assert "--write" in capsys.readouterr().err
    assert registry.main(["--write", str(readme)]) == 0
    assert registry.main(["--check", str(readme)]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text == f"# A\n<!-- papers -->\n{registry.render()}\n<!-- /papers -->\nend\n"
    readme.write_text("# nothing\n", encoding="utf-8")
    for path in (readme, tmp_path / "missing.md"):
        with pytest.raises(SystemExit, match="2"):
            registry.main(["--check", str(path)])
    assert "expected the markers" in capsys.readouterr().err


def test_command_prints_the_table():
    command = [sys.executable, "-W", "error", "-m", "zoo.registry"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == registry.render()
