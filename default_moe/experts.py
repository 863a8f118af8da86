"""The sparse feed-forward computation: tokens to their experts, through them, and back. Pure functions.

On one device it is dispatch, three grouped matrix products, and `combine`. Under a mesh every device runs one of the
forms of `device_experts.py` inside `shard_map`.
"""

import functools

import jax
from jax import Array
from jax.sharding import PartitionSpec as P

from default_moe import sharding
from default_moe.config import ConfigError, MoEConfig
from default_moe.device_experts import Axes, DefaultVectors, Routing, exchanged_experts, gathered_experts
from default_moe.expert_parallel import resolve_expert_parallel
from default_moe.grouped_matmul import resolve_backend
from default_moe.swiglu import ExpertWeights

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
    axes = Axes(sharding.mesh_axes("batch"), sharding.mesh_axes("expert"))
    backend = resolve_backend(config.matmul)
    num_tokens = x_BLD.shape[0] * x_BLD.shape[1] // sharding.num_shards("batch")
    form = resolve_expert_parallel(config, num_tokens, x_BLD.shape[2])
    share = exchanged_experts if form == "exchange" else gathered_experts
    share = functools.partial(share, axes=axes, config=config, backend=backend, update=update)
    if not axes.tokens and not axes.experts:
        return share(x_BLD, routing, weights, defaults)
    _check_divisible("experts", config.num_experts, "expert")
    tokens, experts = P(axes.tokens or None), P(axes.experts or None)
    return jax.shard_map(
        share,
        in_specs=(tokens, tokens, experts, experts),
        out_specs=(tokens, experts),
        check_vma=backend in _KERNELS_SAY_WHERE_THEY_VARY,
    )(x_BLD, routing, weights, defaults)


def _check_divisible(what: str, size: int, logical_axis: str) -> None:
    shards = sharding.num_shards(logical_axis)
    if size % shards:
        raise ConfigError(f"{size} {what} cannot be split over {shards} devices: make the number a multiple of that")
