"""Loss-Free Balancing (Wang et al. 2024): top-k whose load is evened out by a bias, under a name of its own."""

from dataclasses import dataclass
from typing import ClassVar

from default_moe.methods.balancers import Balancer, Bias
from default_moe.methods.settings import positive, setting
from default_moe.methods.topk import TopK


@dataclass(frozen=True)
class LossFree(TopK):
    """The K experts of largest score + bias run; their gates are scores without the bias.

    The same as `topk` with moe.balancer='bias'. There is no balance loss unless `moe.load_balance_weight` asks for one.
    """

    name = "loss_free"
    refused: ClassVar = {"balancer": "its bias is one; use moe.router='topk'"}

    bias_update_rate: float = setting(
        1e-3,
        "u, by which a bias moves. 1e-3 in its paper; 1e-4 was the best for the authors of Default MoE.",
        positive(),
    )

    def balancer(self) -> Balancer:
        return Bias(update_rate=self.bias_update_rate)
