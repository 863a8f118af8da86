"""The way into the experts: tokens to their experts, through them, and back. Pure functions.

On one device it is `gather.py`. Under a mesh every device runs that or `exchange.py` inside `shard_map`.
"""

import functools
import itertools
from typing import Any

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from default_moe import sharding
from default_moe.config import MoEConfig
from default_moe.methods.decision import Samples
from default_moe.moe.default_vectors import DefaultVectors
from default_moe.moe.experts.backends import resolve_backend
from default_moe.moe.experts.exchange import exchanged_experts
from default_moe.moe.experts.gather import gathered_experts
from default_moe.moe.experts.layout import Axes, Routing
from default_moe.moe.experts.parallel import resolve_expert_parallel
from default_moe.moe.experts.swiglu import WEIGHT_AXES, ExpertParams

# shard_map checks which values vary over which mesh axes, where every operation says so. Pallas' kernels do not.
_KERNELS_SAY_WHERE_THEY_VARY = ("blocks", "ragged")

_WHOLE_WEIGHTS = "whole_expert_weights"


def sparse_experts(
    x_BLD: Array,
    routing: Routing,
    params: ExpertParams,
    defaults: DefaultVectors | None,
    config: MoEConfig,
    *,
    update: bool,
) -> tuple[Array, DefaultVectors | None]:
    """Compute the output of the sparse layer and the default vectors after this batch.

    Args:
      x_BLD: tokens in the compute dtype.
      routing: what the router decided.
      params: of all N experts.
      defaults: of all N experts; None where the method has none.
      config: of the layer.
      update: whether this batch counts towards the default vectors.

    Returns:
      float32 [B, L, D], and the default vectors.
    """
    axes = Axes(sharding.mesh_axes("batch"), sharding.mesh_axes("expert"))
    backend = resolve_backend(config.matmul, x_BLD.dtype, (x_BLD.shape[2], config.expert_dim))
    num_tokens = x_BLD.shape[0] * x_BLD.shape[1] // sharding.num_shards("batch")
    form = resolve_expert_parallel(config, num_tokens, x_BLD.shape[2])
    share = exchanged_experts if form == "exchange" else gathered_experts
    share = functools.partial(share, axes=axes, config=config, backend=backend, update=update)
    if not axes.tokens and not axes.experts:
        return share(x_BLD, routing, params, defaults)
    for what, size, axis in (
        ("sequences", x_BLD.shape[0], "batch"),
        ("experts", config.num_experts, "expert"),
        ("values of a token", x_BLD.shape[2], "embed"),
        ("hidden values of an expert", config.expert_dim, "mlp"),
    ):
        sharding.check_divisible(what, size, axis)
    tokens, experts = P(axes.tokens or None), P(axes.experts or None)
    of_samples: Any = (tokens, tokens, P())
    routing_specs: Any = (tokens, tokens, P(), tokens, Samples(*of_samples) if routing.samples else None)
    param_specs = jax.tree.unflatten(jax.tree.structure(params), itertools.starmap(sharding.weight_spec, WEIGHT_AXES))

    def with_whole_weights(x_BLD: Array, routing: Routing, params: ExpertParams, defaults: Any) -> tuple:
        whole = [sharding.whole_weight(w, *names) for w, names in zip(params, WEIGHT_AXES, strict=True)]
        params = ExpertParams(*checkpoint_name(whole, _WHOLE_WEIGHTS))
        return share(x_BLD, routing, params, defaults)

    # The backward pass gathers weights again: kept, those of all layers would lie on every device.
    policy = jax.checkpoint_policies.save_anything_except_these_names(_WHOLE_WEIGHTS)
    return jax.shard_map(
        jax.checkpoint(with_whole_weights, policy=policy, prevent_cse=False),
        in_specs=(tokens, Routing(*routing_specs), param_specs, experts),
        out_specs=(tokens, experts),
        check_vma=backend in _KERNELS_SAY_WHERE_THEY_VARY,
    )(x_BLD, routing, params, defaults)
