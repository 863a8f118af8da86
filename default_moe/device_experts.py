"""What one device computes of the sparse layer, and the collectives around it. Pure functions, run inside `shard_map`.

`gathered_experts` serves one device and meshes of any kind, `exchanged_experts` only meshes that split experts, and
tokens along with them; `expert_parallel.py` chooses. Sorting and gathering of rows never leave the device in either.
The default vectors stay with their experts; across the other axes only their [M, D] sums and [M] weights are added up.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from default_moe.block_experts import block_experts, block_rows
from default_moe.config import MoEConfig
from default_moe.default_vectors import DefaultVectorSettings, combine, mean, straight_through, update_ema
from default_moe.dense_gradient import experts_for_gradient
from default_moe.exchange import exchange, received_slots, slices
from default_moe.grouped_matmul import group_alignment, largest_block, slots_multiple
from default_moe.routing import (
    Layout,
    active_experts,
    choice_weights,
    dispatch,
    group_by_expert,
    inactive_experts,
)
from default_moe.sorted_experts import counted_sums, row_experts, sorted_experts, weigh
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
    """What the router decided, and what counts as a sample; the first three as in `methods.Decision`.

    weights: float32 [B, L, N].  expert_index: int32 [B, L, K], N for none.  substitution: scalar, or None.
    mask: [B, L] or None, 0 where a token is no sample.
    """

    weights: Array
    expert_index: Array
    substitution: Array | None
    mask: Array | None


class Axes(NamedTuple):
    """The mesh axes that tokens are split over, and those that experts are."""

    tokens: tuple[str, ...]
    experts: tuple[str, ...]

    @property
    def others(self) -> tuple[str, ...]:
        """Those over which devices hold other tokens, but the same experts."""
        return tuple(axis for axis in self.tokens if axis not in self.experts)


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
        return jax.lax.all_gather(_flat(a), axes.experts, tiled=True) if gathered else _flat(a)

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
        counted_TM = _counted_weights(weights_TM, active_TM, mask_T, vectors.ema_weighted, x_TD.dtype)
        counted_TK = choice_weights(counted_TM, layout.expert_TK)
    gradient = bool(vectors and vectors.expert_gradient and update)
    y_TD, sum_MD = run_experts(x_TD, weight_TK, counted_TK, weights, layout, config.num_experts, backend, gradient)
    if config.method.dense_gradient and config.top_k < config.num_experts:
        others_TK = inactive_experts(index_TK, config.num_experts) - first
        y_TD += experts_for_gradient(x_TD, weights_TM, others_TK, weights, config.num_experts, backend)
    if vectors and defaults is not None:
        ema_MD, before = defaults.ema, defaults
        if sum_MD is not None and counted_TM is not None:
            sums = _over_others((sum_MD, counted_TM.sum(axis=0)), axes)
            defaults = _updated(defaults, *sums, vectors.ema_decay)
            ema_MD = _used(before, defaults, *sums, axes, vectors)
        # With the exact gradient of the inactive experts' weights theirs is not needed.
        combined_TM = jax.lax.stop_gradient(weights_TM) if config.method.dense_gradient else weights_TM
        y_TD = combine(y_TD, combined_TM, ema_MD, active_TM, _substitution(routing, vectors), gradient)
    if gathered:
        y_TD = jax.lax.psum_scatter(y_TD, axes.experts, tiled=True)
    elif axes.experts:
        y_TD = jax.lax.psum(y_TD, axes.experts)
    return y_TD.reshape(x_BLD.shape), defaults


def exchanged_experts(
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
    """`experts.sparse_experts` on one device: the choices of its tokens travel to their experts, and outputs back.

    All but the experts themselves happens where the tokens are, over all N experts, sums for the default vectors
    included: these are summed and scattered to the experts' devices, and the default vectors gathered to be used.
    """
    x_TD, weights_TN, index_TK = (_flat(a) for a in (x_BLD, routing.weights, routing.expert_index))
    mask_T = None if routing.mask is None else _flat(routing.mask)
    align = group_alignment(backend)
    layout = group_by_expert(index_TK, config.num_experts, align)
    sizes_GN = jax.lax.all_gather(layout.group_sizes_M, axes.experts)
    num_devices, device = len(sizes_GN), jax.lax.axis_index(axes.experts)
    there, back = slices(sizes_GN, device)
    sizes_M = sizes_GN.sum(axis=0).reshape(num_devices, -1)[device]
    num_received = received_slots(
        len(index_TK), index_TK.shape[1], len(sizes_M), num_devices, align, slots_multiple(backend)
    )

    # What arrives is named: recomputing it would send it again.
    x_SD = dispatch(x_TD, layout)
    x_QD = checkpoint_name(exchange(x_SD, there, back, num_received, axes.experts), EXPERT_PRODUCT)
    if backend == "blocks":
        rows = block_rows(num_devices * index_TK.size, config.num_experts, largest_block())
        out_QD = _block_row_experts(x_QD, weights, sizes_M, rows)
    else:
        out_QD = row_experts(x_QD, weights, sizes_M, backend)
    out_SD = checkpoint_name(exchange(out_QD, back, there, len(x_SD), axes.experts), EXPERT_PRODUCT)

    y_TD = weigh(out_SD, choice_weights(weights_TN, index_TK), layout)
    vectors = config.default_vectors
    if vectors and defaults is not None:
        active_TN = active_experts(index_TK, config.num_experts)
        ema_MD, before, gradient = defaults.ema, defaults, vectors.expert_gradient and update
        if update:
            counted_TN = _counted_weights(weights_TN, active_TN, mask_T, vectors.ema_weighted, x_TD.dtype)
            sum_ND = counted_sums(out_SD, choice_weights(counted_TN, index_TK), layout, align, gradient)
            scattered = (jax.lax.psum_scatter(s, axes.experts, tiled=True) for s in (sum_ND, counted_TN.sum(axis=0)))
            sums = _over_others(tuple(scattered), axes)
            defaults = _updated(defaults, *sums, vectors.ema_decay)
            ema_MD = _used(before, defaults, *sums, axes, vectors)
        ema_ND = checkpoint_name(jax.lax.all_gather(ema_MD, axes.experts, tiled=True), EXPERT_PRODUCT)
        y_TD = combine(y_TD, weights_TN, ema_ND, active_TN, _substitution(routing, vectors), gradient)
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


def _block_row_experts(x_QD: Array, weights: ExpertWeights, group_sizes_M: Array, rows: int) -> Array:
    """What `row_experts` gives, by `block_experts`, to which every row is a token that lies in its slot already."""
    slot_Q = jnp.arange(len(x_QD), dtype=jnp.int32)
    expert_Q = jnp.searchsorted(jnp.cumsum(group_sizes_M), slot_Q, side="right").astype(jnp.int32)
    layout = Layout(slot_Q, slot_Q[:, None], expert_Q[:, None], group_sizes_M)
    weight_Q1 = jnp.ones_like(x_QD, jnp.float32, shape=(len(x_QD), 1))
    out_QD, _ = block_experts(x_QD, weight_Q1, None, weights, layout, rows)
    return out_QD.astype(x_QD.dtype)


def _flat(a: Array) -> Array:
    """[B, L, ...] to [T, ...]."""
    return a.reshape((-1, *a.shape[2:]))


def _used(
    before: DefaultVectors,
    after: DefaultVectors,
    sum_MD: Array,
    weight_M: Array,
    axes: Axes,
    vectors: DefaultVectorSettings,
) -> Array:
    """The vectors that a training batch uses, of those before and after it. sum_MD, weight_M: what the batch adds."""
    ema_MD = jax.lax.stop_gradient((before if vectors.ema_update == "after" else after).ema)
    if not vectors.expert_gradient:
        return ema_MD
    ema_MD = straight_through(ema_MD, mean(sum_MD, weight_M))
    # Each device has a part of the gradient.
    return jax.lax.pcast(ema_MD, axes.others, to="varying") if axes.others else ema_MD


def _substitution(routing: Routing, vectors: DefaultVectorSettings) -> Array | None:
    """The share of default vectors in the output, None for nothing of them."""
    if vectors.substitute == "backward":
        return None
    return jnp.ones((), jnp.float32) if routing.substitution is None else routing.substitution


def _over_others(sums: tuple[Array, Array], axes: Axes) -> tuple[Array, Array]:
    """One device's, or one expert group's, sums added up over all that hold other tokens."""
    return jax.lax.psum(sums, axes.others) if axes.others else sums


def _updated(defaults: DefaultVectors, sum_MD: Array, weight_M: Array, decay: float) -> DefaultVectors:
    """The default vectors after a batch of these sums."""
    sum_MD, weight_M = defaults.sum + jax.lax.stop_gradient(sum_MD), defaults.weight + weight_M
    # Named: recomputing it would take the products over again.
    ema_MD = checkpoint_name(update_ema(defaults.ema, sum_MD, weight_M, decay), EXPERT_PRODUCT)
    return DefaultVectors(ema_MD, sum_MD, weight_M)


def _counted_weights(
    weights_TM: Array, active_TM: Array, mask_T: Array | None, weighted: bool, dtype: jnp.dtype
) -> Array:
    """float32 [T, M], how much each token's output of each expert counts in the moving average: 0 where inactive."""
    counted_TM = active_TM if mask_T is None else active_TM & (mask_T != 0)[:, None]
    weight_TM = jax.lax.stop_gradient(weights_TM) if weighted else jnp.ones_like(weights_TM)
    # Rounded as in the sum of outputs: else the sum of the weights would not match the weighted sum.
    return jnp.where(counted_TM, weight_TM.astype(dtype).astype(jnp.float32), 0)
