"""Models of sequence mixing in Flax NNX, used as plain pytrees: one file per paper, shared blocks once."""

from pallas_kernels import __version__
from zoo.create import configure, create_model, list_mixers, list_models, mixer_config
from zoo.decision_transformer import DecisionModel, DecisionState
from zoo.generate import generate
from zoo.layers import Block, MixerConfig, Stack, StackConfig, StackState
from zoo.models import Classifier, Forecaster, LanguageModel, PooledState
from zoo.point_process import PointProcess, Prediction, expected_gap, log_density
from zoo.sharding import shardings
from zoo.states import grow_state, init_state, state_bytes
from zoo.token_mixers.aaren import Aaren, AarenConfig
from zoo.token_mixers.transformer import SelfAttention, SelfAttentionConfig

__all__ = [
    "Aaren",
    "AarenConfig",
    "Block",
    "Classifier",
    "DecisionModel",
    "DecisionState",
    "Forecaster",
    "LanguageModel",
    "MixerConfig",
    "PointProcess",
    "PooledState",
    "Prediction",
    "SelfAttention",
    "SelfAttentionConfig",
    "Stack",
    "StackConfig",
    "StackState",
    "__version__",
    "configure",
    "create_model",
    "expected_gap",
    "generate",
    "grow_state",
    "init_state",
    "list_mixers",
    "list_models",
    "log_density",
    "mixer_config",
    "shardings",
    "state_bytes",
]
