"""The grouped matrix products alone, by every kernel there is, as shares of a plain product's speed."""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from default_moe.bench.accelerator import results as results_file
from default_moe.bench.accelerator.ceilings import matmul_ceiling
from default_moe.bench.accelerator.results import Results
from default_moe.bench.accelerator.scale import Scale, scale
from default_moe.bench.report import Row
from default_moe.bench.timing import time_alternately
from default_moe.bench.workload import LayerShape
from default_moe.hardware import is_hopper, is_nvidia
from default_moe.moe.experts.grouped_matmul import MATRICES_GRADIENT, PRODUCT, ROWS_GRADIENT, kernel_of

_KINDS = {"product": PRODUCT, "rows' gradient": ROWS_GRADIENT, "matrices' gradient": MATRICES_GRADIENT}


def measure(results: Results, folder: Path) -> None:
    s = scale()
    ceiling = matmul_ceiling(results_file.read(folder))
    for shape in dict.fromkeys((s.layers[0], s.layers[-1])):
        for kind in _KINDS:
            for name, kernel, options in _kernels():
                results.guarded(
                    f"{shape}, {kind}, {name}",
                    functools.partial(_time, kernel, options, kind, shape, s, ceiling),
                )


@functools.cache
def _arrays(shape: LayerShape, dtype: str) -> dict[str, jax.Array]:
    """Rows [S, D] and [S, F], matrices [N, D, F] and the group sizes of uniformly drawn experts."""
    slots = shape.tokens * shape.top_k
    sizes = np.bincount(np.random.default_rng(0).integers(shape.num_experts, size=slots), minlength=shape.num_experts)
    keys = iter(jax.random.split(jax.random.key(0), 3))
    return {
        "D": jax.random.normal(next(keys), (slots, shape.d_model), dtype),
        "F": jax.random.normal(next(keys), (slots, shape.expert_dim), dtype),
        "matrices": jax.random.normal(next(keys), (shape.num_experts, shape.d_model, shape.expert_dim), dtype),
        "sizes": jnp.asarray(sizes, jnp.int32),
    }


def _time(
    kernel: Callable, options: dict[str, Any], kind: str, shape: LayerShape, s: Scale, ceiling: float | None
) -> Row:
    arrays = _arrays(shape, s.dtype)
    a, b = {"product": ("D", "matrices"), "rows' gradient": ("F", "matrices"), "matrices' gradient": ("D", "F")}[kind]
    dimensions = _KINDS[kind]
    function = jax.jit(lambda lhs, rhs, sizes: kernel(lhs, rhs, sizes, dimensions), compiler_options=options)
    timing = time_alternately({"": lambda: function(arrays[a], arrays[b], arrays["sizes"])}, s.rounds)[""]
    flops = 2 * shape.tokens * shape.top_k * shape.d_model * shape.expert_dim / timing.seconds
    return {
        "ms": timing.seconds * 1e3,
        "TFLOP/s": flops / 1e12,
        "/ matrix product": flops / ceiling if ceiling else None,
    }


def _kernels() -> list[tuple[str, Callable, dict[str, Any]]]:
    """Name, function of (lhs, rhs, group sizes, dimensions), and compiler options, of all that may run here."""
    ragged = jax.lax.ragged_dot_general
    found: list[tuple[str, Callable, dict[str, Any]]] = [
        ("dense of equal FLOPs", _dense, {}),
        ("ragged_dot", ragged, {}),
    ]
    if is_nvidia():
        found.append(("ragged_dot, XLA's fusion", ragged, {"xla_gpu_experimental_use_ragged_dot_fusion": True}))
    if is_hopper():
        found.append(("mosaic", kernel_of("mosaic"), {}))
    if jax.default_backend() != "cpu" and importlib.util.find_spec("tokamax"):
        import tokamax

        for name in ("mosaic", "triton"):
            kernel = functools.partial(tokamax.ragged_dot_general, implementation=(name,))
            found.append((f"tokamax {name}", kernel, {}))
    return found


def _dense(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, dimensions: Any) -> jax.Array:
    """One matrix for all rows, or all rows in one group."""
    if dimensions == PRODUCT:
        return lhs @ rhs[0]
    return lhs @ rhs[0].T if dimensions == ROWS_GRADIENT else lhs.T @ rhs
