"""Training on eight devices is training on one."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from helpers.emulation import emulate_exchange
from helpers.refusals import refused
from helpers.steps import VOCAB, WITH_DENSE_LAYER, change, ema_of, make_batch

from default_moe.config import MeshConfig
from default_moe.training.program import Program

BASE = change(
    WITH_DENSE_LAYER,
    moe={"num_experts": 8, "top_k": 2, "simbal_weight": 0.1, "coupling_weight": 0.1},
    model={"d_model": 32, "output_z_weight": 0.01},
    optim={"peak_lr": 3e-3},
)


def train(*sizes, steps=20, **sections):
    mesh = dict(zip(("data", "fsdp", "expert"), sizes, strict=True))
    program = Program(change(BASE, mesh=mesh, **sections), VOCAB, jax.devices()[: math.prod(sizes)])
    state, losses, balance = program.new_state(), [], []
    for step in range(steps):
        batch = make_batch(step)

        def rows(start, count, batch=batch):
            return {name: array[start : start + count] for name, array in batch.items()}

        state, metrics = program.train_step(state, program.put_batch(rows, 8))
        losses.append(float(metrics["loss"]))
        balance.append(np.asarray(metrics["layers"].load_balance_loss))
    return program, state, np.array(losses), np.array(balance)


trained = functools.cache(train)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 8), (1, 8, 1)])
def test_losses_vectors_and_balance_are_those_of_one_device(sizes):
    _, state, losses, balance = trained(*sizes)
    _, expected_state, expected_losses, expected_balance = trained(1, 1, 1)
    np.testing.assert_allclose(losses[0], expected_losses[0], rtol=1e-6)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    np.testing.assert_allclose(balance, expected_balance, rtol=1e-4)
    scale = np.abs(ema_of(expected_state)).max()
    np.testing.assert_allclose(ema_of(state), ema_of(expected_state), atol=1e-4 * scale)


def test_accumulation_works_on_a_mesh(monkeypatch):
    sections = {"train": {"grad_accum_steps": 2}}
    _, expected_state, expected_losses, _ = train(1, 1, 1, steps=3, **sections)
    emulate_exchange(monkeypatch)
    sections |= {"model": {"remat": "dots"}, "moe": {"expert_parallel": "exchange"}}
    program, state, losses, _ = train(1, 2, 2, steps=3, **sections)
    assert program.expert_parallel == "exchange"
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    scale = np.abs(ema_of(expected_state)).max()
    np.testing.assert_allclose(ema_of(state), ema_of(expected_state), atol=1e-5 * scale)


def test_state_is_split_as_the_rules_say():
    _, state, _, _ = trained(2, 2, 2)

    def parts(array):
        """How many ways each axis is split."""
        shard = array.sharding.shard_shape(array.shape)
        return tuple(whole // part for whole, part in zip(array.shape, shard, strict=True))

    moe = state.params["moe_layers"]["moe"]
    assert parts(moe["experts"]["gate"]) == (1, 2, 2, 1)  # [layers, experts, embed, mlp]
    assert parts(moe["experts"]["down"]) == (1, 2, 1, 2)
    assert parts(moe["router"]["kernel"]) == (1, 2, 1)
    assert parts(state.params["embed"]) == (1, 2)
    assert parts(state.variables["default_vectors"]["moe_layers"]["moe"]["ema"]) == (1, 2, 1)
    adam = state.opt_state[1][0]
    assert parts(adam.mu["moe_layers"]["moe"]["experts"]["gate"]) == (1, 2, 2, 1)
    assert parts(adam.nu["embed"]) == (1, 2)


@pytest.mark.parametrize(
    ("mesh", "sections", "words"),
    [
        (MeshConfig(3, 1, 1), {}, "does not fit 8 devices"),
        (MeshConfig(-1, 3, 1), {}, "does not fit 8 devices"),
        (MeshConfig(-1, 1, 1), {"train": {"batch_size": 12}}, "multiple of the 8 devices"),
        (MeshConfig(-1, 1, 1), {"train": {"batch_size": 16, "grad_accum_steps": 4}}, "grad_accum_steps is 4"),
        (MeshConfig(-1, 1, 1), {"eval": {"batch_size": 3}}, "eval.batch_size is 3"),
        (MeshConfig(-1, 1, 8), {"moe": {"num_experts": 6}}, "moe.num_experts is 6"),
        (MeshConfig(-1, 1, 2), {"moe": {"expert_parallel": "exchange"}}, "moe.expert_parallel is 'exchange'"),
        (MeshConfig(-1, 8, 1), {"model": {"d_model": 36}}, "mesh.fsdp"),
        (MeshConfig(), {"model": {"vocab_size": 7}}, "model.vocab_size is 7"),
    ],
)
def test_what_does_not_fit_the_devices_is_refused_in_one_line(mesh, sections, words):
    with refused(words):
        Program(change(dataclasses.replace(BASE, mesh=mesh), **sections), VOCAB)
