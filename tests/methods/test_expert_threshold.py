"""Expert thresholds: how they move, the load that they bring about, and what tokens do not depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import layers
from helpers.layers import moe_config

from default_moe.methods import Load, RouterInputs, routing
from default_moe.moe import MoELayer
from default_moe.moe.layer import initial_router_state, next_router_state
from default_moe.sharding import make_mesh

NUM_EXPERTS, TOP_K = 16, 2
CONFIG = moe_config(num_experts=NUM_EXPERTS, top_k=TOP_K, router="expert_threshold")


def logits_of(seed: int, shift: float = 0.0) -> jax.Array:
    """Of a router that prefers the first experts, or the last ones with a negative shift."""
    noise = np.random.default_rng(seed).standard_normal((16, 512, NUM_EXPERTS))
    return jnp.asarray(np.linspace(2 + shift, 0, NUM_EXPERTS) + noise, jnp.float32)


@jax.jit
def step(state, logits, mask):
    """The state after a batch, how many tokens each expert ran, and how many experts ran for each token."""
    inputs = RouterInputs(logits, mask=mask, train=True, state=state)
    decision = CONFIG.method.route(inputs, CONFIG)
    counts = routing.tokens_per_expert(decision.expert_index, NUM_EXPERTS, mask)
    load = Load(counts, mask.sum(), CONFIG.method.observe(decision, inputs, CONFIG))
    return next_router_state(state, load, CONFIG), counts, (decision.expert_index < NUM_EXPERTS).sum(axis=-1)


def test_thresholds_are_averages_of_quantiles_by_hand():
    """The first batch alone, the mean of two, of three, and so on to ten; from then on 0.9 of what was.

    Padding with absurd logits does not count, and a batch of it alone changes nothing.
    """
    mask = jnp.ones((16, 512), jnp.int32).at[:, 300:].set(0)
    state, expected = initial_router_state(CONFIG), np.zeros(NUM_EXPERTS)
    for number in range(12):
        logits = logits_of(number, 0.2 * number).at[:, 300:, 3].set(100)
        before, (state, counts, num_experts) = state, step(state, logits, mask)
        if number == 0:
            assert (num_experts == TOP_K).all()
            best = np.argsort(-np.asarray(logits[:, :300]), axis=-1)[..., :TOP_K]
            np.testing.assert_array_equal(counts, np.bincount(best.ravel(), minlength=NUM_EXPERTS))
        else:
            probs = np.asarray(jax.nn.softmax(logits))
            above = probs > np.asarray(before["threshold"])
            np.testing.assert_array_equal(num_experts, np.maximum(above.sum(axis=-1), 1))
        scores = np.exp(np.float64(logits[:, :300]))
        scores /= scores.sum(axis=-1, keepdims=True)
        quantile = np.quantile(scores, 1 - TOP_K / NUM_EXPERTS, axis=(0, 1))
        kept = min(0.9, number / (number + 1))
        expected = kept * expected + (1 - kept) * quantile
        np.testing.assert_allclose(state["threshold"], expected, rtol=0.02)
        assert int(state["steps"]) == number + 1
    idle, _, _ = step(state, logits_of(0), jnp.zeros_like(mask))
    jax.tree.map(np.testing.assert_array_equal, idle, state)


def test_a_skewed_router_is_balanced_on_tokens_it_has_not_seen():
    """Each expert is above its threshold for 1/8 of 8192 tokens: 1024, standard deviation sqrt(1024 * 7 / 8) = 30.

    So one batch differs from another by up to 10 %. Tokens that are below all thresholds run one expert more.
    """
    mask, state = jnp.ones((16, 512), jnp.int32), initial_router_state(CONFIG)
    _, first, _ = step(state, logits_of(0), mask)
    for seed in range(4):
        state, _, _ = step(state, logits_of(seed), mask)
    _, counts, num_experts = step(state, logits_of(9), mask)
    above = np.asarray(jax.nn.softmax(logits_of(9))) > np.asarray(state["threshold"])
    assert np.abs(np.asarray(first) / 1024 - 1).max() > 0.9
    assert np.abs(above.sum(axis=(0, 1)) / 1024 - 1).max() < 0.1
    assert abs(above.sum(axis=-1).mean() - TOP_K) < 0.01 * TOP_K
    none = 1 - above.any(axis=-1).mean()
    assert 0 < none < 0.15 and np.isclose(counts.sum(), above.sum() + none * 8192)
    assert set(np.unique(num_experts)) >= {1, 2, 3, 4}


@pytest.mark.parametrize("train", [True, False])
def test_no_token_depends_on_others_of_its_batch(train):
    config = layers.make_config(router="expert_threshold", matmul="blocks")
    x, params, ema, g = layers.inputs(3)
    other = x.copy()
    other[layers.LENGTH // 2 :] = np.random.default_rng(1).normal(size=other[layers.LENGTH // 2 :].shape)
    ys = [layers.run(config, one, params, ema, g, train=train)[1][0] for one in (x, other)]
    half = layers.LENGTH // 2
    np.testing.assert_array_equal(ys[0][0, :half], ys[1][0, :half])
    assert (np.asarray(ys[0][1]) != np.asarray(ys[1][1])).any()


def test_the_whole_batch_counts_on_any_mesh():
    """Histograms are whole numbers: 8 devices see what one sees."""
    config = layers.make_config(router="default_threshold", matmul="blocks")
    x = jax.random.normal(jax.random.key(0), (8, 8, layers.D_MODEL))
    layer = MoELayer(config)
    variables = jax.device_get(jax.jit(functools.partial(layer.init, train=False))(jax.random.key(1), x))
    mask = (jnp.arange(8) < jnp.arange(1, 9)[:, None]).astype(jnp.int32)
    apply = jax.jit(functools.partial(layer.apply, train=True, mask=mask, mutable=["router_state", "default_vectors"]))
    (_, aux), state = apply(variables, x)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        (_, aux_8), state_8 = apply(variables, x)
    assert aux["observed"]["scores"].sum() == mask.sum() * config.num_experts
    np.testing.assert_array_equal(aux_8["observed"]["scores"], aux["observed"]["scores"])
    np.testing.assert_array_equal(state_8["router_state"]["threshold"], state["router_state"]["threshold"])
