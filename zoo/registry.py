"""The papers that are implemented, and the table of them in the README.

``python -m zoo.registry`` prints the table, ``--write README.md`` puts it between the file's markers, ``--check
README.md`` fails where the file holds another one.
"""

import argparse
import pathlib
import sys
from typing import NamedTuple

START, END = "<!-- papers -->", "<!-- /papers -->"


class Paper(NamedTuple):
    """A paper, and what of it is here."""

    title: str
    authors: str
    year: int
    arxiv: str
    file: str
    implements: str
    models: tuple[str, ...]  # stacks of `zoo.create.STACKS`
    experiments: tuple[str, ...] = ()  # names of `python -m experiments`


PAPERS = (
    Paper(
        title="Attention as an RNN",
        authors="Feng, Tung, Hajimirsadeghi, Ahmed, Bengio, Mori",
        year=2024,
        arxiv="2405.13956",
        file="zoo/token_mixers/aaren.py",
        implements="Aaren: prefix-scan attention with a learned query; parameter counts of the paper",
        models=("aaren",),
        experiments=("aaren_classification", "aaren_recall"),
    ),
    Paper(
        title="Attention Is All You Need",
        authors="Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin",
        year=2017,
        arxiv="1706.03762",
        file="zoo/token_mixers/transformer.py",
        implements="causal self-attention with a cache, as the baseline",
        models=("transformer",),
        experiments=("aaren_classification", "aaren_recall"),
    ),
)


def render(papers: tuple[Paper, ...] = PAPERS) -> str:
    """The table in Markdown."""
    rows = ["| paper | implemented | models | experiments |", "|---|---|---|---|"]
    for paper in papers:
        source = f"{paper.authors} ({paper.year}), [{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})"
        rows.append(
            f"| [{paper.title}]({paper.file}): {source} | {paper.implements} "
            f"| {_code(paper.models)} | {_code(paper.experiments)} |"
        )
    return "\n".join(rows)


def _code(names):
    return ", ".join(f"`{name}`" for name in names)


def insert(text: str, table: str) -> str:
    """The text with the table between its markers; `ValueError` where it has none."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"expected the markers {START} and {END}")
    return f"{before}{START}\n{table}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Print, write or check the table."""
    parser = argparse.ArgumentParser(prog="python -m zoo.registry", description="The table of implemented papers.")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--write", metavar="FILE", type=pathlib.Path, help="put the table between the file's markers")
    mode.add_argument("--check", metavar="FILE", type=pathlib.Path, help="fail where the file holds another table")
    options = parser.parse_args(arguments)
    path = options.write or options.check
    if path is None:
        print(render())
        return 0
    try:
        text = path.read_text(encoding="utf-8")
        expected = insert(text, render())
    except (OSError, ValueError) as error:
        parser.error(f"{path}: {error}")
    if options.write:
        path.write_text(expected, encoding="utf-8")
    elif text != expected:
        print(f"{path}: the table of papers is out of date; run python -m zoo.registry --write {path}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
