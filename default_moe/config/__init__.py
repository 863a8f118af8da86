"""All settings of a run, and what each of them means and may be."""

from default_moe.config.config_dict import default_config, to_config_dict
from default_moe.config.describe import describe_settings
from default_moe.config.mappings import MAY_CHANGE, NO_EFFECT, TUNED, check_keys, flat_items
from default_moe.config.mesh import MeshConfig
from default_moe.config.model import REMATS, ModelConfig
from default_moe.config.moe import EXPERT_PARALLEL_FORMS, MATMUL_BACKENDS, MoEConfig
from default_moe.config.run import (
    OPTIMIZER_KINDS,
    OPTIMIZERS,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    OptimConfig,
    TrainConfig,
    marked,
)
from default_moe.errors import ConfigError

__all__ = [
    "EXPERT_PARALLEL_FORMS",
    "MATMUL_BACKENDS",
    "MAY_CHANGE",
    "NO_EFFECT",
    "OPTIMIZERS",
    "OPTIMIZER_KINDS",
    "REMATS",
    "TUNED",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainConfig",
    "check_keys",
    "default_config",
    "describe_settings",
    "flat_items",
    "marked",
    "to_config_dict",
]
