"""The command line: `python -m experiments list` and `python -m experiments NAME [options]`."""

import argparse
import ast
import dataclasses
import datetime
import difflib
import importlib.util
import shlex
import sys
import time
from pathlib import Path
from types import ModuleType

from experiments import EXPERIMENTS, ExperimentError

USAGE = """\
usage: python -m experiments list            the experiments and their presets
       python -m experiments NAME --help     the options of one
       python -m experiments NAME [--preset PRESET] [--folder FOLDER] [--fresh] [options]

A run that was interrupted goes on where it was when the same command is run again."""


@dataclasses.dataclass(frozen=True)
class Command[Config]:
    """What every experiment takes."""

    config: Config
    preset: str
    """Which preset gives the values of the options that are not given."""
    folder: Path
    """Where checkpoints, TensorBoard events, figures and result.json go."""
    fresh: bool = False
    """Delete the run that is in the folder first."""


def main(arguments: list[str]) -> int:
    """Run the command line and give its exit status: 0, 1 on failure, 2 on wrong usage, 130 when interrupted."""
    try:
        match arguments:
            case [] | ["-h" | "--help"]:
                print(USAGE)
            case ["list", *_]:
                print("\n".join(map(_describe, EXPERIMENTS)))
            case [name, *options] if name in EXPERIMENTS:
                _run(name, options)
            case [name, *_]:
                close = difflib.get_close_matches(name, ["list", *EXPERIMENTS])
                hint = f"did you mean {' or '.join(close)}?" if close else "`python -m experiments list` shows all"
                print(f"error: there is no experiment {name!r}; {hint}", file=sys.stderr)
                return 2
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to resume", file=sys.stderr)
        return 130
    except ExperimentError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or 'input or output'}: {error.strerror}" if error.strerror else str(error)
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed: pip install 'seqzoo[experiments]'"
    print(f"error: {message}", file=sys.stderr)
    return 1


def _describe(name: str) -> str:
    """Name, first line of the docstring and presets, read from the source: importing it would import JAX."""
    tree = ast.parse(Path(importlib.util.find_spec(f"experiments.{name}").origin).read_text())
    assignment = next(node for node in tree.body if ast.unparse(node).startswith("PRESETS"))
    presets = ", ".join(key.value for key in assignment.value.keys)
    return f"{name:24}{ast.get_docstring(tree).splitlines()[0]} Presets: {presets}."


def _run(name: str, options: list[str]) -> None:
    module = importlib.import_module(f"experiments.{name}")
    from experiments.results import environment, write_json
    from experiments.run_folder import claim

    command = _parse(name, module, options)
    try:
        getattr(module, "check", lambda config: None)(command.config)  # before a folder is claimed for what cannot run
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    config, path = dataclasses.asdict(command.config), command.folder / "result.json"
    with claim(command.folder, {"experiment": name, **config}, fresh=command.fresh) as started:
        begun = time.perf_counter()
        metrics = module.run(command.config, command.folder)
        result = {
            "experiment": name,
            "command": shlex.join(["python", "-m", "experiments", name, *options]),
            "config": config,
            "seeds": config.get("seeds"),
            "started": started,
            "finished": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "seconds_of_last_process": time.perf_counter() - begun,  # of a resumed run, the piece that ended it
            **environment(),
            "metrics": metrics,
        }
        write_json(path, result)
    print(f"result: {path}")


def _parse(name: str, module: ModuleType, options: list[str]) -> Command:
    import tyro

    program, presets = f"python -m experiments {name}", module.PRESETS
    first = argparse.ArgumentParser(program, add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=presets, default=next(iter(presets)))
    preset = first.parse_known_args(options)[0].preset
    return tyro.cli(
        Command[module.Config],
        args=options,
        prog=program,
        description=f"{module.__doc__.strip()}\n\nPresets: {', '.join(presets)}.",
        default=Command(presets[preset], preset, Path("runs", name, preset)),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
