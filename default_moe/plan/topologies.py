"""Accelerators that need not be there: their names, what they can do, and devices to compile for."""

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.extend import backend

from default_moe.errors import ConfigError, quoted

_GIB = 2**30


class Hardware(NamedTuple):
    """What one JAX device can do, from the makers' data sheets. Its arithmetic is in `hardware.peak_flops`.

    memory: bytes that a program may use.  bandwidth: bytes per second to and from memory.
    link: bytes per second that a device can send along one mesh axis: on TPU along one axis of the torus, both ways.
    network: the same between hosts, where that is slower (GPUs).
    """

    memory: int
    bandwidth: float
    link: float
    network: float


class Topology(NamedTuple):
    """name: as asked for.  devices: to make a mesh of.  hardware: of each; None if its speed is not known (CPU)."""

    name: str
    devices: list[Any]
    hardware: Hardware | None


# The memory that the TPU compiler has for a program; of a GPU all there is, of which JAX takes a part.
_TPUS = {
    "v5e": Hardware(int(15.75 * _GIB), 819e9, 90e9, 90e9),
    "v5p": Hardware(int(95.74 * _GIB), 2765e9, 180e9, 180e9),
    "v6e": Hardware(int(31.25 * _GIB), 1640e9, 180e9, 180e9),
    "tpu7x": Hardware(int(94.75 * _GIB), 7380e9 / 2, 90e9, 90e9),  # a chip is two devices
}
_GPUS = {
    "h100": Hardware(85_000_000_000, 3350e9, 450e9, 50e9),
    "h200": Hardware(151_000_000_000, 4800e9, 450e9, 50e9),
}
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
_SHAPES = {"v5e": _FLAT, "v6e": _FLAT, "v5p": (*_DEEP, "16x16x16"), "tpu7x": (*_DEEP, "16x16x16")}

_GPU_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 minor: 0 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "NVIDIA {name}"
"""


def known() -> str:
    """Return every name that `open_topology` takes, in one line."""
    tpus = [f"{kind}:{'|'.join(shapes)}" for kind, shapes in _SHAPES.items()]
    return ", ".join([*tpus, *(f"{kind}:1 to 8" for kind in _GPUS), "h100:HOSTSx8", "h200:HOSTSx8", "cpu:1 to 512"])


def open_topology(name: str) -> Topology:
    """Return that of a name such as v5e:4x4, h100:8, h100:4x8 (four hosts of eight) or cpu:8.

    Must come before any use of devices.
    Raises ConfigError if there is none of that name, or if what compiles for it is not installed.
    """
    kind, _, shape = name.partition(":")
    if shape in _SHAPES.get(kind, ()):
        return Topology(name, _tpu_devices(name, shape), _TPUS[kind])
    gpus = re.fullmatch(r"(?:([1-9]\d{0,3})x)?([1-8])", shape, re.ASCII)
    if kind in _GPUS and gpus:
        hosts = int(gpus[1] or 1)
        fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))
        usable = _GPUS[kind]._replace(memory=int(_GPUS[kind].memory * fraction))
        return Topology(name, _gpu_devices(kind, hosts, int(gpus[2])), usable)
    if kind == "cpu" and re.fullmatch(r"[1-9]\d{0,2}", shape, re.ASCII) and int(shape) <= 512:
        jax.config.update("jax_num_cpu_devices", int(shape))
        return Topology(name, jax.devices("cpu")[: int(shape)], None)
    raise ConfigError(f"--topology is {quoted(name)}, but must be one of {known()}")


@contextlib.contextmanager
def traced_for(device: Any) -> Iterator[None]:
    """Kernels are picked by the default device or the first, which is a CPU here: while entered it is `device`."""
    before = backend.get_default_device, jax.devices
    backend.get_default_device, jax.devices = (lambda *_: device), (lambda *_, **__: [device])
    try:
        yield
    finally:
        backend.get_default_device, jax.devices = before


def _tpu_devices(name: str, shape: str) -> list[Any]:
    if not _installed("libtpu"):
        raise ConfigError(f"--topology={name} needs the TPU compiler, which runs on any machine: pip install libtpu")
    # There is no TPU host to ask what kind it is, and no TPU that two programs could not use at a time.
    for variable, value in (
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
    ):
        os.environ.setdefault(variable, value)
    host = {"chips_per_host_bounds": [1, 1, 1]} if set(shape) <= set("1x") else {}
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **host).devices)


def _gpu_devices(kind: str, hosts: int, per_host: int) -> list[Any]:
    if not _installed("jax_plugins.xla_cuda13"):
        raise ConfigError(
            f"--topology={kind} needs the CUDA compiler, which runs without a GPU: pip install 'jax[cuda13]'"
        )
    hardware = _GPUS[kind]
    description = _GPU_DESCRIPTION.format(name=kind.upper(), memory=hardware.memory, bandwidth=int(hardware.bandwidth))
    shape = f"1x{hosts}x{per_host}"
    described = topologies.get_topology_desc(
        platform="cuda", topology_name=kind, topology=shape, target_config=description
    )
    return list(described.devices)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even what it is part of
        return False
