"""Matrix products of rows grouped by expert, by the kernels of `backends.py`. Pure functions."""

import functools
import importlib.metadata
import importlib.util
import logging
import warnings
from collections.abc import Callable
from typing import Any

import jax
from absl import flags
from jax import Array
from jax.lax import RaggedDotDimensionNumbers

from default_moe.errors import ConfigError
from default_moe.hardware import platform
from default_moe.moe.experts import hopper, mosaic, tpu_tiles
from default_moe.moe.experts.layout import matrices_of_groups, rows_of_groups

# out[s] = lhs[s] @ rhs[e], d_lhs[s] = d_out[s] @ rhs[e]^T and d_rhs[e] = lhs[group e]^T @ d_out[group e].
PRODUCT, ROWS_GRADIENT, MATRICES_GRADIENT = (
    RaggedDotDimensionNumbers(
        dot_dimension_numbers=((contracted, ([], []))), lhs_ragged_dimensions=[0], rhs_group_dimensions=groups
    )
    for contracted, groups in ((([1], [1]), [0]), (([1], [2]), [0]), (([0], [0]), []))
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(lhs_SD: Array, rhs_MDF: Array, group_sizes_M: Array, backend: str = "ragged") -> Array:
    """out[s] = lhs[s] @ rhs[e] for the slots s of group e: [S, F], in the dtype of `lhs_SD`.

    Kernels may leave rows that belong to no group unwritten, read them where they should not, or give an empty group
    the gradient of another's rows. None of that leaves this function: such rows and gradients are zeros, which costs
    no pass of its own where XLA computes what comes before or after.

    Args:
      lhs_SD: rows; group e holds group_sizes_M[e] of them, after those of groups before it. Rows past the last group
        must be finite.
      rhs_MDF: one matrix per group, of the same dtype.
      group_sizes_M: int32; multiples of 128 for "hopper".
      backend: "ragged", "mosaic", "hopper" or "tokamax".
    """
    out_SF = kernel_of(backend)(lhs_SD, rhs_MDF, group_sizes_M, PRODUCT)
    return rows_of_groups(out_SF, group_sizes_M)


def _forward(lhs_SD: Array, rhs_MDF: Array, group_sizes_M: Array, backend: str) -> tuple:
    return grouped_matmul(lhs_SD, rhs_MDF, group_sizes_M, backend), (lhs_SD, rhs_MDF, group_sizes_M)


def _backward(backend: str, residuals: tuple, d_out_SF: Array) -> tuple:
    lhs_SD, rhs_MDF, group_sizes_M = residuals
    kernel = kernel_of(backend)
    d_out_SF = rows_of_groups(d_out_SF, group_sizes_M)
    d_lhs_SD = kernel(d_out_SF, rhs_MDF, group_sizes_M, ROWS_GRADIENT)
    d_rhs_MDF = kernel(lhs_SD, d_out_SF, group_sizes_M, MATRICES_GRADIENT)
    return rows_of_groups(d_lhs_SD, group_sizes_M), matrices_of_groups(d_rhs_MDF, group_sizes_M), None


grouped_matmul.defvjp(_forward, _backward)


Kernel = Callable[[Array, Array, Array, RaggedDotDimensionNumbers], Array]


def kernel_of(backend: str) -> Kernel:
    """How a backend for sorted rows computes the products: a function of lhs, rhs, group sizes and one of the three."""
    kernels: dict[str, Kernel] = {
        "ragged": _ragged,
        "mosaic": functools.partial(_on_hopper, mosaic),
        "hopper": functools.partial(_on_hopper, hopper),
        "tokamax": _tokamax,
    }
    return kernels[backend]


def _ragged(lhs: Array, rhs: Array, group_sizes_M: Array, dimensions: RaggedDotDimensionNumbers) -> Array:
    return jax.lax.ragged_dot_general(lhs, rhs, group_sizes_M, dimensions)


def _on_hopper(
    kernels: Any, lhs: Array, rhs: Array, group_sizes_M: Array, dimensions: RaggedDotDimensionNumbers
) -> Array:
    """Kernels of one of two modules, with `jax.lax.ragged_dot_general` and a warning for what they do not take."""
    reason = kernels.unsupported(lhs.dtype, (*lhs.shape, *rhs.shape[1:]))
    if reason:
        _warn_of_ragged(lhs, rhs, reason)
        return _ragged(lhs, rhs, group_sizes_M, dimensions)
    if dimensions == MATRICES_GRADIENT:
        return kernels.matrices_gradient(lhs, rhs, group_sizes_M)
    return kernels.product(lhs, rhs, group_sizes_M, transpose_rhs=dimensions == ROWS_GRADIENT)


def _tokamax(lhs: Array, rhs: Array, group_sizes_M: Array, dimensions: RaggedDotDimensionNumbers) -> Array:
    """tokamax's kernels, with `jax.lax.ragged_dot_general` and a warning for what they do not take."""
    try:
        import tokamax

        _prepare_tokamax()
        # Its Mosaic kernels for Hopper (0.0.17) give wrong gradients of the matrices.
        kernel = _tokamax_for_tpu(lhs, rhs, group_sizes_M, dimensions) if platform() == "tpu" else "triton"
        return tokamax.ragged_dot_general(lhs, rhs, group_sizes_M, dimensions, implementation=(kernel,))
    except (NotImplementedError, ValueError, ExceptionGroup) as error:
        errors: Any = error.exceptions if isinstance(error, ExceptionGroup) else (error,)
        reason = "; ".join(dict.fromkeys(" ".join(str(e).split()) for e in errors))
        _warn_of_ragged(lhs, rhs, f"tokamax: {reason}")
        return _ragged(lhs, rhs, group_sizes_M, dimensions)
    except (AttributeError, ImportError, TypeError) as error:
        versions = " and ".join(f"{name} {importlib.metadata.version(name)}" for name in ("tokamax", "jax"))
        raise ConfigError(
            f"moe.matmul is 'tokamax', but {versions} (or jax-triton) do not go together "
            f"({type(error).__name__}: {error}): install versions made for each other, or choose another moe.matmul"
        ) from error


def _tokamax_for_tpu(lhs: Array, rhs: Array, group_sizes_M: Array, dimensions: RaggedDotDimensionNumbers) -> Any:
    """tokamax's kernel for TPUs, in tiles of our choice."""
    from tokamax._src.ops.ragged_dot.pallas_mosaic_tpu import Config, PallasMosaicTpuRaggedDot  # exported nowhere

    if dimensions == MATRICES_GRADIENT:
        choose, width = tpu_tiles.for_matrices, rhs.shape[1]
    else:
        choose, width = tpu_tiles.for_rows, rhs.shape[1 if dimensions == ROWS_GRADIENT else 2]
    num_rows, depth = lhs.shape
    tiles = choose(num_rows, depth, width, len(group_sizes_M), lhs.dtype.itemsize)
    return PallasMosaicTpuRaggedDot(config=Config(tile_m=tiles.rows, tile_k=tiles.depth, tile_n=tiles.columns))


@functools.cache
def _prepare_tokamax() -> None:
    """Keep it from parsing the command line of a program that has no absl flags, and from logging every new shape."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    logging.getLogger("absl").addFilter(lambda record: "Autotuning cache miss" not in record.getMessage())


def _warn_of_ragged(lhs: Array, rhs: Array, reason: str) -> None:
    warn_once(
        reason,
        f"there is no kernel for {lhs.dtype} {list(lhs.shape)} x {list(rhs.shape)} here ({reason}): "
        "jax.lax.ragged_dot computes this product, and any other of which that is true",
    )


class SlowKernel(UserWarning):
    """Experts are computed in a way that is right, but slower than need be."""


_warned_of: set[str] = set()


def warn_once(reason: str, text: str) -> None:
    """Warn once for each reason, however often it comes up while tracing."""
    if reason not in _warned_of:
        warnings.warn(text, SlowKernel, stacklevel=2)
        _warned_of.add(reason)
