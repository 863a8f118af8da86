"""Experts run for tokens that did not choose them, forward only: see `methods.Samples`."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from default_moe.moe.default_vectors import SampledOutputs
from default_moe.moe.experts.backends import lay_out, run_rows
from default_moe.moe.experts.layout import dispatch, sum_choices
from default_moe.moe.experts.swiglu import EXPERT_PRODUCT, ExpertParams


def sampled_tokens(position_BP: Array, length: int) -> Array:
    """int32 [B P], which of all T = B L tokens each is."""
    return (jnp.arange(len(position_BP))[:, None] * length + position_BP).reshape(-1)


def sampled_outputs(
    x_TD: Array,
    token_P: Array,
    expert_P: Array,
    factor: Array,
    params: ExpertParams,
    num_experts: int,
    backend: str,
) -> SampledOutputs:
    """Run them.

    Args:
      x_TD: tokens in the compute dtype.
      token_P, expert_P, factor: as in `SampledOutputs`; any number that is none of an expert held here for none.
      params: of the M experts held here.
      num_experts: N, over which the samples spread.
    """
    x_TD, params = jax.lax.stop_gradient((x_TD, params))
    layout = lay_out(expert_P[:, None], len(params.gate), backend)
    rows_SD = dispatch(x_TD[token_P], layout)
    out_SD = run_rows(rows_SD, params, layout.group_sizes_M, len(token_P), num_experts, backend)
    out_PD = checkpoint_name(sum_choices(out_SD, layout, None), EXPERT_PRODUCT)
    return SampledOutputs(out_PD, token_P, layout.expert_TK[:, 0], factor)
