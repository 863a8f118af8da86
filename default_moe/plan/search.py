"""Other batches, meshes and ways to save memory, tried by compiling them."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

from default_moe.config import REMATS, Config
from default_moe.errors import ConfigError
from default_moe.hardware import peak_flops
from default_moe.model.size import parameter_counts, train_flops_per_token
from default_moe.plan.step_plan import StepPlan, make_plan, program_for, state_bytes
from default_moe.plan.topologies import Topology
from default_moe.training.program import Program

_ATTEMPTS = 5


def largest_microbatch(plan: StepPlan, make: Callable[[Config], StepPlan]) -> StepPlan | None:
    """Return the plan with the most sequences at a time that fits; None if not even one a device does.

    Temporaries grow about linearly with the sequences: each attempt is where the line through the last two says that
    memory ends. Stops when the gap is an eighth, or after `_ATTEMPTS`. make: of a config, its plan.
    """
    fits, too_many, best = 0, math.inf, None
    known: list[tuple[int, float]] = []
    for _ in range(_ATTEMPTS):
        size, train = plan.sequences_a_device, plan.config.train
        if plan.fits:
            fits, best = size, plan
        else:
            too_many = size
        known += [(size, plan.temporaries)] if plan.temporaries else []
        if too_many - fits <= max(1, fits // 8):
            break
        next_size = int(min(max(_where_it_ends(known, _room(plan)), fits + 1), too_many - 1))
        batch_size = next_size * plan.program.num_batch_shards * train.grad_accum_steps
        config = dataclasses.replace(plan.config, train=dataclasses.replace(train, batch_size=batch_size))
        plan = make(dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch_size=batch_size)))
    return best


def largest_by_proportion(plan: StepPlan) -> int | None:
    """Return how many sequences a device would hold if temporaries were proportional to them; None if not known.

    That is a little too few where `plan` fits, and too many where it does not.
    """
    if plan.topology.hardware is None or plan.temporaries is None:
        return None
    return max(0, int(_where_it_ends([(plan.sequences_a_device, plan.temporaries)], _room(plan))))


def _room(plan: StepPlan) -> float:
    """Return the bytes that the state leaves."""
    return plan.topology.hardware.memory - sum(plan.state) if plan.topology.hardware else math.inf


def _where_it_ends(known: list[tuple[int, float]], room: float) -> float:
    """Return the size at which temporaries take all the room, by the last two sizes whose temporaries are known."""
    if not known:
        return 1
    (size, bytes_), *others = reversed(known)
    slope, start = bytes_ / size, 0.0
    if others and others[0][0] != size:
        slope = (bytes_ - others[0][1]) / (size - others[0][0])
        start = bytes_ - slope * size
    return (room - start) / slope if slope > 0 else size + 1


def search(
    config: Config, vocab_size: int, topology: Topology, most: int, report: Callable[[StepPlan], None]
) -> list[StepPlan]:
    """Return plans of the same global batch that fit, the fastest by estimate first; `most` are compiled.

    Varies the mesh, what is recomputed and the number of microbatches. What a rough formula takes for the fastest is
    compiled first; what does not fit is tried again in more microbatches. report: is told each plan as it is made.
    Raises ConfigError if there is no mesh that `config` could be tried on.
    """
    queue = list(_candidates(config, vocab_size, topology))
    if not queue:
        raise ConfigError(
            f"no mesh of {topology.name} can be tried: train.batch_size, {config.train.batch_size}, must be a multiple "
            f"of its {len(topology.devices)} devices, and the state must fit them"
        )
    found: list[StepPlan] = []
    while queue and most:
        most -= 1
        queue.sort(key=lambda c: _rough_seconds(c, vocab_size, topology), reverse=True)
        candidate = queue.pop()
        plan = make_plan(candidate, vocab_size, topology)
        report(plan)
        if plan.fits:
            found.append(plan)
        elif fewer := _in_more_microbatches(candidate, len(topology.devices)):
            queue.append(fewer)
    return sorted(found, key=lambda plan: sum(plan.seconds or (0.0, 0.0)))


def _candidates(config: Config, vocab_size: int, topology: Topology) -> Iterator[Config]:
    """Give one for each mesh and remat, in as few microbatches as a rough formula says would fit."""
    count = len(topology.devices)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, grad_accum_steps=1))
    for fsdp, expert in itertools.product(_divisors(count), repeat=2):
        if count % (fsdp * expert):
            continue
        mesh = dataclasses.replace(config.mesh, data=count // (fsdp * expert), fsdp=fsdp, expert=expert)
        on_mesh = dataclasses.replace(config, mesh=mesh)
        try:
            program = program_for(on_mesh, vocab_size, topology)
        except ConfigError:  # an axis that does not divide the model or the batch
            continue
        room = topology.hardware.memory - state_bytes(program) if topology.hardware else math.inf
        for remat in REMATS:
            model = dataclasses.replace(config.model, remat=remat)
            candidate: Config | None = dataclasses.replace(on_mesh, model=model)
            while candidate and room < _rough_temporaries(candidate, program, count):
                candidate = _in_more_microbatches(candidate, count)
            if candidate:
                yield candidate


def _in_more_microbatches(config: Config, num_devices: int) -> Config | None:
    """Return it with the next number of microbatches that divides the batch; None if a device holds one sequence."""
    train = config.train
    larger = [n for n in _divisors(train.batch_size // num_devices) if n > train.grad_accum_steps]
    return dataclasses.replace(config, train=dataclasses.replace(train, grad_accum_steps=larger[0])) if larger else None


def _rough_temporaries(config: Config, program: Program, num_devices: int) -> float:
    """Return bytes of a device: gradients, what the backward pass keeps, and what one layer needs meanwhile."""
    model, moe, train = config.model, config.moe, config.train
    sequences = train.batch_size // train.grad_accum_steps / num_devices
    tokens = sequences * train.sequence_length
    scores = 6 * sequences * model.num_heads * train.sequence_length**2 if program.attention == "xla" else 0
    attention = 2 * model.d_model + 2 * (model.num_heads + model.kv_heads) * model.head_size
    products = 2 * tokens * (attention + moe.most_experts_per_token * (2 * moe.expert_dim + model.d_model))
    kept = {"full": 2 * tokens * model.d_model, "dots": products, "none": 2 * products + scores}[model.remat]
    logits = 6 * min(tokens * program.vocab_size, train.logits_per_chunk)
    gradients = 4 * parameter_counts(config, program.vocab_size).total / (config.mesh.fsdp * config.mesh.expert)
    return gradients + model.num_layers * kept + 2 * products + 2 * scores + logits


def _rough_seconds(config: Config, vocab_size: int, topology: Topology) -> float:
    """Return the time of a step, to decide what to compile first: arithmetic and exchanges."""
    mesh, train, count = config.mesh, config.train, len(topology.devices)
    hardware, peak = topology.hardware, peak_flops(topology.devices[0])
    if hardware is None or peak is None:
        return float(train.grad_accum_steps)
    counts = parameter_counts(config, vocab_size)
    held = counts.total - counts.experts + counts.experts / mesh.expert
    weights = 3 * 2 * held * (1 - 1 / mesh.fsdp) * train.grad_accum_steps
    gradients = 2 * 4 * held / mesh.fsdp * (1 - 1 / mesh.data) * train.grad_accum_steps
    tokens = train.batch_size * train.sequence_length / count
    exchanged = 12 * tokens * config.model.d_model * config.model.num_moe_layers * (mesh.expert - 1)
    recomputed = {"none": 1.0, "dots": 1.05, "full": 1.33}[config.model.remat]
    flops = tokens * train_flops_per_token(config, vocab_size) * recomputed
    return flops / peak + (weights + gradients + exchanged) / hardware.link


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
