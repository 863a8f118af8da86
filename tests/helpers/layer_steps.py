"""Single layers on one device, checked against the loops of `reference`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers import reference
from helpers.layers import (
    check_aux,
    gradients_of,
    losses_of,
    moe_config,
    settings_of,
    variables_of,
)
from helpers.reference import Params, assert_close

from default_moe.config import MoEConfig
from default_moe.moe import MoELayer

BATCH, LENGTH, D_MODEL, EXPERT_DIM = 2, 12, 12, 10
TOKENS = BATCH * LENGTH


def make_config(num_experts: int, top_k: int, **fields) -> MoEConfig:
    return moe_config(num_experts=num_experts, top_k=top_k, expert_dim=EXPERT_DIM, **fields)


def batched(tokens, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(tokens, dtype).reshape(BATCH, LENGTH, *np.shape(tokens)[1:])


@functools.cache
def compiled(config: MoEConfig, train: bool = True):
    """jit of (variables, x, g, mask) -> ((loss, (y, aux, collections after)), gradients by (variables, x))."""
    layer = MoELayer(config)

    def objective(variables, x, g, mask):
        mutable = ["default_vectors"] if train else False
        y, aux = out = layer.apply(
            variables, x, train=train, mask=mask, mutable=mutable, rngs={"router": jax.random.key(5)}
        )
        state = {}
        if train:
            (y, aux), state = out
        loss = (g * y).sum() + losses_of(aux)
        return loss, (y, aux, state)

    return jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True, allow_int=True))


def check_step(config: MoEConfig, x, params: Params, ema, g, mask=None, draws=None):
    """One training step of the layer must equal the loops in everything. Returns the loops' result and gradients."""
    s = settings_of(config, LENGTH)
    expected = reference.forward(x, params, ema, s, mask=mask, draws=draws)
    mask_BL = None if mask is None else batched(mask, mask.dtype)
    (_, (y, aux, state)), (d_variables, d_x) = compiled(config)(
        variables_of(config, params, ema), batched(x), batched(g), mask_BL
    )
    check_aux(config, aux, expected, mask)
    assert_close(y, expected.y.reshape(BATCH, LENGTH, -1), "y")
    if config.default_vectors:
        assert_close(state["default_vectors"]["ema"], expected.ema, "ema")
        np.testing.assert_array_equal(d_variables["default_vectors"]["ema"], 0, "no gradient may reach the EMA")
    grads = gradients_of(config, x, params, expected, s, g, mask)
    got = d_variables["params"]
    assert_close(d_x, grads.x.reshape(BATCH, LENGTH, -1), "gradient of x")
    assert_close(got["router"]["kernel"], grads.kernel, "gradient of the router")
    for name in ("gate", "up", "down"):
        assert_close(got["experts"][name], getattr(grads, name), f"gradient of {name}")
    return expected, state, got
