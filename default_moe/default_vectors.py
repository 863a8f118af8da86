"""Default vectors: what an expert that did not run contributes (arXiv:2504.12463, section 3).

Each expert i of each layer has a default vector E^_i in R^D, the exponential moving average of its outputs. In the
forward pass it may stand in for the inactive expert; in the backward pass it always gives the router a gradient for
it. See `routing.py` for the dimension key.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array


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
def combine(active_TD: Array, probs_TM: Array, ema_MD: Array, active_TM: Array, substitute: str) -> Array:
    """Add what inactive experts contribute, and give the router a gradient for them.

    With A_t the active experts of token t, whose weighted outputs are already in active_t:
      y_t = sum_{i in A_t} p_ti E_i(x_t)  [+ sum_{i not in A_t} p_ti E^_i]      (eq. 2 [eq. 11])
      dy_t/dp_ti = E_i(x_t) for i in A_t, E^_i otherwise                        (eq. 8)
    The first case of eq. 8 reaches the router through active_t; the second is this function's. No gradient flows into
    E^. It costs one [T, M] x [M, D] product in each direction: beside the factors it reads and writes y once, and
    backward reads g once.

    Args:
      active_TD: float32, sum of the active experts' outputs, weighted.
      probs_TM: float32, router probabilities of the experts held here, not renormalised.
      ema_MD: float32, default vectors.
      active_TM: bool, whether the expert runs for the token.
      substitute: "forward" includes the bracketed term in y, "backward" only its gradient.

    Returns:
      float32 [T, D], summed over the experts held here.
    """
    if substitute == "backward":
        return active_TD
    return active_TD + jnp.matmul(_inactive(probs_TM, active_TM), ema_MD)


def _combine_fwd(active_TD: Array, probs_TM: Array, ema_MD: Array, active_TM: Array, substitute: str) -> tuple:
    return combine(active_TD, probs_TM, ema_MD, active_TM, substitute), (ema_MD, active_TM)


def _combine_bwd(substitute: str, residuals: tuple, g_TD: Array) -> tuple:
    del substitute  # both variants share the gradient
    ema_MD, active_TM = residuals
    return g_TD, _inactive(jnp.matmul(g_TD, ema_MD.T), active_TM), None, None


combine.defvjp(_combine_fwd, _combine_bwd)


def _inactive(values_TM: Array, active_TM: Array) -> Array:
    return jnp.where(active_TM, 0, values_TM)
