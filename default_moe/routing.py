"""Routing mathematics: who goes where, how balanced that is, and the layout of tokens grouped by expert.

Dimension key, for the whole package:
  B batch, L length, T tokens (B * L), D model width, F expert hidden width, N experts, M experts held by this device
  (N on one device), K active experts per token, S slots of the grouped layout, H heads, V vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


def masked_mean(values: Array, mask: Array | None) -> Array:
    """Mean over the first two axes [B, L], counting only positions where `mask` [B, L] is not zero."""
    if mask is None:
        return values.mean(axis=tuple(range(2)))
    counts = (mask != 0).reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
    # where, not a product: what padding holds must not matter, be it NaN.
    return jnp.where(counts, values, 0).sum(axis=(0, 1)) / jnp.maximum(counts.sum(), 1)


def tokens_per_expert(index_BLK: Array, num_experts: int, mask_BL: Array | None) -> Array:
    """How many of the tokens that `mask_BL` keeps chose each expert: int32 [N]."""
    chosen = jnp.ones(index_BLK.shape, jnp.int32)
    if mask_BL is not None:
        chosen = chosen * (mask_BL != 0)[..., None]
    one_hot = index_BLK[..., None] == jnp.arange(num_experts)  # fused into the sum: never stored
    return jnp.where(one_hot, chosen[..., None], 0).sum(axis=(0, 1, 2))


def active_experts(index: Array, num_experts: int) -> Array:
    """bool [..., N]: whether the expert is among the choices [..., K]."""
    active = jnp.zeros((*index.shape[:-1], num_experts), bool)
    for k in range(index.shape[-1]):
        active |= index[..., k, None] == jnp.arange(num_experts)
    return active


def inactive_experts(index_TK: Array, num_experts: int) -> Array:
    """int32 [T, N - K]: the experts that are not among the K different choices of each token, in order."""
    inactive_TN = ~active_experts(index_TK, num_experts)
    return jax.lax.top_k(inactive_TN.astype(jnp.int32), num_experts - index_TK.shape[1])[1]


def within_capacity(index_BLK: Array, num_experts: int, capacity: int, mask_BL: Array | None) -> Array:
    """The choices, N in the place of those that an expert has no room for.

    An expert takes the first `capacity` tokens of each sequence that choose it. So what is dropped does not depend on
    later tokens, nor on other sequences, and is the same on any mesh. Tokens that `mask_BL` leaves out take no room.
    """
    chosen_BLN = active_experts(index_BLK, num_experts)
    counted_BLN = chosen_BLN if mask_BL is None else chosen_BLN & (mask_BL != 0)[..., None]
    before_BLN = jnp.cumsum(counted_BLN, axis=1, dtype=jnp.int32) - counted_BLN
    full_BLN = before_BLN >= capacity
    choices = (active_experts(index_BLK[..., k : k + 1], num_experts) for k in range(index_BLK.shape[2]))
    dropped_BLK = jnp.stack([(full_BLN & choice_BLN).any(axis=-1) for choice_BLN in choices], axis=-1)
    return jnp.where(dropped_BLK, num_experts, index_BLK)


def load_balance_loss(probs_BLN: Array, counts_N: Array, mask_BL: Array | None) -> Array:
    """N * sum_e f_e P_e: 1 at perfect balance, N at worst (Switch Transformer, eq. 4, generalised to K choices).

    f_e is the share of assignments to expert e and carries no gradient, P_e the mean router probability. Both are
    over all tokens given, which under jit are those of the global batch on any mesh.
    """
    num_experts = counts_N.shape[0]
    f_N = counts_N / jnp.maximum(counts_N.sum(), 1)
    return num_experts * jnp.sum(f_N * masked_mean(probs_BLN, mask_BL))


def sequence_balance_loss(probs_BLN: Array, index_BLK: Array, mask_BL: Array | None) -> Array:
    """`load_balance_loss` of each sequence on its own, mean over sequences (DeepSeek-V3, eq. 17 to 20)."""
    num_experts = probs_BLN.shape[-1]
    chosen_BLN = active_experts(index_BLK, num_experts).astype(jnp.float32)
    if mask_BL is not None:
        counts_BL1 = (mask_BL != 0)[..., None]
        chosen_BLN, probs_BLN = jnp.where(counts_BL1, chosen_BLN, 0), jnp.where(counts_BL1, probs_BLN, 0)
        length_B1 = counts_BL1.sum(axis=1)
    else:
        length_B1 = jnp.full((probs_BLN.shape[0], 1), probs_BLN.shape[1])
    f_BN = chosen_BLN.sum(axis=1) / jnp.maximum(chosen_BLN.sum(axis=(1, 2))[:, None], 1)
    loss_B = num_experts * (f_BN * probs_BLN.sum(axis=1) / jnp.maximum(length_B1, 1)).sum(axis=-1)
    return loss_B.sum() / jnp.maximum((length_B1 > 0).sum(), 1)


def router_z_loss(logits_BLN: Array, mask_BL: Array | None) -> Array:
    """Mean of the squared log-partition (ST-MoE, eq. 5)."""
    return masked_mean(jax.nn.logsumexp(logits_BLN, axis=-1) ** 2, mask_BL)


def router_entropy(probs_BLN: Array, mask_BL: Array | None) -> Array:
    """Mean entropy of the router's distribution in nats: log N when undecided, 0 when certain. Without a gradient."""
    probs_BLN = jax.lax.stop_gradient(probs_BLN)
    return masked_mean(jax.scipy.special.entr(probs_BLN).sum(axis=-1), mask_BL)


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
def choice_weights(values_TM: Array, expert_TK: Array) -> Array:
    """[T, K]: the value of each chosen expert, 0 where it is held elsewhere (an index of M)."""
    token_T1 = jnp.arange(values_TM.shape[0])[:, None]
    return values_TM.at[token_T1, expert_TK].get(mode="fill", fill_value=0)


def _choice_weights_fwd(values_TM: Array, expert_TK: Array) -> tuple:
    return choice_weights(values_TM, expert_TK), (expert_TK, jnp.arange(values_TM.shape[1]))


def _choice_weights_bwd(residuals: tuple, g_TK: Array) -> tuple:
    expert_TK, index_M = residuals
    d_values_TM = jnp.zeros((g_TK.shape[0], index_M.shape[0]), g_TK.dtype)
    for k in range(g_TK.shape[1]):  # comparisons, which fuse into one pass, where a scatter would not
        d_values_TM += jnp.where(expert_TK[:, k, None] == index_M, g_TK[:, k, None], 0)
    return d_values_TM, None


choice_weights.defvjp(_choice_weights_fwd, _choice_weights_bwd)


def take_or_zeros(values: Array, index: Array) -> Array:
    """values[index] along the first axis, zeros where the index lies past the end."""
    return values.at[index].get(mode="fill", fill_value=0)


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


def sum_choices(values_SD: Array, layout: Layout, weights_TK: Array | None) -> Array:
    """For each token the (weighted) sum over its K slots, in float32: [T, D]. An expert held elsewhere counts 0."""
    num_tokens, num_choices = layout.slot_TK.shape
    total = jnp.zeros((num_tokens, values_SD.shape[1]), jnp.float32)
    for k in range(num_choices):  # K gathers of [T, D]; a [T, K, D] array never exists
        rows_TD = take_or_zeros(values_SD, layout.slot_TK[:, k]).astype(jnp.float32)
        total += rows_TD if weights_TK is None else weights_TK[:, k, None] * rows_TD
    return total
