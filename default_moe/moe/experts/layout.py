"""Pure: the layout of tokens grouped by expert, to it and back."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from default_moe.methods.decision import Samples


class Layout(NamedTuple):
    """Assignments (token t, choice k) placed in slots, grouped by expert; each group starts at a multiple of `align`.

    assignment_S: int32, t * K + k of the assignment in each slot, T * K in an empty slot.
    slot_TK: int32, the slot of each assignment, S if its expert is held elsewhere.
    expert_TK: int32, the expert of each assignment among the M held here, M if it is held elsewhere.
    group_sizes_M: int32, slots given to each expert, rounded up to `align`. Slots past their sum are empty.
    """

    assignment_S: Array
    slot_TK: Array
    expert_TK: Array
    group_sizes_M: Array


def group_by_expert(expert_TK: Array, num_experts: int, align: int, multiple: int = 1) -> Layout:
    """Lay out assignments by expert. No assignment is ever dropped, however unbalanced the routing.

    Args:
      expert_TK: int32 [T, K], expert of each assignment, 0 <= e < num_experts; any other value is held elsewhere.
      num_experts: M.
      align: each group's number of slots is a multiple of this.
      multiple: so is S of this, a multiple of `align`, unless that is 1.
    """
    shape_TK = expert_TK.shape
    num_assignments = expert_TK.size
    num_slots = num_assignments
    if align > 1:
        num_slots = round_up(num_assignments + num_experts * (align - 1), max(align, multiple))
    here = (expert_TK >= 0) & (expert_TK < num_experts)
    expert_TK = jnp.where(here, expert_TK, num_experts)
    expert_A = expert_TK.reshape(-1)
    order_A = _stable_argsort(expert_A, num_experts + 1)  # assignments in slot order, without the gaps
    rank_A = jnp.zeros_like(order_A).at[order_A].set(jnp.arange(num_assignments, dtype=order_A.dtype))
    # Where each expert's assignments start among the sorted ones, and where its slots do.
    sorted_start_M = jnp.searchsorted(expert_A[order_A], jnp.arange(num_experts + 1)).astype(jnp.int32)
    sizes_M = round_up(jnp.diff(sorted_start_M), align)
    slot_start_M = jnp.cumsum(sizes_M) - sizes_M
    shift_M = jnp.append(slot_start_M - sorted_start_M[:-1], 0)
    slot_A = jnp.where(expert_A < num_experts, rank_A + shift_M[expert_A], num_slots)
    assignment_S = jnp.full(num_slots, num_assignments, jnp.int32)
    assignment_S = assignment_S.at[slot_A].set(jnp.arange(num_assignments, dtype=jnp.int32), mode="drop")
    return Layout(assignment_S, slot_A.reshape(shape_TK), expert_TK, sizes_M)


def _stable_argsort(values_A: Array, num_values: int) -> Array:
    """`jnp.argsort` of int32 values in [0, num_values)."""
    size = values_A.shape[0]
    if size * num_values >= 2**31:
        return jnp.argsort(values_A, stable=True)
    # Value and place in one number: sorting one array is five times as fast as sorting two by the first.
    return jax.lax.sort(values_A * size + jnp.arange(size, dtype=jnp.int32), is_stable=False) % size


def round_up(size: Any, multiple: int) -> Any:
    """The next multiple."""
    return -(-size // multiple) * multiple


@jax.custom_vjp
def choice_values(values_TM: Array, expert_TK: Array) -> Array:
    """[T, K]: the value of each chosen expert, 0 where it is held elsewhere (an index of M)."""
    token_T1 = jnp.arange(values_TM.shape[0])[:, None]
    return values_TM.at[token_T1, expert_TK].get(mode="fill", fill_value=0)


def _choice_values_fwd(values_TM: Array, expert_TK: Array) -> tuple:
    return choice_values(values_TM, expert_TK), (expert_TK, jnp.arange(values_TM.shape[1]))


def _choice_values_bwd(residuals: tuple, g_TK: Array) -> tuple:
    expert_TK, index_M = residuals
    d_values_TM = jnp.zeros((g_TK.shape[0], index_M.shape[0]), g_TK.dtype)
    for k in range(g_TK.shape[1]):  # comparisons, which fuse into one pass, where a scatter would not
        d_values_TM += jnp.where(expert_TK[:, k, None] == index_M, g_TK[:, k, None], 0)
    return d_values_TM, None


choice_values.defvjp(_choice_values_fwd, _choice_values_bwd)


def take_or_zeros(values: Array, index: Array) -> Array:
    """values[index] along the first axis, zeros where the index lies past the end."""
    return values.at[index].get(mode="fill", fill_value=0)


def rows_of_groups(rows_SF: Array, group_sizes_M: Array) -> Array:
    """The rows with those past the last group replaced by zeros."""
    in_group_S1 = (jnp.arange(rows_SF.shape[0]) < group_sizes_M.sum())[:, None]
    return jnp.where(in_group_S1, rows_SF, 0)


def matrices_of_groups(matrices_MDF: Array, group_sizes_M: Array) -> Array:
    """The matrices with those of empty groups replaced by zeros."""
    return jnp.where((group_sizes_M > 0)[:, None, None], matrices_MDF, 0)


@jax.custom_vjp
def dispatch(x_TD: Array, layout: Layout) -> Array:
    """Copy each token to the slots of its experts: [S, D], zero in empty slots.

    The backward pass gathers too (each token sums its K slots), where transposing the gather would scatter.
    """
    return take_or_zeros(x_TD, layout.assignment_S // layout.slot_TK.shape[1])


def _dispatch_fwd(x_TD: Array, layout: Layout) -> tuple[Array, Layout]:
    return dispatch(x_TD, layout), layout


def _dispatch_bwd(layout: Layout, g_SD: Array) -> tuple[Array, None]:
    return sum_choices(g_SD, layout, None).astype(g_SD.dtype), None


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


def sum_choices(values_SD: Array, layout: Layout, gates_TK: Array | None) -> Array:
    """For each token the (weighted) sum over its K slots, in float32: [T, D]. An expert held elsewhere counts 0."""
    num_tokens, num_choices = layout.slot_TK.shape
    total = jnp.zeros((num_tokens, values_SD.shape[1]), jnp.float32)
    for k in range(num_choices):  # K gathers of [T, D]; a [T, K, D] array never exists
        rows_TD = take_or_zeros(values_SD, layout.slot_TK[:, k]).astype(jnp.float32)
        total += rows_TD if gates_TK is None else gates_TK[:, k, None] * rows_TD
    return total


class Routing(NamedTuple):
    """What the router decided, and which tokens count in statistics; all but the mask as in `methods.Decision`.

    gates: float32 [B, L, N].  expert_index: int32 [B, L, K], N for none.  substitution: scalar, or None.
    mask: [B, L] or None, 0 where a token does not count.
    """

    gates: Array
    expert_index: Array
    substitution: Array | None
    mask: Array | None
    samples: Samples | None = None


class Axes(NamedTuple):
    """The mesh axes that tokens are split over, and those that experts are."""

    tokens: tuple[str, ...]
    experts: tuple[str, ...]

    @property
    def others(self) -> tuple[str, ...]:
        """Those over which devices hold other tokens, but the same experts."""
        return tuple(axis for axis in self.tokens if axis not in self.experts)


def flat(a: Array) -> Array:
    """[B, L, ...] to [T, ...]."""
    return a.reshape((-1, *a.shape[2:]))
