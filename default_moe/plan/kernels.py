"""Our kernels for Hopper GPUs as they are compiled: registers, what is spilled, shared memory."""

import functools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from default_moe.errors import ConfigError
from default_moe.moe.experts import hopper, hopper_tiles
from default_moe.moe.experts.hopper_tiles import Tiles
from default_moe.plan.topologies import Topology, traced_for

# Widths D and F, and the number of experts: the paper's, four times as many of a quarter of the width, fine ones.
SHAPES = ((1024, 2816, 8), (1024, 704, 32), (1024, 512, 64))
_ROWS = 65_536


class Compiled(NamedTuple):
    """A kernel as compiled.

    name: what it computes, of which widths.  tiles: how.  registers: of a thread before warpgroups share them anew.
    spilled: bytes a thread writes to memory for want of registers.  shared: bytes of shared memory, barriers left out.
    error: why it does not compile, or None.
    """

    name: str
    tiles: Tiles
    registers: int
    spilled: int
    shared: int
    error: str | None


def compile_kernels(topology: Topology) -> Iterator[Compiled]:
    """Compile every candidate for every shape. Raises ConfigError where the topology is not one of Hopper GPUs."""
    if topology.name.partition(":")[0] not in ("h100", "h200"):
        raise ConfigError(f"--kernels needs a Hopper GPU, --topology=h200:1, but --topology is {topology.name}")
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"  # the assembler prints what it finds
    seen = set()
    for d_model, expert_dim, num_experts in SHAPES:
        for work in hopper.works(_ROWS, d_model, expert_dim, num_experts):
            for tiles in hopper_tiles.candidates(work.kernel, work.width, work.depth):
                name = f"{work.name}, {work.depth} to {work.width}"
                if (name, tiles) not in seen:
                    seen.add((name, tiles))
                    yield _compile(topology, name, work, num_experts, tiles)


def table(found: list[Compiled]) -> str:
    """Return what was compiled as a table for people."""
    lines = [f"{'kernel':44} {'tiles':32} registers  spilled bytes  shared KiB"]
    for one in found:
        figures = one.error or f"{one.registers:9} {one.spilled:14} {one.shared / 1024:11.0f}"
        lines.append(f"{one.name:44} {one.tiles!s:32} {figures}")
    return "\n".join(lines)


def _compile(topology: Topology, name: str, work: hopper.Work, num_experts: int, tiles: Tiles) -> Compiled:
    here = SingleDeviceSharding(topology.devices[0])
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here) for shape in work.shapes]
    sizes_M = jax.ShapeDtypeStruct((num_experts,), jnp.int32, sharding=here)
    error = None
    with _all_that_is_printed() as printed, traced_for(topology.devices[0]):
        try:
            run = functools.partial(work.run, tiles=tiles)
            jax.jit(lambda sizes_M, *operands: run(*operands, group_sizes_M=sizes_M)).lower(
                sizes_M, *operands
            ).compile()
        except Exception as raised:  # whatever tracing, the compiler or the assembler raises
            error = " ".join(f"{type(raised).__name__}: {raised}".split())[:200]
    text = printed()
    registers, spilled = (
        int((re.findall(p, text) or [0])[-1]) for p in (r"Used (\d+) reg", r"(\d+) bytes spill stores")
    )
    if not error and not registers:
        error = "the assembler did not say what it found"
    return Compiled(name, tiles, registers, spilled, hopper_tiles.shared_bytes(work.kernel, tiles), error)


@contextmanager
def _all_that_is_printed() -> Iterator[Callable[[], str]]:
    """Yield a function that returns what this process prints while entered, compilers outside of Python included."""
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush(), sys.stderr.flush()
        kept = [os.dup(number) for number in (1, 2)]
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            text = ""
            yield lambda: text
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            for number, before in zip((1, 2), kept, strict=True):
                os.dup2(before, number)
                os.close(before)
            file.seek(0)
            text = file.read().decode(errors="replace")
