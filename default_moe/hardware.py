"""What this runs on: the platform, the peak arithmetic speed of a device, and its memory."""

import contextlib
import importlib.metadata
import os
import platform as python_platform
from pathlib import Path
from typing import Any

import jax

# Dense bfloat16 FLOP/s of one JAX device, from the makers' data sheets; the first name found in the device kind counts.
_PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("TPU7x", 2307e12 / 2),  # JAX sees a chip as two devices
)


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 FLOP/s of one device, or None where it is not known, as for CPUs."""
    return next((peak for name, peak in _PEAKS if name.lower() in device.device_kind.lower()), None)


def platform() -> str:
    """Name that of the mesh in use, or of the default device: "cpu", "tpu", or one of a GPU."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return (device and device.platform) or jax.default_backend()


def is_nvidia() -> bool:
    """Whether that is an NVIDIA GPU."""
    if platform() not in ("gpu", "cuda"):
        return False
    return "rocm" not in getattr(jax.devices()[0].client, "platform_version", "").lower()


def is_hopper() -> bool:
    """Whether that is an NVIDIA GPU of the Hopper architecture: an H100, an H200 or another of compute capability 9."""
    return is_nvidia() and getattr(jax.devices()[0], "compute_capability", "").startswith("9.")


def memory_bytes(device: jax.Device) -> int | None:
    """What arrays and temporaries may take on a device, None if unknown. Simulated CPU devices share the host's."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no such group, or no limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total // jax.local_device_count("cpu")


_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "tokamax", "torch", "transformers")


def machine() -> dict[str, Any]:
    """Where this runs, and with what."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "num_devices": jax.device_count(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": python_platform.machine(),
        "python": python_platform.python_version(),
        "versions": versions,
    }


def heading() -> str:
    """One line that says where this runs."""
    m = machine()
    return f"{m['num_devices']} x {m['device']}, {m['cpu_cores']} CPU cores, jax {m['versions']['jax']}"
