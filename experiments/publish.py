"""Put a result into the documentation: `python -m experiments.publish RESULT.json [--name NAME]`.

An experiment whose results are shown in docs/ has a function ``show(metrics) -> str``, Markdown, and, if there are
figures, ``draw(metrics, folder)``. They get the metrics of a result.json, so that what is shown is what was recorded.
A second result of an experiment has a name of its own, and no figures.
"""

import argparse
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.results import write_json

__all__ = ["insert", "list_pages", "publish", "render"]

DOCS = Path(__file__).parents[1] / "docs"


def render(result: Mapping[str, Any]) -> str:
    """A result.json as Markdown: how it was measured, then what its experiment shows."""
    machine, versions = result["machine"], result["versions"]
    head = f"Measured by `{result['command']}` on {machine['cores']} cores of {machine['cpu']}, jax {versions['jax']}."
    return f"{head}\n\n{_module(result).show(result['metrics'])}"


def publish(result: Path, docs: Path = DOCS, name: str | None = None) -> Path:
    """Copy a result into `docs`, draw its figures there, and put its tables between the markers of a page.

    The page is the one that has the markers ``<!-- NAME -->`` and ``<!-- /NAME -->``, the experiment's where none is
    given; `ValueError` where no page has. Learning curves stay in the run's folder. Returns the page.
    """
    content = _without_history(json.loads(result.read_text()))
    name = name or content["experiment"]
    page = insert(docs, name, render(content))
    write_json(docs / f"{name}.json", content)
    if name == content["experiment"]:
        getattr(_module(content), "draw", lambda metrics, folder: None)(content["metrics"], docs)
    return page


def insert(docs: Path, name: str, text: str) -> Path:
    """Put Markdown between the markers ``<!-- NAME -->`` and ``<!-- /NAME -->`` of the one page that has them."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    pages = [page for page in list_pages(docs) if start in page.read_text(encoding="utf-8")]
    if len(pages) != 1 or end not in pages[0].read_text(encoding="utf-8"):
        raise ValueError(f"{docs}: expected one page with the markers {start} and {end}")
    before, rest = pages[0].read_text(encoding="utf-8").split(start)
    _, after = rest.split(end)
    pages[0].write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")
    return pages[0]


def list_pages(docs: Path) -> list[Path]:
    """The pages that show results: those of the folder, and beside it those of the experiments and of the kernels."""
    beside = (docs.parent / page for page in ("experiments/RESULTS.md", "pallas_kernels/README.md"))
    return [*sorted(docs.glob("*.md")), *(page for page in beside if page.exists())]


def _module(result):
    return importlib.import_module(f"experiments.{result['experiment']}")


def _without_history(value):
    match value:
        case dict():
            return {key: _without_history(item) for key, item in value.items() if key != "history"}
        case list():
            return [_without_history(item) for item in value]
    return value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m experiments.publish", description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="a result.json")
    parser.add_argument("--name", help="of the markers and of the copy, where it is not the experiment's")
    arguments = parser.parse_args()
    print(publish(arguments.result, name=arguments.name))
