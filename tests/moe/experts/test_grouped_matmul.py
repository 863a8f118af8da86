"""Grouped matrix products against one product per row, and experts by every backend against loops over tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import reference
from helpers.products import GROUPS, ROWS, UNITS, F, check, loop, random_arrays
from helpers.reference import assert_close

from default_moe.moe.experts.backends import group_alignment, resolve_backend
from default_moe.moe.experts.blocks import block_experts, block_rows, tail_rows
from default_moe.moe.experts.grouped_matmul import grouped_matmul
from default_moe.moe.experts.layout import group_by_expert
from default_moe.moe.experts.sorted_rows import sorted_experts
from default_moe.moe.experts.swiglu import ExpertParams


@pytest.mark.parametrize("units", UNITS.values(), ids=UNITS.keys())
def test_products_and_gradients_equal_a_loop(units):
    lhs, rhs, g = random_arrays(np.random.default_rng(0))
    check(lhs, rhs, [8 * u for u in units], g)


def test_random_group_sizes_equal_a_loop():
    rng = np.random.default_rng(1)
    for _ in range(25):
        cuts = np.sort(rng.integers(0, ROWS + 1, GROUPS))  # the last cut leaves rows over
        lhs, rhs, g = random_arrays(rng)
        check(lhs, rhs, np.diff(cuts, prepend=0).tolist(), g)


def test_the_output_has_the_dtype_of_the_rows():
    lhs, rhs, _ = random_arrays(np.random.default_rng(2))
    sizes = [8, 16, 8, 8]
    out = grouped_matmul(jnp.asarray(lhs, jnp.bfloat16), jnp.asarray(rhs, jnp.bfloat16), jnp.asarray(sizes))
    assert out.dtype == jnp.bfloat16
    expected, _, _ = loop(lhs, rhs, sizes, np.zeros((ROWS, F)))
    # bfloat16 rounds at 2^-8 at worst: both operands and the result make 3 * 2^-8 = 1.2 % of the terms' size.
    bound = 3 * 2**-8 * (np.abs(lhs) @ np.abs(rhs).max(axis=0))
    assert (np.abs(np.asarray(out, np.float64) - expected) <= bound).all()


# Experts held here, those of them that get rows, and how many others there are.
ROUTES = {
    "even": (4, (0, 1, 2, 3), 0),
    "all on one": (4, (2,), 0),
    "the last idle": (4, (0, 1, 2), 0),
    "the first idle": (4, (2, 3), 0),
    "some held elsewhere": (3, (0, 1, 2), 2),
    "all held elsewhere": (3, (), 3),
}


@functools.cache
def compiled_experts(backend: str, rows: int, num_held: int):
    def experts(x, weight, weights, chosen, counted):
        if backend == "blocks":
            return block_experts(x, weight, counted, weights, group_by_expert(chosen, num_held, 1), rows)
        layout = group_by_expert(chosen, num_held, rows)
        return sorted_experts(x, weight, counted, weights, layout, rows, backend)

    def objective(x, weight, weights, chosen, counted, g):
        y, sums = experts(x, weight, weights, chosen, counted)
        # The sums are statistics: that they carry no gradient is part of what is tested.
        return (y * g).sum() + sums.sum(), (y, sums)

    return jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True))


def check_experts(chosen: np.ndarray, num_held: int, backend: str, rows: int) -> None:
    """Outputs, sums and gradients of tokens that chose experts [T, K], against loops over tokens and choices."""
    rng, shapes = np.random.default_rng(rows), ((num_held, 5, 3), (num_held, 5, 3), (num_held, 3, 5))
    x, g = (rng.normal(size=(len(chosen), 5)).astype(np.float32) for _ in range(2))
    weight, counted = (rng.random(chosen.shape).astype(np.float32) for _ in range(2))
    weights = ExpertParams(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))

    params = reference.Params(np.zeros((5, 0)), *(np.float64(w) for w in weights))
    y, d_weight, sums = np.zeros(x.shape), np.zeros(chosen.shape), np.zeros((num_held, 5))
    d = reference.Gradients(np.zeros(x.shape), *(np.zeros(p.shape) for p in params))
    for (t, k), e in np.ndenumerate(chosen):
        if e < num_held:
            out = reference.expert(params, e, np.float64(x[t]))
            y[t] += weight[t, k] * out
            sums[e] += counted[t, k] * out
            d_weight[t, k] = g[t] @ out
            reference.add_expert_gradient(d, params, e, np.float64(x), t, np.float64(weight[t, k]) * g[t])

    (_, got), gradients = compiled_experts(backend, rows, num_held)(x, weight, weights, chosen, counted, g)
    expected = (y, sums, d.x, d_weight, d.gate, d.up, d.down)
    names = ("y", "sums", "gradient of x", "of the weights", "of gate", "of up", "of down")
    for name, a, b in zip(names, jax.tree.leaves((got, gradients)), expected, strict=True):
        assert a.dtype == jnp.float32
        assert_close(a, b, name)


@pytest.mark.parametrize("backend,rows", [("ragged", 1), ("ragged", 8), ("blocks", 1), ("blocks", 4), ("blocks", 64)])
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())
def test_experts_and_gradients_equal_loops(route, backend, rows):
    num_held, used, elsewhere = route
    available = [*used, *range(num_held, num_held + elsewhere)]
    rng, top_k = np.random.default_rng(rows), min(2, len(available))
    chosen = np.array([rng.choice(available, top_k, replace=False) for _ in range(13)])
    check_experts(chosen, num_held, backend, rows)


# R = 64 and blocks of 8 for what it leaves: loads at the edges of both sizes, of none, and of several blocks.
LOADS = {
    "one block, and a row more or less": (64, 65, 63, 0),
    "the most in small blocks, and the least in a large one": (48, 49, 0, 47),
    "small blocks only": (1, 8, 9, 40),
    "several large ones and some small": (0, 130, 177, 0),
    "the last one padded": (0, 0, 0, 113),
}


@pytest.mark.parametrize("loads", LOADS.values(), ids=LOADS.keys())
def test_blocks_of_both_sizes_equal_loops(loads):
    """The rest of 310 tokens chose an expert held elsewhere, so that all are one program."""
    chosen = np.repeat(np.arange(5), (*loads, 310 - sum(loads)))
    check_experts(np.random.default_rng(0).permutation(chosen)[:, None], 4, "blocks", 64)


@pytest.mark.parametrize("backend", ["blocks", "ragged"])
def test_gradients_of_bfloat16_weights_are_summed_in_float32(backend):
    """4,096 tokens on one expert in blocks of 16: in bfloat16 a sum would stop growing at 256 times its terms."""
    rng, (tokens, dim) = np.random.default_rng(0), (4096, 4)
    x, g = (jnp.asarray(rng.uniform(0.5, 1, (tokens, dim)), jnp.bfloat16) for _ in range(2))
    weights = ExpertParams(*(jnp.asarray(rng.uniform(0.5, 1, (1, dim, dim)), jnp.bfloat16) for _ in range(3)))
    layout = group_by_expert(jnp.zeros((tokens, 1), jnp.int32), 1, 1 if backend == "blocks" else 8)
    gates = jnp.ones((tokens, 1))

    @jax.jit
    def gradient(weights):
        def objective(weights):
            if backend == "blocks":
                return (block_experts(x, gates, None, weights, layout, 16)[0] * g).sum()
            return (sorted_experts(x, gates, None, weights, layout, 8, backend)[0] * g).sum()

        return jax.grad(objective)(weights)

    params = reference.Params(np.zeros((dim, 0)), *(np.asarray(w, np.float64) for w in weights))
    d = reference.Gradients(np.zeros((tokens, dim)), *(np.zeros(p.shape) for p in params))
    for t in range(tokens):
        reference.add_expert_gradient(d, params, 0, np.asarray(x, np.float64), t, np.asarray(g[t], np.float64))
    for name, found in gradient(weights)._asdict().items():
        # Of positive terms, each rounded a few times at 2^-9, and so is the sum.
        np.testing.assert_allclose(np.float64(found), getattr(d, name), rtol=2**-7, err_msg=name)


def test_no_sums_where_none_are_asked_for():
    weights = ExpertParams(jnp.ones((2, 3, 4)), jnp.ones((2, 3, 4)), jnp.ones((2, 4, 3)))
    layout = group_by_expert(jnp.array([[0], [1]]), 2, 1)
    assert block_experts(jnp.ones((2, 3)), jnp.ones((2, 1)), None, weights, layout, 8)[1] is None
    assert sorted_experts(jnp.ones((2, 3)), jnp.ones((2, 1)), None, weights, layout, 1, "ragged")[1] is None


def test_the_choice_on_a_cpu():
    assert resolve_backend("auto") == "blocks"
    assert [resolve_backend(b) for b in ("ragged", "blocks")] == ["ragged", "blocks"]
    assert group_alignment("blocks") == 1


@pytest.mark.parametrize("assignments,experts,rows", [(1, 8, 16), (4096, 8, 560), (8192, 8, 544), (800, 8, 128)])
def test_rows_of_a_block(assignments, experts, rows):
    """800 over 8 are 100 each, and 1.5 deviations more 115: the next multiple of 16 is 128. 1024 and 48 are 2 x 536."""
    assert block_rows(assignments, experts, 576) == rows
    assert block_rows(100 * assignments, experts, 32) <= 32


def test_rows_of_a_small_block():
    """An eighth, as a multiple of 8, but not above R itself."""
    assert [tail_rows(rows) for rows in (1, 8, 64, 72, 560)] == [1, 8, 8, 16, 72]
