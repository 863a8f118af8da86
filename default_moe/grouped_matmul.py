"""Matrix products of rows grouped by expert, each group with its own expert's matrix.

One function, two backends. "ragged" is `jax.lax.ragged_dot`; XLA for CPU expands it to a product with every expert,
so there "blocks" is the default: groups aligned to a block of rows, each block one dense product.
"""

import jax
import jax.numpy as jnp
from jax import Array


def resolve_backend(backend: str) -> str:
    """ "ragged" or "blocks"; "auto" picks by the platform of the mesh in use, or of the default device."""
    if backend != "auto":
        return backend
    mesh = jax.sharding.get_abstract_mesh()
    platform = None if mesh.empty or mesh.abstract_device is None else mesh.abstract_device.platform
    return "blocks" if (platform or jax.default_backend()) == "cpu" else "ragged"


def group_alignment(backend: str, num_rows: int, num_groups: int) -> int:
    """Rows that every group must be a multiple of: 1 for "ragged", for "blocks" a compromise.

    Small blocks waste few rows on padding (at most one block per group), large ones make better matrix products.
    """
    if backend == "ragged":
        return 1
    mean_rows = max(1, num_rows // num_groups)
    return max(8, min(128, 1 << (mean_rows.bit_length() - 4) if mean_rows >= 16 else 8))


def grouped_matmul(lhs_SD: Array, rhs_MDF: Array, group_sizes_M: Array, *, backend: str, align: int) -> Array:
    """out[s] = lhs[s] @ rhs[e] for the slots s of group e: [S, F], in the dtype of `lhs_SD`.

    Args:
      lhs_SD: rows; group e holds group_sizes_M[e] of them, after those of groups before it.
      rhs_MDF: one matrix per group, of the same dtype.
      group_sizes_M: int32, multiples of `align`. Rows past their sum must be zero; they give zeros.
      backend: "ragged" or "blocks".
      align: what `group_alignment` gave.
    """
    if backend == "blocks":
        return _block_matmul(lhs_SD, rhs_MDF, _expert_of_block(lhs_SD.shape[0], group_sizes_M, align))
    out_SF = jax.lax.ragged_dot(lhs_SD, rhs_MDF, group_sizes_M)
    # Kernels may leave the rows that belong to no group unwritten.
    in_group_S1 = (jnp.arange(lhs_SD.shape[0]) < group_sizes_M.sum())[:, None]
    return jnp.where(in_group_S1, out_SF, 0)


def grouped_sum(values_SD: Array, weights_S: Array, group_sizes_M: Array, *, align: int) -> Array:
    """Weighted sum of each group's rows: float32 [M, D]. Carries no gradient of use: meant for statistics."""
    num_slots, dim = values_SD.shape
    num_groups = group_sizes_M.shape[0]
    values_BCD = values_SD.reshape(num_slots // align, align, dim)
    weights_BC = weights_S.reshape(num_slots // align, align).astype(values_SD.dtype)
    sums_BD = jnp.einsum("bc,bcd->bd", weights_BC, values_BCD, preferred_element_type=jnp.float32)
    expert_B = _expert_of_block(num_slots, group_sizes_M, align)
    return jax.ops.segment_sum(sums_BD, expert_B, num_groups, indices_are_sorted=True)


def _expert_of_block(num_slots: int, group_sizes_M: Array, align: int) -> Array:
    """int32 [S / align]: the group of each block of `align` rows; the last group for blocks past the last one."""
    first_row_B = jnp.arange(0, num_slots, align)
    expert_B = jnp.searchsorted(jnp.cumsum(group_sizes_M), first_row_B, side="right")
    return jnp.minimum(expert_B, group_sizes_M.shape[0] - 1).astype(jnp.int32)


@jax.custom_vjp
def _block_matmul(lhs_SD: Array, rhs_MDF: Array, expert_B: Array) -> Array:
    """Each block of S / B rows times the matrix of its expert."""
    lhs_BCD = lhs_SD.reshape(expert_B.shape[0], -1, lhs_SD.shape[1])
    out_BCF = jnp.einsum("bcd,bdf->bcf", lhs_BCD, rhs_MDF[expert_B])
    return out_BCF.reshape(lhs_SD.shape[0], -1)


def _block_matmul_fwd(lhs_SD: Array, rhs_MDF: Array, expert_B: Array) -> tuple:
    return _block_matmul(lhs_SD, rhs_MDF, expert_B), (lhs_SD, rhs_MDF, expert_B)


def _block_matmul_bwd(residuals: tuple, g_SF: Array) -> tuple:
    lhs_SD, rhs_MDF, expert_B = residuals
    num_blocks = expert_B.shape[0]
    lhs_BCD = lhs_SD.reshape(num_blocks, -1, lhs_SD.shape[1])
    g_BCF = g_SF.reshape(num_blocks, -1, g_SF.shape[1])
    d_lhs_BCD = jnp.einsum("bcf,bdf->bcd", g_BCF, rhs_MDF[expert_B])
    d_rhs_BDF = jnp.einsum("bcd,bcf->bdf", lhs_BCD, g_BCF, preferred_element_type=jnp.float32)
    d_rhs_MDF = jax.ops.segment_sum(d_rhs_BDF, expert_B, rhs_MDF.shape[0], indices_are_sorted=True)
    return d_lhs_BCD.reshape(lhs_SD.shape), d_rhs_MDF.astype(rhs_MDF.dtype), None


_block_matmul.defvjp(_block_matmul_fwd, _block_matmul_bwd)
