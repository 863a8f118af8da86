"""The choice of how experts are computed."""

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike

from default_moe.config import MATMUL_BACKENDS
from default_moe.errors import ConfigError
from default_moe.hardware import is_hopper, is_nvidia, platform
from default_moe.moe.experts import mosaic

_INSTALL_TOKAMAX = "pip install tokamax"


def resolve_backend(backend: str, dtype: DTypeLike = jnp.bfloat16, widths: Sequence[int] = ()) -> str:
    """One of MATMUL_BACKENDS; "auto" picks by the platform of the mesh in use, or of the default device.

    dtype, widths: of the experts, on which depends which kernels take them.
    Raises ConfigError if a backend that was asked for by name is not installed or does not run on that platform.
    """
    if backend == "auto":
        if platform() == "cpu":
            return "blocks"
        reason = f"tokamax is not installed: {_INSTALL_TOKAMAX}"
        if is_hopper():
            problem = mosaic.unsupported(dtype, widths)
            if not problem:
                return "mosaic"
            reason = f"{problem}, and {reason}"
        if not _tokamax_runs():
            return "ragged"
        if _tokamax_installed():
            return "tokamax"
        _warn(
            reason,
            "moe.matmul='auto' falls back to 'ragged', which computes every expert for every token (on TPU in the "
            f"backward pass alone), because {reason}",
        )
        return "ragged"
    if backend == "mosaic" and not is_hopper():
        raise ConfigError(
            f"moe.matmul is 'mosaic', whose kernels run on Hopper GPUs (H100, H200), but this is {platform()!r}: "
            "use 'auto'"
        )
    if backend == "tokamax":
        if not _tokamax_runs():
            raise ConfigError(
                f"moe.matmul is 'tokamax', whose kernels run on NVIDIA GPUs and TPUs, but this is {platform()!r}: "
                "use 'auto', 'blocks' or 'ragged'"
            )
        if not _tokamax_installed():
            raise ConfigError(f"moe.matmul is 'tokamax', but tokamax is not installed: {_INSTALL_TOKAMAX}")
    return backend


def available_backends() -> list[str]:
    """Those that `resolve_backend` takes here."""
    found = []
    for backend in MATMUL_BACKENDS:
        try:
            found.append(resolve_backend(backend))
        except ConfigError:
            continue
    return found


def group_alignment(backend: str) -> int:
    """Rows that every group is padded to a multiple of, so that its sums can be taken in blocks of as many."""
    return 1 if backend == "blocks" else 8


def slots_multiple(backend: str) -> int:
    """What the number of all rows is a multiple of: kernels may take them in tiles of as many."""
    return 128 if backend in ("mosaic", "tokamax") else group_alignment(backend)


def largest_block() -> int:
    """Rows of a block for "blocks": what stays in a CPU's cache, elsewhere what keeps an accelerator busy."""
    return 576 if platform() == "cpu" else 2048


def _tokamax_runs() -> bool:
    return is_nvidia() or platform() == "tpu"


def _tokamax_installed() -> bool:
    return importlib.util.find_spec("tokamax") is not None


class SlowKernel(UserWarning):
    """Experts are computed in a way that is right, but slower than need be."""


_warned_of: set[str] = set()


def _warn(reason: str, text: str) -> None:
    """Once for each reason, however often it comes up while tracing."""
    if reason not in _warned_of:
        warnings.warn(text, SlowKernel, stacklevel=2)
        _warned_of.add(reason)
