"""Grouped matrix products by every kernel there is, as shares of a plain product's speed."""

import functools
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from default_moe.bench import report
from default_moe.bench.report import Row
from default_moe.bench.timing import time_alternately
from default_moe.bench.workload import LayerShape, on_cpu, standard_dtype, standard_shapes
from default_moe.hardware import heading, is_hopper, is_nvidia
from default_moe.moe.experts import grouped_matmul
from default_moe.moe.experts.grouped_matmul import MATRICES_GRADIENT, PRODUCT, ROWS_GRADIENT, SlowKernel

_KINDS = {"product": PRODUCT, "rows' gradient": ROWS_GRADIENT, "matrices' gradient": MATRICES_GRADIENT}
_COLUMNS = ("by", "ms", "GB/s", "GFLOP/s", "/ matrix product", "error")


def run(shapes: Sequence[LayerShape], dtype: str | None, rounds: int, vs_torch: bool) -> list[Row]:
    """Time a copy, a plain product and grouped products, print a table of each, and return all rows.

    shapes: the first and the last standard one if there are none.  vs_torch: time torch's grouped product too.
    A kernel that fails gets a row with its error. Raises ConfigError.
    """
    if vs_torch:
        from default_moe.bench import torch_block  # torch is needed for nothing else

        torch_block.check_installed("torch")
    print(heading())
    dtype = dtype or standard_dtype()
    size, copied = (1024, 2**26) if on_cpu() else (8192, 2**31)
    square = jax.random.normal(jax.random.key(0), (size, size), dtype)
    (best,) = _time({f"{size} x {size}": functools.partial(jax.jit(jnp.matmul), square, square)}, rounds, 2 * size**3)
    rows = _shown(f"matrix product, {dtype}", [best])
    (copy,) = _time({"negative": functools.partial(jax.jit(jnp.negative), jnp.ones(copied // 4, jnp.float32))}, rounds)
    if "ms" in copy:
        copy["GB/s"] = 2 * copied / copy["ms"] / 1e6
    rows += _shown(f"copy of {copied / 2**30:.2f} GiB, bytes read and written", [copy])
    for shape in shapes or dict.fromkeys((standard_shapes()[0], standard_shapes()[-1])):
        flops = shape.active_flops()
        for kind in _KINDS:
            group = _time(_grouped_products(shape, kind, dtype), rounds, flops // 3, best.get("GFLOP/s"))
            rows += _shown(f"{shape} {dtype}, {kind}", group)
        if vs_torch:
            forward, both = torch_block.grouped_swiglu(shape, dtype)
            group = _time({"torch, forward": forward}, rounds, flops, best.get("GFLOP/s"))
            group += _time({"torch, forward+backward": both}, rounds, 3 * flops, best.get("GFLOP/s"))
            rows += _shown(f"{shape} {dtype}, SwiGLU experts", group)
    return rows


def _time(
    functions: Mapping[str, Callable[[], Any]], rounds: int, flops: int = 0, best: float | None = None
) -> list[Row]:
    """Return a row of each function, all of which take `flops` operations.  best: GFLOP/s of a matrix product."""
    errors = {}
    for name, function in functions.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", SlowKernel)  # no kernel is timed under another's name
                jax.block_until_ready(function())
        except Exception as error:  # whatever a kernel, a compiler or a library raises
            errors[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    timings = time_alternately({name: f for name, f in functions.items() if name not in errors}, rounds)
    rows: list[Row] = [{"by": name, "ms": timing.seconds * 1e3} for name, timing in timings.items()]
    for row in rows:
        if flops:
            row["GFLOP/s"] = flops / row["ms"] / 1e6
            row["/ matrix product"] = row["GFLOP/s"] / best if best else None
    return rows + [{"by": name, "error": error} for name, error in errors.items()]


def _shown(work: str, rows: list[Row]) -> list[Row]:
    """Print a table, and return its rows with what they are of."""
    print(f"\n{work}\n{report.table(rows, _COLUMNS)}", flush=True)
    return [{"work": work, **row} for row in rows]


def _grouped_products(shape: LayerShape, kind: str, dtype: str) -> dict[str, Callable[[], Any]]:
    """Return one of the three products by every kernel, for rows of uniformly drawn experts."""
    slots, wide, narrow = shape.tokens * shape.top_k, shape.d_model, shape.expert_dim
    experts = np.random.default_rng(0).integers(shape.num_experts, size=slots)
    sizes = jnp.asarray(np.bincount(experts, minlength=shape.num_experts), jnp.int32)
    lhs_shape = (slots, narrow if kind == "rows' gradient" else wide)
    rhs_shape = (slots, narrow) if kind == "matrices' gradient" else (shape.num_experts, wide, narrow)
    keys = jax.random.split(jax.random.key(0))
    lhs, rhs = (jax.random.normal(*args, dtype) for args in zip(keys, (lhs_shape, rhs_shape), strict=True))

    def bind(kernel: Callable, **compiler_options: Any) -> Callable[[], Any]:
        def product(lhs: Array, rhs: Array, sizes: Array) -> Array:
            return kernel(lhs, rhs, sizes, _KINDS[kind])

        return functools.partial(jax.jit(product, compiler_options=compiler_options), lhs, rhs, sizes)

    ragged = jax.lax.ragged_dot_general
    found = {"plain product of equal FLOPs": bind(_plain), "ragged_dot": bind(ragged)}
    if is_nvidia():
        found["ragged_dot, XLA's fusion"] = bind(ragged, xla_gpu_experimental_use_ragged_dot_fusion=True)
    if is_hopper():
        found["mosaic"] = bind(grouped_matmul.kernel_of("mosaic"))
    if not on_cpu() and importlib.util.find_spec("tokamax"):
        import tokamax

        for name in ("mosaic", "triton"):
            found[f"tokamax {name}"] = bind(functools.partial(tokamax.ragged_dot_general, implementation=(name,)))
    return found


def _plain(lhs: Array, rhs: Array, sizes: Array, dimensions: Any) -> Array:
    """Compute the product with one matrix for all rows, or with all rows in one group."""
    if dimensions == PRODUCT:
        return lhs @ rhs[0]
    return lhs @ rhs[0].T if dimensions == ROWS_GRADIENT else lhs.T @ rhs
