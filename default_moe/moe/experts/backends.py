"""The choice of how experts are computed, and the one place that goes by it.

`moe.matmul` is one of
  "blocks"   `blocks.py`: plain products over blocks of one expert's rows, whose cost follows the load. The choice on a
             CPU, where XLA expands `jax.lax.ragged_dot` to a product with every expert.
  "ragged"   `sorted_rows.py` with `jax.lax.ragged_dot`: on GPU a product with every expert, like on a CPU; on TPU a
             kernel of its own, but for the matrices' gradient, which is a product with every expert.
  "mosaic"   `sorted_rows.py` with JAX's own kernels for Hopper, `mosaic.py`: the choice on an H100 or H200.
  "hopper"   `sorted_rows.py` with our own kernels for Hopper, `hopper.py`: by name only, since no GPU has run them yet.
  "tokamax"  `sorted_rows.py` with the kernels of the package tokamax: the choice on other NVIDIA GPUs and on TPUs.
"""

import importlib.util
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from default_moe.config import MATMUL_BACKENDS
from default_moe.errors import choose
from default_moe.hardware import is_hopper, is_nvidia, platform
from default_moe.moe.experts import blocks, hopper, mosaic, sorted_rows
from default_moe.moe.experts.grouped_matmul import warn_once
from default_moe.moe.experts.hopper_tiles import ROWS
from default_moe.moe.experts.layout import Layout, dispatch, group_by_expert, take_or_zeros
from default_moe.moe.experts.swiglu import ExpertParams

_FOR_HOPPER = {"mosaic": mosaic, "hopper": hopper}


def resolve_backend(asked: str, dtype: DTypeLike = jnp.bfloat16, widths: Sequence[int] = ()) -> str:
    """Return one of MATMUL_BACKENDS; "auto" picks by the platform of the mesh in use, or of the default device.

    dtype, widths: of the experts, on which depends which kernels take them.
    Raises ConfigError if a backend that was asked for by name is not installed or does not run on that platform.
    """
    by_name = asked in _FOR_HOPPER
    options = _options(jnp.bfloat16 if by_name else dtype, () if by_name else widths)
    chosen = choose("moe.matmul", asked, options)
    if asked == "auto" and chosen == "ragged" and _tokamax_runs():
        reasons = (why for name, why in options if why and (name == "tokamax" or is_hopper()))
        reason = ", and ".join(dict.fromkeys(reasons))
        warn_once(
            reason,
            "moe.matmul='auto' falls back to 'ragged', which computes every expert for every token (on TPU only in the "
            f"backward pass), because {reason}",
        )
    return chosen


def available_backends() -> list[str]:
    """Return those of MATMUL_BACKENDS that `resolve_backend` takes here."""
    why_not = dict(_options(jnp.bfloat16, ()))
    return [name for name in MATMUL_BACKENDS if not why_not[name]]


def _options(dtype: DTypeLike, widths: Sequence[int]) -> list[tuple[str, str | None]]:
    """Every backend and what keeps it from being used here, the best first."""
    anywhere: list[tuple[str, str | None]] = [("blocks", None), ("ragged", None)]
    kernels = [(name, _why_not_on_hopper(name, dtype, widths)) for name in _FOR_HOPPER]
    kernels.append(("tokamax", _why_no_tokamax()))
    return [*anywhere, *kernels] if platform() == "cpu" else [*kernels, *reversed(anywhere)]


def _why_not_on_hopper(name: str, dtype: DTypeLike, widths: Sequence[int]) -> str | None:
    if not is_hopper():
        return f"its kernels run on Hopper GPUs (H100, H200), and this is {platform()!r}"
    return _FOR_HOPPER[name].unsupported(dtype, widths)


def _why_no_tokamax() -> str | None:
    if not _tokamax_runs():
        return f"its kernels run on NVIDIA GPUs and TPUs, and this is {platform()!r}"
    return None if _tokamax_installed() else "tokamax is not installed: pip install tokamax"


def _tokamax_runs() -> bool:
    return is_nvidia() or platform() == "tpu"


def _tokamax_installed() -> bool:
    return importlib.util.find_spec("tokamax") is not None


def group_alignment(backend: str) -> int:
    """Return what the rows of a group are padded to a multiple of: its sums are taken in blocks of as many."""
    return {"blocks": 1, "hopper": ROWS}.get(backend, 8)


def slots_multiple(backend: str) -> int:
    """Return what the number of all rows is a multiple of: kernels may take them in tiles of as many."""
    return 128 if backend in ("mosaic", "tokamax") else group_alignment(backend)


def lay_out(expert_TK: Array, num_experts: int, backend: str) -> Layout:
    """Return `group_by_expert` with room for what the backend needs. num_experts: M."""
    return group_by_expert(expert_TK, num_experts, group_alignment(backend), slots_multiple(backend))


def run_experts(
    x_TD: Array,
    gates_TK: Array,
    ema_weight_TK: Array | None,
    params: ExpertParams,
    layout: Layout,
    num_experts: int,
    backend: str,
    expert_gradient: bool = False,
) -> tuple[Array, Array | None]:
    """Return what `block_experts` does, which says what arguments and results are, by any backend.

    layout: of `lay_out`.  num_experts: N, over which assignments spread.
    """
    if backend == "blocks":
        rows = _block_rows(layout.slot_TK.size, num_experts)
        return blocks.block_experts(x_TD, gates_TK, ema_weight_TK, params, layout, rows, expert_gradient)
    align = group_alignment(backend)
    return sorted_rows.sorted_experts(x_TD, gates_TK, ema_weight_TK, params, layout, align, backend, expert_gradient)


def run_rows(
    x_QD: Array, params: ExpertParams, group_sizes_M: Array, num_assignments: int, num_experts: int, backend: str
) -> Array:
    """Apply the expert of each row's group to it: [Q, D], in the dtype of `x_QD`.

    num_assignments, num_experts: N experts, over which that many assignments spread.
    """
    if backend == "blocks":
        return blocks.block_row_experts(x_QD, params, group_sizes_M, _block_rows(num_assignments, num_experts))
    return sorted_rows.row_experts(x_QD, params, group_sizes_M, backend)


def output_products(
    x_TD: Array, g_TD: Array, params: ExpertParams, layout: Layout, num_experts: int, backend: str
) -> Array:
    """Return <g_t, E_i(x_t)> of each assignment: float32 [T, K]. Arguments as `run_experts` has them."""
    if backend == "blocks":
        rows = _block_rows(layout.slot_TK.size, num_experts)
        return blocks.block_output_products(x_TD, g_TD, params, layout, rows)
    out_SD = sorted_rows.row_experts(dispatch(x_TD, layout), params, layout.group_sizes_M, backend)
    g_SD = take_or_zeros(g_TD, layout.assignment_S // layout.slot_TK.shape[1])
    return take_or_zeros((g_SD * out_SD.astype(jnp.float32)).sum(axis=-1), layout.slot_TK)


def _block_rows(num_assignments: int, num_experts: int) -> int:
    return blocks.block_rows(num_assignments, num_experts, _largest_block())


def _largest_block() -> int:
    """What stays in a CPU's cache, elsewhere what keeps an accelerator busy."""
    return 576 if platform() == "cpu" else 2048
