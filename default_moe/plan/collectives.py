"""What devices exchange in a compiled program: each kind of collective, over which mesh axes, how often, how much."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from default_moe.plan.hlo import Hlo, Instruction

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_ORDER = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


class Collective(NamedTuple):
    """One collective instruction.

    kind: one of KINDS.  axes: of the mesh, along which devices exchange; ("?",) if they are no axes of it.
    group: some devices that exchange with each other, by their number in the mesh.  runs: in one call of the program.
    bytes: that a device sends each time in the usual ring algorithm. For ragged-all-to-all, whose rows depend on
      routing, as if all were the same for each device and none of the smaller of its two arrays were left empty.
    instruction: of the program.
    """

    kind: str
    axes: tuple[str, ...]
    group: frozenset[int]
    runs: int
    bytes: int
    instruction: Instruction


def collectives(hlo: Hlo, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Return those of a program compiled for a mesh of this shape, but for groups of one device.

    TPU programs show a collective in each of the fusions that it overlaps with, some of them in other loops: it counts
    where it begins.
    """
    started: list[Collective] = []
    others: list[Collective] = []
    for name, runs in hlo.runs.items():
        computation = hlo.computations[name]
        begins = any('"AsyncCollectiveStart"' in i.attributes for i in computation.values())
        found = started if begins or name not in hlo.fused else others
        for instruction in computation.values():
            if instruction.opcode.removesuffix("-start") in KINDS:
                found.append(_collective(computation, instruction, runs, mesh_shape))
    channels = {_channel(one) for one in started}
    started += [one for one in others if _channel(one) not in channels]
    return [one for one in started if len(one.group) > 1]


def _collective(
    computation: Mapping[str, Instruction], instruction: Instruction, runs: int, mesh_shape: Mapping[str, int]
) -> Collective:
    kind = instruction.opcode.removesuffix("-start")
    groups = device_groups(instruction.attributes, math.prod(mesh_shape.values()))
    size = max(map(len, groups))
    result = _result_bytes(instruction, size)
    if kind == "ragged-all-to-all":  # from and into arrays of which one has room for the worst case
        rows = [computation[name].results[0].bytes for name in instruction.operands[:2] if name in computation]
        result = min([result, *rows])
    whole = result * size if kind == "reduce-scatter" else result
    sent = {"all-reduce": 2 * whole * (size - 1) / size, "collective-permute": whole, "collective-broadcast": whole}
    sent_bytes = round(sent.get(kind, whole * (size - 1) / size))
    return Collective(kind, _axes(groups, mesh_shape), min(groups, key=min), runs, sent_bytes, instruction)


def _channel(one: Collective) -> str | None:
    found = re.search(r"channel_id=(\d+)", one.instruction.attributes)
    return found[1] if found else None


def summary(found: Iterable[Collective]) -> list[tuple[str, tuple[str, ...], int, int]]:
    """Return (kind, axes, how often, bytes that a device sends) of each kind and axes, most bytes first."""
    count: Counter[tuple[str, tuple[str, ...]]] = Counter()
    sent: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for one in found:
        count[one.kind, one.axes] += one.runs
        sent[one.kind, one.axes] += one.runs * one.bytes
    return [(*key, count[key], size) for key, size in sent.most_common()]


def device_groups(attributes: str, num_devices: int) -> set[frozenset[int]]:
    """Return the devices that exchange with each other, by their number in the mesh.

    Read from replica_groups={{0,1},{2,3}}, or [4,2]<=[8], or mesh['a'=4,'b'=2] {'b'}, which extend along axis b, or
    from source_target_pairs={{0,1},{1,0}}.
    """
    ids = np.arange(num_devices)
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes):
        return _connected(_listed(pairs[1]))
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return {frozenset(group) for group in _listed(listed[1])}
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        along = re.findall(r"'(\w+)'", named[3])
        axes = [i for i, name in enumerate(sizes) if name not in along]
        axes += [list(sizes).index(name) for name in along]
        group_size = math.prod(sizes[name] for name in along)
        ids = (_permuted(ids, named[2]) if named[2] else ids).reshape(list(sizes.values())).transpose(axes)
        return {frozenset(group) for group in ids.reshape(-1, group_size).tolist()}
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        shape = [int(n) for n in iota[1].split(",")]
        return {frozenset(group) for group in _permuted(ids, iota[2]).reshape(shape).tolist()}
    if re.search(r"replica_groups=\{\}", attributes):  # all of them
        return {frozenset(ids.tolist())}
    raise ValueError(f"a collective whose replica groups have an unknown form: {attributes[:200]}")


def _permuted(ids: np.ndarray, order: str) -> np.ndarray:
    """Return the ids in the order that "[4,2]T(1,0)" stands for: reshaped, and transposed if it says so."""
    shape, axes = ([int(n) for n in part.split(",") if n] for part in re.findall(_ORDER, order)[0])
    return ids.reshape(shape).transpose(axes) if axes else ids.reshape(shape)


def _listed(text: str) -> list[list[int]]:
    return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]


def _connected(pairs: list[list[int]]) -> set[frozenset[int]]:
    groups: dict[int, frozenset[int]] = {}
    for pair in pairs:
        merged = frozenset(pair).union(*(groups.get(device, ()) for device in pair))
        groups |= dict.fromkeys(merged, merged)
    return set(groups.values())


def _axes(groups: set[frozenset[int]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Return the mesh axes along which the groups extend, if they are all devices along these and no others."""
    sizes = list(mesh_shape.values())
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    places = np.array([np.unravel_index(device, ids.shape) for device in sorted(min(groups, key=min))])
    along = [axis for axis in range(len(sizes)) if len(set(places[:, axis])) > 1]
    order = [axis for axis in range(len(sizes)) if axis not in along] + along
    size = math.prod(sizes[axis] for axis in along)
    expected = {frozenset(group) for group in ids.transpose(order).reshape(-1, size).tolist()}
    return tuple(list(mesh_shape)[axis] for axis in along) if groups == expected else ("?",)


def _result_bytes(instruction: Instruction, group_size: int) -> int:
    """Return the bytes that the collective gives on one device. An asynchronous start gives its operands too."""
    arrays = [a for a in instruction.results if a.shape or instruction.opcode == "all-reduce"]
    total = sum(a.bytes for a in arrays)
    if instruction.opcode == "all-gather-start":
        return total * group_size // (group_size + 1)
    if instruction.opcode == "collective-permute-start":
        return total // 2
    return total
