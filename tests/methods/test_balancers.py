"""Balancers: the load that each brings about, quantiles of the whole batch, and the traps others fell into."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import layers, steps
from helpers.layers import moe_config
from helpers.refusals import refused
from helpers.steps import CONFIG, change, make_batch

from default_moe.config import MoEConfig
from default_moe.methods import Load, RouterInputs, routing
from default_moe.methods.balancers import Bias, NoBalancer, Quantile
from default_moe.methods.decision import distribution
from default_moe.methods.histogram import histogram, upper_quantile
from default_moe.moe import MoELayer
from default_moe.moe.layer import initial_router_state, next_router_state, zero_counts
from default_moe.sharding import make_mesh

NUM_EXPERTS, TOP_K = 16, 2
SKEW = np.linspace(2, 0, NUM_EXPERTS)


def skewed_logits(seed: int = 0, batch: int = 64, length: int = 1024) -> jax.Array:
    """Without help the first experts take most tokens."""
    noise = np.random.default_rng(seed).standard_normal((batch, length, NUM_EXPERTS))
    return jnp.asarray(SKEW + noise, jnp.float32)


def balanced(config: MoEConfig, logits: jax.Array, num_steps: int, mask=None) -> tuple[np.ndarray, np.ndarray]:
    """Loads relative to the mean after training on the same logits for some steps, and the bias."""

    @jax.jit
    def step(state, logits):
        inputs = RouterInputs(logits, mask=mask, train=True, state=state)
        decision = config.method.route(inputs, config)
        counts = routing.tokens_per_expert(decision.expert_index, NUM_EXPERTS, mask)
        observed = config.load_balancer.observe(decision, inputs, config)
        num_tokens = jnp.int32(logits[..., 0].size) if mask is None else mask.sum()
        return next_router_state(state, Load(counts, num_tokens, observed), config), counts

    state = initial_router_state(config)
    for _ in range(num_steps):
        state, _ = step(state, logits)
    counts = np.asarray(step(state, logits)[1])
    return counts / counts.mean(), np.asarray(state["bias"])


@pytest.mark.parametrize(
    ("balancer", "num_steps", "fields"),
    [
        (Quantile(), 6, {"router": "topk"}),
        (Quantile(), 6, {"router": "default"}),
        (Quantile(), 14, {"router": "densemixer", "score_function": "sigmoid"}),
        (Bias(0.03, "proportional"), 60, {"router": "topk"}),
        (Bias(0.01, "momentum"), 60, {"router": "topk"}),
    ],
    ids=str,
)
def test_a_skewed_router_is_balanced_within_two_percent(balancer, num_steps, fields):
    """The slower of the quantiles takes as many steps in exact arithmetic: thresholds move each other."""
    config = moe_config(num_experts=NUM_EXPERTS, top_k=TOP_K, balancer=balancer, **fields)
    load, bias = balanced(config, skewed_logits(), num_steps)
    assert np.abs(load - 1).max() < 0.02
    assert np.ptp(bias) > 0.05 and abs(bias.mean()) < 1e-2
    unhelped = balanced(config, skewed_logits(), 0)[0]
    assert unhelped.max() > 2 and unhelped.min() < 0.5


def test_one_step_of_quantile_balancing_is_the_loops():
    """In float64, with padding of absurd scores that must not count."""
    config = moe_config(num_experts=NUM_EXPERTS, top_k=TOP_K, router="topk", balancer=Quantile())
    logits = np.array(skewed_logits(batch=4, length=100))
    mask = np.ones((4, 100), np.int32)
    mask[:, 60:] = 0
    logits[:, 60:] = 100 * np.random.default_rng(9).standard_normal((4, 40, NUM_EXPERTS))
    bias = np.float32(0.1 * np.random.default_rng(1).standard_normal(NUM_EXPERTS))
    inputs = RouterInputs(jnp.asarray(logits), mask=jnp.asarray(mask), train=True, state={"bias": jnp.asarray(bias)})
    observed = Quantile().observe(config.method.route(inputs, config), inputs, config)
    load = Load(jnp.zeros(NUM_EXPERTS, jnp.int32), jnp.int32(240), observed)
    new = next_router_state(dict(inputs.state), load, config)["bias"]

    above = []
    for token in np.float64(logits[:, :60].reshape(-1, NUM_EXPERTS)):
        scores = np.exp(token) / np.exp(token).sum()
        above.append(scores - sorted(scores + bias, reverse=True)[TOP_K])
    count = 240 * TOP_K // NUM_EXPERTS
    thresholds = np.sort(above, axis=0)[::-1][count - 1 : count + 1]  # the quantile lies between these two
    beta = thresholds.mean(axis=0)
    width = 0.023 * np.abs(beta).max() + np.abs(np.diff(thresholds, axis=0)).max()
    np.testing.assert_allclose(new, beta.mean() - beta, atol=2 * width)
    assert width < 0.1 * np.ptp(new)
    kept = dataclasses.replace(config, balancer=Quantile(momentum=0.75))
    halfway = next_router_state(dict(inputs.state), load, kept)["bias"]
    np.testing.assert_allclose(halfway, 0.75 * bias + 0.25 * new, atol=1e-6)


def test_the_quantile_of_the_whole_is_not_the_mean_of_quantiles_of_parts():
    """A trap others fell into: averaging over devices or microbatches. Sums of histograms have no such error."""
    rng = np.random.default_rng(2)
    parts = [rng.normal(0.0, 0.01, (1, 5000, 1)), rng.normal(1.0, 0.2, (1, 5000, 1))]
    counts = [histogram(jnp.float32(part), None) for part in parts]
    found = float(upper_quantile(sum(counts), 0.25)[0])
    right = np.quantile(np.concatenate(parts), 0.75)
    of_parts = np.mean([np.quantile(part, 0.75) for part in parts])
    assert abs(found - right) < 0.02 * right
    assert abs(of_parts - right) > 0.2 * right


@pytest.mark.parametrize("share", [1e-3, 0.125, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("scale", [1e-5, 1e-2, 1.0])
def test_quantiles_are_right_to_the_width_of_a_bin(share, scale):
    values = scale * np.random.default_rng(3).standard_normal(20_000)
    found = float(upper_quantile(histogram(jnp.float32(values[None, :, None]), None), share)[0])
    right = np.quantile(values, 1 - share)
    assert abs(found - right) <= 0.03 * abs(right) + 4e-6


def test_nothing_moves_at_evaluation_or_without_tokens():
    """torchtitan's trap: a bias that moved with every forward pass, at evaluation too."""
    x = jax.random.normal(jax.random.key(0), (2, 16, 8))
    for balancer in (Bias(0.1), Quantile()):
        config = moe_config(num_experts=8, top_k=2, expert_dim=4, router="topk", balancer=balancer)
        layer = MoELayer(config)
        variables = jax.jit(functools.partial(layer.init, train=False))(jax.random.key(1), x)
        apply = functools.partial(jax.jit, static_argnames="train")(
            lambda variables, mask, train, layer=layer: layer.apply(
                variables, x, train=train, mask=mask, mutable=["router_state"]
            )
        )
        before = variables["router_state"]["bias"]
        for train, mask, moves in ((False, jnp.ones((2, 16)), False), (True, jnp.ones((2, 16)), True)):
            (_, aux), after = apply(variables, mask, train)
            assert bool((after["router_state"]["bias"] != before).any()) == moves
            assert ("observed" in aux) == train
        if balancer == Quantile():
            (_, _), after = apply(variables, jnp.zeros((2, 16)), True)
            np.testing.assert_array_equal(after["router_state"]["bias"], before)


def test_a_router_does_not_escape_the_balance_loss_by_small_sigmoids():
    """Divided by their sum + epsilon, sigmoids that are all pushed to 0 make the loss vanish. Ours stays."""
    config = moe_config(num_experts=4, top_k=1, router="topk", score_function="sigmoid")
    logits = jnp.array([[[2.0, 0.0, 0.0, 0.0]]])
    counts = jnp.array([1, 0, 0, 0])

    def loss(shift):
        return routing.load_balance_loss(distribution(logits + shift, config)[0, 0], counts)

    for shift in (-20.0, -60.0, -100.0):
        assert float(loss(shift)) == pytest.approx(4 * np.exp(2) / (np.exp(2) + 3), rel=1e-5)
        assert abs(float(jax.grad(loss)(shift))) < 1e-6  # nothing is to be gained


def test_the_whole_batch_counts_on_any_mesh_and_in_microbatches():
    """Histograms are whole numbers: 8 devices see what one sees, and four microbatches what one batch is."""
    config = layers.make_config(router="topk", balancer=Quantile(), matmul="blocks")
    x = jax.random.normal(jax.random.key(0), (8, 8, layers.D_MODEL))
    mask = (jnp.arange(8) < jnp.arange(1, 9)[:, None]).astype(jnp.int32)
    layer = MoELayer(config)
    variables = jax.device_get(jax.jit(functools.partial(layer.init, train=False))(jax.random.key(1), x))

    def step(variables, x, mask):
        return layer.apply(variables, x, train=True, mask=mask, mutable=["router_state"])

    (_, aux), state = jax.jit(step)(variables, x, mask)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        (_, aux_8), state_8 = jax.jit(step)(variables, x, mask)
    assert aux["observed"]["margins"].sum() == mask.sum() * config.num_experts
    np.testing.assert_array_equal(aux_8["observed"]["margins"], aux["observed"]["margins"])
    np.testing.assert_allclose(state_8["router_state"]["bias"], state["router_state"]["bias"], atol=1e-7)

    biases = []
    for parts in (1, 4):
        model = change(CONFIG, moe={"router": "topk", "balancer": Quantile()}, train={"grad_accum_steps": parts})
        after, metrics = steps.step_of(model, batch=make_batch())
        assert metrics["layers"].observed == {}  # not fetched from the devices
        biases.append(after.variables["router_state"]["moe_layers"]["moe"]["bias"])
    assert np.abs(biases[0]).max() > 1e-3
    np.testing.assert_allclose(biases[0], biases[1], atol=1e-6)


def test_the_balance_loss_may_count_all_microbatches():
    """Two sequences, of 2 experts: the second microbatch's loss is by the load of both."""
    layer = MoELayer(moe_config(num_experts=2, top_k=1, expert_dim=4, router="topk"))
    variables = jax.jit(functools.partial(layer.init, train=False))(jax.random.key(1), jnp.zeros((1, 8, 8)))
    sums, counts = zero_counts(variables["params"]), np.zeros(2)
    for seed in range(2):
        x = jax.random.normal(jax.random.key(seed), (1, 8, 8))
        (_, aux), new = layer.apply({**variables, "router_sums": sums}, x, train=True, mutable=["router_sums"])
        counts += np.asarray(aux["tokens_per_expert"])
        expected = 2 * (counts / counts.sum() * np.asarray(aux["mean_router_probs"])).sum()
        np.testing.assert_allclose(aux["load_balance_loss"], expected, rtol=1e-6)
        sums = new["router_sums"]

    losses = {}
    for over in ("microbatch", "batch"):
        config = change(CONFIG, moe={"router": "topk", "load_balance_over": over}, train={"grad_accum_steps": 4})
        state, metrics = steps.step_of(config, batch=make_batch())
        assert "router_sums" not in state.variables
        losses[over] = metrics["layers"].load_balance_loss
    assert np.abs(losses["batch"] - losses["microbatch"]).max() > 1e-3
    whole = change(CONFIG, moe={"router": "topk"})
    right = steps.step_of(whole, batch=make_batch())[1]["layers"].load_balance_loss
    assert (np.abs(losses["batch"] - right) < np.abs(losses["microbatch"] - right)).all()


def test_the_balance_loss_goes_with_its_balancer():
    weights = {balancer: moe_config(router="topk", balancer=balancer).balance_weight for balancer in ("auto", "loss")}
    assert weights == {"auto": 0.01, "loss": 0.01}
    for balancer in ("none", "bias", "quantile"):
        assert moe_config(num_experts=4, router="topk", balancer=balancer).balance_weight == 0
    assert moe_config(router="topk", balancer="none", load_balance_weight=0.5).balance_weight == 0.5
    assert moe_config(router="loss_free", bias_update_rate=0.5).load_balancer == Bias(0.5)


def test_settings_of_a_balancer_survive_being_saved():
    config = moe_config(router="default", balancer=Bias(0.5, "momentum"))
    saved = config.to_dict()
    assert saved["balancer"] == "bias" and saved["bias"] == {"update_rate": 0.5, "update": "momentum"}
    assert MoEConfig.from_mapping(saved) == config
    assert MoEConfig.from_mapping({"balancer": "none"}).balancer == NoBalancer()
    assert dataclasses.replace(moe_config(router="loss_free"), router="topk").load_balancer.name == "loss"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"balancer": "quantil"}, "moe.balancer is 'quantil', but must be one of 'auto', 'bias', 'loss', 'none', 'q"),
        ({"balancer": "quantile", "top_k": 8, "num_experts": 8}, "every token runs all experts; use 'none'"),
        ({"balancer": Bias(), "router": "sparsemixer"}, "no bias steers its choice of experts; use 'loss' or 'none'"),
        ({"balancer": "loss", "router": "dense"}, "so that the load is even"),
        ({"balancer": "quantile", "router": "remoe"}, "its own loss balances the experts"),
        ({"balancer": "quantile", "router": "loss_free"}, "its bias is one; use moe.router='topk'"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(fields, words):
    with refused(words):
        moe_config(**fields)
    moe_config(router="dense", balancer="none")
