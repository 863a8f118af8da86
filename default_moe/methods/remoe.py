"""ReMoE (Wang et al. 2025): gates are ReLUs, so routing is differentiable; a controlled L1 loss keeps it sparse."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from default_moe.errors import check
from default_moe.methods.balancers import Balancer, NoBalancer
from default_moe.methods.decision import Decision, LayerSettings, Load, RouterInputs, State
from default_moe.methods.method import Method
from default_moe.methods.routing import masked_mean
from default_moe.methods.settings import positive, setting

_NO_SOFTMAX = "its gates are ReLUs of the logits, without a softmax"
_OWN_LOSS = "its own loss balances the experts, and says how many run"


@dataclass(frozen=True)
class ReMoE(Method):
    """y = sum over experts of relu(s_i) E_i(x). The number of experts that run differs by token, K on average.

    About half of the gates are open at the start: there is room for all N experts of every token.

    The loss of a layer is lambda (N / K) sum_e mean(r_e) mean([r_e > 0]), means over the tokens of the batch, the
    second without a gradient. After each step lambda is multiplied by `lambda_factor` if the share of closed gates of
    all layers is below 1 - K / N, and divided by it otherwise. Every layer's state holds the same lambda, kept between
    1e-30 and 1e30: float32 would lose it, should the share be on one side for hundreds of steps.
    """

    name = "remoe"
    takes_bias = False
    learns_from_zero_logits = False
    refused: ClassVar = {
        "score_function": _NO_SOFTMAX,
        "normalize_weights": _NO_SOFTMAX,
        "num_groups": "every expert of positive logit runs, whatever group it is in",
        "weight_scale": "its gates are the logits themselves, whose size it learns",
        "router_z_weight": _NO_SOFTMAX,
        "balancer": _OWN_LOSS,
        "load_balance_weight": _OWN_LOSS,
        "sequence_balance_weight": _OWN_LOSS,
        "simbal_weight": _OWN_LOSS,
        "capacity_factor": "its loss, not a capacity, says how many experts run",
    }

    initial_lambda: float = setting(1e-8, "lambda, the weight of the sparsity loss, at the start.", positive(1e30))
    lambda_factor: float = setting(1.2, "What lambda is multiplied or divided by after each step; above 1.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.lambda_factor > 1, f"moe.remoe.lambda_factor is {self.lambda_factor}, but must be above 1")

    def route(self, inputs: RouterInputs, config: LayerSettings) -> Decision:
        gates_BLN = jax.nn.relu(inputs.logits)
        index_BLN = jnp.where(gates_BLN > 0, jnp.arange(config.num_experts, dtype=jnp.int32), config.num_experts)
        total_BL1 = gates_BLN.sum(axis=-1, keepdims=True)
        probs_BLN = gates_BLN / jnp.where(total_BL1 > 0, total_BL1, 1.0)
        return Decision(gates_BLN, index_BLN, probs_BLN)

    def balancer(self) -> Balancer:
        return NoBalancer()

    def most_experts_per_token(self, config: LayerSettings) -> int:
        return config.num_experts

    def losses(
        self, decision: Decision, inputs: RouterInputs, config: LayerSettings
    ) -> dict[str, tuple[Array | float, Array]]:
        gates_BLN = decision.gates
        open_N = masked_mean((gates_BLN > 0).astype(jnp.float32), inputs.mask)
        loss = config.num_experts / config.top_k * (masked_mean(gates_BLN, inputs.mask) * open_N).sum()
        return {"sparsity_loss": (inputs.state["lambda"], loss)}

    def initial_state(self, config: LayerSettings) -> State:
        return {"lambda": jnp.float32(self.initial_lambda)}

    def next_state(self, state: State, load: Load, config: LayerSettings) -> State:
        # The share of closed gates is below 1 - K / N if more than K are open on average.
        open_gates = (load.tokens_per_expert.sum(axis=-1) / jnp.maximum(load.num_tokens, 1)).mean()
        factor = jnp.where(open_gates > config.top_k, self.lambda_factor, 1 / self.lambda_factor)
        return {"lambda": jnp.clip(state["lambda"] * factor, 1e-30, 1e30)}
