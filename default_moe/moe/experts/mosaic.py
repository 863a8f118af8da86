"""Grouped matrix products by the kernels for Hopper GPUs that come with JAX. See `grouped_matmul.py`.

They are Pallas kernels of warpgroup instructions. Each tile of an output belongs to one group. Rows past the last group
are not written; in products of rows they take as long as others, in the matrices' gradient no time.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

_ROWS = 128  # of a tile
_DEPTH = 64  # what is summed over at a time: 128 bytes, the widest swizzle of shared memory
_MULTIPROCESSORS = 132


def unsupported(dtype: DTypeLike, sizes: Iterable[int]) -> str | None:
    """Why operands of that type and of these sizes, groups left out, cannot be taken, None if they can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return "Hopper's kernels take bfloat16 and float16"
    if any(size % _DEPTH for size in sizes):
        return f"Hopper's kernels take sizes that are multiples of {_DEPTH}"
    return None


def product(lhs_SD: Array, rhs: Array, group_sizes_M: Array, transpose_rhs: bool) -> Array:
    """out[s] = lhs[s] @ rhs[e], or @ rhs[e]^T, for rows of group e: [S, F].

    rhs: [M, D, F], or [M, F, D] to be transposed.
    """
    # Imported where it is used: it takes a second.
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    tiles = _tiles(_ROWS, rhs.shape[1 if transpose_rhs else 2])
    return ragged_dot(lhs_SD, rhs, group_sizes=group_sizes_M, transpose_rhs=transpose_rhs, **tiles)


def matrices_gradient(lhs_SD: Array, d_out_SF: Array, group_sizes_M: Array) -> Array:
    """lhs[group e]^T @ d_out[group e]: [M, D, F], zeros for an empty group."""
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    tiles = _tiles(_width(lhs_SD.shape[1]), d_out_SF.shape[1])
    return transposed_ragged_dot(lhs_SD, d_out_SF, group_sizes=group_sizes_M, **tiles)


def _tiles(block_m: int, columns: int) -> dict[str, Any]:
    """Choose shapes that leave no tile partly filled. More steps, and square groups, were each faster on an H200."""
    block_n = _width(columns)
    across = columns // block_n
    return {
        "block_m": block_m,
        "block_n": block_n,
        "block_k": _DEPTH,
        "max_concurrent_steps": 5 if block_n == 128 else 6,  # the most that were tried
        # Multiprocessors read least where the tiles that they work on at a time form a square.
        "grid_block_n": max(n for n in range(1, math.isqrt(_MULTIPROCESSORS) + 1) if across % n == 0),
    }


def _width(columns: int) -> int:
    return math.gcd(columns, 128)
