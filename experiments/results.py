"""The result of a run: statistics over seeds, the environment, strict JSON, and tables that read well as plain text."""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import __version__, writing

__all__ = ["environment", "summary", "table", "write_json"]

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")


def summary(values: Iterable[float]) -> dict[str, Any]:
    """`values` (one per seed) with their mean and sample standard deviation (n - 1; None for a single value)."""
    values = np.asarray(list(values), float)
    with np.errstate(invalid="ignore"):  # of a diverged seed neither is finite
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return {"values": values.tolist(), "mean": float(np.mean(values)), "std": deviation}


def environment() -> dict[str, Any]:
    """Versions, git commit (None outside a checkout; `-dirty` with local changes) and machine."""
    import jax  # here, so that reading and rendering results needs no JAX

    installed = {name: found.version for name in PACKAGES for found in importlib.metadata.distributions(name=name)}
    return {
        "versions": {"seqzoo": __version__, "python": platform.python_version()} | installed,
        "commit": _commit(Path(__file__).parents[1]),
        "machine": {
            "platform": platform.platform(),
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "jax_devices": [device.device_kind for device in jax.devices()],
        },
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as strict JSON: numbers that are not finite become null and are listed under `not_finite`.

    Atomic: a reader sees the old file or the new one, whole. Raises `ExperimentError` if it cannot be written.
    """
    not_finite: dict[str, str] = {}
    plain = _plain(content, "", not_finite)
    text = json.dumps(plain | ({"not_finite": not_finite} if not_finite else {}), indent=2, allow_nan=False)
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table with a column per key; a `summary` shows as mean ± std, to two digits of the latter."""
    header = list(dict.fromkeys(name for row in rows for name in row))
    cells = [header, *([_cell(row.get(name)) for name in header] for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case {"mean": mean} if mean is None or not math.isfinite(mean):
            return "not finite"
        case {"mean": mean, "std": 0 | None as std}:
            return f"{mean:.4g}" + ("" if std is None else " ± 0")
        case {"mean": mean, "std": std}:
            digits = max(0, 1 - math.floor(math.log10(std)))
            return f"{mean:.{digits}f} ± {std:.{digits}f}"
        case float():
            return f"{value:.4g}"
        case int() if not isinstance(value, bool):
            return f"{value:,}"
        case _:
            return str(value)


def _plain(value: Any, where: str, not_finite: dict[str, str]) -> Any:
    """`value` in JSON's own types; the places of numbers that are not finite go to `not_finite`."""
    match value:
        case Mapping():
            return {str(key): _plain(item, f"{where}/{key}".lstrip("/"), not_finite) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item, f"{where}/{index}", not_finite) for index, item in enumerate(value)]
        case None | bool() | int() | str():
            return value
        case float() if math.isfinite(value):
            return value
        case float():
            not_finite[where] = str(value)
            return None
        case Path():
            return str(value)
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return _plain(value.tolist(), where, not_finite)
    raise TypeError(f"{where}: expected numbers, text, arrays, lists or mappings of them, got {type(value).__name__}")


def _commit(checkout: Path) -> str | None:
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
