"""Reproducible experiments: one module each, run by `python -m experiments NAME`; see `python -m experiments list`."""

import contextlib
import json
import os
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pallas_kernels import __version__

__all__: list[str] = ["EXPERIMENTS", "ExperimentError", "__version__", "check_positive", "refuse_other_run", "writing"]

EXPERIMENTS: tuple[str, ...] = (
    "aaren_classification",
    "aaren_efficiency",
    "aaren_events",
    "aaren_forecasting",
    "aaren_recall",
    "aaren_reinforcement",
    "benchmark_neural_memory",
    "benchmark_prefix_scan",
    "benchmark_recurrences",
    "byte_language_models",
    "compile_language_models",
    "forecasting",
    "kernel_costs",
    "memory_ablations",
    "mqar",
    "needle_in_a_haystack",
)
"""The modules of this package that are experiments, in the order in which `list` shows them."""


class ExperimentError(RuntimeError):
    """An expected failure; its message is one line that says what to do, and all that the command line shows."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write `path` (a full disk, an unwritable folder) into an `ExperimentError` with the reason."""
    try:
        yield
    except Exception as error:
        # Libraries that write for us raise their own; TensorStore names the system's error inside.
        code = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(code[1]) if code else getattr(error, "errno", None)
        reason = os.strerror(number) if number else textwrap.shorten(str(error), 200)
        raise ExperimentError(f"cannot write {path}: {reason}") from error


def check_positive(config: Any, *, except_for: tuple[str, ...] = ()) -> None:
    """Raise `ValueError` for a number of a configuration, or an entry of a tuple of numbers, that is not positive."""
    for name, value in vars(config).items():
        if name in except_for:
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool) and number <= 0:
                raise ValueError(f"{name}: expected positive numbers, got {value}")
        if value == ():
            raise ValueError(f"{name}: expected at least one number")


def refuse_other_run(folder: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise an `ExperimentError` that says what differs unless `current` is `saved`, which was read back from JSON."""
    current = json.loads(json.dumps(current, default=str))  # lists for tuples, as in `saved`
    names = [name for name in saved | current if saved.get(name) != current.get(name)]
    if names:
        differences = "; ".join(f"{name} was {saved.get(name)}, is {current.get(name)}" for name in names[:5])
        raise ExperimentError(
            f"{folder} holds another run ({differences}): choose another --folder, or replace that run with --fresh"
        )
