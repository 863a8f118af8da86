"""A tiny model to take training steps with, its batches, and ways to compare states."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers.layers import with_settings

from default_moe.config import Config, MeshConfig, ModelConfig, MoEConfig, OptimConfig, TrainConfig
from default_moe.training.program import Program

VOCAB = 23
CONFIG = Config(
    model=ModelConfig(d_model=16, num_layers=2, num_dense_layers=0, num_heads=2),
    moe=MoEConfig(num_experts=4, top_k=1, expert_dim=24),
    train=TrainConfig(num_steps=20, batch_size=8, sequence_length=6),
    optim=OptimConfig(peak_lr=1e-2),
    mesh=MeshConfig(data=1),
)


def make_batch(seed=0, batch_size=8, length=6):
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (batch_size, length + 1)).astype(np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": np.ones((batch_size, length), np.float32),
        "segment_ids": np.ones((batch_size, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (batch_size, 1)),
        "target_bytes": np.ones((batch_size, length), np.int32),
    }


@functools.cache
def program_for(config):
    """One program for each config, compiled once for all tests."""
    return Program(config, VOCAB, devices=jax.devices()[:1])


@functools.cache
def _first_state(config):
    return program_for(config).new_state()


def new_state(config):
    """The state before the first step, for a step to consume."""
    return copy(_first_state(config))


def step_of(config, state=None, batch=None):
    """(state after, metrics) of one step, the first if no state is given, which the step consumes."""
    return program_for(config).train_step(state or new_state(config), batch or make_batch())


def poisoned(state, where="head"):
    """A copy in which one weight is not a number."""
    bad = copy(state)
    bad.params[where] = bad.params[where].at[0, 0].set(jnp.nan)
    return bad


def change(config, **sections):
    """`config` with fields changed: change(config, moe={"top_k": 2})."""
    return dataclasses.replace(
        config,
        **{
            name: (with_settings if name == "moe" else dataclasses.replace)(getattr(config, name), **fields)
            for name, fields in sections.items()
        },
    )


def ema_of(state):
    return np.asarray(state.variables["default_vectors"]["moe_layers"]["moe"]["ema"])


def assert_trees_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def copy(tree):
    return jax.tree.map(lambda x: x.copy(), tree)


WITH_DENSE_LAYER = change(CONFIG, model={"num_layers": 3, "num_dense_layers": 1})
