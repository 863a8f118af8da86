"""SwiGLU experts in blocks of one expert's rows, each block a few plain matrix products.

Loops over the experts that have rows and over the blocks of each: as many turns as there is work, so the cost follows
the load, however unbalanced, and no row is dropped. R is such that an expert of mean load is one block, or a few equal
ones. What these leave, if at most 3/4 R, goes to blocks of about R / 8: an expert is padded by about R / 4 rows.

A block gathers its tokens, and adds its weighted outputs to them, while it is in the cache: permuted copies of the
tokens, the outputs or their gradients, [T K, D] each, never exist. Only x @ gate and x @ up, [T K, F] each, are kept
for the backward pass.

In numbers read and written (with P = T K): the forward pass reads P D of x, reads and writes P D of y and writes 2 P F;
the backward pass reads P D of x and of g, reads and writes P D of x's gradient and reads 2 P F. Any implementation that
keeps these two products moves as much but for y and x's gradient, of which it must write T D. An expert's weights are
read once; their gradient, float32 until all of it is there, is read and written in each of its blocks.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from default_moe.moe.experts.layout import Layout, take_or_zeros
from default_moe.moe.experts.swiglu import EXPERT_PRODUCT, ExpertParams, swiglu_gradients, swiglu_hidden


def block_rows(num_assignments: int, num_experts: int, largest: int) -> int:
    """R: the mean load and what chance adds to it, 1.5 standard deviations, or an equal part of it below `largest`."""
    mean = num_assignments / num_experts
    load = mean + 1.5 * mean**0.5
    rows = load / math.ceil(load / largest)
    return min(largest, math.ceil(rows / 16) * 16)


def tail_rows(rows: int) -> int:
    """Rows of the smaller blocks beside those of `rows`."""
    return min(rows, math.ceil(rows / 64) * 8)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def block_experts(
    x_TD: Array,
    gates_TK: Array,
    ema_weight_TK: Array | None,
    params: ExpertParams,
    layout: Layout,
    rows: int,
    expert_gradient: bool = False,
) -> tuple[Array, Array | None]:
    """Weighted sum of each token's experts, and per expert the sum of its outputs weighted by `ema_weight_TK`.

    Args:
      x_TD: tokens in the compute dtype.
      gates_TK: float32, weight of each assignment in the output. It gets a gradient: <g_t, E_i(x_t)>.
      ema_weight_TK: float32, weight of each assignment in the sums. None: no sums.
      params: of the M experts held here, in the compute dtype.
      layout: of the assignments, with align = 1.
      rows: R.
      expert_gradient: whether the sums pass their gradient on to the outputs of experts (not to `ema_weight_TK`).

    Returns:
      y, float32 [T, D], and the sums, float32 [M, D] or None.
    """
    return _forward(x_TD, gates_TK, ema_weight_TK, params, layout, rows, expert_gradient)[0]


def _forward(
    x_TD: Array,
    gates_TK: Array,
    ema_weight_TK: Array | None,
    params: ExpertParams,
    layout: Layout,
    rows: int,
    expert_gradient: bool,
) -> tuple:
    num_choices = gates_TK.shape[1]
    gates_A = gates_TK.reshape(-1)
    ema_weight_A = None if ema_weight_TK is None else ema_weight_TK.reshape(-1)

    def one_block(w: ExpertParams, block: _Block, carry: tuple) -> tuple:
        y_TD, gate_SF, up_SF, sums_MD = carry
        token_R = block.assignment_R // num_choices
        x_RD = take_or_zeros(x_TD, token_R)
        gate_RF, up_RF = x_RD @ w.gate, x_RD @ w.up
        out_RD = swiglu_hidden(gate_RF, up_RF).astype(x_TD.dtype) @ w.down
        weighted_RD = take_or_zeros(gates_A, block.assignment_R)[:, None] * out_RD.astype(jnp.float32)
        y_TD = y_TD.at[token_R].add(weighted_RD, mode="drop")
        if ema_weight_A is not None:
            ema_weight_R = take_or_zeros(ema_weight_A, block.assignment_R).astype(out_RD.dtype)
            sum_D = jnp.matmul(ema_weight_R, out_RD, preferred_element_type=jnp.float32)
            sums_MD = sums_MD.at[block.expert].add(sum_D)
        return y_TD, _put(gate_SF, gate_RF, block.first), _put(up_SF, up_RF, block.first), sums_MD

    (num_tokens, dim), (num_experts, _, hidden_dim) = x_TD.shape, params.gate.shape
    # A block's rows past its expert's last are overwritten by the next expert's; only the very last need room.
    num_slots = layout.assignment_S.shape[0] + rows
    start = (
        _zeros((num_tokens, dim), layout, 0),
        _unset((num_slots, hidden_dim), x_TD.dtype, layout, 0),
        _unset((num_slots, hidden_dim), x_TD.dtype, layout, 1),
        _zeros((num_experts, dim), layout, 0),
    )
    y_TD, gate_SF, up_SF, sums_MD = _over_blocks(one_block, start, params, layout, rows)
    gate_SF, up_SF = (checkpoint_name(a, EXPERT_PRODUCT) for a in (gate_SF, up_SF))
    ema_weight_A = ema_weight_A if expert_gradient else None
    residuals = x_TD, gates_TK, ema_weight_A, params, layout, gate_SF, up_SF
    return (y_TD, None if ema_weight_TK is None else sums_MD), residuals


def _backward(rows: int, expert_gradient: bool, residuals: tuple, cotangents: tuple) -> tuple:
    x_TD, gates_TK, ema_weight_A, params, layout, gate_SF, up_SF = residuals
    g_TD, g_sums_MD = cotangents
    num_choices = gates_TK.shape[1]
    gates_A = gates_TK.reshape(-1)

    def one_block(w: ExpertParams, block: _Block, carry: tuple) -> tuple:
        d_x_TD, d_gates_A, d_params = carry
        token_R = block.assignment_R // num_choices
        x_RD, g_RD = take_or_zeros(x_TD, token_R), take_or_zeros(g_TD, token_R).astype(x_TD.dtype)
        gates_R1 = take_or_zeros(gates_A, block.assignment_R)[:, None]
        gate_RF, up_RF = (_rows_from(a, block.first, len(token_R)).astype(jnp.float32) for a in (gate_SF, up_SF))
        hidden_RF = swiglu_hidden(gate_RF, up_RF)
        d_hidden_RF = jnp.matmul(g_RD, w.down.T, preferred_element_type=jnp.float32)
        # <g, E(x)> = <g, hidden @ down> = <g @ down^T, hidden>: the output is not needed.
        d_gates_R = (d_hidden_RF * hidden_RF).sum(axis=-1)
        d_gates_A = d_gates_A.at[block.assignment_R].set(d_gates_R, mode="drop")
        d_hidden_RF = gates_R1 * d_hidden_RF
        if ema_weight_A is not None:
            ema_weight_R1 = take_or_zeros(ema_weight_A, block.assignment_R)[:, None]
            g_sum_D = g_sums_MD[block.expert].astype(x_TD.dtype)
            d_hidden_RF += ema_weight_R1 * jnp.matmul(g_sum_D, w.down.T, preferred_element_type=jnp.float32)
        d_gate_RF, d_up_RF = (d.astype(x_TD.dtype) for d in swiglu_gradients(gate_RF, up_RF, d_hidden_RF))
        d_x_RD = d_gate_RF @ w.gate.T + d_up_RF @ w.up.T
        d_x_TD = d_x_TD.at[token_R].add(d_x_RD.astype(jnp.float32), mode="drop")
        factors = (x_RD, d_gate_RF), (x_RD, d_up_RF), ((gates_R1 * hidden_RF).astype(x_TD.dtype), g_RD)
        more = [jnp.matmul(a.T, b, preferred_element_type=jnp.float32) for a, b in factors]
        if ema_weight_A is not None:
            more[2] += jnp.outer((ema_weight_R1 * hidden_RF).sum(axis=0), g_sum_D.astype(jnp.float32))
        d_params = jax.tree.map(lambda sum_, one: sum_.at[block.expert].add(one), d_params, ExpertParams(*more))
        return d_x_TD, d_gates_A, d_params

    start = (
        _zeros(x_TD.shape, layout, 1),
        _zeros(gates_A.shape, layout, 1),
        ExpertParams(*(_zeros(w.shape, layout, index) for index, w in enumerate(params))),
    )
    d_x_TD, d_gates_A, d_params = _over_blocks(one_block, start, params, layout, rows)
    d_params = jax.tree.map(lambda d, w: d.astype(w.dtype), d_params, params)
    return d_x_TD.astype(x_TD.dtype), d_gates_A.reshape(gates_TK.shape), None, d_params, None


block_experts.defvjp(_forward, _backward)


def block_output_products(x_TD: Array, g_TD: Array, params: ExpertParams, layout: Layout, rows: int) -> Array:
    """float32 [T, K], <g_t, E_i(x_t)> of each assignment. Arguments as `block_experts` has them."""
    num_choices = layout.slot_TK.shape[1]

    def one_block(w: ExpertParams, block: _Block, products_A: Array) -> Array:
        token_R = block.assignment_R // num_choices
        x_RD, g_RD = take_or_zeros(x_TD, token_R), take_or_zeros(g_TD, token_R).astype(x_TD.dtype)
        hidden_RF = swiglu_hidden(x_RD @ w.gate, x_RD @ w.up)
        g_hidden_RF = jnp.matmul(g_RD, w.down.T, preferred_element_type=jnp.float32)
        return products_A.at[block.assignment_R].set((g_hidden_RF * hidden_RF).sum(axis=-1), mode="drop")

    products_A = _over_blocks(one_block, _zeros((layout.slot_TK.size,), layout, 0), params, layout, rows)
    return products_A.reshape(layout.slot_TK.shape)


def block_row_experts(x_QD: Array, params: ExpertParams, group_sizes_M: Array, rows: int) -> Array:
    """Apply the expert of each row's group to it: [Q, D], in the dtype of `x_QD`.

    To `block_experts` every row is a token that lies in its slot already.
    """
    slot_Q = jnp.arange(len(x_QD), dtype=jnp.int32)
    expert_Q = jnp.searchsorted(jnp.cumsum(group_sizes_M), slot_Q, side="right").astype(jnp.int32)
    layout = Layout(slot_Q, slot_Q[:, None], expert_Q[:, None], group_sizes_M)
    gates_Q1 = jnp.ones_like(x_QD, jnp.float32, shape=(len(x_QD), 1))
    out_QD, _ = block_experts(x_QD, gates_Q1, None, params, layout, rows)
    return out_QD.astype(x_QD.dtype)


class _Block(NamedTuple):
    """Some rows of one expert.

    expert: int32, which.
    first: int32, the first row's place among those of all experts.
    assignment_R: int32, the assignment of each row, T K past the expert's last.
    """

    expert: Array
    first: Array
    assignment_R: Array


def _over_blocks(one_block: Callable, carry: Any, params: ExpertParams, layout: Layout, rows: int) -> Any:
    """Carry through `one_block(w, block, carry)` for each block of each expert, in ascending order; w: its params."""
    sizes_M = layout.group_sizes_M
    start_M = jnp.cumsum(sizes_M) - sizes_M
    used_M = jnp.nonzero(sizes_M, size=sizes_M.shape[0], fill_value=0)[0]
    few = tail_rows(rows)

    def one_expert(index: Array, carry: Any) -> Any:
        expert = used_M[index]
        size, start = sizes_M[expert], start_M[expert]
        w = jax.tree.map(lambda a: a[expert], params)

        def blocks(begin: Array, rows: int, count: Array, carry: Any) -> Any:
            def turn(index: Array, carry: Any) -> Any:
                first = begin + index * rows
                row_R = first + jnp.arange(rows)
                assignment_R = layout.assignment_S.at[start + row_R].get(mode="clip")
                assignment_R = jnp.where(row_R < size, assignment_R, layout.slot_TK.size)
                return one_block(w, _Block(expert, start + first, assignment_R), carry)

            return jax.lax.fori_loop(0, count, turn, carry)

        # More than six small blocks would cost more than a large one that is padded.
        large = size // rows + (size % rows > 3 * rows // 4)
        rest = jnp.maximum(size - large * rows, 0)
        carry = blocks(jnp.zeros_like(size), rows, large, carry)
        return blocks(large * rows, few, -(-rest // few), carry)

    return jax.lax.fori_loop(0, (sizes_M > 0).sum(), one_expert, carry)


def _rows_from(a: Array, first: Array, rows: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(a, first, rows)


def _put(a: Array, rows: Array, first: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(a, rows, first, axis=0)


def _zeros(shape: Sequence[int], layout: Layout, index: int) -> Array:
    return jnp.broadcast_to(jnp.minimum(_unknown(layout, index), 0).astype(jnp.float32), shape)


def _unset(shape: Sequence[int], dtype: Any, layout: Layout, index: int) -> Array:
    """An array to be overwritten. On a CPU `jax.lax.empty` would give known zeros, see below."""
    return jnp.broadcast_to(_unknown(layout, index).astype(dtype), shape)


def _unknown(layout: Layout, index: int) -> Array:
    """A number >= 0 that XLA does not know, another one for each index.

    What loops carry is made of these, for two reasons. Of arrays of one shape and one known value, XLA makes one, keeps
    it, and copies it for each use. And these vary over the mesh axes over which the layout varies, as `shard_map` asks.
    """
    return layout.group_sizes_M[0] + index
