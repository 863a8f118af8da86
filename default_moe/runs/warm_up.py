"""Default vectors of a model that has none yet: the means of its experts' outputs over the first batches."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array

from default_moe.config import Config
from default_moe.data import Batch, Rows
from default_moe.model.language_model import LanguageModel
from default_moe.moe.layer import DEFAULT_VECTOR_SUMS, DEFAULT_VECTORS, zero_sums
from default_moe.training.program import Program
from default_moe.training.state import TrainState
from default_moe.training.step import model_inputs, split_batch


def warm_up(program: Program, state: TrainState, rows: Rows, num_batches: int) -> TrainState:
    """`state` with default vectors that are the means over the next batches of `rows`, and nothing else changed."""
    return make_warm_up(program)(state, rows, num_batches)


def make_warm_up(program: Program) -> Callable[[TrainState, Rows, int], TrainState]:
    """Make `warm_up(state, rows, num_batches)` of a program, compiled once for all states."""
    config, batch_size = program.config, program.config.train.batch_size
    shardings, replicated = program.state_shardings, program.replicated
    no_sums = program.jit(zero_sums, out_shardings=replicated)
    step = program.jit(
        _make_warm_up_step(program.model, config),
        in_shardings=(
            shardings.params,
            shardings.variables,
            replicated,
            program.batch_sharding,
            shardings.rng,
            replicated,
        ),
        out_shardings=(shardings.variables[DEFAULT_VECTORS], replicated),
    )

    def warmed_up(state: TrainState, rows: Rows, num_batches: int) -> TrainState:
        vectors = state.variables[DEFAULT_VECTORS]
        sums = no_sums(vectors)
        for index in range(int(state.step), int(state.step) + num_batches):

            def load(first: int, count: int, start: int = index * batch_size) -> Batch:
                return rows.batch(start + first, count)

            batch = program.put_batch(load, batch_size)
            variables = {**state.variables, DEFAULT_VECTORS: vectors}
            vectors, sums = step(state.params, variables, sums, batch, state.rng, np.int32(index))
        jax.block_until_ready(vectors)  # so that running out of memory is noticed here
        return dataclasses.replace(state, variables={**state.variables, DEFAULT_VECTORS: vectors})

    return warmed_up


def _make_warm_up_step(
    model: LanguageModel, config: Config
) -> Callable[[Any, Any, Any, Batch, Array, Array], tuple[Any, Any]]:
    """`warm_up_step(params, variables, sums, batch, rng, index) -> (default vectors, sums)` of training on a batch.

    With `sums`, `zero_sums` at first, handed on, the default vectors are the mean over all batches so far, with a
    decay of 0: nothing of their initial value stays but where an expert had no token. No other state moves.
    Microbatches are as large as in training.  rng, index: the state's key, and which batch this is.
    """
    method: Any = config.moe.method
    model = model.clone(moe=dataclasses.replace(config.moe, router=dataclasses.replace(method, ema_decay=0.0)))
    num_microbatches = config.train.grad_accum_steps

    def warm_up_step(params: Any, variables: Any, sums: Any, batch: Batch, rng: Array, index: Array) -> tuple[Any, Any]:
        def microstep(moving: dict[str, Any], inputs: tuple) -> tuple[dict[str, Any], None]:
            microbatch, key = inputs
            _, moved = model.apply(
                {"params": params, **variables, **moving},
                train=True,
                mutable=list({*moving, *variables}),
                rngs={"router": key},
                **model_inputs(microbatch, config),
            )
            return {name: moved[name] for name in moving}, None

        moving = {DEFAULT_VECTORS: variables[DEFAULT_VECTORS], DEFAULT_VECTOR_SUMS: sums}
        keys = jax.random.split(jax.random.fold_in(rng, index), num_microbatches)
        moving, _ = jax.lax.scan(microstep, moving, (split_batch(batch, num_microbatches), keys))
        return moving[DEFAULT_VECTORS], moving[DEFAULT_VECTOR_SUMS]

    return warm_up_step
