"""Rows and matrices for grouped products, and the products by a loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers.reference import assert_close

from default_moe.moe.experts.grouped_matmul import grouped_matmul

GROUPS, ROWS, D, F = 4, 40, 5, 3
# Rows per group in units of 8; 5 units of rows exist.
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
def product_and_gradients(backend):
    """Of grouped_matmul, jitted."""

    def objective(lhs, rhs, sizes, g):
        out = grouped_matmul(lhs, rhs, sizes, backend)
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


def check(lhs, rhs, sizes, g, backend="ragged"):
    used = sum(sizes)
    lhs[used:] = 0  # as the layout leaves them
    sizes_M = jnp.asarray(sizes, jnp.int32)
    (_, out), (d_lhs, d_rhs) = product_and_gradients(backend)(
        jnp.asarray(lhs), jnp.asarray(rhs), sizes_M, jnp.asarray(g)
    )
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
