"""Causal attention with rotary positions, and what it knows of its tokens.

Dimension key: see `routing.py`; also H heads, C size of a head, and in decoding S slots of the cache.
"""

from typing import Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from default_moe.config import ModelConfig
from default_moe.errors import ConfigError
from default_moe.hardware import is_nvidia, platform
from default_moe.moe import small_init_std
from default_moe.sharding import with_axes

CACHE = "cache"


@flax.struct.dataclass
class Tokens:
    """What a block knows of its tokens beside their vectors. All [B, L]; None: absent.

    positions: int32, for the rotary embedding.  segment_ids: int32, attention stays within a segment.
    mask: 0 where a token counts in no routing statistic (padding).
    """

    positions: Array
    segment_ids: Array | None = None
    mask: Array | None = None


def residual_init_std(config: ModelConfig) -> float:
    """2 / (L sqrt(D)) for projections that merge into the residual stream (Wang et al.)."""
    return 2 / (config.num_layers * config.d_model**0.5)


def attention_implementation(config: ModelConfig, masked_length: int = 0) -> Literal["xla", "cudnn"]:
    """How `jax.nn.dot_product_attention` is to compute: cuDNN's kernel never holds the [H, L, L] scores.

    "auto" takes it for bfloat16 on an NVIDIA GPU with heads of a size it has kernels for. masked_length: of sequences
    with a mask, 0 without one. Raises ConfigError if it is asked for where it cannot run.
    """
    size = config.d_model // config.num_heads
    reason = None
    if not is_nvidia():
        reason = f"it runs on NVIDIA GPUs, but this is {platform()!r}"
    elif config.dtype != "bfloat16":
        reason = f"it takes bfloat16, but model.dtype is {config.dtype!r}"
    elif size % 8 or size > 128:
        reason = f"it takes heads of 8, 16, ... 128, but model.d_model / model.num_heads is {size}"
    elif masked_length % 2:
        reason = f"with data.mask_documents it takes sequences of even length, but this is {masked_length}"
    elif float(getattr(jax.devices()[0], "compute_capability", 8)) < 8:
        reason = f"it runs on GPUs of compute capability 8.0 and above, but a {jax.devices()[0].device_kind} is older"
    if config.attention == "cudnn" and reason:
        raise ConfigError(f"model.attention is 'cudnn', but {reason}: use 'auto' or 'xla'")
    return "xla" if reason or config.attention == "xla" else "cudnn"


def rotary_embedding(x_BLHC: Array, positions_BL: Array, theta: float) -> Array:
    """Rotate pairs (c, c + C/2) of each head by position * theta**(-2c/C) (Su et al. 2021)."""
    half = x_BLHC.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions_BL[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x_BLHC.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLHC.dtype)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions, without biases.

    With `cache_length` set it decodes: keys and values are kept in the collection "cache", and each call continues
    where the last one ended, up to that many tokens in all.
    """

    config: ModelConfig
    cache_length: int | None

    @nn.compact
    def __call__(self, x_BLD: Array, tokens: Tokens) -> Array:
        config = self.config
        heads, size = config.num_heads, config.d_model // config.num_heads
        init = nn.initializers.normal(small_init_std(config.d_model))
        dtype = jnp.dtype(config.dtype)
        q, k, v = (
            nn.DenseGeneral(
                (heads, size),
                use_bias=False,
                dtype=dtype,
                kernel_init=with_axes(init, "embed", "heads", None),
                name=name,
            )(x_BLD)
            for name in ("query", "key", "value")
        )
        q = rotary_embedding(q, tokens.positions, config.rope_theta)
        k = rotary_embedding(k, tokens.positions, config.rope_theta)
        if self.cache_length is None:
            mask = None
            if tokens.segment_ids is not None:
                mask = (tokens.segment_ids[:, :, None] == tokens.segment_ids[:, None, :])[:, None]
            implementation = attention_implementation(config, 0 if mask is None else x_BLD.shape[1])
            out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=implementation)
        else:
            k, v, mask = self._extend_cache(k, v, self.cache_length)
            out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")
        merge = nn.initializers.normal(residual_init_std(config))
        return nn.DenseGeneral(
            config.d_model,
            axis=(-2, -1),
            use_bias=False,
            dtype=dtype,
            kernel_init=with_axes(merge, "heads", None, "embed"),
            name="out",
        )(out)

    def _extend_cache(self, k: Array, v: Array, cache_length: int) -> tuple[Array, Array, Array]:
        """All keys and values so far [B, S, H, C], and the mask [1, 1, L, S] of those that each new token may see."""
        shape = (k.shape[0], cache_length, *k.shape[2:])
        keys = self.variable(CACHE, "cached_key", jnp.zeros, shape, k.dtype)
        values = self.variable(CACHE, "cached_value", jnp.zeros, shape, v.dtype)
        filled = self.variable(CACHE, "filled", jnp.zeros, (), jnp.int32)
        start = filled.value
        if not self.is_initializing():
            keys.value = jax.lax.dynamic_update_slice_in_dim(keys.value, k, start, axis=1)
            values.value = jax.lax.dynamic_update_slice_in_dim(values.value, v, start, axis=1)
            filled.value = start + k.shape[1]
        visible = jnp.arange(cache_length)[None, :] <= (start + jnp.arange(k.shape[1]))[:, None]
        return keys.value, values.value, visible[None, None]
