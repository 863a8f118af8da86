"""Losses of the router's matrix and of experts' weights: against loops, on any mesh, in a layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import reference, sharded_layers
from helpers.layers import make_config
from helpers.reference import assert_close
from helpers.refusals import refused

from default_moe.methods import METHODS, TopK
from default_moe.moe import MoELayer
from default_moe.moe.coupling import NOISE, coupling_loss, proxy_noise
from default_moe.moe.layer import Router
from default_moe.sharding import make_mesh

MARGIN = 0.75


@pytest.mark.parametrize("sizes", [None, (2, 2, 2), (1, 1, 8)], ids=str)
def test_the_losses_of_a_layer_equal_the_loops(sizes):
    """At evaluation, without noise; experts and the batch are split over the mesh."""
    config = make_config(router="topk", simbal_weight=0.5, coupling_weight=2.0, coupling_margin=MARGIN)
    config_of_loss = make_config(router="topk", balancer="none")
    layer = MoELayer(config)
    _, params, _, _ = sharded_layers.skewed_inputs()
    mesh = make_mesh(*(sizes or (8, 1, 1)))
    variables, x, _, _ = sharded_layers.arrays(config_of_loss, mesh)

    def loss(variables, x):
        _, aux = layer.apply(variables, x, train=False)
        return aux["auxiliary_loss"] - 0.01 * aux["load_balance_loss"], aux

    if sizes:
        with jax.set_mesh(mesh):
            grads, aux = jax.jit(jax.grad(loss, has_aux=True))(variables, x)
    else:
        grads, aux = jax.jit(jax.grad(loss, has_aux=True))(*jax.device_get((variables, x)))
    d_kernel, simbal = reference.simbal(params)
    d_coupling, d_gate, coupling = reference.coupling(params, MARGIN, np.ones_like(params.kernel))
    assert_close(aux["simbal_loss"], simbal)
    assert_close(aux["coupling_loss"], coupling)
    assert_close(grads["params"]["router"]["kernel"], 0.5 * d_kernel + 2 * d_coupling)
    assert_close(grads["params"]["experts"]["gate"], 2 * d_gate)
    assert np.abs(d_gate).max() > 1e-3 and not np.abs(grads["params"]["experts"]["up"]).any()


def test_noise_is_on_the_proxies_in_training_alone():
    config = make_config(router="topk", coupling_weight=1.0, coupling_margin=MARGIN)
    layer = MoELayer(config)
    _, params, _, _ = sharded_layers.skewed_inputs()
    noise = proxy_noise(jax.random.key(0), params.kernel.shape)
    assert float(jnp.abs(noise - 1).max()) <= NOISE + 1e-6 and float(noise.std()) > 0.9 * NOISE / 3**0.5
    found = jax.jit(coupling_loss)(jnp.float32(params.kernel) * noise, jnp.float32(params.gate), MARGIN)
    assert_close(found, reference.coupling(params, MARGIN, np.float64(noise))[2])

    @jax.jit
    def losses(key):
        x = jnp.ones((1, 2, 12))
        variables = layer.init(jax.random.key(0), x, train=True)
        applied = [layer.apply(variables, x, train=train, rngs={"router": key}) for train in (True, False)]
        return [aux["coupling_loss"] for _, aux in applied]

    (noisy, plain), (other, same) = (map(float, losses(jax.random.key(seed))) for seed in (1, 2))
    assert plain == same and len({noisy, other, plain}) == 3


def test_a_router_without_weights_has_a_slope_that_is_finite():
    d_kernel, d_gate = jax.grad(coupling_loss, argnums=(0, 1))(jnp.zeros((3, 2)), jnp.ones((2, 3, 4)), 1.0)
    assert not d_kernel.any() and not d_gate.any()


def test_a_router_that_is_no_matrix_is_refused():
    class TwoLayers(TopK):
        name = "two_layers"

        def router(self, config, name):
            return Router(config.num_experts, None, name=name)

    try:
        for weight in ("simbal_weight", "coupling_weight"):
            with refused(f"moe.{weight} is 0.1, .*'two_layers': its router is not one matrix"):
                make_config(router="two_layers", **{weight: 0.1})
    finally:
        del METHODS["two_layers"]
