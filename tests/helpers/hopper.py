"""Kernels for Hopper GPUs on a CPU, by JAX's interpreter of such kernels."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax._src.pallas.mosaic.interpret import utils
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, params
from jax._src.state.types import TransposeTransform

from default_moe.moe.experts import hopper_kernels


@contextlib.contextmanager
def interpreted(monkeypatch) -> Iterator[None]:
    """Two multiprocessors, which run as threads: they share the tiles, and wait at barriers for each other."""
    monkeypatch.setattr(hopper_kernels, "MULTIPROCESSORS", 2)
    if jax.__version__.startswith("0.10."):
        monkeypatch.setattr(gpu_callbacks, "wgmma", _multiply)
    with params.force_gpu_interpret_mode():
        yield


def _multiply(
    *,
    token,
    device_id,
    thread_id,
    acc_allocation_key_as_array,
    acc_transforms,
    acc_dtype,
    a_allocation_key_as_array,
    a_transforms,
    b_allocation_key_as_array,
    b_transforms,
    **_,
):
    """The interpreter's own, which in jax 0.10 takes no transposed operand."""
    memory = gpu_callbacks._get_shared_memory()
    thread = memory.get_global_thread_id(int(device_id), int(thread_id))

    def read(key, transforms):
        *transforms, last = gpu_callbacks._remove_noop_transforms(transforms) or (None,)
        turned = isinstance(last, TransposeTransform)
        transforms = tuple(t for t in (*transforms, None if turned else last) if t is not None)
        where = utils.to_range(jax.tree.map(int, transforms))
        key = gpu_callbacks.HostAllocationKey.from_array(key)
        value, _, _ = memory.get_buffer_content(key, where, thread, logging_info=None)
        return key, where, value.T if turned else value

    _, _, a = read(a_allocation_key_as_array, a_transforms)
    _, _, b = read(b_allocation_key_as_array, b_transforms)
    key, where, total = read(acc_allocation_key_as_array, acc_transforms)
    total = total + np.matmul(a.astype(acc_dtype), b.astype(acc_dtype))
    memory.store_buffer_content(key, where, total, thread, logging_info=None)
    return token
