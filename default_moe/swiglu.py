"""SwiGLU experts (Shazeer 2020): hidden = silu(x @ gate) * (x @ up), output = hidden @ down."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# The checkpoint name of the products with experts' weights, so that rematerialisation can keep them.
EXPERT_PRODUCT = "expert_product"


class ExpertWeights(NamedTuple):
    """gate and up [M, D, F], down [M, F, D], in the compute dtype; of one expert without the M."""

    gate: Array
    up: Array
    down: Array


# Their logical axes, in this order.
INTO_EXPERT, OUT_OF_EXPERT = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
WEIGHT_AXES = (INTO_EXPERT, INTO_EXPERT, OUT_OF_EXPERT)


def swiglu_hidden(gate: Array, up: Array) -> Array:
    """silu(gate) * up, computed and given in float32."""
    return jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
