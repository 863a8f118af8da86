"""Experts of which each device computes its own for all tokens."""

import jax
from jax import Array

from default_moe.config import MoEConfig
from default_moe.methods.routing import active_experts, inactive_experts
from default_moe.moe.default_vectors import (
    DefaultVectors,
    combine,
    counted_weights,
    over_others,
    substitution_of,
    updated,
    used_vectors,
)
from default_moe.moe.experts.backends import group_alignment, largest_block, slots_multiple
from default_moe.moe.experts.blocks import block_experts, block_rows
from default_moe.moe.experts.dense_gradient import experts_for_gradient
from default_moe.moe.experts.layout import Axes, Layout, Routing, choice_weights, flat, group_by_expert
from default_moe.moe.experts.sorted_rows import sorted_experts
from default_moe.moe.experts.swiglu import ExpertWeights


def gathered_experts(
    x_BLD: Array,
    routing: Routing,
    weights: ExpertWeights,
    defaults: DefaultVectors | None,
    *,
    axes: Axes,
    config: MoEConfig,
    backend: str,
    update: bool,
) -> tuple[Array, DefaultVectors | None]:
    """`experts.sparse_experts` on one device: its tokens, its M experts.

    If tokens are split over the expert axes too, they are gathered over them first and their outputs scattered after.
    """
    num_experts = weights.gate.shape[0]
    gathered = bool(axes.experts) and set(axes.experts) <= set(axes.tokens)

    def tokens(a: Array) -> Array:
        return jax.lax.all_gather(flat(a), axes.experts, tiled=True) if gathered else flat(a)

    x_TD, weights_TN, index_TK = (tokens(a) for a in (x_BLD, routing.weights, routing.expert_index))
    mask_T = None if routing.mask is None else tokens(routing.mask)
    if axes.experts and not gathered:
        x_TD = jax.lax.pcast(x_TD, axes.experts, to="varying")
    first = jax.lax.axis_index(axes.experts) * num_experts if axes.experts else 0
    weights_TM = jax.lax.dynamic_slice_in_dim(weights_TN, first, num_experts, axis=1) if axes.experts else weights_TN

    layout = group_by_expert(index_TK - first, num_experts, group_alignment(backend), slots_multiple(backend))
    weight_TK = choice_weights(weights_TM, layout.expert_TK)
    active_TM = active_experts(layout.expert_TK, num_experts)
    vectors = config.default_vectors
    counted_TM = counted_TK = None
    if vectors and update:
        counted_TM = counted_weights(weights_TM, active_TM, mask_T, vectors.ema_weighted, x_TD.dtype)
        counted_TK = choice_weights(counted_TM, layout.expert_TK)
    gradient = bool(vectors and vectors.expert_gradient and update)
    y_TD, sum_MD = run_experts(x_TD, weight_TK, counted_TK, weights, layout, config.num_experts, backend, gradient)
    if config.method.dense_gradient and config.top_k < config.num_experts:
        others_TK = inactive_experts(index_TK, config.num_experts) - first
        y_TD += experts_for_gradient(x_TD, weights_TM, others_TK, weights, config.num_experts, backend)
    if vectors and defaults is not None:
        ema_MD, before = defaults.ema, defaults
        if sum_MD is not None and counted_TM is not None:
            sums = over_others((sum_MD, counted_TM.sum(axis=0)), axes)
            defaults = updated(defaults, *sums, vectors.ema_decay)
            ema_MD = used_vectors(before, defaults, *sums, axes, vectors)
        # With the exact gradient of the inactive experts' weights theirs is not needed.
        combined_TM = jax.lax.stop_gradient(weights_TM) if config.method.dense_gradient else weights_TM
        y_TD = combine(y_TD, combined_TM, ema_MD, active_TM, substitution_of(routing, vectors), gradient)
    if gathered:
        y_TD = jax.lax.psum_scatter(y_TD, axes.experts, tiled=True)
    elif axes.experts:
        y_TD = jax.lax.psum(y_TD, axes.experts)
    return y_TD.reshape(x_BLD.shape), defaults


def run_experts(
    x_TD: Array,
    weight_TK: Array,
    counted_TK: Array | None,
    weights: ExpertWeights,
    layout: Layout,
    num_experts: int,
    backend: str,
    sums_gradient: bool = False,
) -> tuple[Array, Array | None]:
    """What `block_experts` gives, which says what arguments and results are, by any backend.

    The layout has the backend's `group_alignment` and `slots_multiple`. num_experts: N, over which assignments spread.
    """
    if backend == "blocks":
        rows = block_rows(layout.slot_TK.size, num_experts, largest_block())
        return block_experts(x_TD, weight_TK, counted_TK, weights, layout, rows, sums_gradient)
    align = group_alignment(backend)
    return sorted_experts(x_TD, weight_TK, counted_TK, weights, layout, align, backend, sums_gradient)
