"""Expert thresholds (arXiv:2603.11535): an expert runs for the tokens whose score is above its threshold."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from default_moe.errors import check
from default_moe.methods.balancers import Balancer, NoBalancer
from default_moe.methods.decision import Decision, LayerSettings, Load, RouterInputs, State, decide, largest, scores
from default_moe.methods.default import DefaultVectorSettings
from default_moe.methods.histogram import histogram, upper_quantile
from default_moe.methods.method import Method
from default_moe.methods.routing import active_experts
from default_moe.methods.settings import between, setting

_THRESHOLDS = "its thresholds even out the load, and say how many experts run"


@dataclass(frozen=True)
class ExpertThreshold(Method):
    """y = sum over the experts with s'_i > c_i of s'_i E_i(x), in training and at evaluation.

    s' are the scores. A token has 0 to N such experts, K on average: there is room for all. A token with none runs the
    likeliest, which the average leaves out. c_i is the score that a share K / N of the batch's tokens lie above,
    averaged over batches: over all of them at first, then with `threshold_decay`. So it does not depend on other tokens
    of the same batch. Before the first batch there are no thresholds, and the K likeliest experts run.

    The paper's abstract names the quantile and its moving average. The rest is chosen here.
    """

    name = "expert_threshold"
    takes_bias = False
    refused: ClassVar = {
        "balancer": _THRESHOLDS,
        "load_balance_weight": _THRESHOLDS,
        "capacity_factor": _THRESHOLDS,
        "router_noise_std": "thresholds of scores with noise are not those of scores without, as at evaluation",
    }

    threshold_decay: float = setting(0.9, "Decay of the thresholds' moving average, by batches.", between(0, 1))

    def check(self, config: LayerSettings) -> None:
        super().check(config)
        check(
            config.top_k < config.num_experts,
            f"moe.top_k = moe.num_experts = {config.top_k}, but moe.router={self.name!r} needs experts to choose from",
        )

    def route(self, inputs: RouterInputs, config: LayerSettings) -> Decision:
        likeliest_BLK = largest(inputs.logits, config.top_k)
        above_BLN = scores(inputs.logits, config) > inputs.state["threshold"]
        none_BL1 = ~above_BLN.any(axis=-1, keepdims=True)
        runs_BLN = jnp.where(
            inputs.state["steps"] > 0,
            above_BLN | (none_BL1 & active_experts(likeliest_BLK[..., :1], config.num_experts)),
            active_experts(likeliest_BLK, config.num_experts),
        )
        index_BLN = jnp.where(runs_BLN, jnp.arange(config.num_experts, dtype=jnp.int32), config.num_experts)
        return decide(inputs.logits, index_BLN, config)

    def balancer(self) -> Balancer:
        return NoBalancer()

    def most_experts_per_token(self, config: LayerSettings) -> int:
        return config.num_experts

    def initial_state(self, config: LayerSettings) -> State:
        return {"threshold": jnp.zeros(config.num_experts, jnp.float32), "steps": jnp.zeros((), jnp.int32)}

    def observe(self, decision: Decision, inputs: RouterInputs, config: LayerSettings) -> State:
        return {"scores": histogram(scores(inputs.logits, config), inputs.mask)}

    def next_state(self, state: State, load: Load, config: LayerSettings) -> State:
        steps_Y, counts_Y = state["steps"], load.num_tokens > 0  # a batch without a token that counts says nothing
        quantile_YN = upper_quantile(load.observed["scores"], config.top_k / config.num_experts)
        decay_Y = jnp.minimum(self.threshold_decay, steps_Y / (steps_Y + 1))
        decay_Y1 = jnp.where(counts_Y, decay_Y, 1)[..., None]
        return {
            "threshold": decay_Y1 * state["threshold"] + (1 - decay_Y1) * quantile_YN,
            "steps": steps_Y + counts_Y,
        }


@dataclass(frozen=True)
class DefaultThreshold(DefaultVectorSettings, ExpertThreshold):
    """The same, and the default vector of each expert in the place of its output where it does not run."""

    name = "default_threshold"
    refused: ClassVar = {
        **ExpertThreshold.refused,
        "normalize_weights": "weights of active experts that sum to one leave none for the default vectors",
    }

    def route(self, inputs: RouterInputs, config: LayerSettings) -> Decision:
        return super().route(inputs, config)._replace(substitution=self.substitution(inputs.state))
