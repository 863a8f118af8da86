"""Top-k with a router that stays as it was at the start: a control for whatever trains one."""

from dataclasses import dataclass
from typing import ClassVar

import jax

from default_moe.methods.balancers import Balancer, Quantile
from default_moe.methods.decision import Decision, LayerSettings, RouterInputs
from default_moe.methods.topk import TopK

_NO_GRADIENT = "no loss reaches its router"


@dataclass(frozen=True)
class Frozen(TopK):
    """y is top-k's. Logits pass no gradient on, neither to the router nor to the layer's input.

    Only a balancer's bias can even out the load: that of `quantile`, if not told otherwise.
    """

    name = "frozen"
    learns = False
    learns_from_zero_logits = False
    refused: ClassVar = {
        "load_balance_weight": _NO_GRADIENT,
        "sequence_balance_weight": _NO_GRADIENT,
        "router_z_weight": _NO_GRADIENT,
        "simbal_weight": "it would train the router's matrix",
        "coupling_weight": "it would train the router's matrix",
    }

    def check(self, config: LayerSettings) -> None:
        """K = 1 may be normalized: no gradient is lost by that."""

    def route(self, inputs: RouterInputs, config: LayerSettings) -> Decision:
        return super().route(inputs._replace(logits=jax.lax.stop_gradient(inputs.logits)), config)

    def balancer(self) -> Balancer:
        return Quantile()
