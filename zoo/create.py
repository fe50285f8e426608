"""Models by name: ``<stack>_<head>``, and the stack alone as ``<stack>``."""

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from flax import nnx

from zoo.decision_transformer import DecisionModel
from zoo.layers import MixerConfig, Stack, StackConfig, check_choice
from zoo.models import Classifier, Forecaster, LanguageModel
from zoo.point_process import PointProcess
from zoo.token_mixers import (
    aaren,
    base_convolution,
    based,
    deltanet,
    flowformer,
    gated_associative_memory,
    gated_deltanet,
    gated_linear_attention,
    hgrn,
    kimi_delta_attention,
    lightnet,
    lightning_attention,
    lru,
    mamba,
    mamba2,
    minimal_rnns,
    miras,
    mixture_of_head_attention,
    rat,
    recurrent_networks,
    retnet,
    s4d,
    s5,
    sigma,
    sigmoid_attention,
    titans,
    transformer,
    transnormer_llm,
    ttt,
)


class Entry(NamedTuple):
    """What `create_model` builds: ``build(config, rngs=..., **arguments)`` with one of the configurations."""

    build: type[nnx.Module]
    presets: Mapping[str, StackConfig]


MIXERS: dict[str, MixerConfig] = {  # for patterns
    "aaren": aaren.AarenConfig(),
    "attention": transformer.SelfAttentionConfig(),
    "base_convolution": base_convolution.BaseConvolutionConfig(),
    "conv": based.GatedConvolutionConfig(),
    "delta": deltanet.DeltaNetConfig(),
    "diff_qkv": sigma.DiffQKVAttentionConfig(),
    "elman": recurrent_networks.ElmanConfig(),
    "flow": flowformer.CausalFlowAttentionConfig(),
    "gated_associative_memory": gated_associative_memory.GatedAssociativeMemoryConfig(),
    "gated_delta": gated_deltanet.GatedDeltaNetConfig(),
    "gated_linear_attention": gated_linear_attention.GatedLinearAttentionConfig(),
    "gru": recurrent_networks.GRUConfig(),
    "hgrn": hgrn.HGRNConfig(),
    "jordan": recurrent_networks.JordanConfig(),
    "kimi_delta": kimi_delta_attention.KimiDeltaAttentionConfig(),
    "lightnet": lightnet.LightNetConfig(),
    "lru": lru.LRUConfig(),
    "lstm": recurrent_networks.LSTMConfig(),
    "mamba": mamba.MambaConfig(),
    "mamba2": mamba2.Mamba2Config(),
    "memora": miras.MEMORA,
    "memory": titans.MemoryConfig(),
    "memory_as_context": titans.MemoryAsContextConfig(),
    "memory_as_gate": titans.MemoryAsGateConfig(),
    "memory_as_layer": titans.MemoryAsLayerConfig(),
    "min_gru": minimal_rnns.MinGRUConfig(),
    "min_lstm": minimal_rnns.MinLSTMConfig(),
    "moh": mixture_of_head_attention.MixtureOfHeadAttentionConfig(),
    "moneta": miras.MONETA,
    "rat": rat.RATConfig(),
    "retention": retnet.RetentionConfig(),
    "s4d": s4d.S4DConfig(),
    "s5": s5.S5Config(),
    "sigmoid": sigmoid_attention.SigmoidAttentionConfig(),
    "taylor": based.TaylorAttentionConfig(),
    "transnormer": transnormer_llm.TransNormerConfig(),
    "transnormer_lrpe": transnormer_llm.TransNormerConfig(lrpe=True),
    "ttt_linear": ttt.TTT_LINEAR,
    "ttt_mlp": ttt.TTT_MLP,
    "window": based.WindowAttentionConfig(),
    "yaad": miras.YAAD,
}
STACKS: dict[str, Mapping[str, StackConfig]] = {
    "aaren": aaren.PRESETS,
    "base_convolution": base_convolution.PRESETS,
    "based": based.PRESETS,
    "deltanet": deltanet.PRESETS,
    "flowformer": flowformer.PRESETS,
    "gated_associative_memory": gated_associative_memory.PRESETS,
    "gated_deltanet": gated_deltanet.PRESETS,
    "gated_linear_attention": gated_linear_attention.PRESETS,
    "hgrn": hgrn.PRESETS,
    "kimi_linear": kimi_delta_attention.PRESETS,
    "lightnet": lightnet.PRESETS,
    "lru": lru.PRESETS,
    "mamba": mamba.PRESETS,
    "mamba2": mamba2.PRESETS,
    "moh": mixture_of_head_attention.PRESETS,
    "rat": rat.PRESETS,
    "retnet": retnet.PRESETS,
    "s4d": s4d.PRESETS,
    "s5": s5.PRESETS,
    "sigma": sigma.PRESETS,
    "sigmoid_attention": sigmoid_attention.PRESETS,
    "tnl": lightning_attention.PRESETS,
    "transformer": transformer.PRESETS,
    "transnormer_llm": transnormer_llm.PRESETS,
    **minimal_rnns.PRESETS,
    **miras.PRESETS,
    **recurrent_networks.PRESETS,
    **titans.PRESETS,
    **ttt.PRESETS,
}
HEADS = {
    "": Stack,
    "_classifier": Classifier,
    "_forecaster": Forecaster,
    "_language_model": LanguageModel,
    "_point_process": PointProcess,
    "_policy": DecisionModel,
}
MODELS = {stack + head: Entry(build, STACKS[stack]) for stack in STACKS for head, build in HEADS.items()}


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return sorted(MODELS)


def list_mixers() -> list[str]:
    """The names that the patterns of `create_model` are made of."""
    return sorted(MIXERS)


def mixer_config(name: str, **options: Any) -> MixerConfig:
    """The configuration of a mixer by its name, with options; `ValueError` for unknown ones."""
    check_choice("mixer", name, MIXERS)
    for option in options:
        check_choice(f"{name}: option", option, _fields(MIXERS[name]))
    return dataclasses.replace(MIXERS[name], **options)


def create_model(name: str, *, rngs: nnx.Rngs, preset: str = "tiny", **overrides: Any) -> nnx.Module:
    """Build a model: ``create_model("aaren_classifier", rngs=nnx.Rngs(0), channels=12, classes=9, width=64)``.

    Args:
        name: One of `list_models`.
        rngs: For the initial parameters.
        preset: Configuration to start from, one of the `PRESETS` of the paper's file.
        **overrides: Arguments of the model around the stack; fields of the configuration, where `pattern` and `first`
            may name mixers (``pattern=["taylor", "window", "conv"]``, see `list_mixers`); options of mixers, for all
            mixers in the stack that have them. A `pattern` without `first` also drops the preset's `first`.

    Raises:
        ValueError: An unknown name, preset or override, with the nearest known ones; a value that does not fit.
        TypeError: An argument of the model that has no default is missing; a pattern that is no sequence of mixers.
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
    check_choice("name", name, MODELS)
    presets, overrides = MODELS[name].presets, dict(overrides or {})
    check_choice("preset", preset, presets)
    config = presets[preset]
    if "pattern" in overrides and "first" not in overrides:
        overrides["first"] = ()
    for field in {"pattern", "first"} & overrides.keys():
        overrides[field] = _mixers(field, overrides[field])
    mixers = {field: overrides.pop(field, getattr(config, field)) for field in ("pattern", "first")}
    fields = {field.name for field in dataclasses.fields(config)}
    options = {field for group in mixers.values() for mixer in group for field in _fields(mixer)}
    for override in overrides:
        check_choice(f"{name}: override", override, {*fields, *options, *arguments})
    for field, group in mixers.items():
        mixers[field] = tuple(_replace(mixer, overrides) for mixer in group)
    return dataclasses.replace(config, **mixers, **{k: v for k, v in overrides.items() if k in fields})


def _mixers(field, mixers):
    """Mixers, also by their names."""
    if isinstance(mixers, str) or not isinstance(mixers, Iterable):
        raise TypeError(f"{field}: expected a sequence of names or configurations of mixers, got {mixers!r}")
    return tuple(_mixer(field, mixer) for mixer in mixers)


def _mixer(field, mixer):
    if isinstance(mixer, MixerConfig):
        return mixer
    if not isinstance(mixer, str):
        raise TypeError(f"{field}: expected names or configurations of mixers, got {mixer!r}")
    check_choice(field, mixer, MIXERS)
    return MIXERS[mixer]


def _fields(mixer):
    return {field.name for field in dataclasses.fields(mixer)}


def _replace(mixer, overrides):
    return dataclasses.replace(mixer, **{k: v for k, v in overrides.items() if k in _fields(mixer)})
