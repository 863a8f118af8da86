"""In which tiles tokamax's kernels for TPUs work.

By itself it takes 128 x 128 x 128 for all but a few shapes, and reads operands once for every 128 rows or columns of
the output. Here tiles are chosen by what they would cost. No TPU has measured it.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

BLOCK = 128  # tiles are multiples of it, or all there is
# Tiles may take 12 of the 16 MiB of vector memory that XLA gives a kernel. The rest is for what it computes on the way.
_MEMORY = 12 * 2**20
# What a core multiplies and adds while it reads a byte: 197 TFLOP/s and 819 GB/s of a TPU v5e, about the middle.
_FLOPS_PER_BYTE = 240
_ROWS = (128, 256, 512)


class Tiles(NamedTuple):
    """Of rows that are grouped, and of the two dimensions of the matrices.

    For products of rows: what is summed over, and columns of the output. For the matrices' gradients, which sum over
    rows: rows and columns of the output.
    """

    rows: int
    depth: int
    columns: int


def for_rows(num_rows: int, depth: int, width: int, num_groups: int, itemsize: int) -> Tiles:
    """Return those with which a product of rows takes least time: [S, depth] by a matrix [depth, width] per group.

    num_rows: S, a multiple of 128.
    """

    def memory(tiles: Tiles) -> int:
        rows, depth, columns = tiles
        # Operands and the output twice, as one is moved and the other used; sums, and what they are masked with.
        return 2 * itemsize * (rows * depth + depth * columns + rows * columns) + 3 * 4 * rows * columns

    def moved(tiles: Tiles) -> int:
        return numbers_for_rows(tiles, num_rows, depth, width, num_groups)

    return _cheapest(num_rows, depth, width, num_groups, itemsize, memory, moved)


def numbers_for_rows(tiles: Tiles, num_rows: int, depth: int, width: int, num_groups: int) -> int:
    """Return how many numbers that product reads and writes. What is one tile deep stays for the next tile of rows."""
    across = math.ceil(width / tiles.columns)
    if depth <= tiles.depth:
        return num_rows * (depth * across + width) + num_groups * depth * width
    worked_on = _tiles_of_rows(num_rows, tiles.rows, num_groups)
    return worked_on * depth * (tiles.rows * across + width) + num_rows * width


def for_matrices(num_rows: int, depth: int, width: int, num_groups: int, itemsize: int) -> Tiles:
    """Return those for the gradients of matrices: per group [rows, depth]^T by [rows, width].

    num_rows: S, a multiple of 128.
    """

    def memory(tiles: Tiles) -> int:
        rows, height, columns = tiles
        return 2 * itemsize * (rows * (height + columns) + height * columns) + 2 * 4 * height * columns

    def moved(tiles: Tiles) -> int:
        return numbers_for_matrices(tiles, num_rows, depth, width, num_groups)

    return _cheapest(num_rows, depth, width, num_groups, itemsize, memory, moved)


def numbers_for_matrices(tiles: Tiles, num_rows: int, depth: int, width: int, num_groups: int) -> int:
    """Return how many numbers those gradients read and write."""
    reads = depth * math.ceil(width / tiles.columns) + width * math.ceil(depth / tiles.depth)
    return num_rows * reads + num_groups * depth * width


def _tiles_of_rows(num_rows: int, rows: int, num_groups: int) -> int:
    """Return how many are worked on: one in which a group ends and the next begins is, for both."""
    return num_rows // rows + num_groups - 1


def _cheapest(
    num_rows: int,
    depth: int,
    width: int,
    num_groups: int,
    itemsize: int,
    memory: Callable[[Tiles], int],
    moved: Callable[[Tiles], int],
) -> Tiles:
    def cost(tiles: Tiles) -> float:
        """In bytes that could be moved meanwhile."""
        rows = _tiles_of_rows(num_rows, tiles.rows, num_groups) * tiles.rows
        padded = (math.ceil(size / tile) * tile for size, tile in ((depth, tiles.depth), (width, tiles.columns)))
        return max(itemsize * moved(tiles), 2 * rows * math.prod(padded) / _FLOPS_PER_BYTE)

    heights = [rows for rows in _ROWS if num_rows % rows == 0] or [BLOCK]
    found = itertools.starmap(Tiles, itertools.product(heights, _parts(depth), _parts(width)))
    return min((tiles for tiles in found if memory(tiles) <= _MEMORY), key=cost)


def _parts(size: int) -> Iterable[int]:
    """Return tiles that cut `size` in about equal parts, the first of which is all of it."""
    blocks = math.ceil(size / BLOCK)
    return dict.fromkeys(min(size, BLOCK * math.ceil(blocks / parts)) for parts in range(1, blocks + 1))
