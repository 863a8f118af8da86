"""The paper in one file: default vectors, and what they contribute (arXiv:2504.12463, section 3).

Each expert i of each layer has a default vector E^_i in R^D, the exponential moving average of its outputs. In the
forward pass it may stand in for the inactive expert; in the backward pass it always gives the router a gradient for
it. A training step of one layer goes through this file from top to bottom. `default_moe/README.md` has the dimension
key; here M may be all N experts.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from default_moe.methods.default import DefaultVectorSettings

# The checkpoint name of the vectors that a step uses, so that rematerialisation can keep them: to make them again would
# take all experts' products.
USED_VECTORS = "used_default_vectors"


class DefaultVectors(NamedTuple):
    """Default vectors, and the sums since they were last updated, all float32.

    ema: [M, D].  sum: [M, D], weighted expert outputs of the global batch.  weight: [M], the sum of those weights.
    Sums are not empty at the start only when a batch is processed in several microbatches.
    """

    ema: Array
    sum: Array
    weight: Array


class SampledOutputs(NamedTuple):
    """Outputs of experts for P tokens that did not choose them, see `methods.Samples`. They carry no gradient.

    out_PD: float32.  token_P: int32, which of the T tokens, each at most once.  expert_P: int32, which of the M
    experts, M for none or one that is held elsewhere.  factor: float32 scalar.
    """

    out_PD: Array
    token_P: Array
    expert_P: Array
    factor: Array

    def sums(self, mask_T: Array | None, num_experts: int) -> tuple[Array, Array]:
        """Return for each expert the sum of its outputs, float32 [M, D], and how many these are, [M]."""
        counts_PM = self.expert_P[:, None] == jnp.arange(num_experts)
        if mask_T is not None:
            counts_PM &= (mask_T[self.token_P] != 0)[:, None]
        counts_PM = counts_PM.astype(jnp.float32)
        return jnp.matmul(counts_PM.T, self.out_PD), counts_PM.sum(axis=0)


def ema_weights(
    gates_TM: Array, active_TM: Array, mask_T: Array | None, settings: DefaultVectorSettings, dtype: jnp.dtype
) -> Array:
    """Return how much each token's output of each expert counts in the moving average: float32 [T, M], 0 if inactive.

    gates_TM: float32, the weights of expert outputs in the layer's output.  mask_T: 0 where a token is no sample.
    dtype: of the outputs.
    """
    counted_TM = active_TM if mask_T is None else active_TM & (mask_T != 0)[:, None]
    weight_TM = jax.lax.stop_gradient(gates_TM) if settings.ema_weighted else jnp.ones_like(gates_TM)
    # Rounded as in the sum of outputs: else the sum of the weights would not match the weighted sum.
    return jnp.where(counted_TM, weight_TM.astype(dtype).astype(jnp.float32), 0)


def update_and_combine(
    y_TD: Array,
    gates_TM: Array,
    active_TM: Array,
    sums: tuple[Array, Array] | None,
    defaults: DefaultVectors,
    settings: DefaultVectorSettings,
    substitution: Array | None,
    samples: SampledOutputs | None = None,
    *,
    other_axes: tuple[str, ...] = (),
    expert_axes: tuple[str, ...] = (),
) -> tuple[Array, DefaultVectors]:
    """Update the default vectors with a batch, and add what inactive experts contribute to the output.

    Args:
      y_TD: float32, sum of the active experts' outputs, weighted.
      gates_TM, active_TM: as for `combine`.
      sums: of this device's tokens, [M, D] and [M]: expert outputs weighted by `ema_weights`, and those weights; or
        those of `samples`. None at evaluation, when the vectors are used as they are.
      defaults: of the experts held here.
      substitution: share of the vectors in the output; None stands for 1.
      samples: outputs that the gradient is corrected by.
      other_axes: mesh axes over which devices hold other tokens and the same experts: sums are added up over them.
      expert_axes: mesh axes over which `defaults` is split though the other arguments are of all experts: sums are
        scattered over them, and vectors gathered.

    Returns:
      y, float32 [T, D], and the default vectors after the batch.
    """
    expert_gradient = settings.expert_gradient and sums is not None
    used_MD = defaults.ema
    if sums is not None:
        if expert_axes:
            sums = (
                jax.lax.psum_scatter(sums[0], expert_axes, tiled=True),
                jax.lax.psum_scatter(sums[1], expert_axes, tiled=True),
            )
        sum_MD, weight_M = jax.lax.psum(sums, other_axes) if other_axes else sums
        total_MD, total_M = defaults.sum + jax.lax.stop_gradient(sum_MD), defaults.weight + weight_M
        ema_MD = checkpoint_name(update_ema(defaults.ema, total_MD, total_M, settings.ema_decay), USED_VECTORS)
        used_MD = jax.lax.stop_gradient(defaults.ema if settings.ema_update == "after" else ema_MD)
        if expert_gradient:
            used_MD = straight_through(used_MD, mean(sum_MD, weight_M))
            if other_axes:  # each device has a part of the gradient
                used_MD = jax.lax.pcast(used_MD, other_axes, to="varying")
        defaults = DefaultVectors(ema_MD, total_MD, total_M)
    if expert_axes:
        used_MD = checkpoint_name(jax.lax.all_gather(used_MD, expert_axes, tiled=True), USED_VECTORS)
    if settings.substitute == "backward" or (sums is None and not settings.substitute_at_eval):
        substitution = None
    elif substitution is None:
        substitution = jnp.ones((), jnp.float32)
    if samples is not None:
        y_TD = correct(y_TD, gates_TM, used_MD, samples)
    return combine(y_TD, gates_TM, used_MD, active_TM, substitution, expert_gradient), defaults


def update_ema(ema_MD: Array, sum_MD: Array, weight_M: Array, decay: float) -> Array:
    """Take one step of the moving average (eq. 10): E^ <- decay E^ + (1 - decay) sum / weight.

    Args:
      ema_MD: float32, the default vectors.
      sum_MD: float32, sum over the global batch's tokens that chose each expert of (weight times) its output.
      weight_M: float32, sum of those weights. An expert with weight 0 had no token and keeps its vector.
      decay: beta, in [0, 1].
    """
    return jnp.where((weight_M > 0)[:, None], decay * ema_MD + (1 - decay) * mean(sum_MD, weight_M), ema_MD)


def mean(sum_MD: Array, weight_M: Array) -> Array:
    """Return sum / weight, and the sum where the weight is 0. Arguments as `update_ema`'s."""
    return sum_MD / jnp.where(weight_M > 0, weight_M, 1.0)[:, None]


def straight_through(ema_MD: Array, mean_MD: Array) -> Array:
    """Return the value of `ema_MD`, its gradient passed on to `mean_MD` only (Bengio et al. 2013)."""
    return jax.lax.stop_gradient(ema_MD) + (mean_MD - jax.lax.stop_gradient(mean_MD))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def combine(
    y_TD: Array,
    gates_TM: Array,
    ema_MD: Array,
    active_TM: Array,
    substitution: Array | None,
    expert_gradient: bool = False,
) -> Array:
    """Add what inactive experts contribute, and give the router a gradient for them.

    With A_t the active experts of token t, whose weighted outputs are already in y_t, and a the substitution:
      y_t = sum_{i in A_t} p_ti E_i(x_t)  +  a sum_{i not in A_t} p_ti E^_i      (eq. 2 at a = 0, eq. 11 at a = 1)
      dy_t/dp_ti = E_i(x_t) for i in A_t, E^_i otherwise, whatever a            (eq. 8)
    The first case of eq. 8 reaches the router through y_t; the second is this function's. It costs one
    [T, M] x [M, D] product in each direction: beside the factors it reads and writes y once, and backward reads g once.
    With expert_gradient it costs another one backward.

    Args:
      y_TD: float32, sum of the active experts' outputs, weighted.
      gates_TM: float32, p of the experts held here: the router probabilities, not renormalised.
      ema_MD: float32, default vectors.
      active_TM: bool, whether the expert runs for the token.
      substitution: a, a scalar; None stands for 0, at no cost in the forward pass.
      expert_gradient: whether E^ gets the gradient that its part in y has, else none, as in the paper.

    Returns:
      float32 [T, D], summed over the experts held here.
    """
    if substitution is None:
        return y_TD
    return y_TD + jnp.matmul(substitution * _inactive(gates_TM, active_TM), ema_MD)


def _combine_fwd(
    y_TD: Array,
    gates_TM: Array,
    ema_MD: Array,
    active_TM: Array,
    substitution: Array | None,
    expert_gradient: bool,
) -> tuple:
    out_TD = combine(y_TD, gates_TM, ema_MD, active_TM, substitution, expert_gradient)
    return out_TD, (ema_MD, active_TM, (gates_TM, substitution) if expert_gradient else None)


def _combine_bwd(expert_gradient: bool, residuals: tuple, g_TD: Array) -> tuple:
    ema_MD, active_TM, share = residuals
    d_ema_MD = None
    if expert_gradient:
        gates_TM, substitution = share
        d_ema_MD = jnp.matmul(substitution * _inactive(gates_TM, active_TM).T, g_TD)
    return g_TD, _inactive(jnp.matmul(g_TD, ema_MD.T), active_TM), d_ema_MD, None, None


combine.defvjp(_combine_fwd, _combine_bwd)


def _inactive(values_TM: Array, active_TM: Array) -> Array:
    return jnp.where(active_TM, 0, values_TM)


@jax.custom_vjp
def correct(y_TD: Array, gates_TM: Array, ema_MD: Array, samples: SampledOutputs) -> Array:
    """Return y, and add factor <g_t, E_i(x_t) - E^_i> to what `combine` gives the gates of sampled experts.

    A factor of 1 puts <g_t, E_i(x_t)> in the place of <g_t, E^_i>. With 1 / the chance of i to be sampled for t the
    mean over draws is that, for every inactive expert.
    """
    return y_TD


def _correct_fwd(y_TD: Array, gates_TM: Array, ema_MD: Array, samples: SampledOutputs) -> tuple:
    return y_TD, (ema_MD, samples)


def _correct_bwd(residuals: tuple, g_TD: Array) -> tuple:
    ema_MD, (out_PD, token_P, expert_P, factor) = residuals
    ema_PD = ema_MD.at[expert_P].get(mode="fill", fill_value=0)
    d_gates_P = factor * (g_TD[token_P] * (out_PD - ema_PD)).sum(axis=-1)
    d_gates_TM = jnp.zeros((len(g_TD), len(ema_MD)), jnp.float32)
    return g_TD, d_gates_TM.at[token_P, expert_P].set(d_gates_P, mode="drop"), None, None


correct.defvjp(_correct_fwd, _correct_bwd)
