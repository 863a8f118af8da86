"""SwiGLU experts as grouped matrix products over rows sorted by expert. See `routing.py` for the dimension key.

In numbers read and written, with P slots (T K, and the padding of groups), beside the weights and their gradients:

  forward                      reads  writes    backward                              reads       writes
  dispatch x                   PD     PD        gather g, weigh it, <g, E(x)>         2PD         PD
  gate and up products         2PD    2PF       gradients of hidden and of down       2PD + PF    PF
  silu(gate) * up              2PF    PF        gradients of gate and up products     3PF         2PF
  down product                 PF     PD        of x (twice) and of both weights      2PD + 4PF   2PD
  gather, weigh, add choices   PD     TD        add both, add choices                 3PD         PD + TD
  sums for default vectors     PD     -

The least possible, with gate and up kept, is TD read and 2PF + TD written forward, and as much again backward. That
takes kernels that gather rows and apply the activation to what is on the chip, as `block_experts.py` does in a CPU's
cache. The last line is all that Default MoE adds to top-k here: 1 / (6 + 6F / D) of what the forward pass moves, 4 % at
F = 2.75 D, of a layer that is bounded by arithmetic.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from default_moe.moe.experts.grouped_matmul import grouped_matmul
from default_moe.moe.experts.layout import Layout, dispatch, sum_choices, take_or_zeros
from default_moe.moe.experts.swiglu import EXPERT_PRODUCT, ExpertWeights, swiglu_hidden


def sorted_experts(
    x_TD: Array,
    weight_TK: Array,
    counted_TK: Array | None,
    weights: ExpertWeights,
    layout: Layout,
    align: int,
    backend: str,
    sums_gradient: bool = False,
) -> tuple[Array, Array | None]:
    """What `block_experts` gives, which says what arguments and results are.

    align: of the layout.  backend: one of `grouped_matmul`.
    """
    out_SD = row_experts(dispatch(x_TD, layout), weights, layout.group_sizes_M, backend)
    sums_MD = None if counted_TK is None else counted_sums(out_SD, counted_TK, layout, align, sums_gradient)
    return weigh(out_SD, weight_TK, layout), sums_MD


def row_experts(x_SD: Array, weights: ExpertWeights, group_sizes_M: Array, backend: str) -> Array:
    """The expert of each row's group applied to it: [S, D], in the dtype of `x_SD`. Arguments as `grouped_matmul`'s."""

    def product(lhs_SD: Array, rhs_MDF: Array) -> Array:
        return checkpoint_name(grouped_matmul(lhs_SD, rhs_MDF, group_sizes_M, backend), EXPERT_PRODUCT)

    hidden_SF = swiglu_hidden(product(x_SD, weights.gate), product(x_SD, weights.up))
    return product(hidden_SF.astype(x_SD.dtype), weights.down)


def counted_sums(out_SD: Array, counted_TK: Array, layout: Layout, align: int, gradient: bool) -> Array:
    """Per expert the sum of its outputs, each weighted by `counted_TK`: float32 [M, D].

    gradient: whether it passes its gradient on to `out_SD`.
    """
    counted_S = take_or_zeros(counted_TK.reshape(-1), layout.assignment_S)
    out_SD = out_SD if gradient else jax.lax.stop_gradient(out_SD)
    return _group_sums(out_SD, counted_S, layout.group_sizes_M, align)


@jax.custom_vjp
def weigh(out_SD: Array, weight_TK: Array, layout: Layout) -> Array:
    """Each token's weighted sum of its experts' outputs, float32 [T, D]; an expert held elsewhere counts 0."""
    return sum_choices(out_SD, layout, weight_TK)


def _weigh_fwd(out_SD: Array, weight_TK: Array, layout: Layout) -> tuple:
    return weigh(out_SD, weight_TK, layout), (out_SD, weight_TK, layout)


def _weigh_bwd(residuals: tuple, g_TD: Array) -> tuple:
    out_SD, weight_TK, layout = residuals
    g_SD = take_or_zeros(g_TD, layout.assignment_S // weight_TK.shape[1])
    # <g_t, E_i(x_t)>, computed where the outputs lie and carried to [T, K] as scalars.
    d_weight_S = (g_SD * out_SD.astype(jnp.float32)).sum(axis=-1)
    weight_S1 = take_or_zeros(weight_TK.reshape(-1), layout.assignment_S)[:, None]
    return (weight_S1 * g_SD).astype(out_SD.dtype), take_or_zeros(d_weight_S, layout.slot_TK), None


weigh.defvjp(_weigh_fwd, _weigh_bwd)


def _group_sums(values_SD: Array, weights_S: Array, group_sizes_M: Array, align: int) -> Array:
    """Weighted sum of each group's rows, float32 [M, D]: first of each `align` rows, then of these."""
    num_slots, dim = values_SD.shape
    values_BCD = values_SD.reshape(num_slots // align, align, dim)
    weights_BC = weights_S.reshape(num_slots // align, align).astype(values_SD.dtype)
    sums_BD = jnp.einsum("bc,bcd->bd", weights_BC, values_BCD, preferred_element_type=jnp.float32)
    expert_B = jnp.searchsorted(jnp.cumsum(group_sizes_M), jnp.arange(0, num_slots, align), side="right")
    return jax.ops.segment_sum(sums_BD, expert_B, group_sizes_M.shape[0], indices_are_sorted=True)
