"""Rows sent to the devices that hold their experts, and back. Pure functions, to be used inside `shard_map`.

G devices along the expert axis hold M = N / G experts each. A device lays out its rows by expert in S slots (see
`routing.Layout`), so that those of one expert are a slice. A slice goes to the device that holds the expert, and lies
there behind the slices that devices of lower index send for the same expert: what a device receives is grouped by
expert again, in Q slots. Padding of groups travels with them, so slices start at multiples of the alignment everywhere.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from default_moe.routing import round_up


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
