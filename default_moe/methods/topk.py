"""Plain top-k (Shazeer et al. 2017, Fedus et al. 2022): the router learns from the experts that run."""

from dataclasses import dataclass

from jax import Array

from default_moe.methods.method import Decision, LayerSettings, Method, State, decide, largest


@dataclass(frozen=True)
class TopK(Method):
    """y = sum over the K experts of largest score of score_i E_i(x) (arXiv:2504.12463, eq. 2)."""

    name = "topk"

    def route(self, logits_BLN: Array, config: LayerSettings, state: State, key: Array | None) -> Decision:
        return decide(logits_BLN, largest(logits_BLN, config.top_k), config)
