"""SwiGLU experts in blocks of one expert's rows, each block a few plain matrix products. See `routing.py` for the key.

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
from default_moe.moe.experts.swiglu import EXPERT_PRODUCT, ExpertWeights, swiglu_gradients, swiglu_hidden


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
    weight_TK: Array,
    counted_TK: Array | None,
    weights: ExpertWeights,
    layout: Layout,
    rows: int,
    sums_gradient: bool = False,
) -> tuple[Array, Array | None]:
    """Weighted sum of each token's experts, and per expert the sum of its outputs weighted by `counted_TK`.

    Args:
      x_TD: tokens in the compute dtype.
      weight_TK: float32, weight of each assignment in the output. It gets a gradient: <g_t, E_i(x_t)>.
      counted_TK: float32, weight of each assignment in the sums. None: no sums.
      weights: of the M experts held here, in the compute dtype.
      layout: of the assignments, with align = 1.
      rows: R.
      sums_gradient: whether the sums pass their gradient on to the experts (to their outputs, not to `counted_TK`).

    Returns:
      y, float32 [T, D], and the sums, float32 [M, D] or None.
    """
    return _forward(x_TD, weight_TK, counted_TK, weights, layout, rows, sums_gradient)[0]


def _forward(
    x_TD: Array,
    weight_TK: Array,
    counted_TK: Array | None,
    weights: ExpertWeights,
    layout: Layout,
    rows: int,
    sums_gradient: bool,
) -> tuple:
    num_choices = weight_TK.shape[1]
    weight_A = weight_TK.reshape(-1)
    counted_A = None if counted_TK is None else counted_TK.reshape(-1)

    def one_block(w: ExpertWeights, block: _Block, carry: tuple) -> tuple:
        y_TD, gate_SF, up_SF, sums_MD = carry
        token_R = block.assignment_R // num_choices
        x_RD = take_or_zeros(x_TD, token_R)
        gate_RF, up_RF = x_RD @ w.gate, x_RD @ w.up
        out_RD = swiglu_hidden(gate_RF, up_RF).astype(x_TD.dtype) @ w.down
        weighted_RD = take_or_zeros(weight_A, block.assignment_R)[:, None] * out_RD.astype(jnp.float32)
        y_TD = y_TD.at[token_R].add(weighted_RD, mode="drop")
        if counted_A is not None:
            counted_R = take_or_zeros(counted_A, block.assignment_R).astype(out_RD.dtype)
            sum_D = jnp.matmul(counted_R, out_RD, preferred_element_type=jnp.float32)
            sums_MD = sums_MD.at[block.expert].add(sum_D)
        return y_TD, _put(gate_SF, gate_RF, block.first), _put(up_SF, up_RF, block.first), sums_MD

    (num_tokens, dim), (num_experts, _, hidden_dim) = x_TD.shape, weights.gate.shape
    # A block's rows past its expert's last are overwritten by the next expert's; only the very last need room.
    num_slots = layout.assignment_S.shape[0] + rows
    start = (
        _zeros((num_tokens, dim), layout, 0),
        _unset((num_slots, hidden_dim), x_TD.dtype, layout, 0),
        _unset((num_slots, hidden_dim), x_TD.dtype, layout, 1),
        _zeros((num_experts, dim), layout, 0),
    )
    y_TD, gate_SF, up_SF, sums_MD = _over_blocks(one_block, start, weights, layout, rows)
    gate_SF, up_SF = (checkpoint_name(a, EXPERT_PRODUCT) for a in (gate_SF, up_SF))
    counted_A = counted_A if sums_gradient else None
    residuals = x_TD, weight_TK, counted_A, weights, layout, gate_SF, up_SF
    return (y_TD, None if counted_TK is None else sums_MD), residuals


def _backward(rows: int, sums_gradient: bool, residuals: tuple, cotangents: tuple) -> tuple:
    x_TD, weight_TK, counted_A, weights, layout, gate_SF, up_SF = residuals
    g_TD, g_sums_MD = cotangents
    num_choices = weight_TK.shape[1]
    weight_A = weight_TK.reshape(-1)

    def one_block(w: ExpertWeights, block: _Block, carry: tuple) -> tuple:
        d_x_TD, d_weight_A, d_weights = carry
        token_R = block.assignment_R // num_choices
        x_RD, g_RD = take_or_zeros(x_TD, token_R), take_or_zeros(g_TD, token_R).astype(x_TD.dtype)
        weight_R1 = take_or_zeros(weight_A, block.assignment_R)[:, None]
        gate_RF, up_RF = (_rows_from(a, block.first, len(token_R)).astype(jnp.float32) for a in (gate_SF, up_SF))
        hidden_RF = swiglu_hidden(gate_RF, up_RF)
        d_hidden_RF = jnp.matmul(g_RD, w.down.T, preferred_element_type=jnp.float32)
        # <g, E(x)> = <g, hidden @ down> = <g @ down^T, hidden>: the output is not needed.
        d_weight_R = (d_hidden_RF * hidden_RF).sum(axis=-1)
        d_weight_A = d_weight_A.at[block.assignment_R].set(d_weight_R, mode="drop")
        d_hidden_RF = weight_R1 * d_hidden_RF
        if counted_A is not None:
            counted_R1 = take_or_zeros(counted_A, block.assignment_R)[:, None]
            g_sum_D = g_sums_MD[block.expert].astype(x_TD.dtype)
            d_hidden_RF += counted_R1 * jnp.matmul(g_sum_D, w.down.T, preferred_element_type=jnp.float32)
        d_gate_RF, d_up_RF = (d.astype(x_TD.dtype) for d in swiglu_gradients(gate_RF, up_RF, d_hidden_RF))
        d_x_RD = d_gate_RF @ w.gate.T + d_up_RF @ w.up.T
        d_x_TD = d_x_TD.at[token_R].add(d_x_RD.astype(jnp.float32), mode="drop")
        factors = (x_RD, d_gate_RF), (x_RD, d_up_RF), ((weight_R1 * hidden_RF).astype(x_TD.dtype), g_RD)
        more = [jnp.matmul(a.T, b, preferred_element_type=jnp.float32) for a, b in factors]
        if counted_A is not None:
            more[2] += jnp.outer((counted_R1 * hidden_RF).sum(axis=0), g_sum_D.astype(jnp.float32))
        d_weights = jax.tree.map(lambda sum_, one: sum_.at[block.expert].add(one), d_weights, ExpertWeights(*more))
        return d_x_TD, d_weight_A, d_weights

    start = (
        _zeros(x_TD.shape, layout, 1),
        _zeros(weight_A.shape, layout, 1),
        ExpertWeights(*(_zeros(w.shape, layout, index) for index, w in enumerate(weights))),
    )
    d_x_TD, d_weight_A, d_weights = _over_blocks(one_block, start, weights, layout, rows)
    d_weights = jax.tree.map(lambda d, w: d.astype(w.dtype), d_weights, weights)
    return d_x_TD.astype(x_TD.dtype), d_weight_A.reshape(weight_TK.shape), None, d_weights, None


block_experts.defvjp(_forward, _backward)


def block_output_products(x_TD: Array, g_TD: Array, weights: ExpertWeights, layout: Layout, rows: int) -> Array:
    """float32 [T, K], <g_t, E_i(x_t)> of each assignment. Arguments as `block_experts` has them."""
    num_choices = layout.slot_TK.shape[1]

    def one_block(w: ExpertWeights, block: _Block, products_A: Array) -> Array:
        token_R = block.assignment_R // num_choices
        x_RD, g_RD = take_or_zeros(x_TD, token_R), take_or_zeros(g_TD, token_R).astype(x_TD.dtype)
        hidden_RF = swiglu_hidden(x_RD @ w.gate, x_RD @ w.up)
        g_hidden_RF = jnp.matmul(g_RD, w.down.T, preferred_element_type=jnp.float32)
        return products_A.at[block.assignment_R].set((g_hidden_RF * hidden_RF).sum(axis=-1), mode="drop")

    products_A = _over_blocks(one_block, _zeros((layout.slot_TK.size,), layout, 0), weights, layout, rows)
    return products_A.reshape(layout.slot_TK.shape)


class _Block(NamedTuple):
    """Some rows of one expert.

    expert: int32, which.
    first: int32, the first row's place among those of all experts.
    assignment_R: int32, the assignment of each row, T K past the expert's last.
    """

    expert: Array
    first: Array
    assignment_R: Array


def _over_blocks(one_block: Callable, carry: Any, weights: ExpertWeights, layout: Layout, rows: int) -> Any:
    """Carry through `one_block(w, block, carry)` for each block of each expert, in ascending order; w: its weights."""
    sizes_M = layout.group_sizes_M
    start_M = jnp.cumsum(sizes_M) - sizes_M
    used_M = jnp.nonzero(sizes_M, size=sizes_M.shape[0], fill_value=0)[0]
    few = tail_rows(rows)

    def one_expert(index: Array, carry: Any) -> Any:
        expert = used_M[index]
        size, start = sizes_M[expert], start_M[expert]
        w = jax.tree.map(lambda a: a[expert], weights)

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
