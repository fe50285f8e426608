"""Models by name: ``<stack>_<head>``, and the stack alone as ``<stack>``."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import nnx

from zoo.layers import Stack, StackConfig, check_choice
from zoo.models import Classifier, Forecaster, LanguageModel
from zoo.token_mixers import aaren, transformer


class Entry(NamedTuple):
    """What `create_model` builds: ``build(config, rngs=..., **arguments)`` with one of the configurations."""

    build: type[nnx.Module]
    presets: Mapping[str, StackConfig]


STACKS = {"aaren": aaren.PRESETS, "transformer": transformer.PRESETS}
HEADS = {"": Stack, "_classifier": Classifier, "_forecaster": Forecaster, "_language_model": LanguageModel}
MODELS = {stack + head: Entry(build, STACKS[stack]) for stack in STACKS for head, build in HEADS.items()}


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return sorted(MODELS)


def create_model(name: str, *, rngs: nnx.Rngs, preset: str = "tiny", **overrides: Any) -> nnx.Module:
    """Build a model: ``create_model("aaren_classifier", rngs=nnx.Rngs(0), channels=12, classes=9, width=64)``.

    Args:
        name: One of `list_models`.
        rngs: For the initial parameters.
        preset: Configuration to start from, one of the `PRESETS` of the paper's file.
        **overrides: Fields of the configuration, and arguments of the model around the stack.

    Raises:
        ValueError: An unknown name, preset or override, with the nearest known ones; a value that does not fit.
        TypeError: An argument of the model that has no default is missing.
    """
    check_choice("name", name, MODELS)
    build, presets = MODELS[name]
    check_choice("preset", preset, presets)
    config = presets[preset]
    fields = {field.name for field in dataclasses.fields(config)}
    arguments = set(inspect.signature(build.__init__).parameters) - {"self", "config", "rngs"}
    for override in overrides:
        check_choice(f"{name}: override", override, fields | arguments)
    config = dataclasses.replace(config, **{k: v for k, v in overrides.items() if k in fields})
    return build(config, rngs=rngs, **{k: v for k, v in overrides.items() if k in arguments})
