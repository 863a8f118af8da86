"""Hash Layers (Roller et al. 2021), a control: which experts run depends on nothing that is learned."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from default_moe.errors import check
from default_moe.methods.balancers import Balancer, NoBalancer
from default_moe.methods.decision import Decision, LayerSettings, RouterInputs, largest
from default_moe.methods.method import Method
from default_moe.methods.routing import active_experts

_NO_LOGITS = "it uses no logits"
_NO_CHOICE = "its choice of experts never changes"


@dataclass(frozen=True)
class Hash(Method):
    """y = 1/K sum over K different experts of E_i(x), which a fixed pseudo-random hash of the token's id chooses.

    The choice is the same in every layer and run, and even over ids, not over a text. The router's matrix is kept, so
    that parameters are those of other methods. It gets no gradient.
    """

    name = "hash"
    takes_bias = False
    learns = False
    learns_from_zero_logits = False
    refused: ClassVar = {
        "score_function": _NO_LOGITS,
        "normalize_weights": "its weights are 1/K already",
        "router_init_std": _NO_LOGITS,
        "router_noise_std": _NO_LOGITS,
        "router_z_weight": _NO_LOGITS,
        "simbal_weight": _NO_LOGITS,
        "coupling_weight": _NO_LOGITS,
        "weight_scale": "its weights are 1/K",
        "balancer": _NO_CHOICE,
        "load_balance_weight": _NO_CHOICE,
        "sequence_balance_weight": _NO_CHOICE,
    }

    def route(self, inputs: RouterInputs, config: LayerSettings) -> Decision:
        check(inputs.token_ids is not None, "moe.router is 'hash', but the layer was called without token_ids")
        index_BLK = largest(priorities(jnp.asarray(inputs.token_ids), config.num_experts), config.top_k)
        gates_BLN = active_experts(index_BLK, config.num_experts) / jnp.float32(config.top_k)
        return Decision(gates_BLN, index_BLK, gates_BLN)

    def balancer(self) -> Balancer:
        return NoBalancer()


def priorities(token_ids: Array, num_experts: int) -> Array:
    """float32 [..., N] in [0, 1): pseudo-random numbers, always the same for a token id and an expert."""
    mixed = _mix(_mix(token_ids.astype(jnp.uint32))[..., None] + jnp.arange(num_experts, dtype=jnp.uint32))
    return (mixed >> 8).astype(jnp.float32) / 2**24


def _mix(bits: Array) -> Array:
    """A permutation of the 32-bit numbers under which neighbours become unlike: the last steps of MurmurHash3."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
