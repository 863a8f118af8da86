"""What a compiled program costs a device: operations, bytes to and from memory, and the least time these take."""

import math
import re
from typing import NamedTuple

import numpy as np

from default_moe.moe.experts import tpu_tiles
from default_moe.plan.hlo import Array, Hlo, Instruction, called_computations

# These move nothing by themselves.
_FREE = re.compile(
    "after-all|bitcast|call|conditional|constant|get-tuple-element|iota|opt-barrier|optimization-barrier|parameter|"
    "partition-id|replica-id|tuple|while|.*-(done|update)"
)

_TPU_GROUPED_KERNEL = r"t?gmm_"  # tokamax's, by their names
_HOPPER_GROUPED_KERNEL = 'custom_call_target="mosaic_gpu'


class Costs(NamedTuple):
    """What one call costs one device.

    flops: of matrix products and kernels that say theirs.  bytes: to and from memory, what stays on the chip left out.
    busy_seconds: the sum over instructions of the longer of computing and moving, at the speeds given; of these
      computing_seconds are of instructions that compute for longer.  seconds_of: busy_seconds of each part of the step.
    open_loops: loops that count as one turn, since the program does not tell how many they take.
    """

    flops: float
    bytes: float
    busy_seconds: float
    computing_seconds: float
    seconds_of: dict[str, float]
    open_loops: int


def costs(hlo: Hlo, flops_per_second: float, bytes_per_second: float, grouped_fill: float = 1.0) -> Costs:
    """Count instruction by instruction, each as often as it runs, one after another.

    grouped_fill: the share of rows that are not empty in kernels for grouped products, where they skip empty ones.
    """
    total_flops = total_bytes = computing = 0.0
    seconds_of: dict[str, float] = {}
    for name, runs in hlo.runs.items():
        if name in hlo.fused:
            continue
        computation = hlo.computations[name]
        for instruction in computation.values():
            fill = grouped_fill if _skips_empty_rows(hlo, instruction) else 1.0
            flops = runs * fill * _flops(hlo, computation, instruction)
            if instruction.opcode == "custom-call" and re.match(_TPU_GROUPED_KERNEL, instruction.name):
                moved = runs * _grouped_bytes(computation, instruction, fill)
            else:
                moved = runs * fill * _bytes(hlo, computation, instruction)
            total_flops += flops
            total_bytes += moved
            seconds = max(flops / flops_per_second, moved / bytes_per_second)
            if flops / flops_per_second > moved / bytes_per_second:
                computing += seconds
            if seconds:
                part = _part(instruction.op_name)
                seconds_of[part] = seconds_of.get(part, 0.0) + seconds
    busy = sum(seconds_of.values())
    return Costs(total_flops, total_bytes, busy, computing, seconds_of, hlo.open_loops)


def _skips_empty_rows(hlo: Hlo, instruction: Instruction) -> bool:
    """Whether it is one of tokamax's kernels on TPU, or of those for Hopper that of the matrices' gradient."""
    if instruction.opcode == "fusion":
        fused = hlo.computations[called_computations(instruction)[0]]
        return any(_skips_empty_rows(hlo, one) for one in fused.values())
    if instruction.opcode == "custom-call" and _HOPPER_GROUPED_KERNEL in instruction.attributes:
        return len(instruction.results[0].shape) == 3
    return re.match(_TPU_GROUPED_KERNEL, instruction.name) is not None


def _part(op_name: str) -> str:
    """Return the part of the training step by the JAX operation that an instruction comes from."""
    layer = re.search(r"/(?:dense|moe)_layers/(attention|ffn|moe/router|moe|\w+)", op_name)
    if layer:
        return {"moe": "experts", "moe/router": "router", "ffn": "dense feed-forward"}.get(layer[1], layer[1])
    if "LanguageModel" in op_name:
        return "embedding, norms and copies"
    return "loss" if "jvp(" in op_name else "optimizer and copies"


def _flops(hlo: Hlo, computation: dict[str, Instruction], instruction: Instruction) -> float:
    """Return two per multiply-add of products; what a kernel says of itself; of a fusion those of what it fuses."""
    if instruction.opcode == "fusion":
        fused = hlo.computations[called_computations(instruction)[0]]
        return sum(_flops(hlo, fused, one) for one in fused.values())
    if instruction.opcode == "dot":
        lhs = _operand(computation, instruction, 0)
        contracted = _numbers(instruction, "lhs_contracting_dims")
        return 2.0 * math.prod(instruction.results[0].shape) * math.prod(lhs.shape[axis] for axis in contracted)
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    if instruction.opcode == "custom-call":
        if _HOPPER_GROUPED_KERNEL in instruction.attributes:
            # Of the first [S, D] and each [M, D, F] that it meets, or what makes [M, D, F] of it.
            shapes = [_operand(computation, instruction, index).shape for index in range(len(instruction.operands))]
            rows = next(shape for shape in shapes if len(shape) == 2)
            products = max(sum(len(shape) == 3 for shape in shapes), 1)
            return 2.0 * products * math.prod(rows) * instruction.results[0].shape[-1]
        said = re.search(r'"cost_estimate":\{[^}]*"flops":"(\d+)"', instruction.attributes)
        return float(said[1]) if said else 0.0
    return 0.0


def _convolution_flops(computation: dict[str, Instruction], instruction: Instruction) -> float:
    """Return those of a product that a TPU computes as a convolution: positions that padding fills are free."""
    lhs, rhs = (_operand(computation, instruction, index) for index in range(2))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"a convolution without dim_labels: {instruction.attributes[:200]}")
    groups = re.search(r"\bfeature_group_count=(\d+)", instruction.attributes)
    batch, features = lhs.shape[labels[1].index("b")], lhs.shape[labels[1].index("f")]
    flops = 2.0 * batch * features * rhs.shape[labels[2].index("o")] / (int(groups[1]) if groups else 1)
    spatial = sorted(set(labels[1]) - {"b", "f"})
    window = _window(instruction, len(spatial))
    for axis, name in enumerate(spatial):
        size, stride, low, lhs_dilate, rhs_dilate = window[axis]
        out = instruction.results[0].shape[labels[3].index(name)]
        place = np.arange(out)[:, None] * stride - low + np.arange(size)[None, :] * rhs_dilate
        limit = (lhs.shape[labels[1].index(name)] - 1) * lhs_dilate
        flops *= int(((place >= 0) & (place <= limit) & (place % lhs_dilate == 0)).sum())
    return flops


def _window(instruction: Instruction, count: int) -> list[tuple[int, ...]]:
    """Return (size, stride, padding before, base dilation, window dilation) of each spatial axis."""
    text = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    parts = dict(part.split("=") for part in text[1].split()) if text else {}
    defaults = {"size": "1", "stride": "1", "pad": "0", "lhs_dilate": "1", "rhs_dilate": "1"}
    columns = [parts[name].split("x") if name in parts else [value] * count for name, value in defaults.items()]
    return [tuple(int(value.split("_")[0]) for value in axis) for axis in zip(*columns, strict=True)]


def _bytes(hlo: Hlo, computation: dict[str, Instruction], instruction: Instruction) -> float:
    """Return what an instruction reads and writes: of a slice what it takes, of an update in place what it changes."""
    opcode = instruction.opcode
    if _FREE.fullmatch(opcode):
        return 0.0
    said = re.search(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"', instruction.attributes)
    if opcode == "custom-call" and said:
        return float(said[1])
    if opcode == "fusion":
        return _fusion_bytes(hlo, computation, instruction)
    operands = [a for name in instruction.operands if name in computation for a in computation[name].results]
    return _moved(opcode, operands, instruction.results)


def _grouped_bytes(computation: dict[str, Instruction], instruction: Instruction, fill: float) -> float:
    """Return the bytes that one of tokamax's kernels for TPUs moves, in the tiles that we choose.

    The kernel's own estimate counts a matrix once for every tile of rows.  fill: the share of rows that are not empty.
    """
    (*_, lhs, rhs), out = (computation[name].results[0] for name in instruction.operands), instruction.results[0]
    (num_rows, depth), width = lhs.shape, out.shape[-1]
    itemsize = lhs.bytes // math.prod(lhs.shape)
    if len(rhs.shape) == 3:
        choose, numbers, num_groups = tpu_tiles.for_rows, tpu_tiles.numbers_for_rows, rhs.shape[0]
    else:
        choose, numbers, num_groups = tpu_tiles.for_matrices, tpu_tiles.numbers_for_matrices, out.shape[0]
    tiles = choose(num_rows, depth, width, num_groups, itemsize)
    return itemsize * numbers(tiles, round(fill * num_rows), depth, width, num_groups)


def _moved(opcode: str, operands: list[Array], results: tuple[Array, ...]) -> float:
    result = sum(a.bytes for a in results if a.in_memory)
    if opcode in ("dynamic-slice", "slice", "gather", "broadcast"):
        return result + (_in_memory(operands[:1]) and min(result, _in_memory(operands[:1])))
    if opcode == "dynamic-update-slice":
        return 2.0 * _in_memory(operands[1:2]) if operands and operands[0].in_memory else 0.0
    return result + _in_memory(operands)


def _fusion_bytes(hlo: Hlo, computation: dict[str, Instruction], fusion: Instruction) -> float:
    fused = hlo.computations[called_computations(fusion)[0]]
    parameters: dict[int, str] = {}
    users: dict[str, list[Instruction]] = {}
    for one in fused.values():
        if one.opcode == "parameter":
            number = re.match(r"(\d+)", one.attributes)
            parameters[int(number[1]) if number else len(parameters)] = one.name
        for operand in one.operands:
            users.setdefault(operand, []).append(one)
    read = 0.0
    for index, name in enumerate(fusion.operands):
        arrays = computation[name].results if name in computation else ()
        whole = _in_memory(list(arrays))
        uses = users.get(parameters.get(index, ""), [])
        parts = 0.0
        for use in uses:
            if use.opcode in ("dynamic-slice", "slice", "gather"):
                parts += sum(a.bytes for a in use.results)
            elif not (use.opcode == "dynamic-update-slice" and use.operands[0] == parameters.get(index)):
                parts += whole
        read += min(whole, parts)
    root = next(one for one in fused.values() if one.is_root)
    written = 0.0
    made = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for one, array in zip(made, fusion.results, strict=False):
        if not array.in_memory:
            continue
        while one.opcode == "bitcast":
            one = fused[one.operands[0]]
        update = fused.get(one.operands[1]) if one.opcode == "dynamic-update-slice" else None
        written += update.results[0].bytes if update else array.bytes
    return read + written


def _in_memory(arrays: list[Array]) -> int:
    return sum(a.bytes for a in arrays if a.in_memory)


def _operand(computation: dict[str, Instruction], instruction: Instruction, index: int) -> Array:
    return computation[instruction.operands[index]].results[0]


def _numbers(instruction: Instruction, name: str) -> list[int]:
    found = re.search(name + r"=\{([\d,]*)\}", instruction.attributes)
    return [int(n) for n in found[1].split(",") if n] if found else []
