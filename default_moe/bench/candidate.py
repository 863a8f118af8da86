"""A config's training step, made to be timed: whole, and in its parts."""

import time
from typing import Any

import jax
import numpy as np
import optax

from default_moe.config import Config
from default_moe.errors import ConfigError
from default_moe.training.memory import StepMemory, out_of_memory_in_one_line, step_memory
from default_moe.training.program import Program
from default_moe.training.step import Batch, make_gradient


class StepCandidate:
    """The compiled step of a config with its state, which each call replaces.

    compile_seconds: of the step.  memory: of the step, per device.
    Raises ConfigError, among other things if the step does not fit a device.
    """

    def __init__(self, config: Config, batch: Batch, vocab_size: int, devices: list[Any] | None = None):
        self.program = program = Program(config, vocab_size, devices)
        began = time.perf_counter()
        self.compiled = program.compile_train_step(jax.tree.map(lambda a: a[:1], batch))
        self.compile_seconds = time.perf_counter() - began
        self.memory: StepMemory = step_memory(self.compiled)
        with out_of_memory_in_one_line(ConfigError, "making the state", config, program.num_batch_shards):
            self.state = jax.block_until_ready(program.new_state())
        self.batch = program.put_batch(
            lambda first, count: jax.tree.map(lambda a: a[first : first + count], batch), config.train.batch_size
        )
        gradient = make_gradient(program.model, config)

        def optimize(params: Any, opt_state: Any) -> Any:
            updates, opt_state = program.optimizer.update(params, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        self._gradient = program.jit(lambda state, batch: gradient(state, batch, state.rng))
        self._optimize = program.jit(optimize)

    def step(self) -> Any:
        """One training step. The state goes on from it."""
        self.state, metrics = self.compiled(self.state, self.batch)
        return metrics

    def gradient(self) -> Any:
        """Its forward and backward pass alone."""
        return self._gradient(self.state, self.batch)

    def optimizer(self) -> Any:
        """An update with the parameters as their own gradient, alone."""
        return self._optimize(self.state.params, self.state.opt_state)


def random_batch(config: Config, vocab_size: int, seed: int = 0) -> Batch:
    """A batch of the config's shape, its tokens drawn uniformly: arrays [B, L]."""
    shape = (config.train.batch_size, config.train.sequence_length)
    tokens = np.random.default_rng(seed).integers(vocab_size, size=(shape[0], shape[1] + 1), dtype=np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": np.ones(shape, np.float32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "target_bytes": np.ones(shape, np.int32),
    }
