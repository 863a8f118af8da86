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
from default_moe.config import ConfigError, MoEConfig
from default_moe.default_vectors import combine, update_ema
from default_moe.grouped_matmul import group_alignment, grouped_matmul, grouped_sum, resolve_backend
from default_moe.routing import Layout, dispatch, group_by_expert

EXPERT_PRODUCT = "expert_product"


class ExpertWeights(NamedTuple):
    """SwiGLU experts: gate and up [M, D, F], down [M, F, D], in the compute dtype."""

    gate: Array
    up: Array
    down: Array


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
    share = functools.partial(_device_share, config=config, update=update)
    if not token_axes and not expert_axes:
        return share(x_BLD, routing, weights, defaults, token_axes=(), expert_axes=())
    _check_divisible("experts", config.num_experts, "expert")
    tokens, experts = P(token_axes or None), P(expert_axes or None)
    return jax.shard_map(
        functools.partial(share, token_axes=token_axes, expert_axes=expert_axes),
        in_specs=(tokens, tokens, experts, experts),
        out_specs=(tokens, experts),
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

    backend = resolve_backend(config.matmul)
    align = group_alignment(backend, index_TK.size, config.num_experts)
    layout = group_by_expert(index_TK - first, num_experts, align)
    product = functools.partial(grouped_matmul, group_sizes_M=layout.group_sizes_M, backend=backend, align=align)
    x_SD = dispatch(x_TD, layout)
    # Named, so that rematerialisation can keep these products as it keeps any other.
    gate_SF = checkpoint_name(product(x_SD, weights.gate), EXPERT_PRODUCT)
    up_SF = checkpoint_name(product(x_SD, weights.up), EXPERT_PRODUCT)
    out_SD = checkpoint_name(product(jax.nn.silu(gate_SF) * up_SF, weights.down), EXPERT_PRODUCT)

    if defaults is not None and update:
        sums = _batch_sums(jax.lax.stop_gradient(out_SD), probs_TM, mask_T, layout, align, config.ema_weighted)
        sum_MD, weight_M = (jax.lax.psum(s, other_axes) if other_axes else s for s in sums)
        sum_MD, weight_M = defaults.sum + sum_MD, defaults.weight + weight_M
        ema_MD = update_ema(defaults.ema, sum_MD, weight_M, config.ema_decay)
        defaults = DefaultVectors(ema_MD, sum_MD, weight_M)
    held_MD = None if defaults is None else jax.lax.stop_gradient(defaults.ema)
    y_TD = combine(probs_TM, out_SD, held_MD, layout, config.substitute)
    if gathered:
        y_TD = jax.lax.psum_scatter(y_TD, expert_axes, tiled=True)
    elif expert_axes:
        y_TD = jax.lax.psum(y_TD, expert_axes)
    return y_TD.reshape(shape_BLD), defaults


def _batch_sums(
    out_SD: Array, probs_TM: Array, mask_T: Array | None, layout: Layout, align: int, weighted: bool
) -> tuple[Array, Array]:
    """Per expert, this device's sum of (weighted) outputs [M, D] and of the weights [M], both float32."""
    token_T1 = jnp.arange(probs_TM.shape[0])[:, None]
    probs_TK = probs_TM.at[token_T1, layout.expert_TK].get(mode="fill", fill_value=0)
    weight_TK = jax.lax.stop_gradient(probs_TK) if weighted else jnp.ones_like(probs_TK)
    if mask_T is not None:
        weight_TK = weight_TK * (mask_T != 0)[:, None]
    # Rounded as in the product below: else the sum of the weights would not match the weighted sum.
    weight_TK = weight_TK.astype(out_SD.dtype).astype(jnp.float32)
    weight_S = weight_TK.reshape(-1).at[layout.assignment_S].get(mode="fill", fill_value=0)
    weight_M = jax.ops.segment_sum(weight_TK.reshape(-1), layout.expert_TK.reshape(-1), probs_TM.shape[1])
    return grouped_sum(out_SD, weight_S, layout.group_sizes_M, align=align), weight_M
