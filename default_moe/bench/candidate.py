"""A config's training step, made to be timed: whole, and in its parts."""

import dataclasses
import time
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax

from default_moe.config import Config
from default_moe.errors import ConfigError
from default_moe.training.memory import StepMemory, out_of_memory_in_one_line, step_memory
from default_moe.training.program import Program
from default_moe.training.state import TrainState
from default_moe.training.step import Batch, make_gradient


class StepCandidate:
    """The compiled step of a config with its state, which each call replaces.

    compile_seconds: of the step.  memory: of the step, per device.
    """

    def __init__(
        self,
        config: Config,
        batch: Batch,
        vocab_size: int,
        devices: list[Any] | None = None,
        other: "StepCandidate | None" = None,
    ):
        """other: one of another method or optimizer, to train the same parameters, which a device holds only once.

        Raises ConfigError, for example if the step does not fit a device.
        """
        self.program = program = Program(config, vocab_size, devices)
        shardings = program.state_shardings
        began = time.perf_counter()
        self._step = program.compile_train_step(jax.tree.map(lambda a: a[:1], batch))
        self.compile_seconds = time.perf_counter() - began
        self.memory: StepMemory = step_memory(self._step)

        def initial(part: str) -> Any:
            make = program.jit(
                lambda seed: getattr(program.initial_state(seed), part), out_shardings=getattr(shardings, part)
            )
            return jax.block_until_ready(make(np.uint32(config.train.seed)))

        with out_of_memory_in_one_line(ConfigError, "making the state", config, program.num_batch_shards):
            if other:
                self._shared: SimpleNamespace = other._shared
                self._variables = initial("variables")
                if config.optim not in self._shared.opt_states:
                    self._shared.opt_states[config.optim] = initial("opt_state")
            else:
                state = jax.block_until_ready(program.new_state())
                self._variables = state.variables
                self._shared = SimpleNamespace(state=state, opt_states={config.optim: state.opt_state})
        self._batch = program.put_batch(
            lambda first, count: jax.tree.map(lambda a: a[first : first + count], batch), config.train.batch_size
        )
        gradient = make_gradient(program.model, config)

        def optimize(params: Any, opt_state: Any) -> Any:
            updates, opt_state = program.optimizer.update(params, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        self._gradient = program.jit(lambda state, batch: gradient(state, batch, state.rng))
        self._optimize = program.jit(
            optimize, donate_argnums=(0, 1), out_shardings=(shardings.params, shardings.opt_state)
        )

    @property
    def state(self) -> TrainState:
        """The state, with this candidate's own variables, and the optimizer's of all with the same optimizer."""
        opt_state = self._shared.opt_states[self.program.config.optim]
        return dataclasses.replace(self._shared.state, variables=self._variables, opt_state=opt_state)

    def step(self) -> Any:
        """Do one training step and return its metrics."""
        state, metrics = self._step(self.state, self._batch)
        self._shared.state, self._variables = state, state.variables
        self._shared.opt_states[self.program.config.optim] = state.opt_state
        return metrics

    def gradient(self) -> Any:
        """Do only the forward and backward pass of a step."""
        return self._gradient(self.state, self._batch)

    def optimizer(self) -> Any:
        """Do only an update of a step, with the parameters as their own gradient."""
        params, opt_state = self._optimize(self.state.params, self.state.opt_state)
        self._shared.state = dataclasses.replace(self._shared.state, params=params)
        self._shared.opt_states[self.program.config.optim] = opt_state
        return params, opt_state


def random_batch(config: Config, vocab_size: int, seed: int = 0) -> Batch:
    """Return a batch of the config's shape, its tokens drawn uniformly: arrays [B, L]."""
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
