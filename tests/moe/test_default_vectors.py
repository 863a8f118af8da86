"""The moving average and the combine, by hand and against loops over tokens and experts, and what they cost."""

import functools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.layers import moe_config
from helpers.reference import assert_close
from jax.extend import core as jax_core

from default_moe.moe import MoELayer
from default_moe.moe.default_vectors import combine, update_ema


@pytest.mark.parametrize(
    ("ema", "sums", "weight", "decay", "expected"),
    [
        # 0.75 (2, 4) + 0.25 (6, 2) / 4 = (1.875, 3.125); no token: kept; less than one: the mean is still 0.5 / 0.25.
        (
            [[2.0, 4.0], [0.1, -0.3], [0.0, 0.0]],
            [[6.0, 2.0], [0.0, 0.0], [0.5, 0.5]],
            [4.0, 0.0, 0.25],
            0.75,
            [[1.875, 3.125], [0.1, -0.3], [0.5, 0.5]],
        ),
        # Decay 1 never moves; decay 0 forgets all but this step, and even then an idle expert keeps its vector.
        ([[2.0], [3.0]], [[8.0], [0.0]], [2.0, 0.0], 0.0, [[4.0], [3.0]]),
        ([[2.0], [3.0]], [[8.0], [0.0]], [2.0, 0.0], 1.0, [[2.0], [3.0]]),
    ],
)
def test_moving_average_by_hand(ema, sums, weight, decay, expected):
    new = update_ema(*map(jnp.array, (ema, sums, weight)), decay)
    np.testing.assert_array_equal(new, jnp.array(expected))


def test_combine_by_hand():
    """One token, p = (0.5, 0.3, 0.2), expert 1 active, its output weighted (3, 6), defaults (1, 0), (9, 9), (0, 1).

    Forward: (3, 6) + 0.5 (1, 0) + 0.2 (0, 1) = (3.5, 6.2); half of that: (3.25, 6.1); backward-only: (3, 6).
    With g = (1, 2): dy/dp is 1 and 2 for the inactive; that of expert 1 is not the combine's.
    """
    active, probs = jnp.array([[3.0, 6.0]]), jnp.array([[0.5, 0.3, 0.2]])
    ema, g = jnp.array([[1.0, 0.0], [9.0, 9.0], [0.0, 1.0]]), jnp.array([[1.0, 2.0]])
    for share, expected in ((jnp.float32(1), [[3.5, 6.2]]), (jnp.float32(0.5), [[3.25, 6.1]]), (None, [[3.0, 6.0]])):

        def combined(active, probs, ema, share=share):
            return combine(active, probs, ema, jnp.array([[False, True, False]]), share)

        y, pull = jax.vjp(combined, active, probs, ema)
        assert_close(y, expected)
        d_active, d_probs, d_ema = pull(g)
        np.testing.assert_array_equal(d_active, g)
        assert_close(d_probs, [[1, 0, 2]])
        np.testing.assert_array_equal(d_ema, 0)


def jaxpr_equations(jaxpr):
    """All equations of a jaxpr and of those inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = inner.jaxpr if isinstance(inner, jax_core.ClosedJaxpr) else inner
                if isinstance(inner, jax_core.Jaxpr):
                    yield from jaxpr_equations(inner)


# T = 3 * 11, N = 7, K = 5, D = 13, F = 17: any product of axes can be told by its prime factors.
PRIMES = {"B": 3, "L": 11, "N": 7, "K": 5, "D": 13, "F": 17}


@functools.cache
def traced(direction: str, **fields):
    n = PRIMES
    config = moe_config(num_experts=n["N"], top_k=n["K"], expert_dim=n["F"], **fields)
    x = jax.ShapeDtypeStruct((n["B"], n["L"], n["D"]), jnp.float32)
    layer = MoELayer(config)
    variables = jax.eval_shape(functools.partial(layer.init, train=True), jax.random.key(0), x)

    def objective(variables, x):
        (y, aux), state = layer.apply(variables, x, train=True, mutable=["default_vectors"])
        return y.sum() + aux["load_balance_loss"], state

    if direction == "backward":
        objective = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    return list(jaxpr_equations(jax.make_jaxpr(objective)(variables, x).jaxpr))


@pytest.mark.parametrize("matmul", ["ragged", "blocks"])
@pytest.mark.parametrize("substitute", ["forward", "backward"])
def test_no_array_holds_an_output_per_token_and_expert(substitute, matmul):
    n = PRIMES
    equations = traced("backward", substitute=substitute, matmul=matmul)
    shapes = {v.aval.shape for eqn in equations for v in eqn.outvars if hasattr(v.aval, "shape")}
    assert (n["B"], n["L"], n["D"]) in shapes and (n["N"], n["D"], n["F"]) in shapes  # sub-jaxprs were seen
    for shape in shapes:
        assert math.prod(shape) % (n["B"] * n["L"] * n["N"] * n["D"]) or 0 in shape, f"{shape} holds [T, N, D]"
        assert not {n["K"], n["D"]} <= set(shape), f"{shape} holds [T, K, D]"


@pytest.mark.parametrize("matmul", ["ragged", "blocks"])
@pytest.mark.parametrize("substitute,extra", [("forward", (1, 2)), ("backward", (0, 1))])
def test_cost_beyond_top_k(substitute, extra, matmul):
    """One [T, N] x [N, D] product (T N D multiplications) more in each direction that substitutes.

    What else there is more is the sum of the active outputs for the moving average: at most S D multiplications, with
    S = T K slots and the padding of 7 experts and of the whole to blocks of 8.
    """
    n = PRIMES
    small = n["B"] * n["L"] * n["N"] * n["D"]
    of_statistics = (n["B"] * n["L"] * n["K"] + 8 * n["N"] + 7) * n["D"]
    for direction, expected in zip(("forward", "backward"), extra, strict=True):
        works = []
        for fields in ({"router": "default", "substitute": substitute}, {"router": "topk"}):
            equations = traced(direction, matmul=matmul, **fields)
            dots = [eqn for eqn in equations if eqn.primitive.name in ("dot_general", "ragged_dot_general")]
            works.append(Counter(_multiplications(eqn) for eqn in dots))
        assert not works[1] - works[0]
        more = works[0] - works[1]
        assert more.pop(small, 0) == expected
        assert sum(work * count for work, count in more.items()) <= of_statistics


def _multiplications(eqn) -> int:
    """Of a dot: the size of its result times that of the axes contracted. Of a ragged dot likewise, all rows once."""
    dimensions = eqn.params.get("dimension_numbers") or eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    (contracted, _), _ = dimensions
    lhs = eqn.invars[0].aval.shape
    return math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contracted)
