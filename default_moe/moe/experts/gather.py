"""Experts reached by gathering: each device computes its own experts' part of all outputs of its group.

Pure functions, run inside `shard_map`, or on one device without it. Sorting and gathering of rows never leave the
device. The default vectors stay with their experts; across the other axes only their sums are added up.
"""

import jax
from jax import Array

from default_moe.config import MoEConfig
from default_moe.methods.routing import active_experts, inactive_experts
from default_moe.moe.default_vectors import DefaultVectors, ema_weights, update_and_combine
from default_moe.moe.experts.backends import lay_out, run_experts
from default_moe.moe.experts.dense_gradient import experts_for_gradient
from default_moe.moe.experts.layout import Axes, Routing, choice_values, flat
from default_moe.moe.experts.samples import sampled_outputs, sampled_tokens
from default_moe.moe.experts.swiglu import ExpertParams


def gathered_experts(
    x_BLD: Array,
    routing: Routing,
    params: ExpertParams,
    defaults: DefaultVectors | None,
    *,
    axes: Axes,
    config: MoEConfig,
    backend: str,
    update: bool,
) -> tuple[Array, DefaultVectors | None]:
    """Compute `sparse_experts` on one device: its tokens, its M experts.

    If tokens are split over the expert axes too, they are gathered over them first and their outputs scattered after.
    """
    num_experts = params.gate.shape[0]
    gathered = bool(axes.experts) and set(axes.experts) <= set(axes.tokens)

    def tokens(a: Array) -> Array:
        return jax.lax.all_gather(flat(a), axes.experts, tiled=True) if gathered else flat(a)

    x_TD, gates_TM, index_TK = (tokens(a) for a in (x_BLD, routing.gates, routing.expert_index))
    mask_T = None if routing.mask is None else tokens(routing.mask)
    first: Array | int = 0  # of the experts held here
    if axes.experts:
        first = jax.lax.axis_index(axes.experts) * num_experts
        gates_TM = jax.lax.dynamic_slice_in_dim(gates_TM, first, num_experts, axis=1)
        if not gathered:
            x_TD = jax.lax.pcast(x_TD, axes.experts, to="varying")

    layout = lay_out(index_TK - first, num_experts, backend)
    active_TM = active_experts(layout.expert_TK, num_experts)
    settings = config.default_vectors
    ema_weight_TM = ema_weight_TK = None
    if settings and update and routing.samples is None:
        ema_weight_TM = ema_weights(gates_TM, active_TM, mask_T, settings, x_TD.dtype)
        ema_weight_TK = choice_values(ema_weight_TM, layout.expert_TK)
    y_TD, sum_MD = run_experts(
        x_TD,
        choice_values(gates_TM, layout.expert_TK),
        ema_weight_TK,
        params,
        layout,
        config.num_experts,
        backend,
        expert_gradient=bool(settings and settings.expert_gradient),
    )
    if config.method.dense_gradient and config.top_k < config.num_experts:
        fewest = config.method.fewest_experts_per_token(config)
        others_TK = inactive_experts(index_TK, config.num_experts, fewest) - first
        y_TD += experts_for_gradient(x_TD, gates_TM, others_TK, params, config.num_experts, backend)
        gates_TM = jax.lax.stop_gradient(gates_TM)  # they have their exact gradient: default vectors give none
    if settings and defaults is not None:
        sums = None if sum_MD is None or ema_weight_TM is None else (sum_MD, ema_weight_TM.sum(axis=0))
        samples = None
        if routing.samples is not None:
            position_BP, expert_BP, factor = routing.samples
            position_BP = tokens(position_BP).reshape(-1, position_BP.shape[1])
            token_P = sampled_tokens(position_BP, x_BLD.shape[1])
            expert_P = tokens(expert_BP) - first
            samples = sampled_outputs(x_TD, token_P, expert_P, factor, params, config.num_experts, backend)
            sums = samples.sums(mask_T, num_experts)
        y_TD, defaults = update_and_combine(
            y_TD, gates_TM, active_TM, sums, defaults, settings, routing.substitution, samples, other_axes=axes.others
        )
    if gathered:
        y_TD = jax.lax.psum_scatter(y_TD, axes.experts, tiled=True)
    elif axes.experts:
        y_TD = jax.lax.psum(y_TD, axes.experts)
    return y_TD.reshape(x_BLD.shape), defaults
