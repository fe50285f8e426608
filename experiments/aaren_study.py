"""The study of "Attention as an RNN" as a whole: `python -m experiments.aaren_study [--runs RUNS] [--publish]`.

Reads what `python -m experiments aaren_SETTING --preset desk` left for each of the four settings, and for the
efficiency of the models, in RUNS (`make study` runs them all). Shows over how many data sets Aaren wins, ties and loses
against the Transformer; draws the difference on each data set with its interval. With ``--publish`` the results go to
docs/ and between the markers of experiments/RESULTS.md.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import aaren_classification, aaren_events, aaren_forecasting, aaren_reinforcement
from experiments.comparison import count_verdicts, draw_differences
from experiments.figures import figure
from experiments.publish import DOCS, insert, publish
from experiments.results import table

__all__ = ["SETTINGS", "draw", "show"]

SETTINGS = {
    "reinforcement": aaren_reinforcement,
    "events": aaren_events,
    "forecasting": aaren_forecasting,
    "classification": aaren_classification,
}
NAMES = {name: f"aaren_{name}" for name in (*SETTINGS, "efficiency")} | {
    "classification": "aaren_classification_study"  # `aaren_classification` is the demo's result
}


def show(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of settings, from the metrics of each."""
    rows, total = [], Counter()
    for name, module in SETTINGS.items():
        measure, cells = module.MEASURES[0], metrics[name]["cells"]
        counts = count_verdicts(cells, measure)
        total.update(counts)
        rows.append({"setting": name, "measure": measure.label, "comparisons": len(cells), **counts})
    together = {"setting": "all", "comparisons": sum(row["comparisons"] for row in rows)}
    return table([*rows, together | {verdict: total[verdict] for verdict in counts}])


def draw(metrics: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """How much better Aaren is on each data set, a panel for each setting."""
    most = max(len(found["cells"]) for found in metrics.values())
    with figure(path, width=4.4 * len(SETTINGS), height=1.4 + 0.24 * most, panels=len(SETTINGS)) as axes:
        for axis, (name, module) in zip(axes, SETTINGS.items(), strict=True):
            draw_differences(axis, metrics[name]["cells"], module.MEASURES[0], title=name)


def main(arguments: list[str] | None = None) -> int:
    """Read the runs, show them, and publish them where that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m experiments.aaren_study", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="holds aaren_SETTING/PRESET/result.json")
    parser.add_argument("--preset", default="desk", help="of the runs")
    parser.add_argument("--publish", action="store_true", help="into docs/ and experiments/RESULTS.md")
    options = parser.parse_args(arguments)
    files = {name: options.runs / f"aaren_{name}" / options.preset / "result.json" for name in NAMES}
    if missing := [name for name, file in files.items() if not file.is_file()]:
        commands = "\n".join(f"  python -m experiments aaren_{name} --preset {options.preset}" for name in missing)
        print(f"error: {options.runs} does not hold all results; run\n{commands}", file=sys.stderr)
        return 1
    metrics = {name: json.loads(files[name].read_text())["metrics"] for name in SETTINGS}
    print(show(metrics))
    if options.publish:
        for name, file in files.items():
            publish(file, name=NAMES[name])
        insert(DOCS, "aaren_study", show(metrics))
    path = (DOCS if options.publish else options.runs) / "aaren_study.png"
    draw(metrics, path)
    print(f"figure: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
