"""Loss-Free Balancing (Wang et al. 2024): a bias, moved by hand, steers which experts are chosen."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from default_moe.methods.method import Decision, LayerSettings, Load, Method, State, decide, largest, scores
from default_moe.methods.settings import positive, setting


@dataclass(frozen=True)
class LossFree(Method):
    """The K experts of largest score + bias run; their gates are scores without the bias.

    After each step the bias of an expert that had less than the mean load rises by the update rate, that of one that
    had more falls by it. There is no balance loss unless `moe.load_balance_weight` asks for one.
    """

    name = "loss_free"
    load_balance_weight = 0.0

    bias_update_rate: float = setting(
        1e-3,
        "u, by which a bias moves. 1e-3 in its paper; 1e-4 was the best for the authors of Default MoE.",
        positive(),
    )

    def route(self, logits_BLN: Array, config: LayerSettings, state: State, key: Array | None) -> Decision:
        scores_BLN = scores(logits_BLN, config)
        return decide(logits_BLN, largest(scores_BLN + state["bias"], config.top_k), config)

    def initial_state(self, config: LayerSettings) -> State:
        return {"bias": jnp.zeros(config.num_experts, jnp.float32)}

    def next_state(self, state: State, load: Load, config: LayerSettings) -> State:
        tokens_YN = load.tokens_per_expert.astype(jnp.float32)
        missing_YN = tokens_YN.mean(axis=-1, keepdims=True) - tokens_YN
        return {"bias": state["bias"] + self.bias_update_rate * jnp.sign(missing_YN)}
