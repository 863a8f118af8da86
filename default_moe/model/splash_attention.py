"""Causal attention by JAX's Pallas kernel for TPUs, splash attention, which never holds the [H, L, L] scores."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P

from default_moe import sharding
from default_moe.hardware import platform

LENGTH_MULTIPLE = 128  # sequences that the kernel takes
_LARGEST_BLOCK = 512

# The checkpoint name of its outputs, so that rematerialisation can keep them.
ATTENTION_OUTPUT = "attention_output"


def splash_attention(
    q_BLHE: Array, k_BLHE: Array, v_BLHE: Array, segment_ids_BL: Array | None, window: int | None = None
) -> Array:
    """Compute `jax.nn.dot_product_attention` with is_causal=True, in the dtype of q: [B, L, H, E].

    Keys and values may have fewer heads, of which each counts for a group. L is a multiple of LENGTH_MULTIPLE.
    segment_ids_BL: int32, if given, tokens attend to those of equal ids.  window: tokens that a token sees.
    On other platforms than TPUs the kernel is interpreted, which is slow. Under a mesh each device takes its sequences,
    and its heads if these are split.
    """
    on_device = functools.partial(_on_device, window=window)
    axes = (sharding.mesh_axes("batch"), sharding.mesh_axes("heads"))
    if not any(axes):
        return on_device(q_BLHE, k_BLHE, v_BLHE, segment_ids_BL)
    sequences, heads = (axis or None for axis in axes)
    if k_BLHE.shape[2] % sharding.num_shards("heads"):  # a device's heads need keys and values of their own
        group = q_BLHE.shape[2] // k_BLHE.shape[2]
        k_BLHE, v_BLHE = (jnp.repeat(a, group, axis=2) for a in (k_BLHE, v_BLHE))
    spec = P(sequences, None, heads)
    # Kernels do not say over which axes their results vary.
    mapped = jax.shard_map(on_device, in_specs=(spec, spec, spec, P(sequences)), out_specs=spec, check_vma=False)
    return mapped(q_BLHE, k_BLHE, v_BLHE, segment_ids_BL)


def _on_device(q_BLHE: Array, k_BLHE: Array, v_BLHE: Array, segment_ids_BL: Array | None, window: int | None) -> Array:
    _, length, num_heads, size = q_BLHE.shape
    block = math.gcd(length, _LARGEST_BLOCK)
    shape = (length, length)
    mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
    kernel: Any = splash.make_splash_mha(
        mask=masks.MultiHeadMask([mask] * num_heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION_OUTPUT,
        interpret=platform() != "tpu",
    )
    q_BHLE, k_BHLE, v_BHLE = (jnp.swapaxes(a, 1, 2) for a in (q_BLHE * size**-0.5, k_BLHE, v_BLHE))
    segments = None if segment_ids_BL is None else splash.SegmentIds(segment_ids_BL, segment_ids_BL)
    out_BHLE = jax.vmap(kernel)(q_BHLE, k_BHLE, v_BHLE, segments)
    return jnp.swapaxes(out_BHLE, 1, 2)
