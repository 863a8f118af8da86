"""The norms of the model: in float32, their results in the compute dtype."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from default_moe.config import ModelConfig
from default_moe.sharding import with_axes


def make_norm(config: ModelConfig, name: str) -> nn.Module:
    """The norm of the residual stream that `model.norm` names, over the last axis."""
    if config.norm == "rms":
        return make_rms_norm(config, name)
    return _norm(nn.LayerNorm, config, name, bias_init=with_axes(nn.initializers.zeros, None))


def make_rms_norm(config: ModelConfig, name: str) -> nn.Module:
    """RMSNorm over the last axis, with a scale and no bias."""
    return _norm(nn.RMSNorm, config, name)


def _norm(kind: type[nn.Module], config: ModelConfig, name: str, **options: Any) -> nn.Module:
    """In a loop over layers the backward pass keeps only the input."""
    dtype = jnp.dtype(config.dtype)
    norm: Any = kind if dtype == jnp.float32 else nn.remat(kind, prevent_cse=False)
    return norm(
        epsilon=config.norm_epsilon,
        use_fast_variance=False,  # E[x^2] - E[x]^2 is rounding alone where the mean is large
        dtype=dtype,
        scale_init=with_axes(nn.initializers.ones, None),
        name=name,
        **options,
    )
