"""Options that any method may have, against the float64 loops, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import reference_routing
from helpers.layers import check_step, inputs, make_config, moe_config
from helpers.reference import assert_close
from helpers.refusals import refused

from default_moe.methods import RouterInputs

SIGMOID, SQRT = {"score_function": "sigmoid"}, {"score_function": "sqrt_softplus"}
NORMALIZED = {"normalize_weights": True}


@pytest.mark.parametrize(
    "fields",
    [
        {"router": "topk", "sequence_balance_weight": 1.0, **SQRT},
        {"router": "default", "substitute": "backward", **SQRT, **NORMALIZED},
        {"router": "default", "weight_scale": 2.5, **SIGMOID},
        {"router": "densemixer", "weight_scale": 2.5, **SIGMOID, **NORMALIZED},
    ],
    ids=str,
)
def test_every_option_equals_the_loops(fields):
    check_step(make_config(matmul="ragged", **fields), *inputs(31))


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
        ({"router": "topk", "weight_scale": 0.0}, "must be positive"),
        ({"router": "remoe", "weight_scale": 2.5}, "whose size it learns"),
        ({"router": "sparsemixer", "weight_scale": 2.5}, "weights that are probabilities"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(fields, words):
    with refused(words):
        moe_config(**fields)
