"""States to save, and ways to look at what was saved."""

import os
from pathlib import Path

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from default_moe.config import CheckpointConfig
from default_moe.runs.checkpoint import CheckpointStore

META = {"config": {"model": {"d_model": 16}}, "corpus_hash": "abc"}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    variables: dict
    opt_state: optax.OptState
    rng: jax.Array
    bad_steps: jax.Array


def make_state(step: int, width: int = 16) -> State:
    """A state that differs at every step, with boxed parameters, as Flax's logical axes make them."""
    keys = jax.random.split(jax.random.key(step), 3)
    params = {
        "dense": {"kernel": nn.LogicallyPartitioned(jax.random.normal(keys[0], (8, width)), ("embed", "mlp"))},
        "scale": jax.random.normal(keys[1], (8,), jnp.bfloat16),
    }
    opt_state = OPTIMIZER.init(nn.unbox(params))
    _, opt_state = OPTIMIZER.update(nn.unbox(params), opt_state, nn.unbox(params))
    variables = {"default_vectors": {"ema": jax.random.normal(keys[2], (8, 4))}}
    return State(jnp.int32(step), params, variables, opt_state, jax.random.key(step + 7), jnp.int32(0))


def make_mesh(*shape: int) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, ("data", "fsdp", "expert"), axis_types=(AxisType.Auto,) * 3)


def shardings(mesh: jax.sharding.Mesh, state: State) -> State:
    """The first axis of length 8 split over fsdp and expert."""
    split = NamedSharding(mesh, P(("fsdp", "expert")))
    whole = NamedSharding(mesh, P())
    return jax.tree.map(lambda x: split if x.shape and x.shape[0] == 8 else whole, state)


def abstract(state, sharding=None):
    """Shapes and dtypes of `state`; sharding: one for all leaves, a tree of them, or None."""
    if not isinstance(sharding, State):
        sharding = jax.tree.map(lambda x: sharding or SingleDeviceSharding(jax.devices()[0]), state)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, sharding)


def assert_equal(actual, expected) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def latest(workdir: Path, wanted, report=pytest.fail):
    """State, meta and step of the newest whole step, of a store of its own."""
    return CheckpointStore(workdir, report=report).restore_latest(abstract(wanted))


def save_steps(workdir: Path, *steps: int, keep_last: int = 9) -> None:
    with CheckpointStore(workdir, CheckpointConfig(keep_last=keep_last)) as store:
        for step in steps:
            assert store.save(step, make_state(step), META)


def biggest_file(folder: Path) -> Path:
    """Of the arrays: what they compress to decides whether they are larger than the manifest."""
    return max((path for path in folder.rglob("state/**/*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)
