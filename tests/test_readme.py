"""The README's examples run as they are printed."""

import json
import re
from pathlib import Path

import pytest

from experiments.aaren_classification import comparison

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.splitlines()[1])
def test_example(example):
    exec(compile(example, "README.md", "exec"), {})


def test_demo_is_that_of_the_recorded_result():
    result = json.loads((README.parent / "docs" / "aaren_classification.json").read_text())
    assert comparison(result["metrics"]) in README.read_text()


def test_there_are_examples():
    assert len(EXAMPLES) == 3
