"""Our kernels for Hopper GPUs, interpreted, against float64; and the experts made of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import reference
from helpers.hopper import interpreted
from helpers.reference import assert_close

from default_moe.moe.experts import hopper, hopper_kernels, hopper_tiles
from default_moe.moe.experts.backends import lay_out, run_experts
from default_moe.moe.experts.grouped_matmul import MATRICES_GRADIENT, PRODUCT, ROWS_GRADIENT, kernel_of
from default_moe.moe.experts.hopper_tiles import MATRICES, SHARED_MEMORY, SWIGLU, SWIGLU_GRADIENT, Tiles
from default_moe.moe.experts.swiglu import ExpertParams

# An expert without rows between others, and rows of nobody. Tiles of 128 columns lie on each other in 192.
SIZES = np.array([128, 0, 128])
SLOTS, USED, D, F = 384, 256, 128, 192
EXPERT = np.repeat(np.arange(3), SIZES)
TILES = Tiles(128, stages=2)
# Relative to the largest value: sums in float32 are rounded to 8 bits at the end.
ALLOWED = 2**-8


def drawn(*shapes):
    """Arrays in bfloat16, and the same in float64."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]
    return arrays, [np.asarray(a, np.float64) for a in arrays]


def check(got, wanted, name, allowed=ALLOWED):
    assert got.dtype == jnp.bfloat16
    assert_close(np.asarray(got, np.float64), wanted, name, allowed)


def by_row(lhs, rhs):
    """Of each row in a group the product with its expert's matrix."""
    return np.einsum("sd,sdf->sf", lhs[:USED], rhs[EXPERT])


@pytest.mark.parametrize("transpose", [False, True])
def test_products_equal_float64(transpose, monkeypatch):
    (lhs, rhs), (lhs64, rhs64) = drawn((SLOTS, D), (3, F, D) if transpose else (3, D, F))
    with interpreted(monkeypatch):
        out = hopper_kernels.product(lhs, rhs, jnp.asarray(SIZES), transpose, TILES)
    check(out[:USED], by_row(lhs64, rhs64.mT if transpose else rhs64), "product")


def test_gradients_of_matrices_equal_float64(monkeypatch):
    (lhs, d_out), (lhs64, d_out64) = drawn((SLOTS, F), (SLOTS, D))
    with interpreted(monkeypatch):
        d_rhs = hopper_kernels.matrices_gradient(lhs, d_out, jnp.asarray(SIZES), TILES)
    for e in (0, 2):
        rows = np.flatnonzero(e == EXPERT)
        check(d_rhs[e], lhs64[rows].T @ d_out64[rows], f"expert {e}")


def test_swiglu_equals_float64(monkeypatch):
    (x, gate, up), (x64, gate64, up64) = drawn((SLOTS, D), (3, D, F), (3, D, F))
    gate, gate64 = gate / 8, gate64 / 8  # where the sigmoid bends
    with interpreted(monkeypatch):
        outs = hopper_kernels.swiglu_product(x, gate, up, jnp.asarray(SIZES), TILES._replace(columns=256))
    gate64, up64 = by_row(x64, gate64), by_row(x64, up64)
    # The activation is of the rounded products.
    rounded = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (gate64, up64)]
    hidden64 = rounded[0] / (1 + np.exp(-rounded[0])) * rounded[1]
    for name, got, wanted in zip(("gate", "up"), outs, (gate64, up64), strict=False):
        check(got[:USED], wanted, name)
    check(outs[2][:USED], hidden64, "hidden", 2 * ALLOWED)  # a sum at a tie may round the other way


def test_the_gradient_of_swiglu_equals_float64(monkeypatch):
    (d_out, down, gate, up), (d_out64, down64, gate64, up64) = drawn((SLOTS, D), (3, F, D), (SLOTS, F), (SLOTS, F))
    with interpreted(monkeypatch):
        outs = hopper_kernels.swiglu_gradient(d_out, down, gate, up, jnp.asarray(SIZES), TILES)
    d_hidden, gate64, up64 = by_row(d_out64, down64.mT), gate64[:USED], up64[:USED]
    sigmoid = 1 / (1 + np.exp(-gate64))
    wanted = (
        d_hidden * up64 * sigmoid * (1 + gate64 * (1 - sigmoid)),
        d_hidden * gate64 * sigmoid,
        gate64 * sigmoid * up64,
    )
    for name, got, values in zip(("gate", "up", "hidden"), outs, wanted, strict=True):
        check(got[:USED], values, name)


@pytest.fixture
def plain(monkeypatch):
    """In the place of the kernels what they compute, by products with every expert; NaN where they leave memory."""

    def mine(rows, sizes):
        """[S, 3], whether a row is of an expert's group."""
        return jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(rows)), side="right")[:, None] == jnp.arange(3)

    def product(lhs, rhs, sizes, transpose_rhs, tiles):
        assert isinstance(tiles, Tiles)
        out = jnp.einsum("sd,edf,se->sf", lhs, rhs.mT if transpose_rhs else rhs, mine(lhs, sizes))
        return jnp.where(mine(lhs, sizes).any(1)[:, None], out, jnp.nan)

    def matrices_gradient(lhs, d_out, sizes, tiles):
        assert isinstance(tiles, Tiles)
        lhs, d_out = (jnp.where(mine(a, sizes).any(1)[:, None], a, 0) for a in (lhs, d_out))
        out = jnp.einsum("sd,sf,se->edf", lhs, d_out, mine(lhs, sizes))
        return jnp.where((sizes > 0)[:, None, None], out, jnp.nan)

    def swiglu_product(x, gate, up, sizes, tiles):
        gate, up = (product(x, w, sizes, False, tiles) for w in (gate, up))
        return gate, up, jax.nn.silu(gate) * up

    def swiglu_gradient(d_out, down, gate, up, sizes, tiles):
        hidden, back = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
        return *back(product(d_out, down, sizes, True, tiles)), hidden

    for function in (product, matrices_gradient, swiglu_product, swiglu_gradient):
        monkeypatch.setattr(hopper_kernels, function.__name__, function)
    monkeypatch.setattr(hopper, "unsupported", lambda dtype, sizes: None)  # to compare in float32


@pytest.mark.parametrize("experts", [(0, 2), (0, 1, 2)], ids=["one idle", "all used"])
def test_experts_of_kernels_equal_loops(experts, plain):
    tokens = 64
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(tokens, D)), jnp.float32) for _ in range(2))
    shapes = ((3, D, F), (3, D, F), (3, F, D))
    weights = ExpertParams(*(jnp.asarray(rng.normal(size=shape) / 8, jnp.float32) for shape in shapes))
    chosen, gates = rng.choice(experts, (tokens, 1)), jnp.asarray(rng.random((tokens, 1)), jnp.float32)

    def objective(x, gates, params):
        layout = lay_out(jnp.asarray(chosen), 3, "hopper")
        assert len(layout.assignment_S) == SLOTS + 128
        return (run_experts(x, gates, None, params, layout, 3, "hopper")[0] * g).sum()

    d_x, d_gates, d_params = jax.jit(jax.grad(objective, argnums=(0, 1, 2)))(x, gates, weights)
    params = reference.Params(np.zeros((D, 0)), *(np.asarray(w, np.float64) for w in weights))
    d = reference.Gradients(np.zeros(x.shape), *(np.zeros(p.shape) for p in params))
    x, gates, g = (np.asarray(a, np.float64) for a in (x, gates, g))
    wanted = np.zeros(gates.shape)
    for t, (e,) in enumerate(chosen):
        wanted[t] = g[t] @ reference.expert(params, e, x[t])
        reference.add_expert_gradient(d, params, e, x, t, gates[t, 0] * g[t])
    named = (("x", d_x, d.x), ("gates", d_gates, wanted), *zip("gud", d_params, (d.gate, d.up, d.down), strict=True))
    for name, got, value in named:
        assert_close(got, value, name)


def test_the_three_products_are_the_kernels(monkeypatch):
    asked = []
    monkeypatch.setattr(hopper_kernels, "product", lambda *args: asked.append(args[3:]))
    monkeypatch.setattr(hopper_kernels, "matrices_gradient", lambda *args: asked.append(args[3:]))
    rows, hidden, matrices = (jnp.zeros(shape, jnp.bfloat16) for shape in ((128, 256), (128, 320), (1, 256, 320)))
    kernel, sizes = kernel_of("hopper"), jnp.array([128])
    kernel(rows, matrices, sizes, PRODUCT)
    kernel(hidden, matrices, sizes, ROWS_GRADIENT)
    kernel(rows, hidden, sizes, MATRICES_GRADIENT)
    wide, narrow = Tiles(256), Tiles(192)
    assert asked == [(False, narrow), (True, wide), (narrow,)]


def test_tiles_fit_the_width_and_shared_memory():
    assert hopper_tiles.choose(hopper_tiles.PRODUCT, 2816) == Tiles(256)
    assert hopper_tiles.choose(hopper_tiles.PRODUCT, 704) == Tiles(256)  # 3 x 256 loads less than 4 x 192
    assert hopper_tiles.choose(hopper_tiles.PRODUCT, 128) == Tiles(128, stages=5)
    kernels = (hopper_tiles.PRODUCT, MATRICES, SWIGLU, SWIGLU_GRADIENT)
    for kernel, width, depth in itertools.product(kernels, (128, 192, 704, 2816), (128, 704, 1024)):
        found = hopper_tiles.candidates(kernel, width, depth)
        assert found[0] == hopper_tiles.choose(kernel, width)
        for tiles in found:
            columns = hopper_tiles.tile_columns(kernel, tiles)
            assert columns <= width and columns % hopper_tiles.CHUNK == 0 and depth % tiles.depth == 0
            assert hopper_tiles.shared_bytes(kernel, tiles) <= SHARED_MEMORY - 1024  # and some barriers
    assert [hopper_tiles.columns_at_a_time(across) for across in (1, 4, 11, 12, 13)] == [1, 4, 11, 6, 1]


@pytest.mark.parametrize(
    ("dtype", "sizes", "reason"),
    [
        (jnp.float32, (128,), "bfloat16 and float16"),
        (jnp.bfloat16, (128, 200), "multiples of 64"),
        (jnp.bfloat16, (64, 128), "from 128 on"),
    ],
)
def test_what_kernels_do_not_take(dtype, sizes, reason):
    assert reason in str(hopper.unsupported(dtype, sizes))
    assert hopper.unsupported(jnp.bfloat16, (128, 704, 2816)) is None
