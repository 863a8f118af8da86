"""Causal attention with rotary positions, and what it knows of its tokens."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from default_moe.config import ModelConfig
from default_moe.errors import choose
from default_moe.hardware import is_nvidia, platform
from default_moe.model.norms import make_rms_norm
from default_moe.model.splash_attention import LENGTH_MULTIPLE, splash_attention
from default_moe.moe.feed_forward import small_init_std
from default_moe.sharding import with_axes

CACHE = "cache"


@flax.struct.dataclass
class Tokens:
    """What a block knows of its tokens beside their vectors. All [B, L]; None: absent.

    positions: int32, for the rotary embedding.  segment_ids: int32, attention stays within a segment.
    mask: 0 where a token counts in no routing statistic (padding).  ids: int32, the tokens themselves.
    """

    positions: Array
    segment_ids: Array | None = None
    mask: Array | None = None
    ids: Array | None = None


def residual_init_std(config: ModelConfig) -> float:
    """2 / (L sqrt(D)) for projections that merge into the residual stream (Wang et al.)."""
    return 2 / (config.num_layers * config.d_model**0.5)


def resolve_attention(config: ModelConfig, length: int, masked: bool) -> str:
    """Return how attention over whole sequences is computed here: "cudnn", "splash" or "xla".

    Kernels never hold the [H, L, L] scores. "auto" takes cuDNN's on an NVIDIA GPU and JAX's splash attention on a TPU
    where they run, else XLA.
    length: of the sequences.  masked: whether there are documents to keep apart.
    Raises ConfigError if a kernel is asked for where it cannot run.
    """
    kernels = [("cudnn", _why_no_cudnn(config, length, masked)), ("splash", _why_no_splash(length))]
    return choose("model.attention", config.attention, [*kernels, ("xla", None)])


def _why_no_cudnn(config: ModelConfig, length: int, masked: bool) -> str | None:
    size = config.head_size
    if not is_nvidia():
        return f"it runs on NVIDIA GPUs, but this is {platform()!r}"
    if config.dtype != "bfloat16":
        return f"it takes bfloat16, but model.dtype is {config.dtype!r}"
    if size % 8 or size > 128:
        return f"it takes heads of 8, 16, ... 128, but these are of {size}"
    if masked and config.attention_window:
        return "with model.attention_window it keeps no documents apart, as data.mask_documents asks"
    if masked and length % 2:
        return f"with data.mask_documents it takes sequences of even length, but this is {length}"
    if float(getattr(jax.devices()[0], "compute_capability", 8)) < 8:
        return f"it runs on GPUs of compute capability 8.0 and above, but a {jax.devices()[0].device_kind} is older"
    return None


def _why_no_splash(length: int) -> str | None:
    if platform() != "tpu":
        return f"it runs on TPUs, but this is {platform()!r}"
    if length % LENGTH_MULTIPLE:
        return f"it takes sequences of a multiple of {LENGTH_MULTIPLE} tokens, but train.sequence_length is {length}"
    return None


def rotary_embedding(x_BLHE: Array, positions_BL: Array, theta: float) -> Array:
    """Rotate pairs (e, e + E/2) of each head by position * theta**(-2e/E) (Su et al. 2021)."""
    half = x_BLHE.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions_BL[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x_BLHE.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLHE.dtype)


class Attention(nn.Module):
    """Causal attention with rotary positions, without biases. Groups of heads may share their keys and values.

    With `cache_length` set it decodes: keys and values are kept in the collection "cache", and each call continues
    where the last one ended, up to that many tokens in all.
    """

    config: ModelConfig
    cache_length: int | None

    @nn.compact
    def __call__(self, x_BLD: Array, tokens: Tokens) -> Array:
        config = self.config
        heads, kv_heads, size = config.num_heads, config.kv_heads, config.head_size
        init = nn.initializers.normal(small_init_std(config.d_model))
        dtype = jnp.dtype(config.dtype)
        q, k, v = (
            nn.DenseGeneral(
                (num, size),
                use_bias=False,
                dtype=dtype,
                kernel_init=with_axes(init, "embed", "heads" if num == heads else "kv_heads", None),
                name=name,
            )(x_BLD)
            for name, num in (("query", heads), ("key", kv_heads), ("value", kv_heads))
        )
        q = rotary_embedding(self._normed(q, "query_norm"), tokens.positions, config.rope_theta)
        k = rotary_embedding(self._normed(k, "key_norm"), tokens.positions, config.rope_theta)
        if self.cache_length is None:
            out = self._attend(q, k, v, tokens.segment_ids)
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

    def _normed(self, x_BLHE: Array, name: str) -> Array:
        """Queries or keys, normed as `model.qk_norm` says."""
        if self.config.qk_norm == "none":
            return x_BLHE
        norm: Any = make_rms_norm(self.config, name)
        if self.config.qk_norm == "head":
            return norm(x_BLHE)
        return norm(x_BLHE.reshape(*x_BLHE.shape[:2], -1)).reshape(x_BLHE.shape)

    def _attend(self, q: Array, k: Array, v: Array, segment_ids_BL: Array | None) -> Array:
        """Attend within whole sequences."""
        implementation: Any = "xla"
        window = self.config.attention_window
        if not self.is_initializing():  # then only shapes matter, of sequences that are too short for kernels
            implementation = resolve_attention(self.config, q.shape[1], segment_ids_BL is not None)
        if implementation == "splash":
            return splash_attention(q, k, v, segment_ids_BL, window)
        mask = None
        if segment_ids_BL is not None:
            mask = (segment_ids_BL[:, :, None] == segment_ids_BL[:, None, :])[:, None]
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            is_causal=True,
            local_window_size=window and (window - 1, 0),
            implementation=implementation,
        )

    def _extend_cache(self, k: Array, v: Array, cache_length: int) -> tuple[Array, Array, Array]:
        """Return all keys and values so far, [B, cache_length, kv heads, E], and the mask of what new tokens see."""
        shape = (k.shape[0], cache_length, *k.shape[2:])
        keys = self.variable(CACHE, "cached_key", jnp.zeros, shape, k.dtype)
        values = self.variable(CACHE, "cached_value", jnp.zeros, shape, v.dtype)
        filled = self.variable(CACHE, "filled", jnp.zeros, (), jnp.int32)
        start = filled.value
        if not self.is_initializing():
            keys.value = jax.lax.dynamic_update_slice_in_dim(keys.value, k, start, axis=1)
            values.value = jax.lax.dynamic_update_slice_in_dim(values.value, v, start, axis=1)
            filled.value = start + k.shape[1]
        behind = (start + jnp.arange(k.shape[1]))[:, None] - jnp.arange(cache_length)[None, :]
        visible = behind >= 0
        if self.config.attention_window:
            visible &= behind < self.config.attention_window
        return keys.value, values.value, visible[None, None]
