"""The moving average and the combine, by hand and against loops over tokens and experts, and what they cost."""

import functools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jax_core
from reference import assert_close

from default_moe.config import MoEConfig
from default_moe.default_vectors import combine, update_ema
from default_moe.moe import MoELayer
from default_moe.routing import group_by_expert


def test_moving_average_by_hand():
    """Expert 0: sum (6, 2) of weight 4, mean (1.5, 0.5); 0.75 (2, 4) + 0.25 (1.5, 0.5) = (1.875, 3.125).

    Expert 1 had no token. Expert 2 had less than one token's worth: the mean is still 0.5 / 0.25 = 2.
    """
    ema = jnp.array([[2.0, 4.0], [0.1, -0.3], [0.0, 0.0]])
    sums = jnp.array([[6.0, 2.0], [0.0, 0.0], [0.5, 0.5]])
    new = update_ema(ema, sums, jnp.array([4.0, 0.0, 0.25]), 0.75)
    np.testing.assert_array_equal(new, [[1.875, 3.125], ema[1], [0.5, 0.5]])


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_extreme_decays(decay):
    """Decay 1 never moves; decay 0 forgets all but this step, and even then an idle expert keeps its vector."""
    ema, sums, weight = jnp.array([[2.0], [3.0]]), jnp.array([[8.0], [0.0]]), jnp.array([2.0, 0.0])
    np.testing.assert_array_equal(update_ema(ema, sums, weight, decay), [[4.0 if decay == 0 else 2.0], [3.0]])


def test_combine_by_hand():
    """One token, p = (0.5, 0.3, 0.2), expert 1 active with output (10, 20), defaults (1, 0), (9, 9), (0, 1).

    Forward: 0.3 (10, 20) + 0.5 (1, 0) + 0.2 (0, 1) = (3.5, 6.2); backward-only: (3, 6).
    With g = (1, 2): dy/dp is 1 * 1 = 1, 10 + 40 = 50 and 2; the output's gradient is 0.3 (1, 2).
    """
    layout = group_by_expert(jnp.array([[1]]), 3, 1)
    probs, out = jnp.array([[0.5, 0.3, 0.2]]), jnp.array([[10.0, 20.0]])
    ema, g = jnp.array([[1.0, 0.0], [9.0, 9.0], [0.0, 1.0]]), jnp.array([[1.0, 2.0]])
    for substitute, expected in (("forward", [[3.5, 6.2]]), ("backward", [[3.0, 6.0]])):
        y, pull = jax.vjp(functools.partial(_combine, layout=layout, substitute=substitute), probs, out, ema)
        assert_close(y, expected)
        d_probs, d_out, d_ema = pull(g)
        assert_close(d_probs, [[1, 50, 2]])
        assert_close(d_out, [[0.3, 0.6]])
        np.testing.assert_array_equal(d_ema, 0)
    y, pull = jax.vjp(lambda p, o: combine(p, o, None, layout, "forward"), probs, out)
    assert_close(y, [[3, 6]])
    assert_close(pull(g)[0], [[0, 50, 0]])  # plain top-k: nothing for the inactive


def _combine(probs, out, ema, *, layout, substitute):
    return combine(probs, out, ema, layout, substitute)


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("method", ["forward", "backward", "topk"])
@pytest.mark.parametrize("num_held", [6, 4], ids=["all held here", "some held elsewhere"])
def test_combine_equals_loops(num_held, method, align):
    """Experts num_held and up are held elsewhere: they add nothing here, in either direction."""
    num_tokens, top_k, dim, num_experts = 11, 3, 5, 6
    rng = np.random.default_rng(0)
    run = jax.jit(functools.partial(_value_and_grads, substitute="forward" if method == "topk" else method))
    for _ in range(5):
        chosen = np.array([rng.choice(num_experts, top_k, replace=False) for _ in range(num_tokens)])
        layout = group_by_expert(jnp.asarray(chosen), num_held, align)
        probs = rng.dirichlet(np.ones(num_experts), num_tokens)[:, :num_held].astype(np.float32)
        ema = rng.normal(size=(num_held, dim)).astype(np.float32)
        g = rng.normal(size=(num_tokens, dim)).astype(np.float32)
        assignment = np.asarray(layout.assignment_S)
        out = rng.normal(size=(len(assignment), dim)).astype(np.float32)

        y, d_probs, d_out = np.zeros((num_tokens, dim)), np.zeros(probs.shape), np.zeros(out.shape)
        for t in range(num_tokens):
            for i in range(num_held):
                p = np.float64(probs[t, i])
                if i in chosen[t]:
                    slot = int(np.flatnonzero(assignment == t * top_k + list(chosen[t]).index(i))[0])
                    y[t] += p * out[slot]
                    d_probs[t, i] = np.float64(g[t]) @ out[slot]
                    d_out[slot] = p * g[t]
                elif method != "topk":
                    y[t] += p * ema[i] if method == "forward" else 0
                    d_probs[t, i] = np.float64(g[t]) @ ema[i]

        got = run(probs, out, None if method == "topk" else ema, layout, g)
        for name, a, b in zip(("y", "d_probs", "d_out"), got, (y, d_probs, d_out), strict=True):
            assert_close(a, b, name)


def _value_and_grads(probs, out, ema, layout, g, *, substitute):
    y, pull = jax.vjp(lambda p, o: combine(p, o, ema, layout, substitute), probs, out)
    return y, *pull(g)


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


def traced(direction: str, **fields):
    n = PRIMES
    config = MoEConfig(num_experts=n["N"], top_k=n["K"], expert_dim=n["F"], **fields)
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
        for router in ("default", "topk"):
            equations = traced(direction, router=router, substitute=substitute, matmul=matmul)
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
