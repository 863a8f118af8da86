"""The sparse feed-forward computation: tokens to their experts, through them, and back. Pure functions.

On one device it is dispatch, three grouped matrix products, and `combine`. Under a mesh with an expert axis every
device gathers the tokens of its expert group, computes what its own experts contribute, and the contributions are
summed and scattered back, all inside `shard_map`: sorting and gathering never leave the device. The default vectors
stay with their experts; across the other axes only their [M, D] sums and [M] weights are added up.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from default_moe import sharding
from default_moe.block_experts import block_experts, block_rows
from default_moe.config import ConfigError, MoEConfig
from default_moe.default_vectors import combine, update_ema
from default_moe.grouped_matmul import group_alignment, largest_block, resolve_backend, slots_multiple
from default_moe.routing import Layout, active_experts, choice_weights, group_by_expert
from default_moe.sorted_experts import sorted_experts
from default_moe.swiglu import EXPERT_PRODUCT, ExpertWeights


class DefaultVectors(NamedTuple):
    """Default vectors, and the sums since they were last updated, all float32.

    ema: [M, D].  sum: [M, D], weighted expert outputs of the global batch.  weight: [M], the sum of those weights.
    Sums are not empty at the start only when a batch is processed in several microbatches.
    """

    ema: Array
    sum: Array
    weight: Array


class Routing(NamedTuple):
    """probs: float32 [B, L, N].  expert_index: int32 [B, L, K].  mask: [B, L] or None, 0 where a token is no sample."""

    probs: Array
    expert_index: Array
    mask: Array | None


# shard_map checks which values vary over which mesh axes, where every operation says so. tokamax's kernels do not.
_KERNELS_SAY_WHERE_THEY_VARY = ("blocks", "ragged")


def choose_experts(probs_BLN: Array, top_k: int) -> Array:
    """int32 [B, L, K], the experts of the K largest probabilities of each token, likeliest first, ties to the lower.

    Under a mesh each device chooses for its own tokens: left to itself, XLA gathers all tokens for a top-k.
    """
    _check_divisible("sequences", probs_BLN.shape[0], "batch")
    probs_BLN = jax.lax.stop_gradient(probs_BLN)

    def choose(probs: Array) -> Array:
        return jax.lax.top_k(probs, top_k)[1]

    token_axes = sharding.mesh_axes("batch")
    if not token_axes:
        return choose(probs_BLN)
    tokens = P(token_axes)
    return jax.shard_map(choose, in_specs=tokens, out_specs=tokens)(probs_BLN)


def sparse_experts(
    x_BLD: Array,
    routing: Routing,
    weights: ExpertWeights,
    defaults: DefaultVectors | None,
    config: MoEConfig,
    *,
    update: bool,
) -> tuple[Array, DefaultVectors | None]:
    """Output of the sparse layer and the default vectors after this batch.

    Args:
      x_BLD: tokens in the compute dtype.
      routing: what the router decided.
      weights: of all N experts.
      defaults: of all N experts; None for a plain top-k layer.
      config: of the layer.
      update: whether this batch counts towards the default vectors. If so they are updated before they are used.

    Returns:
      float32 [B, L, D], and the default vectors.
    """
    token_axes = sharding.mesh_axes("batch")
    expert_axes = sharding.mesh_axes("expert")
    backend = resolve_backend(config.matmul)
    share = functools.partial(_device_share, config=config, backend=backend, update=update)
    if not token_axes and not expert_axes:
        return share(x_BLD, routing, weights, defaults, token_axes=(), expert_axes=())
    _check_divisible("experts", config.num_experts, "expert")
    tokens, experts = P(token_axes or None), P(expert_axes or None)
    return jax.shard_map(
        functools.partial(share, token_axes=token_axes, expert_axes=expert_axes),
        in_specs=(tokens, tokens, experts, experts),
        out_specs=(tokens, experts),
        check_vma=backend in _KERNELS_SAY_WHERE_THEY_VARY,
    )(x_BLD, routing, weights, defaults)


def _check_divisible(what: str, size: int, logical_axis: str) -> None:
    shards = sharding.num_shards(logical_axis)
    if size % shards:
        raise ConfigError(f"{size} {what} cannot be split over {shards} devices: make the number a multiple of that")


def _device_share(
    x_BLD: Array,
    routing: Routing,
    weights: ExpertWeights,
    defaults: DefaultVectors | None,
    *,
    token_axes: tuple[str, ...],
    expert_axes: tuple[str, ...],
    config: MoEConfig,
    backend: str,
    update: bool,
) -> tuple[Array, DefaultVectors | None]:
    """`sparse_experts` on one device: its tokens, its M experts, and the collectives that connect them to others.

    If tokens are split over the expert axes too, they are gathered over them first and their outputs scattered after.
    """
    shape_BLD = x_BLD.shape
    num_experts = weights.gate.shape[0]
    gathered = bool(expert_axes) and set(expert_axes) <= set(token_axes)

    def tokens(a: Array) -> Array:
        a = a.reshape((-1, *a.shape[2:]))
        return jax.lax.all_gather(a, expert_axes, tiled=True) if gathered else a

    x_TD, probs_TN, index_TK = (tokens(a) for a in (x_BLD, routing.probs, routing.expert_index))
    mask_T = None if routing.mask is None else tokens(routing.mask)
    other_axes = tuple(axis for axis in token_axes if axis not in expert_axes)
    if other_axes:  # said here, so that the weights' gradients are added up over these axes
        weights = jax.tree.map(lambda w: jax.lax.pcast(w, other_axes, to="varying"), weights)
    if expert_axes and not gathered:
        x_TD = jax.lax.pcast(x_TD, expert_axes, to="varying")
    first = jax.lax.axis_index(expert_axes) * num_experts if expert_axes else 0
    probs_TM = jax.lax.dynamic_slice_in_dim(probs_TN, first, num_experts, axis=1) if expert_axes else probs_TN

    layout = group_by_expert(index_TK - first, num_experts, group_alignment(backend), slots_multiple(backend))
    weight_TK = choice_weights(probs_TM, layout.expert_TK)
    active_TM = active_experts(layout.expert_TK, num_experts)
    counted_TM = counted_TK = None
    if defaults is not None and update:
        counted_TM = _counted_weights(probs_TM, active_TM, mask_T, config.ema_weighted, x_TD.dtype)
        counted_TK = choice_weights(counted_TM, layout.expert_TK)
    y_TD, sum_MD = run_experts(x_TD, weight_TK, counted_TK, weights, layout, config.num_experts, backend)
    if defaults is not None and sum_MD is not None and counted_TM is not None:
        sums = (sum_MD, counted_TM.sum(axis=0))
        sum_MD, weight_M = (jax.lax.psum(s, other_axes) if other_axes else s for s in sums)
        sum_MD, weight_M = defaults.sum + sum_MD, defaults.weight + weight_M
        # Named: recomputing it would take the products over again.
        ema_MD = checkpoint_name(update_ema(defaults.ema, sum_MD, weight_M, config.ema_decay), EXPERT_PRODUCT)
        defaults = DefaultVectors(ema_MD, sum_MD, weight_M)
    if defaults is not None:
        y_TD = combine(y_TD, probs_TM, jax.lax.stop_gradient(defaults.ema), active_TM, config.substitute)
    if gathered:
        y_TD = jax.lax.psum_scatter(y_TD, expert_axes, tiled=True)
    elif expert_axes:
        y_TD = jax.lax.psum(y_TD, expert_axes)
    return y_TD.reshape(shape_BLD), defaults


def run_experts(
    x_TD: Array,
    weight_TK: Array,
    counted_TK: Array | None,
    weights: ExpertWeights,
    layout: Layout,
    num_experts: int,
    backend: str,
) -> tuple[Array, Array | None]:
    """What `block_experts` gives, which says what arguments and results are, by any backend.

    The layout has the backend's `group_alignment` and `slots_multiple`. num_experts: N, over which assignments spread.
    """
    if backend == "blocks":
        rows = block_rows(layout.slot_TK.size, num_experts, largest_block())
        return block_experts(x_TD, weight_TK, counted_TK, weights, layout, rows)
    return sorted_experts(x_TD, weight_TK, counted_TK, weights, layout, group_alignment(backend), backend)


def _counted_weights(
    probs_TM: Array, active_TM: Array, mask_T: Array | None, weighted: bool, dtype: jnp.dtype
) -> Array:
    """float32 [T, M], how much each token's output of each expert counts in the moving average: 0 where inactive."""
    counted_TM = active_TM if mask_T is None else active_TM & (mask_T != 0)[:, None]
    weight_TM = jax.lax.stop_gradient(probs_TM) if weighted else jnp.ones_like(probs_TM)
    # Rounded as in the sum of outputs: else the sum of the weights would not match the weighted sum.
    return jnp.where(counted_TM, weight_TM.astype(dtype).astype(jnp.float32), 0)
