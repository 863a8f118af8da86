"""Experts by our own kernels for Hopper GPUs, `hopper_kernels.py`.

Groups of rows must be multiples of 128, which `layout.py` makes them. In numbers read and written (see
`sorted_rows.py`), SwiGLU inside the kernels saves 2PF of 5PF forward, as the activation reads nothing again, and 2PF of
6PF backward, where the gradient of the hidden values is never written. Not done: the rows that a kernel multiplies are
still gathered before it (PD read and written), for Hopper loads tiles of neighbouring rows, and the two products that
make the gradient of x are still added after them (3PD).
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from default_moe.moe.experts import hopper_tiles
from default_moe.moe.experts.hopper_tiles import CHUNK, MATRICES, PRODUCT, ROWS, SWIGLU, SWIGLU_GRADIENT
from default_moe.moe.experts.layout import matrices_of_groups, rows_of_groups
from default_moe.moe.experts.swiglu import EXPERT_PRODUCT, ExpertParams

# Kernels are imported where they are used: it takes a second.


def unsupported(dtype: DTypeLike, sizes: Iterable[int]) -> str | None:
    """Why operands of that type and of these sizes, groups left out, cannot be taken, None if they can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return "Hopper's kernels take bfloat16 and float16"
    if any(size % CHUNK or size < ROWS for size in sizes):
        return f"our kernels for Hopper take sizes that are multiples of {CHUNK}, from {ROWS} on"
    return None


def product(lhs_SD: Array, rhs: Array, group_sizes_M: Array, transpose_rhs: bool) -> Array:
    """out[s] = lhs[s] @ rhs[e], or @ rhs[e]^T, for rows of group e: [S, F].

    rhs: [M, D, F], or [M, F, D] to be transposed.
    """
    from default_moe.moe.experts import hopper_kernels

    tiles = hopper_tiles.choose(PRODUCT, rhs.shape[1 if transpose_rhs else 2])
    return hopper_kernels.product(lhs_SD, rhs, group_sizes_M, transpose_rhs, tiles)


def matrices_gradient(lhs_SD: Array, d_out_SF: Array, group_sizes_M: Array) -> Array:
    """lhs[group e]^T @ d_out[group e]: [M, D, F], anything for an empty group."""
    from default_moe.moe.experts import hopper_kernels

    tiles = hopper_tiles.choose(MATRICES, d_out_SF.shape[1])
    return hopper_kernels.matrices_gradient(lhs_SD, d_out_SF, group_sizes_M, tiles)


@jax.custom_vjp
def row_experts(x_SD: Array, params: ExpertParams, group_sizes_M: Array) -> Array:
    """The expert of each row's group applied to it: [S, D], in the dtype of `x_SD`; zeros past the last group."""
    return _forward(x_SD, params, group_sizes_M)[0]


def _forward(x_SD: Array, params: ExpertParams, group_sizes_M: Array) -> tuple:
    from default_moe.moe.experts import hopper_kernels

    tiles = hopper_tiles.choose(SWIGLU, params.gate.shape[2])
    gate_SF, up_SF, hidden_SF = hopper_kernels.swiglu_product(x_SD, params.gate, params.up, group_sizes_M, tiles)
    gate_SF, up_SF = (checkpoint_name(a, EXPERT_PRODUCT) for a in (gate_SF, up_SF))
    out_SD = product(hidden_SF, params.down, group_sizes_M, False)
    out_SD = checkpoint_name(rows_of_groups(out_SD, group_sizes_M), EXPERT_PRODUCT)
    return out_SD, (x_SD, params, group_sizes_M, gate_SF, up_SF)


def _backward(residuals: tuple, d_out_SD: Array) -> tuple:
    from default_moe.moe.experts import hopper_kernels

    x_SD, params, group_sizes_M, gate_SF, up_SF = residuals
    tiles = hopper_tiles.choose(SWIGLU_GRADIENT, gate_SF.shape[1])
    d_gate_SF, d_up_SF, hidden_SF = hopper_kernels.swiglu_gradient(
        d_out_SD, params.down, gate_SF, up_SF, group_sizes_M, tiles
    )
    d_x_SD = product(d_gate_SF, params.gate, group_sizes_M, True)
    d_x_SD += product(d_up_SF, params.up, group_sizes_M, True)

    def gradient(lhs: Array, d_out: Array) -> Array:
        return matrices_of_groups(matrices_gradient(lhs, d_out, group_sizes_M), group_sizes_M)

    d_params = ExpertParams(gradient(x_SD, d_gate_SF), gradient(x_SD, d_up_SF), gradient(hidden_SF, d_out_SD))
    return rows_of_groups(d_x_SD, group_sizes_M), d_params, None


row_experts.defvjp(_forward, _backward)


class Work(NamedTuple):
    """A kernel in a place of a layer.

    kernel: which, of `hopper_tiles`.  name: of the place.  width, depth: of the output, and of what is summed over.
    shapes: of the operands.  run: the kernel, of the operands, group_sizes_M and tiles.
    """

    kernel: str
    name: str
    width: int
    depth: int
    shapes: tuple[tuple[int, ...], ...]
    run: Callable


def works(num_slots: int, d_model: int, expert_dim: int, num_experts: int) -> list[Work]:
    """Return all places in which a layer uses kernels, in their order, the backward pass included."""
    from default_moe.moe.experts import hopper_kernels as kernels

    x, hidden = (num_slots, d_model), (num_slots, expert_dim)
    into, out_of = (num_experts, d_model, expert_dim), (num_experts, expert_dim, d_model)
    forward, backward = (functools.partial(kernels.product, transpose_rhs=transpose) for transpose in (False, True))
    return [
        Work(SWIGLU, SWIGLU, expert_dim, d_model, (x, into, into), kernels.swiglu_product),
        Work(PRODUCT, PRODUCT, d_model, expert_dim, (hidden, out_of), forward),
        Work(
            SWIGLU_GRADIENT, SWIGLU_GRADIENT, expert_dim, d_model, (x, out_of, hidden, hidden), kernels.swiglu_gradient
        ),
        Work(PRODUCT, "rows' gradient", d_model, expert_dim, (hidden, into), backward),
        Work(MATRICES, MATRICES, expert_dim, d_model, (x, hidden), kernels.matrices_gradient),
        Work(MATRICES, MATRICES, d_model, expert_dim, (hidden, x), kernels.matrices_gradient),
    ]
