"""In which tiles our kernels for Hopper GPUs work: data, and the choice among them. See `hopper_kernels.py`.

No choice here has been measured. The first ones are of the form that public kernels reach their best figures with.
"""

import math
from typing import NamedTuple

ROWS = 128  # of a tile; the rows of every group are a multiple of it
SHARE = ROWS // 2  # rows of a tile that one of the two multiplying warpgroups computes
CHUNK = 64  # columns that are written at a time: 128 bytes, the widest swizzle of shared memory
MULTIPROCESSORS = 132
SHARED_MEMORY = 227 * 1024  # bytes that a block may use

# What a kernel computes: a product of rows, also with transposed matrices; the matrices' gradient; x @ gate, x @ up and
# the activation of both; the gradients of these two from that of hidden @ down.
PRODUCT, MATRICES, SWIGLU, SWIGLU_GRADIENT = "product", "matrices' gradient", "SwiGLU", "SwiGLU's gradient"


class Tiles(NamedTuple):
    """How a kernel works.

    columns: of a tile; SWIGLU splits them between gate and up.  depth: what is summed over at a time.
    stages: steps whose operands are in shared memory at a time.
    cluster: blocks side by side that load their common rows once for all.
    """

    columns: int
    depth: int = 64
    stages: int = 4
    cluster: int = 1

    def __str__(self) -> str:
        cluster = f" cluster {self.cluster}" if self.cluster > 1 else ""
        return f"{ROWS}x{self.columns}x{self.depth} stages {self.stages}{cluster}"


# For each kernel those to choose from; then those that are worth a trial on a GPU.
_CHOICES = {
    PRODUCT: (Tiles(256), Tiles(192), Tiles(128, stages=5)),
    MATRICES: (Tiles(256), Tiles(192), Tiles(128, stages=5)),
    SWIGLU: (Tiles(256), Tiles(128, stages=5)),
    SWIGLU_GRADIENT: (Tiles(256, stages=3), Tiles(192), Tiles(128, stages=5)),
}
_TRIALS = {
    PRODUCT: (Tiles(256, stages=3), Tiles(256, cluster=2), Tiles(128, depth=128, stages=2)),
    MATRICES: (Tiles(256, stages=3), Tiles(128, depth=128, stages=2)),
    SWIGLU: (Tiles(256, stages=3), Tiles(256, cluster=2)),
    SWIGLU_GRADIENT: (Tiles(192, stages=3), Tiles(256, stages=3, cluster=2)),
}


def choose(kernel: str, width: int) -> Tiles:
    """Return the tiles with which a kernel loads least for outputs of that width."""

    def loads(tiles: Tiles) -> int:
        return _across(kernel, tiles, width) * (ROWS + tiles.columns)

    return min((tiles for tiles in _CHOICES[kernel] if _fits(kernel, tiles, width)), key=loads)


def candidates(kernel: str, width: int, depth: int) -> list[Tiles]:
    """Return all that are worth a measurement for outputs of that width, summed over `depth`; the choice is first."""
    found = [choose(kernel, width), *_CHOICES[kernel], *_TRIALS[kernel]]
    return [tiles for tiles in dict.fromkeys(found) if _fits(kernel, tiles, width) and depth % tiles.depth == 0]


def tile_columns(kernel: str, tiles: Tiles) -> int:
    """Return the columns of each matrix that a tile takes."""
    return tiles.columns // (2 if kernel == SWIGLU else 1)


def shared_bytes(kernel: str, tiles: Tiles) -> int:
    """Return what a block needs in shared memory, barriers left out: operands, two chunks to write, others to read."""
    chunks = 2 + (2 if kernel == SWIGLU_GRADIENT else 0)
    return 2 * (tiles.stages * (ROWS + tiles.columns) * tiles.depth + 2 * chunks * SHARE * CHUNK)


def columns_at_a_time(across: int) -> int:
    """Return how many of `across` tiles side by side are worked on at a time.

    Multiprocessors read least where the tiles that they work on at a time form a square.
    """
    return max(n for n in range(1, math.isqrt(MULTIPROCESSORS) + 1) if across % n == 0)


def _across(kernel: str, tiles: Tiles, width: int) -> int:
    return -(-width // tile_columns(kernel, tiles))


def _fits(kernel: str, tiles: Tiles, width: int) -> bool:
    return tile_columns(kernel, tiles) <= width
