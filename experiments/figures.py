"""Figures of experiments, in one style and without a display."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import writing

__all__ = ["draw_growth", "figure", "marker"]


@contextlib.contextmanager
def figure(path: Path, *, width: float, height: float, panels: int = 1) -> Iterator[list[Axes]]:
    """The axes of `panels` side by side, to draw on; saved to `path` in the end. Sizes are in inches."""
    canvas = Figure(figsize=(width, height), layout="constrained")
    axes = canvas.subplots(1, panels, squeeze=False)[0]
    yield list(axes)
    with writing(path):
        canvas.savefig(path, dpi=150)


def marker(number: int) -> dict[str, str]:
    """Colour and shape of a series, different for the first fifty."""
    return {"color": f"C{number % 10}", "marker": "osD^v"[number // 10 % 5]}


def draw_growth(axis: Axes, growth: Mapping[str, Any], *, title: str) -> None:
    """Seconds over tokens, both logarithmic, as `measure_growth` of experiments.measure returns them."""
    for name, seconds in growth["seconds"].items():
        axis.loglog(growth["tokens"], seconds, "o-", label=f"{name}, exponent {growth['exponents'][name]:.2f}")
    axis.set(xlabel="tokens", ylabel="seconds", title=title)
    axis.grid(alpha=0.3, which="both")
    axis.margins(y=0.3)
    axis.legend(loc="upper left", fontsize="small")
