"""Default vectors: what an expert that did not run contributes (arXiv:2504.12463, section 3)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from default_moe.methods.default import DefaultVectorSettings
from default_moe.moe.experts.layout import Axes, Routing
from default_moe.moe.experts.swiglu import EXPERT_PRODUCT


def update_ema(ema_MD: Array, sum_MD: Array, weight_M: Array, decay: float) -> Array:
    """One step of the moving average (eq. 10): E^ <- decay E^ + (1 - decay) sum / weight.

    Args:
      ema_MD: float32, the default vectors.
      sum_MD: float32, sum over the global batch's tokens that chose each expert of (weight times) its output.
      weight_M: float32, sum of those weights. An expert with weight 0 had no token and keeps its vector.
      decay: beta, in [0, 1].
    """
    return jnp.where((weight_M > 0)[:, None], decay * ema_MD + (1 - decay) * mean(sum_MD, weight_M), ema_MD)


def mean(sum_MD: Array, weight_M: Array) -> Array:
    """sum / weight, and the sum where the weight is 0. Arguments as `update_ema`'s."""
    return sum_MD / jnp.where(weight_M > 0, weight_M, 1.0)[:, None]


def straight_through(ema_MD: Array, mean_MD: Array) -> Array:
    """The value of `ema_MD`, with its gradient passed on to `mean_MD` alone (Bengio et al. 2013)."""
    return jax.lax.stop_gradient(ema_MD) + (mean_MD - jax.lax.stop_gradient(mean_MD))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def combine(
    active_TD: Array,
    weights_TM: Array,
    ema_MD: Array,
    active_TM: Array,
    substitution: Array | None,
    vector_gradient: bool = False,
) -> Array:
    """Add what inactive experts contribute, and give the router a gradient for them.

    With A_t the active experts of token t, whose weighted outputs are already in active_t, and a the substitution:
      y_t = sum_{i in A_t} p_ti E_i(x_t)  +  a sum_{i not in A_t} p_ti E^_i      (eq. 2 at a = 0, eq. 11 at a = 1)
      dy_t/dp_ti = E_i(x_t) for i in A_t, E^_i otherwise, whatever a            (eq. 8)
    The first case of eq. 8 reaches the router through active_t; the second is this function's. It costs one
    [T, M] x [M, D] product in each direction: beside the factors it reads and writes y once, and backward reads g once.
    With vector_gradient it costs another one backward.

    Args:
      active_TD: float32, sum of the active experts' outputs, weighted.
      weights_TM: float32, of the experts held here: the router probabilities, not renormalised.
      ema_MD: float32, default vectors.
      active_TM: bool, whether the expert runs for the token.
      substitution: a, a scalar; None stands for 0, at no cost in the forward pass.
      vector_gradient: whether E^ gets the gradient that its part in y has, else none, as in the paper.

    Returns:
      float32 [T, D], summed over the experts held here.
    """
    if substitution is None:
        return active_TD
    return active_TD + jnp.matmul(substitution * _inactive(weights_TM, active_TM), ema_MD)


def _combine_fwd(
    active_TD: Array,
    weights_TM: Array,
    ema_MD: Array,
    active_TM: Array,
    substitution: Array | None,
    vector_gradient: bool,
) -> tuple:
    y_TD = combine(active_TD, weights_TM, ema_MD, active_TM, substitution, vector_gradient)
    return y_TD, (ema_MD, active_TM, (weights_TM, substitution) if vector_gradient else None)


def _combine_bwd(vector_gradient: bool, residuals: tuple, g_TD: Array) -> tuple:
    ema_MD, active_TM, share = residuals
    d_ema_MD = None
    if vector_gradient:
        weights_TM, substitution = share
        d_ema_MD = jnp.matmul(substitution * _inactive(weights_TM, active_TM).T, g_TD)
    return g_TD, _inactive(jnp.matmul(g_TD, ema_MD.T), active_TM), d_ema_MD, None, None


combine.defvjp(_combine_fwd, _combine_bwd)


def _inactive(values_TM: Array, active_TM: Array) -> Array:
    return jnp.where(active_TM, 0, values_TM)


class DefaultVectors(NamedTuple):
    """Default vectors, and the sums since they were last updated, all float32.

    ema: [M, D].  sum: [M, D], weighted expert outputs of the global batch.  weight: [M], the sum of those weights.
    Sums are not empty at the start only when a batch is processed in several microbatches.
    """

    ema: Array
    sum: Array
    weight: Array


def used_vectors(
    before: DefaultVectors,
    after: DefaultVectors,
    sum_MD: Array,
    weight_M: Array,
    axes: Axes,
    vectors: DefaultVectorSettings,
) -> Array:
    """The vectors that a training batch uses, of those before and after it. sum_MD, weight_M: what the batch adds."""
    ema_MD = jax.lax.stop_gradient((before if vectors.ema_update == "after" else after).ema)
    if not vectors.expert_gradient:
        return ema_MD
    ema_MD = straight_through(ema_MD, mean(sum_MD, weight_M))
    # Each device has a part of the gradient.
    return jax.lax.pcast(ema_MD, axes.others, to="varying") if axes.others else ema_MD


def substitution_of(routing: Routing, vectors: DefaultVectorSettings) -> Array | None:
    """The share of default vectors in the output, None for nothing of them."""
    if vectors.substitute == "backward":
        return None
    return jnp.ones((), jnp.float32) if routing.substitution is None else routing.substitution


def over_others(sums: tuple[Array, Array], axes: Axes) -> tuple[Array, Array]:
    """One device's, or one expert group's, sums added up over all that hold other tokens."""
    return jax.lax.psum(sums, axes.others) if axes.others else sums


def updated(defaults: DefaultVectors, sum_MD: Array, weight_M: Array, decay: float) -> DefaultVectors:
    """The default vectors after a batch of these sums."""
    sum_MD, weight_M = defaults.sum + jax.lax.stop_gradient(sum_MD), defaults.weight + weight_M
    # Named: recomputing it would take the products over again.
    ema_MD = checkpoint_name(update_ema(defaults.ema, sum_MD, weight_M, decay), EXPERT_PRODUCT)
    return DefaultVectors(ema_MD, sum_MD, weight_M)


def counted_weights(
    weights_TM: Array, active_TM: Array, mask_T: Array | None, weighted: bool, dtype: jnp.dtype
) -> Array:
    """float32 [T, M], how much each token's output of each expert counts in the moving average: 0 where inactive."""
    counted_TM = active_TM if mask_T is None else active_TM & (mask_T != 0)[:, None]
    weight_TM = jax.lax.stop_gradient(weights_TM) if weighted else jnp.ones_like(weights_TM)
    # Rounded as in the sum of outputs: else the sum of the weights would not match the weighted sum.
    return jnp.where(counted_TM, weight_TM.astype(dtype).astype(jnp.float32), 0)
