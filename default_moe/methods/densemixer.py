"""DenseMixer (Yao et al. 2025): the output of top-k, the router's gradient of the dense layer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from default_moe.methods.topk import TopK

if TYPE_CHECKING:
    from default_moe.model_config import MoEConfig


@dataclass(frozen=True)
class DenseMixer(TopK):
    """y is top-k's; the weight of every expert receives <dL/dy, E_i(x)>. Default MoE approximates this gradient.

    An expert is trained by the tokens that chose it alone. With normalized weights see `method.weights`.
    """

    name = "densemixer"
    dense_gradient = True
    refused: ClassVar = {
        "capacity_factor": "every expert is computed for every token, so that dropping tokens saves nothing"
    }

    def check(self, config: "MoEConfig") -> None:
        """K = 1 may be normalized: the experts that were not chosen still give the router a gradient."""
