"""Eight CPU devices for the laws about meshes, quick compilation, `--full` for the whole product of the laws' axes."""

import collections
import itertools
import os
from pathlib import Path

# Before jax is imported. The tests compile thousands of small programs and run each once.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
# What a run compiled, the other worker and the next run read (a third of the time); `make clean` removes it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax

jax.config.update("jax_num_cpu_devices", 8)


def pytest_addoption(parser):
    """Add `--full`."""
    parser.addoption("--full", action="store_true", help="run the laws over the full product of their axes")


def pytest_collection_modifyitems(items):
    """Laws last, and mixer by mixer: the laws of one mixer share compiled programs where one worker runs them."""

    def mixer(item):
        is_law = item.path.name == "test_laws.py" and hasattr(item, "callspec")
        return is_law, item.callspec.id.partition("-")[0] if is_law else ""

    items.sort(key=mixer)


TESTS = itertools.count(1)


def pytest_runtest_teardown():
    """Drop compiled programs now and then: each maps memory, and a process may have 65,530 maps."""
    if next(TESTS) % 150 == 0:
        jax.clear_caches()


def pytest_terminal_summary(terminalreporter):
    """Seconds per law and mixer."""
    seconds = collections.defaultdict(float)
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        path, _, test = report.nodeid.partition("::")
        if path.endswith("test_laws.py") and "[" in test and "mutants" not in test:
            law, _, point = test.partition("[")
            seconds[point.split("-")[0].rstrip("]"), law.removeprefix("test_")] += report.duration
    if seconds:
        terminalreporter.section("seconds per mixer and law")
    for (mixer, law), total in sorted(seconds.items()):
        terminalreporter.write_line(f"{total:8.1f}  {mixer:24} {law}")
