"""SwiGLU experts in blocks of one expert's rows, each block a few plain matrix products. See `routing.py` for the key.

Two loops, over the experts that have rows and over the blocks of each: as many turns as there is work, so the cost
follows the load, however unbalanced, and no row is dropped. A block of R rows gathers its tokens, and adds its weighted
outputs to them, while it is in the cache: permuted copies of the tokens, the outputs or their gradients, [T K, D] each,
never exist. Only x @ gate and x @ up, [T K, F] each, are kept for the backward pass.

In numbers read and written (with P = T K): the forward pass reads P D of x, reads and writes P D of y and writes 2 P F;
the backward pass reads P D of x and of g, reads and writes P D of x's gradient and reads 2 P F. Any implementation that
keeps these two products moves as much but for y and x's gradient, of which it must write T D. The weights and their
gradients are read and written once; an expert's last block is padded to R rows.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from default_moe.routing import Layout, take_or_zeros
from default_moe.swiglu import EXPERT_PRODUCT, ExpertWeights, swiglu_hidden


def block_rows(num_assignments: int, num_experts: int, largest: int) -> int:
    """R: about half of the mean load and a tenth more, so that most experts need two blocks, but at most `largest`."""
    rows = 0.55 * num_assignments / num_experts
    return max(8, min(largest, -(-int(rows) // 8) * 8))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def block_experts(
    x_TD: Array,
    weight_TK: Array,
    counted_TK: Array | None,
    weights: ExpertWeights,
    layout: Layout,
    rows: int,
) -> tuple[Array, Array | None]:
    """Weighted sum of each token's experts, and per expert the sum of its outputs weighted by `counted_TK`.

    Args:
      x_TD: tokens in the compute dtype.
      weight_TK: float32, weight of each assignment in the output. It gets a gradient: <g_t, E_i(x_t)>.
      counted_TK: float32, weight of each assignment in the sums. None: no sums.
      weights: of the M experts held here, in the compute dtype.
      layout: of the assignments, with align = 1.
      rows: R.

    Returns:
      y, float32 [T, D], and the sums, float32 [M, D] or None, which carry no gradient.
    """
    return _forward(x_TD, weight_TK, counted_TK, weights, layout, rows)[0]


def _forward(
    x_TD: Array,
    weight_TK: Array,
    counted_TK: Array | None,
    weights: ExpertWeights,
    layout: Layout,
    rows: int,
) -> tuple:
    num_choices = weight_TK.shape[1]
    weight_A = weight_TK.reshape(-1)
    counted_A = None if counted_TK is None else counted_TK.reshape(-1)

    def one_block(w: ExpertWeights, first: Array, assignment_R: Array, carry: tuple) -> tuple:
        y_TD, gate_SF, up_SF, sum_D = carry
        token_R = assignment_R // num_choices
        x_RD = take_or_zeros(x_TD, token_R)
        gate_RF, up_RF = x_RD @ w.gate, x_RD @ w.up
        out_RD = swiglu_hidden(gate_RF, up_RF).astype(x_TD.dtype) @ w.down
        weighted_RD = take_or_zeros(weight_A, assignment_R)[:, None] * out_RD.astype(jnp.float32)
        y_TD = y_TD.at[token_R].add(weighted_RD, mode="drop")
        if counted_A is not None:
            counted_R = take_or_zeros(counted_A, assignment_R).astype(out_RD.dtype)
            sum_D += jnp.matmul(counted_R, out_RD, preferred_element_type=jnp.float32)
        return y_TD, _put(gate_SF, gate_RF, first), _put(up_SF, up_RF, first), sum_D

    def one_expert(expert: Array, blocks: Callable, carry: tuple) -> tuple:
        *rest, sums_MD = carry
        w = jax.tree.map(lambda a: a[expert], weights)
        *rest, sum_D = blocks(functools.partial(one_block, w), (*rest, jnp.zeros_like(sums_MD[0])))
        return *rest, sums_MD.at[expert].set(sum_D)

    (num_tokens, dim), (num_experts, _, hidden_dim) = x_TD.shape, weights.gate.shape
    # A block's rows past its expert's last are overwritten by the next expert's; only the very last need room.
    num_slots = layout.assignment_S.shape[0] + rows
    start = (
        _zeros(layout, (num_tokens, dim), jnp.float32),
        _zeros(layout, (num_slots, hidden_dim), x_TD.dtype),
        _zeros(layout, (num_slots, hidden_dim), x_TD.dtype),
        _zeros(layout, (num_experts, dim), jnp.float32),
    )
    y_TD, gate_SF, up_SF, sums_MD = _over_blocks(one_expert, start, layout, rows)
    gate_SF, up_SF = (checkpoint_name(a, EXPERT_PRODUCT) for a in (gate_SF, up_SF))
    return (y_TD, None if counted_TK is None else sums_MD), (x_TD, weight_TK, weights, layout, gate_SF, up_SF)


def _backward(rows: int, residuals: tuple, cotangents: tuple) -> tuple:
    x_TD, weight_TK, weights, layout, gate_SF, up_SF = residuals
    g_TD, _ = cotangents
    num_choices = weight_TK.shape[1]
    weight_A = weight_TK.reshape(-1)

    def one_block(w: ExpertWeights, first: Array, assignment_R: Array, carry: tuple) -> tuple:
        d_x_TD, d_weight_A, d_w = carry
        token_R = assignment_R // num_choices
        x_RD, g_RD = take_or_zeros(x_TD, token_R), take_or_zeros(g_TD, token_R).astype(x_TD.dtype)
        weight_R1 = take_or_zeros(weight_A, assignment_R)[:, None]
        gate_RF, up_RF = (_rows_from(a, first, rows).astype(jnp.float32) for a in (gate_SF, up_SF))
        hidden_RF = swiglu_hidden(gate_RF, up_RF)
        d_hidden_RF = jnp.matmul(g_RD, w.down.T, preferred_element_type=jnp.float32)
        # <g, E(x)> = <g, hidden @ down> = <g @ down^T, hidden>: the output is not needed.
        d_weight_A = d_weight_A.at[assignment_R].set((d_hidden_RF * hidden_RF).sum(axis=-1), mode="drop")
        sigmoid_RF = jax.nn.sigmoid(gate_RF)
        d_up_RF = weight_R1 * d_hidden_RF * gate_RF * sigmoid_RF
        d_gate_RF = weight_R1 * d_hidden_RF * up_RF * sigmoid_RF * (1 + gate_RF * (1 - sigmoid_RF))
        d_gate_RF, d_up_RF = d_gate_RF.astype(x_TD.dtype), d_up_RF.astype(x_TD.dtype)
        d_x_RD = d_gate_RF @ w.gate.T + d_up_RF @ w.up.T
        d_x_TD = d_x_TD.at[token_R].add(d_x_RD.astype(jnp.float32), mode="drop")
        factors = (x_RD, d_gate_RF), (x_RD, d_up_RF), ((weight_R1 * hidden_RF).astype(x_TD.dtype), g_RD)
        more = (jnp.matmul(a.T, b, preferred_element_type=jnp.float32) for a, b in factors)
        return d_x_TD, d_weight_A, ExpertWeights(*map(jnp.add, d_w, more))

    def one_expert(expert: Array, blocks: Callable, carry: tuple) -> tuple:
        *rest, d_weights = carry
        w = jax.tree.map(lambda a: a[expert], weights)
        zeros = jax.tree.map(lambda a: _zeros(layout, a.shape, jnp.float32), w)
        *rest, d_w = blocks(functools.partial(one_block, w), (*rest, zeros))
        return *rest, jax.tree.map(lambda all_, one: all_.at[expert].set(one.astype(all_.dtype)), d_weights, d_w)

    start = (
        _zeros(layout, x_TD.shape, jnp.float32),
        _zeros(layout, weight_A.shape, jnp.float32),
        jax.tree.map(lambda w: _zeros(layout, w.shape, w.dtype), weights),
    )
    d_x_TD, d_weight_A, d_weights = _over_blocks(one_expert, start, layout, rows)
    return d_x_TD.astype(x_TD.dtype), d_weight_A.reshape(weight_TK.shape), None, d_weights, None


block_experts.defvjp(_forward, _backward)


def _over_blocks(one_expert: Callable, carry: tuple, layout: Layout, rows: int) -> tuple:
    """Carry through `one_expert(expert, blocks, carry)` for each expert that has rows, in ascending order.

    There, `blocks(one_block, carry)` carries through `one_block(first, assignment_R, carry)` for each block of the
    expert's rows: `first` is that of the block among all rows, and an assignment past the expert's last is T K.
    """
    sizes_M = layout.group_sizes_M
    start_M = jnp.cumsum(sizes_M) - sizes_M
    used_M = jnp.nonzero(sizes_M, size=sizes_M.shape[0], fill_value=0)[0]

    def turn(index: Array, carry: tuple) -> tuple:
        expert = used_M[index]

        def blocks(one_block: Callable, carry: tuple) -> tuple:
            def block(index: Array, carry: tuple) -> tuple:
                row_R = index * rows + jnp.arange(rows)
                assignment_R = layout.assignment_S.at[start_M[expert] + row_R].get(mode="clip")
                assignment_R = jnp.where(row_R < sizes_M[expert], assignment_R, layout.slot_TK.size)
                return one_block(start_M[expert] + index * rows, assignment_R, carry)

            return jax.lax.fori_loop(0, -(-sizes_M[expert] // rows), block, carry)

        return one_expert(expert, blocks, carry)

    return jax.lax.fori_loop(0, (sizes_M > 0).sum(), turn, carry)


def _rows_from(a: Array, first: Array, rows: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(a, first, rows)


def _put(a: Array, rows: Array, first: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(a, rows, first, axis=0)


def _zeros(layout: Layout, shape: Sequence[int], dtype: Any) -> Array:
    """Zeros that vary over the mesh axes over which the layout varies, as `shard_map` wants of what loops carry."""
    return jnp.zeros(shape, dtype) + (0 * layout.group_sizes_M[0]).astype(dtype)
