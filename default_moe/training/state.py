"""Everything that training changes."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from default_moe.model.language_model import LanguageModel
from default_moe.sharding import num_shards


@flax.struct.dataclass
class TrainState:
    """The state of a run: all that a checkpoint holds, and all that a step may change.

    step: int32, training steps done.  params, opt_state: of the model and optax.  variables: mutable collections,
    such as "default_vectors".  rng: key that each step's randomness derives from, with the step.
    bad_steps: int32, steps skipped because their loss or gradient was not finite; bad_steps_in_row: the latest ones.
    """

    step: Array
    params: Any
    variables: Any
    opt_state: Any
    rng: Array
    bad_steps: Array
    bad_steps_in_row: Array


def initial_state(model: LanguageModel, optimizer: optax.GradientTransformation, seed: Array | int) -> TrainState:
    """A new state; the same for the same seed (uint32) whatever the mesh."""
    init_key, step_key = jax.random.split(jax.random.key(seed))
    variables = dict(model.init(init_key, jnp.zeros((num_shards("batch"), 2), jnp.int32), train=False))
    params = variables.pop("params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        variables=variables,
        opt_state=optimizer.init(params),
        rng=step_key,
        bad_steps=jnp.zeros((), jnp.int32),
        bad_steps_in_row=jnp.zeros((), jnp.int32),
    )
