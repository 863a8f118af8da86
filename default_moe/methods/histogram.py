"""Quantiles of a whole batch, from counts that add up over devices and microbatches.

A quantile of parts is not the mean of their quantiles; a histogram of the whole is the sum of theirs. The bins are even
in asinh(value / 1e-4): about 2 % wide far from 0, where they end at 4, and 2e-6 wide near it, since scores of many
experts are small.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from default_moe import sharding

NUM_BINS = 1024
_SMALL, _LARGEST = 1e-4, 4.0


def histogram(values_BLN: Array, mask_BL: Array | None) -> Array:
    """Count the values of each expert over the tokens that count: int32 [N, NUM_BINS], of the global batch.

    values_BLN: float32. What lies beyond the bins counts in the first or the last.
    """
    num_experts = values_BLN.shape[-1]
    counts_BL = jnp.ones(values_BLN.shape[:2], bool) if mask_BL is None else mask_BL != 0
    token_axes = sharding.mesh_axes("batch")

    def local(values_BLN: Array, counts_BL: Array) -> Array:
        place_BLN = (jnp.arcsinh(values_BLN / _SMALL) / jnp.arcsinh(_LARGEST / _SMALL) + 1) / 2
        bin_BLN = jnp.clip((place_BLN * NUM_BINS).astype(jnp.int32), 0, NUM_BINS - 1)
        flat_BLN = bin_BLN + NUM_BINS * jnp.arange(num_experts)
        flat_BLN = jnp.where(counts_BL[..., None], flat_BLN, num_experts * NUM_BINS)  # beyond the end: dropped
        counts = jnp.zeros(num_experts * NUM_BINS, jnp.int32).at[flat_BLN].add(1, mode="drop")
        return jax.lax.psum(counts, token_axes) if token_axes else counts

    if token_axes:
        tokens = P(token_axes)
        local = jax.shard_map(local, in_specs=(tokens, tokens), out_specs=P())
    return local(jax.lax.stop_gradient(values_BLN), counts_BL).reshape(num_experts, NUM_BINS)


def upper_quantile(counts: Array, share: float) -> Array:
    """Return the value that `share` of the values counted lie above: float32 [...], to the width of a bin.

    counts: int32 [..., NUM_BINS].  share: above 0, at most 1.
    Within a bin values are taken to be spread evenly. Without any values counted the result means nothing.
    """
    above = jnp.flip(jnp.cumsum(jnp.flip(counts, -1), -1), -1)  # values in a bin or above it
    wanted = share * above[..., :1].astype(jnp.float32)
    # The highest bin from which on up there are as many as are wanted.
    index = jnp.maximum((above >= wanted).sum(axis=-1, keepdims=True) - 1, 0)
    here, up_to = (jnp.take_along_axis(a, index, -1) for a in (counts, above))
    part = (up_to - wanted) / jnp.maximum(here, 1)  # of the bin that lies below the quantile
    place = (index + jnp.clip(part, 0, 1)) / NUM_BINS
    return (_SMALL * jnp.sinh((2 * place - 1) * jnp.arcsinh(_LARGEST / _SMALL)))[..., 0]
