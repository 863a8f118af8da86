"""ProbMoE (arXiv:2606.01509): exactly K experts are drawn, and the router learns from how likely each is to be."""

import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from default_moe.methods.decision import Decision, LayerSettings, RouterInputs, decide, largest
from default_moe.methods.method import Method

_IMPOSSIBLE = -1e30  # the logarithm of 0, with which differences stay numbers


@dataclass(frozen=True)
class ProbMoE(Method):
    """y = sum over the experts drawn of softmax(s)_i E_i(x); at evaluation top-k's.

    z_i in {0, 1}, whether expert i runs, are independent with P(z_i = 1) = sigmoid(s_i), given that K of them are 1.
    The gate is (z_i without a gradient, plus that of m_i) softmax(s)_i, where m_i is the mean of z_i. An expert that
    does not run gives its gate no gradient; but the m_i of those that run depend on all logits.
    """

    name = "probmoe"
    random = True
    takes_bias = False
    refused: ClassVar = {
        "score_function": "its gates are softmaxes, its draws of sigmoids",
        "weight_scale": "its gates are probabilities among all experts",
        "normalize_weights": "its gates are probabilities among all experts",
        "router_noise_std": "it draws experts at random already",
    }

    def route(self, inputs: RouterInputs, config: LayerSettings) -> Decision:
        if inputs.key is None:
            return decide(inputs.logits, largest(inputs.logits, config.top_k), config)
        chosen_BLN = sample(inputs.logits, config.top_k, draw(inputs.key, inputs.logits.shape))
        probs_BLN = jax.nn.softmax(inputs.logits, axis=-1)
        gates_BLN = _with_slopes_of_means(inputs.logits, chosen_BLN, config.top_k) * probs_BLN
        return Decision(gates_BLN, largest(chosen_BLN, config.top_k), probs_BLN)


def draw(key: Array, shape_BLN: tuple[int, ...]) -> Array:
    """Uniform in [0, 1), float32 [B, L, N]."""
    return jax.random.uniform(key, shape_BLN)


def chances(logits_BLN: Array, top_k: int) -> Array:
    """r[n, k], the probability that expert n runs if k of the experts up to it do: [N, B, L, K + 1].

    From a[n, k], the logarithm of the sum over all sets of k of the first n experts of exp(sum of their s):
      a[n, k] = logaddexp(a[n-1, k-1] + s_n, a[n-1, k]),  r[n, k] = exp(a[n-1, k-1] + s_n - a[n, k]).
    With s = log(p / (1 - p)) this a is, but for a constant, that of the probability that k of the first n are 1.
    """
    # One number for all logits of a token changes nothing. Sums of small ones are rounded less.
    logits_BLN -= jax.lax.stop_gradient(logits_BLN.max(axis=-1, keepdims=True))
    none_BLK = jnp.where(jnp.arange(top_k + 1) == 0, 0, _IMPOSSIBLE) + jnp.zeros_like(logits_BLN[..., :1])

    def add_expert(without_BLK: Array, logit_BL: Array) -> tuple[Array, Array]:
        fewer_BLK = jnp.concatenate([jnp.full_like(without_BLK[..., :1], _IMPOSSIBLE), without_BLK[..., :-1]], axis=-1)
        with_BLK = fewer_BLK + logit_BL[..., None]
        return jnp.logaddexp(without_BLK, with_BLK), jax.nn.sigmoid(with_BLK - without_BLK)

    return jax.lax.scan(add_expert, none_BLK, jnp.moveaxis(logits_BLN, -1, 0))[1]


def sample(logits_BLN: Array, top_k: int, uniform_BLN: Array) -> Array:
    """z, float32 [B, L, N], of which K are 1. Without a gradient.

    Beginning with the last, an expert runs if its number in `uniform_BLN` is below its chance. That is exactly 1 if all
    experts up to it are wanted, and 0 if none is.
    """

    def decide_about(wanted_BL: Array, expert: tuple[Array, Array]) -> tuple[Array, Array]:
        chance_BLK, uniform_BL = expert
        is_wanted_BLK = wanted_BL[..., None] == jnp.arange(top_k + 1)  # a comparison fuses; a gather would not
        runs_BL = uniform_BL < jnp.where(is_wanted_BLK, chance_BLK, 0).sum(axis=-1)
        return wanted_BL - runs_BL, runs_BL

    chance_NBLK = chances(jax.lax.stop_gradient(logits_BLN), top_k)
    wanted_BL = jnp.full_like(logits_BLN[..., 0], top_k, jnp.int32)
    experts = (chance_NBLK, jnp.moveaxis(uniform_BLN, -1, 0))
    runs_NBL = jax.lax.scan(decide_about, wanted_BL, experts, reverse=True)[1]
    return jnp.moveaxis(runs_NBL, 0, -1).astype(jnp.float32)


def means(logits_BLN: Array, top_k: int) -> Array:
    """m, float32 [B, L, N], from the probabilities that k of the experts up to each run, the last one's first."""

    def leave_out_expert(up_to_BLK: Array, chance_BLK: Array) -> tuple[Array, Array]:
        runs_BLK = up_to_BLK * chance_BLK
        one_fewer_BLK = jnp.concatenate([runs_BLK[..., 1:], jnp.zeros_like(runs_BLK[..., :1])], axis=-1)
        return up_to_BLK - runs_BLK + one_fewer_BLK, runs_BLK.sum(axis=-1)

    all_BLK = jnp.where(jnp.arange(top_k + 1) == top_k, 1, 0) + jnp.zeros_like(logits_BLN[..., :1])
    means_NBL = jax.lax.scan(leave_out_expert, all_BLK, chances(logits_BLN, top_k), reverse=True)[1]
    return jnp.moveaxis(means_NBL, 0, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _with_slopes_of_means(logits_BLN: Array, chosen_BLN: Array, top_k: int) -> Array:
    """z, whose gradient is that of m: g times the covariances of z. Backward alone computes m."""
    return chosen_BLN


def _slopes_fwd(logits_BLN: Array, chosen_BLN: Array, top_k: int) -> tuple:
    return chosen_BLN, logits_BLN


def _slopes_bwd(top_k: int, logits_BLN: Array, g_BLN: Array) -> tuple:
    # The matrix of covariances is symmetric, so a directional derivative of m does.
    d_logits_BLN = jax.jvp(lambda logits_BLN: means(logits_BLN, top_k), (logits_BLN,), (g_BLN,))[1]
    return d_logits_BLN, None


_with_slopes_of_means.defvjp(_slopes_fwd, _slopes_bwd)
