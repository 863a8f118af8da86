"""Kernels for Hopper GPUs: products of rows grouped by expert, with SwiGLU applied before results leave the chip.

A block of three warpgroups computes one tile of the output after another. One warpgroup only loads. The other two
share a tile, so that one multiplies while the other waits or writes. Groups are multiples of ROWS rows, which makes
every tile of rows one expert's: nothing is masked, and rows past the last group are left as they are.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from default_moe.moe.experts.hopper_tiles import CHUNK, MULTIPROCESSORS, ROWS, SHARE, Tiles, columns_at_a_time

_LOADER = 2  # which of the three warpgroups loads


def product(lhs_SD: Array, rhs: Array, group_sizes_M: Array, transpose_rhs: bool, tiles: Tiles) -> Array:
    """Compute out[s] = lhs[s] @ rhs[e], or @ rhs[e]^T, for rows of group e: [S, F].

    rhs: [M, D, F], or [M, F, D] to be transposed.
    """
    (out_SF,) = _of_rows(lhs_SD, (rhs,), (), group_sizes_M, transpose_rhs, tiles, 1, lambda sums, _: sums)
    return out_SF


def swiglu_product(
    x_SD: Array, gate_MDF: Array, up_MDF: Array, group_sizes_M: Array, tiles: Tiles
) -> tuple[Array, Array, Array]:
    """Compute x @ gate, x @ up and silu(x @ gate) * (x @ up), each [S, F]."""

    def activate(sums: Sequence[Array], _: Sequence[Array]) -> tuple[Array, ...]:
        gate, up = (a.astype(x_SD.dtype).astype(jnp.float32) for a in sums)
        return gate, up, gate * jax.nn.sigmoid(gate) * up

    gate_SF, up_SF, hidden_SF = _of_rows(x_SD, (gate_MDF, up_MDF), (), group_sizes_M, False, tiles, 3, activate)
    return gate_SF, up_SF, hidden_SF


def swiglu_gradient(
    d_out_SD: Array, down_MFD: Array, gate_SF: Array, up_SF: Array, group_sizes_M: Array, tiles: Tiles
) -> tuple[Array, Array, Array]:
    """Compute the gradients of x @ gate and x @ up from that of hidden @ down, and hidden again, each [S, F]."""

    def differentiate(sums: Sequence[Array], kept: Sequence[Array]) -> tuple[Array, ...]:
        (d_hidden,), (gate, up) = sums, kept
        sigmoid = jax.nn.sigmoid(gate)
        silu = gate * sigmoid
        return d_hidden * up * (sigmoid + silu * (1 - sigmoid)), d_hidden * silu, silu * up

    kept = (gate_SF, up_SF)
    d_gate_SF, d_up_SF, hidden_SF = _of_rows(d_out_SD, (down_MFD,), kept, group_sizes_M, True, tiles, 3, differentiate)
    return d_gate_SF, d_up_SF, hidden_SF


def _of_rows(
    lhs_SD: Array,
    matrices: Sequence[Array],
    kept: Sequence[Array],
    group_sizes_M: Array,
    transpose: bool,
    tiles: Tiles,
    num_outputs: int,
    finish: Callable[[Sequence[Array], Sequence[Array]], Sequence[Array]],
) -> Sequence[Array]:
    """Multiply the rows of each group with its matrix of each of `matrices`, and `finish` what comes out: [S, F] each.

    matrices: [M, D, F] each, or [M, F, D] to be transposed.
    kept: [S, F] each; read in tiles, as float32, for `finish`.
    finish: from chunks of the products and of `kept` to those of the outputs, all float32.
    """
    dtype, (num_slots, depth) = lhs_SD.dtype, lhs_SD.shape
    num_experts, width = len(matrices[0]), matrices[0].shape[1 if transpose else 2]
    columns = tiles.columns // len(matrices)
    down, across = num_slots // ROWS, pl.cdiv(width, columns * tiles.cluster)
    expert_J = jnp.searchsorted(jnp.cumsum(group_sizes_M) // ROWS, jnp.arange(down), side="right").astype(jnp.int32)
    matrix_tile = (columns, tiles.depth) if transpose else (tiles.depth, columns)
    shared = ("column",) if tiles.cluster > 1 else ()
    bounds = (0, len(matrices), len(matrices) + len(kept), None)

    def pipeline(step: Callable, context: Callable, row: Any = 0) -> Any:
        lhs = _spec((ROWS, tiles.depth), lambda k: (row, k), dtype, shared)
        rhs = _spec(matrix_tile, (lambda k: (0, k)) if transpose else (lambda k: (k, 0)), dtype)
        return _pipeline(step, context, (lhs, *(rhs for _ in matrices)), depth // tiles.depth, tiles)

    def columns_of(matrix: Any, left: Any) -> Any:
        here = pl.ds(left, columns)
        return matrix.at[here] if transpose else matrix.at[:, here]

    def kernel(expert_J: Any, lhs: Any, *refs: Any) -> None:
        matrices_, kept_, outputs = (refs[first:last] for first, last in itertools.pairwise(bounds))
        example = (lhs, *(columns_of(m.at[0], 0) for m in matrices_))
        loads: dict[str, Any] = {}
        if kept:
            loads["inputs"] = _shared((2, len(kept), SHARE, CHUNK), dtype)
            loads["loaded"] = plgpu.Barrier(num_arrivals=len(kept), num_barriers=2)

        @functools.partial(  # type: ignore[call-arg]  # mypy takes **loads for what has no names
            pl.run_scoped,
            buffers=pipeline(_nothing, _nothing).get_allocations(*example),
            results=_shared((2, 2, SHARE, CHUNK), dtype),
            multiplied=_barrier(tiles),
            **loads,
            collective_axes="warpgroup",
        )
        def _(buffers: Any, results: Any, multiplied: Any, inputs: Any = None, loaded: Any = None) -> None:
            warpgroup = lax.axis_index("warpgroup")

            @plgpu.nd_loop((down * across,), collective_axes="block")
            def _(turn: Any) -> None:
                row, column = plgpu.planar_snake(turn.index[0], (down, across), 1, columns_at_a_time(across))
                if shared:
                    column = column * tiles.cluster + lax.axis_index("column")
                expert = expert_J[row]
                left = _left(column, columns, width)

                @pl.when(expert < num_experts)
                def _() -> None:
                    top = row * ROWS + warpgroup * SHARE

                    def part(array: Any, n: int) -> Any:
                        return array.at[pl.ds(top, SHARE), pl.ds(left + n * CHUNK, CHUNK)]

                    def load(n: int) -> None:
                        for index, array in enumerate(kept_):
                            place = inputs.at[warpgroup, index]
                            plgpu.copy_gmem_to_smem(part(array, n), place, loaded.at[warpgroup])

                    def context(multiply: Callable) -> None:
                        load(0)

                        @functools.partial(pl.run_scoped, sums=[_sums(columns) for _ in matrices])
                        def _(sums: Any) -> None:
                            multiply(sums)
                            values = [a[...] for a in sums]
                            plgpu.barrier_arrive(multiplied)
                            for n in range(columns // CHUNK):
                                if kept_:
                                    plgpu.barrier_wait(loaded.at[warpgroup])
                                read = [inputs[warpgroup, i].astype(jnp.float32) for i in range(len(kept))]
                                chunks = [a[:, n * CHUNK : (n + 1) * CHUNK] for a in values]
                                for index, out in enumerate(finish(chunks, read)):
                                    _write(
                                        out.astype(dtype),
                                        results.at[warpgroup],
                                        n * num_outputs + index,
                                        part(outputs[index], n),
                                    )
                                if n + 1 < columns // CHUNK:
                                    load(n + 1)

                    def step(_: Any, lhs: Any, *rest: Any) -> Any:
                        *operands, sums = rest
                        rows = lhs.at[pl.ds(warpgroup * SHARE, SHARE)]
                        for matrix, total in zip(operands, sums, strict=True):
                            plgpu.wgmma(total, rows, plgpu.transpose_ref(matrix, (1, 0)) if transpose else matrix)
                        plgpu.wgmma_wait(len(matrices))
                        return sums

                    operands = (columns_of(m.at[expert], left) for m in matrices_)
                    pipeline(step, context, row)(lhs, *operands, allocations=buffers)
                    _wait(multiplied)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    out_type = [jax.ShapeDtypeStruct((num_slots, width), dtype)] * num_outputs
    return _launch(kernel, out_type, tiles)(expert_J, lhs_SD, *matrices, *kept)


def matrices_gradient(lhs_SD: Array, d_out_SF: Array, group_sizes_M: Array, tiles: Tiles) -> Array:
    """Compute lhs[group e]^T @ d_out[group e]: [M, D, F]. An empty group's is left as it is."""
    dtype, (num_experts,) = lhs_SD.dtype, group_sizes_M.shape
    height, width, columns = lhs_SD.shape[1], d_out_SF.shape[1], tiles.columns
    down, across = pl.cdiv(height, ROWS), pl.cdiv(width, columns)
    ends_M = jnp.cumsum(group_sizes_M).astype(jnp.int32) // tiles.depth
    sizes_M = group_sizes_M.astype(jnp.int32) // tiles.depth

    def pipeline(step: Callable, context: Callable, first: Any = 0, steps: Any = tiles.stages) -> Any:
        specs = (_spec((tiles.depth, size), lambda k: (first + k, 0), dtype) for size in (ROWS, columns))
        return _pipeline(step, context, tuple(specs), steps, tiles)

    def kernel(ends_M: Any, sizes_M: Any, lhs: Any, d_out: Any, out: Any) -> None:
        def operands(top: Any, left: Any) -> tuple[Any, Any]:
            return lhs.at[:, pl.ds(top, ROWS)], d_out.at[:, pl.ds(left, columns)]

        @functools.partial(
            pl.run_scoped,
            buffers=pipeline(_nothing, _nothing).get_allocations(*operands(0, 0)),
            results=_shared((2, 2, SHARE, CHUNK), dtype),
            multiplied=_barrier(tiles),
            collective_axes="warpgroup",
        )
        def _(buffers: Any, results: Any, multiplied: Any) -> None:
            warpgroup = lax.axis_index("warpgroup")

            @plgpu.nd_loop((num_experts, down * across), collective_axes="block")
            def _(turn: Any) -> None:
                expert = turn.index[0]
                row, column = plgpu.planar_snake(turn.index[1], (down, across), 1, columns_at_a_time(across))
                top, left = _left(row, ROWS, height), _left(column, columns, width)
                size = sizes_M[expert]

                @pl.when(size > 0)
                def _() -> None:
                    def context(multiply: Callable) -> None:
                        @functools.partial(pl.run_scoped, sums=_sums(columns))
                        def _(sums: Any) -> None:
                            multiply(sums)
                            values = sums[...]
                            plgpu.barrier_arrive(multiplied)
                            for n in range(columns // CHUNK):
                                rows = pl.ds(top + warpgroup * SHARE, SHARE)
                                there = out.at[expert, rows, pl.ds(left + n * CHUNK, CHUNK)]
                                chunk = values[:, n * CHUNK : (n + 1) * CHUNK]
                                _write(chunk.astype(dtype), results.at[warpgroup], n, there)

                    def step(_: Any, lhs: Any, d_out: Any, sums: Any) -> Any:
                        turned = plgpu.transpose_ref(lhs.at[:, pl.ds(warpgroup * SHARE, SHARE)], (1, 0))
                        plgpu.wgmma(sums, turned, d_out)
                        plgpu.wgmma_wait(1)
                        return sums

                    work = pipeline(step, context, ends_M[expert] - size, size)
                    work(*operands(top, left), allocations=buffers)
                    _wait(multiplied)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    out_type = jax.ShapeDtypeStruct((num_experts, height, width), dtype)
    return _launch(kernel, out_type, tiles)(ends_M, sizes_M, lhs_SD, d_out_SF)


def _left(index: Any, size: int, whole: int) -> Any:
    """Where a tile begins. The last one is moved so that it ends where the array does: two tiles may write the same."""
    return pl.multiple_of(jnp.minimum(index * size, whole - size), 64)


def _pipeline(step: Callable, context: Callable, specs: tuple, steps: Any, tiles: Tiles) -> Any:
    return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(steps,),
        memory_registers=40,
        in_specs=specs,
        max_concurrent_steps=tiles.stages,
        wg_axis="warpgroup",
        num_compute_wgs=2,
        compute_context=context,
    )


def _spec(shape: tuple[int, int], index_map: Callable, dtype: Any, shared: tuple[str, ...] = ()) -> Any:
    # Products of a step are known to be done in the next one, when the memory that they read may be written again.
    return plgpu.BlockSpec(
        shape, index_map, transforms=_swizzled(dtype), collective_axes=shared, memory_space=plgpu.SMEM, delay_release=1
    )


def _shared(shape: tuple[int, ...], dtype: Any) -> Any:
    return plgpu.SMEM(shape, dtype, transforms=_swizzled(dtype))


def _swizzled(dtype: Any) -> tuple:
    return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def _sums(columns: int) -> Any:
    return plgpu.ACC((SHARE, columns), jnp.float32)


def _barrier(tiles: Tiles) -> Any:
    """At which both multiplying warpgroups arrive, those of all blocks that load for each other."""
    if tiles.cluster > 1:
        return plgpu.ClusterBarrier(collective_axes=("column",), num_arrivals=2)
    return plgpu.Barrier(num_arrivals=2)


def _wait(multiplied: Any) -> None:
    """Keep the loader from loading what comes next over what the last products still read."""

    @pl.when(lax.axis_index("warpgroup") == _LOADER)
    def _() -> None:
        plgpu.barrier_wait(multiplied)


def _write(chunk: Array, places: Any, number: int, there: Any) -> None:
    """By way of one of two places in shared memory; what went by the other may still be on its way.

    number: of the chunk in the tile. The last one of the tile before may have gone by either.
    """
    plgpu.wait_smem_to_gmem(min(number, 1), wait_read_only=True)
    place = places.at[number % 2]
    place[...] = chunk
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(place, there)


def _nothing(*_: Any, **__: Any) -> None:
    """Stand in for what has no influence on how much memory a pipeline needs."""


def _launch(kernel: Callable, out_type: Any, tiles: Tiles) -> Callable:
    cluster: dict[str, Any] = {"cluster": (tiles.cluster,), "cluster_names": ("column",)} if tiles.cluster > 1 else {}
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(MULTIPROCESSORS // tiles.cluster,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **cluster,
    )
