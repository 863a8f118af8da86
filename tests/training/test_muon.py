"""Muon: its updates compared with plain NumPy, what it is for, and what devices send each other for it."""

import dataclasses
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.steps import VOCAB, WITH_DENSE_LAYER, assert_trees_equal, change

from default_moe.config import MeshConfig, OptimConfig
from default_moe.plan.collectives import collectives
from default_moe.plan.hlo import Hlo
from default_moe.runs.checkpoint import CheckpointStore
from default_moe.training.optimizer import make_optimizer
from default_moe.training.program import Program

RNG = np.random.default_rng(0)
SHAPES = {
    "embed": (7, 6),
    "moe_layers": {
        "attention": {"query": {"kernel": (2, 6, 2, 4)}, "out": {"kernel": (2, 2, 4, 6)}},
        "ffn_norm": {"scale": (2, 6)},
        "moe": {"router": {"kernel": (2, 6, 3)}, "experts": {"up": (2, 3, 6, 9), "down": (2, 3, 9, 6)}},
    },
}
PARAMS, *GRADS = (
    jax.tree.map(lambda shape: RNG.normal(size=shape), SHAPES, is_leaf=lambda x: isinstance(x, tuple)) for _ in range(3)
)
MATRICES = {  # by the name of a parameter: the layer, and the expert, and what makes a matrix of it
    "moe_layers.attention.query.kernel": [((1,), (6, 8))],
    "moe_layers.attention.out.kernel": [((1,), (8, 6))],
    "moe_layers.moe.experts.up": [((0, 2), (6, 9)), ((1, 0), (6, 9))],
    "moe_layers.moe.experts.down": [((1, 1), (9, 6))],
}


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


def newton_schulz(x):
    """Five turns of the quintic of Jordan et al. 2024, of a matrix of norm 1."""
    x = x / np.sqrt((x**2).sum())
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def updates_of(**fields):
    """The updates of two steps, and the state after them. No warm-up, no fall."""
    config = OptimConfig(
        name="muon", peak_lr=0.1, warmup_fraction=0, final_lr_fraction=1, weight_decay=0.3, clip_norm=1e9, **fields
    )
    optimizer = make_optimizer(config, 100)
    params, *grads = jax.tree.map(jnp.float32, (PARAMS, *GRADS))

    @jax.jit
    def two_updates():
        first, state = optimizer.update(grads[0], optimizer.init(params), params)
        second, state = optimizer.update(grads[1], state, params)
        return first, second, state

    *found, state = two_updates()
    return list(map(named, found)), state


def test_updates_are_those_of_numpy():
    """Of experts' matrices, of attention's projections from and into D, and of what AdamW moves, the router slower."""
    found, _ = updates_of(router_lr_multiplier=0.5)
    params, grads = named(PARAMS), list(map(named, GRADS))
    for name, matrices in MATRICES.items():
        for index, shape in matrices:
            momentum = np.zeros(shape)
            for g, update in zip(grads, found, strict=True):
                g = g[name][index].reshape(shape)
                momentum = 0.95 * momentum + g
                expected = 0.2 * max(shape) ** 0.5 * newton_schulz(g + 0.95 * momentum)
                expected = -0.1 * (expected + 0.3 * params[name][index].reshape(shape))
                np.testing.assert_allclose(update[name][index].reshape(shape), expected, rtol=1e-4, atol=1e-6)
    for name, factor in (("embed", 1), ("moe_layers.ffn_norm.scale", 1), ("moe_layers.moe.router.kernel", 0.5)):
        m = v = np.zeros(1)
        for t, (g, update) in enumerate(zip(grads, found, strict=True), 1):
            m, v = 0.9 * m + 0.1 * g[name], 0.95 * v + 0.05 * g[name] ** 2
            expected = -0.1 * factor * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
            np.testing.assert_allclose(update[name], expected, rtol=1e-5)


def test_updates_are_about_as_large_as_adamws():
    """Singular values of about 1 (0.7 to 1.2) make a root mean square of 0.2, that of AdamW's in training."""
    optimizer = make_optimizer(OptimConfig(name="muon", peak_lr=1.0, warmup_fraction=0, weight_decay=0), 10)
    params = {"experts": {"up": jnp.float32(RNG.normal(size=(3, 32, 64)))}}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    rms = np.sqrt((np.asarray(updates["experts"]["up"]) ** 2).mean(axis=(1, 2)))
    np.testing.assert_allclose(rms, 0.2, rtol=0.2)


@pytest.mark.parametrize("fields", [{"moment_dtype": "bfloat16"}, {"factored": True}, {"decay_all": True}], ids=str)
def test_what_else_can_be_set(fields):
    """Where nothing is rounded yet the first step moves matrices alike. Norms decay if all parameters do."""
    (plain, _), _ = updates_of()
    (first, _), state = updates_of(**fields)
    for name in MATRICES:
        np.testing.assert_array_equal(first[name], plain[name])
    norm = "moe_layers.ffn_norm.scale"
    decay = -0.03 * named(PARAMS)[norm] if "decay_all" in fields else 0
    np.testing.assert_allclose(first[norm], plain[norm] + decay, rtol=1e-5)
    kept = {a.dtype for a in jax.tree.leaves(state) if a.ndim > 1}
    assert kept == {jnp.dtype(fields.get("moment_dtype", "float32"))}


def test_devices_send_each_other_parts_of_matrices_and_the_state_can_be_saved(tmp_path):
    """Two devices hold halves of each matrix along fsdp. Of two MoE layers they share out whole ones: each sends half
    of what it holds of gradients, of momentum and of updates. Of the one dense layer each sends all that it holds of
    the former two. Else they exchange only parts of norms.
    """
    config = dataclasses.replace(change(WITH_DENSE_LAYER, optim={"name": "muon"}), mesh=MeshConfig(2, 2, 2))
    program = Program(config, VOCAB)
    abstract = program.abstract_state
    shardings = program.state_shardings.params, program.state_shardings.opt_state

    def update(params, opt_state):
        grads = jax.tree.map(jnp.cos, params)
        updates, opt_state = program.optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    jitted = program.jit(update, in_shardings=shardings, out_shardings=shardings)
    compiled = jitted.compile(abstract.params, abstract.opt_state)
    sent = Counter()
    for one in collectives(Hlo(compiled.as_text()), program.mesh.shape):
        sent[one.axes if one.bytes > 100 else "scalars"] += one.runs * one.bytes
    momentum = abstract.opt_state[1][0].inner_states["muon"]
    held = sum(4 * math.prod(a.sharding.shard_shape(a.shape)) for a in jax.tree.leaves(momentum))
    dense = 4 * (4 * 16 * 16 + 3 * 16 * 24) // 2
    assert held - dense == 4 * 2 * (4 * 16 * 16 // 2 + 4 * 3 * 16 * 24 // 4)
    assert 0 < sent.pop(("fsdp",)) <= 3 * (held - dense) // 2 + 2 * dense
    assert sent.keys() <= {"scalars"}

    state = program.new_state()
    params, opt_state = compiled(state.params, state.opt_state)
    state = dataclasses.replace(state, params=params, opt_state=opt_state)
    with CheckpointStore(tmp_path) as store:
        store.save(0, state, {})
        store.wait()
        restored, _, _ = store.restore_latest(abstract)
    assert_trees_equal(restored, state)
