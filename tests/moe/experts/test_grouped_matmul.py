"""Grouped matrix products against one product per row, and experts by every backend against loops over tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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


@pytest.mark.parametrize("backend,rows", [("ragged", 1), ("ragged", 8), ("blocks", 1), ("blocks", 4), ("blocks", 64)])
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())
def test_experts_and_gradients_equal_loops(route, backend, rows):
    """One output and its gradients per token and choice, in float64, with silu's derivative written out."""
    num_held, used, elsewhere = route
    num_tokens, dim, width, top_k = 13, 5, 3, min(2, len(used) + elsewhere)
    rng = np.random.default_rng(rows)
    available = [*used, *range(num_held, num_held + elsewhere)]
    chosen = np.array([rng.choice(available, top_k, replace=False) for _ in range(num_tokens)])
    x, g = (rng.normal(size=(num_tokens, dim)).astype(np.float32) for _ in range(2))
    weight, counted = (rng.random((num_tokens, top_k)).astype(np.float32) for _ in range(2))
    sizes = (num_held, dim, width), (num_held, dim, width), (num_held, width, dim)
    weights = ExpertParams(*(rng.normal(size=size).astype(np.float32) for size in sizes))

    y, d_x, d_weight = np.zeros((num_tokens, dim)), np.zeros((num_tokens, dim)), np.zeros((num_tokens, top_k))
    sums, d_weights = np.zeros((num_held, dim)), [np.zeros(size) for size in sizes]
    for t in range(num_tokens):
        for k in range(top_k):
            if (e := chosen[t, k]) >= num_held:
                continue
            gate, up, down = (np.asarray(w[e], np.float64) for w in weights)
            a, u = x[t] @ gate, x[t] @ up
            sigmoid = 1 / (1 + np.exp(-a))
            out, d_hidden = (a * sigmoid * u) @ down, weight[t, k] * down @ g[t]
            d_a, d_u = d_hidden * u * sigmoid * (1 + a * (1 - sigmoid)), d_hidden * a * sigmoid
            y[t] += weight[t, k] * out
            sums[e] += counted[t, k] * out
            d_x[t] += gate @ d_a + up @ d_u
            d_weight[t, k] = g[t] @ out
            d_weights[0][e] += np.outer(x[t], d_a)
            d_weights[1][e] += np.outer(x[t], d_u)
            d_weights[2][e] += np.outer(a * sigmoid * u, weight[t, k] * g[t])

    (_, got), gradients = compiled_experts(backend, rows, num_held)(x, weight, weights, chosen, counted, g)
    expected = (y, sums, d_x, d_weight, *d_weights)
    names = ("y", "sums", "gradient of x", "of the weights", "of gate", "of up", "of down")
    for name, a, b in zip(names, jax.tree.leaves((got, gradients)), expected, strict=True):
        assert a.dtype == jnp.float32
        assert_close(a, b, name)


def test_no_sums_where_none_are_asked_for():
    weights = ExpertParams(jnp.ones((2, 3, 4)), jnp.ones((2, 3, 4)), jnp.ones((2, 4, 3)))
    layout = group_by_expert(jnp.array([[0], [1]]), 2, 1)
    assert block_experts(jnp.ones((2, 3)), jnp.ones((2, 1)), None, weights, layout, 8)[1] is None
    assert sorted_experts(jnp.ones((2, 3)), jnp.ones((2, 1)), None, weights, layout, 1, "ragged")[1] is None


def test_the_choice_on_a_cpu():
    assert resolve_backend("auto") == "blocks"
    assert [resolve_backend(b) for b in ("ragged", "blocks")] == ["ragged", "blocks"]
    assert group_alignment("blocks") == 1


# R = 64 and blocks of 8 for what it leaves: loads at the edges of both sizes, of none, and of several blocks.
LOADS = {
    "one block, and a row more or less": (64, 65, 63, 0),
    "the most in small blocks, and the least in a large one": (48, 49, 0, 47),
    "small blocks only": (1, 8, 9, 40),
    "several large ones and some small": (0, 130, 177, 0),
    "the last one padded": (0, 0, 0, 113),
}


@pytest.mark.parametrize("loads", LOADS.values(), ids=LOADS.keys())
def test_blocks_of_both_sizes_equal_one_product_per_expert(loads):
    """Outputs, sums and gradients where every expert's rows are one exact slice, differentiated by JAX."""
    dim, width = 6, 5
    rng = np.random.default_rng(sum(loads))
    chosen = rng.permutation(np.repeat(np.arange(len(loads)), loads))[:, None]
    x, g = (rng.normal(size=(len(chosen), dim)).astype(np.float32) for _ in range(2))
    weight, counted = (rng.random(chosen.shape).astype(np.float32) for _ in range(2))
    sizes = (len(loads), dim, width), (len(loads), dim, width), (len(loads), width, dim)
    weights = ExpertParams(*(rng.normal(size=size).astype(np.float32) for size in sizes))

    def one_product_each(x, weight, weights):
        y, sums = jnp.zeros_like(x), []
        for e in range(len(loads)):
            token = np.flatnonzero(chosen[:, 0] == e)
            out = (jax.nn.silu(x[token] @ weights.gate[e]) * (x[token] @ weights.up[e])) @ weights.down[e]
            y = y.at[token].add(weight[token] * out)
            sums.append((counted[token] * out).sum(axis=0))
        return (y * g).sum(), (y, jnp.stack(sums))

    (_, expected), expected_gradients = jax.value_and_grad(one_product_each, argnums=(0, 1, 2), has_aux=True)(
        x, weight, weights
    )
    experts = compiled_experts("blocks", 64, len(loads))
    (_, got), gradients = experts(x, weight, weights, chosen, counted, g)
    names = ("y", "sums", "gradient of x", "of the weights", "of gate", "of up", "of down")
    leaves = jax.tree.leaves((got, gradients)), jax.tree.leaves((expected, expected_gradients))
    for name, a, b in zip(names, *leaves, strict=True):
        assert_close(a, b, name)


@pytest.mark.parametrize("assignments,experts,rows", [(1, 8, 16), (4096, 8, 560), (8192, 8, 544), (800, 8, 128)])
def test_rows_of_a_block(assignments, experts, rows):
    """800 over 8 are 100 each, and 1.5 deviations more 115: the next multiple of 16 is 128. 1024 and 48 are 2 x 536."""
    assert block_rows(assignments, experts, 576) == rows
    assert block_rows(100 * assignments, experts, 32) <= 32


def test_rows_of_a_small_block():
    """An eighth, as a multiple of 8, but not above R itself."""
    assert [tail_rows(rows) for rows in (1, 8, 64, 72, 560)] == [1, 8, 8, 16, 72]
