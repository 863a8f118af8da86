"""Grouped matrix products, both backends, against one product per row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close

from default_moe.grouped_matmul import group_alignment, grouped_matmul, grouped_sum, resolve_backend

BACKENDS = ["ragged", "blocks"]
GROUPS, ROWS, D, F = 4, 40, 5, 3
# Slots per group in units of 8, so that both backends can hold them; 5 units of rows exist.
UNITS = {
    "empty first": [0, 2, 1, 2],
    "empty middle": [2, 0, 0, 3],
    "empty last": [1, 4, 0, 0],
    "all in the first": [5, 0, 0, 0],
    "all in the last": [0, 0, 0, 5],
    "rows past the sum": [1, 0, 2, 0],
    "nothing at all": [0, 0, 0, 0],
    "even": [1, 1, 1, 2],
}


@functools.cache
def compiled(backend: str, align: int):
    def objective(lhs, rhs, sizes, g):
        out = grouped_matmul(lhs, rhs, sizes, backend=backend, align=align)
        return (out * g).sum(), out

    return jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))


def loop(lhs, rhs, sizes, g):
    """Outputs and gradients of <g, out>, one row at a time, in float64."""
    lhs, rhs, g = (np.asarray(a, np.float64) for a in (lhs, rhs, g))
    out, d_lhs, d_rhs = np.zeros_like(g), np.zeros_like(lhs), np.zeros_like(rhs)
    row = 0
    for e, size in enumerate(sizes):
        for _ in range(size):
            out[row] = lhs[row] @ rhs[e]
            d_lhs[row] = rhs[e] @ g[row]
            d_rhs[e] += np.outer(lhs[row], g[row])
            row += 1
    return out, d_lhs, d_rhs


def check(lhs, rhs, sizes, g, backend, align):
    used = sum(sizes)
    lhs[used:] = 0  # as the layout leaves them
    sizes_M = jnp.asarray(sizes, jnp.int32)
    (_, out), (d_lhs, d_rhs) = compiled(backend, align)(jnp.asarray(lhs), jnp.asarray(rhs), sizes_M, jnp.asarray(g))
    expected, expected_d_lhs, expected_d_rhs = loop(lhs, rhs, sizes, g)
    assert_close(out, expected, "out")
    np.testing.assert_array_equal(out[used:], 0)
    # Rows past the sum are constants to the caller: only the gradients of the others are anyone's business.
    assert_close(d_lhs[:used], expected_d_lhs[:used], "gradient of the rows")
    assert np.isfinite(d_lhs).all()
    assert_close(d_rhs, expected_d_rhs, "gradient of the matrices")
    for e, size in enumerate(sizes):
        if size == 0:
            np.testing.assert_array_equal(d_rhs[e], 0)


def random_arrays(rng):
    shapes = ((ROWS, D), (GROUPS, D, F), (ROWS, F))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("units", UNITS.values(), ids=UNITS.keys())
def test_products_and_gradients_equal_a_loop(units, backend):
    lhs, rhs, g = random_arrays(np.random.default_rng(0))
    check(lhs, rhs, [8 * u for u in units], g, backend, 1 if backend == "ragged" else 8)


@pytest.mark.parametrize("backend,align", [("ragged", 1), ("blocks", 8), ("blocks", 4), ("blocks", 1)])
def test_random_group_sizes_equal_a_loop(backend, align):
    rng = np.random.default_rng(1)
    for _ in range(25):
        cuts = np.sort(rng.integers(0, ROWS // align + 1, GROUPS))  # the last cut leaves rows over
        sizes = (np.diff(cuts, prepend=0) * align).tolist()
        lhs, rhs, g = random_arrays(rng)
        check(lhs, rhs, sizes, g, backend, align)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_output_has_the_dtype_of_the_rows(backend):
    lhs, rhs, _ = random_arrays(np.random.default_rng(2))
    sizes = [8, 16, 8, 8]
    out = grouped_matmul(
        jnp.asarray(lhs, jnp.bfloat16), jnp.asarray(rhs, jnp.bfloat16), jnp.asarray(sizes), backend=backend, align=8
    )
    assert out.dtype == jnp.bfloat16
    expected, _, _ = loop(lhs, rhs, sizes, np.zeros((ROWS, F)))
    # bfloat16 rounds at 2^-8 at worst: both operands and the result make 3 * 2^-8 = 1.2 % of the terms' size.
    bound = 3 * 2**-8 * (np.abs(lhs) @ np.abs(rhs).max(axis=0))
    assert (np.abs(np.asarray(out, np.float64) - expected) <= bound).all()


def test_sums_of_groups():
    """Groups of 8, 0, 8 and 16 slots of 40; rows past the sum have weight 0, as empty slots have."""
    rng = np.random.default_rng(3)
    sizes, align = [8, 0, 8, 16], 8
    values, weights = rng.normal(size=(ROWS, D)), rng.random(ROWS)
    weights[32:] = 0
    values, weights = values.astype(np.float32), weights.astype(np.float32)
    sums = grouped_sum(jnp.asarray(values), jnp.asarray(weights), jnp.asarray(sizes), align=align)
    expected = np.zeros((GROUPS, D))
    for e, (start, stop) in enumerate([(0, 8), (8, 8), (8, 16), (16, 32)]):
        for row in range(start, stop):
            expected[e] += np.float64(weights[row]) * values[row]
    assert sums.dtype == jnp.float32
    assert_close(sums, expected, "sums")
    np.testing.assert_array_equal(sums[1], 0)


def test_blocks_are_the_choice_on_a_cpu():
    assert resolve_backend("auto") == "blocks"
    assert [resolve_backend(b) for b in BACKENDS] == BACKENDS


def test_alignment_suits_the_backend():
    for rows in (1, 7, 64, 1000, 100_000):
        for groups in (1, 8, 64):
            assert group_alignment("ragged", rows, groups) == 1
            align = group_alignment("blocks", rows, groups)
            # Padding wastes at most a block per group: no more than the rows themselves, but for tiny groups.
            assert align >= 1
            assert align <= max(8, rows / groups)
