"""SparseMixer-v2 (Liu et al. 2023; GRIN: Liu et al. 2024): experts are sampled, and the gradient of that estimated."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from default_moe.errors import check
from default_moe.methods.decision import Decision, LayerSettings, RouterInputs
from default_moe.methods.method import Method
from default_moe.methods.settings import setting


class Draws(NamedTuple):
    """Random numbers for one choice of every token.

    exponential: float32 [B, L, N], of the standard exponential distribution.  uniform: float32 [B, L], in [0, 1).
    """

    exponential: Array
    uniform: Array


@dataclass(frozen=True)
class SparseMixer(Method):
    """One or two experts, drawn one after the other; Heun's third-order estimate of the gradient of the draw."""

    name = "sparsemixer"
    random = True
    takes_bias = False
    refused: ClassVar = {
        "score_function": "its estimator is made for softmax",
        "normalize_weights": "its weights are probabilities among the experts that may be drawn",
        "weight_scale": "its estimator is made for weights that are probabilities",
        "router_noise_std": "it draws experts at random already",
    }

    mask_threshold: float = setting(
        0.1,
        "eps, above 0 and below 1. Experts whose logit is more than 2 eps below the largest, relatively, are never "
        "drawn.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            0 < self.mask_threshold < 1,
            f"moe.sparsemixer.mask_threshold is {self.mask_threshold}, but must lie between 0 and 1 (at 0 only one "
            "expert could be drawn, and the router would get no gradient)",
        )

    def check(self, config: LayerSettings) -> None:
        check(
            config.top_k <= 2,
            f"moe.top_k is {config.top_k}, but moe.router='sparsemixer' is defined only for 1 and 2",
        )
        check(
            config.top_k < config.num_experts,
            f"moe.top_k = moe.num_experts = {config.top_k}, but moe.router='sparsemixer' needs experts to choose from",
        )

    def route(self, inputs: RouterInputs, config: LayerSettings) -> Decision:
        logits_BLN, key = inputs.logits, inputs.key
        keys = [None] * config.top_k if key is None else list(jax.random.split(key, config.top_k))
        draws = [None if k is None else draw(k, logits_BLN.shape) for k in keys]
        gates_BLN = jnp.zeros_like(logits_BLN)
        left_BLN = logits_BLN  # -inf for the experts drawn before
        index_BLK = []
        for draws_here in draws:
            expert_BL, gate_BL = choose(logits_BLN, left_BLN, self.mask_threshold, draws_here)
            drawn_BLN = expert_BL[..., None] == jnp.arange(config.num_experts)
            gates_BLN = jnp.where(drawn_BLN, gate_BL[..., None], gates_BLN)
            left_BLN = jnp.where(drawn_BLN, -jnp.inf, left_BLN)
            index_BLK.append(expert_BL)
        return Decision(gates_BLN, jnp.stack(index_BLK, axis=-1), jax.nn.softmax(logits_BLN, axis=-1))


def draw(key: Array, shape_BLN: tuple[int, ...]) -> Draws:
    exponential_key, uniform_key = jax.random.split(key)
    return Draws(jax.random.exponential(exponential_key, shape_BLN), jax.random.uniform(uniform_key, shape_BLN[:-1]))


def choose(logits_BLN: Array, left_BLN: Array, threshold: float, draws: Draws | None) -> tuple[Array, Array]:
    """One expert for each token, int32 [B, L], and its gate, float32 [B, L].

    Args:
      logits_BLN: s, all of them.
      left_BLN: s, -inf where an expert was chosen before.
      threshold: eps.
      draws: None takes the largest logit, as at evaluation.
    """
    top_BL1 = jax.lax.stop_gradient(left_BLN.max(axis=-1, keepdims=True))
    s_BLN = jax.lax.stop_gradient(logits_BLN)
    far_BLN = (top_BL1 - s_BLN) / jnp.maximum(jnp.abs(s_BLN), top_BL1) > 2 * threshold
    near_BLN = jnp.where(far_BLN, -jnp.inf, left_BLN)
    likeliest_BL = jnp.argmax(near_BLN, axis=-1)
    if draws is None:
        expert_BL, factor_BL = likeliest_BL, jnp.ones(likeliest_BL.shape, jnp.float32)
    else:
        # log p minus the logarithm of an exponential number is largest for expert i with probability p_i.
        # (A number may be drawn as exactly 0, which is above all, but not above what must not be chosen.)
        drawn_BLN = jnp.where(jnp.isneginf(near_BLN), -jnp.inf, near_BLN - jnp.log(draws.exponential))
        expert_BL = jnp.argmax(drawn_BLN, axis=-1)
        whole_BL = (expert_BL == likeliest_BL) | (draws.uniform > 0.75)
        factor_BL = jnp.where(whole_BL, 1.0, 1 / 3)
    expert_BL = expert_BL.astype(jnp.int32)
    return expert_BL, _gate(near_BLN, expert_BL, factor_BL)


@jax.custom_vjp
def _gate(near_BLN: Array, expert_BL: Array, factor_BL: Array) -> Array:
    """c p~_a, whose gradient is g p~_a (onehot_a - p~), without the factor c: Heun's method with its draw of steps."""
    return factor_BL * _probs_of(near_BLN, expert_BL)[1]


def _probs_of(near_BLN: Array, expert_BL: Array) -> tuple[Array, Array]:
    probs_BLN = jax.nn.softmax(near_BLN, axis=-1)
    drawn_BLN = expert_BL[..., None] == jnp.arange(near_BLN.shape[-1])
    return probs_BLN, jnp.where(drawn_BLN, probs_BLN, 0).sum(axis=-1)


def _gate_fwd(near_BLN: Array, expert_BL: Array, factor_BL: Array) -> tuple:
    return _gate(near_BLN, expert_BL, factor_BL), (near_BLN, expert_BL)


def _gate_bwd(residuals: tuple, g_BL: Array) -> tuple:
    near_BLN, expert_BL = residuals
    probs_BLN, prob_BL = _probs_of(near_BLN, expert_BL)
    drawn_BLN = expert_BL[..., None] == jnp.arange(near_BLN.shape[-1])
    return (g_BL * prob_BL)[..., None] * (drawn_BLN - probs_BLN), None, None


_gate.defvjp(_gate_fwd, _gate_bwd)
