"""Options that any method may have, against the float64 loops, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import reference_routing, sharded_layers
from helpers.layers import check_step, inputs, make_config, moe_config
from helpers.reference import assert_close
from helpers.refusals import refused

from default_moe.methods import RouterInputs
from default_moe.methods.decision import choose
from default_moe.sharding import make_mesh

SIGMOID, SQRT = {"score_function": "sigmoid"}, {"score_function": "sqrt_softplus"}
NORMALIZED = {"normalize_weights": True}
GROUPS = {"num_groups": 4, "groups_per_token": 2, "top_k": 3}


@pytest.mark.parametrize(
    "fields",
    [
        {"router": "topk", "sequence_balance_weight": 1.0, **SQRT},
        {"router": "default", "substitute": "backward", **SQRT, **NORMALIZED},
        {"router": "default", "weight_scale": 2.5, **SIGMOID},
        {"router": "densemixer", "weight_scale": 2.5, **SIGMOID, **NORMALIZED},
        {"router": "default", **GROUPS},
        {"router": "densemixer", "product_form": True, "weight_scale": 2.5},
        {"router": "default", "product_form": True, "substitute": "backward", "capacity_factor": 1.0},
        {"router": "loss_free", "sequence_balance_weight": 1.0, **SIGMOID, **GROUPS},
    ],
    ids=str,
)
def test_every_option_equals_the_loops(fields):
    expected, _, _ = check_step(make_config(matmul="ragged", **fields), *inputs(31))
    if "num_groups" in fields:
        freely = [set(np.argsort(-logits)[:3]) for logits in expected.routes.logits]
        assert sum(set(a) != b for a, b in zip(expected.routes.chosen, freely, strict=True)) > 5


@pytest.mark.parametrize(
    "fields",
    [{"router": "loss_free", **GROUPS}, {"router": "densemixer", "product_form": True, "simbal_weight": 0.1}],
    ids=str,
)
def test_options_equal_the_loops_on_a_mesh(fields):
    sharded_layers.check_step(make_mesh(2, 2, 2), make_config(**fields))


def test_groups_by_hand():
    """Two of three groups. Sums of the two best of each: 6, 7, 5; with the bias 6, 7, 8. Then the two largest left."""
    config = moe_config(num_experts=9, top_k=2, router="topk", num_groups=3, groups_per_token=2, **SQRT)
    scores = np.array([[5.0, 1.0, 0.5], [4.0, 3.0, 2.0], [4.5, 0.5, 0.2]])
    inputs = RouterInputs(jnp.log(jnp.expm1(jnp.square(jnp.asarray(scores.reshape(1, 1, 9))))))
    np.testing.assert_array_equal(choose(inputs, config), [[[0, 3]]])
    bias = jnp.array([0.0] * 7 + [3.0, 0.0])
    np.testing.assert_array_equal(choose(inputs._replace(state={"bias": bias}), config), [[[6, 3]]])


@pytest.mark.parametrize("normalized", [{}, NORMALIZED], ids=str)
def test_sqrt_softplus_far_from_zero(normalized):
    """Gates, distribution and all of their slopes; float32 rounds exp(-100) to 0, and its square root has no slope."""
    config = moe_config(num_experts=4, top_k=2, router="densemixer", **SQRT, **normalized)
    settings = reference_routing.Settings(2, "densemixer", **SQRT, **normalized)

    def gates_and_probs(logits):
        decision = config.method.route(RouterInputs(logits[None, None]), config)
        return jnp.stack([decision.gates, decision.probs])[:, 0, 0]

    both = jax.jit(lambda logits: (gates_and_probs(logits), jax.jacobian(gates_and_probs)(logits)))
    for logits in ([-100.0, -101.0, -140.0, -99.0], [100.0, 99.0, -100.0, 98.0], [-16.9, -17.1, 0.0, 0.5]):
        expected = reference_routing.route_token(np.array(logits), settings, None)
        values, slopes = both(jnp.array(logits))
        assert_close(values[0], expected.weights)
        assert_close(values[1], expected.probs)
        assert_close(slopes[0], expected.weights_to_logits)
        assert_close(slopes[1], expected.probs_to_logits)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"router": "topk", "router_z_weight": 0.1, **SQRT}, "is 'sqrt_softplus', which has no partition function"),
        ({"router": "remoe", **SQRT}, "without a softmax"),
        ({"router": "sparsemixer", **SQRT}, "made for softmax"),
        ({"num_groups": 3}, "must divide moe.num_experts = 8"),
        ({"num_groups": 4, "groups_per_token": 5}, "must lie between 1 and moe.num_groups = 4"),
        ({"groups_per_token": 2}, "must lie between 1 and moe.num_groups = 1"),
        ({**GROUPS, "top_k": 5}, "of moe.num_groups=4 groups hold only 4 experts"),
        ({**GROUPS, "balancer": "quantile"}, "those of a choice among all experts; use 'bias'"),
        ({**GROUPS, "router": "sparsemixer", "top_k": 2}, "does not choose the K experts of largest score"),
        ({**GROUPS, "router": "dense"}, "none is chosen"),
        ({**GROUPS, "router": "remoe"}, "whatever group it is in"),
        ({"router": "dense", "simbal_weight": 0.1}, "so that the load is even"),
        ({"router": "remoe", "simbal_weight": 0.1}, "its own loss balances the experts"),
        ({"router": "topk", "weight_scale": 0.0}, "must be positive"),
        ({"router": "remoe", "weight_scale": 2.5}, "whose size it learns"),
        ({"router": "sparsemixer", "weight_scale": 2.5}, "weights that are probabilities"),
        ({"router": "probmoe", "weight_scale": 2.5}, "probabilities among all experts"),
        ({"router": "hash", "weight_scale": 2.5}, "its weights are 1/K"),
        ({"router": "hash", "simbal_weight": 0.1}, "it uses no logits"),
        ({"router": "frozen", "coupling_weight": 0.1}, "it would train the router's matrix"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(fields, words):
    with refused(words):
        moe_config(**fields)
