"""What methods keep from step to step: moved once a step, by hand; never at evaluation; saved and restored."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import steps
from helpers.layers import moe_config
from helpers.refusals import refused
from helpers.steps import CONFIG, assert_trees_equal, change, copy, make_batch, new_state, program_for, step_of

from default_moe.config import MoEConfig
from default_moe.methods import METHODS, Load, RouterInputs, TopK
from default_moe.methods.balancers import Bias, Quantile
from default_moe.moe import MoELayer
from default_moe.moe.layer import initial_router_state, next_router_state
from default_moe.runs.checkpoint import CheckpointStore
from default_moe.training.program import Program
from default_moe.training.step import make_train_step

LAYERS, NUM_EXPERTS, TOKENS = 2, 4, 48


def bias_by_hand(before, counts):
    """0.25 up where an expert had less than its share, down where it had more."""
    return {"bias": before["bias"] + 0.25 * np.sign(counts.mean(axis=1, keepdims=True) - counts)}


def lambda_by_hand(before, counts):
    closed = 1 - counts.sum() / (LAYERS * TOKENS * NUM_EXPERTS)
    return {"lambda": before["lambda"] * (1.2 if closed < 1 - 1 / NUM_EXPERTS else 1 / 1.2)}


def share_by_hand(before, counts):
    return {"bias": before["bias"] + 0.25 * (1 - counts / counts.mean(axis=1, keepdims=True))}


def moved(before, counts):
    """By what is not among the counts: see test_balancers.py."""
    return dict.fromkeys(before)


def first_threshold(before, counts):
    """In the first step the K likeliest run, then the thresholds are no longer 0."""
    if before["steps"][0] == 0:
        assert (counts.sum(axis=1) == TOKENS).all()
    return {"threshold": None, "steps": before["steps"] + 1}


def steps_by_hand(before, counts):
    return {"steps": before["steps"] + 1}


OPTIONS = {"product_form": True, "num_groups": 2, "weight_scale": 2.5, "score_function": "sqrt_softplus"}
OPTIONS |= {"simbal_weight": 0.1, "coupling_weight": 0.1}
WITH_RAMP = {"router": "default", "substitute_ramp_steps": 2, "router_noise_std": 0.5, "expert_gradient": True}


@pytest.mark.parametrize(
    ("fields", "next_by_hand"),
    [
        ({"router": "loss_free", "bias_update_rate": 0.25, "score_function": "sigmoid"}, bias_by_hand),
        ({"router": "remoe", "initial_lambda": 0.5}, lambda_by_hand),
        (WITH_RAMP, steps_by_hand),
        ({"router": "topk", "balancer": Bias(0.25, "proportional")}, share_by_hand),
        ({"router": "default", "balancer": Quantile()}, moved),
        ({"router": "sparsemixer", "mask_threshold": 0.45}, None),
        ({"router": "default_threshold", "substitute_ramp_steps": 2}, first_threshold),
        ({"router": "default_sampled", "sample_every": 2}, None),
        ({"router": "probmoe", "top_k": 2}, None),
        ({"router": "frozen", "top_k": 2}, moved),
        ({"router": "hash"}, None),
        ({"router": "densemixer", "num_shared_experts": 1, "sequence_balance_weight": 0.1, **OPTIONS}, None),
    ],
    ids=[
        "loss_free",
        "remoe",
        "default",
        "bias",
        "quantile",
        "sparsemixer",
        "threshold",
        "sampled",
        "probmoe",
        "frozen",
        "hash",
        "densemixer",
    ],
)
def test_what_a_method_keeps(fields, next_by_hand, tmp_path):
    """With two microbatches and everything recomputed, where a state could move twice or four times."""
    config = change(CONFIG, moe=fields, model={"remat": "full"}, train={"grad_accum_steps": 2})
    program, state = program_for(config), new_state(config)
    for step in range(2):
        before = copy(state)
        state, metrics = step_of(config, state, make_batch(step))
        assert np.isfinite(float(metrics["total_loss"]))
        layers = metrics["layers"]
        np.testing.assert_array_equal(layers.num_tokens, [TOKENS] * LAYERS)
        kernels = [s.params["moe_layers"]["moe"]["router"]["kernel"] for s in (before, state)]
        assert bool((kernels[0] != kernels[1]).any()) == config.moe.method.learns
        if next_by_hand is None:
            assert "router_state" not in state.variables
            continue
        old, new = (s.variables["router_state"]["moe_layers"]["moe"] for s in (before, state))
        expected = next_by_hand(jax.tree.map(np.asarray, old), np.asarray(layers.tokens_per_expert))
        assert new.keys() == expected.keys()
        for name, array in new.items():
            if expected[name] is not None:
                np.testing.assert_allclose(array, expected[name], rtol=1e-6, err_msg=name)
            assert np.abs(np.asarray(array) - np.asarray(old[name])).max() > 0

    # At evaluation nothing moves where it may, and nothing is random: there is no key to draw with.
    evaluate = functools.partial(program.model.apply, train=False, mutable=list(state.variables))
    (_, stats), variables = jax.jit(evaluate)({"params": state.params, **state.variables}, make_batch(7)["inputs"])
    assert np.isfinite(stats.auxiliary_loss).all()
    assert_trees_equal(variables, state.variables)

    # Saved, restored, and one step further: the same bits.
    with CheckpointStore(tmp_path) as store:
        store.save(2, state, {})
    with CheckpointStore(tmp_path) as store:
        restored, _, _ = store.restore_latest(program.abstract_state)
    assert_trees_equal(restored, state)
    straight, _ = step_of(config, state, make_batch(2))
    resumed, _ = step_of(config, restored, make_batch(2))
    assert_trees_equal(resumed, straight)

    # A step that is not finite leaves the state as it was.
    after, _ = step_of(config, steps.poisoned(straight), make_batch(3))
    assert int(after.bad_steps) == 1
    assert_trees_equal(after.variables, straight.variables)


def load(*tokens_per_expert: list[int], num_tokens: int = 8) -> Load:
    return Load(jnp.array(tokens_per_expert), jnp.full(len(tokens_per_expert), num_tokens))


def test_the_lambda_of_remoe_by_hand():
    """N = 4, K = 1, 8 tokens in each of 2 layers: 64 gates, of which 16 are to be open.

    20 open: multiplied. 12: divided. 16: divided, for the share of closed gates is not below the one that is wanted;
    so lambda goes up and down around the point of balance. Layers are counted together: 9 and 6 are 15, 11 and 6 17.
    """
    config = moe_config(num_experts=4, top_k=1, router="remoe")

    def after(*loads: Load, start=1e-8) -> float:
        state = {"lambda": jnp.full(2, start)}
        for one in loads:
            state = next_router_state(state, one, config)
        assert state["lambda"][0] == state["lambda"][1]
        return float(state["lambda"][0])

    many, few, even = (load([n, n, 0, 0], [2 * n, 0, 0, 0]) for n in (5, 3, 4))
    below, above = (load([n, 0, 0, 0], [6, 0, 0, 0]) for n in (9, 11))
    for one, factor in ((many, 1.2), (few, 1 / 1.2), (even, 1 / 1.2), (below, 1 / 1.2), (above, 1.2)):
        assert after(one) == pytest.approx(1e-8 * factor)
    assert after(*[many, few] * 5) == pytest.approx(1e-8, rel=1e-5)
    assert after(*[many] * 10) == pytest.approx(1e-8 * 1.2**10, rel=1e-5)
    # However long the share stays on one side, lambda comes back.
    for one, limit in ((few, 1e-30), (many, 1e30)):
        assert after(one, start=limit) == np.float32(limit)


def test_the_bias_of_loss_free_balancing_by_hand():
    """Mean 4 of (2, 4, 10, 0): up, stays, down, up. An even load is a fixed point. One layer alone works too."""
    config = moe_config(num_experts=4, top_k=1, router="loss_free", bias_update_rate=0.5)
    bias = jnp.array([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    new = next_router_state({"bias": bias}, load([2, 4, 10, 0], [4, 4, 4, 4], num_tokens=16), config)["bias"]
    np.testing.assert_array_equal(new, [[1.5, 2, 2.5, 4.5], [0, 0, 0, 0]])
    one = next_router_state({"bias": bias[0]}, Load(jnp.array([2, 4, 10, 0]), jnp.int32(16)), config)["bias"]
    np.testing.assert_array_equal(one, new[0])


def test_the_bias_evens_the_load_out():
    """Tokens that are much alike: without a bias the first experts take most of them."""
    config = moe_config(num_experts=8, top_k=2, router="loss_free", bias_update_rate=0.001)
    key = jax.random.key(0)
    logits = jnp.linspace(1, 0, 8) + 0.3 * jax.random.normal(key, (4, 256, 8))
    state = initial_router_state(config)

    @jax.jit
    def counts_of(state):
        index = config.method.route(RouterInputs(logits, state=state), config).expert_index
        return (index[..., None] == jnp.arange(8)).sum(axis=(0, 1, 2))

    first = counts_of(state)
    for _ in range(200):
        state = next_router_state(state, Load(counts_of(state), jnp.int32(1024)), config)
    assert first.max() > 2.5 * 256
    assert jnp.abs(counts_of(state) - 256).max() < 0.1 * 256


@dataclasses.dataclass(frozen=True)
class Probe(TopK):
    """Top-k whose losses, without a weight, are a number drawn from its key, and the square of that."""

    name = "probe"
    random = True

    def route(self, inputs, config):
        drawn = jnp.zeros(()) if inputs.key is None else jax.random.uniform(inputs.key)
        return super().route(inputs, config)._replace(substitution=drawn)

    def losses(self, decision, inputs, config):
        return {"drawn_loss": (0.0, decision.substitution), "square_loss": (0.0, decision.substitution**2)}


del METHODS["probe"]


def test_layers_microbatches_and_steps_draw_different_numbers():
    config = dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, router=Probe()))
    config = change(config, train={"grad_accum_steps": 2})
    program = Program(config, steps.VOCAB, jax.devices()[:1])
    step = make_train_step(program.model, program.optimizer, config)
    losses_of_step = program.jit(lambda state, batch: step(state, batch)[1]["layers"].more)
    state, drawn = program.new_state(), []
    for number in range(2):
        more = losses_of_step(dataclasses.replace(state, step=jnp.int32(number)), make_batch())
        drawn += [float(value) for value in more["drawn_loss"]]
        # Means over two microbatches: that of the squares is the square of the mean if both drew the same.
        assert (more["square_loss"] - more["drawn_loss"] ** 2 > 1e-6).all()
    assert len(set(drawn)) == 4  # of two layers in two steps


def test_a_loss_may_not_take_the_place_of_another():
    class Taking(TopK):
        name = "taking"

        def losses(self, decision, inputs, config):
            return {"load_balance_loss": (1.0, jnp.zeros(()))}

    del METHODS["taking"]
    layer = MoELayer(dataclasses.replace(CONFIG.moe, router=Taking()))
    with pytest.raises(ValueError, match="taking has a loss 'load_balance_loss': its name must end in _loss and not"):
        jax.eval_shape(functools.partial(layer.init, train=False), jax.random.key(0), jnp.ones((1, 2, 8)))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"router": "topk", "normalize_weights": True}, "with moe.top_k = 1 that makes every weight 1"),
        ({"router": "loss_free", "normalize_weights": True}, "with moe.top_k = 1 that makes every weight 1"),
        ({"router": "default", "top_k": 2, "normalize_weights": True}, "leave none for the default vectors"),
        ({"substitute": "backward", "expert_gradient": True}, "default vectors add nothing to the output"),
        ({"router": "default", "substitute": "backward", "substitute_ramp_steps": 3}, "could be ramped in"),
        ({"router": "default", "ema_update": "never"}, "'before', 'after'"),
        ({"router": "dense", "load_balance_weight": 0.01}, "the balance loss is constant"),
        ({"router": "dense", "capacity_factor": 1.0}, "none is over its capacity"),
        ({"router": "dense", "router_noise_std": 0.1}, "nothing to explore"),
        ({"router": "densemixer", "capacity_factor": 1.0}, "dropping tokens saves nothing"),
        ({"router": "sparsemixer", "top_k": 3}, "is defined only for 1 and 2"),
        ({"router": "sparsemixer", "num_experts": 1}, "needs experts to choose from"),
        ({"router": "sparsemixer", "mask_threshold": 0.0}, "the router would get no gradient"),
        ({"router": "sparsemixer", "score_function": "sigmoid"}, "made for softmax"),
        ({"router": "sparsemixer", "top_k": 2, "normalize_weights": True}, "experts that may be drawn"),
        ({"router": "sparsemixer", "router_noise_std": 0.1}, "draws experts at random already"),
        ({"router": "probmoe", "score_function": "sigmoid"}, "its gates are softmaxes"),
        ({"router": "probmoe", "top_k": 2, "normalize_weights": True}, "probabilities among all experts"),
        ({"router": "probmoe", "router_noise_std": 0.1}, "draws experts at random already"),
        ({"router": "probmoe", "balancer": "bias"}, "no bias steers its choice of experts"),
        ({"router": "remoe", "router_z_weight": 0.1}, "without a softmax"),
        ({"router": "remoe", "load_balance_weight": 0.01}, "its own loss balances the experts"),
        ({"router": "remoe", "capacity_factor": 2.0}, "not a capacity, says how many experts run"),
        ({"router": "remoe", "lambda_factor": 1.0}, "must be above 1"),
        ({"router": "remoe", "router_init_std": 0.0}, "a router of which all logits are 0 never learns"),
        ({"router": "remoe", "initial_lambda": 0.0}, "must be positive"),
        ({"router": "loss_free", "bias_update_rate": 0.0}, "must be positive"),
        ({"router": "expert_threshold", "balancer": "bias"}, "its thresholds even out the load"),
        ({"router": "expert_threshold", "load_balance_weight": 0.1}, "its thresholds even out the load"),
        ({"router": "expert_threshold", "capacity_factor": 2.0}, "say how many experts run"),
        ({"router": "expert_threshold", "router_noise_std": 0.1}, "not those of scores without"),
        ({"router": "expert_threshold", "normalize_weights": True}, "with moe.top_k = 1 that makes every weight 1"),
        ({"router": "expert_threshold", "num_experts": 1}, "needs experts to choose from"),
        ({"router": "expert_threshold", "threshold_decay": 1.5}, "lie in"),
        ({"router": "default_threshold", "top_k": 2, "normalize_weights": True}, "leave none for the default vectors"),
        (
            {"router": "default_threshold", "substitute": "backward", "expert_gradient": True},
            "moe.default_threshold.sub",
        ),
        ({"router": "frozen", "load_balance_weight": 0.1}, "no loss reaches its router"),
        ({"router": "frozen", "sequence_balance_weight": 0.1}, "no loss reaches its router"),
        ({"router": "frozen", "router_z_weight": 0.1}, "no loss reaches its router"),
        ({"router": "frozen", "balancer": "loss"}, "no loss reaches its router; use 'bias', 'quantile' or 'none'"),
        ({"router": "hash", "router_z_weight": 0.1}, "'hash': it uses no logits"),
        ({"router": "hash", "router_noise_std": 0.1}, "it uses no logits"),
        ({"router": "hash", "router_init_std": 0.1}, "it uses no logits"),
        ({"router": "hash", "score_function": "sigmoid"}, "it uses no logits"),
        ({"router": "hash", "top_k": 2, "normalize_weights": True}, "its weights are 1/K already"),
        ({"router": "hash", "balancer": "loss"}, "its choice of experts never changes"),
        ({"router": "hash", "sequence_balance_weight": 0.1}, "its choice of experts never changes"),
        ({"router": "topk", "score_function": "sigmoid", "router_z_weight": 0.1}, "no partition function"),
        ({"router": "topk", "capacity_factor": 0.0}, "must be positive"),
        ({"router": "topk", "router_init_std": -0.1}, "must be at least 0"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_with_the_reason(fields, words):
    with refused(words):
        moe_config(**fields)


def test_a_weight_of_zero_and_groups_of_other_methods_are_no_contradiction():
    assert moe_config(router="remoe", load_balance_weight=0.0).balance_weight == 0
    built = MoEConfig.from_mapping({"router": "remoe", "loss_free": {"bias_update_rate": 0.5}})
    assert built == moe_config(router="remoe")
    for mapping, words in (
        ({"router": "remoe", "loss_free": {"bias_update_rate": -1.0}}, "moe.loss_free.bias_update_rate is -1"),
        ({"remoe": {"lamda_factor": 1.1}}, "no setting 'moe.remoe.lamda_factor'; did you mean 'lambda_factor'"),
        ({"defualt": {"ema_decay": 0.5}}, "no setting 'moe.defualt'; did you mean 'default'"),
        ({"default": 3}, "moe.default is 3, but must be a group of settings"),
        ({"router": []}, "moe.router is [], but must be one of 'default', 'default_sampled', 'default_threshold'"),
    ):
        with refused(re.escape(words)):
            MoEConfig.from_mapping(mapping)


@pytest.mark.parametrize("router", METHODS)
def test_settings_of_every_method_survive_being_saved(router):
    config = moe_config(router=router, num_experts=4)
    assert MoEConfig.from_mapping(config.to_dict()) == config
    assert config.balance_weight == (
        0.01 if router in ("topk", "default", "default_sampled", "densemixer", "sparsemixer", "probmoe") else 0
    )
    assert dataclasses.replace(config, top_k=2).method == config.method


def test_settings_saved_before_methods_had_groups_are_read():
    old = {"router": "default", "ema_decay": 0.75, "substitute": "backward", "top_k": 2}
    assert MoEConfig.from_mapping(old) == moe_config(top_k=2, ema_decay=0.75, substitute="backward")
    assert MoEConfig.from_mapping({**old, "router": "topk"}) == moe_config(router="topk", top_k=2)
