"""The tiles of tokamax's kernels for TPUs, and these kernels, interpreted, in such tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.reference import assert_close
from jax._src.pallas.mosaic import tpu_info
from jax.experimental.pallas import tpu as pltpu

from default_moe.moe.experts import grouped_matmul, tpu_tiles
from default_moe.moe.experts.grouped_matmul import MATRICES_GRADIENT, PRODUCT, ROWS_GRADIENT
from default_moe.moe.experts.tpu_tiles import Tiles, for_matrices, for_rows

SHAPES = [(8320, 1024, 2816, 8), (65_536, 1024, 704, 32), (32_768, 2048, 5632, 8), (131_072, 2048, 768, 128)]


def test_what_is_chosen_for_the_papers_model():
    """A device's 4 sequences of 2,048 tokens. One tile holds all that is summed over, so each matrix is read once."""
    assert for_rows(8320, 1024, 2816, 8, 2) == Tiles(128, 1024, 1408)
    assert for_rows(8320, 2816, 1024, 8, 2) == Tiles(128, 2816, 512)
    assert for_matrices(8320, 1024, 2816, 8, 2) == Tiles(128, 512, 1408)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_divide_rows_and_cut_matrices_in_blocks(shape, itemsize):
    num_rows, depth, width, num_groups = shape
    for choose in (for_rows, for_matrices):
        tiles = choose(num_rows, depth, width, num_groups, itemsize)
        assert num_rows % tiles.rows == 0
        for tile, size in ((tiles.depth, depth), (tiles.columns, width)):
            assert tile == size or (tile % 128 == 0 and tile < size)
        operands = tiles.rows * (tiles.depth + tiles.columns) + tiles.depth * tiles.columns
        assert 2 * itemsize * operands < tpu_tiles._MEMORY < 16 * 2**20


def test_larger_tiles_of_rows_are_taken_where_they_save_reading():
    """Sums so long that no tile holds them: each matrix is read again for every tile of rows."""
    assert for_rows(65_536, 65_536, 4096, 1, 4).rows == 512
    assert for_rows(65_536, 512, 4096, 1, 4).rows == 128


def reads(tiles, sizes, depth, width):
    """The numbers that a product of rows reads, by walking over its grid: a block stays while the next is the same."""
    ends = np.cumsum(sizes)
    visits = [
        (row, group)
        for group, (first, last) in enumerate(zip(ends - sizes, ends, strict=True))
        for row in range(first // tiles.rows, -(-last // tiles.rows))
    ]
    steps = [
        (column, row, group, part)
        for column in range(-(-width // tiles.columns))
        for row, group in visits
        for part in range(-(-depth // tiles.depth))
    ]
    rows = [(row, part) for _, row, _, part in steps]
    matrices = [(group, part, column) for column, _, group, part in steps]
    new = [sum(a != b for a, b in zip([None, *blocks], blocks, strict=False)) for blocks in (rows, matrices)]
    return new[0] * tiles.rows * tiles.depth + new[1] * tiles.depth * tiles.columns


@pytest.mark.parametrize(
    "tiles", [Tiles(128, 512, 256), Tiles(128, 256, 256), Tiles(256, 512, 512), Tiles(256, 128, 512)]
)
def test_numbers_that_are_moved_are_those_of_a_walk_over_the_grid(tiles):
    """Groups that all end within a tile, so that each boundary costs the most that it can."""
    sizes = np.array([200, 300, 150, 374])
    written = 1024 * 512
    assert tpu_tiles.numbers_for_rows(tiles, 1024, 512, 512, 4) == reads(tiles, sizes, 512, 512) + written


@pytest.mark.parametrize(
    ("dimensions", "lhs", "rhs"),
    [
        (PRODUCT, (384, 256), (4, 256, 512)),
        (ROWS_GRADIENT, (384, 512), (4, 256, 512)),
        (MATRICES_GRADIENT, (384, 256), (384, 512)),
    ],
    ids=["product", "rows", "matrices"],
)
def test_kernels_in_such_tiles_equal_float64(dimensions, lhs, rhs, monkeypatch):
    """Groups that end within tiles, one without rows, and rows of nobody."""
    monkeypatch.setattr(tpu_tiles, "_MEMORY", 2**20)  # so that there are several tiles each way
    sizes = np.array([100, 0, 150, 102])
    rng = np.random.default_rng(0)
    lhs, rhs = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in (lhs, rhs))
    kernel = grouped_matmul._tokamax_for_tpu(lhs, rhs, jnp.asarray(sizes), dimensions)
    output = {PRODUCT: (256, 512), ROWS_GRADIENT: (512, 256), MATRICES_GRADIENT: (256, 512)}[dimensions]
    assert (kernel.config.tile_k, kernel.config.tile_n) != output
    monkeypatch.setattr(type(kernel), "supported_on", lambda self, device: True)
    for name, value in (("get_device_kind", "TPU v5 lite"), ("get_num_device_cores", 1)):
        monkeypatch.setattr(tpu_info, name, lambda value=value: value)
    with pltpu.force_tpu_interpret_mode():
        out = kernel(lhs, rhs, group_sizes=jnp.asarray(sizes, jnp.int32), ragged_dot_dimension_numbers=dimensions)
    expert = np.repeat(np.arange(4), sizes)
    lhs, rhs = (np.asarray(a, np.float64) for a in (lhs, rhs))
    if dimensions == MATRICES_GRADIENT:
        wanted = np.stack([lhs[:352][expert == e].T @ rhs[:352][expert == e] for e in range(4)])
        out, wanted = (np.asarray(a, np.float64)[[0, 2, 3]] for a in (out, wanted))
    else:
        wanted = np.einsum("sd,sdf->sf", lhs[:352], (rhs.mT if dimensions == ROWS_GRADIENT else rhs)[expert])
        out = np.asarray(out[:352], np.float64)
    assert_close(out, wanted, "out", 2**-7)


def test_a_layer_on_a_tpu_gets_them(monkeypatch):
    import tokamax

    found = []

    def ragged_dot_general(lhs, rhs, sizes, dimensions, implementation):
        found.extend(implementation)
        return jax.lax.ragged_dot_general(lhs, rhs, sizes, dimensions)

    monkeypatch.setattr(grouped_matmul, "platform", lambda: "tpu")
    monkeypatch.setattr(tokamax, "ragged_dot_general", ragged_dot_general)
    lhs, rhs = jnp.ones((256, 256)), jnp.ones((2, 256, 384))
    jax.grad(lambda rhs: grouped_matmul.grouped_matmul(lhs, rhs, jnp.array([128, 128]), "tokamax").sum())(rhs)
    tiles = [(kernel.config.tile_m, kernel.config.tile_k, kernel.config.tile_n) for kernel in found]
    assert tiles == [for_rows(256, 256, 384, 2, 4), for_rows(256, 384, 256, 2, 4), for_matrices(256, 256, 384, 2, 4)]
