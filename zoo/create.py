"""Models by name: ``<stack>_<head>``, and the stack alone as ``<stack>``."""

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from flax import nnx

from zoo.layers import MixerConfig, Stack, StackConfig, check_choice
from zoo.models import Classifier, Forecaster, LanguageModel
from zoo.token_mixers import aaren, transformer


class Entry(NamedTuple):
    """What `create_model` builds: ``build(config, rngs=..., **arguments)`` with one of the configurations."""

    build: type[nnx.Module]
    presets: Mapping[str, StackConfig]


MIXERS: dict[str, MixerConfig] = {  # for patterns
    "aaren": aaren.AarenConfig(),
    "attention": transformer.SelfAttentionConfig(),
}
STACKS: dict[str, Mapping[str, StackConfig]] = {
    "aaren": aaren.PRESETS,
    "transformer": transformer.PRESETS,
}
HEADS = {"": Stack, "_classifier": Classifier, "_forecaster": Forecaster, "_language_model": LanguageModel}
MODELS = {stack + head: Entry(build, STACKS[stack]) for stack in STACKS for head, build in HEADS.items()}


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return sorted(MODELS)


def list_mixers() -> list[str]:
    """The names that the patterns of `create_model` are made of."""
    return sorted(MIXERS)


def create_model(name: str, *, rngs: nnx.Rngs, preset: str = "tiny", **overrides: Any) -> nnx.Module:
    """Build a model: ``create_model("aaren_classifier", rngs=nnx.Rngs(0), channels=12, classes=9, width=64)``.

    Args:
        name: One of `list_models`.
        rngs: For the initial parameters.
        preset: Configuration to start from, one of the `PRESETS` of the paper's file.
        **overrides: Arguments of the model around the stack; fields of the configuration, where `pattern` and `first`
            may name mixers (``pattern=["taylor", "window", "conv"]``, see `list_mixers`); options of mixers, for all
            mixers in the stack that have them.

    Raises:
        ValueError: An unknown name, preset or override, with the nearest known ones; a value that does not fit.
        TypeError: An argument of the model that has no default is missing.
    """
    check_choice("name", name, MODELS)
    build = MODELS[name].build
    arguments = set(inspect.signature(build.__init__).parameters) - {"self", "config", "rngs"}
    config = configure(name, preset, {k: v for k, v in overrides.items() if k not in arguments}, arguments)
    return build(config, rngs=rngs, **{k: v for k, v in overrides.items() if k in arguments})


def configure(
    name: str, preset: str = "tiny", overrides: Mapping[str, Any] | None = None, arguments: Iterable[str] = ()
) -> StackConfig:
    """The configuration of a model with overrides, see `create_model`; `arguments` are further names in messages."""
    presets, overrides = MODELS[name].presets, dict(overrides or {})
    check_choice("preset", preset, presets)
    config = presets[preset]
    if "pattern" in overrides and "first" not in overrides:
        overrides["first"] = ()
    for field in {"pattern", "first"} & overrides.keys():
        overrides[field] = tuple(_mixer(field, mixer) for mixer in overrides[field])
    mixers = {field: overrides.pop(field, getattr(config, field)) for field in ("pattern", "first")}
    fields = {field.name for field in dataclasses.fields(config)}
    options = {field for group in mixers.values() for mixer in group for field in _fields(mixer)}
    for override in overrides:
        check_choice(f"{name}: override", override, {*fields, *options, *arguments})
    for field, group in mixers.items():
        mixers[field] = tuple(_replace(mixer, overrides) for mixer in group)
    return dataclasses.replace(config, **mixers, **{k: v for k, v in overrides.items() if k in fields})


def _mixer(field, mixer):
    """A mixer, also by its name."""
    if isinstance(mixer, str):
        check_choice(field, mixer, MIXERS)
        return MIXERS[mixer]
    return mixer


def _fields(mixer):
    return {field.name for field in dataclasses.fields(mixer)}


def _replace(mixer, overrides):
    return dataclasses.replace(mixer, **{k: v for k, v in overrides.items() if k in _fields(mixer)})
