"""Plain top-k (Shazeer et al. 2017, Fedus et al. 2022): the router learns from the experts that run."""

from dataclasses import dataclass

from default_moe.methods.decision import Decision, LayerSettings, RouterInputs, choose, decide
from default_moe.methods.method import Method


@dataclass(frozen=True)
class TopK(Method):
    """y = sum over the K experts of largest score of score_i E_i(x) (arXiv:2504.12463, eq. 2)."""

    name = "topk"

    def route(self, inputs: RouterInputs, config: LayerSettings) -> Decision:
        return decide(inputs.logits, choose(inputs, config), config)
