"""Figures of experiments, in one style and without a display."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import writing

__all__ = ["figure"]


@contextlib.contextmanager
def figure(path: Path, *, width: float, height: float, panels: int = 1) -> Iterator[list[Axes]]:
    """The axes of `panels` side by side, to draw on; saved to `path` in the end. Sizes are in inches."""
    canvas = Figure(figsize=(width, height), layout="constrained")
    axes = canvas.subplots(1, panels, squeeze=False)[0]
    yield list(axes)
    with writing(path):
        canvas.savefig(path, dpi=150)
