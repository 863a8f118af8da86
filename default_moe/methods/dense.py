"""The dense layer: every expert runs for every token. The upper bound, at N / K times the cost."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from default_moe.methods.balancers import Balancer, NoBalancer
from default_moe.methods.decision import Decision, LayerSettings, RouterInputs, decide
from default_moe.methods.method import Method


@dataclass(frozen=True)
class Dense(Method):
    """y = sum over all experts of score_i E_i(x). `moe.top_k` is not used."""

    name = "dense"
    takes_bias = False
    refused: ClassVar = {
        "balancer": "every expert runs for every token, so that the load is even",
        "load_balance_weight": "every expert runs for every token, so that the balance loss is constant",
        "sequence_balance_weight": "every expert runs for every token, so that the balance loss is constant",
        "num_groups": "every expert runs for every token, so that none is chosen",
        "simbal_weight": "every expert runs for every token, so that the load is even",
        "router_noise_std": "every expert runs for every token, so that noise has nothing to explore",
        "capacity_factor": "every expert runs for every token, so that none is over its capacity",
    }

    def check(self, config: LayerSettings) -> None:
        """Weights may be normalized whatever `top_k` is: that is over all experts."""

    def route(self, inputs: RouterInputs, config: LayerSettings) -> Decision:
        index_BLN = jnp.broadcast_to(jnp.arange(config.num_experts, dtype=jnp.int32), inputs.logits.shape)
        return decide(inputs.logits, index_BLN, config)

    def balancer(self) -> Balancer:
        return NoBalancer()

    def experts_per_token(self, config: LayerSettings) -> int:
        return config.num_experts
