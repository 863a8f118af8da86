"""DenseMixer (Yao et al. 2025): the output of top-k, the router's gradient of the dense layer."""

from dataclasses import dataclass
from typing import ClassVar

from default_moe.methods.decision import Decision, LayerSettings, RouterInputs, product_form
from default_moe.methods.settings import setting
from default_moe.methods.topk import TopK


@dataclass(frozen=True)
class DenseMixer(TopK):
    """y is top-k's; the gate of every expert receives <dL/dy, E_i(x)>. Default MoE approximates this gradient.

    An expert is trained only by the tokens that chose it. With normalized weights see `decision.weights`. This is what
    the authors' code does; their paper's equations are `product_form`.
    """

    name = "densemixer"
    dense_gradient = True
    refused: ClassVar = {
        "capacity_factor": "every expert is computed for every token, so that dropping tokens saves nothing"
    }

    product_form: bool = setting(
        False, "Multiply the gradient of each gate by p_i + [i chosen], as in the paper's equations."
    )

    def route(self, inputs: RouterInputs, config: LayerSettings) -> Decision:
        decision = super().route(inputs, config)
        return product_form(decision, config) if self.product_form else decision

    def check(self, config: LayerSettings) -> None:
        """K = 1 may be normalized: the experts that were not chosen still give the router a gradient."""
