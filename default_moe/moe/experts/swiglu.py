"""SwiGLU experts (Shazeer 2020): hidden = silu(x @ gate) * (x @ up), output = hidden @ down."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# The checkpoint name of the products with experts' matrices, so that rematerialisation can keep them.
EXPERT_PRODUCT = "expert_product"


class ExpertParams(NamedTuple):
    """gate and up [M, D, F], down [M, F, D], in the compute dtype; of one expert without the M."""

    gate: Array
    up: Array
    down: Array


# Their logical axes, in this order.
INTO_EXPERT, OUT_OF_EXPERT = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
WEIGHT_AXES = (INTO_EXPERT, INTO_EXPERT, OUT_OF_EXPERT)


@jax.custom_vjp
def swiglu_hidden(gate: Array, up: Array) -> Array:
    """silu(gate) * up, computed and given in float32. Its backward pass keeps nothing but the two, as they are."""
    return jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)


def swiglu_gradients(gate: Array, up: Array, d_hidden: Array) -> tuple[Array, Array]:
    """Return the gradients of gate and up from that of the hidden values, in float32."""
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(gate)
    d_gate = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
    return d_gate, d_hidden * gate * sigmoid


def _swiglu_fwd(gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    return swiglu_hidden(gate, up), (gate, up)


def _swiglu_bwd(residuals: tuple[Array, Array], d_hidden: Array) -> tuple[Array, Array]:
    d_gate, d_up = swiglu_gradients(*residuals, d_hidden)
    return d_gate.astype(residuals[0].dtype), d_up.astype(residuals[1].dtype)


swiglu_hidden.defvjp(_swiglu_fwd, _swiglu_bwd)
