"""The dense layer: every expert runs for every token. The upper bound, at N / K times the cost."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from default_moe.methods.method import Decision, LayerSettings, Method, State, decide


@dataclass(frozen=True)
class Dense(Method):
    """y = sum over all experts of score_i E_i(x). `moe.top_k` is not used."""

    name = "dense"
    load_balance_weight = 0.0
    refused: ClassVar = {
        "load_balance_weight": "every expert runs for every token, so that the balance loss is constant",
        "sequence_balance_weight": "every expert runs for every token, so that the balance loss is constant",
        "router_noise_std": "every expert runs for every token, so that noise has nothing to explore",
        "capacity_factor": "every expert runs for every token, so that none is over its capacity",
    }

    def check(self, config: LayerSettings) -> None:
        """Weights may be normalized whatever `top_k` is: that is over all experts."""

    def route(self, logits_BLN: Array, config: LayerSettings, state: State, key: Array | None) -> Decision:
        index_BLN = jnp.broadcast_to(jnp.arange(config.num_experts, dtype=jnp.int32), logits_BLN.shape)
        return decide(logits_BLN, index_BLN, config)

    def experts_per_token(self, config: LayerSettings) -> int:
        return config.num_experts
