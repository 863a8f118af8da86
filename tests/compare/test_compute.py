"""What a method's training computes is what its gradient computes, product by product."""

import dataclasses
import math

import jax
import optax
import pytest
from helpers.steps import CONFIG, VOCAB, make_batch

from default_moe.compare.compute import training_flops_per_token
from default_moe.methods import METHODS
from default_moe.model.size import train_flops_per_token
from default_moe.training.program import Program
from default_moe.training.step import make_gradient

LENGTH = 16


def products(jaxpr, times=1):
    """Operations of all matrix products that a program takes, those inside a scan as often as it turns."""
    flops = 0
    for equation in jaxpr.eqns:
        name, shapes = equation.primitive.name, [v.aval.shape for v in equation.invars]
        assert name != "while"
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            summed = math.prod(shapes[0][axis] for axis in contracted)
            flops += 2 * times * math.prod(equation.outvars[0].aval.shape) * summed
        elif name.startswith("ragged_dot"):  # every row meets one expert's matrix
            flops += 2 * times * math.prod(shapes[0]) * equation.outvars[0].aval.shape[-1]
        turns = equation.params["length"] if name == "scan" else 1
        below = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        flops += sum(products(inner, turns * times) for inner in below if hasattr(inner, "eqns"))
    return flops


def counted(config):
    """Per token: of 16 rows what 8 do not take, so that padding, which is the same, does not count."""
    program = Program(config, VOCAB, devices=jax.devices()[:1])
    state = jax.eval_shape(lambda: program.initial_state(0, optax.identity()))
    gradient = make_gradient(program.model, config)
    small, large = (
        products(jax.make_jaxpr(gradient)(state, make_batch(0, rows, LENGTH), jax.random.key(0)).jaxpr)
        for rows in (8, 16)
    )
    return (large - small) / (8 * LENGTH)


@pytest.mark.parametrize(
    ("method", "options", "top_k"),
    [
        ("topk", {}, 2),
        ("default", {}, 1),
        ("default", {"substitute": "backward"}, 2),
        ("default", {"expert_gradient": True}, 1),
        ("default_sampled", {}, 1),
        ("densemixer", {}, 2),
        ("dense", {}, 1),
        ("frozen", {}, 1),
    ],
    ids=str,
)
def test_products_are_those_of_the_gradient(method, options, top_k):
    moe = dataclasses.replace(CONFIG.moe, router=METHODS[method](**options), top_k=top_k, matmul="ragged")
    train = dataclasses.replace(CONFIG.train, sequence_length=LENGTH)
    config = dataclasses.replace(CONFIG, moe=moe, train=train)
    norms = (2 * 2 + 1) * 2 * 16  # parameters that are counted as if they took part in a product
    experts = float(moe.experts_per_token)
    assert training_flops_per_token(config, VOCAB, experts) == pytest.approx(counted(config) + 6 * norms, rel=1e-12)


def test_experts_count_as_measured():
    """One more expert of 3 matrices of 16 x 24 in two layers: 6 each; with a dense gradient 2 of it are spared."""
    of_expert = 2 * 3 * 16 * 24
    config = dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, router="topk"))
    one, more = (training_flops_per_token(config, VOCAB, experts) for experts in (1.0, 2.25))
    assert more - one == 6 * 1.25 * of_expert and one == train_flops_per_token(config, VOCAB)
    assert training_flops_per_token(config, VOCAB, math.nan) == one
    config = dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, router="densemixer"))
    dense, fewer = (training_flops_per_token(config, VOCAB, experts) for experts in (1.0, 2.0))
    assert dense == one + 2 * 3 * of_expert and fewer - dense == 4 * of_expert
