"""Default MoE (arXiv:2504.12463): experts that do not run contribute their default vectors."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array

from default_moe.checks import check
from default_moe.default_vectors import DefaultVectorSettings
from default_moe.methods.method import Decision, Load, Method, State, decide, largest, scores

if TYPE_CHECKING:
    from default_moe.model_config import MoEConfig


@dataclass(frozen=True)
class DefaultMoE(DefaultVectorSettings, Method):
    """Top-k, and a default vector in the place of each output that is not there: see `default_vectors.py`.

    The router's gradient is dense: eq. 8 of the paper.
    """

    name = "default"

    def check(self, config: "MoEConfig") -> None:
        check(
            not config.normalize_weights or self.substitute == "backward",
            "moe.normalize_weights is True, but moe.default.substitute is 'forward': weights of active experts that "
            "sum to one leave none for the default vectors; use 'backward'",
        )

    def route(self, logits_BLN: Array, config: "MoEConfig", state: State, key: Array | None) -> Decision:
        index_BLK = largest(scores(logits_BLN, config), config.top_k)
        return decide(logits_BLN, index_BLK, config, substitution=self._substitution(state))

    def initial_state(self, config: "MoEConfig") -> State:
        return {"steps": jnp.zeros((), jnp.int32)} if self.substitute_ramp_steps else {}

    def next_state(self, state: State, load: Load, config: "MoEConfig") -> State:
        return {name: steps + 1 for name, steps in state.items()}

    def _substitution(self, state: State) -> Array | None:
        """0 in the first step, 1 after `substitute_ramp_steps`, linear in between; None without a ramp."""
        if not self.substitute_ramp_steps:
            return None
        return jnp.minimum(state["steps"] / self.substitute_ramp_steps, 1.0)
