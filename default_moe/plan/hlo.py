"""A compiled program's text (XLA's HLO), read into computations and instructions, with how often each is run.

XLA's own cost analysis counts the body of a loop once. A training step is loops over layers, microbatches and chunks
of the loss, so the number of their turns is what matters.
"""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"\b(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
# What these apply is a scalar function, counted with the operation itself.
_APPLY_A_SCALAR_FUNCTION = ("reduce", "reduce-window", "sort", "scatter", "select-and-scatter", "map", "all-reduce")


class Array(NamedTuple):
    """An array's type. in_memory: False if it is kept on the chip (a memory space of its own)."""

    dtype: str
    shape: tuple[int, ...]
    in_memory: bool

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        width = _BITS.get(self.dtype, int(bits[0]) if bits else 8)
        return math.prod(self.shape) * width // 8


class Instruction(NamedTuple):
    """One line: its name, operation, what it gives (a tuple's arrays in order), operands' names, and all that follows.

    op_name: the JAX operation that it comes from.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def op_name(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


class Hlo:
    """A module.

    computations: instructions by name, of each computation by its name.
    runs: how often each computation is run in one call of the program.
    fused: computations that are run as one instruction of another.
    open_loops: how many loops have a number of turns that the text does not tell; they count as one turn.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        entry = None
        current: dict[str, Instruction] = {}
        last = None
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                current = self.computations[found[2]] = {}
                entry = found[2] if found[1] else entry
                last = None
            elif found := _INSTRUCTION.match(line):
                last = _instruction(found)
                current[last.name] = last
            elif last:  # what a kernel says of itself may take several lines
                current[last.name] = last = last._replace(attributes=f"{last.attributes}\n{line}")
        if entry is None:
            raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
        self.runs: dict[str, int] = defaultdict(int)
        self.fused: set[str] = set()
        self.open_loops = 0
        self._walk(entry, 1)

    def instructions(self) -> Iterator[tuple[Instruction, int]]:
        """Give those of all computations that are run, fused ones too, and how often."""
        for name, runs in self.runs.items():
            for instruction in self.computations[name].values():
                yield instruction, runs

    def _walk(self, name: str, runs: int) -> None:
        self.runs[name] += runs
        for instruction in self.computations[name].values():
            if instruction.opcode.removesuffix("-start") in _APPLY_A_SCALAR_FUNCTION:
                continue
            times = runs
            if instruction.opcode == "while":
                turns = self._turns(instruction)
                self.open_loops += turns is None
                times *= turns or 1
            for called in called_computations(instruction):
                if instruction.opcode == "fusion":
                    self.fused.add(called)
                self._walk(called, times)

    def _turns(self, loop: Instruction) -> int | None:
        """Return how often a loop's body runs: as XLA says, else by its condition, `i < number` with i from 0 on."""
        if known := re.search(r'"?known_trip_count"?[^}]*?"?n"?[:=]\s*"?(\d+)', loop.attributes):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.-]+)", loop.attributes)
        if not condition:
            return None
        instructions = self.computations[condition[1]]
        root = next(i for i in instructions.values() if i.is_root)
        if root.opcode == "fusion":
            instructions = {**instructions, **self.computations[called_computations(root)[0]]}
            root = next(reversed(self.computations[called_computations(root)[0]].values()))
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        constants = [i for i in instructions.values() if i.opcode == "constant" and i.results[0].shape == ()]
        values = [re.match(r"(\d+)\)", i.attributes) for i in constants]
        numbers = [int(value[1]) for value in values if value]
        return numbers[0] if len(numbers) == 1 else None


def called_computations(instruction: Instruction) -> list[str]:
    """Return the names of the computations that an instruction runs, but for a loop's condition."""
    names = _CALLED.findall(instruction.attributes)
    for branches in _BRANCHES.findall(instruction.attributes):
        names += re.findall(r"%?([\w.-]+)", branches)
    return names


@functools.cache
def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), "S(" not in layout or "S(0)" in layout)
        for dtype, dims, layout in _ARRAY.findall(text)
    )


def _instruction(found: re.Match[str]) -> Instruction:
    """Return a matched line's instruction. A constant's value and the parameter's number stand in `attributes`."""
    root, name, results, opcode, rest = found.groups()
    depth = 1
    end = len(rest)
    for index, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if not depth:
            end = index
            break
    operands = tuple(re.findall(r"%([\w.-]+)", rest[:end]))
    attributes = rest if not operands else rest[end + 1 :]
    return Instruction(name, opcode, _arrays(results), operands, attributes, bool(root))
