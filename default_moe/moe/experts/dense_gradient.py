"""The router's gradient for experts that did not run, computed exactly.

The gate w_ti of an expert that contributes nothing to the output still has a gradient, <dL/dy_t, E_i(x_t)>. It takes
the outputs of all such experts, but not in the forward pass, and no gradient of theirs: the backward pass runs them
forward, multiplies their outputs with dL/dy where they are, and keeps only the scalars.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from default_moe.moe.experts.backends import lay_out, output_products
from default_moe.moe.experts.layout import choice_values
from default_moe.moe.experts.swiglu import ExpertParams


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def experts_for_gradient(
    x_TD: Array, gates_TM: Array, expert_TC: Array, params: ExpertParams, num_experts: int, backend: str
) -> Array:
    """Return zeros, float32 [T, D], whose gradient for the gate of each of the experts `expert_TC` is <g_t, E_i(x_t)>.

    Args:
      x_TD: tokens in the compute dtype.
      gates_TM: float32, of the experts held here, in the layer's output.
      expert_TC: int32, the experts in question among those held here; others are passed over.
      params: of the M experts held here, in the compute dtype.
      num_experts: N, over which the C choices of a token spread.
      backend: see `backends.py`.
    """
    return jnp.zeros_like(x_TD, jnp.float32)


def _forward(
    x_TD: Array, gates_TM: Array, expert_TC: Array, params: ExpertParams, num_experts: int, backend: str
) -> tuple:
    y_TD = experts_for_gradient(x_TD, gates_TM, expert_TC, params, num_experts, backend)
    return y_TD, (x_TD, gates_TM, expert_TC, params)


def _backward(num_experts: int, backend: str, residuals: tuple, g_TD: Array) -> tuple:
    x_TD, gates_TM, expert_TC, params = residuals
    layout = lay_out(expert_TC, gates_TM.shape[1], backend)
    products_TC = output_products(x_TD, g_TD, params, layout, num_experts, backend)
    _, to_gates = jax.vjp(lambda gates_TM: choice_values(gates_TM, layout.expert_TK), gates_TM)
    return None, *to_gates(products_TC), None, None


experts_for_gradient.defvjp(_forward, _backward)
