"""Everything that training changes."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array


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


def initial_state(
    make_variables: Callable[[Array], Any], optimizer: optax.GradientTransformation, seed: Array | int
) -> TrainState:
    """Make a new state; the same for the same seed (uint32) whatever the mesh.

    make_variables: gives the model's variables for a random key, those of `traced_init` for instance.
    """
    init_key, step_key = jax.random.split(jax.random.key(seed))
    return first_state(make_variables(init_key), optimizer, step_key)


def first_state(variables: Any, optimizer: optax.GradientTransformation, rng: Array) -> TrainState:
    """Return the state before the first step of a model with these variables, `params` among them."""
    others = dict(variables)
    params = others.pop("params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        variables=others,
        opt_state=optimizer.init(params),
        rng=rng,
        bad_steps=jnp.zeros((), jnp.int32),
        bad_steps_in_row=jnp.zeros((), jnp.int32),
    )
