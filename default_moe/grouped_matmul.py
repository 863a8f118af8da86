"""Matrix products of rows grouped by expert, and the choice of how experts are computed.

"blocks" (`block_experts.py`) follows the real load with plain products, and is the choice on a CPU, where XLA expands
`jax.lax.ragged_dot` to a product with every expert. "ragged" (`sorted_experts.py`) is that function.
"""

import jax
import jax.numpy as jnp
from jax import Array


def _platform() -> str:
    """Of the mesh in use, or of the default device."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return (device and device.platform) or jax.default_backend()


def resolve_backend(backend: str) -> str:
    """ "ragged" or "blocks"; "auto" picks by the platform of the mesh in use, or of the default device."""
    if backend != "auto":
        return backend
    return "blocks" if _platform() == "cpu" else "ragged"


def group_alignment(backend: str) -> int:
    """Rows that every group is padded to a multiple of, so that its sums can be taken in blocks of as many."""
    return 1 if backend == "blocks" else 8


def largest_block() -> int:
    """Rows of a block for "blocks": what stays in a CPU's cache, elsewhere what keeps an accelerator busy."""
    return 192 if _platform() == "cpu" else 2048


def grouped_matmul(lhs_SD: Array, rhs_MDF: Array, group_sizes_M: Array) -> Array:
    """out[s] = lhs[s] @ rhs[e] for the slots s of group e: [S, F], in the dtype of `lhs_SD`.

    Args:
      lhs_SD: rows; group e holds group_sizes_M[e] of them, after those of groups before it.
      rhs_MDF: one matrix per group, of the same dtype.
      group_sizes_M: int32. Rows past their sum must be zero; they give zeros.
    """
    out_SF = jax.lax.ragged_dot(lhs_SD, rhs_MDF, group_sizes_M)
    # Kernels may leave the rows that belong to no group unwritten.
    in_group_S1 = (jnp.arange(lhs_SD.shape[0]) < group_sizes_M.sum())[:, None]
    return jnp.where(in_group_S1, out_SF, 0)
