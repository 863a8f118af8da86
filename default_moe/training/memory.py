"""The memory that a compiled step takes, and what to say when there is not enough."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from default_moe.config import Config
from default_moe.errors import ConfigError, TrainingFailed
from default_moe.hardware import memory_bytes

_GIB = 2**30


class StepMemory(NamedTuple):
    """Bytes on each device, as the compiler assigned them. state: all arguments.  temporaries: all else."""

    state: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.state + self.temporaries

    def __str__(self) -> str:
        return (
            f"{self.total / _GIB:.1f} GiB a device ({self.state / _GIB:.1f} of parameters, optimizer state and batch, "
            f"{self.temporaries / _GIB:.1f} of activations and temporaries)"
        )


def step_memory(compiled: Any) -> StepMemory:
    """Return that of a compiled function; results that do not take the place of arguments count as temporaries."""
    m = compiled.memory_analysis()
    results = m.output_size_in_bytes - m.alias_size_in_bytes
    return StepMemory(m.argument_size_in_bytes, m.temp_size_in_bytes + results)


def check_fits(memory: StepMemory, device: jax.Device, config: Config, num_batch_shards: int) -> None:
    """Raises ConfigError if a step does not fit the memory of a device."""
    there = memory_bytes(device)
    if there is not None and memory.total > there:
        raise ConfigError(
            f"the training step needs {memory}, but a {device.device_kind} has {there / _GIB:.1f} GiB: "
            + what_reduces(config, num_batch_shards, state_too_large=memory.state > there)
        )


@contextlib.contextmanager
def out_of_memory_in_one_line(
    error_class: type[ConfigError | TrainingFailed],
    doing: str,
    config: Config,
    num_batch_shards: int,
    evaluation: bool = False,
) -> Iterator[None]:
    """Turns JAX's RESOURCE_EXHAUSTED error, of the compiler or while running, into one line.

    evaluation: whether it is batches of the evaluation that did not fit.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        details = str(error).split("RESOURCE_EXHAUSTED", 1)[1].lstrip(": ").splitlines() or ["no details"]
        advice = what_reduces(config, num_batch_shards, evaluation=evaluation)
        raise error_class(f"out of memory while {doing} ({details[0][:200]}): {advice}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is JAX's error for too little memory on a device."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def what_reduces(config: Config, num_batch_shards: int, state_too_large: bool = False, evaluation: bool = False) -> str:
    """Which settings would need less memory, those that cost least first."""
    advice = [] if config.mesh.fsdp == -1 else ["mesh.data=1 and mesh.fsdp=-1 on more devices"]
    if state_too_large:
        if config.optim.moment_dtype == "float32":
            advice.append("optim.moment_dtype='bfloat16'")
        if not config.optim.factored:
            advice.append("optim.factored=True")
        return ", ".join([*(advice or ["more devices"]), "or a smaller model would need less"])
    microbatch = config.train.batch_size // config.train.grad_accum_steps
    eval_batch = config.eval.batch_size or config.train.batch_size
    if evaluation:
        advice = [f"eval.batch_size below {eval_batch}", *advice] if eval_batch > num_batch_shards else advice
    else:
        if config.model.remat != "full":
            advice.insert(0, "model.remat='full'")
        if microbatch > num_batch_shards:
            advice.insert(0, f"train.grad_accum_steps above {config.train.grad_accum_steps}")
            advice.insert(1, f"train.batch_size below {config.train.batch_size}")
    advice.append(f"train.logits_per_chunk below {config.train.logits_per_chunk}")
    return " or ".join(filter(None, (", ".join(advice[:-1]), advice[-1]))) + " would need less"
