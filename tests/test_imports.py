"""Imports go one way, experiments, colab → zoo → primitives → pallas_kernels, and packages are what they promise."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pallas_kernels

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "primitives", "zoo", "experiments")
FOLDERS = (*PACKAGES, "colab")  # each may import itself and those before it
LIBRARIES = {"pallas_kernels": {"jax", "jaxtyping"}, "primitives": {"jax", "jaxtyping", "numpy"}}  # the others: any


def violations(root):
    """The imports below a root that go the wrong way, or reach for a library too many, as ``file: module``."""
    found = []
    for rank, folder in enumerate(FOLDERS):
        allowed = LIBRARIES.get(folder, set()) | sys.stdlib_module_names
        for path in [*(root / folder).rglob("*.py"), *(root / folder).rglob("*.ipynb")]:
            for module in imported(path):
                name = module.partition(".")[0]
                ours, fits = name in {*FOLDERS, "tests"}, folder not in LIBRARIES or name in allowed
                if name not in FOLDERS[: rank + 1] if ours else not fits:
                    found.append(f"{path.relative_to(root)}: {module}")
    return sorted(found)


def imported(path):
    """The modules that a Python file or a notebook imports, anywhere in it."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
        text = re.sub(r"^(\s*)[%!].*", r"\1pass", text, flags=re.MULTILINE)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def test_imports_go_one_way():
    assert all(any((ROOT / package).rglob("*.py")) for package in PACKAGES)
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "text", "module"),
    [
        ("pallas_kernels/tpu/a.py", "import primitives", "primitives"),
        ("pallas_kernels/a.py", "import numpy as np", "numpy"),
        ("primitives/a.py", "def f():\n    from zoo.layers import Block", "zoo.layers"),
        ("primitives/a.py", "import jax, flax.nnx", "flax.nnx"),
        ("zoo/a.py", "from experiments import trainer", "experiments"),
        ("experiments/a.py", "import tests.toy", "tests.toy"),
        ("zoo/a.ipynb", '{"cells": [{"cell_type": "code", "source": ["%time\\n", "import colab"]}]}', "colab"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, file, text, module):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    (path.parent / "right.py").write_text("import jax\nfrom pallas_kernels import __version__\nfrom . import right")
    path.write_text(text)
    assert violations(tmp_path) == [f"{file}: {module}"]


def test_primitives_load_no_flax():
    """Not by a detour either."""
    program = "import sys, primitives.testing; print({'flax', 'chex', 'optax', 'zoo', 'experiments'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", program], text=True, cwd=ROOT) == "set()\n"


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_says_what_it_offers(name):
    package = importlib.import_module(name)
    assert package.__version__ == pallas_kernels.__version__
    assert [missing for missing in package.__all__ if not hasattr(package, missing)] == []
    assert (ROOT / name / "py.typed").is_file()
