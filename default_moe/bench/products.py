"""Grouped matrix products by every kernel there is, as shares of a plain product's speed."""

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from default_moe.bench import report
from default_moe.bench.report import Row
from default_moe.bench.timing import call_once, one_line, time_alternately
from default_moe.bench.workload import LayerShape, on_cpu, product_shapes, standard_dtype
from default_moe.hardware import heading, is_hopper, is_nvidia
from default_moe.moe.experts import hopper, hopper_tiles
from default_moe.moe.experts.backends import available_backends, lay_out, run_rows
from default_moe.moe.experts.grouped_matmul import MATRICES_GRADIENT, PRODUCT, ROWS_GRADIENT, SlowKernel, kernel_of
from default_moe.moe.experts.swiglu import ExpertParams

# The products of a layer: hidden @ down, the gradient of x from that of x @ gate, and the gradient of gate.
_KINDS = {
    hopper_tiles.PRODUCT: PRODUCT,
    "rows' gradient": ROWS_GRADIENT,
    hopper_tiles.MATRICES: MATRICES_GRADIENT,
}
_COLUMNS = ("by", "ms", "GB/s", "GFLOP/s", "/ matrix product", "error")

Call = Callable[[], Any]


class Work(NamedTuple):
    """Something that several kernels do.  flops: its operations, of rows that are there.  by: them, by their names."""

    name: str
    flops: int
    by: dict[str, Call]


def run(
    shapes: Sequence[LayerShape],
    dtype: str | None,
    rounds: int,
    vs_torch: bool,
    save: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Time a copy, a plain product and grouped products, print a table of each, and return all rows.

    shapes: `product_shapes` if there are none.  vs_torch: time torch's grouped product too.
    save: takes the rows found until then, after each table.
    A kernel that fails gets a row with its error. Raises ConfigError.
    """
    if vs_torch:
        from default_moe.bench import torch_block  # torch is needed for nothing else

        torch_block.check_installed("torch")
    dtype = dtype or standard_dtype()
    rows = ceilings(dtype, rounds)
    best = rows[0].get("GFLOP/s")
    for shape in shapes or product_shapes():
        for work in _works(shape, dtype, vs_torch):
            rows += _shown(f"{shape} {dtype}, {work.name}", _time(work.by, rounds, work.flops, best))
            save(rows)
    return rows


def ceilings(dtype: str | None, rounds: int) -> list[Row]:
    """Time a plain product, and a copy in memory: what nothing else can be faster than."""
    print(heading())
    dtype = dtype or standard_dtype()
    size, copied = (1024, 2**26) if on_cpu() else (8192, 2**31)
    square = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = _time({f"{size} x {size}": functools.partial(jax.jit(jnp.matmul), square, square)}, rounds, 2 * size**3)
    rows = _shown(f"matrix product, {dtype}", product)
    (copy,) = _time({"negative": functools.partial(jax.jit(jnp.negative), jnp.ones(copied // 4, jnp.float32))}, rounds)
    if "ms" in copy:
        copy["GB/s"] = 2 * copied / copy["ms"] / 1e6
    return rows + _shown(f"copy of {copied / 2**30:.2f} GiB, bytes read and written", [copy])


def _time(functions: Mapping[str, Call], rounds: int, flops: int = 0, best: float | None = None) -> list[Row]:
    """Return a row of each function, all of which take `flops` operations.  best: GFLOP/s of a matrix product."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowKernel)  # no kernel is timed under another's name
        raised = call_once(functions)
    errors = {name: one_line(error) for name, error in raised.items()}
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


def _works(shape: LayerShape, dtype: str, vs_torch: bool) -> Iterator[Work]:
    """Yield the three products, on a Hopper GPU those with SwiGLU in them, and whole experts."""
    if vs_torch:
        from default_moe.bench import torch_block
    one, ours = shape.active_flops() // 3, _ours(shape, dtype) if is_hopper() else {}
    for kind in _KINDS:
        by = _products(shape, kind, dtype) | ours.get(kind, {})
        if vs_torch:
            plain = functools.partial(_plain, sizes_M=None, dimensions=_KINDS[kind])
            by["torch, plain product"] = torch_block.on_random_tensors(plain, _operands(shape, kind), dtype)
        yield Work(kind, one, by)
    for kind, products in ((hopper_tiles.SWIGLU, 2), (hopper_tiles.SWIGLU_GRADIENT, 1)):
        if ours:
            yield Work(kind, products * one, ours[kind])
    left_out = "ragged" if on_cpu() else "blocks"  # which no one would take there
    passes = {name: _experts(shape, name, dtype) for name in available_backends() if name != left_out}
    if vs_torch:
        passes["torch"] = torch_block.grouped_swiglu(shape, dtype)
    for index, name in enumerate(("forward", "forward+backward")):
        yield Work(f"SwiGLU experts, {name}", (3, 9)[index] * one, {by: both[index] for by, both in passes.items()})


def _products(shape: LayerShape, kind: str, dtype: str) -> dict[str, Call]:
    """Return one of the three products by every kernel but ours."""
    kernels: dict[str, tuple[Callable, dict[str, Any]]] = {
        "plain product of equal FLOPs": (_plain, {}),
        "ragged_dot": (jax.lax.ragged_dot_general, {}),
    }
    if is_nvidia():
        fusion = {"xla_gpu_experimental_use_ragged_dot_fusion": True}
        kernels["ragged_dot, XLA's fusion"] = (jax.lax.ragged_dot_general, fusion)
    if is_hopper():
        kernels["mosaic"] = (kernel_of("mosaic"), {})
    if not on_cpu() and importlib.util.find_spec("tokamax"):
        import tokamax

        if not is_nvidia():
            kernels["tokamax mosaic, our tiles"] = (kernel_of("tokamax"), {})
        for name in ("mosaic", "triton"):
            kernels[f"tokamax {name}"] = (functools.partial(tokamax.ragged_dot_general, implementation=(name,)), {})
    _, sizes_M = _groups(shape, "mosaic")
    arrays = _drawn(_operands(shape, kind), dtype)

    def bind(kernel: Callable, compiler_options: dict[str, Any]) -> Call:
        def product(lhs: Array, rhs: Array, sizes_M: Array) -> Array:
            return kernel(lhs, rhs, sizes_M, _KINDS[kind])

        return functools.partial(jax.jit(product, compiler_options=compiler_options), *arrays, sizes_M)

    return {name: bind(*how) for name, how in kernels.items()}


def _operands(shape: LayerShape, kind: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the operands of one of the three products."""
    slots, _ = _groups(shape, "mosaic")
    x, hidden = (slots, shape.d_model), (slots, shape.expert_dim)
    return {
        PRODUCT: (hidden, (shape.num_experts, shape.expert_dim, shape.d_model)),
        ROWS_GRADIENT: (hidden, (shape.num_experts, shape.d_model, shape.expert_dim)),
        MATRICES_GRADIENT: (x, hidden),
    }[_KINDS[kind]]


def _ours(shape: LayerShape, dtype: str) -> dict[str, dict[str, Call]]:
    """Return what our kernels for Hopper do in a layer, each with all tiles that are worth a measurement."""
    slots, sizes_M = _groups(shape, "hopper")
    found: dict[str, dict[str, Call]] = {}
    for work in hopper.works(slots, shape.d_model, shape.expert_dim, shape.num_experts):
        if work.name in found:  # the second of two places alike
            continue
        arrays = _drawn(work.shapes, dtype)
        found[work.name] = {
            f"hopper {tiles}": functools.partial(
                jax.jit(functools.partial(work.run, tiles=tiles)), *arrays, group_sizes_M=sizes_M
            )
            for tiles in hopper_tiles.candidates(work.kernel, work.width, work.depth)
        }
    return found


def _experts(shape: LayerShape, backend: str, dtype: str) -> tuple[Call, Call]:
    """Return the forward pass of SwiGLU experts on rows that are sorted, and that with all gradients."""
    slots, sizes_M = _groups(shape, backend)
    wide, narrow, experts = shape.d_model, shape.expert_dim, shape.num_experts
    into, out_of = (experts, wide, narrow), (experts, narrow, wide)
    x, g, gate, up, down = _drawn(((slots, wide), (slots, wide), into, into, out_of), dtype)

    def forward(x: Array, params: ExpertParams) -> Array:
        return run_rows(x, params, sizes_M, shape.tokens * shape.top_k, experts, backend)

    def both(x: Array, params: ExpertParams, g: Array) -> Any:
        out, pull = jax.vjp(forward, x, params)
        return out, pull(g)

    params = ExpertParams(gate, up, down)
    return functools.partial(jax.jit(forward), x, params), functools.partial(jax.jit(both), x, params, g)


def _groups(shape: LayerShape, backend: str) -> tuple[int, Array]:
    """Return the number of slots, and of those of each expert, as a layer lays out uniformly drawn experts."""
    drawn = np.random.default_rng(0).integers(shape.num_experts, size=(shape.tokens, shape.top_k), dtype=np.int32)
    layout = lay_out(jnp.asarray(drawn), shape.num_experts, backend)
    return layout.assignment_S.size, layout.group_sizes_M


def _drawn(shapes: Sequence[tuple[int, ...]], dtype: str) -> list[Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def _plain(lhs: Any, rhs: Any, sizes_M: Any, dimensions: Any) -> Any:
    """Compute the product with one matrix for all rows, or with all rows in one group, by JAX or torch."""
    if dimensions == PRODUCT:
        return lhs @ rhs[0]
    return lhs @ rhs[0].T if dimensions == ROWS_GRADIENT else lhs.T @ rhs
