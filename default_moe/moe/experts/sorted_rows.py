"""SwiGLU experts as grouped matrix products over rows sorted by expert.

In numbers read and written, with P slots (T K, and the padding of groups), beside the weights and their gradients:

  forward                      reads  writes    backward                              reads       writes
  dispatch x                   PD     PD        gather g, weigh it, <g, E(x)>         2PD         PD
  gate and up products         2PD    2PF       gradients of hidden and of down       2PD + PF    PF
  silu(gate) * up              2PF    PF        gradients of gate and up products     3PF         2PF
  down product                 PF     PD        of x (twice) and of both weights      2PD + 4PF   2PD
  gather, weigh, add choices   PD     TD        add both, add choices                 3PD         PD + TD
  sums for default vectors     PD     -

The least possible, with gate and up kept, is TD read and 2PF + TD written forward, and as much again backward. That
takes kernels that gather rows and apply the activation to what is on the chip, as `blocks.py` does in a CPU's
cache. The last line is all that Default MoE adds to top-k here: 1 / (6 + 6F / D) of what the forward pass moves, 4 % at
F = 2.75 D, of a layer that is bounded by arithmetic.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from default_moe.moe.experts import hopper
from default_moe.moe.experts.grouped_matmul import grouped_matmul
from default_moe.moe.experts.layout import Layout, dispatch, sum_choices, take_or_zeros
from default_moe.moe.experts.swiglu import EXPERT_PRODUCT, ExpertParams, swiglu_hidden


def sorted_experts(
    x_TD: Array,
    gates_TK: Array,
    ema_weight_TK: Array | None,
    params: ExpertParams,
    layout: Layout,
    align: int,
    backend: str,
    expert_gradient: bool = False,
) -> tuple[Array, Array | None]:
    """What `block_experts` gives, which says what arguments and results are.

    align: of the layout.  backend: one of `grouped_matmul`.
    """
    out_SD = row_experts(dispatch(x_TD, layout), params, layout.group_sizes_M, backend)
    sums_MD = None if ema_weight_TK is None else ema_sums(out_SD, ema_weight_TK, layout, align, expert_gradient)
    return weigh(out_SD, gates_TK, layout), sums_MD


def row_experts(x_SD: Array, params: ExpertParams, group_sizes_M: Array, backend: str) -> Array:
    """The expert of each row's group applied to it: [S, D], in the dtype of `x_SD`. Arguments as `grouped_matmul`'s."""
    if backend == "hopper" and not hopper.unsupported(x_SD.dtype, params.gate.shape[1:]):
        return hopper.row_experts(x_SD, params, group_sizes_M)

    def product(lhs_SD: Array, rhs_MDF: Array) -> Array:
        return checkpoint_name(grouped_matmul(lhs_SD, rhs_MDF, group_sizes_M, backend), EXPERT_PRODUCT)

    hidden_SF = swiglu_hidden(product(x_SD, params.gate), product(x_SD, params.up))
    return product(hidden_SF.astype(x_SD.dtype), params.down)


def ema_sums(out_SD: Array, ema_weight_TK: Array, layout: Layout, align: int, gradient: bool) -> Array:
    """Per expert the sum of its outputs, each weighted by `ema_weight_TK`: float32 [M, D].

    gradient: whether it passes its gradient on to `out_SD`.
    """
    ema_weight_S = take_or_zeros(ema_weight_TK.reshape(-1), layout.assignment_S)
    out_SD = out_SD if gradient else jax.lax.stop_gradient(out_SD)
    return _group_sums(out_SD, ema_weight_S, layout.group_sizes_M, align)


@jax.custom_vjp
def weigh(out_SD: Array, gates_TK: Array, layout: Layout) -> Array:
    """Each token's weighted sum of its experts' outputs, float32 [T, D]; an expert held elsewhere counts 0."""
    return sum_choices(out_SD, layout, gates_TK)


def _weigh_fwd(out_SD: Array, gates_TK: Array, layout: Layout) -> tuple:
    return weigh(out_SD, gates_TK, layout), (out_SD, gates_TK, layout)


def _weigh_bwd(residuals: tuple, g_TD: Array) -> tuple:
    out_SD, gates_TK, layout = residuals
    g_SD = take_or_zeros(g_TD, layout.assignment_S // gates_TK.shape[1])
    # <g_t, E_i(x_t)>, computed where the outputs lie and carried to [T, K] as scalars.
    d_gates_S = (g_SD * out_SD.astype(jnp.float32)).sum(axis=-1)
    gates_S1 = take_or_zeros(gates_TK.reshape(-1), layout.assignment_S)[:, None]
    return (gates_S1 * g_SD).astype(out_SD.dtype), take_or_zeros(d_gates_S, layout.slot_TK), None


weigh.defvjp(_weigh_fwd, _weigh_bwd)


def _group_sums(values_SD: Array, weights_S: Array, group_sizes_M: Array, align: int) -> Array:
    """Weighted sum of each group's rows, float32 [M, D]: first of each `align` rows, then of these."""
    num_slots, dim = values_SD.shape
    values_JRD = values_SD.reshape(num_slots // align, align, dim)
    weights_JR = weights_S.reshape(num_slots // align, align).astype(values_SD.dtype)
    sums_JD = jnp.einsum("jr,jrd->jd", weights_JR, values_JRD, preferred_element_type=jnp.float32)
    expert_J = jnp.searchsorted(jnp.cumsum(group_sizes_M), jnp.arange(0, num_slots, align), side="right")
    return jax.ops.segment_sum(sums_JD, expert_J, group_sizes_M.shape[0], indices_are_sorted=True)
