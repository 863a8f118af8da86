"""One training step, compiled for devices that need not be there, and what the program tells of itself."""

import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from default_moe.config import Config
from default_moe.data.packing import pack
from default_moe.hardware import peak_flops
from default_moe.model.size import train_flops_per_token
from default_moe.plan.collectives import Collective, collectives
from default_moe.plan.costs import Costs, costs
from default_moe.plan.hlo import Hlo
from default_moe.plan.topologies import Topology, traced_for
from default_moe.training.memory import StepMemory, is_out_of_memory, step_memory
from default_moe.training.program import Program


class State(NamedTuple):
    """Bytes on each device of what lasts from step to step. rest: default vectors, counters, the batch."""

    parameters: int
    optimizer: int
    rest: int


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """A step of `config` on each device of `topology`.

    memory: as the compiler assigned it; None if the compiler itself gave up, for the reason `too_large`.
    costs, exchanges: None and empty if it did.
    model_flops: of the model, forward and backward, without padding and recomputation.
    """

    config: Config
    topology: Topology
    program: Program
    state: State
    memory: StepMemory | None
    too_large: str | None
    costs: Costs | None
    exchanges: tuple[Collective, ...]
    model_flops: float

    @property
    def fits(self) -> bool:
        """Whether state and temporaries fit a device. True for a CPU, of which that is not known."""
        hardware = self.topology.hardware
        return self.memory is not None and (hardware is None or self.memory.total <= hardware.memory)

    @property
    def sequences_a_device(self) -> int:
        """Sequences that a device holds at a time."""
        train = self.config.train
        return train.batch_size // train.grad_accum_steps // self.program.num_batch_shards

    @property
    def temporaries(self) -> float | None:
        """Bytes, those that the compiler says it would have needed if it gave up. None if it does not say."""
        if self.memory:
            return self.memory.temporaries
        said = re.search(r"(?:temporaries \(|Used )([\d.]+)([MG])", self.too_large or "")
        return float(said[1]) * {"M": 2**20, "G": 2**30}[said[2]] if said else None

    @property
    def busy_seconds(self) -> float:
        """Seconds of computing and moving to and from memory, by a roofline for each instruction.

        Some kernels do not say how many operations they take: it is at least what the model takes.
        """
        return max(self.costs.busy_seconds if self.costs else math.nan, self.model_flops / _peak(self.topology))

    @property
    def exchange_seconds(self) -> float:
        """Seconds of all collectives one after another, at the speed of the links that each crosses."""
        hardware, devices = self.topology.hardware, self.program.mesh.devices.flat
        if hardware is None:
            return 0.0
        total = 0.0
        for one in self.exchanges:
            hosts = {devices[index].process_index for index in one.group}
            total += one.runs * one.bytes / (hardware.link if len(hosts) == 1 else hardware.network)
        return total

    @property
    def seconds(self) -> tuple[float, float] | None:
        """The least that a step takes: with all exchanges hidden behind computing, and with none. None if unknown."""
        if self.costs is None or self.topology.hardware is None:
            return None
        return max(self.busy_seconds, self.exchange_seconds), self.busy_seconds + self.exchange_seconds


def program_for(config: Config, vocab_size: int, topology: Topology) -> Program:
    """Return a config's program for the topology. Raises ConfigError if they do not fit each other."""
    with traced_for(topology.devices[0]):
        return Program(config, vocab_size, topology.devices)


def make_plan(config: Config, vocab_size: int, topology: Topology) -> StepPlan:
    """Compile the training step that `config` stands for. Raises ConfigError as `program_for` does."""
    program = program_for(config, vocab_size, topology)
    with traced_for(topology.devices[0]):
        state = program.abstract_state
        batch = program.abstract_batch(pack([], 1, config.train.sequence_length, 0, np.zeros(1, np.int32)))
        compiled, too_large = None, None
        try:
            compiled = program.train_step.compile(state, batch)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            too_large = str(error).split("RESOURCE_EXHAUSTED", 1)[1].lstrip(": ").splitlines()[0]
    tokens = config.train.batch_size * config.train.sequence_length
    parameters, optimizer = _device_bytes(state.params), _device_bytes(state.opt_state)
    hlo = Hlo(compiled.as_text()) if compiled else None
    speeds = (_peak(topology), topology.hardware.bandwidth if topology.hardware else math.inf)
    return StepPlan(
        config=config,
        topology=topology,
        program=program,
        state=State(parameters, optimizer, _device_bytes((state, batch)) - parameters - optimizer),
        memory=step_memory(compiled) if compiled else None,
        too_large=too_large,
        costs=costs(hlo, *speeds, grouped_fill=_filled(config, program)) if hlo else None,
        exchanges=tuple(collectives(hlo, program.mesh.shape)) if hlo else (),
        model_flops=tokens * train_flops_per_token(config, program.vocab_size) / program.mesh.size,
    )


def state_bytes(program: Program) -> int:
    """Return the bytes of the state on each device, without compiling."""
    return _device_bytes(program.abstract_state)


def _peak(topology: Topology) -> float:
    return peak_flops(topology.devices[0]) or math.inf


def _filled(config: Config, program: Program) -> float:
    """Return the share that balanced routing fills of the rows for which a device has room."""
    devices = program.mesh.shape["expert"] if program.expert_parallel else 1
    here = config.moe.num_experts // devices
    most = config.moe.most_experts_per_token
    if program.expert_parallel != "gather":
        most = min(most, here)
    return config.moe.experts_per_token / (devices * most)


def _device_bytes(tree: Any) -> int:
    """Return the bytes on one device of shapes with shardings."""

    def size(leaf: Any) -> int:
        dtype = np.dtype(np.uint32) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))
