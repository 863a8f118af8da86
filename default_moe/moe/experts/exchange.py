"""Experts reached by exchange: each choice of a token is sent to the device of its expert, and the output back.

Pure functions, to be used inside `shard_map`.

G devices along the expert axis hold M = N / G experts each. A device lays out its rows by expert in S slots (see
`layout.Layout`), so that those of one expert are a slice. A slice goes to the device that holds the expert, and lies
there behind the slices that devices of lower index send for the same expert: what a device receives is grouped by
expert again, in Q slots. Padding of groups travels with them, so slices start at multiples of the alignment everywhere.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from default_moe.config import MoEConfig
from default_moe.methods.routing import active_experts
from default_moe.moe.default_vectors import DefaultVectors, SampledOutputs, ema_weights, update_and_combine
from default_moe.moe.experts.backends import group_alignment, run_rows, slots_multiple
from default_moe.moe.experts.layout import (
    Axes,
    Layout,
    Routing,
    choice_values,
    dispatch,
    flat,
    group_by_expert,
    round_up,
    sum_choices,
)
from default_moe.moe.experts.samples import sampled_tokens
from default_moe.moe.experts.sorted_rows import ema_sums, weigh
from default_moe.moe.experts.swiglu import EXPERT_PRODUCT, ExpertParams


class Slices(NamedTuple):
    """What one device sends and receives, N slices each: M to or from every device, in the order of devices.

    All int32, in the order in which `jax.lax.ragged_all_to_all` takes them.

    send_start_N, send_size_N: where a slice lies among this device's rows, and how many rows it has.
    put_start_N: where the receiver of each slice sent puts it.  received_size_N: rows of the slices received.
    """

    send_start_N: Array
    send_size_N: Array
    put_start_N: Array
    received_size_N: Array


def slices(sizes_GN: Array, device: Array | int) -> tuple[Slices, Slices]:
    """What `device` sends to the experts' devices and receives for its own; then the same for the way back.

    sizes_GN: int32, the slots of every device for each expert.
    """
    num_devices, num_experts = sizes_GN.shape
    by_holder = (num_devices, num_devices, num_experts // num_devices)
    at_home_GN = jnp.cumsum(sizes_GN, axis=1) - sizes_GN
    group_GM = sizes_GN.sum(axis=0).reshape(by_holder[1:])
    group_start_N = (jnp.cumsum(group_GM, axis=1) - group_GM).reshape(-1)
    at_holder_GN = group_start_N + jnp.cumsum(sizes_GN, axis=0) - sizes_GN

    def own_experts(values_GN: Array) -> Array:
        return values_GN.reshape(by_holder)[:, device].reshape(-1)

    sent_N, received_N = sizes_GN[device], own_experts(sizes_GN)
    return (
        Slices(at_home_GN[device], sent_N, at_holder_GN[device], received_N),
        Slices(own_experts(at_holder_GN), received_N, own_experts(at_home_GN), sent_N),
    )


def received_slots(num_tokens: int, top_k: int, experts_here: int, num_devices: int, align: int, multiple: int) -> int:
    """Q, room for all that can arrive: of each token of the group no more choices than there are experts here.

    num_tokens: T of each device.  align, multiple: as for `routing.group_by_expert`.
    """
    rows = num_tokens * min(top_k, experts_here) + experts_here * (align - 1)
    return round_up(num_devices * rows, 1 if align == 1 else max(align, multiple))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def exchange(rows_SD: Array, there: Slices, back: Slices, num_slots: int, axes: tuple[str, ...]) -> Array:
    """The rows that other devices along `axes` send here, where they put them: [num_slots, D], else zeros.

    Sending moves every row to a place of its own, so its transpose is to return it: `there` and `back` change places.
    """
    received = jnp.zeros_like(rows_SD, shape=(num_slots, rows_SD.shape[1]))
    return jax.lax.ragged_all_to_all(rows_SD, received, *there, axis_name=axes)


def _forward(rows_SD: Array, there: Slices, back: Slices, num_slots: int, axes: tuple[str, ...]) -> tuple:
    return exchange(rows_SD, there, back, num_slots, axes), (rows_SD.shape[0], there, back)


def _backward(num_slots: int, axes: tuple[str, ...], residuals: tuple, g_QD: Array) -> tuple:
    del num_slots
    num_rows, there, back = residuals
    return exchange(g_QD, back, there, num_rows, axes), None, None


exchange.defvjp(_forward, _backward)


def exchanged_experts(
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
    """Compute `sparse_experts` on one device: the choices of its tokens travel to their experts, and outputs back.

    All but the experts themselves happens where the tokens are, over all N experts, sums for the default vectors
    included.
    """
    x_TD, gates_TN, index_TK = (flat(a) for a in (x_BLD, routing.gates, routing.expert_index))
    mask_T = None if routing.mask is None else flat(routing.mask)
    travel = functools.partial(_outputs_by_exchange, axes=axes, config=config, backend=backend)
    out_SD, layout = travel(x_TD, index_TK, params)
    y_TD = weigh(out_SD, choice_values(gates_TN, index_TK), layout)
    settings = config.default_vectors
    if settings and defaults is not None:
        active_TN = active_experts(index_TK, config.num_experts)
        sums = samples = None
        if routing.samples is not None:
            position_BP, expert_BP, factor = routing.samples
            token_P, expert_P = sampled_tokens(position_BP, x_BLD.shape[1]), flat(expert_BP)
            sampled_SD, placed = travel(*jax.lax.stop_gradient((x_TD[token_P], expert_P[:, None], params)))
            samples = SampledOutputs(sum_choices(sampled_SD, placed, None), token_P, expert_P, factor)
            sums = samples.sums(mask_T, config.num_experts)
        elif update:
            ema_weight_TN = ema_weights(gates_TN, active_TN, mask_T, settings, x_TD.dtype)
            ema_weight_TK = choice_values(ema_weight_TN, index_TK)
            align = group_alignment(backend)
            sum_ND = ema_sums(out_SD, ema_weight_TK, layout, align, settings.expert_gradient)
            sums = sum_ND, ema_weight_TN.sum(axis=0)
        y_TD, defaults = update_and_combine(
            y_TD,
            gates_TN,
            active_TN,
            sums,
            defaults,
            settings,
            routing.substitution,
            samples,
            other_axes=axes.others,
            expert_axes=axes.experts,
        )
    return y_TD.reshape(x_BLD.shape), defaults


def _outputs_by_exchange(
    x_TD: Array, index_TK: Array, params: ExpertParams, *, axes: Axes, config: MoEConfig, backend: str
) -> tuple[Array, Layout]:
    """Send each token to the devices of its experts, and their outputs back: [S, D], and the layout of the S slots."""
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
    out_QD = run_rows(x_QD, params, sizes_M, num_devices * index_TK.size, config.num_experts, backend)
    out_SD = checkpoint_name(exchange(out_QD, back, there, len(x_SD), axes.experts), EXPERT_PRODUCT)
    return out_SD, layout
