"""Default vectors: what an expert that did not run contributes (arXiv:2504.12463, section 3).

Each expert i of each layer has a default vector E^_i in R^D, the exponential moving average of its outputs. In the
forward pass it may stand in for the inactive expert; in the backward pass it always gives the router a gradient for
it. See `routing.py` for the dimension key.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from default_moe.routing import Layout, sum_choices


def update_ema(ema_MD: Array, sum_MD: Array, weight_M: Array, decay: float) -> Array:
    """One step of the moving average (eq. 10): E^ <- decay E^ + (1 - decay) sum / weight.

    Args:
      ema_MD: float32, the default vectors.
      sum_MD: float32, sum over the global batch's tokens that chose each expert of (weight times) its output.
      weight_M: float32, sum of those weights. An expert with weight 0 had no token and keeps its vector.
      decay: beta, in [0, 1].
    """
    seen = (weight_M > 0)[:, None]
    mean_MD = sum_MD / jnp.where(seen, weight_M[:, None], 1.0)
    return jnp.where(seen, decay * ema_MD + (1 - decay) * mean_MD, ema_MD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def combine(probs_TM: Array, out_SD: Array, ema_MD: Array | None, layout: Layout, substitute: str) -> Array:
    """Weigh and sum expert outputs per token, with a dense gradient for the router.

    With A_t the active experts of token t:
      y_t = sum_{i in A_t} p_ti E_i(x_t)  [+ sum_{i not in A_t} p_ti E^_i]      (eq. 2 [eq. 11])
      dy_t/dp_ti = E_i(x_t) for i in A_t, E^_i otherwise                        (eq. 8)
    No gradient flows into E^. Beyond plain top-k it costs one [T, M] x [M, D] product in each direction.

    Args:
      probs_TM: float32, router probabilities of the experts held here, not renormalised.
      out_SD: expert outputs in the slots of `layout`.
      ema_MD: float32, default vectors; None for a plain top-k layer, whose router learns from active experts alone.
      layout: of the tokens, from `group_by_expert`.
      substitute: "forward" includes the bracketed term in y, "backward" only its gradient.

    Returns:
      float32 [T, D], summed over the experts held here.
    """
    y_TD = sum_choices(out_SD, layout, _active_weights(probs_TM, layout))
    if ema_MD is not None and substitute == "forward":
        y_TD += _matmul(_inactive(probs_TM, layout), ema_MD, out_SD.dtype)
    return y_TD


def _combine_fwd(probs_TM: Array, out_SD: Array, ema_MD: Array | None, layout: Layout, substitute: str) -> tuple:
    return combine(probs_TM, out_SD, ema_MD, layout, substitute), (probs_TM, out_SD, ema_MD, layout)


def _combine_bwd(substitute: str, residuals: tuple, g_TD: Array) -> tuple:
    del substitute  # both variants share the gradient
    probs_TM, out_SD, ema_MD, layout = residuals
    num_tokens, num_choices = layout.slot_TK.shape
    weight_S = _active_weights(probs_TM, layout).reshape(-1).at[layout.assignment_S].get(mode="fill", fill_value=0)
    g_SD = g_TD.at[layout.assignment_S // num_choices].get(mode="fill", fill_value=0)
    # <g_t, E_i(x_t)> for the active experts, computed where the outputs lie and carried to [T, M] as scalars.
    dot_S = (g_SD * out_SD.astype(jnp.float32)).sum(axis=-1)
    d_active_TK = dot_S.at[layout.slot_TK].get(mode="fill", fill_value=0)
    token_T1 = jnp.arange(num_tokens)[:, None]
    d_probs_TM = jnp.zeros_like(probs_TM) if ema_MD is None else _matmul(g_TD, ema_MD.T, out_SD.dtype)
    d_probs_TM = d_probs_TM.at[token_T1, layout.expert_TK].set(d_active_TK, mode="drop")
    return d_probs_TM, (weight_S[:, None] * g_SD).astype(out_SD.dtype), None, None


combine.defvjp(_combine_fwd, _combine_bwd)


def _active_weights(probs_TM: Array, layout: Layout) -> Array:
    """[T, K] router probability of each assignment, 0 where its expert is held elsewhere."""
    token_T1 = jnp.arange(probs_TM.shape[0])[:, None]
    return probs_TM.at[token_T1, layout.expert_TK].get(mode="fill", fill_value=0)


def _inactive(probs_TM: Array, layout: Layout) -> Array:
    """probs_TM with the active experts' entries at 0."""
    token_T1 = jnp.arange(probs_TM.shape[0])[:, None]
    return probs_TM.at[token_T1, layout.expert_TK].set(0, mode="drop")


def _matmul(a: Array, b: Array, dtype: jnp.dtype) -> Array:
    """a @ b on operands of the compute type, accumulated in float32."""
    return jnp.matmul(a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)
