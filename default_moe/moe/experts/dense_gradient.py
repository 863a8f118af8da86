"""The router's gradient for experts that did not run, computed exactly. See `routing.py` for the dimension key.

The weight w_ti of an expert that contributes nothing to the output still has a gradient, <dL/dy_t, E_i(x_t)>. It takes
the outputs of all such experts, but not in the forward pass, and no gradient of theirs: the backward pass runs them
forward, multiplies their outputs with dL/dy where they are, and keeps the scalars alone.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from default_moe.moe.experts.backends import group_alignment, largest_block, slots_multiple
from default_moe.moe.experts.blocks import block_output_products, block_rows
from default_moe.moe.experts.layout import choice_weights, dispatch, group_by_expert, take_or_zeros
from default_moe.moe.experts.sorted_rows import row_experts
from default_moe.moe.experts.swiglu import ExpertWeights


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def experts_for_gradient(
    x_TD: Array, weights_TM: Array, expert_TC: Array, weights: ExpertWeights, num_experts: int, backend: str
) -> Array:
    """Zeros, float32 [T, D], of which each weight of the experts `expert_TC` has the gradient <g_t, E_i(x_t)>.

    Args:
      x_TD: tokens in the compute dtype.
      weights_TM: float32, of the experts held here, in the layer's output.
      expert_TC: int32, the experts in question among those held here; others are passed over.
      weights: of the M experts held here, in the compute dtype.
      num_experts: N, over which the C choices of a token spread.
      backend: see `grouped_matmul.py`.
    """
    return jnp.zeros_like(x_TD, jnp.float32)


def _forward(
    x_TD: Array, weights_TM: Array, expert_TC: Array, weights: ExpertWeights, num_experts: int, backend: str
) -> tuple:
    y_TD = experts_for_gradient(x_TD, weights_TM, expert_TC, weights, num_experts, backend)
    return y_TD, (x_TD, weights_TM, expert_TC, weights)


def _backward(num_experts: int, backend: str, residuals: tuple, g_TD: Array) -> tuple:
    x_TD, weights_TM, expert_TC, weights = residuals
    layout = group_by_expert(expert_TC, weights_TM.shape[1], group_alignment(backend), slots_multiple(backend))
    if backend == "blocks":
        rows = block_rows(expert_TC.size, num_experts, largest_block())
        products_TC = block_output_products(x_TD, g_TD, weights, layout, rows)
    else:
        out_SD = row_experts(dispatch(x_TD, layout), weights, layout.group_sizes_M, backend)
        g_SD = take_or_zeros(g_TD, layout.assignment_S // expert_TC.shape[1])
        products_TC = take_or_zeros((g_SD * out_SD.astype(jnp.float32)).sum(axis=-1), layout.slot_TK)
    _, to_weights = jax.vjp(lambda w_TM: choice_weights(w_TM, layout.expert_TK), weights_TM)
    return None, *to_weights(products_TC), None, None


experts_for_gradient.defvjp(_forward, _backward)
