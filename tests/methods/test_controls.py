"""Routers that never learn: what they choose, and what is refused. Nothing moves them: test_method_training.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.layers import make_config
from helpers.refusals import refused
from helpers.steps import CONFIG, change

from default_moe.methods import RouterInputs
from default_moe.moe import MoELayer


@pytest.mark.parametrize("router", ["hash", "frozen"])
def test_what_would_move_the_router_is_refused(router):
    config = change(CONFIG, moe={"router": router})
    for name, value in (("decay_all", True), ("router_lr_multiplier", 0.5)):
        with refused(f"optim.{name} is {value}, which makes no sense with moe.router='{router}': its router never"):
            change(config, optim={name: value})
    change(CONFIG, optim={"decay_all": True, "router_lr_multiplier": 0.5})


def test_hashes_are_even_over_ids_and_the_same_whatever_the_place():
    """Of V ids each expert gets V K / N, give or take five times sqrt(V K / N (1 - K / N)) = 39."""
    vocab, num_experts, top_k = 8000, 8, 2
    config = make_config(num_experts, top_k, router="hash")
    ids = jnp.arange(vocab).reshape(8, 1000)
    decision = config.method.route(RouterInputs(jnp.zeros((8, 1000, 8)), token_ids=ids), config)
    index = np.asarray(decision.expert_index)
    assert (index[..., 0] != index[..., 1]).all()
    assert np.abs(np.bincount(index.ravel()) - vocab * top_k / num_experts).max() < 5 * (2000 * 0.75) ** 0.5
    pairs = np.bincount(index.min(-1).ravel() * num_experts + index.max(-1).ravel())  # 28 of them, 286 times each
    assert np.abs(pairs[pairs > 0] - vocab / 28).max() < 5 * (vocab / 28) ** 0.5 and (pairs > 0).sum() == 28
    np.testing.assert_array_equal(np.unique(decision.gates), [0, 0.5])
    again = config.method.route(RouterInputs(jnp.ones((1000, 8, 8)), token_ids=ids.T), config)
    np.testing.assert_array_equal(np.swapaxes(again.expert_index, 0, 1), index)


def test_hash_needs_ids():
    layer = MoELayer(make_config(router="hash"))
    with refused("moe.router is 'hash', but the layer was called without token_ids"):
        jax.eval_shape(functools.partial(layer.init, train=False), jax.random.key(0), jnp.ones((1, 2, 8)))
