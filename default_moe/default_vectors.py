"""Default vectors: what an expert that did not run contributes (arXiv:2504.12463, section 3).

Each expert i of each layer has a default vector E^_i in R^D, the exponential moving average of its outputs. In the
forward pass it may stand in for the inactive expert; in the backward pass it always gives the router a gradient for
it. See `routing.py` for the dimension key.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from default_moe.checks import check, check_at_least, check_choice, check_fraction


@dataclass(frozen=True)
class DefaultVectorSettings:
    """How default vectors are made and used. A method (`methods/`) that inherits these has default vectors.

    ema_decay: beta of the moving average.  ema_weighted: average expert outputs weighted by their weight in the layer's
      output.  ema_init: "zeros" or "gaussian" (with ema_init_std).
    ema_update: "before" uses the vectors updated with this very batch, as the paper does, "after" those before it.
    substitute: "forward" adds the default vectors of the inactive experts to the output, "backward" uses them for the
      router's gradient alone.
    substitute_ramp_steps: with "forward", the steps over which their share of the output rises from none to all of it.
      The gradient is dense from the start. 0: all of it at once.
    expert_gradient: with "forward", pass the gradient of what default vectors add to the output on to the experts, as
      if the vectors were the means of their outputs over the (micro)batch. Not in the paper, where an expert moves its
      vector with no regard to the tokens that the vector is for.
    warm_up_batches: batches that the vectors of a model that has none yet are averaged over, before it trains on from
      another run (`init_from`).
    """

    ema_decay: float = 0.9
    ema_weighted: bool = True
    ema_init: str = "zeros"
    ema_init_std: float = 0.02
    ema_update: str = "before"
    substitute: str = "forward"
    substitute_ramp_steps: int = 0
    expert_gradient: bool = False
    warm_up_batches: int = 8

    def __post_init__(self) -> None:
        prefix = f"moe.{getattr(self, 'name', 'default')}"
        check_fraction(f"{prefix}.ema_decay", self.ema_decay)
        check_choice(f"{prefix}.ema_init", self.ema_init, ("zeros", "gaussian"))
        check_at_least(f"{prefix}.ema_init_std", self.ema_init_std, 0)
        check_choice(f"{prefix}.ema_update", self.ema_update, ("before", "after"))
        check_choice(f"{prefix}.substitute", self.substitute, ("forward", "backward"))
        check_at_least(f"{prefix}.substitute_ramp_steps", self.substitute_ramp_steps, 0)
        check(
            not self.substitute_ramp_steps or self.substitute == "forward",
            f"{prefix}.substitute_ramp_steps is {self.substitute_ramp_steps}, but {prefix}.substitute is 'backward': "
            "nothing is substituted that could be ramped in",
        )
        check(
            not self.expert_gradient or self.substitute == "forward",
            f"{prefix}.expert_gradient is True, but {prefix}.substitute is 'backward': default vectors add nothing to "
            "the output whose gradient could reach the experts",
        )
        check_at_least(f"{prefix}.warm_up_batches", self.warm_up_batches, 0)


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
